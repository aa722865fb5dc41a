// Parallel loops for the CPU back end. Which thread runs an index never changes what is computed
// for it, and there is one copy of a body for any number of threads (compiled twice,
// multiplications and additions may be joined in one copy and not in the other), so results do not
// depend on the number of threads.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/threads.h"

namespace pdd::PDD_BACKEND {

// Nanoseconds, roughly: of n multiply-adds in registers and of n numbers that are read or written
// with a little arithmetic (measured with AVX2: 44 float multiply-adds a nanosecond in large
// products, half of that in small ones).
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

// How many of `threads` threads `count` indices are worth that take `each` nanoseconds, roughly.
inline int threads_worth(int64_t count, int threads, double each) {
    const double work = each * static_cast<double>(count),
                 one = worth_a_thread.load(std::memory_order_relaxed);
    const int64_t most = count < threads ? count : threads;
    if (most < 2 || work < 2 * one) return 1;
    return static_cast<int>(work < one * static_cast<double>(most) ? work / one
                                                                   : static_cast<double>(most));
}

// Calls body(i, thread) for i in [0, count), thread in [0, threads), for bodies that work in
// scratch of their own. `each`: nanoseconds that an index takes, roughly. A region worth one thread
// touches no other, and costs nothing.
template <class Body>
inline void parallel_with_scratch(int64_t count, int threads, double each, const Body& body) {
    const int used = threads_worth(count, threads, each);
    if (used > 1) return run_on_threads(count, used, each, run_indices<Body>, &body);
    run_indices<Body>(&body, 0, count, 0);
}

// The same with body(i).
template <class Body>
inline void parallel_for(int64_t count, int threads, double each, const Body& body) {
    parallel_with_scratch(count, threads, each, [&body](int64_t i, int) { body(i); });
}

}  // namespace pdd::PDD_BACKEND
