// One task is one row of the result, so no two threads add to the same element.
#include "core/context.h"
#include "core/parallel.h"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {

template <class T>
Status add_rows(const AddRows<T>& p, Context context) {
    for (int64_t r = 0; r < p.added; ++r)
        if (p.index[r] < 0 || p.index[r] >= p.count) return kRowOutOfRange;
    // A task copies a row of the target, searches the index, and adds the matching rows: one or
    // none in most cases.
    const double each = move_time<T>(4 * p.length + p.added);
    parallel_for(p.count, context.threads, each, [&](int64_t j) {
        T* out = p.out + j * p.length;
        const T* target = p.target + j * p.length;
        for (int64_t k = 0; k < p.length; ++k) out[k] = target[k];
        for (int64_t r = 0; r < p.added; ++r) {
            if (p.index[r] != j) continue;
            const T* row = p.rows + r * p.length;
            for (int64_t k = 0; k < p.length; ++k) out[k] += row[k];
        }
    });
    return kSuccess;
}

PDD_INSTANTIATE(add_rows, AddRows)

}  // namespace pdd::PDD_BACKEND
