// One register of numbers as a value, by the compiler's vector extension: the formulas in
// ops/<op>/math.h take it in place of a scalar, so a CPU kernel is vectorized by how it is written
// and not by what the optimizer can prove.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace pdd::PDD_BACKEND {

// The width that the instruction set has: wider vectors are split by the compiler with a detour
// through memory (3 to 5 times slower, measured with gcc 12 at 64 bytes on AVX2). The tests set 64
// all the same, to run AVX-512's code where there is none.
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

// How many numbers a pack holds: a vector's lanes, or 1 for a plain number, with which the same
// code does the tail.
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
