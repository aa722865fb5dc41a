// The four kernels; tile.cuh has their traversal of planes.
#include "core/context.h"
#include "core/cuda.cuh"
#include "ops/norm_relu_pool/math.h"
#include "ops/norm_relu_pool/tile.cuh"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {
namespace {

template <class S>
__device__ __forceinline__ S inverse_of_pixels(const PlaneShape& shape) {
    return static_cast<S>(1.0 / static_cast<double>(shape.height * shape.width));
}

// The rounded mean, a first guess (see Moments).
template <class T, int V, int E, class S>
__device__ __forceinline__ void guess_mean(S (&guess)[V], const PixelShare<T, V, E>& z,
                                           const Place<V>& place, const Split& split, S inverse,
                                           Partial<S, 1, V>& partial) {
    S sum[1][V] = {};
    each_window<E>(place, [&](int e, const Window& w) {
        const Pixels<T, V> pixels = z(e, w);
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int v = 0; v < V; ++v) sum[0][v] += pixels.of[k].get(v);
    });
    sum_rows(sum, split, partial);
#pragma unroll
    for (int v = 0; v < V; ++v) guess[v] = sum[0][v] * inverse;
}

template <class S>
__device__ __forceinline__ S reciprocal_root(S variance, double eps) {
    return S(1) / sqrt(variance + static_cast<S>(eps));
}

// ---- forward ----

template <class T, int V, int E>
__global__ void __launch_bounds__(kThreads, 1)
    norm_relu_pool_kernel(const NormReluPool<T> p, const Split split) {
    using S = Compute<T>;
    __shared__ Partial<S, 1, V> first;
    __shared__ Partial<S, 2, V> second;
    const S inverse = inverse_of_pixels<S>(p.shape);
    for (int64_t task = blockIdx.x; task < p.shape.batch * split.blocks(p.shape, V);
         task += gridDim.x) {
        Place<V> place(p.shape, split, task);
        PixelShare<T, V, E> z(place.planes(p.z), place);
        Channels<S, V> channels;
        S guess[V];
        guess_mean<T, V, E>(guess, z, place, split, inverse, first);
        S sums[2][V] = {};  // of d and d^2, with d = z - guess
        each_window<E>(place, [&](int e, const Window& w) {
            const Pixels<T, V> pixels = z(e, w);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (!w.holds(k)) continue;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const S d = pixels.of[k].get(v) - guess[v];
                    sums[0][v] += d;
                    sums[1][v] += d * d;
                }
            }
        });
        sum_rows(sums, split, second);
        place.renewed();
        z.renewed();
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const Moments<S> moments(guess[v], sums[0][v] * inverse, sums[1][v] * inverse);
            channels.mean[v] = moments.mean;
            channels.rstd[v] = reciprocal_root(moments.variance, p.eps);
        }
        report(p.mean, channels.mean, place);
        report(p.rstd, channels.rstd, place);
        read(channels.weight, p.weight, place, place.channel, split.runs);
        read(channels.bias, p.bias, place, place.channel, split.runs);
        each_window<E>(place, [&](int e, const Window& w) {
            if (!w.pooled()) return;
            const Pixels<T, V> pixels = z(e, w);
            Pack<T, V> out;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const Channel<S> channel = channels[v];
                S sum = 0;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const S a = channel.activation(channel.normalized(pixels.of[k].get(v)));
                    sum += a > 0 ? a : S(0);
                }
                out.set(v, sum * S(kPoolWeight));
            }
            store_pack(place.pooled_planes(p.out) + place.pooled_at(w), out);
        });
    }
}

// ---- backward ----

template <class T, int V, int E>
__global__ void __launch_bounds__(kThreads, 1)
    norm_relu_pool_backward_kernel(const NormReluPoolBackward<T> p, const Split split) {
    using S = Compute<T>;
    __shared__ Partial<S, 2, V> partial;
    const S inverse = inverse_of_pixels<S>(p.shape);
    for (int64_t task = blockIdx.x; task < p.shape.batch * split.blocks(p.shape, V);
         task += gridDim.x) {
        Place<V> place(p.shape, split, task);
        PixelShare<T, V, E> z(place.planes(p.z), place);
        PooledShare<T, V, E> grad_out(place.pooled_planes(p.grad_out), place);
        Channels<S, V> channels;
        read(channels.mean, p.mean, place, place.statistic());
        read(channels.rstd, p.rstd, place, place.statistic());
        read(channels.weight, p.weight, place, place.channel, split.runs);
        read(channels.bias, p.bias, place, place.channel, split.runs);
        S sums[2][V] = {};  // of the gradient of ReLU's input, and of that times x_hat
        each_window<E>(place, [&](int e, const Window& w) {
            if (!w.pooled()) return;
            const Pixels<T, V> pixels = z(e, w);
            const Pooled<T, V> above = grad_out(e, w);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const Channel<S> channel = channels[v];
                const S grad = above.of.get(v) * S(kPoolWeight);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const S x_hat = channel.normalized(pixels.of[k].get(v));
                    const S passed = channel.activation(x_hat) > 0 ? grad : S(0);
                    sums[0][v] += passed;
                    sums[1][v] += passed * x_hat;
                }
            }
        });
        sum_rows(sums, split, partial);
        place.renewed();
        z.renewed();
        report(p.grad_bias_parts, sums[0], place);
        report(p.grad_weight_parts, sums[1], place);
        each_window<E>(place, [&](int e, const Window& w) {
            const Pixels<T, V> pixels = z(e, w);
            const Pooled<T, V> above = grad_out(e, w);  // zero where nothing is pooled
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (!w.holds(k)) continue;
                Pack<T, V> grad_z_pack;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const Channel<S> channel = channels[v];
                    const BackwardMeans<S> means{sums[0][v] * inverse, sums[1][v] * inverse};
                    const S x_hat = channel.normalized(pixels.of[k].get(v));
                    const S grad =
                        channel.activation(x_hat) > 0 ? above.of.get(v) * S(kPoolWeight) : S(0);
                    grad_z_pack.set(v, grad_z(channel, means, grad, x_hat));
                }
                store_pack(place.planes(p.grad_z) + place.at(w, k), grad_z_pack);
            }
        });
    }
}

// ---- forward on dual numbers ----

template <class T, int V, int E>
__global__ void __launch_bounds__(kThreads, 1)
    norm_relu_pool_dual_kernel(const NormReluPoolDual<T> p, const Split split) {
    using S = Compute<T>;
    __shared__ Partial<S, 1, V> first;
    __shared__ Partial<S, 4, V> second;
    const S inverse = inverse_of_pixels<S>(p.shape);
    for (int64_t task = blockIdx.x; task < p.shape.batch * split.blocks(p.shape, V);
         task += gridDim.x) {
        Place<V> place(p.shape, split, task);
        PixelShare<T, V, E> z(place.planes(p.z), place),
            z_tangent(place.planes(p.z_tangent), place);
        Channels<S, V> channels;
        ChannelTangents<S, V> tangents;
        S guess[V];
        guess_mean<T, V, E>(guess, z, place, split, inverse, first);
        S sums[4][V] = {};  // of d, d^2, z_tangent and d * z_tangent, with d = z - guess
        each_window<E>(place, [&](int e, const Window& w) {
            const Pixels<T, V> pixels = z(e, w), along = z_tangent(e, w);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (!w.holds(k)) continue;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const S d = pixels.of[k].get(v) - guess[v], t = along.of[k].get(v);
                    sums[0][v] += d;
                    sums[1][v] += d * d;
                    sums[2][v] += t;
                    sums[3][v] += d * t;
                }
            }
        });
        sum_rows(sums, split, second);
        place.renewed();
        z.renewed();
        z_tangent.renewed();
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const S mean_d = sums[0][v] * inverse;
            const Moments<S> moments(guess[v], mean_d, sums[1][v] * inverse);
            channels.mean[v] = moments.mean;
            channels.rstd[v] = reciprocal_root(moments.variance, p.eps);
            tangents.mean[v] = sums[2][v] * inverse;
            // mean((z - mean) * z_tangent) with z - mean = d - mean_d; the second term has the size
            // of a rounding error.
            tangents.kappa[v] =
                (sums[3][v] * inverse - mean_d * tangents.mean[v]) * channels.rstd[v];
        }
        report(p.mean, channels.mean, place);
        report(p.rstd, channels.rstd, place);
        report(p.mean_tangent, tangents.mean, place);
        report(p.kappa, tangents.kappa, place);
        read(channels.weight, p.weight, place, place.channel, split.runs);
        read(channels.bias, p.bias, place, place.channel, split.runs);
        read(tangents.weight, p.weight_tangent, place, place.channel, split.runs);
        read(tangents.bias, p.bias_tangent, place, place.channel, split.runs);
        each_window<E>(place, [&](int e, const Window& w) {
            if (!w.pooled()) return;
            const Pixels<T, V> pixels = z(e, w), along = z_tangent(e, w);
            Pack<T, V> out, out_tangent;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const Channel<S> channel = channels[v];
                const ChannelTangent<S> tangent = tangents[v];
                S value = 0, derivative = 0;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const S x_hat = channel.normalized(pixels.of[k].get(v));
                    const S x_hat_tangent = tangent.normalized(channel, x_hat, along.of[k].get(v));
                    const S a = channel.activation(x_hat);
                    value += a > 0 ? a : S(0);
                    derivative += a > 0 ? tangent.activation(channel, x_hat, x_hat_tangent) : S(0);
                }
                out.set(v, value * S(kPoolWeight));
                out_tangent.set(v, derivative * S(kPoolWeight));
            }
            store_pack(place.pooled_planes(p.out_tangent) + place.pooled_at(w), out_tangent);
            if (p.out) store_pack(place.pooled_planes(p.out) + place.pooled_at(w), out);
        });
    }
}

// ---- backward on dual numbers ----

template <class T, int V, int E>
__global__ void __launch_bounds__(kThreads, 1)
    norm_relu_pool_dual_backward_kernel(const NormReluPoolDualBackward<T> p, const Split split) {
    using S = Compute<T>;
    __shared__ Partial<S, 4, V> partial;
    const S inverse = inverse_of_pixels<S>(p.shape);
    for (int64_t task = blockIdx.x; task < p.shape.batch * split.blocks(p.shape, V);
         task += gridDim.x) {
        Place<V> place(p.shape, split, task);
        PixelShare<T, V, E> z(place.planes(p.z), place),
            z_tangent(place.planes(p.z_tangent), place);
        // The pooled tensors are a quarter of the others. If registers are scarce, they are read
        // again from the first-level cache.
        constexpr int kept = E > 1 ? 0 : E;
        PooledShare<T, V, kept> grad_out(place.pooled_planes(p.grad_out), place);
        PooledShare<T, V, kept> grad_out_tangent(place.pooled_planes(p.grad_out_tangent), place);
        Channels<S, V> channels;
        ChannelTangents<S, V>
            tangents{};  // the tangent of the bias stays 0: nothing here depends on it
        read(channels.mean, p.mean, place, place.statistic());
        read(channels.rstd, p.rstd, place, place.statistic());
        read(channels.weight, p.weight, place, place.channel, split.runs);
        read(channels.bias, p.bias, place, place.channel, split.runs);
        read(tangents.mean, p.mean_tangent, place, place.statistic());
        read(tangents.kappa, p.kappa, place, place.statistic());
        // Sums of the gradient of ReLU's input, of that times x_hat, and of the tangents of both.
        S sums[4][V] = {};
        each_window<E>(place, [&](int e, const Window& w) {
            if (!w.pooled()) return;
            const Pixels<T, V> pixels = z(e, w), along = z_tangent(e, w);
            const Pooled<T, V> above = grad_out(e, w), above_tangent = grad_out_tangent(e, w);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const Channel<S> channel = channels[v];
                const ChannelTangent<S> tangent = tangents[v];
                const S grad = above.of.get(v) * S(kPoolWeight);
                const S grad_tangent = above_tangent.of.get(v) * S(kPoolWeight);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const S x_hat = channel.normalized(pixels.of[k].get(v));
                    const S x_hat_tangent = tangent.normalized(channel, x_hat, along.of[k].get(v));
                    const bool active = channel.activation(x_hat) > 0;
                    sums[0][v] += active ? grad : S(0);
                    sums[1][v] += active ? grad * x_hat : S(0);
                    sums[2][v] += active ? grad_tangent : S(0);
                    sums[3][v] += active ? grad_tangent * x_hat + grad * x_hat_tangent : S(0);
                }
            }
        });
        sum_rows(sums, split, partial);
        place.renewed();
        z.renewed();
        z_tangent.renewed();
        report(p.grad_bias_tangent_parts, sums[2], place);
        report(p.grad_weight_tangent_parts, sums[3], place);
        read(tangents.weight, p.weight_tangent, place, place.channel, split.runs);
        each_window<E>(place, [&](int e, const Window& w) {
            const Pixels<T, V> pixels = z(e, w), along = z_tangent(e, w);
            const Pooled<T, V> above = grad_out(e, w), above_tangent = grad_out_tangent(e, w);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (!w.holds(k)) continue;
                Pack<T, V> value, derivative;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const Channel<S> channel = channels[v];
                    const ChannelTangent<S> tangent = tangents[v];
                    const BackwardMeans<S> means{sums[0][v] * inverse, sums[1][v] * inverse};
                    const BackwardMeans<S> means_tangent{sums[2][v] * inverse,
                                                         sums[3][v] * inverse};
                    const S x_hat = channel.normalized(pixels.of[k].get(v));
                    const S x_hat_tangent = tangent.normalized(channel, x_hat, along.of[k].get(v));
                    const bool active = channel.activation(x_hat) > 0;
                    const S grad = active ? above.of.get(v) * S(kPoolWeight) : S(0);
                    const S grad_tangent = active ? above_tangent.of.get(v) * S(kPoolWeight) : S(0);
                    value.set(v, grad_z(channel, means, grad, x_hat));
                    derivative.set(v, grad_z_tangent(channel, tangent, means, means_tangent, grad,
                                                     grad_tangent, x_hat, x_hat_tangent));
                }
                store_pack(place.planes(p.grad_z_tangent) + place.at(w, k), derivative);
                if (p.grad_z) store_pack(place.planes(p.grad_z) + place.at(w, k), value);
            }
        });
    }
}

// ---- launches ----

int power_of_two_from(int64_t least) {
    int power = 1;
    while (power < least) power *= 2;
    return power;
}

int64_t windows_of(const PlaneShape& shape) {
    return ((shape.height + 1) / 2) * ((shape.width + 1) / 2);
}

// Blocks of at least two warps that read runs of at least 32 bytes, if there are enough channels.
template <class T, int V, int E>
Split split_of(const PlaneShape& shape, bool runs) {
    constexpr int run = sizeof(T) == 2 && E == kMostHeld<T> ? 2 : 4;  // packs
    const int packs = power_of_two_from((shape.channels + V - 1) / V);
    int rows = E == 0 ? kThreads / run : power_of_two_from((windows_of(shape) + E - 1) / E);
    int vectors = V == 1 ? 32 : run;
    if (rows * vectors < 64) vectors = 64 / rows;
    if (vectors > packs) vectors = packs;
    while (rows * vectors > kThreads) rows /= 2;  // only for E == 0: other planes are small enough
    while (rows * vectors < 32) rows *= 2;        // whole warps; extra rows own no window
    return {vectors, rows, runs};
}

template <class T, int V, int E, class Params>
Status start(void (*kernel)(Params, Split), const Params& p, bool runs, Context context) {
    const Split split = split_of<T, V, E>(p.shape, runs);
    return launch(kernel, grid_for(p.shape.batch * split.blocks(p.shape, V)),
                  static_cast<unsigned>(split.threads()), 0, context, p, split);
}

// Selects the kernel by the plane's size, the number of channels and the addresses.
#define PDD_START(kernel, T, p, context, packed, runs)                            \
    [&]() -> Status {                                                             \
        constexpr int V = kPack<T>, E = kMostHeld<T>;                             \
        if constexpr (sizeof(T) < 8) {                                            \
            const int64_t windows = windows_of((p).shape);                        \
            if ((packed) && windows <= 64)                                        \
                return start<T, V, 1>(kernel<T, V, 1>, p, runs, context);         \
            if ((packed) && windows <= 256)                                       \
                return start<T, V, E>(kernel<T, V, E>, p, runs, context);         \
            if (packed) return start<T, V, 0>(kernel<T, V, 0>, p, runs, context); \
        }                                                                         \
        return start<T, 1, 0>(kernel<T, 1, 0>, p, runs, context);                 \
    }()

// Returns whether images and statistics can be moved in packs.
template <class T, class... Pointers>
bool in_packs(const PlaneShape& shape, Pointers... pointers) {
    return shape.channels % kPack<T> == 0 && aligned(pointers...);
}

}  // namespace

template <class T>
Status norm_relu_pool(const NormReluPool<T>& p, Context context) {
    return PDD_START(norm_relu_pool_kernel, T, p, context,
                     in_packs<T>(p.shape, p.z, p.out, p.mean, p.rstd), aligned(p.weight, p.bias));
}

template <class T>
Status norm_relu_pool_backward(const NormReluPoolBackward<T>& p, Context context) {
    return PDD_START(norm_relu_pool_backward_kernel, T, p, context,
                     in_packs<T>(p.shape, p.grad_out, p.z, p.mean, p.rstd, p.grad_z,
                                 p.grad_weight_parts, p.grad_bias_parts),
                     aligned(p.weight, p.bias));
}

template <class T>
Status norm_relu_pool_dual(const NormReluPoolDual<T>& p, Context context) {
    return PDD_START(norm_relu_pool_dual_kernel, T, p, context,
                     in_packs<T>(p.shape, p.z, p.z_tangent, p.out, p.out_tangent, p.mean, p.rstd,
                                 p.mean_tangent, p.kappa),
                     aligned(p.weight, p.weight_tangent, p.bias, p.bias_tangent));
}

template <class T>
Status norm_relu_pool_dual_backward(const NormReluPoolDualBackward<T>& p, Context context) {
    return PDD_START(norm_relu_pool_dual_backward_kernel, T, p, context,
                     in_packs<T>(p.shape, p.grad_out, p.grad_out_tangent, p.z, p.z_tangent, p.mean,
                                 p.rstd, p.mean_tangent, p.kappa, p.grad_z, p.grad_z_tangent,
                                 p.grad_weight_tangent_parts, p.grad_bias_tangent_parts),
                     aligned(p.weight, p.weight_tangent, p.bias));
}

PDD_INSTANTIATE_HALF(norm_relu_pool, NormReluPool)
PDD_INSTANTIATE_HALF(norm_relu_pool_backward, NormReluPoolBackward)
PDD_INSTANTIATE_HALF(norm_relu_pool_dual, NormReluPoolDual)
PDD_INSTANTIATE_HALF(norm_relu_pool_dual_backward, NormReluPoolDualBackward)

}  // namespace pdd::PDD_BACKEND
