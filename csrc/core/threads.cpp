// Pool of threads whose regions end when their work is done, not when every thread has arrived.
// With OpenMP, whose threads all meet at the end, two processes on two cores took 4 to 58 times as
// long as one: each spun and waited for threads that the other's spinning kept from their cores.
//
// A region's indices are split into one contiguous range per thread, as in a static schedule. A
// thread takes its range chunk by chunk, and then the rest of the others' ranges. A thread without
// a core leaves its range to the others, and one that loses its core delays the region by at most
// one chunk.
#include "core/threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#define PDD_POSIX
#endif

namespace pdd {
namespace {

// How long an idle thread spins before it sleeps: the regions of a pass are a few microseconds
// apart, its calls from Python tens. kEndSpin: how long the calling thread spins for the last
// chunks.
constexpr std::chrono::microseconds kIdleSpin{200}, kEndSpin{50};
constexpr int kChunks = 16;           // maximum per thread's range
constexpr double kLeastChunk = 5000;  // minimum nanoseconds per chunk, if a range has as many
constexpr int kMostThreads = 256;     // maximum per region

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until condition(), at most for `limit`.
template <class Condition>
bool spin(std::chrono::microseconds limit, const Condition& condition) {
    const auto end = std::chrono::steady_clock::now() + limit;
    do {
        for (int i = 0; i < 32; ++i) {
            if (condition()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return condition();
}

// ---- processors that a thread may run on ----

#ifdef __linux__
struct Processors {
    cpu_set_t set;
    bool known;

    bool operator==(const Processors& other) const {
        return known == other.known && CPU_EQUAL(&set, &other.set);
    }

    // OpenMP's places, if threads are bound to them (OMP_PROC_BIND): the calling thread has one
    // place, the process all of them. The OpenMP library that torch has loaded is asked.
    static Processors of_places() {
        Processors found{};
        const auto places = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_num_places"));
        const auto count =
            reinterpret_cast<int (*)(int)>(dlsym(RTLD_DEFAULT, "omp_get_place_num_procs"));
        const auto ids =
            reinterpret_cast<void (*)(int, int*)>(dlsym(RTLD_DEFAULT, "omp_get_place_proc_ids"));
        if (!places || !count || !ids) return found;
        for (int place = 0; place < places(); ++place) {
            std::vector<int> each(static_cast<size_t>(count(place)));
            ids(place, each.data());
            for (const int id : each)
                if (id >= 0 && id < CPU_SETSIZE)
                    CPU_SET(static_cast<size_t>(id), &found.set), found.known = true;
        }
        return found;
    }

    static Processors of_caller() {
        static const Processors bound = of_places();
        if (bound.known) return bound;
        // Asked every 10 ms and not in every region, because it takes half a microsecond in a
        // virtual machine.
        static thread_local Processors found{};
        static thread_local std::chrono::steady_clock::time_point until{};
        const auto now = std::chrono::steady_clock::now();
        if (now >= until) {
            // Fails beyond 1024 processors.
            found.known = sched_getaffinity(0, sizeof(found.set), &found.set) == 0;
            until = now + std::chrono::milliseconds(10);
        }
        return found;
    }

    int count(int otherwise) const { return known ? CPU_COUNT(&set) : otherwise; }
    void move_here() const {
        if (known) sched_setaffinity(0, sizeof(set), &set);
    }
};
#else
struct Processors {
    bool operator==(const Processors&) const { return true; }
    static Processors of_caller() { return {}; }
    int count(int otherwise) const { return otherwise; }
    void move_here() const {}
};
#endif

// ---- a region ----

struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
};

struct Region {
    Region(int64_t count, int threads, double each, Task task, const void* body,
           const Processors& processors)
        : task(task),
          body(body),
          threads(threads),
          chunk(std::max({int64_t{1}, (count / threads + kChunks - 1) / kChunks,
                          std::min(static_cast<int64_t>(kLeastChunk / each), count / threads)})),
          processors(processors) {
        for (int64_t t = 0; t < threads; ++t) {
            ranges[t].next.store(count * t / threads, std::memory_order_relaxed);
            ranges[t].end = count * (t + 1) / threads;
        }
    }

    void work(int thread) {
        for (int i = 0; i < threads; ++i) {
            Range& range = ranges[(thread + i) % threads];
            while (range.next.load(std::memory_order_relaxed) < range.end) {
                const int64_t first = range.next.fetch_add(chunk, std::memory_order_relaxed);
                if (first < range.end)
                    task(body, first, std::min(first + chunk, range.end), thread);
            }
        }
    }

    const Task task;
    const void* const body;
    const int threads;
    const int64_t chunk;
    const Processors processors;
    Range ranges[kMostThreads];
};

// ---- the pool ----

// A thread and its mailbox. The mailbox holds nullptr, the region that the thread is called to, or,
// with the lowest bit set, the region that it works in. The caller takes the call back at the end
// of the region, or waits until the thread has left it. A thread that is called or at work is not
// available to other callers.
class alignas(64) Helper {
  public:
    explicit Helper(int id) : id_(id) {}

    bool call(const Region& region) {
        uintptr_t nothing = 0;
        if (!mail_.compare_exchange_strong(nothing, address(region))) return false;
        if (sleeps_.load()) {
            {
                const std::lock_guard<std::mutex> lock(mutex_);
            }
            wake_.notify_one();
        }
        return true;
    }

    // Afterwards, the thread is not in the region and will not enter it.
    void dismiss(const Region& region) {
        uintptr_t called = address(region);
        if (mail_.compare_exchange_strong(called, 0)) return;
        const auto left = [&] { return mail_.load() != (address(region) | 1); };
        if (spin(kEndSpin, left)) return;
        callers_.fetch_add(1);
        {
            std::unique_lock<std::mutex> lock(mutex_);
            left_.wait(lock, left);
        }
        callers_.fetch_sub(1);
    }

    [[noreturn]] void live() {
#ifdef __linux__
        pthread_setname_np(pthread_self(), "pdd-fast");
#endif
        Processors processors{};
        const auto called = [&] { return mail_.load() != 0; };
        for (;;) {
            if (!spin(kIdleSpin, called)) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeps_.store(true);
                wake_.wait(lock, called);
                sleeps_.store(false);
            }
            uintptr_t mail = mail_.load();
            if (mail == 0 || !mail_.compare_exchange_strong(mail, mail | 1)) continue;
            Region& region = *reinterpret_cast<Region*>(mail);
            if (!(processors == region.processors)) {
                processors = region.processors;
                processors.move_here();
            }
            region.work(id_ + 1);
            mail_.store(0);
            if (callers_.load() > 0) {
                {
                    const std::lock_guard<std::mutex> lock(mutex_);
                }
                left_.notify_all();
            }
        }
    }

  private:
    static uintptr_t address(const Region& region) { return reinterpret_cast<uintptr_t>(&region); }

    const int id_;
    std::atomic<uintptr_t> mail_{0};
    std::atomic<bool> sleeps_{false};
    std::atomic<int> callers_{0};  // callers that sleep until the thread has left their region
    std::mutex mutex_;
    std::condition_variable wake_, left_;
};

class Pool {
  public:
    static Pool& get();

    void run(Region& region) {
        const int helpers = have(region.threads - 1);
        bool called[kMostThreads];
        for (int i = 0; i < helpers; ++i) called[i] = helpers_[i].load()->call(region);
        region.work(0);
        for (int i = 0; i < helpers; ++i)
            if (called[i]) helpers_[i].load()->dismiss(region);
    }

  private:
    // Returns how many of `wanted` helpers exist, after starting the missing ones.
    int have(int wanted) {
        if (started_.load() < wanted) start(wanted);
        return std::min(wanted, started_.load());
    }

    void start(int wanted) {
        const std::lock_guard<std::mutex> lock(starting_);
#ifdef PDD_POSIX
        // Signals are for threads that run Python.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
        while (started_.load() < wanted) {
            auto* const helper = new Helper(started_.load());
            try {
                std::thread([helper] { helper->live(); }).detach();
            } catch (const std::system_error&) {  // the process has no more threads: the others do
                                                  // the work
                delete helper;
                break;
            }
            helpers_[started_.load()].store(helper);
            started_.fetch_add(1);
        }
#ifdef PDD_POSIX
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
    }

    std::mutex starting_;
    std::atomic<int> started_{0};
    std::atomic<Helper*> helpers_[kMostThreads] = {};
};

// Never deleted: its threads run until the process ends. A child process has none of them and makes
// a new pool.
std::atomic<Pool*> current_pool{nullptr};

#ifdef PDD_POSIX
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });
#endif

Pool& Pool::get() {
    Pool* pool = current_pool.load();
    if (pool) return *pool;
    auto* const made = new Pool;
    if (current_pool.compare_exchange_strong(pool, made)) return *made;
    delete made;  // another thread was first
    return *pool;
}

}  // namespace

std::atomic<double> worth_a_thread{2000};

void run_on_threads(int64_t count, int threads, double each, Task task, const void* body) {
    const Processors processors = Processors::of_caller();
    const bool limited = worth_a_thread.load(std::memory_order_relaxed) > 0;
    threads = std::min({threads, kMostThreads, limited ? processors.count(threads) : threads});
    if (threads < 2) return task(body, 0, count, 0);
    Region region(count, threads, each, task, body, processors);
    Pool::get().run(region);
}

}  // namespace pdd
