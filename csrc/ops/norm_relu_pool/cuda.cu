// One block is one image and 32 channels: 32 threads across the channels, so that a warp reads 32
// neighbouring numbers, and kRows warps down the pixels. Sums over the plane go through shared memory in a
// fixed order.
#include "core/context.h"
#include "core/cuda.cuh"
#include "ops/norm_relu_pool/math.h"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {
namespace {

constexpr int kChannels = 32;
constexpr int kRows = 8;

// Where a thread works. Threads beyond the last channel go along for the barriers and touch no memory.
struct Plane {
    PlaneShape shape;
    int64_t b, channel;
    int row;
    bool inside;

    __device__ Plane(const PlaneShape& s, int64_t task) : shape(s) {
        const int64_t blocks = (s.channels + kChannels - 1) / kChannels;
        b = task / blocks;
        channel = task % blocks * kChannels + threadIdx.x;
        row = static_cast<int>(threadIdx.y);
        inside = channel < s.channels;
    }
    __device__ int64_t pixels() const { return inside ? shape.height * shape.width : 0; }
    __device__ int64_t pooled_pixels() const { return inside ? (shape.height / 2) * (shape.width / 2) : 0; }
    __device__ int64_t at(int64_t pixel) const {
        return (b * shape.height * shape.width + pixel) * shape.channels + channel;
    }
    // Upper left pixel of a pooled one.
    __device__ int64_t corner(int64_t pooled) const {
        const int64_t columns = shape.width / 2;
        return pooled / columns * 2 * shape.width + pooled % columns * 2;
    }
    __device__ int64_t pooled_at(int64_t pooled) const {
        return (b * (shape.height / 2) * (shape.width / 2) + pooled) * shape.channels + channel;
    }
    // The pooled pixel that takes in a pixel, or -1 in an odd last row or column.
    __device__ int64_t pooled_of(int64_t pixel) const {
        const int64_t h = pixel / shape.width / 2, w = pixel % shape.width / 2;
        return h < shape.height / 2 && w < shape.width / 2 ? h * (shape.width / 2) + w : -1;
    }
    __device__ int64_t index() const { return b * shape.channels + channel; }
};

// Offset of the k-th of the four pixels that are pooled together.
__device__ __forceinline__ int64_t neighbour(const PlaneShape& shape, int k) {
    return k / 2 * shape.width + k % 2;
}

// Sum over the kRows threads of a channel, in order of their row; all of them get it.
template <class T>
__device__ __forceinline__ T sum_rows(T value, T (&shared)[kRows][kChannels]) {
    __syncthreads();  // the sum before may still be read
    shared[threadIdx.y][threadIdx.x] = value;
    __syncthreads();
    T total = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) total += shared[r][threadIdx.x];
    return total;
}

template <class T>
__device__ Channel<T> channel_of(const Plane& plane, const T* mean, const T* rstd, const T* weight, const T* bias) {
    if (!plane.inside) return {};
    return {mean[plane.index()], rstd[plane.index()], weight[plane.channel], bias[plane.channel]};
}

template <class T>
__device__ Channel<T> measure(const Plane& plane, const T* z, double eps, const T* weight, const T* bias,
                              T (&shared)[kRows][kChannels]) {
    const T inverse = static_cast<T>(1.0 / static_cast<double>(plane.shape.height * plane.shape.width));
    T sum = 0;
    for (int64_t i = plane.row; i < plane.pixels(); i += kRows) sum += z[plane.at(i)];
    const T guess = sum_rows(sum, shared) * inverse;
    T rest = 0, square = 0;
    for (int64_t i = plane.row; i < plane.pixels(); i += kRows) {
        const T d = z[plane.at(i)] - guess;
        rest += d;
        square += d * d;
    }
    const T mean_rest = sum_rows(rest, shared) * inverse, mean_square = sum_rows(square, shared) * inverse;
    const Moments<T> moments(guess, mean_rest, mean_square);
    const T rstd = T(1) / sqrt(moments.variance + static_cast<T>(eps));
    if (!plane.inside) return {};
    return {moments.mean, rstd, weight[plane.channel], bias[plane.channel]};
}

__host__ __device__ inline int64_t tasks(const PlaneShape& shape) {
    return shape.batch * ((shape.channels + kChannels - 1) / kChannels);
}

template <class T>
__global__ void __launch_bounds__(kChannels* kRows) norm_relu_pool_kernel(const NormReluPool<T> p) {
    __shared__ T shared[kRows][kChannels];
    for (int64_t task = blockIdx.x; task < tasks(p.shape); task += gridDim.x) {
        const Plane plane(p.shape, task);
        const Channel<T> channel = measure(plane, p.z, p.eps, p.weight, p.bias, shared);
        if (plane.inside && plane.row == 0) {
            p.mean[plane.index()] = channel.mean;
            p.rstd[plane.index()] = channel.rstd;
        }
        for (int64_t i = plane.row; i < plane.pooled_pixels(); i += kRows) {
            T sum = 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const T z = p.z[plane.at(plane.corner(i) + neighbour(p.shape, k))];
                const T a = channel.activation(channel.normalised(z));
                sum += a > 0 ? a : T(0);
            }
            p.out[plane.pooled_at(i)] = sum * T(kPoolWeight);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kChannels* kRows) norm_relu_pool_backward_kernel(const NormReluPoolBackward<T> p) {
    __shared__ T shared[kRows][kChannels];
    const T inverse = static_cast<T>(1.0 / static_cast<double>(p.shape.height * p.shape.width));
    for (int64_t task = blockIdx.x; task < tasks(p.shape); task += gridDim.x) {
        const Plane plane(p.shape, task);
        const Channel<T> channel = channel_of(plane, p.mean, p.rstd, p.weight, p.bias);
        T grad_sum = 0, product_sum = 0;
        for (int64_t i = plane.row; i < plane.pixels(); i += kRows) {
            const int64_t pooled = plane.pooled_of(i);
            if (pooled < 0) continue;
            const T x_hat = channel.normalised(p.z[plane.at(i)]);
            const T grad = channel.activation(x_hat) > 0 ? p.grad_out[plane.pooled_at(pooled)] * T(kPoolWeight) : T(0);
            grad_sum += grad;
            product_sum += grad * x_hat;
        }
        grad_sum = sum_rows(grad_sum, shared);
        product_sum = sum_rows(product_sum, shared);
        if (plane.inside && plane.row == 0) {
            p.grad_bias_parts[plane.index()] = grad_sum;
            p.grad_weight_parts[plane.index()] = product_sum;
        }
        const BackwardMeans<T> means{grad_sum * inverse, product_sum * inverse};
        for (int64_t i = plane.row; i < plane.pixels(); i += kRows) {
            const int64_t pooled = plane.pooled_of(i);
            const T x_hat = channel.normalised(p.z[plane.at(i)]);
            const bool active = pooled >= 0 && channel.activation(x_hat) > 0;
            const T grad = active ? p.grad_out[plane.pooled_at(pooled)] * T(kPoolWeight) : T(0);
            p.grad_z[plane.at(i)] = grad_z(channel, means, grad, x_hat);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kChannels* kRows) norm_relu_pool_dual_kernel(const NormReluPoolDual<T> p) {
    __shared__ T shared[kRows][kChannels];
    const T inverse = static_cast<T>(1.0 / static_cast<double>(p.shape.height * p.shape.width));
    for (int64_t task = blockIdx.x; task < tasks(p.shape); task += gridDim.x) {
        const Plane plane(p.shape, task);
        const Channel<T> channel = measure(plane, p.z, p.eps, p.weight, p.bias, shared);
        T tangent_sum = 0, product_sum = 0;
        for (int64_t i = plane.row; i < plane.pixels(); i += kRows) {
            const T z_tangent = p.z_tangent[plane.at(i)];
            tangent_sum += z_tangent;
            product_sum += (p.z[plane.at(i)] - channel.mean) * z_tangent;
        }
        ChannelTangent<T> tangent{};
        tangent.mean = sum_rows(tangent_sum, shared) * inverse;
        tangent.kappa = sum_rows(product_sum, shared) * inverse * channel.rstd;
        if (plane.inside) {
            tangent.weight = p.weight_tangent[plane.channel];
            tangent.bias = p.bias_tangent[plane.channel];
        }
        if (plane.inside && plane.row == 0) {
            p.mean[plane.index()] = channel.mean;
            p.rstd[plane.index()] = channel.rstd;
            p.mean_tangent[plane.index()] = tangent.mean;
            p.kappa[plane.index()] = tangent.kappa;
        }
        for (int64_t i = plane.row; i < plane.pooled_pixels(); i += kRows) {
            T value = 0, derivative = 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int64_t at = plane.at(plane.corner(i) + neighbour(p.shape, k));
                const T x_hat = channel.normalised(p.z[at]);
                const T x_hat_tangent = tangent.normalised(channel, x_hat, p.z_tangent[at]);
                const T a = channel.activation(x_hat);
                value += a > 0 ? a : T(0);
                derivative += a > 0 ? tangent.activation(channel, x_hat, x_hat_tangent) : T(0);
            }
            p.out_tangent[plane.pooled_at(i)] = derivative * T(kPoolWeight);
            if (p.out) p.out[plane.pooled_at(i)] = value * T(kPoolWeight);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kChannels* kRows)
    norm_relu_pool_dual_backward_kernel(const NormReluPoolDualBackward<T> p) {
    __shared__ T shared[kRows][kChannels];
    const T inverse = static_cast<T>(1.0 / static_cast<double>(p.shape.height * p.shape.width));
    for (int64_t task = blockIdx.x; task < tasks(p.shape); task += gridDim.x) {
        const Plane plane(p.shape, task);
        const Channel<T> channel = channel_of(plane, p.mean, p.rstd, p.weight, p.bias);
        ChannelTangent<T> tangent{};  // the tangent of the bias stays 0: nothing here depends on it
        if (plane.inside) {
            tangent.mean = p.mean_tangent[plane.index()];
            tangent.kappa = p.kappa[plane.index()];
            tangent.weight = p.weight_tangent[plane.channel];
        }
        T grad_sum = 0, product_sum = 0, grad_tangent_sum = 0, product_tangent_sum = 0;
        for (int64_t i = plane.row; i < plane.pixels(); i += kRows) {
            const int64_t pooled = plane.pooled_of(i);
            if (pooled < 0) continue;
            const T x_hat = channel.normalised(p.z[plane.at(i)]);
            if (!(channel.activation(x_hat) > 0)) continue;
            const T x_hat_tangent = tangent.normalised(channel, x_hat, p.z_tangent[plane.at(i)]);
            const T grad = p.grad_out[plane.pooled_at(pooled)] * T(kPoolWeight);
            const T grad_tangent = p.grad_out_tangent[plane.pooled_at(pooled)] * T(kPoolWeight);
            grad_sum += grad;
            product_sum += grad * x_hat;
            grad_tangent_sum += grad_tangent;
            product_tangent_sum += grad_tangent * x_hat + grad * x_hat_tangent;
        }
        grad_sum = sum_rows(grad_sum, shared);
        product_sum = sum_rows(product_sum, shared);
        grad_tangent_sum = sum_rows(grad_tangent_sum, shared);
        product_tangent_sum = sum_rows(product_tangent_sum, shared);
        if (plane.inside && plane.row == 0) {
            p.grad_bias_tangent_parts[plane.index()] = grad_tangent_sum;
            p.grad_weight_tangent_parts[plane.index()] = product_tangent_sum;
        }
        const BackwardMeans<T> means{grad_sum * inverse, product_sum * inverse};
        const BackwardMeans<T> means_tangent{grad_tangent_sum * inverse, product_tangent_sum * inverse};
        for (int64_t i = plane.row; i < plane.pixels(); i += kRows) {
            const int64_t pooled = plane.pooled_of(i), at = plane.at(i);
            const T x_hat = channel.normalised(p.z[at]);
            const T x_hat_tangent = tangent.normalised(channel, x_hat, p.z_tangent[at]);
            const bool active = pooled >= 0 && channel.activation(x_hat) > 0;
            const T grad = active ? p.grad_out[plane.pooled_at(pooled)] * T(kPoolWeight) : T(0);
            const T grad_tangent = active ? p.grad_out_tangent[plane.pooled_at(pooled)] * T(kPoolWeight) : T(0);
            p.grad_z_tangent[at] =
                grad_z_tangent(channel, tangent, means, means_tangent, grad, grad_tangent, x_hat, x_hat_tangent);
            if (p.grad_z) p.grad_z[at] = grad_z(channel, means, grad, x_hat);
        }
    }
}

}  // namespace

template <class T>
Status norm_relu_pool(const NormReluPool<T>& p, Context context) {
    return launch(norm_relu_pool_kernel<T>, grid_for(tasks(p.shape)), dim3(kChannels, kRows), 0, context, p);
}

template <class T>
Status norm_relu_pool_backward(const NormReluPoolBackward<T>& p, Context context) {
    return launch(norm_relu_pool_backward_kernel<T>, grid_for(tasks(p.shape)), dim3(kChannels, kRows), 0, context, p);
}

template <class T>
Status norm_relu_pool_dual(const NormReluPoolDual<T>& p, Context context) {
    return launch(norm_relu_pool_dual_kernel<T>, grid_for(tasks(p.shape)), dim3(kChannels, kRows), 0, context, p);
}

template <class T>
Status norm_relu_pool_dual_backward(const NormReluPoolDualBackward<T>& p, Context context) {
    return launch(norm_relu_pool_dual_backward_kernel<T>, grid_for(tasks(p.shape)), dim3(kChannels, kRows), 0, context, p);
}

PDD_INSTANTIATE(norm_relu_pool, NormReluPool)
PDD_INSTANTIATE(norm_relu_pool_backward, NormReluPoolBackward)
PDD_INSTANTIATE(norm_relu_pool_dual, NormReluPoolDual)
PDD_INSTANTIATE(norm_relu_pool_dual_backward, NormReluPoolDualBackward)

}  // namespace pdd::PDD_BACKEND
