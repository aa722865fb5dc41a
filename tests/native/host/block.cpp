// Runs the blocks of a launch; cuda_runtime.h says what is modeled.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "internal.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Bounds of the kernels' static shared memory (host_cuda.py); absent from a program without any.
extern "C" {
__attribute__((weak, visibility("hidden"))) extern volatile uint64_t __start_pdd_shared[],
    __stop_pdd_shared[];
}

namespace pdd_host {
namespace {

enum class State { ready, waits, left };

struct Thread {
    Fiber fiber;
    unsigned number;
    unsigned rank;  // its place in the order of running
    uint3 index;
    State state;
    // The primitive it waits for; value becomes its result.
    Primitive primitive;
    unsigned mask;
    uint64_t value;
    int source;
    const char* file;
    int line;
};

std::vector<std::unique_ptr<Thread>>
    threads;                // as many as the largest block so far; they start anew in every block
Thread* current = nullptr;  // or nullptr: the host
Fiber host;
unsigned count;  // of the block's threads
unsigned by_rank[kMostThreads];
uint64_t ready[kMostThreads / 64];       // bits by rank
unsigned at_warp[kMostThreads / kWarp];  // lanes that wait for a warp's primitive
unsigned at_barrier;
Kernel kernel;
const std::function<void()>* body;
std::unique_ptr<unsigned char[]> dynamic;
std::string failure;

void set_ready(Thread& thread) {
    thread.state = State::ready;
    ready[thread.rank / 64] |= uint64_t{1} << thread.rank % 64;
}

void set_idle(Thread& thread, State state) {
    thread.state = state;
    ready[thread.rank / 64] &= ~(uint64_t{1} << thread.rank % 64);
}

Thread* first_ready() {
    for (unsigned k = 0; k < (count + 63) / 64; ++k)
        if (ready[k])
            return threads[by_rank[k * 64 + static_cast<unsigned>(__builtin_ctzll(ready[k]))]]
                .get();
    return nullptr;
}

void go_on_with(Thread* to) {
    Thread* from = current;
    if (to == from) return;
    current = to;
    if (to) threadIdx = to->index;
    go(from ? from->fiber : host, to ? to->fiber : host);
}

void thread_main() {
    arrive();
    for (;;) {
        (*body)();
        set_idle(*current, State::left);
        go_on_with(first_ready());
    }
}

std::string text(uint3 at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) +
           ")";
}

// A template's instance has no other name at run time than its parameters.
std::string where() {
    const std::string signature = kernel.signature, before = "Parameters = ";
    const size_t from = signature.find(before) + before.size();
    return "block " + text(blockIdx) + " of the kernel of " +
           signature.substr(from, signature.find("};", from) + 1 - from);
}

std::string doing(const Thread& thread) {
    if (thread.state == State::left) return "out of the kernel";
    static const char* const names[] = {"__syncthreads", "a shuffle", "a vote", "__syncwarp"};
    char mask[32] = "";
    if (thread.primitive != Primitive::barrier)
        std::snprintf(mask, sizeof mask, " with mask 0x%08x", thread.mask);
    return std::string("at ") + names[static_cast<int>(thread.primitive)] + mask + " in " +
           thread.file + ":" + std::to_string(thread.line);
}

// Ends the launch from within a thread; the other threads' stacks are left as they are.
void fail(const std::string& what) {
    failure = "CUDA on the host: thread " + text(current->index) + " " + what + "; " + where();
    go_on_with(nullptr);
}

// Position of each thread, if none can continue.
std::string stuck() {
    std::map<std::string, std::vector<const Thread*>> groups;
    for (unsigned k = 0; k < count; ++k) groups[doing(*threads[k])].push_back(threads[k].get());
    std::string list;
    for (const auto& [what, group] : groups)
        list += (list.empty() ? "" : ", ") + std::to_string(group.size()) + " " + what + " (" +
                text(group[0]->index) + (group.size() > 1 ? " the first)" : ")");
    return "CUDA on the host: no thread of " + std::to_string(count) + " can go on: " + list +
           "; " + where();
}

void release_barrier() {
    const Thread& first = *threads[0];
    for (unsigned k = 0; k < count; ++k)
        if (threads[k]->line != first.line || std::strcmp(threads[k]->file, first.file)) return;
    at_barrier = 0;
    for (unsigned k = 0; k < count; ++k) set_ready(*threads[k]);
}

void release_warp(const Thread& last) {
    const unsigned warp = last.number / kWarp;
    if ((at_warp[warp] & last.mask) != last.mask) return;
    uint64_t values[kWarp], votes = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (!(last.mask >> lane & 1)) continue;
        const Thread& thread = *threads[warp * kWarp + lane];
        if (thread.primitive != last.primitive || thread.mask != last.mask) return;
        values[lane] = thread.value;
        votes |= uint64_t{thread.value != 0} << lane;
    }
    at_warp[warp] &= ~last.mask;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (!(last.mask >> lane & 1)) continue;
        Thread& thread = *threads[warp * kWarp + lane];
        thread.value = thread.primitive == Primitive::shuffle ? values[thread.source] : votes;
        set_ready(thread);
    }
}

// The gaps between variables, which AddressSanitizer guards, are written too.
__attribute__((no_sanitize("address"))) void spoil(size_t shared_bytes) {
    if (shared_bytes) std::memset(dynamic.get(), 0xff, shared_bytes);
    for (volatile uint64_t* word = __start_pdd_shared; word < __stop_pdd_shared; ++word)
        *word = ~uint64_t{0};
}

void run_block(size_t shared_bytes) {
    spoil(shared_bytes);
    std::fill(std::begin(ready), std::end(ready), 0);
    std::fill(std::begin(at_warp), std::end(at_warp), 0);
    at_barrier = 0;
    for (unsigned k = 0; k < count; ++k) set_ready(*threads[k]);
    go_on_with(first_ready());
    if (failure.empty()) {
        for (unsigned k = 0; k < count; ++k)
            if (threads[k]->state != State::left) failure = stuck();
        if (failure.empty()) return;
    }
    for (auto& thread : threads)
        static_cast<void>(thread.release());  // their frames may still be poisoned
    threads.clear();
    throw std::runtime_error(std::exchange(failure, ""));
}

// ---- a launch ----

void make_threads() {
    for (unsigned k = 0; k < count; ++k) {
        if (threads.size() == k) {
            threads.push_back(std::make_unique<Thread>());
            make_fiber(threads[k]->fiber, k, thread_main);
        }
        threads[k]->number = k;
        threads[k]->index = {k % blockDim.x, k / blockDim.x % blockDim.y,
                             k / blockDim.x / blockDim.y};
    }
}

// One permutation of the warps and one of each warp's lanes.
void shuffle(std::mt19937& randomness) {
    const auto permutation = [&](unsigned size) {
        std::vector<unsigned> numbers(size);
        std::iota(numbers.begin(), numbers.end(), 0u);
        for (unsigned k = size; k > 1; --k) std::swap(numbers[k - 1], numbers[randomness() % k]);
        return numbers;
    };
    unsigned rank = 0;
    for (const unsigned warp : permutation((count + kWarp - 1) / kWarp))
        for (const unsigned lane : permutation(kWarp))
            if (warp * kWarp + lane < count) by_rank[rank++] = warp * kWarp + lane;
}

void rank_threads() {
    for (unsigned rank = 0; rank < count; ++rank) threads[by_rank[rank]]->rank = rank;
}

}  // namespace

cudaError_t launch(const Kernel& described, dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& thread) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    if (const cudaError_t error = refusal(described.address, grid, block, shared_bytes))
        return error;
    kernel = described, body = &thread, gridDim = grid, blockDim = block;
    count = block.x * block.y * block.z;
    make_threads();
    dynamic.reset(new unsigned char[shared_bytes]);
    const char* wanted = std::getenv("PDD_HOST_ORDER");
    const std::string order = wanted ? wanted : "forward";
    const bool seeded = order != "forward" && order != "backward";
    std::mt19937 randomness(seeded ? static_cast<unsigned>(std::stoul(order)) : 0);
    std::iota(by_rank, by_rank + count, 0u);
    if (order == "backward") std::reverse(by_rank, by_rank + count);
    rank_threads();
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                if (seeded) shuffle(randomness), rank_threads();
                run_block(shared_bytes);
            }
    return cudaSuccess;
}

uint64_t meet(Primitive primitive, unsigned mask, uint64_t value, int source, const char* file,
              int line) {
    Thread& self = *current;
    self.primitive = primitive, self.mask = mask, self.value = value, self.source = source;
    self.file = file, self.line = line;
    if (primitive != Primitive::barrier && !(mask >> self.number % kWarp & 1))
        fail("is not in the mask that it gives " + doing(self));
    if (primitive == Primitive::shuffle && !(mask >> source & 1))
        fail("reads lane " + std::to_string(source) + ", which is not in the mask, " + doing(self));
    set_idle(self, State::waits);
    if (primitive == Primitive::barrier) {
        if (++at_barrier == count) release_barrier();
    } else {
        at_warp[self.number / kWarp] |= 1u << self.number % kWarp;
        release_warp(self);
    }
    go_on_with(first_ready());
    return self.value;
}

int lane() {
    return static_cast<int>(current->number % kWarp);
}

unsigned char* dynamic_shared() {
    return dynamic.get();
}

}  // namespace pdd_host
