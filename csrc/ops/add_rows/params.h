// Parameters of adding rows at indices, where an index may occur more than once. n = rows of the
// result, b = added rows, D = elements of a row.
#pragma once

#include <cstdint>

namespace pdd {

template <class T>
struct AddRows {
    int64_t count, added, length;  // n, b, D
    const T* target;               // [n, D]
    const int64_t* index;          // [b], in [0, n); rows of others are ignored
    const T* rows;                 // [b, D]
    T* out;  // [n, D] target[j] + sum of rows[r] with index[r] == j, in the order of r
};

}  // namespace pdd
