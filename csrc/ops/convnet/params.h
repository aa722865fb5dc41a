// The whole ConvNet, depth x [3x3 convolution, instance norm with affine, ReLU, 2x2 average pool]
// and a linear layer: what its passes take and give. Parameters lie in one flat vector in the order
// of the network's parameters(): per block convolution weight [C, C_in, 3, 3], convolution bias
// [C], norm weight [C], norm bias [C]; then linear weight [K, F] and bias [K], F = C * (H >> depth)
// * (W >> depth).
//
// A convolution's bias has no effect, the norm removes it: it is not read, and its gradients are
// zero.
#pragma once

#include <cstdint>

namespace pdd {

struct ConvNetShape {
    int64_t batch, in_channels, height, width;  // B, C_in, H, W of the images
    int64_t channels, depth, classes;           // C, number of blocks, K
};

// How blocks after the first convolve.
enum Convolution : int { kConvolutionAuto = 0, kConvolutionDirect = 1, kConvolutionWinograd = 2 };

// What every pass takes.
template <class T>
struct ConvNetInput {
    ConvNetShape shape;
    int convolution;
    double eps;               // of the norm
    const T* theta;           // [P]
    const T* images;          // [B, C_in, H, W], elements image_stride apart
    int64_t image_stride[4];  // in elements
    T* workspace;  // as many numbers as convnet_sizes says, on 64 bytes; what it holds does not
                   // matter
};

struct ConvNetSizes {
    int64_t workspace;  // numbers that a pass works in
    int64_t kept;       // numbers that a forward or gradient pass keeps of one batch
};

template <class T>
struct ConvNetForward {
    ConvNetInput<T> input;
    T* kept;  // for a backward pass, as many numbers as convnet_sizes says, on 64 bytes; or nullptr
    T* logits;  // [B, K]
};

// From what convnet_forward kept to gradients.
template <class T>
struct ConvNetBackward {
    ConvNetInput<T> input;
    T* kept;               // the part for gradients is written
    const T* grad_logits;  // [B, K]
    T* grad_theta;         // [P]
    T* grad_images;        // [B, C_in, H, W] contiguous, or nullptr
};

// Forward, mean cross-entropy, backward.
template <class T>
struct ConvNetGradient {
    ConvNetInput<T> input;
    const int64_t* hard;  // [B] class indices, or nullptr
    const T* soft;        // [B, K] weights, or nullptr
    T* kept;              // for the dual pass, or nullptr
    T* losses;            // [B]
    T* grad_theta;        // [P]
};

// The gradient pass on dual numbers: parameters move along a direction, images do not.
template <class T>
struct ConvNetDual {
    ConvNetInput<T> input;
    const int64_t* hard;  // [B] or nullptr
    const T* soft;        // [B, K] or nullptr
    T* kept;  // from convnet_gradient at the same point, only read; or nullptr: made again
    const T* direction;  // [P]
    const bool* wanted;  // [B]: images whose gradient is; nullptr: all are
    T* losses_tangent;   // [B] tangents of the losses; their mean is the gradient along the
                         // direction
    T* theta_tangent;    // [P] tangent of the gradient, or nullptr
    T* images_tangent;   // [B, C_in, H, W] contiguous: tangent of the gradient with respect to the
                        // images; written where wanted; or nullptr
    T* labels_tangent;  // [B, K] with respect to soft labels, or nullptr
};

}  // namespace pdd
