// A convolution between blocks of the network by its definition, a few images at a time, with the
// interface of winograd_layer.h. Images and gradients are copied to planes with a border of zeros,
// so that every pixel's sum has the same form: per block of channels 3 contiguous rows of 3 pixels
// of 16 channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/parallel.h"
#include "ops/convnet/geometry.h"
#include "ops/convnet/multiply.h"

namespace pdd::PDD_BACKEND {

template <class T>
class DirectLayer {
  public:
    DirectLayer(const LayerShape& shape, Needs needs, Arena<T>& arena)
        : s_(shape), row_((shape.width + 2) * kBlock), padded_((shape.height + 2) * row_) {
        const int64_t most = std::max(s_.in_blocks, s_.out_blocks);
        images_ = std::clamp<int64_t>(kNumbersAtOnce / (most * padded_), 1, s_.batch);
        for (int k = 0; k < needs.numbers; ++k) {
            inputs_[k] = arena.take(images_ * s_.in_blocks * padded_);
            if (needs.backward) {
                grads_[k] = arena.take(images_ * s_.out_blocks * padded_);
                results_[k] = arena.images(images_, s_.in_blocks, s_.pixels());
            } else {
                results_[k] = arena.images(images_, s_.out_blocks, s_.pixels());
            }
            weights_[k] = arena.take(s_.in_blocks * s_.out_blocks * kFilters);
        }
        if (needs.backward) weight_grad_ = arena.take(s_.in_blocks * s_.out_blocks * kFilters);
    }

    int64_t images_at_once() const { return images_; }
    static int64_t scratch(const LayerShape&) { return 0; }

    // ---- weights ----

    // Packs w [C, C_in, 3, 3] (k = 0) or its tangent (1) as [out blocks][in blocks][9][16 in][16
    // out]. `transposed`: for the adjoint in the input, with in and out exchanged and the filters
    // rotated by half a turn.
    void set_weights(int k, const T* w, bool transposed, int threads) const {
        const int64_t to_blocks = transposed ? s_.in_blocks : s_.out_blocks;
        const int64_t from_blocks = transposed ? s_.out_blocks : s_.in_blocks;
        parallel_for(to_blocks * from_blocks, threads, 3 * move_time<T>(kFilters), [&](int64_t i) {
            T* to = weights_[k] + i * kFilters;
            for (int tap = 0; tap < 9; ++tap) {
                for (int64_t f = 0; f < kBlock; ++f) {
                    for (int64_t t = 0; t < kBlock; ++t, ++to) {
                        const int64_t a = i / from_blocks * kBlock + t,
                                      b = i % from_blocks * kBlock + f;
                        const int64_t out = transposed ? b : a, in = transposed ? a : b;
                        const bool exists = out < s_.out_channels && in < s_.in_channels;
                        *to =
                            exists
                                ? w[9 * (out * s_.in_channels + in) + (transposed ? 8 - tap : tap)]
                                : T(0);
                    }
                }
            }
        });
    }

    void clear_weight_grad(int threads) const {
        parallel_for(s_.in_blocks * s_.out_blocks, threads, move_time<T>(kFilters) / 4,
                     [&](int64_t i) { std::fill_n(weight_grad_ + i * kFilters, kFilters, T(0)); });
    }

    void weight_grad(T* dw, int threads) const {
        parallel_for(s_.out_blocks * s_.in_blocks, threads, 3 * move_time<T>(kFilters),
                     [&](int64_t i) {
                         const T* from = weight_grad_ + i * kFilters;
                         for (int tap = 0; tap < 9; ++tap) {
                             for (int64_t f = 0; f < kBlock; ++f) {
                                 for (int64_t t = 0; t < kBlock; ++t, ++from) {
                                     const int64_t out = i / s_.in_blocks * kBlock + t,
                                                   in = i % s_.in_blocks * kBlock + f;
                                     if (out < s_.out_channels && in < s_.in_channels)
                                         dw[9 * (out * s_.in_channels + in) + tap] = *from;
                                 }
                             }
                         }
                     });
    }

    // ---- a chunk of images: inputs ----

    void set_input(int k, int64_t image, int64_t block, const T* plane, T*) const {
        pad(plane, inputs_[k] + (image * s_.in_blocks + block) * padded_);
    }

    void set_grad(int k, int64_t image, int64_t block, const T* plane, T*) const {
        pad(plane, grads_[k] + (image * s_.out_blocks + block) * padded_);
    }

    // ---- products ----

    int64_t forward_tasks(int64_t count) const { return count * s_.out_blocks; }
    int64_t input_grad_tasks(int64_t count) const { return count * s_.in_blocks; }
    int64_t weight_grad_tasks(int64_t) const { return s_.out_blocks * s_.in_blocks; }

    void forward(int64_t task, int64_t, bool tangent) const {
        if (!tangent)
            return convolve(inputs_[0], weights_[0], results_[0], s_.in_blocks, task,
                            Write::replace);
        convolve(inputs_[0], weights_[1], results_[1], s_.in_blocks, task, Write::replace);
        convolve(inputs_[1], weights_[0], results_[1], s_.in_blocks, task, Write::add);
    }

    void input_grad(int64_t task, int64_t, bool tangent) const {
        if (!tangent)
            return convolve(grads_[0], weights_[0], results_[0], s_.out_blocks, task,
                            Write::replace);
        convolve(grads_[1], weights_[0], results_[1], s_.out_blocks, task, Write::replace);
        convolve(grads_[0], weights_[1], results_[1], s_.out_blocks, task, Write::add);
    }

    void add_weight_grad(int64_t task, int64_t count, bool tangent) const {
        if (!tangent) return correlate(inputs_[0], grads_[0], task, count);
        correlate(inputs_[0], grads_[1], task, count);
        correlate(inputs_[1], grads_[0], task, count);
    }

    // Nanoseconds of a task on values, and of the input or output of a plane.
    double forward_time(int64_t) const {
        return multiply_time<T>(9 * s_.pixels() * s_.in_blocks * kBlock * kBlock);
    }
    double input_grad_time(int64_t) const {
        return multiply_time<T>(9 * s_.pixels() * s_.out_blocks * kBlock * kBlock);
    }
    double weight_grad_time(int64_t count) const {
        return multiply_time<T>(count * s_.pixels() * kFilters);
    }
    double plane_time() const { return move_time<T>(padded_) / 2; }

    // ---- outputs ----

    void get_output(int k, int64_t image, int64_t block, T* plane, T*) const {
        std::copy_n(results_[k].plane(image, block), s_.pixels() * kBlock, plane);
    }
    void get_input_grad(int k, int64_t image, int64_t block, T* plane, T* scratch) const {
        get_output(k, image, block, plane, scratch);
    }

  private:
    static constexpr int64_t kFilters = 9 * kBlock * kBlock;  // elements of a pair of blocks
    static constexpr int64_t kNumbersAtOnce = 1 << 18;        // of a chunk's input: 1 MB

    void pad(const T* plane, T* to) const {
        std::fill_n(to, row_ + kBlock, T(0));
        to += row_ + kBlock;
        for (int64_t h = 0; h < s_.height; ++h) {
            to = std::copy_n(plane + h * s_.width * kBlock, s_.width * kBlock, to);
            to = std::fill_n(to, 2 * kBlock, T(0));
        }
        std::fill_n(to, row_ - kBlock, T(0));
    }

    // Computes a result's plane from all `blocks` of an image in turn. The plane and the filters of
    // one block, 20 KB and 9 KB for 16x16 floats, then stay in the first-level cache, which all
    // blocks together would not.
    void convolve(const T* images, const T* weights, const BlockedImages<T>& to, int64_t blocks,
                  int64_t task, Write how) const {
        const int64_t image = task / to.blocks, block = task % to.blocks;
        for (int64_t from = 0; from < blocks; ++from) {
            multiply_all_rows<T>(
                s_.pixels(),
                Grid<T>{images + (image * blocks + from) * padded_, s_.width, kBlock, row_},
                Runs{3, row_, 3 * kBlock}, weights + (block * blocks + from) * kFilters,
                to.plane(image, block), kBlock, from == 0 ? how : Write::add);
        }
    }

    void correlate(const T* inputs, const T* grads, int64_t task, int64_t count) const {
        const int64_t out = task / s_.in_blocks, in = task % s_.in_blocks;
        for (int64_t image = 0; image < count; ++image) {
            const T* input = inputs + (image * s_.in_blocks + in) * padded_;
            const T* grad = grads + (image * s_.out_blocks + out) * padded_ + row_ + kBlock;
            multiply_all_pixels<T>(
                9 * kBlock,
                [&](int64_t term) { return term / (3 * kBlock) * row_ + term % (3 * kBlock); },
                Pixels<T>{input, grad, s_.height, s_.width, kBlock, row_, row_},
                weight_grad_ + task * kFilters);
        }
    }

    LayerShape s_;
    int64_t row_, padded_, images_ = 1;  // elements of a padded row and plane; images of a chunk
    T *inputs_[2] = {}, *grads_[2] = {}, *weights_[2] = {}, *weight_grad_ = nullptr;
    BlockedImages<T> results_[2] = {};  // outputs, or gradients of the inputs
};

}  // namespace pdd::PDD_BACKEND
