// Numbers that are kept in 16 bits and computed with in 32: what tensors of torch.bfloat16 and
// torch.float16 hold.
#pragma once

#include <cstdint>

namespace pdd {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// What sums, statistics and per-channel vectors are held in, for images stored as T.
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
