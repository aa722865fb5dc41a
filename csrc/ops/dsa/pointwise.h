// Color, crop, cutout and flip of one planar image, from one buffer to another.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/vector.h"
#include "ops/dsa/four.h"
#include "ops/dsa/math.h"
#include "ops/dsa/view.h"

namespace pdd::PDD_BACKEND {

// Adds the sums of kFours * 4 rows to total, one after another. Within a row, each addition waits
// for the one before it, so many rows are summed at a time, four in a vector.
template <int kFours, class T>
void add_row_sums(const T* rows, int64_t width, T& total) {
    Four<T> sums[kFours] = {};
    int64_t j = 0;
    for (; j + 4 <= width; j += 4)
        for (int f = 0; f < kFours; ++f) {
            Four<T> columns[4];
            for (int r = 0; r < 4; ++r) columns[r] = load_four(rows + (4 * f + r) * width + j);
            transpose<T>(columns);
            for (const Four<T>& column : columns) sums[f] += column;
        }
    for (int f = 0; f < kFours; ++f)
        for (int r = 0; r < 4; ++r) {
            T sum = sums[f][r];
            for (int64_t k = j; k < width; ++k) sum += rows[(4 * f + r) * width + k];
            total += sum;
        }
}

// Sums row by row, for a smaller rounding error.
template <class T>
T mean_of(const T* image, ImageShape shape) {
    const int64_t rows = shape.channels * shape.height, width = shape.width;
    T total = 0;
    int64_t row = 0;
    for (; row + 16 <= rows; row += 16) add_row_sums<4>(image + row * width, width, total);
    for (; row + 4 <= rows; row += 4) add_row_sums<1>(image + row * width, width, total);
    for (; row < rows; ++row) {
        T sum = 0;
        for (int64_t j = 0; j < width; ++j) sum += image[row * width + j];
        total += sum;
    }
    return total / static_cast<T>(shape.elements());
}

// Applies saturation to before(element). The means of a few pixels at a time are stored in memory,
// so that they are rounded: a compiler that holds them in registers may fuse their product with
// `inverse` into the subtraction.
template <class T, class Before>
void saturate(const T* image, T* out, ImageShape shape, T factor, Before before) {
    constexpr int64_t kMost = 256;
    T means[kMost];
    const int64_t pixels = shape.pixels();
    const T inverse = T(1) / static_cast<T>(shape.channels);
    for (int64_t first = 0; first < pixels; first += kMost) {
        const int64_t count = std::min(kMost, pixels - first);
        const T* __restrict from = image + first;
        T* __restrict to = out + first;
        if (shape.channels == 3) {
            for (int64_t k = 0; k < count; ++k)
                means[k] =
                    (before(from[k]) + before(from[pixels + k]) + before(from[2 * pixels + k])) *
                    inverse;
        } else {
            for (int64_t k = 0; k < count; ++k) means[k] = before(from[k]);
            for (int64_t c = 1; c < shape.channels; ++c)
                for (int64_t k = 0; k < count; ++k) means[k] += before(from[c * pixels + k]);
            for (int64_t k = 0; k < count; ++k) means[k] *= inverse;
        }
        for (int64_t c = 0; c < shape.channels; ++c)
            for (int64_t k = 0; k < count; ++k)
                to[c * pixels + k] = blend(before(from[c * pixels + k]), means[k], factor);
    }
}

template <class T>
void contrast(T* image, ImageShape shape, T factor) {
    const T mean = mean_of(image, shape);
    for (int64_t k = 0; k < shape.elements(); ++k) image[k] = blend(image[k], mean, factor);
}

template <class T>
void color(const T* image, T* out, ImageShape shape, AugParams aug_params, bool linear) {
    const T brightness = static_cast<T>(aug_params[kBrightness]),
            saturation = static_cast<T>(aug_params[kSaturation]);
    if (linear) {
        saturate(image, out, shape, saturation, [](T value) { return value; });
    } else {
        saturate(image, out, shape, saturation, [=](T value) { return value + brightness; });
    }
    contrast(out, shape, static_cast<T>(aug_params[kContrast]));
}

template <class T>
void color_adjoint(const T* grad, T* out, ImageShape shape, AugParams aug_params) {
    const T mean = mean_of(grad, shape), factor = static_cast<T>(aug_params[kContrast]);
    saturate(grad, out, shape, static_cast<T>(aug_params[kSaturation]),
             [=](T value) { return blend(value, mean, factor); });
}

// out[i, j] = image[i + u, j + v], zero outside. A plane moves as one run of elements, and the
// elements that come from a neighboring row are blanked afterwards.
template <class T>
void shift(const T* image, T* out, ImageShape shape, int64_t u, int64_t v) {
    const int64_t height = shape.height, width = shape.width, pixels = shape.pixels();
    if (u <= -height || u >= height || v <= -width || v >= width) {
        std::fill_n(out, shape.elements(), T(0));
        return;
    }
    const int64_t top = std::max<int64_t>(-u, 0),
                  bottom = height - std::max<int64_t>(u, 0);  // visible rows: [top, bottom)
    const int64_t left = std::max<int64_t>(-v, 0), right = width - std::max<int64_t>(v, 0);
    const int64_t first = top * width + left, last = (bottom - 1) * width + right;
    for (int64_t c = 0; c < shape.channels; ++c, image += pixels, out += pixels) {
        std::fill_n(out, first, T(0));
        copy_run(image + first + u * width + v, out + first, last - first);
        std::fill_n(out + last, pixels - last, T(0));
        for (int64_t end = top * width + right; end < last; end += width)
            for (int64_t k = 0; k < width - right + left; ++k) out[end + k] = T(0);
    }
}

template <class T>
void cutout(const T* image, T* out, ImageShape shape, Box box) {
    const int64_t top = std::max<int64_t>(box.top, 0), bottom = std::min(box.bottom, shape.height);
    const int64_t left = std::max<int64_t>(box.left, 0), right = std::min(box.right, shape.width);
    copy_run(image, out, shape.elements());
    if (left >= right) return;
    for (int64_t c = 0; c < shape.channels; ++c)
        for (int64_t i = top; i < bottom; ++i)
            std::fill_n(out + (c * shape.height + i) * shape.width + left, right - left, T(0));
}

template <class T>
Vector<T> reversed(Vector<T> v) {
    constexpr int lanes = kLanes<T, Vector<T>>;
    Vector<T> r{};
    for (int l = 0; l < lanes; ++l) r[l] = v[lanes - 1 - l];
    return r;
}

template <class T>
void mirror(const T* image, T* out, ImageShape shape) {
    using M = Memory<Vector<T>>;
    constexpr int64_t lanes = kLanes<T, Vector<T>>;
    const int64_t width = shape.width;
    for (int64_t row = 0; row < shape.channels * shape.height;
         ++row, image += width, out += width) {
        int64_t j = 0;
        for (; j + lanes <= width; j += lanes)
            M::store(out + j, reversed<T>(M::load(image + width - lanes - j)));
        for (; j < width; ++j) out[j] = image[width - 1 - j];
    }
}

}  // namespace pdd::PDD_BACKEND
