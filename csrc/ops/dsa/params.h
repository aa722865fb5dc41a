// Differentiable Siamese augmentation: what goes in and out. Arbitrary strides, in elements, so that both
// layouts are read and written without a copy.
#pragma once

#include <cstdint>

namespace pdd {

constexpr int kDsaMaxOperations = 8;

// The operations' numbers; pdd_fast/ops/dsa.py holds the same list.
enum DsaOperation : int { kColor = 0, kCrop = 1, kCutout = 2, kFlip = 3, kScale = 4, kRotate = 5 };

// The rows of Dsa::draws; pdd_fast/ops/dsa.py holds the same list.
enum DsaDraw : int {
    kBrightness,
    kSaturation,
    kContrast,
    kShiftH,
    kShiftW,
    kCutoutH,
    kCutoutW,
    kFlipped,
    kScaleH,
    kScaleW,
    kAngle,
    kDsaDraws
};

template <class T>
struct Dsa {
    int64_t batch, channels, height, width;
    int64_t cutout_height, cutout_width;  // size of the square that cutout blanks
    int operations[kDsaMaxOperations];    // DsaOperation, in the order applied
    int operation_count;
    bool linear;          // leave out what is constant in the image (brightness); the adjoint ignores it
    const double* draws;  // [kDsaDraws, B]
    const T* input;       // [B, C, H, W], strides below
    T* output;            // [B, C, H, W], strides below
    int64_t input_stride[4], output_stride[4];  // of B, C, H, W
};

}  // namespace pdd
