// Formulas of instance norm + affine + ReLU + 2x2 average pool at one element, value and tangent,
// shared by the CPU and CUDA back ends (Wu and He 2018 for the norm; derivation in
// docs/mathematics.md).
//
//   x_hat = (z - mean) * rstd
//   a     = weight * x_hat + bias
//   out   = average of max(a, 0) over 2x2
//
// Tangents along (z_tangent, weight_tangent, bias_tangent), with kappa = mean(x_hat * z_tangent)
// over the plane:
//
//   mean_tangent  = mean(z_tangent)
//   rstd_tangent  = -rstd^2 * kappa
//   x_hat_tangent = rstd * (z_tangent - mean_tangent - x_hat * kappa)
#pragma once

#include "core/macros.h"

namespace pdd::PDD_BACKEND {

constexpr double kPoolWeight = 0.25;  // of one of the 2x2 elements

// Mean and variance of a plane, from a guess of the mean and the sums of d and d^2 with d = z -
// guess. The guess is the rounded mean. For large |z| its rounding would otherwise count as
// variance: a constant plane of 3.3e4 had 0.8 instead of 0. Chan, Golub and LeVeque 1983, equation
// 1.7.
template <class T>
struct Moments {
    T mean, variance;

    PDD_HD Moments(T guess, T mean_d, T mean_square_d)
        : mean(guess + mean_d), variance(mean_square_d - mean_d * mean_d) {
        variance = variance > T{} ? variance : T{};  // rounding may make the difference negative
    }
};

// One channel of one image.
template <class T>
struct Channel {
    T mean, rstd, weight, bias;

    PDD_HD T normalized(T z) const { return (z - mean) * rstd; }
    // Input of ReLU. Every kernel takes the sign of this very expression, so value and derivative
    // always agree.
    PDD_HD T activation(T x_hat) const { return weight * x_hat + bias; }
};

template <class T>
struct ChannelTangent {
    T mean, kappa, weight, bias;  // tangents of mean, weight and bias; kappa as above

    PDD_HD T normalized(const Channel<T>& channel, T x_hat, T z_tangent) const {
        return channel.rstd * (z_tangent - mean - x_hat * kappa);
    }
    PDD_HD T activation(const Channel<T>& channel, T x_hat, T x_hat_tangent) const {
        return weight * x_hat + channel.weight * x_hat_tangent + bias;
    }
};

// Means of da and of da * x_hat over the plane, which the norm's backward pass subtracts.
template <class T>
struct BackwardMeans {
    T grad, grad_x_hat;
};

// grad_z without the factor rstd * weight.
template <class T>
PDD_HD T centered(const BackwardMeans<T>& means, T grad, T x_hat) {
    return grad - means.grad - x_hat * means.grad_x_hat;
}

template <class T>
PDD_HD T grad_z(const Channel<T>& channel, const BackwardMeans<T>& means, T grad, T x_hat) {
    return channel.rstd * channel.weight * centered(means, grad, x_hat);
}

template <class T>
PDD_HD T grad_z_tangent(const Channel<T>& channel, const ChannelTangent<T>& tangent,
                        const BackwardMeans<T>& means, const BackwardMeans<T>& means_tangent,
                        T grad, T grad_tangent, T x_hat, T x_hat_tangent) {
    const T rstd_tangent = -channel.rstd * channel.rstd * tangent.kappa;
    const T factor_tangent = rstd_tangent * channel.weight + channel.rstd * tangent.weight;
    const T centered_tangent = grad_tangent - means_tangent.grad -
                               x_hat_tangent * means.grad_x_hat - x_hat * means_tangent.grad_x_hat;
    return factor_tangent * centered(means, grad, x_hat) +
           channel.rstd * channel.weight * centered_tangent;
}

}  // namespace pdd::PDD_BACKEND
