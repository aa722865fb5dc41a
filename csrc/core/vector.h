// One register of elements as a value, by the compiler's vector extension. The formulas in
// ops/<op>/math.h take it in place of a scalar, so a CPU kernel is vectorized as written and not
// only where the optimizer can prove that it may be.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace pdd::PDD_BACKEND {

// Width of the instruction set's registers. The compiler splits wider vectors through memory, which
// is 3 to 5 times slower (measured with gcc 12 at 64 bytes on AVX2). The tests set 64 nevertheless,
// to run AVX-512's code on machines without it.
#if defined(PDD_VECTOR_BYTES)
#elif defined(__AVX512F__)
#define PDD_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PDD_VECTOR_BYTES 32
#else
#define PDD_VECTOR_BYTES 16
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(PDD_VECTOR_BYTES)));
    typedef float unaligned __attribute__((vector_size(PDD_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(PDD_VECTOR_BYTES)));
    typedef double unaligned __attribute__((vector_size(PDD_VECTOR_BYTES), aligned(8), may_alias));
};

template <class T>
using Vector = typename VectorOf<T>::type;

// Number of elements in a pack: a vector's lanes, or 1 for a scalar, with which the same code
// handles the tail.
template <class T, class Pack>
constexpr int kLanes = sizeof(Pack) / sizeof(T);

template <class Pack>
struct Memory;

template <>
struct Memory<float> {
    PDD_HD static float load(const float* p) { return *p; }
    PDD_HD static void store(float* p, float v) { *p = v; }
    PDD_HD static float sqrt(float v) { return std::sqrt(v); }
};
template <>
struct Memory<double> {
    PDD_HD static double load(const double* p) { return *p; }
    PDD_HD static void store(double* p, double v) { *p = v; }
    PDD_HD static double sqrt(double v) { return std::sqrt(v); }
};
template <>
struct Memory<Vector<float>> {
    PDD_HD static Vector<float> load(const float* p) {
        return *reinterpret_cast<const VectorOf<float>::unaligned*>(p);
    }
    PDD_HD static void store(float* p, Vector<float> v) {
        *reinterpret_cast<VectorOf<float>::unaligned*>(p) = v;
    }
    PDD_HD static Vector<float> sqrt(Vector<float> v) {
        for (int i = 0; i < kLanes<float, Vector<float>>; ++i) v[i] = std::sqrt(v[i]);
        return v;
    }
};
template <>
struct Memory<Vector<double>> {
    PDD_HD static Vector<double> load(const double* p) {
        return *reinterpret_cast<const VectorOf<double>::unaligned*>(p);
    }
    PDD_HD static void store(double* p, Vector<double> v) {
        *reinterpret_cast<VectorOf<double>::unaligned*>(p) = v;
    }
    PDD_HD static Vector<double> sqrt(Vector<double> v) {
        for (int i = 0; i < kLanes<double, Vector<double>>; ++i) v[i] = std::sqrt(v[i]);
        return v;
    }
};

}  // namespace pdd::PDD_BACKEND
