// Formulas of differentiable Siamese augmentation (Zhao and Bilen 2021; docs/mathematics.md,
// section 5) at one pixel, shared by the CPU and CUDA back ends. Images are planar here: element
// (c, i, j) is at (c*H + i)*W + j.
//
// Scaling and rotating sample bilinearly at affine positions. The transpose is computed as a gather
// too: it visits, for an input pixel, the few outputs whose taps can reach it, so no thread adds to
// another's result.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "ops/dsa/params.h"

namespace pdd::PDD_BACKEND {

struct ImageShape {
    int64_t channels, height, width;

    PDD_HD int64_t pixels() const { return height * width; }
    PDD_HD int64_t elements() const { return channels * height * width; }
};

// Returns value, a double or several, clamped to [low, high], and low for NaN. A parameter may be
// any number, and one that does not fit an integer must not be cast.
template <class Value>
PDD_HD Value held(Value value, double low, double high) {
    const Value lowest = Value{} + low, highest = Value{} + high;
    const Value raised = value > lowest ? value : lowest;
    return raised < highest ? raised : highest;
}

constexpr double kFar = 1e15;  // beyond any image; sums of a few such values still fit an int64_t

// Parameters of one image.
struct AugParams {
    const double* first;  // row r of this image is at first[r * batch]
    int64_t batch;

    PDD_HD double operator[](int row) const { return first[row * batch]; }
    PDD_HD int64_t integer(int row) const {
        return static_cast<int64_t>(held(first[row * batch], -kFar, kFar));
    }
};

// Rows [top, bottom) and columns [left, right) that cutout blanks.
struct Box {
    int64_t top, bottom, left, right;

    PDD_HD bool contains(int64_t i, int64_t j) const {
        return i >= top && i < bottom && j >= left && j < right;
    }
};

PDD_HD Box cutout_box(AugParams aug_params, int64_t height, int64_t width) {
    const int64_t top = aug_params.integer(kCutoutH) - height / 2,
                  left = aug_params.integer(kCutoutW) - width / 2;
    return {top, top + height, left, left + width};
}

// Sampling position of an output pixel: position = center + M (pixel - center), in pixels. It
// equals affine_grid followed by grid_sample with align_corners=True. Positions are double for
// every type, because their rounding is multiplied by the difference of neighboring pixels.
struct Sampling {
    double xx, xy, yx, yy;  // M: x from x, x from y, y from x, y from y
    double cx, cy;

    // A pixel's position is the part of its column plus the part of its row.
    PDD_HD double column_x(int64_t j) const { return cx + xx * (static_cast<double>(j) - cx); }
    PDD_HD double column_y(int64_t j) const { return cy + yx * (static_cast<double>(j) - cx); }
    PDD_HD double x(int64_t i, int64_t j) const {
        return column_x(j) + xy * (static_cast<double>(i) - cy);
    }
    PDD_HD double y(int64_t i, int64_t j) const {
        return column_y(j) + yy * (static_cast<double>(i) - cy);
    }
};

PDD_HD Sampling scaling(AugParams aug_params, ImageShape shape) {
    return {aug_params[kScaleW],
            0,
            0,
            aug_params[kScaleH],
            0.5 * static_cast<double>(shape.width - 1),
            0.5 * static_cast<double>(shape.height - 1)};
}

struct Turn {
    double cosine, sine;
};

PDD_HD Turn turn_of(double angle) {
#if defined(__CUDA_ARCH__)
    // cos and sin put an array in local memory for angles beyond 10^5; sincospi does not.
    double sine, cosine;
    sincospi(angle * 0.31830988618379067154, &sine, &cosine);
    return {cosine, sine};
#else
    return {cos(angle), sin(angle)};
#endif
}

PDD_HD Sampling rotation(AugParams aug_params, ImageShape shape) {
    // affine_grid's coordinates run from -1 to 1 along both sides, so a rotation in them scales by
    // the ratio of the sides. A side of one pixel has the single coordinate 0.
    const double across = static_cast<double>(shape.width - 1),
                 down = static_cast<double>(shape.height - 1);
    const Turn turn = turn_of(aug_params[kAngle]);
    return {turn.cosine,
            down > 0 ? -turn.sine * across / down : 0.0,
            across > 0 ? turn.sine * down / across : 0.0,
            turn.cosine,
            0.5 * across,
            0.5 * down};
}

// Weight of a pixel at this distance from a sample, along one axis.
PDD_HD double tap(double distance) {
    const double weight = 1.0 - fabs(distance);
    return weight > 0 ? weight : 0;
}

// tap() of the two pixels around one or several positions, along one axis: `first`, the position's
// floor, which may lie outside, and the next.
template <class Value>
struct Neighbors {
    Value first, weight, next_weight;

    PDD_HD Neighbors(Value position, Value floor)
        : first(floor),
          weight(1.0 - (position - floor)),
          next_weight(1.0 - ((floor + 1.0) - position)) {}
};

// The four taps of one output pixel.
struct Taps {
    int64_t row, column;  // of the upper left tap; may lie outside
    double rows[2], columns[2];

    PDD_HD Taps(const Sampling& s, ImageShape shape, int64_t i, int64_t j) {
        // All four weights are 0 from one pixel outside.
        const double y = held(s.y(i, j), -1, static_cast<double>(shape.height));
        const double x = held(s.x(i, j), -1, static_cast<double>(shape.width));
        const Neighbors<double> down(y, floor(y)), across(x, floor(x));
        row = static_cast<int64_t>(down.first);
        column = static_cast<int64_t>(across.first);
        rows[0] = down.weight, rows[1] = down.next_weight;
        columns[0] = across.weight, columns[1] = across.next_weight;
    }

    template <class T>
    PDD_HD T sample(const T* plane, ImageShape shape) const {
        T sum = 0;
        for (int a = 0; a < 2; ++a) {
            for (int b = 0; b < 2; ++b) {
                const int64_t i = row + a, j = column + b;
                if (i >= 0 && i < shape.height && j >= 0 && j < shape.width)
                    sum += static_cast<T>(rows[a] * columns[b]) * plane[i * shape.width + j];
            }
        }
        return sum;
    }
};

// Output pixels whose taps can reach one input pixel: a box around its image under the inverse of
// M.
struct Reach {
    int64_t top, bottom, left, right;  // inclusive

    PDD_HD Reach(const Sampling& s, ImageShape shape, int64_t p, int64_t q) {
        constexpr double slack =
            1e-6;  // margin for the inverse's rounding; extra pixels have weight 0
        const double determinant = s.xx * s.yy - s.xy * s.yx;
        top = left = 0;
        bottom = shape.height - 1;
        right = shape.width - 1;
        if (fabs(determinant) < 1e-9)
            return;  // M maps the plane to a line: every output is visited
        const double dx = static_cast<double>(q) - s.cx, dy = static_cast<double>(p) - s.cy;
        const double j = s.cx + (s.yy * dx - s.xy * dy) / determinant;
        const double i = s.cy + (s.xx * dy - s.yx * dx) / determinant;
        const double across = (fabs(s.yy) + fabs(s.xy)) / fabs(determinant) + slack;
        const double down = (fabs(s.xx) + fabs(s.yx)) / fabs(determinant) + slack;
        top = static_cast<int64_t>(held(ceil(i - down), 0, static_cast<double>(shape.height)));
        left = static_cast<int64_t>(held(ceil(j - across), 0, static_cast<double>(shape.width)));
        bottom = static_cast<int64_t>(held(floor(i + down), -1, static_cast<double>(bottom)));
        right = static_cast<int64_t>(held(floor(j + across), -1, static_cast<double>(right)));
    }
};

// Sum of what the outputs of one channel contribute to input pixel (p, q).
template <class T>
PDD_HD T gather(const T* grad, const Sampling& s, const Reach& reach, ImageShape shape, int64_t p,
                int64_t q) {
    T sum = 0;
    for (int64_t i = reach.top; i <= reach.bottom; ++i) {
        for (int64_t j = reach.left; j <= reach.right; ++j) {
            const double weight =
                tap(s.y(i, j) - static_cast<double>(p)) * tap(s.x(i, j) - static_cast<double>(q));
            if (weight > 0) sum += static_cast<T>(weight) * grad[i * shape.width + j];
        }
    }
    return sum;
}

// Moves value towards or away from a mean: saturation and contrast, each its own transpose.
template <class Value, class Mean, class Factor>
PDD_HD Value blend(Value value, Mean mean, Factor factor) {
    return (value - mean) * factor + mean;
}

}  // namespace pdd::PDD_BACKEND
