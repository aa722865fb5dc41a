// CUDA on the host, for the tests: csrc/ops/*/cuda.cu compiled by g++ with this header in place of
// the toolkit's and run without a GPU (block.cpp). Blocks run one after another; a block's threads
// are fibers that give way to one another at barriers and warp primitives only.
//
// These hold here as on a GPU: indices, tails, sizes of shared memory (0xFF bytes before every
// block, and a heap block of its exact size for AddressSanitizer), who takes part in a barrier or a
// shuffle, limits of a launch. A barrier that is missing shows as results that depend on the order
// in which threads run, which PDD_HOST_ORDER sets: "forward" (lower threads go as far as they can
// before higher ones; the default), "backward", or a number that seeds an order of warps and of
// lanes within them, another one for every block.
//
// Stricter than a GPU: a barrier or a warp primitive has to be reached by all threads that it
// names, none of which has left the kernel, the barrier on one line of the source. Not modeled:
// blocks at the same time, so neither races between them nor atomics; memory ordering and races
// within one stretch between two barriers where no order above shows them; lockstep of warps;
// static shared memory in a launch's limit; __launch_bounds__ and registers; streams; timing; fused
// multiply-add and the device's mathematical functions, whose last bits differ.
//
// Also read from the environment at every launch: PDD_HOST_FAIL, a cudaError_t that it then
// returns; PDD_HOST_SHARED_BYTES, the most shared memory that a block may ask for.
#pragma once

#include <math.h>  // sqrt, exp and their like without std::, for float and double, as nvcc has them
#include <stddef.h>
#include <stdint.h>

#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ \
    static  // one for all blocks: they run one after another, and shared.ld says where it lies

// ---- types ----

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned vx = 1, unsigned vy = 1, unsigned vz = 1) : x(vx), y(vy), z(vz) {}
};

#define PDD_HOST_VECTORS(T, name)                       \
    struct alignas(2 * sizeof(T)) name##2 {             \
        T x, y;                                         \
    };                                                  \
    struct alignas(16) name##4 {                        \
        T x, y, z, w;                                   \
    };                                                  \
    inline name##2 make_##name##2(T x, T y) {           \
        return {x, y};                                  \
    }                                                   \
    inline name##4 make_##name##4(T x, T y, T z, T w) { \
        return {x, y, z, w};                            \
    }
PDD_HOST_VECTORS(float, float)
PDD_HOST_VECTORS(double, double)
PDD_HOST_VECTORS(int, int)
PDD_HOST_VECTORS(unsigned, uint)
#undef PDD_HOST_VECTORS

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- runtime, with the toolkit's numbers ----

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorIllegalAddress = 700,
    cudaErrorLaunchOutOfResources = 701,
    cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace pdd_host {

enum class Primitive { barrier, shuffle, vote, warp_barrier };

struct Kernel {
    const void* address;
    const char* signature;
};

cudaError_t launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& body);
cudaError_t set_shared_bytes(const void* kernel, int bytes);
unsigned char* dynamic_shared();

template <class... Parameters, size_t... K>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<K...>) {
    kernel(*static_cast<Parameters*>(arguments[K])...);
}

int lane();

// Waits until all threads that `mask` names (for Primitive::barrier: all of the block) are at the
// same primitive with the same mask. A shuffle gets the value of lane `source`, all others the
// lanes whose value is not 0.
uint64_t meet(Primitive primitive, unsigned mask, uint64_t value, int source, const char* file,
              int line);

float bfloat16_to_float(uint16_t bits);
float float16_to_float(uint16_t bits);
uint16_t float_to_bfloat16(float value);  // both to nearest, ties to even
uint16_t float_to_float16(float value);

}  // namespace pdd_host

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes = 0, cudaStream_t = nullptr) {
    const pdd_host::Kernel described{reinterpret_cast<const void*>(kernel), __PRETTY_FUNCTION__};
    return pdd_host::launch(described, grid, block, shared_bytes, [=] {
        pdd_host::call(kernel, arguments, std::index_sequence_for<Parameters...>{});
    });
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
    return pdd_host::set_shared_bytes(reinterpret_cast<const void*>(kernel), value);
}

// ---- barriers and warps ----

#define PDD_HOST_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define PDD_HOST_MEET(primitive, mask, value, source) \
    pdd_host::meet(pdd_host::Primitive::primitive, mask, value, source, file, line)

inline void __syncthreads(PDD_HOST_HERE) {
    PDD_HOST_MEET(barrier, 0, 0, 0);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, PDD_HOST_HERE) {
    PDD_HOST_MEET(warp_barrier, mask, 0, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, PDD_HOST_HERE) {
    return static_cast<unsigned>(PDD_HOST_MEET(vote, mask, predicate != 0, 0));
}
inline int __any_sync(unsigned mask, int predicate, PDD_HOST_HERE) {
    return PDD_HOST_MEET(vote, mask, predicate != 0, 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, PDD_HOST_HERE) {
    return PDD_HOST_MEET(vote, mask, predicate != 0, 0) == mask;
}

// A source beyond the lane's own group of `width` is the lane itself; PTX ISA, shfl.sync.
template <class T>
T pdd_host_shuffle(unsigned mask, T value, int source, const char* file, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 32 or 64 bits");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = PDD_HOST_MEET(shuffle, mask, bits, source);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, PDD_HOST_HERE) {
    const int first = pdd_host::lane() & -width;
    return pdd_host_shuffle(mask, value, first + (source & (width - 1)), file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, PDD_HOST_HERE) {
    const int lane = pdd_host::lane(), source = lane - static_cast<int>(delta);
    return pdd_host_shuffle(mask, value, source < (lane & -width) ? lane : source, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, PDD_HOST_HERE) {
    const int lane = pdd_host::lane(), source = lane + static_cast<int>(delta);
    return pdd_host_shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset, int width = 32, PDD_HOST_HERE) {
    const int lane = pdd_host::lane(), source = lane ^ offset;
    return pdd_host_shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, file, line);
}

#undef PDD_HOST_MEET
#undef PDD_HOST_HERE

// ---- numbers ----

template <class T>
T __ldg(const T* from) {
    return *from;
}
template <class T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}
inline float rsqrtf(float value) {
    return 1 / sqrtf(value);
}
inline float rsqrt(float value) {
    return 1 / sqrtf(value);
}
inline double rsqrt(double value) {
    return 1 / sqrt(value);
}
inline int __popc(unsigned bits) {
    return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
    return __builtin_ffs(bits);
}

#define PDD_HOST_REINTERPRET(name, From, To)       \
    inline To name(From from) {                    \
        To to;                                     \
        static_assert(sizeof(to) == sizeof(from)); \
        std::memcpy(&to, &from, sizeof(to));       \
        return to;                                 \
    }
PDD_HOST_REINTERPRET(__float_as_uint, float, unsigned)
PDD_HOST_REINTERPRET(__float_as_int, float, int)
PDD_HOST_REINTERPRET(__uint_as_float, unsigned, float)
PDD_HOST_REINTERPRET(__int_as_float, int, float)
PDD_HOST_REINTERPRET(__double_as_longlong, double, long long)
PDD_HOST_REINTERPRET(__longlong_as_double, long long, double)
#undef PDD_HOST_REINTERPRET
