// Interface between the parts of the stand-in for CUDA.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "cuda_runtime.h"

namespace pdd_host {

// ---- fiber.cpp ----

// A stack and where on it to go on. The host's own is one too.
struct Fiber {
#if defined(__x86_64__)
    void* at = nullptr;
#else
    ucontext_t at;
#endif
    const void* stack = nullptr;
    size_t bytes = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's
};

// A new stack, on which `start` runs when it is first gone to; `start` calls arrive() first and
// never returns.
void make_fiber(Fiber& fiber, unsigned number, void (*start)());
void arrive();
void go(Fiber& from, Fiber& to);

// ---- runtime.cpp ----

constexpr unsigned kMostThreads = 1024, kWarp = 32;

// Whether the runtime refuses a launch, and with what.
cudaError_t refusal(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes);

}  // namespace pdd_host
