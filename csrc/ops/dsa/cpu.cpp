// One task is one image. Several operations alternate between two planar buffers (12 KB each for
// 3x32x32 floats, which fits the first-level cache). A single operation on planar memory reads the
// input and writes the output directly.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "core/context.h"
#include "core/parallel.h"
#include "ops/dsa/math.h"
#include "ops/dsa/pointwise.h"
#include "ops/dsa/sampling.h"
#include "ops/dsa/view.h"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {
namespace {

// Scratch memory of a thread.
template <class T>
struct Scratch {
    T* buffers[2];
    char* sampling;

    static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
    static int64_t bytes(ImageShape shape) {
        return 2 * padded(shape.elements() * static_cast<int64_t>(sizeof(T))) +
               padded(sampling_bytes<T>(shape));
    }

    Scratch(char* memory, ImageShape shape) {
        const int64_t image = padded(shape.elements() * static_cast<int64_t>(sizeof(T)));
        for (int k = 0; k < 2; ++k) buffers[k] = reinterpret_cast<T*>(memory + k * image);
        sampling = memory + 2 * image;
    }
};

template <class T>
struct Task {
    ImageShape shape;
    AugParams aug_params;
    int64_t cutout_height, cutout_width;
    bool linear, adjoint;

    bool does_nothing(int operation) const {
        return operation == kNothing || (operation == kFlip && aug_params[kFlipped] == 0);
    }
};

// Applies an operation other than scale and rotate to planar images.
template <class T>
void apply(const Task<T>& task, int operation, const T* image, T* out) {
    const ImageShape shape = task.shape;
    const AugParams aug_params = task.aug_params;
    switch (operation) {
        case kColor:
            if (task.adjoint) {
                color_adjoint(image, out, shape, aug_params);
            } else {
                color(image, out, shape, aug_params, task.linear);
            }
            return;
        case kCrop: {
            const int64_t sign = task.adjoint ? -1 : 1;
            shift(image, out, shape, sign * aug_params.integer(kShiftH),
                  sign * aug_params.integer(kShiftW));
            return;
        }
        case kCutout:
            cutout(image, out, shape,
                   cutout_box(aug_params, task.cutout_height, task.cutout_width));
            return;
        default:
            mirror(image, out, shape);
    }
}

// Applies operation(k), k in [0, count), to one image in order.
template <class T, class Operation>
void augment(const Task<T>& task, int64_t count, const Operation& operation,
             const View<const T>& input, const View<T>& output, const Scratch<T>& scratch) {
    const ImageShape shape = task.shape;
    int64_t last = count - 1;
    while (last >= 0 && task.does_nothing(operation(last))) --last;
    if (last < 0) return copy(input, output, shape);
    View<const T> from = input;
    int free = 0;  // the buffer without the image
    for (int64_t k = 0; k <= last; ++k) {
        const int number = operation(k);
        if (task.does_nothing(number)) continue;
        if (number == kScale || number == kRotate) {
            const View<T> to = k == last ? output : planar_view(scratch.buffers[free], shape);
            const Sampling sampling = number == kScale ? scaling(task.aug_params, shape)
                                                       : rotation(task.aug_params, shape);
            resample(from, to, shape, sampling, task.adjoint, scratch.sampling);
            from = {to.data, to.channel, to.row, to.column};
        } else {
            if (!is_planar(from, shape)) {
                const View<T> loaded = planar_view(scratch.buffers[free], shape);
                copy(from, loaded, shape);
                from = {loaded.data, loaded.channel, loaded.row, loaded.column};
                free = 1 - free;
            }
            const bool direct = k == last && is_planar(output, shape);
            const View<T> to = direct ? output : planar_view(scratch.buffers[free], shape);
            apply(task, number, from.data, to.data);
            from = {to.data, to.channel, to.row, to.column};
            if (k == last && !direct) copy(from, output, shape);
        }
        free = 1 - free;
    }
}

// Cost of an operation, in units of moving the image once.
int64_t cost(int operation) {
    return operation == kColor                           ? 5
           : operation == kScale || operation == kRotate ? 16
           : operation == kNothing                       ? 0
                                                         : 1;
}

template <class T>
Status each_image(const Dsa<T>& p, bool adjoint, Context context) {
    const ImageShape shape{p.channels, p.height, p.width};
    int64_t moves = p.batch;
    for (int64_t k = 0; k < p.operation_count * p.batch; ++k) {
        if (p.operations[k] < kNothing || p.operations[k] > kRotate) return kUnknownOperation;
        moves += cost(p.operations[k]);
    }
    // 40 moves of 3x32x32 elements take 10 microseconds.
    const double each =
        static_cast<double>(moves * shape.elements()) / static_cast<double>(p.batch) / 12;
    const int threads = threads_worth(p.batch, context.threads, each);
    const int64_t bytes = Scratch<T>::bytes(shape);
    const std::unique_ptr<char, void (*)(void*)> memory(
        static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(bytes * threads))),
        std::free);
    if (!memory) return kOutOfMemory;
    parallel_with_scratch(p.batch, threads, each, [&](int64_t b, int thread) {
        const Task<T> task{
            shape, {p.aug_params + b, p.batch}, p.cutout_height, p.cutout_width, p.linear, adjoint};
        const int64_t *in = p.input_stride, *out = p.output_stride;
        const auto operation = [&](int64_t k) {
            return p.operations[(adjoint ? p.operation_count - 1 - k : k) * p.batch + b];
        };
        augment<T>(task, p.operation_count, operation, {p.input + b * in[0], in[1], in[2], in[3]},
                   {p.output + b * out[0], out[1], out[2], out[3]},
                   {memory.get() + thread * bytes, shape});
    });
    return kSuccess;
}

}  // namespace

template <class T>
Status dsa(const Dsa<T>& p, Context context) {
    return each_image(p, false, context);
}

template <class T>
Status dsa_adjoint(const Dsa<T>& p, Context context) {
    return each_image(p, true, context);
}

PDD_INSTANTIATE_HALF(dsa, Dsa)
PDD_INSTANTIATE_HALF(dsa_adjoint, Dsa)

}  // namespace pdd::PDD_BACKEND
