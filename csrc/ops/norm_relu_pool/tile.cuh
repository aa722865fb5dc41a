// Traversal of planes in the CUDA kernels: which thread owns which pixels, and how these are read,
// held and summed.
//
// A block takes one image and a few packs of neighboring channels, whole planes of them. Its
// threads are `vectors` across the channels, so that a warp's accesses are runs of neighboring
// packs, times `rows` down the planes. A thread owns windows: the 2x2 pixels that are pooled
// together, cut off at an odd border.
//
// Planes of up to 256 windows (32x32 pixels) stay in registers between passes, so every input is
// read once. Larger planes are read again in the second pass, while the block's tile is still in
// the second-level cache.
#pragma once

#include "core/cuda.cuh"
#include "ops/norm_relu_pool/math.h"
#include "ops/norm_relu_pool/params.h"

namespace pdd::PDD_BACKEND {

constexpr int kThreads = 256;  // maximum; it allows a thread 255 registers
constexpr int kWarps = kThreads / 32;

// Maximum number of windows that a thread holds. Two packs of 16 bits hold as many channels as four
// of 32, with twice the per-channel values beside them: the dual passes would exceed the registers
// with four windows of eight channels.
template <class T>
constexpr int kMostHeld = sizeof(T) == 2 ? 2 : 4;

// Split of a block's threads; both are powers of two.
struct Split {
    int vectors, rows;
    bool runs;  // whether vectors over the channels begin at multiples of 16 bytes

    __host__ __device__ int threads() const { return vectors * rows; }
    __host__ __device__ int64_t blocks(const PlaneShape& shape, int V) const {
        return (shape.channels + vectors * V - 1) / (vectors * V);  // for one image
    }
};

struct Window {
    int i, j;  // of its upper left pixel
    bool right,
        bottom;  // whether it has a second column and row; both false without a window
    bool valid;

    __device__ __forceinline__ bool holds(int k) const {
        return valid && (k % 2 == 0 || right) && (k / 2 == 0 || bottom);
    }
    __device__ __forceinline__ bool pooled() const { return right && bottom; }
};

// Position of a thread. Offsets within an image fit 32 bits (pdd_fast/ops/ checks it).
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
    // Whether this thread writes the block's per-channel results.
    __device__ __forceinline__ bool reports() const { return inside && row == 0; }
    __device__ __forceinline__ void renewed() { renew(row); }
};

// Pixels of a window, zero outside of it.
template <class T, int V>
struct Pixels {
    Pack<T, V> of[4];

    template <class P>
    __device__ __forceinline__ Pixels(const T* images, const P& place, const Window& w) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
            of[k] = w.holds(k) ? load_pack<V>(images + place.at(w, k)) : Pack<T, V>{};
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
};

// A thread's share of a tensor: E windows in registers, or with E = 0 the means to read them on
// request.
template <class Part, class T, int V, int E>
struct Share {
    Part parts[E];

    __device__ __forceinline__ Share(const T* images, const Place<V>& place) {
#pragma unroll
        for (int e = 0; e < E; ++e)
            parts[e] = Part(images, place, place.window(place.row + e * place.rows));
    }
    __device__ __forceinline__ const Part& operator()(int e, const Window&) const {
        return parts[e];
    }
    __device__ __forceinline__ void renewed() {
#pragma unroll
        for (int e = 0; e < E; ++e) parts[e].renewed();
    }
};

template <class Part, class T, int V>
struct Share<Part, T, V, 0> {
    const T* images;
    const Place<V>& place;

    __device__ __forceinline__ Share(const T* from, const Place<V>& where)
        : images(from), place(where) {}
    __device__ __forceinline__ Part operator()(int, const Window& w) const {
        return Part(images, place, w);
    }
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
        for (int number = place.row; number < place.windows; number += place.rows)
            body(0, place.window(number));
    }
}

template <class S, int Q, int V>
struct Partial {
    S of[kWarps][Q][V][32];
};

// Q sums for each of a thread's V channels over the threads that share the channels, the same for
// all of them: first over a warp's lanes of equal channels (a butterfly), then over the warps in
// order.
template <class S, int Q, int V>
__device__ __forceinline__ void sum_rows(S (&value)[Q][V], const Split& split,
                                         Partial<S, Q, V>& partial) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int warps = split.threads() / 32, apart = split.vectors > 32 ? split.vectors / 32 : 1;
#pragma unroll
    for (int q = 0; q < Q; ++q)
#pragma unroll
        for (int v = 0; v < V; ++v)
            for (int offset = split.vectors; offset < 32; offset *= 2)
                value[q][v] += __shfl_xor_sync(0xffffffffu, value[q][v], offset);
    if (warps == 1) return;
    __syncthreads();  // the previous sums may still be read
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

// Number of a thread's per-channel values that one instruction moves.
template <class S, int V>
constexpr int kRun = V < kPack<S> ? V : kPack<S>;

// `runs`: the values begin at multiples of 16 bytes. Statistics do; a weight may be a slice of a
// flat vector.
template <class S, int V>
__device__ __forceinline__ void read(S (&to)[V], const S* from, const Place<V>& place, int64_t at,
                                     bool runs = true) {
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

// Per-channel values of a thread, in the formulas' structs one channel at a time.
template <class S, int V>
struct Channels {
    S mean[V], rstd[V], weight[V], bias[V];

    __device__ __forceinline__ Channel<S> operator[](int v) const {
        return {mean[v], rstd[v], weight[v], bias[v]};
    }
};

template <class S, int V>
struct ChannelTangents {
    S mean[V], kappa[V], weight[V], bias[V];

    __device__ __forceinline__ ChannelTangent<S> operator[](int v) const {
        return {mean[v], kappa[v], weight[v], bias[v]};
    }
};

}  // namespace pdd::PDD_BACKEND
