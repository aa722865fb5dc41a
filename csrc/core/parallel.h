// Parallel loops of the CPU back end. Results do not depend on the number of threads: the thread
// that runs an index never affects its result, and one compiled copy of a body serves any number of
// threads. Two copies could differ, because the compiler may fuse a multiplication and an addition
// in one of them only.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/threads.h"

namespace pdd::PDD_BACKEND {

// Approximate nanoseconds of n multiply-adds in registers, and of n elements read or written with
// little arithmetic. Measured with AVX2: 44 float multiply-adds per nanosecond in large products,
// half of that in small ones.
template <class T>
constexpr double multiply_time(int64_t n) {
    return static_cast<double>(n) * sizeof(T) / (4 * 30);
}
template <class T>
constexpr double move_time(int64_t n) {
    return static_cast<double>(n) * sizeof(T) / (4 * 3);
}

template <class Body>
PDD_ONE_COPY void run_indices(const void* body, int64_t first, int64_t last, int thread) {
    for (int64_t i = first; i < last; ++i) (*static_cast<const Body*>(body))(i, thread);
}

// Returns how many of `threads` threads are worthwhile for `count` indices of about `each`
// nanoseconds.
inline int threads_worth(int64_t count, int threads, double each) {
    const double work = each * static_cast<double>(count),
                 one = worth_a_thread.load(std::memory_order_relaxed);
    const int64_t most = count < threads ? count : threads;
    if (most < 2 || work < 2 * one) return 1;
    return static_cast<int>(work < one * static_cast<double>(most) ? work / one
                                                                   : static_cast<double>(most));
}

// Calls body(i, thread) for i in [0, count) and thread in [0, threads), for bodies with scratch
// memory per thread. `each`: approximate nanoseconds per index. A region that is worth one thread
// involves no other and has no overhead.
template <class Body>
inline void parallel_with_scratch(int64_t count, int threads, double each, const Body& body) {
    const int used = threads_worth(count, threads, each);
    if (used > 1) return run_on_threads(count, used, each, run_indices<Body>, &body);
    run_indices<Body>(&body, 0, count, 0);
}

// Calls body(i) for i in [0, count), likewise.
template <class Body>
inline void parallel_for(int64_t count, int threads, double each, const Body& body) {
    parallel_with_scratch(count, threads, each, [&body](int64_t i, int) { body(i); });
}

}  // namespace pdd::PDD_BACKEND
