// What every launcher is given besides its parameters, and what it answers.
#pragma once

#include <cstdint>

namespace pdd {

struct Context {
    void* stream;  // CUDA: the stream to launch on; CPU: unused
    int threads;   // CPU: at most this many threads; CUDA: unused
};

// 0 is success. Positive values are cudaError_t; negative ones are ours.
using Status = int;
constexpr Status kSuccess = 0;
constexpr Status kLabelOutOfRange = -1;
constexpr Status kUnknownOperation = -2;
constexpr Status kOutOfMemory = -3;
constexpr Status kRowOutOfRange = -4;

}  // namespace pdd
