// The threads of the CPU back end. Defined once for all instruction sets, in threads.cpp.
#pragma once

#include <atomic>
#include <cstdint>

namespace pdd {

// Runs indices [first, last) as thread `thread` of a region.
using Task = void (*)(const void* body, int64_t first, int64_t last, int thread);

// Runs all indices in [0, count) on the calling thread and at most `threads` - 1 others, of which
// those that are not on a processor in time are not waited for. A thread gets a number in [0,
// threads), and keeps it for the region. `each`: nanoseconds that an index takes, roughly.
void run_on_threads(int64_t count, int threads, double each, Task task, const void* body);

// A thread more has to do so many nanoseconds of work: what calling one that still spins takes. Of
// 1500, 4000 and 10000 the least was the fastest (20 images of 8x8, width 32: 21, 23 and 25 ms), on
// processors that nobody else used. The tests set 0: every region is shared, with as many threads
// as are asked for.
extern std::atomic<double> worth_a_thread;

}  // namespace pdd
