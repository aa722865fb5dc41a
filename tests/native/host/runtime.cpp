// The runtime's answers, its limits, and numbers of 16 bits.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>

#include "internal.h"

namespace pdd_host {
namespace {

std::map<const void*, size_t> raised;  // kernels' limits of dynamic shared memory
cudaError_t last_error = cudaSuccess;

constexpr size_t kSharedBytes = 48 * 1024, kSharedBytesOptin = 232448;  // of compute capability 9.0

size_t most_shared_bytes() {
    const char* wanted = std::getenv("PDD_HOST_SHARED_BYTES");
    return wanted ? std::strtoul(wanted, nullptr, 10) : kSharedBytesOptin;
}

cudaError_t judge(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
    if (const char* error = std::getenv("PDD_HOST_FAIL"))
        return static_cast<cudaError_t>(std::atoi(error));
    if (!grid.x || !grid.y || !grid.z || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    if (!block.x || !block.y || !block.z || block.x > kMostThreads || block.y > kMostThreads ||
        block.z > 64 || uint64_t{block.x} * block.y * block.z > kMostThreads)
        return cudaErrorInvalidConfiguration;
    const auto limit = raised.find(kernel);
    return shared_bytes > (limit == raised.end() ? kSharedBytes : limit->second)
               ? cudaErrorInvalidValue
               : cudaSuccess;
}

}  // namespace

cudaError_t refusal(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
    const cudaError_t error = judge(kernel, grid, block, shared_bytes);
    if (error != cudaSuccess) last_error = error;
    return error;
}

cudaError_t set_shared_bytes(const void* address, int bytes) {
    if (bytes < 0 || static_cast<size_t>(bytes) > most_shared_bytes())
        return last_error = cudaErrorInvalidValue;
    // A real runtime allows a lower limit, with which the launches of a captured graph would fail.
    const auto before = raised.find(address);
    if (before != raised.end() && static_cast<size_t>(bytes) < before->second)
        return last_error = cudaErrorInvalidValue;
    raised[address] = static_cast<size_t>(bytes);
    return cudaSuccess;
}

// ---- numbers in 16 bits ----

float bfloat16_to_float(uint16_t bits) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

uint16_t float_to_bfloat16(float value) {
    if (std::isnan(value)) return 0x7fff;
    const unsigned bits = __float_as_uint(value);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float float16_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size = std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction),
                            std::max(exponent, 1) - 25);
    if (exponent == 31) size = fraction ? NAN : INFINITY;
    return bits >> 15 ? -size : size;
}

uint16_t float_to_float16(float value) {
    if (std::isnan(value)) return 0x7fff;
    const int sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (size >= 65520) return static_cast<uint16_t>(sign | 0x7c00);
    const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    // In units of the last place; 2048 of them carry over into the exponent.
    const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units));
}

}  // namespace pdd_host

// ---- runtime ----

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
#define PDD_HOST_NAME(name) \
    case name:              \
        return #name;
        PDD_HOST_NAME(cudaSuccess)
        PDD_HOST_NAME(cudaErrorInvalidValue)
        PDD_HOST_NAME(cudaErrorMemoryAllocation)
        PDD_HOST_NAME(cudaErrorInvalidConfiguration)
        PDD_HOST_NAME(cudaErrorInvalidDeviceFunction)
        PDD_HOST_NAME(cudaErrorNoDevice)
        PDD_HOST_NAME(cudaErrorIllegalAddress)
        PDD_HOST_NAME(cudaErrorLaunchOutOfResources)
        PDD_HOST_NAME(cudaErrorLaunchFailure)
    }
    return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t) {
    return "as set by the host that stands in for CUDA";
}

cudaError_t cudaGetLastError() {
    return std::exchange(pdd_host::last_error, cudaSuccess);
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* devices) {
    *devices = 1;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock:
            *value = pdd_host::kMostThreads;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlock:
            *value = pdd_host::kSharedBytes;
            return cudaSuccess;
        case cudaDevAttrWarpSize:
            *value = pdd_host::kWarp;
            return cudaSuccess;
        case cudaDevAttrMultiProcessorCount:
            *value = 2;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = static_cast<int>(pdd_host::most_shared_bytes()) + 1024;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = static_cast<int>(pdd_host::most_shared_bytes());
            return cudaSuccess;
    }
    return pdd_host::last_error = cudaErrorInvalidValue;
}
