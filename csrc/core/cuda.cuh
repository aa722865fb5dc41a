// Launch arithmetic and block-wide sums for the CUDA back end.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/context.h"
#include "core/macros.h"

namespace pdd::PDD_BACKEND {

inline cudaStream_t stream_of(Context context) {
    return static_cast<cudaStream_t>(context.stream);
}

constexpr int64_t kLargestGrid = 2147483647;  // of grid.x, from compute capability 3.0 on

// Blocks for `count` independent tasks; kernels loop over tasks in steps of gridDim.x, so more than the
// largest grid is no error.
inline unsigned grid_for(int64_t count) {
    return static_cast<unsigned>(count < kLargestGrid ? count : kLargestGrid);
}

// One launch, by the runtime's plain function in place of <<<...>>>, so that any C++ compiler reads these files: the tests
// run them on the host (tests/native/host/cuda_runtime.h). A failure is reported once and leaves nothing behind for torch
// to trip over.
template <class... Parameters>
Status launch(void (*kernel)(Parameters...), unsigned grid, dim3 block, size_t shared_bytes, Context context,
              Parameters... parameters) {
    void* arguments[] = {&parameters...};
    const cudaError_t error = cudaLaunchKernel(kernel, dim3(grid), block, arguments, shared_bytes, stream_of(context));
    if (error != cudaSuccess) cudaGetLastError();
    return static_cast<Status>(error);
}

// The block's dynamic shared memory, as many bytes as the launch asked for; its content is undefined at first.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(PDD_CUDA_ON_HOST)
    return pdd_host::dynamic_shared();
#else
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
#endif
}

// Sum over a warp's lanes, the same in all of them: a butterfly, so the order of additions is fixed.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// Sum over a block of whole warps, at most 1024 threads; every thread gets it. `partial` holds one T per
// warp.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* partial) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int warps = static_cast<int>(blockDim.x) / 32;
    value = warp_sum(value);
    __syncthreads();  // the sum before may still be read
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    return warp_sum(lane < warps ? partial[lane] : T(0));
}

}  // namespace pdd::PDD_BACKEND
