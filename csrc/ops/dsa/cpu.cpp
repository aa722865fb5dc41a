// One task is one image. It is copied to planar scratch, goes through the operations between two buffers that
// stay in the first- or second-level cache (12 KB each for 3x32x32 floats), and is written back in the layout
// of the output.
#include <atomic>
#include <cstdlib>

#include "core/context.h"
#include "core/parallel.h"
#include "ops/dsa/math.h"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {
namespace {

// Two planar buffers and which of them holds the image now.
template <class T>
class Scratch {
  public:
    explicit Scratch(ImageShape shape)
        : elements_(shape.elements()), memory_(static_cast<T*>(std::malloc(2 * elements_ * sizeof(T)))) {}
    explicit operator bool() const { return memory_ != nullptr; }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

    T* image() { return memory_ + (second_ ? elements_ : 0); }
    T* other() { return memory_ + (second_ ? 0 : elements_); }
    void swap() { second_ = !second_; }

  private:
    int64_t elements_;
    T* memory_;
    bool second_ = false;
};

template <class T>
void load(const Dsa<T>& p, int64_t b, ImageShape shape, T* planar) {
    const auto& s = p.input_stride;
    for (int64_t c = 0; c < shape.channels; ++c)
        for (int64_t i = 0; i < shape.height; ++i)
            for (int64_t j = 0; j < shape.width; ++j) *planar++ = p.input[b * s[0] + c * s[1] + i * s[2] + j * s[3]];
}

template <class T>
void store(const Dsa<T>& p, int64_t b, ImageShape shape, const T* planar) {
    const auto& s = p.output_stride;
    for (int64_t c = 0; c < shape.channels; ++c)
        for (int64_t i = 0; i < shape.height; ++i)
            for (int64_t j = 0; j < shape.width; ++j) p.output[b * s[0] + c * s[1] + i * s[2] + j * s[3]] = *planar++;
}

template <class T>
void saturate(T* image, ImageShape shape, T factor) {
    const int64_t pixels = shape.pixels();
    const T inverse = T(1) / static_cast<T>(shape.channels);
    for (int64_t k = 0; k < pixels; ++k) {
        T mean = 0;
        for (int64_t c = 0; c < shape.channels; ++c) mean += image[c * pixels + k];
        mean *= inverse;
        for (int64_t c = 0; c < shape.channels; ++c) image[c * pixels + k] = blend(image[c * pixels + k], mean, factor);
    }
}

template <class T>
void contrast(T* image, ImageShape shape, T factor) {
    T mean = 0;
    for (int64_t row = 0; row < shape.channels * shape.height; ++row) {
        T sum = 0;  // row by row, for the rounding error
        for (int64_t j = 0; j < shape.width; ++j) sum += image[row * shape.width + j];
        mean += sum;
    }
    mean /= static_cast<T>(shape.elements());
    for (int64_t k = 0; k < shape.elements(); ++k) image[k] = blend(image[k], mean, factor);
}

// out[i, j] = image[i + u, j + v], zero outside.
template <class T>
void shift(const T* image, T* out, ImageShape shape, int64_t u, int64_t v) {
    for (int64_t c = 0; c < shape.channels; ++c) {
        for (int64_t i = 0; i < shape.height; ++i) {
            const bool inside = i + u >= 0 && i + u < shape.height;
            const T* row = inside ? image + (c * shape.height + i + u) * shape.width : nullptr;
            for (int64_t j = 0; j < shape.width; ++j)
                *out++ = inside && j + v >= 0 && j + v < shape.width ? row[j + v] : T(0);
        }
    }
}

template <class T>
void cutout(T* image, ImageShape shape, Box box) {
    for (int64_t c = 0; c < shape.channels; ++c)
        for (int64_t i = 0; i < shape.height; ++i)
            for (int64_t j = 0; j < shape.width; ++j)
                if (box.contains(i, j)) image[(c * shape.height + i) * shape.width + j] = T(0);
}

template <class T>
void mirror(const T* image, T* out, ImageShape shape) {
    for (int64_t row = 0; row < shape.channels * shape.height; ++row)
        for (int64_t j = 0; j < shape.width; ++j) *out++ = image[row * shape.width + shape.width - 1 - j];
}

template <class T>
void sample(const T* image, T* out, ImageShape shape, const Sampling& sampling) {
    for (int64_t i = 0; i < shape.height; ++i) {
        for (int64_t j = 0; j < shape.width; ++j) {
            const Taps taps(sampling, shape, i, j);
            for (int64_t c = 0; c < shape.channels; ++c)
                out[c * shape.pixels() + i * shape.width + j] = taps.sample(image + c * shape.pixels(), shape);
        }
    }
}

template <class T>
void sample_adjoint(const T* grad, T* out, ImageShape shape, const Sampling& sampling) {
    for (int64_t p = 0; p < shape.height; ++p) {
        for (int64_t q = 0; q < shape.width; ++q) {
            const Reach reach(sampling, shape, p, q);
            for (int64_t c = 0; c < shape.channels; ++c)
                out[c * shape.pixels() + p * shape.width + q] =
                    gather(grad + c * shape.pixels(), sampling, reach, shape, p, q);
        }
    }
}

template <class T>
void apply(int operation, bool linear, Draws draws, ImageShape shape, const Dsa<T>& p, Scratch<T>& scratch) {
    T *image = scratch.image(), *out = scratch.other();
    switch (operation) {
        case kColor:
            if (!linear) {
                const T brightness = static_cast<T>(draws[kBrightness]);
                for (int64_t k = 0; k < shape.elements(); ++k) image[k] += brightness;
            }
            saturate(image, shape, static_cast<T>(draws[kSaturation]));
            contrast(image, shape, static_cast<T>(draws[kContrast]));
            return;
        case kCrop:
            shift(image, out, shape, draws.integer(kShiftH), draws.integer(kShiftW));
            break;
        case kCutout:
            cutout(image, shape, cutout_box(draws, p.cutout_height, p.cutout_width));
            return;
        case kFlip:
            if (draws[kFlipped] == 0) return;
            mirror(image, out, shape);
            break;
        case kScale:
            sample(image, out, shape, scaling(draws, shape));
            break;
        case kRotate:
            sample(image, out, shape, rotation(draws, shape));
            break;
        default:
            return;
    }
    scratch.swap();
}

template <class T>
void apply_adjoint(int operation, Draws draws, ImageShape shape, const Dsa<T>& p, Scratch<T>& scratch) {
    T *grad = scratch.image(), *out = scratch.other();
    switch (operation) {
        case kColor:
            contrast(grad, shape, static_cast<T>(draws[kContrast]));
            saturate(grad, shape, static_cast<T>(draws[kSaturation]));
            return;
        case kCrop:
            shift(grad, out, shape, -draws.integer(kShiftH), -draws.integer(kShiftW));
            break;
        case kScale:
            sample_adjoint(grad, out, shape, scaling(draws, shape));
            break;
        case kRotate:
            sample_adjoint(grad, out, shape, rotation(draws, shape));
            break;
        default:
            return apply(operation, true, draws, shape, p, scratch);  // cutout and flip: their own transposes
    }
    scratch.swap();
}

// Calls body(scratch, b, shape) between loading and storing each image b, in scratch of its own.
template <class T, class Body>
Status each_image(const Dsa<T>& p, Context context, const Body& body) {
    const ImageShape shape{p.channels, p.height, p.width};
    for (int64_t k = 0; k < p.operation_count * p.batch; ++k)
        if (p.operations[k] < kNothing || p.operations[k] > kRotate) return kUnknownOperation;
    std::atomic<Status> status{kSuccess};
    parallel_for(p.batch, context.threads, [&](int64_t b) {
        Scratch<T> scratch(shape);
        if (!scratch) {
            status = kOutOfMemory;
            return;
        }
        load(p, b, shape, scratch.image());
        body(scratch, b, shape);
        store(p, b, shape, scratch.image());
    });
    return status;
}

}  // namespace

template <class T>
Status dsa(const Dsa<T>& p, Context context) {
    return each_image(p, context, [&](Scratch<T>& scratch, int64_t b, ImageShape shape) {
        for (int64_t k = 0; k < p.operation_count; ++k)
            apply(p.operations[k * p.batch + b], p.linear, {p.draws + b, p.batch}, shape, p, scratch);
    });
}

template <class T>
Status dsa_adjoint(const Dsa<T>& p, Context context) {
    return each_image(p, context, [&](Scratch<T>& scratch, int64_t b, ImageShape shape) {
        for (int64_t k = p.operation_count - 1; k >= 0; --k)
            apply_adjoint(p.operations[k * p.batch + b], {p.draws + b, p.batch}, shape, p, scratch);
    });
}

PDD_INSTANTIATE_HALF(dsa, Dsa)
PDD_INSTANTIATE_HALF(dsa_adjoint, Dsa)

}  // namespace pdd::PDD_BACKEND
