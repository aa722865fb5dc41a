// One block is one image. It is read into shared memory, goes through the operations between two planar
// buffers there, and is written back, so device memory is read once and written once whatever the number of
// operations.
#include "core/context.h"
#include "core/cuda.cuh"
#include "ops/dsa/math.h"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {
namespace {

constexpr int kThreads = 256;

// Calls body(k) for k in [0, count), shared among the block's threads.
template <class Body>
__device__ __forceinline__ void for_each(int64_t count, const Body& body) {
    for (int64_t k = threadIdx.x; k < count; k += kThreads) body(k);
}

template <class T>
__device__ int64_t offset(const int64_t (&stride)[4], int64_t b, const ImageShape& shape, int64_t k) {
    const int64_t pixel = k % shape.pixels();
    return b * stride[0] + k / shape.pixels() * stride[1] + pixel / shape.width * stride[2] +
           pixel % shape.width * stride[3];
}

template <class T>
__device__ void saturate(T* image, const ImageShape& shape, T factor) {
    const int64_t pixels = shape.pixels();
    const T inverse = T(1) / static_cast<T>(shape.channels);
    for_each(pixels, [&](int64_t k) {
        T mean = 0;
        for (int64_t c = 0; c < shape.channels; ++c) mean += image[c * pixels + k];
        mean *= inverse;
        for (int64_t c = 0; c < shape.channels; ++c) image[c * pixels + k] = blend(image[c * pixels + k], mean, factor);
    });
    __syncthreads();
}

template <class T>
__device__ void contrast(T* image, const ImageShape& shape, T factor, T* partial) {
    T sum = 0;
    for_each(shape.elements(), [&](int64_t k) { sum += image[k]; });
    const T mean = block_sum(sum, partial) / static_cast<T>(shape.elements());
    for_each(shape.elements(), [&](int64_t k) { image[k] = blend(image[k], mean, factor); });
    __syncthreads();
}

template <class T>
__device__ void shift(const T* image, T* out, const ImageShape& shape, int64_t u, int64_t v) {
    for_each(shape.elements(), [&](int64_t k) {
        const int64_t row = k / shape.width, j = k % shape.width + v;
        const int64_t i = row % shape.height + u;
        const bool inside = i >= 0 && i < shape.height && j >= 0 && j < shape.width;
        out[k] = inside ? image[(row + u) * shape.width + j] : T(0);
    });
}

template <class T>
__device__ void cutout(T* image, const ImageShape& shape, const Box& box) {
    for_each(shape.elements(), [&](int64_t k) {
        if (box.contains(k / shape.width % shape.height, k % shape.width)) image[k] = T(0);
    });
}

template <class T>
__device__ void mirror(const T* image, T* out, const ImageShape& shape) {
    for_each(shape.elements(), [&](int64_t k) {
        const int64_t j = k % shape.width;
        out[k] = image[k - j + shape.width - 1 - j];
    });
}

template <class T>
__device__ void sample(const T* image, T* out, const ImageShape& shape, const Sampling& sampling) {
    for_each(shape.pixels(), [&](int64_t k) {
        const Taps taps(sampling, shape, k / shape.width, k % shape.width);
        for (int64_t c = 0; c < shape.channels; ++c)
            out[c * shape.pixels() + k] = taps.sample(image + c * shape.pixels(), shape);
    });
}

template <class T>
__device__ void sample_adjoint(const T* grad, T* out, const ImageShape& shape, const Sampling& sampling) {
    for_each(shape.pixels(), [&](int64_t k) {
        const int64_t p = k / shape.width, q = k % shape.width;
        const Reach reach(sampling, shape, p, q);
        for (int64_t c = 0; c < shape.channels; ++c)
            out[c * shape.pixels() + k] = gather(grad + c * shape.pixels(), sampling, reach, shape, p, q);
    });
}

// Applies one operation, or its transpose, to image; out is the other buffer. Gives the one that holds the
// result.
template <class T>
__device__ T* apply(int operation, bool adjoint, bool linear, Draws draws, const ImageShape& shape, const Dsa<T>& p,
                    T* image, T* out, T* partial) {
    const int64_t sign = adjoint ? -1 : 1;
    switch (operation) {
        case kColor:
            if (adjoint) {
                contrast(image, shape, static_cast<T>(draws[kContrast]), partial);
                saturate(image, shape, static_cast<T>(draws[kSaturation]));
            } else {
                if (!linear) {
                    const T brightness = static_cast<T>(draws[kBrightness]);
                    for_each(shape.elements(), [&](int64_t k) { image[k] += brightness; });
                    __syncthreads();
                }
                saturate(image, shape, static_cast<T>(draws[kSaturation]));
                contrast(image, shape, static_cast<T>(draws[kContrast]), partial);
            }
            return image;
        case kCrop:
            shift(image, out, shape, sign * draws.integer(kShiftH), sign * draws.integer(kShiftW));
            break;
        case kCutout:
            cutout(image, shape, cutout_box(draws, p.cutout_height, p.cutout_width));
            __syncthreads();
            return image;
        case kFlip:
            if (draws[kFlipped] == 0) return image;
            mirror(image, out, shape);
            break;
        default: {
            const Sampling sampling = operation == kScale ? scaling(draws, shape) : rotation(draws, shape);
            if (adjoint) {
                sample_adjoint(image, out, shape, sampling);
            } else {
                sample(image, out, shape, sampling);
            }
        }
    }
    __syncthreads();
    return out;
}

template <class T>
__global__ void __launch_bounds__(kThreads) dsa_kernel(const Dsa<T> p, bool adjoint) {
    const ImageShape shape{p.channels, p.height, p.width};
    T* partial = reinterpret_cast<T*>(dynamic_shared());  // one per warp
    T* first = partial + kThreads / 32;
    T* second = first + shape.elements();
    for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
        const Draws draws{p.draws + b, p.batch};
        T* image = first;
        for_each(shape.elements(), [&](int64_t k) { image[k] = p.input[offset<T>(p.input_stride, b, shape, k)]; });
        __syncthreads();
        for (int n = 0; n < p.operation_count; ++n) {
            const int operation = p.operations[adjoint ? p.operation_count - 1 - n : n];
            image =
                apply(operation, adjoint, p.linear, draws, shape, p, image, image == first ? second : first, partial);
        }
        for_each(shape.elements(), [&](int64_t k) { p.output[offset<T>(p.output_stride, b, shape, k)] = image[k]; });
        __syncthreads();
    }
}

template <class T>
Status run(const Dsa<T>& p, bool adjoint, Context context) {
    for (int k = 0; k < p.operation_count; ++k)
        if (p.operations[k] < kColor || p.operations[k] > kRotate) return kUnknownOperation;
    const ImageShape shape{p.channels, p.height, p.width};
    const int64_t bytes = (2 * shape.elements() + kThreads / 32) * static_cast<int64_t>(sizeof(T));
    constexpr int64_t without_asking = 48 * 1024;
    if (bytes > without_asking) {
        int device = 0, most = 0;
        cudaGetDevice(&device);
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (bytes > most) return kSharedMemoryTooSmall;
        const cudaError_t error =
            cudaFuncSetAttribute(dsa_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
        if (error != cudaSuccess) return static_cast<Status>(error);
    }
    return launch(dsa_kernel<T>, grid_for(p.batch), kThreads, static_cast<size_t>(bytes), context, p, adjoint);
}

}  // namespace

template <class T>
Status dsa(const Dsa<T>& p, Context context) {
    return run(p, false, context);
}

template <class T>
Status dsa_adjoint(const Dsa<T>& p, Context context) {
    return run(p, true, context);
}

PDD_INSTANTIATE(dsa, Dsa)
PDD_INSTANTIATE(dsa_adjoint, Dsa)

}  // namespace pdd::PDD_BACKEND
