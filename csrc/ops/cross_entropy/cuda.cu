// One warp per sample, with its lanes across the classes: reads and writes are runs of neighboring
// elements, and the sums are butterflies. A label out of range gives a loss of NaN, because
// reporting it to the host would cost a synchronization.
#include "core/context.h"
#include "core/cuda.cuh"
#include "ops/cross_entropy/math.h"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {
namespace {

constexpr int kSamples = 4;  // per block
constexpr int kThreads = 32 * kSamples;

struct Warp {
    int64_t first;
    static constexpr int64_t step = 32;

    template <class T>
    __device__ __forceinline__ T sum(T value) const {
        return warp_sum(value);
    }
    template <class T>
    __device__ __forceinline__ T max(T value) const {
        return warp_max(value);
    }
};

template <class T, class Params>
__device__ Label<T> label_of(const Params& p, int64_t b) {
    return {p.hard ? p.hard[b] : 0, p.soft ? p.soft + b * p.classes : nullptr};
}

// Calls body(b) for the samples of this warp.
template <class Body>
__device__ __forceinline__ void each_sample(int64_t batch, const Body& body) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kSamples;
    for (int64_t b = static_cast<int64_t>(blockIdx.x) * kSamples + threadIdx.x / 32; b < batch;
         b += step)
        body(b);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) cross_entropy_kernel(const CrossEntropy<T> p) {
    const T scale = T(1) / static_cast<T>(p.batch);
    const Warp warp{threadIdx.x % 32};
    each_sample(p.batch, [&](int64_t b) {
        const int64_t row = b * p.classes;
        const T loss = cross_entropy_sample(warp, p.logits + row, label_of<T>(p, b), p.classes,
                                            scale, p.grad_logits + row);
        if (warp.first == 0) p.losses[b] = loss;
    });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    cross_entropy_dual_kernel(const CrossEntropyDual<T> p) {
    const T scale = T(1) / static_cast<T>(p.batch);
    const Warp warp{threadIdx.x % 32};
    each_sample(p.batch, [&](int64_t b) {
        const int64_t row = b * p.classes;
        const T loss_tangent = cross_entropy_dual_sample(
            warp, p.logits + row, p.logits_tangent + row, label_of<T>(p, b), p.classes, scale,
            p.grad_logits + row, p.grad_logits_tangent + row,
            p.grad_labels_tangent ? p.grad_labels_tangent + row : nullptr);
        if (warp.first == 0) p.losses_tangent[b] = loss_tangent;
    });
}

unsigned blocks_for(int64_t batch) {
    return grid_for((batch + kSamples - 1) / kSamples);
}

}  // namespace

template <class T>
Status cross_entropy(const CrossEntropy<T>& p, Context context) {
    return launch(cross_entropy_kernel<T>, blocks_for(p.batch), kThreads, 0, context, p);
}

template <class T>
Status cross_entropy_dual(const CrossEntropyDual<T>& p, Context context) {
    return launch(cross_entropy_dual_kernel<T>, blocks_for(p.batch), kThreads, 0, context, p);
}

PDD_INSTANTIATE(cross_entropy, CrossEntropy)
PDD_INSTANTIATE(cross_entropy_dual, CrossEntropyDual)

}  // namespace pdd::PDD_BACKEND
