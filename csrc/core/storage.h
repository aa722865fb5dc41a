// Types that are stored in 16 bits and computed in 32: the elements of torch.bfloat16 and
// torch.float16.
#pragma once

#include <cstdint>

namespace pdd {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// Type of sums, statistics and per-channel vectors for images stored as T.
template <class T>
struct ComputeOf {
    using type = T;
};
template <>
struct ComputeOf<bfloat16> {
    using type = float;
};
template <>
struct ComputeOf<float16> {
    using type = float;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

}  // namespace pdd
