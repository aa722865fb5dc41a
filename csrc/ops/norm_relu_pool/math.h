// The formulas of instance norm + affine + ReLU + 2x2 average pool at one element, value and
// tangent, shared by the CPU and CUDA back ends (Wu and He 2018 for the norm; derivation in
// docs/mathematics.md).
//
//   x_hat = (z - mean) * rstd        a = weight * x_hat + bias        out = average over 2x2 of
//   max(a, 0)
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

constexpr double kPoolWeight = 0.25;  // one of the 2x2 elements

// Mean and variance of a plane from a first guess at the mean and the sums of d and d^2 over d = z
// - guess. The guess is the rounded mean; where |z| is large, its rounding would otherwise count as
// variance (a constant plane of 3.3e4 came out at 0.8 instead of 0). Chan, Golub and LeVeque 1983,
// equation 1.7.
template <class T>
struct Moments {
    T mean, variance;

    PDD_HD Moments(T guess, T mean_d, T mean_square_d)
        : mean(guess + mean_d), variance(mean_square_d - mean_d * mean_d) {
        variance =
            variance > T{} ? variance : T{};  // the difference of two roundings may fall below 0
    }
};

// One channel of one image.
template <class T>
struct Channel {
    T mean, rstd, weight, bias;

    PDD_HD T normalized(T z) const { return (z - mean) * rstd; }
    // What ReLU sees. Every kernel decides the sign by this very expression, so value and
    // derivative never disagree.
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

// Means over the plane that the norm's backward pass subtracts: of da and of da * x_hat.
template <class T>
struct BackwardMeans {
    T grad, grad_x_hat;
};

// grad_z before the factor rstd * weight.
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
    const T centered_tangent = grad_tangent - means_tangent.grad - x_hat_tangent * means.grad_x_hat -
                              x_hat * means_tangent.grad_x_hat;
    return factor_tangent * centered(means, grad, x_hat) +
           channel.rstd * channel.weight * centered_tangent;
}

}  // namespace pdd::PDD_BACKEND
