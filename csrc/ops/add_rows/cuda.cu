// Each thread computes one element of the result (four if rows are a multiple of 16 bytes) and
// searches the whole index. The index is a few hundred integers that all threads of a block read
// together, so the cost is that of the rows. Without atomics and in the order of the index, the
// bits are the same every time. Sorting the index first, as index_put_ does, takes five more
// launches.
#include "core/context.h"
#include "core/cuda.cuh"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {
namespace {

constexpr int kThreads = 256;

template <class T, int V>
__global__ void __launch_bounds__(kThreads) add_rows_kernel(const AddRows<T> p) {
    const int64_t packs = p.length / V, tasks = p.count * packs;
    for (int64_t task = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; task < tasks;
         task += static_cast<int64_t>(gridDim.x) * kThreads) {
        const int64_t j = task / packs, k = task % packs * V;
        Pack<T, V> sum = load_pack<V>(p.target + j * p.length + k);
        for (int64_t r = 0; r < p.added; ++r) {
            if (p.index[r] != j) continue;
            const Pack<T, V> row = load_pack<V>(p.rows + r * p.length + k);
#pragma unroll
            for (int v = 0; v < V; ++v) sum.set(v, sum.get(v) + row.get(v));
        }
        store_pack(p.out + j * p.length + k, sum);
    }
}

}  // namespace

template <class T>
Status add_rows(const AddRows<T>& p, Context context) {
    constexpr int V = kPack<T>;
    const bool packed = p.length % V == 0 && aligned(p.target, p.rows, p.out);
    const int64_t tasks = packed ? p.count * p.length / V : p.count * p.length;
    return launch(packed ? add_rows_kernel<T, V> : add_rows_kernel<T, 1>,
                  grid_for((tasks + kThreads - 1) / kThreads), kThreads, 0, context, p);
}

PDD_INSTANTIATE(add_rows, AddRows)

}  // namespace pdd::PDD_BACKEND
