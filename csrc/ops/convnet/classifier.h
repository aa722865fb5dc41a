// Linear layer: a few hundred thousand multiplications, compared with billions in the convolutions.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "core/vector.h"

namespace pdd::PDD_BACKEND {

template <class T>
struct Classifier {
    int64_t batch, features, classes;
    int threads;

    using V = Vector<T>;
    using M = Memory<V>;
    static constexpr int64_t lanes = kLanes<T, V>;

    // logits [B, K] (+)= x [B, F] by weight [K, F] transposed, + bias [K] if given.
    void forward(const T* x, const T* weight, const T* bias, T* logits, bool add) const {
        parallel_for(batch, threads, multiply_time<T>(classes * features), [&](int64_t b) {
            for (int64_t k = 0; k < classes; ++k) {
                T* to = logits + b * classes + k;
                *to = (add ? *to : T(0)) + (bias ? bias[k] : T(0)) +
                      dot(x + b * features, weight + k * features);
            }
        });
    }

    // grad [K, F] (+)= g [B, K] transposed by x [B, F].
    void weight_grad(const T* g, const T* x, T* grad, bool add) const {
        combine(classes, batch, add, grad, x,
                [&](int64_t k, int64_t b) { return g[b * classes + k]; });
    }

    // grad [B, F] (+)= g [B, K] by weight [K, F].
    void input_grad(const T* g, const T* weight, T* grad, bool add) const {
        combine(batch, classes, add, grad, weight,
                [&](int64_t b, int64_t k) { return g[b * classes + k]; });
    }

    // grad [K] = sum of g [B, K] over B.
    void bias_grad(const T* g, T* grad) const {
        for (int64_t k = 0; k < classes; ++k) {
            T sum = 0;
            for (int64_t b = 0; b < batch; ++b) sum += g[b * classes + k];
            grad[k] = sum;
        }
    }

  private:
    T dot(const T* a, const T* b) const {
        V sums[4] = {};  // four sums, so that an addition need not wait for the one before
        int64_t i = 0;
        for (; i + 4 * lanes <= features; i += 4 * lanes)
            for (int64_t j = 0; j < 4; ++j)
                sums[j] += M::load(a + i + j * lanes) * M::load(b + i + j * lanes);
        const V all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        T sum = 0;
        for (int64_t j = 0; j < lanes; ++j) sum += all[j];
        for (; i < features; ++i) sum += a[i] * b[i];
        return sum;
    }

    // to[r][f] (+)= sum over s of factor(r, s) * from[s][f].
    template <class Factor>
    void combine(int64_t rows, int64_t terms, bool add, T* to, const T* from,
                 const Factor& factor) const {
        constexpr int64_t run = 4 * lanes;
        parallel_for(rows, threads, multiply_time<T>(terms * features), [&](int64_t r) {
            int64_t f = 0;
            for (; f + run <= features; f += run) {
                V sums[4] = {};
                for (int64_t s = 0; s < terms; ++s)
                    for (int64_t j = 0; j < 4; ++j)
                        sums[j] += factor(r, s) * M::load(from + s * features + f + j * lanes);
                for (int64_t j = 0; j < 4; ++j) {
                    T* at = to + r * features + f + j * lanes;
                    M::store(at, add ? M::load(at) + sums[j] : sums[j]);
                }
            }
            for (; f < features; ++f) {
                T sum = 0;
                for (int64_t s = 0; s < terms; ++s) sum += factor(r, s) * from[s * features + f];
                T* at = to + r * features + f;
                *at = add ? *at + sum : sum;
            }
        });
    }
};

}  // namespace pdd::PDD_BACKEND
