// Winograd's F(4x4, 3x3) (Lavin and Gray 2016): a tile of 4x4 results from 6x6 inputs takes 36
// multiplications per pair of channels instead of 144. With x transformed to V = Bt x B, a filter
// to U = G w Gt and a result's gradient to W = A g At, a convolution and its adjoints are products
// per element of the 6x6:
//
//   z = At (V U) A        dx = B (W Ut) Bt, overlapping tiles added        dw = Gt (Vt W) G
//
// One transform of x therefore serves w*x, its tangent and the weight gradients, and one of dz
// serves both adjoints.
//
// Polynomials are evaluated at 0, 5/8, -5/8, 3/2, -3/2 and infinity. The textbook's 1 and 2 instead
// of 5/8 and 3/2 double the error (128 channels, float32: 1.7e-6 against 0.9e-6; direct: 0.2e-6).
// All constants except those of G are exact in binary.
//
// Every function is one dimension of a transform, on vectors of channels.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace pdd::PDD_BACKEND::winograd {

constexpr int kTile = 4;     // results of a tile, along a side
constexpr int kSide = 6;     // inputs of a tile, along a side
constexpr int kPoints = 36;  // kSide^2: elements of a transformed tile
constexpr double kA = 0.625, kB = 1.5;
constexpr double kAA = kA * kA, kBB = kB * kB, kAABB = kAA * kBB, kSum = kAA + kBB;
constexpr double kG0 = 1 / kAABB;
constexpr double kGa = 1 / (2 * kAA * (kAA - kBB)), kGb = 1 / (2 * kBB * (kBB - kAA));

// Tiles along a side.
inline int64_t tiles(int64_t side) {
    return (side + kTile - 1) / kTile;
}

// Bt: 6 inputs to 6 points.
template <class T, class V>
PDD_HD void input(const V d[6], V t[6]) {
    t[0] = T(kAABB) * d[0] - T(kSum) * d[2] + d[4];
    const V even_a = d[4] - T(kBB) * d[2], odd_a = T(kA) * (d[3] - T(kBB) * d[1]);
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    const V even_b = d[4] - T(kAA) * d[2], odd_b = T(kB) * (d[3] - T(kAA) * d[1]);
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = T(kAABB) * d[1] - T(kSum) * d[3] + d[5];
}

// B: the adjoint of `input`.
template <class T, class V>
PDD_HD void input_adjoint(const V t[6], V d[6]) {
    const V even_a = t[1] + t[2], odd_a = T(kA) * (t[1] - t[2]);
    const V even_b = t[3] + t[4], odd_b = T(kB) * (t[3] - t[4]);
    d[0] = T(kAABB) * t[0];
    d[1] = T(kAABB) * t[5] - T(kBB) * odd_a - T(kAA) * odd_b;
    d[2] = -T(kSum) * t[0] - T(kBB) * even_a - T(kAA) * even_b;
    d[3] = odd_a + odd_b - T(kSum) * t[5];
    d[4] = t[0] + even_a + even_b;
    d[5] = t[5];
}

// At: 6 points to 4 results.
template <class T, class V>
PDD_HD void output(const V m[6], V y[4]) {
    const V even_a = m[1] + m[2], odd_a = T(kA) * (m[1] - m[2]);
    const V even_b = m[3] + m[4], odd_b = T(kB) * (m[3] - m[4]);
    y[0] = m[0] + even_a + even_b;
    y[1] = odd_a + odd_b;
    y[2] = T(kAA) * even_a + T(kBB) * even_b;
    y[3] = T(kAA) * odd_a + T(kBB) * odd_b + m[5];
}

// A: the adjoint of `output`.
template <class T, class V>
PDD_HD void output_adjoint(const V g[4], V m[6]) {
    m[0] = g[0];
    const V even_a = g[0] + T(kAA) * g[2], odd_a = T(kA) * (g[1] + T(kAA) * g[3]);
    m[1] = even_a + odd_a;
    m[2] = even_a - odd_a;
    const V even_b = g[0] + T(kBB) * g[2], odd_b = T(kB) * (g[1] + T(kBB) * g[3]);
    m[3] = even_b + odd_b;
    m[4] = even_b - odd_b;
    m[5] = g[3];
}

// G: 3 weights to 6 points.
template <class T, class V>
PDD_HD void filter(const V w[3], V u[6]) {
    u[0] = T(kG0) * w[0];
    const V even_a = T(kGa) * (w[0] + T(kAA) * w[2]), odd_a = T(kGa * kA) * w[1];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    const V even_b = T(kGb) * (w[0] + T(kBB) * w[2]), odd_b = T(kGb * kB) * w[1];
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = w[2];
}

// Gt: the adjoint of `filter`.
template <class T, class V>
PDD_HD void filter_adjoint(const V u[6], V w[3]) {
    const V even_a = T(kGa) * (u[1] + u[2]), even_b = T(kGb) * (u[3] + u[4]);
    w[0] = T(kG0) * u[0] + even_a + even_b;
    w[1] = T(kGa * kA) * (u[1] - u[2]) + T(kGb * kB) * (u[3] - u[4]);
    w[2] = T(kAA) * even_a + T(kBB) * even_b + u[5];
}

}  // namespace pdd::PDD_BACKEND::winograd
