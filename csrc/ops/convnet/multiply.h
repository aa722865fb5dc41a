// The two matrix products that all convolutions here consist of. Each holds a tile of results in
// registers: kRows x 16 elements, 12 of AVX2's 16 registers (or of AVX-512's 32), which hides the
// latency of a multiply-add.
#pragma once

#include <cstdint>

#include "core/vector.h"
#include "ops/convnet/blocked.h"

namespace pdd::PDD_BACKEND {

// Rows of a tile: 12 accumulators. With AVX-512, a double fills two registers per row, of which
// there are 32.
template <class T>
constexpr int kRows = kVectors<T> >= 12 ? 1 : 12 / kVectors<T>;

// Position of the terms of a sum: `count` runs of `length` elements each, `stride` apart.
struct Runs {
    int64_t count, stride, length;
};

enum class Write { replace, add };

template <class T, int N>
struct Tile {
    using V = Vector<T>;
    static constexpr int lanes = kLanes<T, V>;
    V sum[N][kVectors<T>]{};

    inline __attribute__((always_inline)) void write(T* c, int64_t stride, Write how) const {
        using M = Memory<V>;
        for (int i = 0; i < N; ++i) {
            for (int j = 0; j < kVectors<T>; ++j) {
                T* at = c + i * stride + j * lanes;
                M::store(at, how == Write::add ? M::load(at) + sum[i][j] : sum[i][j]);
            }
        }
    }
};

// c[i][0..16) (+)= sum over the runs of a[i][k] * b[k][0..16) for N rows; b is contiguous over all
// runs.
template <class T, int N>
inline void multiply_rows(const T* const* a, const Runs& runs, const T* b, T* c, int64_t c_stride,
                          Write how) {
    using V = Vector<T>;
    using M = Memory<V>;
    Tile<T, N> tile;
    for (int64_t s = 0; s < runs.count; ++s) {
        const T* row[N];
        for (int i = 0; i < N; ++i) row[i] = a[i] + s * runs.stride;
        for (int64_t k = 0; k < runs.length; ++k, b += kBlock) {
            V right[kVectors<T>];
            for (int j = 0; j < kVectors<T>; ++j) right[j] = M::load(b + j * tile.lanes);
            for (int i = 0; i < N; ++i)
                for (int j = 0; j < kVectors<T>; ++j) tile.sum[i][j] += row[i][k] * right[j];
        }
    }
    tile.write(c, c_stride, how);
}

template <class T, int N = kRows<T>>
inline void multiply_some_rows(int64_t rows, const T* const* a, const Runs& runs, const T* b, T* c,
                               int64_t c_stride, Write how) {
    if constexpr (N > 1) {
        if (rows < N) return multiply_some_rows<T, N - 1>(rows, a, runs, b, c, c_stride, how);
    }
    multiply_rows<T, N>(a, runs, b, c, c_stride, how);
}

// Start of rows: the first at `first`, the others `pixel` apart, with a distance of `row` between
// groups of `width`.
template <class T>
struct Grid {
    const T* first;
    int64_t width, pixel, row;
};

// Rows [0, count) of the grid.
template <class T>
inline void multiply_all_rows(int64_t count, const Grid<T>& grid, const Runs& runs, const T* b,
                              T* c, int64_t c_stride, Write how) {
    const T* line = grid.first;
    int64_t column = 0;
    for (int64_t done = 0; done < count; done += kRows<T>) {
        const int64_t rows = count - done < kRows<T> ? count - done : kRows<T>;
        const T* a[kRows<T>] = {};
        for (int64_t i = 0; i < rows; ++i) {
            a[i] = line + column * grid.pixel;
            if (++column == grid.width) column = 0, line += grid.row;
        }
        multiply_some_rows<T>(rows, a, runs, b, c + done * c_stride, c_stride, how);
    }
}

// Two images that a sum runs over: `rows` rows of `length` pixels.
template <class T>
struct Pixels {
    const T *a, *b;  // first pixels
    int64_t rows, length;
    int64_t a_pixel, a_row;  // distances in a; pixels of b are 16 apart,
    int64_t b_row;           // its rows by b_row
};

// c[i][0..16) += sum over the pixels t of a[t][offset[i]] * b[t][0..16) for N terms.
template <class T, int N>
inline void multiply_pixels(const Pixels<T>& p, const int64_t* offset, T* c) {
    using V = Vector<T>;
    using M = Memory<V>;
    Tile<T, N> tile;
    int64_t at[N];
    for (int i = 0; i < N; ++i) at[i] = offset[i];
    for (int64_t h = 0; h < p.rows; ++h) {
        const T *a = p.a + h * p.a_row, *b = p.b + h * p.b_row;
        for (int64_t w = 0; w < p.length; ++w, a += p.a_pixel, b += kBlock) {
            V right[kVectors<T>];
            for (int j = 0; j < kVectors<T>; ++j) right[j] = M::load(b + j * tile.lanes);
            for (int i = 0; i < N; ++i)
                for (int j = 0; j < kVectors<T>; ++j) tile.sum[i][j] += a[at[i]] * right[j];
        }
    }
    tile.write(c, kBlock, Write::add);
}

template <class T, int N = kRows<T>>
inline void multiply_some_pixels(int64_t terms, const Pixels<T>& p, const int64_t* offset, T* c) {
    if constexpr (N > 1) {
        if (terms < N) return multiply_some_pixels<T, N - 1>(terms, p, offset, c);
    }
    multiply_pixels<T, N>(p, offset, c);
}

// All `count` terms, term i at offset(i): c[i][0..16) += ...
template <class T, class Offset>
inline void multiply_all_pixels(int64_t count, const Offset& offset, const Pixels<T>& p, T* c) {
    for (int64_t first = 0; first < count; first += kRows<T>) {
        const int64_t terms = count - first < kRows<T> ? count - first : kRows<T>;
        int64_t at[kRows<T>] = {};
        for (int64_t i = 0; i < terms; ++i) at[i] = offset(first + i);
        multiply_some_pixels<T>(terms, p, at, c + first * kBlock);
    }
}

}  // namespace pdd::PDD_BACKEND
