// Instance norm + affine + ReLU + 2x2 average pool over one plane of one vector of channels (8
// floats with AVX2). Sums over the plane stay in registers. The plane, at most a cache line per
// pixel, stays in the cache between passes.
#pragma once

#include "core/vector.h"
#include "ops/norm_relu_pool/math.h"
#include "ops/norm_relu_pool/params.h"

namespace pdd::PDD_BACKEND {

// Channels [channel, channel + lanes of Pack) of image b. Offsets are in elements.
template <class T, class Pack>
struct Plane {
    PlaneShape shape;
    int64_t b, channel;

    int64_t pixel(int64_t h, int64_t w) const {
        return ((b * shape.height + h) * shape.width + w) * shape.channels + channel;
    }
    int64_t pooled(int64_t h, int64_t w) const {
        return ((b * (shape.height / 2) + h) * (shape.width / 2) + w) * shape.channels + channel;
    }
    int64_t rows_pooled() const { return shape.height / 2 * 2; }
    int64_t columns_pooled() const { return shape.width / 2 * 2; }
    T inverse_size() const {
        return static_cast<T>(1.0 / static_cast<double>(shape.height * shape.width));
    }

    // Offsets in a vector over channels, and in an array [B, C].
    Pack of_channel(const T* vector) const { return Memory<Pack>::load(vector + channel); }
    Pack of_plane(const T* array) const {
        return Memory<Pack>::load(array + b * shape.channels + channel);
    }
    void set_plane(T* array, Pack value) const {
        Memory<Pack>::store(array + b * shape.channels + channel, value);
    }

    // Calls body(h, w) for every pixel of the first `rows` x `columns`, and end_of_row() after each
    // row.
    template <class Body, class EndOfRow>
    void for_each_pixel(int64_t rows, int64_t columns, const Body& body,
                        const EndOfRow& end_of_row) const {
        for (int64_t h = 0; h < rows; ++h) {
            for (int64_t w = 0; w < columns; ++w) body(h, w);
            end_of_row();
        }
    }
};

// Sum over the plane. Rows are summed separately and then added, so the rounding error grows like
// sqrt(height) + sqrt(width) units instead of sqrt(height * width).
template <class Pack>
struct Sum {
    Pack total{}, row{};

    void add(Pack value) { row += value; }
    void close_row() { total += row, row = Pack{}; }
};

template <class T, class Pack>
Channel<Pack> channel_of(const Plane<T, Pack>& plane, const T* mean, const T* rstd, const T* weight,
                         const T* bias) {
    return {plane.of_plane(mean), plane.of_plane(rstd), plane.of_channel(weight),
            plane.of_channel(bias)};
}

// Mean and 1/sqrt(variance + eps) in two passes, because the variance of differences does not
// cancel.
template <class T, class Pack>
Channel<Pack> measure(const Plane<T, Pack>& plane, const T* z, double eps, const T* weight,
                      const T* bias) {
    using M = Memory<Pack>;
    const int64_t height = plane.shape.height, width = plane.shape.width;
    Sum<Pack> sum, rest, square;
    plane.for_each_pixel(
        height, width, [&](int64_t h, int64_t w) { sum.add(M::load(z + plane.pixel(h, w))); },
        [&] { sum.close_row(); });
    const Pack guess = sum.total * plane.inverse_size();
    plane.for_each_pixel(
        height, width,
        [&](int64_t h, int64_t w) {
            const Pack d = M::load(z + plane.pixel(h, w)) - guess;
            rest.add(d);
            square.add(d * d);
        },
        [&] { rest.close_row(), square.close_row(); });
    const Moments<Pack> moments(guess, rest.total * plane.inverse_size(),
                                square.total * plane.inverse_size());
    const Pack rstd = T(1) / M::sqrt(moments.variance + static_cast<T>(eps));
    return {moments.mean, rstd, plane.of_channel(weight), plane.of_channel(bias)};
}

template <class Pack>
Pack select(decltype(Pack{} > Pack{}) condition, Pack yes) {
    return condition ? yes : Pack{};
}

template <class T, class Pack>
void norm_relu_pool_plane(const Plane<T, Pack>& plane, const NormReluPool<T>& p) {
    using M = Memory<Pack>;
    const Channel<Pack> channel = measure(plane, p.z, p.eps, p.weight, p.bias);
    plane.set_plane(p.mean, channel.mean);
    plane.set_plane(p.rstd, channel.rstd);
    const auto active = [&](int64_t h, int64_t w) {
        const Pack a = channel.activation(channel.normalized(M::load(p.z + plane.pixel(h, w))));
        return select<Pack>(a > Pack{}, a);
    };
    for (int64_t h = 0; h < plane.rows_pooled(); h += 2) {
        for (int64_t w = 0; w < plane.columns_pooled(); w += 2) {
            const Pack sum =
                active(h, w) + active(h, w + 1) + active(h + 1, w) + active(h + 1, w + 1);
            M::store(p.out + plane.pooled(h / 2, w / 2), sum * T(kPoolWeight));
        }
    }
}

template <class T, class Pack>
void norm_relu_pool_backward_plane(const Plane<T, Pack>& plane, const NormReluPoolBackward<T>& p) {
    using M = Memory<Pack>;
    const Channel<Pack> channel = channel_of(plane, p.mean, p.rstd, p.weight, p.bias);
    const auto upstream = [&](int64_t h, int64_t w, Pack x_hat) {
        const Pack grad = M::load(p.grad_out + plane.pooled(h / 2, w / 2)) * T(kPoolWeight);
        return select<Pack>(channel.activation(x_hat) > Pack{}, grad);
    };
    Sum<Pack> grad_sum, product_sum;
    plane.for_each_pixel(
        plane.rows_pooled(), plane.columns_pooled(),
        [&](int64_t h, int64_t w) {
            const Pack x_hat = channel.normalized(M::load(p.z + plane.pixel(h, w)));
            const Pack grad = upstream(h, w, x_hat);
            grad_sum.add(grad);
            product_sum.add(grad * x_hat);
        },
        [&] { grad_sum.close_row(), product_sum.close_row(); });
    plane.set_plane(p.grad_bias_parts, grad_sum.total);
    plane.set_plane(p.grad_weight_parts, product_sum.total);

    const BackwardMeans<Pack> means{grad_sum.total * plane.inverse_size(),
                                    product_sum.total * plane.inverse_size()};
    for (int64_t h = 0; h < p.shape.height; ++h) {
        for (int64_t w = 0; w < p.shape.width; ++w) {
            const int64_t at = plane.pixel(h, w);
            const Pack x_hat = channel.normalized(M::load(p.z + at));
            const bool pooled = h < plane.rows_pooled() && w < plane.columns_pooled();
            const Pack grad = pooled ? upstream(h, w, x_hat) : Pack{};
            M::store(p.grad_z + at, grad_z(channel, means, grad, x_hat));
        }
    }
}

template <class T, class Pack>
void norm_relu_pool_dual_plane(const Plane<T, Pack>& plane, const NormReluPoolDual<T>& p) {
    using M = Memory<Pack>;
    const Channel<Pack> channel = measure(plane, p.z, p.eps, p.weight, p.bias);
    Sum<Pack> tangent_sum, product_sum;
    plane.for_each_pixel(
        p.shape.height, p.shape.width,
        [&](int64_t h, int64_t w) {
            const int64_t at = plane.pixel(h, w);
            const Pack z_tangent = M::load(p.z_tangent + at);
            tangent_sum.add(z_tangent);
            product_sum.add((M::load(p.z + at) - channel.mean) * z_tangent);
        },
        [&] { tangent_sum.close_row(), product_sum.close_row(); });
    const ChannelTangent<Pack> tangent{tangent_sum.total * plane.inverse_size(),
                                       product_sum.total * plane.inverse_size() * channel.rstd,
                                       plane.of_channel(p.weight_tangent),
                                       plane.of_channel(p.bias_tangent)};
    plane.set_plane(p.mean, channel.mean);
    plane.set_plane(p.rstd, channel.rstd);
    plane.set_plane(p.mean_tangent, tangent.mean);
    plane.set_plane(p.kappa, tangent.kappa);

    for (int64_t h = 0; h < plane.rows_pooled(); h += 2) {
        for (int64_t w = 0; w < plane.columns_pooled(); w += 2) {
            Pack value{}, derivative{};
            for (int k = 0; k < 4; ++k) {
                const int64_t at = plane.pixel(h + k / 2, w + k % 2);
                const Pack x_hat = channel.normalized(M::load(p.z + at));
                const Pack x_hat_tangent =
                    tangent.normalized(channel, x_hat, M::load(p.z_tangent + at));
                const Pack a = channel.activation(x_hat);
                value += select<Pack>(a > Pack{}, a);
                derivative +=
                    select<Pack>(a > Pack{}, tangent.activation(channel, x_hat, x_hat_tangent));
            }
            const int64_t at = plane.pooled(h / 2, w / 2);
            M::store(p.out_tangent + at, derivative * T(kPoolWeight));
            if (p.out) M::store(p.out + at, value * T(kPoolWeight));
        }
    }
}

template <class T, class Pack>
void norm_relu_pool_dual_backward_plane(const Plane<T, Pack>& plane,
                                        const NormReluPoolDualBackward<T>& p) {
    using M = Memory<Pack>;
    const Channel<Pack> channel = channel_of(plane, p.mean, p.rstd, p.weight, p.bias);
    // The tangent of the bias stays 0, because nothing here depends on it.
    const ChannelTangent<Pack> tangent{plane.of_plane(p.mean_tangent), plane.of_plane(p.kappa),
                                       plane.of_channel(p.weight_tangent), Pack{}};
    struct Element {
        Pack x_hat, x_hat_tangent, grad, grad_tangent;
    };
    const auto element = [&](int64_t h, int64_t w, bool pooled) {
        const int64_t at = plane.pixel(h, w);
        Element e{};
        e.x_hat = channel.normalized(M::load(p.z + at));
        e.x_hat_tangent = tangent.normalized(channel, e.x_hat, M::load(p.z_tangent + at));
        if (pooled) {
            const int64_t above = plane.pooled(h / 2, w / 2);
            const auto active = channel.activation(e.x_hat) > Pack{};
            e.grad = select<Pack>(active, M::load(p.grad_out + above) * T(kPoolWeight));
            e.grad_tangent =
                select<Pack>(active, M::load(p.grad_out_tangent + above) * T(kPoolWeight));
        }
        return e;
    };
    Sum<Pack> grad_sum, product_sum, grad_tangent_sum, product_tangent_sum;
    plane.for_each_pixel(
        plane.rows_pooled(), plane.columns_pooled(),
        [&](int64_t h, int64_t w) {
            const Element e = element(h, w, true);
            grad_sum.add(e.grad);
            product_sum.add(e.grad * e.x_hat);
            grad_tangent_sum.add(e.grad_tangent);
            product_tangent_sum.add(e.grad_tangent * e.x_hat + e.grad * e.x_hat_tangent);
        },
        [&] {
            grad_sum.close_row(), product_sum.close_row();
            grad_tangent_sum.close_row(), product_tangent_sum.close_row();
        });
    plane.set_plane(p.grad_bias_tangent_parts, grad_tangent_sum.total);
    plane.set_plane(p.grad_weight_tangent_parts, product_tangent_sum.total);

    const T inverse = plane.inverse_size();
    const BackwardMeans<Pack> means{grad_sum.total * inverse, product_sum.total * inverse};
    const BackwardMeans<Pack> means_tangent{grad_tangent_sum.total * inverse,
                                            product_tangent_sum.total * inverse};
    for (int64_t h = 0; h < p.shape.height; ++h) {
        for (int64_t w = 0; w < p.shape.width; ++w) {
            const int64_t at = plane.pixel(h, w);
            const Element e = element(h, w, h < plane.rows_pooled() && w < plane.columns_pooled());
            const Pack derivative = grad_z_tangent(channel, tangent, means, means_tangent, e.grad,
                                                   e.grad_tangent, e.x_hat, e.x_hat_tangent);
            M::store(p.grad_z_tangent + at, derivative);
            if (p.grad_z) M::store(p.grad_z + at, grad_z(channel, means, e.grad, e.x_hat));
        }
    }
}

}  // namespace pdd::PDD_BACKEND
