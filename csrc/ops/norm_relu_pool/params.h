// Instance norm + affine + ReLU + 2x2 average pool: what goes in and out.
// All images are channels-last: element (b, c, h, w) lies at ((b*H + h)*W + w)*C + c. An odd last row or
// column is not pooled but counts in the norm's statistics, as in torch.nn.AvgPool2d(2).
#pragma once

#include <cstdint>

namespace pdd {

struct PlaneShape {
    int64_t batch, channels, height, width;
};

template <class T>
struct NormReluPool {
    PlaneShape shape;
    double eps;
    const T* z;       // [B, C, H, W] what the convolution gave
    const T* weight;  // [C]
    const T* bias;    // [C]
    T* out;           // [B, C, H/2, W/2]
    T* mean;          // [B, C]
    T* rstd;          // [B, C] 1 / sqrt(variance + eps)
};

template <class T>
struct NormReluPoolBackward {
    PlaneShape shape;
    const T* grad_out;     // [B, C, H/2, W/2]
    const T* z;            // [B, C, H, W]
    const T* mean;         // [B, C]
    const T* rstd;         // [B, C]
    const T* weight;       // [C]
    const T* bias;         // [C]
    T* grad_z;             // [B, C, H, W]
    T* grad_weight_parts;  // [B, C] one term per image; their sum over B is the gradient
    T* grad_bias_parts;    // [B, C]
};

template <class T>
struct NormReluPoolDual {
    PlaneShape shape;
    double eps;
    const T* z;               // [B, C, H, W]
    const T* z_tangent;       // [B, C, H, W]
    const T* weight;          // [C]
    const T* weight_tangent;  // [C]
    const T* bias;            // [C]
    const T* bias_tangent;    // [C]
    T* out;                   // [B, C, H/2, W/2], or nullptr: only the tangent is wanted
    T* out_tangent;           // [B, C, H/2, W/2]
    T* mean;                  // [B, C]
    T* rstd;                  // [B, C]
    T* mean_tangent;          // [B, C]
    T* kappa;                 // [B, C] mean of x_hat * z_tangent; rstd_tangent = -rstd^2 * kappa
};

template <class T>
struct NormReluPoolDualBackward {
    PlaneShape shape;
    const T* grad_out;             // [B, C, H/2, W/2]
    const T* grad_out_tangent;     // [B, C, H/2, W/2]
    const T* z;                    // [B, C, H, W]
    const T* z_tangent;            // [B, C, H, W]
    const T* mean;                 // [B, C]
    const T* rstd;                 // [B, C]
    const T* mean_tangent;         // [B, C]
    const T* kappa;                // [B, C]
    const T* weight;               // [C]
    const T* weight_tangent;       // [C]
    const T* bias;                 // [C]
    T* grad_z;                     // [B, C, H, W], or nullptr: only the tangent is wanted
    T* grad_z_tangent;             // [B, C, H, W]
    T* grad_weight_tangent_parts;  // [B, C]
    T* grad_bias_tangent_parts;    // [B, C]
};

}  // namespace pdd
