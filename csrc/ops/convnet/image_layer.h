// The first convolution, from the few channels of an image. Reading a plane of its results from
// memory takes as long as recomputing it from three channels, so no plane is stored: each is
// computed where it is needed, in a thread's own cache.
//
// Images are [H + 2][W + 2][C_in] with a border of zeros: three runs of 3 * C_in elements hold all
// terms of a pixel's sum.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/parallel.h"
#include "ops/convnet/geometry.h"
#include "ops/convnet/multiply.h"

namespace pdd::PDD_BACKEND {

template <class T>
class ImageLayer {
  public:
    ImageLayer(const LayerShape& shape, Needs needs, Arena<T>& arena)
        : s_(shape),
          row_((s_.width + 2) * s_.in_channels),
          padded_((s_.height + 2) * row_),
          taps_(9 * s_.in_channels),
          tap_blocks_(blocks_of(taps_)) {
        images_ = arena.take(s_.batch * padded_);
        for (int k = 0; k < needs.numbers; ++k) {
            weights_[k] = arena.take(s_.out_blocks * taps_ * kBlock);
            if (needs.backward)
                by_tap_[k] = arena.take(s_.out_blocks * tap_blocks_ * kBlock * kBlock);
        }
        if (needs.backward) parts_ = arena.take(s_.batch * s_.out_blocks * taps_ * kBlock);
    }

    // Nanoseconds of a plane in convolve, in set_weight_grad, and in add_by_tap.
    double plane_time() const { return multiply_time<T>(s_.pixels() * taps_ * kBlock); }

    // Elements of a thread's scratch memory for an image's gradient.
    static int64_t scratch(const LayerShape& s) {
        return s.pixels() * blocks_of(9 * s.in_channels) * kBlock +
               (s.height + 2) * (s.width + 2) * s.in_channels;
    }

    void set_images(const T* images, const int64_t stride[4], int threads) const {
        parallel_for(s_.batch, threads, move_time<T>(padded_), [&](int64_t b) {
            T* to = images_ + b * padded_;
            std::fill_n(to, padded_, T(0));
            for (int64_t c = 0; c < s_.in_channels; ++c) {
                for (int64_t h = 0; h < s_.height; ++h) {
                    const T* from = images + b * stride[0] + c * stride[1] + h * stride[2];
                    T* at = to + (h + 1) * row_ + s_.in_channels + c;
                    for (int64_t w = 0; w < s_.width; ++w)
                        at[w * s_.in_channels] = from[w * stride[3]];
                }
            }
        });
    }

    // Packs w [C, C_in, 3, 3] (k = 0) or its tangent (1) as [blocks][taps][16 out], a tap being
    // (row, column, channel), and for the images' gradient as [blocks][blocks of taps][16 out][16
    // taps].
    void set_weights(int k, const T* w) const {
        for (int64_t out = 0; out < s_.out_blocks * kBlock; ++out) {
            const int64_t block = out / kBlock, lane = out % kBlock;
            T* by_tap = by_tap_[k]
                            ? by_tap_[k] + block * tap_blocks_ * kBlock * kBlock + lane * kBlock
                            : nullptr;
            for (int64_t tap = 0; tap < tap_blocks_ * kBlock; ++tap) {
                const int64_t place = tap / s_.in_channels, channel = tap % s_.in_channels;
                const bool exists = out < s_.out_channels && tap < taps_;
                const T value = exists ? w[(out * s_.in_channels + channel) * 9 + place] : T(0);
                if (tap < taps_) weights_[k][(block * taps_ + tap) * kBlock + lane] = value;
                if (by_tap) by_tap[tap / kBlock * kBlock * kBlock + tap % kBlock] = value;
            }
        }
    }

    // Computes a plane [H, W, 16] of w*x.
    void convolve(int k, int64_t image, int64_t block, T* plane) const {
        multiply_all_rows<T>(s_.pixels(),
                             Grid<T>{images_ + image * padded_, s_.width, s_.in_channels, row_},
                             Runs{3, row_, 3 * s_.in_channels},
                             weights_[k] + block * taps_ * kBlock, plane, kBlock, Write::replace);
    }

    // Computes an image's term of the weight gradient from a plane of the results' gradient.
    void set_weight_grad(int64_t image, int64_t block, const T* plane) const {
        T* part = part_of(image, block);
        std::fill_n(part, taps_ * kBlock, T(0));
        multiply_all_pixels<T>(
            taps_,
            [&](int64_t tap) {
                return tap / (3 * s_.in_channels) * row_ + tap % (3 * s_.in_channels);
            },
            Pixels<T>{images_ + image * padded_, plane, s_.height, s_.width, s_.in_channels, row_,
                      s_.width * kBlock},
            part);
    }

    // Writes the sum of the terms to dw [C, C_in, 3, 3].
    void weight_grad(T* dw, int threads) const {
        parallel_for(
            s_.out_blocks, threads, move_time<T>((s_.batch + 8) * taps_ * kBlock / 2),
            [&](int64_t block) {
                T* total = part_of(0, block);
                for (int64_t b = 1; b < s_.batch; ++b) {
                    const T* part = part_of(b, block);
                    for (int64_t i = 0; i < taps_ * kBlock; ++i) total[i] += part[i];
                }
                for (int64_t c = 0; c < kBlock && block * kBlock + c < s_.out_channels; ++c)
                    for (int64_t tap = 0; tap < taps_; ++tap)
                        dw[((block * kBlock + c) * s_.in_channels + tap % s_.in_channels) * 9 +
                           tap / s_.in_channels] = total[tap * kBlock + c];
            });
    }

    // Adds a plane of the results' gradient, times the weights, to the gradient of every tap of
    // every pixel: [H, W, taps].
    void add_by_tap(int k, int64_t block, const T* plane, T* by_tap, Write how) const {
        const int64_t stride = tap_blocks_ * kBlock;
        for (int64_t t = 0; t < tap_blocks_; ++t) {
            multiply_all_rows<T>(s_.pixels(), Grid<T>{plane, s_.pixels(), kBlock, 0},
                                 Runs{1, 0, kBlock},
                                 by_tap_[k] + (block * tap_blocks_ + t) * kBlock * kBlock,
                                 by_tap + t * kBlock, stride, how);
        }
    }

    // Computes the image's gradient [C_in, H, W] from that of its taps. `scratch` follows the
    // result of add_by_tap in memory.
    void image_grad(const T* by_tap, T* scratch, T* grad) const {
        std::fill_n(scratch, padded_, T(0));
        const int64_t run = 3 * s_.in_channels;
        for (int64_t h = 0; h < s_.height; ++h) {
            T* to = scratch + h * row_;
            for (int64_t w = 0; w < s_.width;
                 ++w, to += s_.in_channels, by_tap += tap_blocks_ * kBlock)
                for (int64_t r = 0; r < 3; ++r)
                    for (int64_t i = 0; i < run; ++i) to[r * row_ + i] += by_tap[r * run + i];
        }
        for (int64_t c = 0; c < s_.in_channels; ++c)
            for (int64_t h = 0; h < s_.height; ++h)
                for (int64_t w = 0; w < s_.width; ++w)
                    *grad++ = scratch[(h + 1) * row_ + (w + 1) * s_.in_channels + c];
    }

  private:
    T* part_of(int64_t image, int64_t block) const {
        return parts_ + (image * s_.out_blocks + block) * taps_ * kBlock;
    }

    LayerShape s_;
    int64_t row_, padded_, taps_, tap_blocks_;
    T *images_ = nullptr, *weights_[2] = {}, *by_tap_[2] = {}, *parts_ = nullptr;
};

}  // namespace pdd::PDD_BACKEND
