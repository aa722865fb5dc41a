// Threads of a block: stacks that the host switches between.
#include <sys/mman.h>

#include <new>

#include "internal.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(...)
#define __sanitizer_finish_switch_fiber(...)
#endif

namespace pdd_host {
namespace {

constexpr size_t kPage = 4096, kStackBytes = 128 * 1024;

Fiber* left = nullptr;
Fiber* entered = nullptr;

#if defined(__x86_64__)
// swapcontext makes two system calls, and a sum over a block is thousands of switches.
extern "C" void pdd_host_switch(void** from, void* to);
asm(R"(
.pushsection .text
.local pdd_host_switch
.type pdd_host_switch, @function
pdd_host_switch:
    endbr64
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
.popsection
)");

void prepare(Fiber& fiber, void (*start)()) {
    // pdd_host_switch pops six registers and the return address; then comes a call's usual
    // alignment.
    auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(const_cast<void*>(fiber.stack)) +
                                             fiber.bytes);
    top[-2] = reinterpret_cast<uintptr_t>(start);
    fiber.at = top - 8;
}
void swap(Fiber& from, Fiber& to) {
    pdd_host_switch(&from.at, to.at);
}
#else
void prepare(Fiber& fiber, void (*start)()) {
    getcontext(&fiber.at);
    fiber.at.uc_stack.ss_sp = const_cast<void*>(fiber.stack);
    fiber.at.uc_stack.ss_size = fiber.bytes;
    fiber.at.uc_link = nullptr;
    makecontext(&fiber.at, start, 0);
}
void swap(Fiber& from, Fiber& to) {
    swapcontext(&from.at, &to.at);
}
#endif

}  // namespace

void make_fiber(Fiber& fiber, unsigned number, void (*start)()) {
    void* memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kPage, PROT_NONE);  // an overflow ends the program
    fiber.stack = static_cast<char*>(memory) + kPage;
    fiber.bytes =
        kStackBytes - number % 16 * 192;  // apart, or the stacks' tops would share cache lines
    prepare(fiber, start);
}

void arrive() {
    __sanitizer_finish_switch_fiber(entered->fake_stack, &left->stack, &left->bytes);
}

void go(Fiber& from, Fiber& to) {
    left = &from;
    entered = &to;
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.bytes);
    swap(from, to);
    arrive();
}

}  // namespace pdd_host
