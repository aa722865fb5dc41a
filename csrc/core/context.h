// Arguments that every launcher takes besides its parameters, and the status that it returns.
#pragma once

#include <cstdint>

namespace pdd {

struct Context {
    void* stream;  // CUDA: the stream to launch on; CPU: unused
    int threads;   // CPU: at most this many threads; CUDA: unused
};

// 0 is success. Positive values are cudaError_t, negative ones are our own.
using Status = int;
constexpr Status kSuccess = 0;
constexpr Status kLabelOutOfRange = -1;
constexpr Status kUnknownOperation = -2;
constexpr Status kOutOfMemory = -3;
constexpr Status kRowOutOfRange = -4;

}  // namespace pdd
