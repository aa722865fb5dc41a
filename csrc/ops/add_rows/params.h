// Rows added where an index says, an index maybe more than once: what goes in and out. n = rows of
// the result, b = rows added, D = numbers in a row.
#pragma once

#include <cstdint>

namespace pdd {

template <class T>
struct AddRows {
    int64_t count, added, length;  // n, b, D
    const T* target;               // [n, D]
    const int64_t* index;          // [b], each in [0, n); others add nothing
    const T* rows;                 // [b, D]
    T* out;  // [n, D] target[j] + sum of rows[r] over index[r] == j, in the order of r
};

}  // namespace pdd
