// Parameters of instance norm + affine + ReLU + 2x2 average pool.
// All images are channels-last: element (b, c, h, w) is at ((b*H + h)*W + w)*C + c. An odd last row
// or column is not pooled but counts in the norm's statistics, as in torch.nn.AvgPool2d(2). Images
// are stored as T; statistics and vectors over the channels are Compute<T>, at least 32 bits.
#pragma once

#include <cstdint>

#include "core/storage.h"

namespace pdd {

struct PlaneShape {
    int64_t batch, channels, height, width;
};

template <class T>
struct NormReluPool {
    PlaneShape shape;
    double eps;
    const T* z;                // [B, C, H, W] result of the convolution
    const Compute<T>* weight;  // [C]
    const Compute<T>* bias;    // [C]
    T* out;                    // [B, C, H/2, W/2]
    Compute<T>* mean;          // [B, C]
    Compute<T>* rstd;          // [B, C] 1 / sqrt(variance + eps)
};

template <class T>
struct NormReluPoolBackward {
    PlaneShape shape;
    const T* grad_out;              // [B, C, H/2, W/2]
    const T* z;                     // [B, C, H, W]
    const Compute<T>* mean;         // [B, C]
    const Compute<T>* rstd;         // [B, C]
    const Compute<T>* weight;       // [C]
    const Compute<T>* bias;         // [C]
    T* grad_z;                      // [B, C, H, W]
    Compute<T>* grad_weight_parts;  // [B, C] term per image; their sum over B is the gradient
    Compute<T>* grad_bias_parts;    // [B, C]
};

template <class T>
struct NormReluPoolDual {
    PlaneShape shape;
    double eps;
    const T* z;                        // [B, C, H, W]
    const T* z_tangent;                // [B, C, H, W]
    const Compute<T>* weight;          // [C]
    const Compute<T>* weight_tangent;  // [C]
    const Compute<T>* bias;            // [C]
    const Compute<T>* bias_tangent;    // [C]
    T* out;                            // [B, C, H/2, W/2], or nullptr: only the tangent is wanted
    T* out_tangent;                    // [B, C, H/2, W/2]
    Compute<T>* mean;                  // [B, C]
    Compute<T>* rstd;                  // [B, C]
    Compute<T>* mean_tangent;          // [B, C]
    Compute<T>* kappa;  // [B, C] mean of x_hat * z_tangent; rstd_tangent = -rstd^2 * kappa
};

template <class T>
struct NormReluPoolDualBackward {
    PlaneShape shape;
    const T* grad_out;                      // [B, C, H/2, W/2]
    const T* grad_out_tangent;              // [B, C, H/2, W/2]
    const T* z;                             // [B, C, H, W]
    const T* z_tangent;                     // [B, C, H, W]
    const Compute<T>* mean;                 // [B, C]
    const Compute<T>* rstd;                 // [B, C]
    const Compute<T>* mean_tangent;         // [B, C]
    const Compute<T>* kappa;                // [B, C]
    const Compute<T>* weight;               // [C]
    const Compute<T>* weight_tangent;       // [C]
    const Compute<T>* bias;                 // [C]
    T* grad_z;                              // [B, C, H, W], or nullptr: only the tangent is wanted
    T* grad_z_tangent;                      // [B, C, H, W]
    Compute<T>* grad_weight_tangent_parts;  // [B, C]
    Compute<T>* grad_bias_tangent_parts;    // [B, C]
};

}  // namespace pdd
