// One task is one image and one vector of channels (plane.h). The same code handles the channels
// after the last whole vector one by one.
#include "core/context.h"
#include "core/parallel.h"
#include "ops/norm_relu_pool/plane.h"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {
namespace {

constexpr int64_t kPasses = 3;  // over a plane; the backward and dual operators make a few more

// Runs task(Plane<T, Pack>) over all images and channels. Pack is a vector, or T for the last
// channels.
template <class T, class Task>
void for_each_plane(const PlaneShape& shape, int threads, const Task& task) {
    constexpr int lanes = kLanes<T, Vector<T>>;
    const int64_t vectors = (shape.channels + lanes - 1) / lanes;
    const double each = move_time<T>(kPasses * shape.height * shape.width * lanes);
    parallel_for(shape.batch * vectors, threads, each, [&](int64_t i) {
        const int64_t b = i / vectors, first = i % vectors * lanes;
        if (first + lanes <= shape.channels) {
            task(Plane<T, Vector<T>>{shape, b, first});
        } else {
            for (int64_t c = first; c < shape.channels; ++c) task(Plane<T, T>{shape, b, c});
        }
    });
}

}  // namespace

template <class T>
Status norm_relu_pool(const NormReluPool<T>& p, Context context) {
    for_each_plane<T>(p.shape, context.threads,
                      [&](const auto& plane) { norm_relu_pool_plane(plane, p); });
    return kSuccess;
}

template <class T>
Status norm_relu_pool_backward(const NormReluPoolBackward<T>& p, Context context) {
    for_each_plane<T>(p.shape, context.threads,
                      [&](const auto& plane) { norm_relu_pool_backward_plane(plane, p); });
    return kSuccess;
}

template <class T>
Status norm_relu_pool_dual(const NormReluPoolDual<T>& p, Context context) {
    for_each_plane<T>(p.shape, context.threads,
                      [&](const auto& plane) { norm_relu_pool_dual_plane(plane, p); });
    return kSuccess;
}

template <class T>
Status norm_relu_pool_dual_backward(const NormReluPoolDualBackward<T>& p, Context context) {
    for_each_plane<T>(p.shape, context.threads,
                      [&](const auto& plane) { norm_relu_pool_dual_backward_plane(plane, p); });
    return kSuccess;
}

PDD_INSTANTIATE_HALF(norm_relu_pool, NormReluPool)
PDD_INSTANTIATE_HALF(norm_relu_pool_backward, NormReluPoolBackward)
PDD_INSTANTIATE_HALF(norm_relu_pool_dual, NormReluPoolDual)
PDD_INSTANTIATE_HALF(norm_relu_pool_dual_backward, NormReluPoolDualBackward)

}  // namespace pdd::PDD_BACKEND
