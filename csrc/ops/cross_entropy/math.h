// Formulas of softmax cross-entropy for one sample, value and dual, shared by the CPU and CUDA back
// ends.
//   loss = -sum_k y_k log p_k,   p = softmax(l)
//   gradient of the batch mean: (p_k sum(y) - y_k) / B
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace pdd::PDD_BACKEND {

// Group that works on a row of logits: a single thread here, a warp in cuda.cu. A member handles
// every step-th class from its first; sum and max are over the members and the same for all of
// them.
struct Alone {
    static constexpr int64_t first = 0, step = 1;

    template <class T>
    PDD_HD T sum(T value) const {
        return value;
    }
    template <class T>
    PDD_HD T max(T value) const {
        return value;
    }
};

// log(sum(exp)) of a row of logits. The arguments of exp are never positive.
template <class Team, class T>
PDD_HD T log_sum_exp(const Team& team, const T* logits, int64_t classes) {
    T largest = logits[0];
    for (int64_t k = team.first; k < classes; k += team.step)
        largest = logits[k] > largest ? logits[k] : largest;
    largest = team.max(largest);
    T sum = 0;
    for (int64_t k = team.first; k < classes; k += team.step) sum += exp(logits[k] - largest);
    return largest + log(team.sum(sum));
}

// Weight that the label gives to class k.
template <class T>
struct Label {
    int64_t index;  // hard label; unused if soft is given
    const T* soft;  // [K] or nullptr

    PDD_HD T weight(int64_t k) const { return soft ? soft[k] : static_cast<T>(k == index); }
    template <class Team>
    PDD_HD T total(const Team& team, int64_t classes) const {
        if (!soft) return T(1);
        T sum = 0;
        for (int64_t k = team.first; k < classes; k += team.step) sum += soft[k];
        return team.sum(sum);
    }
    // A label outside [0, K) must not be ignored silently: NaN shows it.
    PDD_HD T poison(int64_t classes) const {
        return soft || (index >= 0 && index < classes) ? T(0) : static_cast<T>(NAN);
    }
};

// Loss, the same for all members.
template <class Team, class T>
PDD_HD T cross_entropy_sample(const Team& team, const T* logits, Label<T> label, int64_t classes,
                              T scale, T* grad) {
    const T lse = log_sum_exp(team, logits, classes);
    const T total = label.total(team, classes);
    T sum = 0;
    for (int64_t k = team.first; k < classes; k += team.step) {
        const T log_p = logits[k] - lse;
        const T y = label.weight(k);
        if (y != T(0)) sum -= y * log_p;  // 0 * log 0 is 0: a class of weight 0 may have logit -inf
        grad[k] = (exp(log_p) * total - y) * scale;
    }
    return team.sum(sum) + label.poison(classes);
}

// Tangent of the loss, the same for all members.
template <class Team, class T>
PDD_HD T cross_entropy_dual_sample(const Team& team, const T* logits, const T* tangent,
                                   Label<T> label, int64_t classes, T scale, T* grad,
                                   T* grad_tangent, T* grad_label_tangent) {
    const T lse = log_sum_exp(team, logits, classes);
    T lse_tangent = 0;
    for (int64_t k = team.first; k < classes; k += team.step)
        lse_tangent += exp(logits[k] - lse) * tangent[k];
    lse_tangent = team.sum(lse_tangent);
    const T total = label.total(team, classes);
    T sum = 0;
    for (int64_t k = team.first; k < classes; k += team.step) {
        const T p = exp(logits[k] - lse);
        const T log_p_tangent = tangent[k] - lse_tangent;
        const T y = label.weight(k);
        sum -= y * log_p_tangent;
        grad[k] = (p * total - y) * scale;
        grad_tangent[k] = p * log_p_tangent * total * scale;
        if (grad_label_tangent) grad_label_tangent[k] = -log_p_tangent * scale;
    }
    return team.sum(sum) + label.poison(classes);
}

}  // namespace pdd::PDD_BACKEND
