// Parameters of the passes over the whole ConvNet: depth x [3x3 convolution, instance norm with
// affine, ReLU, 2x2 average pool] and a linear layer. Network parameters are one flat vector in the
// order of parameters(): per block convolution weight [C, C_in, 3, 3], convolution bias [C], norm
// weight [C], norm bias [C]; then linear weight [K, F] and bias [K], F = C * (H >> depth) * (W >>
// depth).
//
// A convolution's bias has no effect, because the norm removes it. It is not read, and its
// gradients are zero.
#pragma once

#include <cstdint>

namespace pdd {

struct ConvNetShape {
    int64_t batch, in_channels, height, width;  // B, C_in, H, W of the images
    int64_t channels, depth, classes;           // C, number of blocks, K
};

// Algorithms of the convolutions after the first block.
enum Convolution : int { kConvolutionAuto = 0, kConvolutionDirect = 1, kConvolutionWinograd = 2 };

// Input of every pass.
template <class T>
struct ConvNetInput {
    ConvNetShape shape;
    int convolution;
    double eps;               // of the norm
    const T* theta;           // [P]
    const T* images;          // [B, C_in, H, W], elements image_stride apart
    int64_t image_stride[4];  // in elements
    T* workspace;             // size from convnet_sizes, aligned to 64 bytes, content ignored
};

struct ConvNetSizes {
    int64_t workspace;  // elements of a pass's workspace
    int64_t saved;      // elements that a forward or gradient pass saves of one batch
};

template <class T>
struct ConvNetForward {
    ConvNetInput<T> input;
    // For a backward pass: size from convnet_sizes, aligned to 64 bytes; or nullptr.
    T* saved;
    T* logits;  // [B, K]
};

// Backward pass from what convnet_forward saved.
template <class T>
struct ConvNetBackward {
    ConvNetInput<T> input;
    T* saved;              // the part for gradients is written
    const T* grad_logits;  // [B, K]
    T* grad_theta;         // [P]
    T* grad_images;        // [B, C_in, H, W] contiguous, or nullptr
};

// Forward pass, mean cross-entropy and backward pass.
template <class T>
struct ConvNetGradient {
    ConvNetInput<T> input;
    const int64_t* hard;  // [B] class indices, or nullptr
    const T* soft;        // [B, K] weights, or nullptr
    T* saved;             // for the dual pass, or nullptr
    T* losses;            // [B]
    T* grad_theta;        // [P]
};

// The gradient pass on dual numbers: parameters carry a tangent, images do not.
template <class T>
struct ConvNetDual {
    ConvNetInput<T> input;
    const int64_t* hard;  // [B] or nullptr
    const T* soft;        // [B, K] or nullptr
    T* saved;             // from convnet_gradient at the same point, read only; nullptr: recomputed
    const T* direction;   // [P]
    const bool* wanted;   // [B]: whether an image's gradient is wanted; nullptr: all
    // [B] tangents of the losses; their mean is the derivative along the direction.
    T* losses_tangent;
    T* theta_tangent;  // [P] tangent of the gradient, or nullptr
    // [B, C_in, H, W] contiguous: tangent of the gradient with respect to the images, written for
    // wanted images only; or nullptr.
    T* images_tangent;
    T* labels_tangent;  // [B, K] with respect to soft labels, or nullptr
};

}  // namespace pdd
