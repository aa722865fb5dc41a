// Four elements as a value: the channels of a pixel, or neighbors in memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/macros.h"

namespace pdd::PDD_BACKEND {

template <class T>
struct FourOf {
    typedef T type __attribute__((vector_size(4 * sizeof(T))));
    typedef T unaligned __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> indices
        __attribute__((vector_size(4 * sizeof(T))));
};
template <class T>
using Four = typename FourOf<T>::type;

template <class T>
Four<T> load_four(const T* from) {
    return *reinterpret_cast<const typename FourOf<T>::unaligned*>(from);
}
template <class T>
void store_four(T* to, Four<T> four) {
    *reinterpret_cast<typename FourOf<T>::unaligned*>(to) = four;
}

#if defined(__clang__)
#define PDD_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PDD_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, typename FourOf<T>::indices{__VA_ARGS__})
#endif

// Takes eight shuffles; element by element it would take twelve.
template <class T>
void transpose(Four<T> (&v)[4]) {
    const Four<T> low01 = PDD_SHUFFLE(T, v[0], v[1], 0, 4, 1, 5),
                  high01 = PDD_SHUFFLE(T, v[0], v[1], 2, 6, 3, 7);
    const Four<T> low23 = PDD_SHUFFLE(T, v[2], v[3], 0, 4, 1, 5),
                  high23 = PDD_SHUFFLE(T, v[2], v[3], 2, 6, 3, 7);
    v[0] = PDD_SHUFFLE(T, low01, low23, 0, 1, 4, 5),
    v[1] = PDD_SHUFFLE(T, low01, low23, 2, 3, 6, 7);
    v[2] = PDD_SHUFFLE(T, high01, high23, 0, 1, 4, 5),
    v[3] = PDD_SHUFFLE(T, high01, high23, 2, 3, 6, 7);
}

#undef PDD_SHUFFLE

}  // namespace pdd::PDD_BACKEND
