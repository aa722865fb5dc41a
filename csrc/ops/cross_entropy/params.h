// Parameters of softmax cross-entropy. B = batch, K = classes.
#pragma once

#include <cstdint>

namespace pdd {

template <class T>
struct CrossEntropy {
    int64_t batch, classes;
    const T* logits;      // [B, K]
    const int64_t* hard;  // [B] class indices, or nullptr
    const T* soft;        // [B, K] weights of the classes, or nullptr
    T* losses;            // [B]
    T* grad_logits;       // [B, K] gradient of the mean loss
};

template <class T>
struct CrossEntropyDual {
    int64_t batch, classes;
    const T* logits;          // [B, K]
    const T* logits_tangent;  // [B, K]
    const int64_t* hard;      // [B], or nullptr
    const T* soft;            // [B, K], or nullptr
    T* losses_tangent;        // [B]
    T* grad_logits;           // [B, K]
    T* grad_logits_tangent;   // [B, K]
    T* grad_labels_tangent;   // [B, K], or nullptr
};

}  // namespace pdd
