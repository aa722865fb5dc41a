// Launches, packs of elements that move together, and sums over a block, for the CUDA back end.
#pragma once

#include <cuda_runtime.h>
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>

#include "core/context.h"
#include "core/macros.h"
#include "core/storage.h"

namespace pdd::PDD_BACKEND {

// ---- launches ----

inline cudaStream_t stream_of(Context context) {
    return static_cast<cudaStream_t>(context.stream);
}

#ifndef PDD_LARGEST_GRID
#define PDD_LARGEST_GRID \
    2147483647  // of grid.x, from compute capability 3.0 on; the tests set a small one
#endif

// Returns the number of blocks for `count` independent tasks. Kernels loop over tasks in steps of
// gridDim.x, so more tasks than the largest grid are no error.
inline unsigned grid_for(int64_t count) {
    constexpr int64_t largest = PDD_LARGEST_GRID;
    return static_cast<unsigned>(count < largest ? count : largest);
}

// Launches a kernel by the runtime's plain function instead of <<<...>>>, so that any C++ compiler
// can compile these files: the tests run them on the host (tests/native/host/cuda_runtime.h). An
// error is returned and cleared, so that torch does not report it again.
template <class... Parameters>
Status launch(void (*kernel)(Parameters...), unsigned grid, dim3 block, size_t shared_bytes,
              Context context, Parameters... parameters) {
    void* arguments[] = {&parameters...};
    const cudaError_t error =
        cudaLaunchKernel(kernel, dim3(grid), block, arguments, shared_bytes, stream_of(context));
    if (error != cudaSuccess) cudaGetLastError();
    return static_cast<Status>(error);
}

// Returns the block's dynamic shared memory, with the size that the launch requested. It is
// uninitialized.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(PDD_CUDA_ON_HOST)
    return pdd_host::dynamic_shared();
#else
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
#endif
}

// ---- elements in 16 bits ----

__device__ __forceinline__ float widen(float value) {
    return value;
}
__device__ __forceinline__ double widen(double value) {
    return value;
}

template <class T, class S>
__device__ __forceinline__ T narrow(S value) {
    return value;
}

#if defined(__CUDACC__)
__device__ __forceinline__ float widen(bfloat16 value) {
    return __bfloat162float(__ushort_as_bfloat16(value.bits));
}
__device__ __forceinline__ float widen(float16 value) {
    return __half2float(__ushort_as_half(value.bits));
}
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float value) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ __forceinline__ float16 narrow<float16>(float value) {
    return {__half_as_ushort(__float2half_rn(value))};
}
#else
inline float widen(bfloat16 value) {
    return pdd_host::bfloat16_to_float(value.bits);
}
inline float widen(float16 value) {
    return pdd_host::float16_to_float(value.bits);
}
template <>
inline bfloat16 narrow<bfloat16>(float value) {
    return {pdd_host::float_to_bfloat16(value)};
}
template <>
inline float16 narrow<float16>(float value) {
    return {pdd_host::float_to_float16(value)};
}
#endif

// ---- packs ----

constexpr int kPackBytes = 16;  // the widest access of a thread

template <class T>
constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T));

// V neighboring elements, read and written by one instruction; get and set convert from and to the
// type of the computation. Two 16-bit elements share a register until they are needed, because V
// separate values take V registers.
template <class T, int V, bool halves = sizeof(T) == 2 && V % 2 == 0>
struct alignas(sizeof(T) * V) Pack {
    T of[V];

    __device__ __forceinline__ Compute<T> get(int v) const { return widen(of[v]); }
    __device__ __forceinline__ void set(int v, Compute<T> value) { of[v] = narrow<T>(value); }
};

template <class T, int V>
struct alignas(sizeof(T) * V) Pack<T, V, true> {
    uint32_t pairs[V / 2];

    __device__ __forceinline__ float get(int v) const {
        return widen(T{static_cast<uint16_t>(v % 2 ? pairs[v / 2] >> 16 : pairs[v / 2] & 0xffffu)});
    }
    // Must be called in the order of v: the first of a pair clears the register.
    __device__ __forceinline__ void set(int v, float value) {
        const uint32_t bits = narrow<T>(value).bits;
        pairs[v / 2] = v % 2 ? pairs[v / 2] | bits << 16 : bits;
    }
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
    return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <class T, int V>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, V>& pack) {
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// Makes the compiler treat the elements as new, so that it recomputes values derived from them
// (widened, normalized) instead of holding those in registers from one pass to the next.
template <class T, int V>
__device__ __forceinline__ void renew(Pack<T, V>& pack) {
#if defined(__CUDA_ARCH__)
    constexpr int words = static_cast<int>(sizeof(pack)) / 4;
    auto* word = reinterpret_cast<uint32_t*>(&pack);
#pragma unroll
    for (int k = 0; k < words; ++k) asm volatile("" : "+r"(word[k]));
#else
    static_cast<void>(pack);
#endif
}

__device__ __forceinline__ void renew(int& number) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(number));
#else
    static_cast<void>(number);
#endif
}

// Returns whether all addresses begin a pack; nullptr does.
template <class... Pointers>
inline bool aligned(Pointers... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) % kPackBytes == 0) && ...);
}

// ---- sums ----

// Returns the sum over a warp's lanes to all of them. The butterfly fixes the order of additions.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        const T other = __shfl_xor_sync(0xffffffffu, value, offset);
        value = other > value ? other : value;
    }
    return value;
}

// Returns the sum over a block of whole warps, at most 1024 threads, to every thread. `partial`
// holds one T per warp.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* partial) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int warps = static_cast<int>(blockDim.x) / 32;
    value = warp_sum(value);
    __syncthreads();  // the previous sum may still be read
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    return warp_sum(lane < warps ? partial[lane] : T(0));
}

}  // namespace pdd::PDD_BACKEND
