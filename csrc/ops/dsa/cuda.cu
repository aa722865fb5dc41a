// One block is one image. The block reads the image into shared memory, applies the operations
// between two planar buffers there, and writes the result, so device memory is read once and
// written once for any number of operations. Images that are too large for shared memory use
// scratch memory on the device.
#include "core/context.h"
#include "core/cuda.cuh"
#include "ops/dsa/math.h"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {
namespace {

constexpr int kThreads = 256;

// Layout of an image in memory: one run of elements, channel by channel or pixel by pixel, or
// neither.
enum class Layout : int { planar, channels_last, strided };

// Sizes of the image for index arithmetic with many divisions, which take three times as long in 64
// bits. pdd_fast/ops/dsa.py refuses images of 2^31 elements and more.
struct Size {
    int channels, height, width;

    __device__ explicit Size(const ImageShape& s)
        : channels(static_cast<int>(s.channels)),
          height(static_cast<int>(s.height)),
          width(static_cast<int>(s.width)) {}
    __device__ int pixels() const { return height * width; }
    __device__ int elements() const { return channels * height * width; }
};

// Calls body(k) for k in [0, count), shared among the block's threads.
template <class Body>
__device__ __forceinline__ void for_each(int count, const Body& body) {
    for (int k = static_cast<int>(threadIdx.x); k < count; k += kThreads) body(k);
}

// Calls body(planar index, offset in memory) for every element of image b that does not move in
// packs.
template <class Body>
__device__ __forceinline__ void each_strided(const int64_t (&stride)[4], const Size& size,
                                             const Body& body) {
    for_each(size.elements(), [&](int k) {
        const int pixel = k % size.pixels();
        body(k, k / size.pixels() * stride[1] + pixel / size.width * stride[2] +
                    pixel % size.width * stride[3]);
    });
}

// Returns the planar index of the k-th element in memory.
__device__ __forceinline__ int planar_index(Layout layout, const Size& size, int k) {
    return layout == Layout::planar ? k : k % size.channels * size.pixels() + k / size.channels;
}

// `packed`: images begin at multiples of a pack and consist of whole packs.
template <class T>
__device__ void load(const T* image, const int64_t (&stride)[4], Layout layout, bool packed,
                     const Size& size, Compute<T>* planar) {
    constexpr int V = kPack<T>;
    if (layout == Layout::strided) {
        each_strided(stride, size,
                     [&](int k, int64_t at) { planar[k] = load_pack<1>(image + at).get(0); });
    } else if (packed) {
        for_each(size.elements() / V, [&](int n) {
            const Pack<T, V> pack = load_pack<V>(image + n * V);
#pragma unroll
            for (int v = 0; v < V; ++v) planar[planar_index(layout, size, n * V + v)] = pack.get(v);
        });
    } else {
        for_each(size.elements(), [&](int k) {
            planar[planar_index(layout, size, k)] = load_pack<1>(image + k).get(0);
        });
    }
}

template <class T>
__device__ void store(T* image, const int64_t (&stride)[4], Layout layout, bool packed,
                      const Size& size, const Compute<T>* planar) {
    constexpr int V = kPack<T>;
    if (layout == Layout::strided) {
        each_strided(stride, size, [&](int k, int64_t at) { image[at] = narrow<T>(planar[k]); });
    } else if (packed) {
        for_each(size.elements() / V, [&](int n) {
            Pack<T, V> pack;
#pragma unroll
            for (int v = 0; v < V; ++v) pack.set(v, planar[planar_index(layout, size, n * V + v)]);
            store_pack(image + n * V, pack);
        });
    } else {
        for_each(size.elements(),
                 [&](int k) { image[k] = narrow<T>(planar[planar_index(layout, size, k)]); });
    }
}

template <class S>
__device__ void saturate(S* image, const Size& size, S factor) {
    const int pixels = size.pixels();
    const S inverse = S(1) / static_cast<S>(size.channels);
    for_each(pixels, [&](int k) {
        S mean = 0;
        for (int c = 0; c < size.channels; ++c) mean += image[c * pixels + k];
        mean *= inverse;
        for (int c = 0; c < size.channels; ++c)
            image[c * pixels + k] = blend(image[c * pixels + k], mean, factor);
    });
    __syncthreads();
}

template <class S>
__device__ void contrast(S* image, const Size& size, S factor, S* partial) {
    S sum = 0;
    for_each(size.elements(), [&](int k) { sum += image[k]; });
    const S mean = block_sum(sum, partial) / static_cast<S>(size.elements());
    for_each(size.elements(), [&](int k) { image[k] = blend(image[k], mean, factor); });
    __syncthreads();
}

template <class S>
__device__ void shift(const S* image, S* out, const Size& size, int64_t u, int64_t v) {
    for_each(size.elements(), [&](int k) {
        const int row = k / size.width;
        const int64_t i = row % size.height + u, j = k % size.width + v;
        const bool inside = i >= 0 && i < size.height && j >= 0 && j < size.width;
        out[k] = inside ? image[(row + u) * size.width + j] : S(0);
    });
}

template <class S>
__device__ void cutout(S* image, const Size& size, const Box& box) {
    for_each(size.elements(), [&](int k) {
        if (box.contains(k / size.width % size.height, k % size.width)) image[k] = S(0);
    });
}

template <class S>
__device__ void mirror(const S* image, S* out, const Size& size) {
    for_each(size.elements(), [&](int k) {
        const int j = k % size.width;
        out[k] = image[k - j + size.width - 1 - j];
    });
}

template <class S>
__device__ void sample(const S* image, S* out, const ImageShape& shape, const Size& size,
                       const Sampling& sampling) {
    for_each(size.pixels(), [&](int k) {
        const Taps taps(sampling, shape, k / size.width, k % size.width);
        for (int c = 0; c < size.channels; ++c)
            out[c * size.pixels() + k] = taps.sample(image + c * size.pixels(), shape);
    });
}

template <class S>
__device__ void sample_adjoint(const S* grad, S* out, const ImageShape& shape, const Size& size,
                               const Sampling& sampling) {
    for_each(size.pixels(), [&](int k) {
        const int p = k / size.width, q = k % size.width;
        const Reach reach(sampling, shape, p, q);
        for (int c = 0; c < size.channels; ++c)
            out[c * size.pixels() + k] =
                gather(grad + c * size.pixels(), sampling, reach, shape, p, q);
    });
}

// Applies one operation, or its transpose, to image, with out as the other buffer. Returns the
// buffer that holds the result.
template <class T, class S>
__device__ S* apply(int operation, bool adjoint, AugParams aug_params, const ImageShape& shape,
                    const Dsa<T>& p, S* image, S* out, S* partial) {
    const Size size(shape);
    const int64_t sign = adjoint ? -1 : 1;
    switch (operation) {
        case kNothing:
            return image;
        case kColor:
            if (adjoint) {
                contrast(image, size, static_cast<S>(aug_params[kContrast]), partial);
                saturate(image, size, static_cast<S>(aug_params[kSaturation]));
            } else {
                if (!p.linear) {
                    const S brightness = static_cast<S>(aug_params[kBrightness]);
                    for_each(size.elements(), [&](int k) { image[k] += brightness; });
                    __syncthreads();
                }
                saturate(image, size, static_cast<S>(aug_params[kSaturation]));
                contrast(image, size, static_cast<S>(aug_params[kContrast]), partial);
            }
            return image;
        case kCrop:
            shift(image, out, size, sign * aug_params.integer(kShiftH),
                  sign * aug_params.integer(kShiftW));
            break;
        case kCutout:
            cutout(image, size, cutout_box(aug_params, p.cutout_height, p.cutout_width));
            __syncthreads();
            return image;
        case kFlip:
            if (aug_params[kFlipped] == 0) return image;
            mirror(image, out, size);
            break;
        case kScale:
        case kRotate: {
            const Sampling sampling =
                operation == kScale ? scaling(aug_params, shape) : rotation(aug_params, shape);
            if (adjoint) {
                sample_adjoint(image, out, shape, size, sampling);
            } else {
                sample(image, out, shape, size, sampling);
            }
            break;
        }
        default:  // the host has not seen the codes: NaN shows an invalid one
            for_each(size.elements(), [&](int k) { image[k] = static_cast<S>(NAN); });
            __syncthreads();
            return image;
    }
    __syncthreads();
    return out;
}

struct Plan {
    Layout input, output;
    bool packed_input, packed_output, adjoint;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) dsa_kernel(const Dsa<T> p, const Plan plan) {
    using S = Compute<T>;
    __shared__ S partial[kThreads / 32];
    const ImageShape shape{p.channels, p.height, p.width};
    const Size size(shape);
    S* first = p.scratch ? p.scratch + int64_t{2} * blockIdx.x * size.elements()
                         : reinterpret_cast<S*>(dynamic_shared());
    S* second = first + size.elements();
    for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
        const AugParams aug_params{p.aug_params + b, p.batch};
        S* image = first;
        load(p.input + b * p.input_stride[0], p.input_stride, plan.input, plan.packed_input, size,
             image);
        __syncthreads();
        for (int64_t n = 0; n < p.operation_count; ++n) {
            const int64_t number = plan.adjoint ? p.operation_count - 1 - n : n;
            image = apply(p.operations[number * p.batch + b], plan.adjoint, aug_params, shape, p,
                          image, image == first ? second : first, partial);
        }
        store(p.output + b * p.output_stride[0], p.output_stride, plan.output, plan.packed_output,
              size, image);
        __syncthreads();
    }
}

// An axis of one element may have any stride.
Layout layout_of(const ImageShape& s, const int64_t (&stride)[4]) {
    const auto is = [&](int64_t of_channel, int64_t of_row, int64_t of_column) {
        return (s.channels == 1 || stride[1] == of_channel) &&
               (s.height == 1 || stride[2] == of_row) && (s.width == 1 || stride[3] == of_column);
    };
    if (is(s.height * s.width, s.width, 1)) return Layout::planar;
    if (is(1, s.width * s.channels, s.channels)) return Layout::channels_last;
    return Layout::strided;
}

template <class T>
bool in_packs(const ImageShape& shape, const int64_t (&stride)[4], const T* images) {
    return shape.elements() % kPack<T> == 0 && stride[0] % kPack<T> == 0 && aligned(images);
}

int64_t shared_bytes(const ImageShape& shape, int number_bytes) {
    return 2 * shape.elements() * number_bytes;
}

// Returns the dynamic shared memory that a block may have on the device, in bytes. The kernel's
// static shared memory and the driver take less than 1 KB.
int64_t most_shared_bytes(int device) {
    int most = 0;
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return most - 1024;
}

// Allows the kernel all of this memory, always the same amount. A limit that followed the image
// size would be lowered by smaller images, below what the launches of a captured graph need.
template <class T>
cudaError_t allow_shared_memory() {
    int device = 0;
    cudaGetDevice(&device);
    return cudaFuncSetAttribute(dsa_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(most_shared_bytes(device)));
}

template <class T>
Status run(const Dsa<T>& p, bool adjoint, Context context) {
    const ImageShape shape{p.channels, p.height, p.width};
    const Plan plan{layout_of(shape, p.input_stride), layout_of(shape, p.output_stride),
                    in_packs(shape, p.input_stride, p.input),
                    in_packs(shape, p.output_stride, p.output), adjoint};
    if (p.scratch)
        return launch(dsa_kernel<T>, grid_for(p.scratch_images), kThreads, 0, context, p, plan);
    const int64_t bytes = shared_bytes(shape, static_cast<int>(sizeof(Compute<T>)));
    constexpr int64_t without_asking =
        47 * 1024;  // of 48 KB, without the kernel's static shared memory
    if (bytes > without_asking) {
        const cudaError_t error = allow_shared_memory<T>();
        if (error != cudaSuccess) {
            cudaGetLastError();
            return static_cast<Status>(error);
        }
    }
    return launch(dsa_kernel<T>, grid_for(p.batch), kThreads, static_cast<size_t>(bytes), context,
                  p, plan);
}

}  // namespace

int64_t dsa_scratch_images(DsaShape s, int number_bytes) {
    const int64_t bytes = shared_bytes({s.channels, s.height, s.width}, number_bytes);
    int device = 0, processors = 0;
    cudaGetDevice(&device);
    if (bytes <= most_shared_bytes(device)) return 0;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    const int64_t blocks =
        8 * static_cast<int64_t>(processors);  // as many as run on the device at a time
    return s.batch < blocks ? s.batch : blocks;
}

template <class T>
Status dsa(const Dsa<T>& p, Context context) {
    return run(p, false, context);
}

template <class T>
Status dsa_adjoint(const Dsa<T>& p, Context context) {
    return run(p, true, context);
}

PDD_INSTANTIATE_HALF(dsa, Dsa)
PDD_INSTANTIATE_HALF(dsa_adjoint, Dsa)

}  // namespace pdd::PDD_BACKEND
