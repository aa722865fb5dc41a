// Kernels that hold the stand-in to CUDA's behavior: test_cuda_stand_in.py names a launch and reads
// its result.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <string>
#include <vector>

namespace {

__device__ int linear() {
    return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

// Four shuffles of every lane's number; a row for each.
__global__ void shuffles(int* out, int argument, int width) {
    const int lane = linear();
    out[lane] = __shfl_sync(0xffffffffu, lane, argument, width);
    out[32 + lane] = __shfl_up_sync(0xffffffffu, lane, static_cast<unsigned>(argument), width);
    out[64 + lane] = __shfl_down_sync(0xffffffffu, lane, static_cast<unsigned>(argument), width);
    out[96 + lane] = __shfl_xor_sync(0xffffffffu, lane, argument, width);
}

// Votes and shuffles of half a warp each, of which the halves know nothing.
__global__ void votes(int* out, int argument, int) {
    const int lane = linear();
    const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    out[lane] = static_cast<int>(__ballot_sync(mask, lane % argument == 0));
    out[32 + lane] = __any_sync(mask, lane == argument);
    out[64 + lane] = __all_sync(mask, lane >= 16);
    out[96 + lane] = static_cast<int>(__shfl_xor_sync(mask, 0.5 * lane, 1) * 2);
    __syncwarp(mask);
}

// The contents of shared memory before a block writes there, and its threads' exchange through it.
__global__ void shared(int* out, int, int) {
    __shared__ int fixed[32];
    int* dynamic = reinterpret_cast<int*>(pdd_host::dynamic_shared());
    const int thread = linear(), block = static_cast<int>(blockIdx.x + gridDim.x * blockIdx.y);
    out[block * 64 + thread] = fixed[thread];
    out[block * 64 + 32 + thread] = dynamic[thread];
    __syncthreads();
    fixed[thread] = dynamic[31 - thread] = thread;
    __syncthreads();
    if (fixed[31 - thread] != dynamic[thread]) out[block * 64 + thread] = -2;
}

// ---- mistakes ----

__global__ void leaves_before_a_barrier(int* out, int, int) {
    if (linear() == 5) return;
    __syncthreads();
    out[0] = 1;
}
__global__ void two_barriers(int* out, int, int) {
    if (linear() < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[0] = 1;
}
__global__ void barrier_and_shuffle(int* out, int, int) {
    if (linear() < 16) {
        __syncthreads();
    } else {
        out[0] = __shfl_xor_sync(0xffffffffu, 1, 1);
    }
}
__global__ void leaves_before_a_shuffle(int* out, int, int) {
    if (linear() % 32 >= 7) return;
    out[0] = __shfl_down_sync(0xffffffffu, 1, 1);
}
__global__ void two_masks(int* out, int, int) {
    out[0] = __any_sync(linear() % 32 < 8 ? 0xffffffffu : 0xffffff00u, 1);
}
__global__ void not_in_its_mask(int* out, int, int) {
    out[0] = __any_sync(0x0000ffffu, 1);
}
__global__ void source_not_in_the_mask(int* out, int, int) {
    if (linear() % 32 < 16) out[0] = __shfl_xor_sync(0x0000ffffu, 1, 16);
}
__global__ void beyond_dynamic_shared(int*, int argument, int) {
    pdd_host::dynamic_shared()[argument] = 1;
}
__global__ void beyond_fixed_shared(int* out, int argument, int) {
    __shared__ int fixed[8];
    fixed[(linear() + argument) % 9] = 1;
    __syncthreads();
    out[0] = fixed[linear() % 8];
}
__global__ void races(int* out, int, int) {
    __shared__ int fixed[64];
    fixed[linear()] = linear();
    out[linear()] = fixed[(linear() + 32) % 64];
}
__global__ void nothing(int*, int, int) {}

struct Launch {
    const char* name;
    void (*kernel)(int*, int, int);
    dim3 grid, block;
    size_t shared_bytes;
};

const Launch launches[] = {
    {"shuffles", shuffles, 1, 32, 0},
    {"votes", votes, 1, dim3(4, 4, 2), 0},
    {"shared", shared, dim3(2, 2), dim3(8, 4), 128},
    {"races", races, 1, 64, 0},
    {"leaves before a barrier", leaves_before_a_barrier, dim3(1, 3), 64, 0},
    {"two barriers", two_barriers, 1, 64, 0},
    {"barrier and shuffle", barrier_and_shuffle, 1, 32, 0},
    {"leaves before a shuffle", leaves_before_a_shuffle, 1, 64, 0},
    {"lanes that are not there", shuffles, 1, 20, 0},
    {"two masks", two_masks, 1, 32, 0},
    {"not in its mask", not_in_its_mask, 1, 32, 0},
    {"source not in the mask", source_not_in_the_mask, 1, 32, 0},
    {"beyond dynamic shared", beyond_dynamic_shared, 1, 1, 100},
    {"beyond fixed shared", beyond_fixed_shared, 1, 8, 0},
    {"no block", nothing, 0, 32, 0},
    {"no thread", nothing, 1, dim3(32, 0), 0},
    {"grid.y", nothing, dim3(1, 65536), 1, 0},
    {"grid.z", nothing, dim3(1, 1, 65536), 1, 0},
    {"1024 threads", nothing, 1, dim3(32, 8, 4), 0},
    {"1056 threads", nothing, 1, dim3(32, 33), 0},
    {"block.z", nothing, 1, dim3(1, 1, 65), 0},
    {"48 KB", nothing, 1, 1, 49152},
    {"more than 48 KB", nothing, 1, 1, 49153},
};

// Bits of bfloat16 and float16 for every float on standard input; then of every float16 the float.
int numbers() {
    float value;
    while (std::fread(&value, sizeof value, 1, stdin) == 1) {
        const uint16_t bits[] = {pdd_host::float_to_bfloat16(value),
                                 pdd_host::float_to_float16(value)};
        std::fwrite(bits, sizeof bits, 1, stdout);
    }
    for (int bits = 0; bits < 65536; ++bits) {
        const float both[] = {pdd_host::bfloat16_to_float(static_cast<uint16_t>(bits)),
                              pdd_host::float16_to_float(static_cast<uint16_t>(bits))};
        std::fwrite(both, sizeof both, 1, stdout);
    }
    return 0;
}

}  // namespace

// name [argument [width [raised]]], `raised` being what cudaFuncSetAttribute is asked for. Prints
// the launch's error, what cudaGetLastError says twice after it, and what the kernel wrote.
int main(int count, char** values) {
    const auto argument = [&](int k) { return count > k ? std::stoi(values[k]) : 0; };
    if (count < 2) return 2;
    const std::string name = values[1];
    if (name == "numbers") return numbers();
    for (const Launch& launch : launches) {
        if (name != launch.name) continue;
        std::vector<int> out(256, -3);
        int *address = out.data(), first = argument(2), second = argument(3);
        void* arguments[] = {&address, &first, &second};
        try {
            if (count > 4) {
                const cudaError_t error = cudaFuncSetAttribute(
                    launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, argument(4));
                std::printf("%s %s\n", cudaGetErrorName(error),
                            cudaGetErrorName(cudaGetLastError()));
            }
            const cudaError_t error = cudaLaunchKernel(launch.kernel, launch.grid, launch.block,
                                                       arguments, launch.shared_bytes);
            std::printf("%s", cudaGetErrorName(error));
            for (int k = 0; k < 2; ++k) std::printf(" %s", cudaGetErrorName(cudaGetLastError()));
            std::printf("\n");
            for (const int number : out) std::printf("%d ", number);
        } catch (const std::exception& mistake) {
            std::printf("%s\n", mistake.what());
            return 1;
        }
        return 0;
    }
    return 2;
}
