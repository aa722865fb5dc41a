// A block takes one image and a few packs of neighbouring channels, whole planes of them. Its threads are `vectors`
// across the channels, so that a warp's accesses are runs of neighbouring packs, times `rows` down the planes. What a
// thread owns are windows, the 2x2 pixels that are pooled together (cut off at an odd border).
//
// Planes of up to 256 windows (32x32 pixels) stay in registers between the passes over them: every input is read once.
// Larger ones are read again in the second pass, when the block's tile is still in the second-level cache.
#include "core/context.h"
#include "core/cuda.cuh"
#include "ops/norm_relu_pool/math.h"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {
namespace {

constexpr int kThreads = 256;  // at most; with it a thread may use 255 registers
constexpr int kWarps = kThreads / 32;

// Windows that a thread keeps at most. Two packs of 16 bits hold as many channels as four of 32, with twice the
// per-channel numbers beside them: with four windows of eight channels the dual passes would not fit in the registers.
template <class T>
constexpr int kMostHeld = sizeof(T) == 2 ? 2 : 4;

// How a block's threads are split; both powers of two.
struct Split {
    int vectors, rows;
    bool runs;  // whether vectors over the channels begin at multiples of 16 bytes

    __host__ __device__ int threads() const { return vectors * rows; }
    __host__ __device__ int64_t blocks(const PlaneShape& shape, int V) const {
        return (shape.channels + vectors * V - 1) / (vectors * V);  // for one image
    }
};

struct Window {
    int i, j;            // of its upper left pixel
    bool right, bottom;  // whether it has a second column and row; both false where there is no window
    bool valid;

    __device__ __forceinline__ bool holds(int k) const {
        return valid && (k % 2 == 0 || right) && (k / 2 == 0 || bottom);
    }
    __device__ __forceinline__ bool pooled() const { return right && bottom; }
};

// Where a thread works. Offsets within an image fit 32 bits (pdd_fast/ops/ sees to it).
template <int V>
struct Place {
    int height, width, columns, windows;
    int channels, channel;  // channel is the first of V
    int row, rows;
    int64_t image;
    bool inside;

    __device__ __forceinline__ Place(const PlaneShape& s, const Split& split, int64_t task)
        : height(static_cast<int>(s.height)),
          width(static_cast<int>(s.width)),
          columns((width + 1) / 2),
          windows((height + 1) / 2 * columns),
          channels(static_cast<int>(s.channels)),
          rows(split.rows) {
        const int thread = static_cast<int>(threadIdx.x);
        const int64_t blocks = split.blocks(s, V);
        image = task / blocks;
        channel = (static_cast<int>(task % blocks) * split.vectors + thread % split.vectors) * V;
        row = thread / split.vectors;
        inside = channel < channels;
    }
    __device__ __forceinline__ Window window(int number) const {
        const bool valid = inside && number < windows;
        const int i = number / columns * 2, j = number % columns * 2;
        return {i, j, valid && j + 1 < width, valid && i + 1 < height, valid};
    }
    // This image of a tensor of whole planes, and of one of pooled planes.
    template <class T>
    __device__ __forceinline__ T* planes(T* images) const {
        return images + image * height * width * channels;
    }
    template <class T>
    __device__ __forceinline__ T* pooled_planes(T* images) const {
        return images + image * (height / 2) * (width / 2) * channels;
    }
    // Offsets in them.
    __device__ __forceinline__ int at(const Window& w, int k) const {
        return ((w.i + k / 2) * width + w.j + k % 2) * channels + channel;
    }
    __device__ __forceinline__ int pooled_at(const Window& w) const {
        return (w.i / 2 * (width / 2) + w.j / 2) * channels + channel;
    }
    __device__ __forceinline__ int64_t statistic() const { return image * channels + channel; }
    // Whether this thread writes what the block found out about its channels.
    __device__ __forceinline__ bool reports() const { return inside && row == 0; }
    __device__ __forceinline__ void renewed() { renew(row); }
};

// A window's pixels, zero where it has none.
template <class T, int V>
struct Pixels {
    Pack<T, V> of[4];

    template <class P>
    __device__ __forceinline__ Pixels(const T* images, const P& place, const Window& w) {
#pragma unroll
        for (int k = 0; k < 4; ++k) of[k] = w.holds(k) ? load_pack<V>(images + place.at(w, k)) : Pack<T, V>{};
    }
    Pixels() = default;

    __device__ __forceinline__ void renewed() {
#pragma unroll
        for (int k = 0; k < 4; ++k) renew(of[k]);
    }
};

template <class T, int V>
struct Pooled {
    Pack<T, V> of;

    template <class P>
    __device__ __forceinline__ Pooled(const T* images, const P& place, const Window& w)
        : of(w.pooled() ? load_pack<V>(images + place.pooled_at(w)) : Pack<T, V>{}) {}
    Pooled() = default;

    __device__ __forceinline__ void renewed() { renew(of); }
};

// A thread's share of a tensor: E windows of it in registers, or with E = 0 what it takes to read them when they are
// asked for.
template <class Part, class T, int V, int E>
struct Share {
    Part parts[E];

    __device__ __forceinline__ Share(const T* images, const Place<V>& place) {
#pragma unroll
        for (int e = 0; e < E; ++e) parts[e] = Part(images, place, place.window(place.row + e * place.rows));
    }
    __device__ __forceinline__ const Part& operator()(int e, const Window&) const { return parts[e]; }
    __device__ __forceinline__ void renewed() {
#pragma unroll
        for (int e = 0; e < E; ++e) parts[e].renewed();
    }
};

template <class Part, class T, int V>
struct Share<Part, T, V, 0> {
    const T* images;
    const Place<V>& place;

    __device__ __forceinline__ Share(const T* from, const Place<V>& where) : images(from), place(where) {}
    __device__ __forceinline__ Part operator()(int, const Window& w) const { return Part(images, place, w); }
    __device__ __forceinline__ void renewed() {}
};

template <class T, int V, int E>
using PixelShare = Share<Pixels<T, V>, T, V, E>;
template <class T, int V, int E>
using PooledShare = Share<Pooled<T, V>, T, V, E>;

// Calls body(e, window) for the thread's windows.
template <int E, int V, class Body>
__device__ __forceinline__ void each_window(const Place<V>& place, const Body& body) {
    if constexpr (E > 0) {
#pragma unroll
        for (int e = 0; e < E; ++e) body(e, place.window(place.row + e * place.rows));
    } else {
        for (int number = place.row; number < place.windows; number += place.rows) body(0, place.window(number));
    }
}

template <class S, int Q, int V>
struct Partial {
    S of[kWarps][Q][V][32];
};

// Q sums for each of a thread's V channels, over the threads that share the channels; all of them get the same. First
// over a warp's lanes of equal channels (a butterfly), then over the warps in their order.
template <class S, int Q, int V>
__device__ __forceinline__ void sum_rows(S (&value)[Q][V], const Split& split, Partial<S, Q, V>& partial) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int warps = split.threads() / 32, apart = split.vectors > 32 ? split.vectors / 32 : 1;
#pragma unroll
    for (int q = 0; q < Q; ++q)
#pragma unroll
        for (int v = 0; v < V; ++v)
            for (int offset = split.vectors; offset < 32; offset *= 2)
                value[q][v] += __shfl_xor_sync(0xffffffffu, value[q][v], offset);
    if (warps == 1) return;
    __syncthreads();  // the sums before may still be read
#pragma unroll
    for (int q = 0; q < Q; ++q)
#pragma unroll
        for (int v = 0; v < V; ++v) partial.of[warp][q][v][lane] = value[q][v];
    __syncthreads();
#pragma unroll
    for (int q = 0; q < Q; ++q)
#pragma unroll
        for (int v = 0; v < V; ++v) {
            S total = 0;
            for (int w = warp % apart; w < warps; w += apart) total += partial.of[w][q][v][lane];
            value[q][v] = total;
        }
}

// Of a thread's numbers about its channels, how many one instruction moves.
template <class S, int V>
constexpr int kRun = V < kPack<S> ? V : kPack<S>;

// `runs`: the numbers begin at multiples of 16 bytes. Statistics do; a weight may be a slice of a flat vector.
template <class S, int V>
__device__ __forceinline__ void read(S (&to)[V], const S* from, const Place<V>& place, int64_t at, bool runs = true) {
    constexpr int R = kRun<S, V>;
#pragma unroll
    for (int v = 0; v < V; v += R) {
        Pack<S, R> run{};
        if (place.inside && runs) run = load_pack<R>(from + at + v);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if (place.inside && !runs) run.of[r] = from[at + v + r];
            to[v + r] = run.of[r];
        }
    }
}

template <class S, int V>
__device__ __forceinline__ void report(S* to, const S (&from)[V], const Place<V>& place) {
    constexpr int R = kRun<S, V>;
    if (!place.reports()) return;
#pragma unroll
    for (int v = 0; v < V; v += R) {
        Pack<S, R> run;
#pragma unroll
        for (int r = 0; r < R; ++r) run.of[r] = from[v + r];
        store_pack(to + place.statistic() + v, run);
    }
}

// What the kernels know of a thread's channels, held as the formulas' structs one channel at a time.
template <class S, int V>
struct Channels {
    S mean[V], rstd[V], weight[V], bias[V];

    __device__ __forceinline__ Channel<S> operator[](int v) const { return {mean[v], rstd[v], weight[v], bias[v]}; }
};

template <class S, int V>
struct ChannelTangents {
    S mean[V], kappa[V], weight[V], bias[V];

    __device__ __forceinline__ ChannelTangent<S> operator[](int v) const {
        return {mean[v], kappa[v], weight[v], bias[v]};
    }
};

template <class S>
__device__ __forceinline__ S inverse_of_pixels(const PlaneShape& shape) {
    return static_cast<S>(1.0 / static_cast<double>(shape.height * shape.width));
}

// The rounded mean, a first guess (see Moments).
template <class T, int V, int E, class S>
__device__ __forceinline__ void guess_mean(S (&guess)[V], const PixelShare<T, V, E>& z, const Place<V>& place,
                                           const Split& split, S inverse, Partial<S, 1, V>& partial) {
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

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T, int V, int E>
__global__ void __launch_bounds__(kThreads, 1) norm_relu_pool_kernel(const NormReluPool<T> p, const Split split) {
    using S = Compute<T>;
    __shared__ Partial<S, 1, V> first;
    __shared__ Partial<S, 2, V> second;
    const S inverse = inverse_of_pixels<S>(p.shape);
    for (int64_t task = blockIdx.x; task < p.shape.batch * split.blocks(p.shape, V); task += gridDim.x) {
        Place<V> place(p.shape, split, task);
        PixelShare<T, V, E> z(place.planes(p.z), place);
        Channels<S, V> channels;
        S guess[V];
        guess_mean<T, V, E>(guess, z, place, split, inverse, first);
        S sums[2][V] = {};  // of d and d^2, d = z - guess
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
                    const S a = channel.activation(channel.normalised(pixels.of[k].get(v)));
                    sum += a > 0 ? a : S(0);
                }
                out.set(v, sum * S(kPoolWeight));
            }
            store_pack(place.pooled_planes(p.out) + place.pooled_at(w), out);
        });
    }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T, int V, int E>
__global__ void __launch_bounds__(kThreads, 1)
    norm_relu_pool_backward_kernel(const NormReluPoolBackward<T> p, const Split split) {
    using S = Compute<T>;
    __shared__ Partial<S, 2, V> partial;
    const S inverse = inverse_of_pixels<S>(p.shape);
    for (int64_t task = blockIdx.x; task < p.shape.batch * split.blocks(p.shape, V); task += gridDim.x) {
        Place<V> place(p.shape, split, task);
        PixelShare<T, V, E> z(place.planes(p.z), place);
        PooledShare<T, V, E> grad_out(place.pooled_planes(p.grad_out), place);
        Channels<S, V> channels;
        read(channels.mean, p.mean, place, place.statistic());
        read(channels.rstd, p.rstd, place, place.statistic());
        read(channels.weight, p.weight, place, place.channel, split.runs);
        read(channels.bias, p.bias, place, place.channel, split.runs);
        S sums[2][V] = {};  // of the gradient of what ReLU sees, and of that times x_hat
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
                    const S x_hat = channel.normalised(pixels.of[k].get(v));
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
                    const S x_hat = channel.normalised(pixels.of[k].get(v));
                    const S grad = channel.activation(x_hat) > 0 ? above.of.get(v) * S(kPoolWeight) : S(0);
                    grad_z_pack.set(v, grad_z(channel, means, grad, x_hat));
                }
                store_pack(place.planes(p.grad_z) + place.at(w, k), grad_z_pack);
            }
        });
    }
}

// ---- forward on dual numbers ----------------------------------------------------------------------------------------

template <class T, int V, int E>
__global__ void __launch_bounds__(kThreads, 1)
    norm_relu_pool_dual_kernel(const NormReluPoolDual<T> p, const Split split) {
    using S = Compute<T>;
    __shared__ Partial<S, 1, V> first;
    __shared__ Partial<S, 4, V> second;
    const S inverse = inverse_of_pixels<S>(p.shape);
    for (int64_t task = blockIdx.x; task < p.shape.batch * split.blocks(p.shape, V); task += gridDim.x) {
        Place<V> place(p.shape, split, task);
        PixelShare<T, V, E> z(place.planes(p.z), place), z_tangent(place.planes(p.z_tangent), place);
        Channels<S, V> channels;
        ChannelTangents<S, V> tangents;
        S guess[V];
        guess_mean<T, V, E>(guess, z, place, split, inverse, first);
        S sums[4][V] = {};  // of d, d^2, z_tangent and d * z_tangent, d = z - guess
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
            // mean((z - mean) * z_tangent) with z - mean = d - mean_d; the second term is a rounding's size.
            tangents.kappa[v] = (sums[3][v] * inverse - mean_d * tangents.mean[v]) * channels.rstd[v];
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
                    const S x_hat = channel.normalised(pixels.of[k].get(v));
                    const S x_hat_tangent = tangent.normalised(channel, x_hat, along.of[k].get(v));
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

// ---- backward on dual numbers ---------------------------------------------------------------------------------------

template <class T, int V, int E>
__global__ void __launch_bounds__(kThreads, 1)
    norm_relu_pool_dual_backward_kernel(const NormReluPoolDualBackward<T> p, const Split split) {
    using S = Compute<T>;
    __shared__ Partial<S, 4, V> partial;
    const S inverse = inverse_of_pixels<S>(p.shape);
    for (int64_t task = blockIdx.x; task < p.shape.batch * split.blocks(p.shape, V); task += gridDim.x) {
        Place<V> place(p.shape, split, task);
        PixelShare<T, V, E> z(place.planes(p.z), place), z_tangent(place.planes(p.z_tangent), place);
        // The pooled tensors are a quarter of the others: where registers are short they are read again, from the
        // first-level cache.
        constexpr int kept = E > 1 ? 0 : E;
        PooledShare<T, V, kept> grad_out(place.pooled_planes(p.grad_out), place);
        PooledShare<T, V, kept> grad_out_tangent(place.pooled_planes(p.grad_out_tangent), place);
        Channels<S, V> channels;
        ChannelTangents<S, V> tangents{};  // the tangent of the bias stays 0: nothing here depends on it
        read(channels.mean, p.mean, place, place.statistic());
        read(channels.rstd, p.rstd, place, place.statistic());
        read(channels.weight, p.weight, place, place.channel, split.runs);
        read(channels.bias, p.bias, place, place.channel, split.runs);
        read(tangents.mean, p.mean_tangent, place, place.statistic());
        read(tangents.kappa, p.kappa, place, place.statistic());
        S sums[4][V] = {};  // of the gradient of what ReLU sees, that times x_hat, and the tangents of both
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
                    const S x_hat = channel.normalised(pixels.of[k].get(v));
                    const S x_hat_tangent = tangent.normalised(channel, x_hat, along.of[k].get(v));
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
                    const BackwardMeans<S> means_tangent{sums[2][v] * inverse, sums[3][v] * inverse};
                    const S x_hat = channel.normalised(pixels.of[k].get(v));
                    const S x_hat_tangent = tangent.normalised(channel, x_hat, along.of[k].get(v));
                    const bool active = channel.activation(x_hat) > 0;
                    const S grad = active ? above.of.get(v) * S(kPoolWeight) : S(0);
                    const S grad_tangent = active ? above_tangent.of.get(v) * S(kPoolWeight) : S(0);
                    value.set(v, grad_z(channel, means, grad, x_hat));
                    derivative.set(v, grad_z_tangent(channel, tangent, means, means_tangent, grad, grad_tangent, x_hat,
                                                     x_hat_tangent));
                }
                store_pack(place.planes(p.grad_z_tangent) + place.at(w, k), derivative);
                if (p.grad_z) store_pack(place.planes(p.grad_z) + place.at(w, k), value);
            }
        });
    }
}

// ---- launches -------------------------------------------------------------------------------------------------------

int power_of_two_from(int64_t least) {
    int power = 1;
    while (power < least) power *= 2;
    return power;
}

int64_t windows_of(const PlaneShape& shape) {
    return ((shape.height + 1) / 2) * ((shape.width + 1) / 2);
}

// Blocks of at least two warps that read runs of at least 32 bytes, where there are channels enough.
template <class T, int V, int E>
Split split_of(const PlaneShape& shape, bool runs) {
    constexpr int run = sizeof(T) == 2 && E == kMostHeld<T> ? 2 : 4;  // packs
    const int packs = power_of_two_from((shape.channels + V - 1) / V);
    int rows = E == 0 ? kThreads / run : power_of_two_from((windows_of(shape) + E - 1) / E);
    int vectors = V == 1 ? 32 : run;
    if (rows * vectors < 64) vectors = 64 / rows;
    if (vectors > packs) vectors = packs;
    while (rows * vectors > kThreads) rows /= 2;  // E == 0 alone: the others' planes are small enough
    while (rows * vectors < 32) rows *= 2;        // whole warps; the rows too many own no window
    return {vectors, rows, runs};
}

template <class T, int V, int E, class Params>
Status start(void (*kernel)(Params, Split), const Params& p, bool runs, Context context) {
    const Split split = split_of<T, V, E>(p.shape, runs);
    return launch(kernel, grid_for(p.shape.batch * split.blocks(p.shape, V)), static_cast<unsigned>(split.threads()), 0,
                  context, p, split);
}

// Chooses the kernel for the plane's size, the number of channels and the addresses.
#define PDD_START(kernel, T, p, context, packed, runs)                                                \
    [&]() -> Status {                                                                                 \
        constexpr int V = kPack<T>, E = kMostHeld<T>;                                                 \
        if constexpr (sizeof(T) < 8) {                                                                \
            const int64_t windows = windows_of((p).shape);                                            \
            if ((packed) && windows <= 64) return start<T, V, 1>(kernel<T, V, 1>, p, runs, context);  \
            if ((packed) && windows <= 256) return start<T, V, E>(kernel<T, V, E>, p, runs, context); \
            if (packed) return start<T, V, 0>(kernel<T, V, 0>, p, runs, context);                     \
        }                                                                                             \
        return start<T, 1, 0>(kernel<T, 1, 0>, p, runs, context);                                     \
    }()

// Whether images and statistics can be moved in packs.
template <class T, class... Pointers>
bool in_packs(const PlaneShape& shape, Pointers... pointers) {
    return shape.channels % kPack<T> == 0 && aligned(pointers...);
}

}  // namespace

template <class T>
Status norm_relu_pool(const NormReluPool<T>& p, Context context) {
    return PDD_START(norm_relu_pool_kernel, T, p, context, in_packs<T>(p.shape, p.z, p.out, p.mean, p.rstd),
                     aligned(p.weight, p.bias));
}

template <class T>
Status norm_relu_pool_backward(const NormReluPoolBackward<T>& p, Context context) {
    return PDD_START(
        norm_relu_pool_backward_kernel, T, p, context,
        in_packs<T>(p.shape, p.grad_out, p.z, p.mean, p.rstd, p.grad_z, p.grad_weight_parts, p.grad_bias_parts),
        aligned(p.weight, p.bias));
}

template <class T>
Status norm_relu_pool_dual(const NormReluPoolDual<T>& p, Context context) {
    return PDD_START(
        norm_relu_pool_dual_kernel, T, p, context,
        in_packs<T>(p.shape, p.z, p.z_tangent, p.out, p.out_tangent, p.mean, p.rstd, p.mean_tangent, p.kappa),
        aligned(p.weight, p.weight_tangent, p.bias, p.bias_tangent));
}

template <class T>
Status norm_relu_pool_dual_backward(const NormReluPoolDualBackward<T>& p, Context context) {
    return PDD_START(
        norm_relu_pool_dual_backward_kernel, T, p, context,
        in_packs<T>(p.shape, p.grad_out, p.grad_out_tangent, p.z, p.z_tangent, p.mean, p.rstd, p.mean_tangent, p.kappa,
                    p.grad_z, p.grad_z_tangent, p.grad_weight_tangent_parts, p.grad_bias_tangent_parts),
        aligned(p.weight, p.weight_tangent, p.bias));
}

PDD_INSTANTIATE_HALF(norm_relu_pool, NormReluPool)
PDD_INSTANTIATE_HALF(norm_relu_pool_backward, NormReluPoolBackward)
PDD_INSTANTIATE_HALF(norm_relu_pool_dual, NormReluPoolDual)
PDD_INSTANTIATE_HALF(norm_relu_pool_dual_backward, NormReluPoolDualBackward)

}  // namespace pdd::PDD_BACKEND
