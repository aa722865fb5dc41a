// The threads of the CPU back end. Defined once for all instruction sets, in threads.cpp.
#pragma once

#include <atomic>
#include <cstdint>

namespace pdd {

// Runs indices [first, last) as thread `thread` of a region.
using Task = void (*)(const void* body, int64_t first, int64_t last, int thread);

// Runs all indices in [0, count) on the calling thread and at most `threads` - 1 others, of which those that are not on
// a processor in time are not waited for. A thread gets a number in [0, threads), and keeps it for the region.
void run_on_threads(int64_t count, int threads, Task task, const void* body);

// A thread more has to save so many nanoseconds of work: more than waking it takes, 2 microseconds where it still
// spins, up to 50 where it sleeps. The tests set 0: every region is shared, with as many threads as are asked for.
extern std::atomic<double> worth_a_thread;

}  // namespace pdd
