// Parameters of differentiable Siamese augmentation. Images have arbitrary strides, in elements, so
// that both layouts are read and written without a copy.
#pragma once

#include <cstdint>

#include "core/storage.h"

namespace pdd {

// Codes of the operations, in the order of pdd_fast/ops/dsa.py.
enum DsaOperation : int {
    kNothing = -1,
    kColor = 0,
    kCrop = 1,
    kCutout = 2,
    kFlip = 3,
    kScale = 4,
    kRotate = 5
};

// Rows of Dsa::aug_params, in the order of pdd_fast/ops/dsa.py.
enum DsaAugParam : int {
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
    kDsaAugParams
};

template <class T>
struct Dsa {
    int64_t batch, channels, height, width;
    int64_t cutout_height, cutout_width;  // size of the rectangle that cutout blanks
    int64_t operation_count;
    const int* operations;     // [operation_count, B] DsaOperation, in the order applied
    bool linear;               // leave out the constant part (brightness); the adjoint ignores it
    const double* aug_params;  // [kDsaAugParams, B]
    const T* input;            // [B, C, H, W], strides below
    T* output;                 // [B, C, H, W], strides below
    int64_t input_stride[4], output_stride[4];  // of B, C, H, W
    Compute<T>* scratch;  // [dsa_scratch_images, 2, C * H * W]; nullptr if that is 0
    int64_t scratch_images;
};

struct DsaShape {
    int64_t batch, channels, height, width;
};

}  // namespace pdd
