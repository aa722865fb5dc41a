// Threads of the CPU back end, defined once for all instruction sets in threads.cpp.
#pragma once

#include <atomic>
#include <cstdint>

namespace pdd {

// Runs indices [first, last) as thread `thread` of a region.
using Task = void (*)(const void* body, int64_t first, int64_t last, int thread);

// Runs all indices in [0, count) on the calling thread and at most `threads` - 1 others. It does
// not wait for threads that get no processor in time. A thread gets a number in [0, threads) and
// keeps it for the region. `each`: approximate nanoseconds per index.
void run_on_threads(int64_t count, int threads, double each, Task task, const void* body);

// Nanoseconds of work that make another thread worthwhile, about the time to call one that still
// spins. Of 1500, 4000 and 10000, the smallest value was the fastest on idle processors: 21, 23 and
// 25 ms for 20 images of 8x8 at width 32. The tests set 0, so that every region is shared by as
// many threads as requested.
extern std::atomic<double> worth_a_thread;

}  // namespace pdd
