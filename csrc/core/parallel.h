// A parallel loop for the CPU back end.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace pdd::PDD_BACKEND {

// Calls body(i) for i in [0, count), split in contiguous ranges. Which thread runs an index never changes
// what is computed for it, so results do not depend on the number of threads.
template <class Body>
inline void parallel_for(int64_t count, int threads, const Body& body) {
    if (count > 1 && threads > 1) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t i = 0; i < count; ++i) body(i);
    } else {
        for (int64_t i = 0; i < count; ++i) body(i);
    }
}

}  // namespace pdd::PDD_BACKEND
