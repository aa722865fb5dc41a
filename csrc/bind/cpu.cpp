// Selects once the widest instruction set that this build and this CPU have, and forwards every
// operator to it.
#include <cstdlib>
#include <cstring>

#include "bind/backend.h"
#include "bind/status.h"

// Declares the operators of one back end namespace.
#define PDD_DECLARE_ALL(space)                                      \
    namespace pdd::space {                                          \
    PDD_OPERATORS(PDD_DECLARE)                                      \
    PDD_CPU_OPERATORS(PDD_DECLARE)                                  \
    ConvNetSizes convnet_sizes(ConvNetShape, int, bool, bool, int); \
    }

PDD_DECLARE_ALL(cpu_baseline)
#ifdef PDD_X86
PDD_DECLARE_ALL(cpu_avx2)
PDD_DECLARE_ALL(cpu_avx512)
#endif

namespace pdd::bind {
namespace {

enum class Level { baseline, avx2, avx512 };

Level detect() {
    Level level = Level::baseline;
#ifdef PDD_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2"))
        level = Level::avx2;
    if (level == Level::avx2 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        level = Level::avx512;
    // A lower level can be requested to compare results between machines, and by the tests.
    if (const char* wanted = std::getenv("PDD_FAST_CPU")) {
        if (!std::strcmp(wanted, "baseline")) level = Level::baseline;
        if (!std::strcmp(wanted, "avx2") && level > Level::avx2) level = Level::avx2;
    }
#endif
    return level;
}

Level level() {
    static const Level chosen = detect();
    return chosen;
}

const char* name(Level level) {
    return level == Level::avx512 ? "avx512" : level == Level::avx2 ? "avx2" : "baseline";
}

}  // namespace

#ifdef PDD_X86
#define PDD_FORWARD(function, Params)                           \
    template <class T>                                          \
    Status function(const Params<T>& params, Context context) { \
        switch (level()) {                                      \
            case Level::avx512:                                 \
                return cpu_avx512::function(params, context);   \
            case Level::avx2:                                   \
                return cpu_avx2::function(params, context);     \
            default:                                            \
                return cpu_baseline::function(params, context); \
        }                                                       \
    }                                                           \
    PDD_INSTANTIATE(function, Params)
#else
#define PDD_FORWARD(function, Params)                           \
    template <class T>                                          \
    Status function(const Params<T>& params, Context context) { \
        return cpu_baseline::function(params, context);         \
    }                                                           \
    PDD_INSTANTIATE(function, Params)
#endif

PDD_OPERATORS(PDD_FORWARD)
PDD_CPU_OPERATORS(PDD_FORWARD)

ConvNetSizes convnet_sizes(ConvNetShape shape, int convolution, bool dual, bool saved,
                           int threads) {
    // The sizes are the same at every level, because blocks of 16 channels are.
    return cpu_baseline::convnet_sizes(shape, convolution, dual, saved, threads);
}

int64_t dsa_scratch_images(DsaShape, int) {
    return 0;  // the kernel allocates it on the heap
}

std::string status_string(Status status) {
    return own_status_string(status);
}

std::map<std::string, std::string> capabilities() {
    return {{"instruction set", name(level())}};
}

}  // namespace pdd::bind
