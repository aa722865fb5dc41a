#include "core/context.h"
#include "core/cuda.cuh"
#include "ops/cross_entropy/math.h"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {
namespace {

// One thread a sample: a batch has at most a few thousand, of 10 to 200 logits each, which the first-level
// cache holds. A label out of range gives a loss of NaN; telling the host would cost a synchronisation.
constexpr int kThreads = 128;

template <class T, class Params>
__device__ Label<T> label_of(const Params& p, int64_t b) {
    return {p.hard ? p.hard[b] : 0, p.soft ? p.soft + b * p.classes : nullptr};
}

template <class T>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(const CrossEntropy<T> p) {
    const T scale = T(1) / static_cast<T>(p.batch);
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; b < p.batch; b += step) {
        const int64_t row = b * p.classes;
        cross_entropy_sample(p.logits + row, label_of<T>(p, b), p.classes, scale, p.losses + b, p.grad_logits + row);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) cross_entropy_dual_kernel(const CrossEntropyDual<T> p) {
    const T scale = T(1) / static_cast<T>(p.batch);
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; b < p.batch; b += step) {
        const int64_t row = b * p.classes;
        cross_entropy_dual_sample(p.logits + row, p.logits_tangent + row, label_of<T>(p, b), p.classes, scale,
                                  p.losses_tangent + b, p.grad_logits + row, p.grad_logits_tangent + row,
                                  p.grad_labels_tangent ? p.grad_labels_tangent + row : nullptr);
    }
}

}  // namespace

template <class T>
Status cross_entropy(const CrossEntropy<T>& p, Context context) {
    const unsigned grid = grid_for((p.batch + kThreads - 1) / kThreads);
    return launch(cross_entropy_kernel<T>, grid, kThreads, 0, context, p);
}

template <class T>
Status cross_entropy_dual(const CrossEntropyDual<T>& p, Context context) {
    const unsigned grid = grid_for((p.batch + kThreads - 1) / kThreads);
    return launch(cross_entropy_dual_kernel<T>, grid, kThreads, 0, context, p);
}

PDD_INSTANTIATE(cross_entropy, CrossEntropy)
PDD_INSTANTIATE(cross_entropy_dual, CrossEntropyDual)

}  // namespace pdd::PDD_BACKEND
