// The formulas of softmax cross-entropy for one sample, value and dual, shared by the CPU and CUDA back ends.
//   loss = -sum_k y_k log p_k,   p = softmax(l),   gradient of the batch mean: (p_k sum(y) - y_k) / B
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace pdd::PDD_BACKEND {

// max and log(sum(exp)) of one row of logits; exp never sees a positive argument.
template <class T>
struct LogSumExp {
    T value;

    PDD_HD LogSumExp(const T* logits, int64_t classes) {
        T largest = logits[0];
        for (int64_t k = 1; k < classes; ++k) largest = logits[k] > largest ? logits[k] : largest;
        T sum = 0;
        for (int64_t k = 0; k < classes; ++k) sum += exp(logits[k] - largest);
        value = largest + log(sum);
    }
};

// The weight that the label gives to class k.
template <class T>
struct Label {
    int64_t index;  // hard label; unused where soft is given
    const T* soft;  // [K] or nullptr

    PDD_HD T weight(int64_t k) const { return soft ? soft[k] : static_cast<T>(k == index); }
    PDD_HD T total(int64_t classes) const {
        if (!soft) return T(1);
        T sum = 0;
        for (int64_t k = 0; k < classes; ++k) sum += soft[k];
        return sum;
    }
    // A label outside [0, K) would train on nothing without a word; NaN is seen.
    PDD_HD T poison(int64_t classes) const {
        return soft || (index >= 0 && index < classes) ? T(0) : static_cast<T>(NAN);
    }
};

template <class T>
PDD_HD void cross_entropy_sample(const T* logits, Label<T> label, int64_t classes, T scale, T* loss, T* grad) {
    const T lse = LogSumExp<T>(logits, classes).value;
    const T total = label.total(classes);
    T sum = label.poison(classes);
    for (int64_t k = 0; k < classes; ++k) {
        const T log_p = logits[k] - lse;
        const T y = label.weight(k);
        if (y != T(0)) sum -= y * log_p;  // 0 * log 0 is 0: a class of weight 0 may have a logit of -inf
        grad[k] = (exp(log_p) * total - y) * scale;
    }
    *loss = sum;
}

template <class T>
PDD_HD void cross_entropy_dual_sample(const T* logits, const T* tangent, Label<T> label, int64_t classes, T scale,
                                      T* loss_tangent, T* grad, T* grad_tangent, T* grad_label_tangent) {
    const T lse = LogSumExp<T>(logits, classes).value;
    T lse_tangent = 0;
    for (int64_t k = 0; k < classes; ++k) lse_tangent += exp(logits[k] - lse) * tangent[k];
    const T total = label.total(classes);
    T sum = label.poison(classes);
    for (int64_t k = 0; k < classes; ++k) {
        const T p = exp(logits[k] - lse);
        const T log_p_tangent = tangent[k] - lse_tangent;
        const T y = label.weight(k);
        sum -= y * log_p_tangent;
        grad[k] = (p * total - y) * scale;
        grad_tangent[k] = p * log_p_tangent * total * scale;
        if (grad_label_tangent) grad_label_tangent[k] = -log_p_tangent * scale;
    }
    *loss_tangent = sum;
}

}  // namespace pdd::PDD_BACKEND
