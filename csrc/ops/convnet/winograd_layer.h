// A convolution between blocks of the network by Winograd's F(4x4, 3x3), a few images at a time.
//
// Its data are [36 points][blocks][tiles][16 channels]: the tiles of one point are the rows of a
// matrix product with that point's weights [blocks out][channels in][16], and every access reads
// whole cache lines.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/parallel.h"
#include "ops/convnet/geometry.h"
#include "ops/convnet/multiply.h"
#include "ops/convnet/winograd.h"

namespace pdd::PDD_BACKEND {

template <class T>
class WinogradLayer {
    using V = Vector<T>;
    using M = Memory<V>;
    static constexpr int kLane = kLanes<T, V>, kV = kVectors<T>;

  public:
    WinogradLayer(const LayerShape& shape, Needs needs, Arena<T>& arena)
        : s_(shape),
          across_(winograd::tiles(shape.width)),
          each_(winograd::tiles(shape.height) * across_) {
        images_ = std::max<int64_t>(1, std::min(s_.batch, kTilesAtOnce / each_));
        const int64_t tiles = images_ * each_;
        for (int k = 0; k < needs.numbers; ++k) {
            inputs_[k] = Points(arena, s_.in_blocks, tiles);
            if (needs.backward) {
                grads_[k] = Points(arena, s_.out_blocks, tiles);
                input_grads_[k] = Points(arena, s_.in_blocks, tiles);
                transposed_[k] = Points(arena, s_.in_blocks, s_.out_blocks * kBlock);
            } else {
                outputs_[k] = Points(arena, s_.out_blocks, tiles);
                weights_[k] = Points(arena, s_.out_blocks, s_.in_blocks * kBlock);
            }
        }
        if (needs.backward) weight_grad_ = Points(arena, s_.out_blocks, s_.in_blocks * kBlock);
    }

    int64_t images_at_once() const { return images_; }
    // Elements of a thread's scratch memory.
    static int64_t scratch(const LayerShape& s) {
        return (winograd::kSide * padded(s.width) + 2 * s.width) * kBlock;
    }

    // ---- weights ----

    // Transforms weights w [C, C_in, 3, 3] (k = 0) or their tangents (1). `transposed`: for the
    // adjoint in the input.
    void set_weights(int k, const T* w, bool transposed, int threads) const {
        const Points& to = transposed ? transposed_[k] : weights_[k];
        const int64_t columns = transposed ? s_.in_channels : s_.out_channels;
        const int64_t rows = transposed ? s_.out_channels : s_.in_channels;
        const double each = move_time<T>((9 + winograd::kPoints) * kBlock * kBlock);
        parallel_for(to.blocks * (to.rows / kBlock), threads, each, [&](int64_t i) {
            const int64_t block = i / (to.rows / kBlock), first = i % (to.rows / kBlock) * kBlock;
            for (int64_t row = first; row < first + kBlock; ++row) {
                T filters[9][kBlock] = {};
                for (int64_t c = 0; c < kBlock && row < rows && block * kBlock + c < columns; ++c) {
                    const int64_t column = block * kBlock + c;
                    const T* from =
                        w + 9 * (transposed ? row * columns + column : column * rows + row);
                    for (int tap = 0; tap < 9; ++tap) filters[tap][c] = from[tap];
                }
                for (int j = 0; j < kV; ++j)
                    transform_filter(filters, j, to.at(0, block, row) + j * kLane, to.point);
            }
        });
    }

    void clear_weight_grad(int threads) const {
        const double each = move_time<T>(weight_grad_.blocks * weight_grad_.rows * kBlock) / 4;
        parallel_for(winograd::kPoints, threads, each, [&](int64_t point) {
            std::fill_n(weight_grad_.at(point, 0, 0),
                        weight_grad_.blocks * weight_grad_.rows * kBlock, T(0));
        });
    }

    // Writes the sum of all weight gradients since clear_weight_grad to dw [C, C_in, 3, 3].
    void weight_grad(T* dw, int threads) const {
        const Points& from = weight_grad_;
        parallel_for(s_.out_blocks * s_.in_channels, threads,
                     move_time<T>((9 + winograd::kPoints) * kBlock), [&](int64_t i) {
                         const int64_t block = i / s_.in_channels, row = i % s_.in_channels;
                         T filters[9][kBlock];
                         for (int j = 0; j < kV; ++j)
                             transform_filter_grad(from.at(0, block, row) + j * kLane, from.point,
                                                   filters, j);
                         for (int64_t c = 0; c < kBlock && block * kBlock + c < s_.out_channels;
                              ++c)
                             for (int tap = 0; tap < 9; ++tap)
                                 dw[9 * ((block * kBlock + c) * s_.in_channels + row) + tap] =
                                     filters[tap][c];
                     });
    }

    // ---- a chunk of images: inputs ----

    // `image` counts from the chunk's first. Planes are [H, W, 16].
    void set_input(int k, int64_t image, int64_t block, const T* plane, T* scratch) const {
        const Scratch own(s_, scratch);
        own.clear_borders();
        for (int64_t ty = 0; ty < winograd::tiles(s_.height); ++ty) {
            const T* in[6];
            for (int64_t r = 0; r < 6; ++r)
                in[r] = row_of(plane, ty * winograd::kTile - 1 + r, own.zeros);
            T* out[6];
            for (int64_t r = 0; r < 6; ++r) out[r] = own.rows + r * own.wide + kBlock;
            down<6, 6>(in, out, 0, [](const V* d, V* t) { winograd::input<T>(d, t); });
            spread<6>(own, inputs_[k], block, image, ty,
                      [](const V* d, V* t) { winograd::input<T>(d, t); });
        }
    }

    void set_grad(int k, int64_t image, int64_t block, const T* plane, T* scratch) const {
        const Scratch own(s_, scratch);
        own.clear_borders();
        for (int64_t ty = 0; ty < winograd::tiles(s_.height); ++ty) {
            const T* in[4];
            for (int64_t r = 0; r < 4; ++r)
                in[r] = row_of(plane, ty * winograd::kTile + r, own.zeros);
            T* out[6];
            for (int64_t r = 0; r < 6; ++r) out[r] = own.rows + r * own.wide;
            down<4, 6>(in, out, 0, [](const V* g, V* m) { winograd::output_adjoint<T>(g, m); });
            spread<4>(own, grads_[k], block, image, ty,
                      [](const V* g, V* m) { winograd::output_adjoint<T>(g, m); });
        }
    }

    // ---- products: tasks in any order and on any thread ----

    int64_t forward_tasks(int64_t) const { return winograd::kPoints * s_.out_blocks; }
    int64_t input_grad_tasks(int64_t) const { return winograd::kPoints * s_.in_blocks; }
    int64_t weight_grad_tasks(int64_t) const { return winograd::kPoints * s_.out_blocks; }

    // Computes w*x, or with `tangent` w*x_tangent + w_tangent*x, of the chunk's first `count`
    // images; the following functions likewise.
    void forward(int64_t task, int64_t count, bool tangent) const {
        const int64_t point = task / s_.out_blocks, block = task % s_.out_blocks;
        if (!tangent)
            return product(inputs_[0], weights_[0], outputs_[0], point, block, count,
                           Write::replace);
        product(inputs_[0], weights_[1], outputs_[1], point, block, count, Write::replace);
        product(inputs_[1], weights_[0], outputs_[1], point, block, count, Write::add);
    }

    void input_grad(int64_t task, int64_t count, bool tangent) const {
        const int64_t point = task / s_.in_blocks, block = task % s_.in_blocks;
        if (!tangent)
            return product(grads_[0], transposed_[0], input_grads_[0], point, block, count,
                           Write::replace);
        product(grads_[1], transposed_[0], input_grads_[1], point, block, count, Write::replace);
        product(grads_[0], transposed_[1], input_grads_[1], point, block, count, Write::add);
    }

    // Adds x dz, or with `tangent` x dz_tangent + x_tangent dz.
    void add_weight_grad(int64_t task, int64_t count, bool tangent) const {
        const int64_t point = task / s_.out_blocks, block = task % s_.out_blocks;
        if (!tangent) return outer_product(inputs_[0], grads_[0], point, block, count);
        outer_product(inputs_[0], grads_[1], point, block, count);
        outer_product(inputs_[1], grads_[0], point, block, count);
    }

    // Nanoseconds of a task on values, and of the input or output of a plane.
    double forward_time(int64_t count) const {
        return multiply_time<T>(count * each_ * s_.in_blocks * kBlock * kBlock);
    }
    double input_grad_time(int64_t count) const {
        return multiply_time<T>(count * each_ * s_.out_blocks * kBlock * kBlock);
    }
    double weight_grad_time(int64_t count) const { return forward_time(count); }
    double plane_time() const { return move_time<T>(2 * winograd::kPoints * each_ * kBlock); }

    // ---- outputs ----

    void get_output(int k, int64_t image, int64_t block, T* plane, T* scratch) const {
        const Scratch own(s_, scratch);
        for (int64_t ty = 0; ty < winograd::tiles(s_.height); ++ty) {
            collect<4>(own, outputs_[k], block, image, ty,
                       [](const V* m, V* y) { winograd::output<T>(m, y); });
            const T* in[6];
            for (int64_t r = 0; r < 6; ++r) in[r] = own.rows + r * own.wide;
            T* out[4];
            for (int64_t r = 0; r < 4; ++r)
                out[r] = row_of(plane, ty * winograd::kTile + r, own.unused);
            down<6, 4>(in, out, 0, [](const V* m, V* y) { winograd::output<T>(m, y); });
        }
    }

    void get_input_grad(int k, int64_t image, int64_t block, T* plane, T* scratch) const {
        const Scratch own(s_, scratch);
        for (int64_t ty = 0; ty < winograd::tiles(s_.height); ++ty) {
            collect<6>(own, input_grads_[k], block, image, ty,
                       [](const V* t, V* d) { winograd::input_adjoint<T>(t, d); });
            const T* in[6];
            for (int64_t r = 0; r < 6; ++r) in[r] = own.rows + r * own.wide + kBlock;
            T* out[6];
            for (int64_t r = 0; r < 6; ++r)
                out[r] = row_of(plane, ty * winograd::kTile - 1 + r, own.unused);
            // The first two rows are the last two of the tiles above.
            down<6, 6>(in, out, ty == 0 ? 0 : 2,
                       [](const V* t, V* d) { winograd::input_adjoint<T>(t, d); });
        }
    }

  private:
    // 36 points of 64 tiles of 128 floats are 1.2 MB. A product uses 32 KB of inputs and 64 KB of
    // weights of them at a time, which stay in the second-level cache. 16 to 96 tiles are equally
    // fast, 192 are a tenth slower.
    static constexpr int64_t kTilesAtOnce = 64;

    static int64_t padded(int64_t side) { return winograd::tiles(side) * winograd::kTile + 2; }

    struct Points {
        Points() = default;
        Points(Arena<T>& arena, int64_t blocks, int64_t rows)
            // Lines of different points that are written together must not all map to one cache
            // set.
            : blocks(blocks),
              rows(rows),
              point((blocks * rows | 1) * kBlock),
              data(arena.take(winograd::kPoints * point)) {}

        int64_t blocks = 0, rows = 0, point = 0;  // point: elements from one point to the next
        T* data = nullptr;

        T* at(int64_t p, int64_t block, int64_t row) const {
            return data + p * point + (block * rows + row) * kBlock;
        }
    };

    // A row of tiles, transformed along one side: 6 rows of elements `wide` apart, with a column at
    // the left and at least one at the right for the outside, and two rows that stand for all rows
    // outside of the plane.
    struct Scratch {
        Scratch(const LayerShape& s, T* memory)
            : rows(memory),
              wide(padded(s.width) * kBlock),
              width(s.width * kBlock),
              zeros(memory + winograd::kSide * wide),
              unused(zeros + width) {}

        void clear_borders() const {
            for (int r = 0; r < winograd::kSide; ++r) {
                std::fill_n(rows + r * wide, kBlock, T(0));
                // Gradients begin in the first column. For them, the plane's last column is cleared
                // here and set again.
                std::fill_n(rows + r * wide + width, wide - width, T(0));
            }
            std::fill_n(zeros, width, T(0));
        }

        T* rows;
        int64_t wide, width;
        T *zeros, *unused;
    };

    template <class Pointer>
    Pointer row_of(Pointer plane, int64_t h, T* outside) const {
        return h >= 0 && h < s_.height ? plane + h * s_.width * kBlock : outside;
    }

    // Transforms columns of In elements to columns of Out; adds to the first `added` rows.
    template <int In, int Out, class Transform>
    void down(const T* const* in, T* const* out, int added, const Transform& transform) const {
        const int64_t count = s_.width * kBlock;
        for (int64_t i = 0; i < count; i += kLane) {
            V from[In], to[Out];
            for (int r = 0; r < In; ++r) from[r] = M::load(in[r] + i);
            transform(from, to);
            for (int r = 0; r < Out; ++r)
                M::store(out[r] + i, r < added ? M::load(out[r] + i) + to[r] : to[r]);
        }
    }

    // Transforms the rows of the tiles in the scratch memory, each In elements from its first
    // column, to their 36 points.
    template <int In, class Transform>
    void spread(const Scratch& own, const Points& points, int64_t block, int64_t image, int64_t ty,
                const Transform& transform) const {
        T* to = points.at(0, block, image * each_ + ty * across_);
        const int64_t point = points.point, across = across_, wide = own.wide;
        for (int64_t tx = 0; tx < across; ++tx, to += kBlock) {
            const T* from = own.rows + tx * winograd::kTile * kBlock;
            for (int r = 0; r < 6; ++r) {
                for (int j = 0; j < kV; ++j) {
                    V d[In], t[6];
                    for (int c = 0; c < In; ++c)
                        d[c] = M::load(from + r * wide + c * kBlock + j * kLane);
                    transform(d, t);
                    // 36 lines in as many places are more than the processor's prefetcher follows;
                    // without this it waits for each in turn.
                    for (int c = 0; c < 6 && j == 0; ++c)
                        __builtin_prefetch(to + (6 * r + c) * point + kBlock, 1);
                    for (int c = 0; c < 6; ++c)
                        M::store(to + (6 * r + c) * point + j * kLane, t[c]);
                }
            }
        }
    }

    // The inverse direction: from points to rows of Out elements per tile in the scratch memory.
    // Overlapping tiles, 4 apart with rows of 6, are added up.
    template <int Out, class Transform>
    void collect(const Scratch& own, const Points& points, int64_t block, int64_t image, int64_t ty,
                 const Transform& transform) const {
        const T* from = points.at(0, block, image * each_ + ty * across_);
        const int64_t point = points.point, across = across_, wide = own.wide;
        for (int64_t tx = 0; tx < across; ++tx, from += kBlock) {
            T* to = own.rows + tx * winograd::kTile * kBlock;
            const int added = tx == 0 ? 0 : Out - winograd::kTile;
            for (int r = 0; r < 6; ++r) {
                for (int j = 0; j < kV; ++j) {
                    V m[6], y[Out];
                    for (int c = 0; c < 6; ++c)
                        m[c] = M::load(from + (6 * r + c) * point + j * kLane);
                    transform(m, y);
                    for (int c = 0; c < Out; ++c) {
                        T* at = to + r * wide + c * kBlock + j * kLane;
                        M::store(at, c < added ? M::load(at) + y[c] : y[c]);
                    }
                }
            }
        }
    }

    void product(const Points& left, const Points& right, const Points& to, int64_t point,
                 int64_t block, int64_t count, Write how) const {
        multiply_all_rows<T>(count * each_, Grid<T>{left.at(point, 0, 0), count * each_, kBlock, 0},
                             Runs{left.blocks, left.rows * kBlock, kBlock},
                             right.at(point, block, 0), to.at(point, block, 0), kBlock, how);
    }

    void outer_product(const Points& inputs, const Points& grads, int64_t point, int64_t block,
                       int64_t count) const {
        const Pixels<T> pixels{
            inputs.at(point, 0, 0), grads.at(point, block, 0), 1, count * each_, kBlock, 0, 0};
        multiply_all_pixels<T>(
            inputs.blocks * kBlock,
            [&](int64_t channel) {
                return channel / kBlock * inputs.rows * kBlock + channel % kBlock;
            },
            pixels, weight_grad_.at(point, block, 0));
    }

    static void transform_filter(const T (*filters)[kBlock], int j, T* to, int64_t point) {
        V columns[6][3];
        for (int c = 0; c < 3; ++c) {
            V w[3], u[6];
            for (int r = 0; r < 3; ++r) w[r] = M::load(filters[3 * r + c] + j * kLane);
            winograd::filter<T>(w, u);
            for (int r = 0; r < 6; ++r) columns[r][c] = u[r];
        }
        for (int r = 0; r < 6; ++r) {
            V u[6];
            winograd::filter<T>(columns[r], u);
            for (int c = 0; c < 6; ++c) M::store(to + (6 * r + c) * point, u[c]);
        }
    }

    static void transform_filter_grad(const T* from, int64_t point, T (*filters)[kBlock], int j) {
        V rows[3][6];
        for (int c = 0; c < 6; ++c) {
            V u[6], w[3];
            for (int r = 0; r < 6; ++r) u[r] = M::load(from + (6 * r + c) * point);
            winograd::filter_adjoint<T>(u, w);
            for (int r = 0; r < 3; ++r) rows[r][c] = w[r];
        }
        for (int r = 0; r < 3; ++r) {
            V w[3];
            winograd::filter_adjoint<T>(rows[r], w);
            for (int c = 0; c < 3; ++c) M::store(filters[3 * r + c] + j * kLane, w[c]);
        }
    }

    LayerShape s_;
    int64_t across_, each_, images_ = 1;  // tiles of a row, tiles of an image, images of a chunk
    Points inputs_[2], grads_[2], outputs_[2], input_grads_[2], weights_[2], transposed_[2],
        weight_grad_;
};

}  // namespace pdd::PDD_BACKEND
