#include "core/context.h"
#include "core/parallel.h"
#include "ops/cross_entropy/math.h"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {
namespace {

// Time per logit: an exponential and a few more operations, 5 nanoseconds.
template <class Params>
double time_of_sample(const Params& p) {
    return 5.0 * static_cast<double>(p.classes);
}

template <class Params>
Status check_labels(const Params& p) {
    if (p.hard) {
        for (int64_t b = 0; b < p.batch; ++b)
            if (p.hard[b] < 0 || p.hard[b] >= p.classes) return kLabelOutOfRange;
    }
    return kSuccess;
}

template <class T, class Params>
Label<T> label_of(const Params& p, int64_t b) {
    return {p.hard ? p.hard[b] : 0, p.soft ? p.soft + b * p.classes : nullptr};
}

}  // namespace

template <class T>
Status cross_entropy(const CrossEntropy<T>& p, Context context) {
    if (const Status bad = check_labels(p)) return bad;
    const T scale = T(1) / static_cast<T>(p.batch);
    parallel_for(p.batch, context.threads, time_of_sample(p), [&](int64_t b) {
        const int64_t row = b * p.classes;
        p.losses[b] = cross_entropy_sample(Alone{}, p.logits + row, label_of<T>(p, b), p.classes,
                                           scale, p.grad_logits + row);
    });
    return kSuccess;
}

template <class T>
Status cross_entropy_dual(const CrossEntropyDual<T>& p, Context context) {
    if (const Status bad = check_labels(p)) return bad;
    const T scale = T(1) / static_cast<T>(p.batch);
    parallel_for(p.batch, context.threads, time_of_sample(p), [&](int64_t b) {
        const int64_t row = b * p.classes;
        p.losses_tangent[b] = cross_entropy_dual_sample(
            Alone{}, p.logits + row, p.logits_tangent + row, label_of<T>(p, b), p.classes, scale,
            p.grad_logits + row, p.grad_logits_tangent + row,
            p.grad_labels_tangent ? p.grad_labels_tangent + row : nullptr);
    });
    return kSuccess;
}

PDD_INSTANTIATE(cross_entropy, CrossEntropy)
PDD_INSTANTIATE(cross_entropy_dual, CrossEntropyDual)

}  // namespace pdd::PDD_BACKEND
