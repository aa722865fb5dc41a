// Parallel loops for the CPU back end. Which thread runs an index never changes what is computed for it, and there is
// one copy of a body for any number of threads (compiled twice, multiplications and additions may be joined in one copy
// and not in the other), so results do not depend on the number of threads.
#pragma once

#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "core/macros.h"

namespace pdd::PDD_BACKEND {

// Calls body(i) for i in [0, count), split in contiguous ranges.
template <class Body>
inline void parallel_for(int64_t count, [[maybe_unused]] int threads, const Body& body) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 1 && threads > 1)
    for (int64_t i = 0; i < count; ++i) body(i);
}

// The same with body(i, thread), thread in [0, threads), for bodies that work in scratch of their own.
template <class Body>
inline void parallel_with_scratch(int64_t count, [[maybe_unused]] int threads, const Body& body) {
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 1 && threads > 1)
    for (int64_t i = 0; i < count; ++i) body(i, omp_get_thread_num());
#else
    for (int64_t i = 0; i < count; ++i) body(i, 0);
#endif
}

}  // namespace pdd::PDD_BACKEND
