// Layout of images inside a pass: blocks of 16 channels, [B, blocks, H, W, 16]. A plane of one
// block is contiguous (16 KB for 16x16 floats): it fits the first-level cache, and all of each
// cache line is used. Channels that fill up the last block are zero.
#pragma once

#include <cstdint>

#include "core/vector.h"

namespace pdd::PDD_BACKEND {

constexpr int64_t kBlock = 16;

inline int64_t blocks_of(int64_t channels) {
    return (channels + kBlock - 1) / kBlock;
}

// Vectors in a block.
template <class T>
constexpr int kVectors = static_cast<int>(kBlock) / kLanes<T, Vector<T>>;

template <class T>
struct BlockedImages {
    T* data;
    int64_t blocks, pixels;

    T* plane(int64_t image, int64_t block) const {
        return data + (image * blocks + block) * pixels * kBlock;
    }
    T* image(int64_t i) const { return plane(i, 0); }
};

// Hands out parts of a buffer, each aligned to 64 bytes; without a buffer it only counts.
template <class T>
class Arena {
  public:
    explicit Arena(T* base) : base_(base) {}

    T* take(int64_t elements) {
        T* part = base_ ? base_ + used_ : nullptr;
        used_ += (elements + kBlock - 1) / kBlock * kBlock;
        return part;
    }
    BlockedImages<T> images(int64_t count, int64_t blocks, int64_t pixels) {
        return {take(count * blocks * pixels * kBlock), blocks, pixels};
    }
    int64_t used() const { return used_; }

  private:
    T* base_;
    int64_t used_ = 0;
};

}  // namespace pdd::PDD_BACKEND
