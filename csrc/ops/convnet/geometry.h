// Shapes of the layers, and the offsets of their parameters in the flat vector.
#pragma once

#include <cstdint>

#include "ops/convnet/blocked.h"
#include "ops/convnet/params.h"

namespace pdd::PDD_BACKEND {

// One 3x3 convolution, padded by one pixel so that images keep their size.
struct LayerShape {
    int64_t batch, in_channels, out_channels, height, width;
    int64_t in_blocks, out_blocks;

    int64_t pixels() const { return height * width; }
};

// Passes that a layer is set up for.
struct Needs {
    bool backward;
    int numbers;  // 1: values; 2: values and tangents
};

inline LayerShape layer_shape(const ConvNetShape& s, int64_t layer) {
    const int64_t in = layer == 0 ? s.in_channels : s.channels;
    return {s.batch,
            in,
            s.channels,
            s.height >> layer,
            s.width >> layer,
            blocks_of(in),
            blocks_of(s.channels)};
}

// Offsets in the flat vector.
struct BlockOffsets {
    int64_t convolution, convolution_bias, weight, bias;
};

inline int64_t block_size(const ConvNetShape& s, int64_t in_channels) {
    return 9 * s.channels * in_channels + 3 * s.channels;
}

inline BlockOffsets block_offsets(const ConvNetShape& s, int64_t layer) {
    const int64_t start =
        layer == 0 ? 0 : block_size(s, s.in_channels) + (layer - 1) * block_size(s, s.channels);
    const int64_t end = start + block_size(s, layer == 0 ? s.in_channels : s.channels);
    return {start, end - 3 * s.channels, end - 2 * s.channels, end - s.channels};
}

inline int64_t features_of(const ConvNetShape& s) {
    return s.channels * (s.height >> s.depth) * (s.width >> s.depth);
}

// Offset of the linear layer's weight [K, F]; its bias [K] follows.
inline int64_t classifier_offset(const ConvNetShape& s) {
    return block_size(s, s.in_channels) + (s.depth - 1) * block_size(s, s.channels);
}

inline int64_t parameter_count(const ConvNetShape& s) {
    return classifier_offset(s) + s.classes * (features_of(s) + 1);
}

}  // namespace pdd::PDD_BACKEND
