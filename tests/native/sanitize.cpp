// Runs every operator of one back end (the CPU's for one instruction set, or CUDA's on the host),
// in all of its types, over ugly sizes and extreme values, for test_sanitizers.py, which builds
// this file and the kernels under AddressSanitizer and UndefinedBehaviorSanitizer. Every buffer is
// a heap block of its exact size, so one element too many is seen. Outputs start as NaN, so an
// element that is never written is seen too.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ops/operators.h"

#if defined(PDD_CUDA_ON_HOST)
#include <cuda_runtime.h>
#else
#include "core/threads.h"
#endif

namespace {

using namespace pdd;
namespace kernels = pdd::PDD_BACKEND;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

#if defined(PDD_CUDA_ON_HOST)
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

// From and to what is stored.
template <class T>
T stored(double value) {
    return static_cast<T>(value);
}
template <class T>
double number(T value) {
    return static_cast<double>(value);
}
#if defined(PDD_CUDA_ON_HOST)
template <>
bfloat16 stored(double value) {
    return {pdd_host::float_to_bfloat16(static_cast<float>(value))};
}
template <>
float16 stored(double value) {
    return {pdd_host::float_to_float16(static_cast<float>(value))};
}
double number(bfloat16 value) {
    return pdd_host::bfloat16_to_float(value.bits);
}
double number(float16 value) {
    return pdd_host::float16_to_float(value.bits);
}
#endif

std::mt19937_64 randomness(0);
int64_t calls = 0;

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(1);
}

// `size` elements and nothing behind them.
template <class T>
class Buffer {
  public:
    static Buffer random(int64_t size, double scale = 1) {
        std::normal_distribution<double> normal(0, scale);
        Buffer buffer(size);
        for (int64_t k = 0; k < size; ++k) buffer.data_[k] = stored<T>(normal(randomness));
        return buffer;
    }
    static Buffer filled(int64_t size, T value) {
        Buffer buffer(size);
        for (int64_t k = 0; k < size; ++k) buffer.data_[k] = value;
        return buffer;
    }
    static Buffer unwritten(int64_t size) { return filled(size, stored<T>(kNan)); }

    T* get() const { return data_.get(); }
    T& operator[](int64_t k) const { return data_[k]; }
    int64_t size() const { return size_; }

  private:
    explicit Buffer(int64_t size) : size_(size), data_(new T[static_cast<size_t>(size)]) {}

    int64_t size_;
    std::unique_ptr<T[]> data_;
};

template <class T>
void expect_finite(const std::string& where, const char* name, const Buffer<T>& buffer) {
    for (int64_t k = 0; k < buffer.size(); ++k)
        if (!std::isfinite(number(buffer.get()[k])))
            fail(where + ": " + name + "[" + std::to_string(k) + "] is " +
                 std::to_string(number(buffer.get()[k])));
}

void expect_nan(const std::string& where, const char* name, double value) {
    if (!std::isnan(value))
        fail(where + ": " + name + " must be NaN, got " + std::to_string(value));
}

void expect_status(const std::string& where, Status found, Status expected) {
    ++calls;
    if (found != expected)
        fail(where + ": status must be " + std::to_string(expected) + ", got " +
             std::to_string(found));
}

std::string describe(const char* name, const std::vector<int64_t>& numbers) {
    std::string text = name;
    for (const int64_t number : numbers) text += " " + std::to_string(number);
    return text;
}

// ---- norm_relu_pool ----

// `spread` 0 makes every plane constant: a variance of 0, and activations that are all equal.
template <class T>
void norm_relu_pool(PlaneShape s, double spread, int threads) {
    using S = Compute<T>;
    const std::string where =
        describe("norm_relu_pool", {s.batch, s.channels, s.height, s.width, threads});
    const Context context{nullptr, threads};
    const double eps = 1e-5;
    const int64_t planes = s.batch * s.channels, full = planes * s.height * s.width;
    const int64_t pooled = planes * (s.height / 2) * (s.width / 2);
    const auto vector = [&] { return Buffer<S>::random(s.channels); };
    const auto unwritten = [](int64_t size) { return Buffer<T>::unwritten(size); };
    const auto sums = [&] { return Buffer<S>::unwritten(planes); };
    const Buffer<T> z = Buffer<T>::random(full, spread), z_tangent = Buffer<T>::random(full);
    const Buffer<S> weight = vector(), weight_tangent = vector(), bias = vector(),
                    bias_tangent = vector();
    const Buffer<T> grad_out = Buffer<T>::random(pooled),
                    grad_out_tangent = Buffer<T>::random(pooled);
    const Buffer<T> out = unwritten(pooled);
    const Buffer<S> mean = sums(), rstd = sums();
    expect_status(where,
                  kernels::norm_relu_pool<T>({s, eps, z.get(), weight.get(), bias.get(), out.get(),
                                              mean.get(), rstd.get()},
                                             context),
                  kSuccess);
    expect_finite(where, "out", out);
    expect_finite(where, "mean", mean);
    expect_finite(where, "rstd", rstd);

    const Buffer<T> grad_z = unwritten(full);
    const Buffer<S> weight_parts = sums(), bias_parts = sums();
    expect_status(where,
                  kernels::norm_relu_pool_backward<T>(
                      {s, grad_out.get(), z.get(), mean.get(), rstd.get(), weight.get(), bias.get(),
                       grad_z.get(), weight_parts.get(), bias_parts.get()},
                      context),
                  kSuccess);
    expect_finite(where, "grad_z", grad_z);
    expect_finite(where, "grad_weight_parts", weight_parts);
    expect_finite(where, "grad_bias_parts", bias_parts);

    for (const bool tangent_only : {false, true}) {
        const Buffer<T> value = unwritten(pooled), tangent = unwritten(pooled);
        const Buffer<S> mean_tangent = sums(), kappa = sums();
        expect_status(where,
                      kernels::norm_relu_pool_dual<T>(
                          {s, eps, z.get(), z_tangent.get(), weight.get(), weight_tangent.get(),
                           bias.get(), bias_tangent.get(), tangent_only ? nullptr : value.get(),
                           tangent.get(), mean.get(), rstd.get(), mean_tangent.get(), kappa.get()},
                          context),
                      kSuccess);
        if (!tangent_only) expect_finite(where, "out", value);
        expect_finite(where, "out_tangent", tangent);
        expect_finite(where, "mean_tangent", mean_tangent);
        expect_finite(where, "kappa", kappa);

        const Buffer<T> grad = unwritten(full), grad_tangent = unwritten(full);
        const Buffer<S> weight_tangents = sums(), bias_tangents = sums();
        expect_status(where,
                      kernels::norm_relu_pool_dual_backward<T>(
                          {s, grad_out.get(), grad_out_tangent.get(), z.get(), z_tangent.get(),
                           mean.get(), rstd.get(), mean_tangent.get(), kappa.get(), weight.get(),
                           weight_tangent.get(), bias.get(), tangent_only ? nullptr : grad.get(),
                           grad_tangent.get(), weight_tangents.get(), bias_tangents.get()},
                          context),
                      kSuccess);
        if (!tangent_only) expect_finite(where, "grad_z", grad);
        expect_finite(where, "grad_z_tangent", grad_tangent);
        expect_finite(where, "grad_weight_tangent_parts", weight_tangents);
        expect_finite(where, "grad_bias_tangent_parts", bias_tangents);
    }
}

// ---- cross_entropy ----

// Hard labels as given, or soft ones where there are none. `valid`: whether the last label is one;
// else the CPU answers so, and CUDA, which does not wait for an answer, with a loss of NaN.
template <class T>
void cross_entropy(int64_t batch, int64_t classes, double spread,
                   const std::vector<int64_t>& labels, bool valid) {
    const Status expected = valid || kCuda ? kSuccess : kLabelOutOfRange;
    const std::string where =
        describe("cross_entropy", {batch, classes, static_cast<int64_t>(labels.size())});
    const Context context{nullptr, 2};
    const int64_t size = batch * classes;
    const Buffer<T> logits = Buffer<T>::random(size, spread), tangent = Buffer<T>::random(size);
    const Buffer<T> soft = Buffer<T>::random(size);
    const Buffer<int64_t> indices = Buffer<int64_t>::filled(static_cast<int64_t>(labels.size()), 0);
    for (size_t b = 0; b < labels.size(); ++b) indices.get()[b] = labels[b];
    const int64_t* hard = labels.empty() ? nullptr : indices.get();
    const T* weights = labels.empty() ? soft.get() : nullptr;

    const Buffer<T> losses = Buffer<T>::unwritten(batch), grad = Buffer<T>::unwritten(size);
    expect_status(
        where,
        kernels::cross_entropy<T>(
            {batch, classes, logits.get(), hard, weights, losses.get(), grad.get()}, context),
        expected);
    const Buffer<T> losses_tangent = Buffer<T>::unwritten(batch),
                    grad_again = Buffer<T>::unwritten(size);
    const Buffer<T> grad_tangent = Buffer<T>::unwritten(size),
                    labels_tangent = Buffer<T>::unwritten(size);
    expect_status(
        where,
        kernels::cross_entropy_dual<T>(
            {batch, classes, logits.get(), tangent.get(), hard, weights, losses_tangent.get(),
             grad_again.get(), grad_tangent.get(), labels.empty() ? labels_tangent.get() : nullptr},
            context),
        expected);
    if (!valid) {
        if (kCuda) expect_nan(where, "last loss", losses[batch - 1]);
        if (kCuda) expect_nan(where, "tangent of the last loss", losses_tangent[batch - 1]);
        return;
    }
    expect_finite(where, "losses", losses);
    expect_finite(where, "grad_logits", grad);
    expect_finite(where, "losses_tangent", losses_tangent);
    expect_finite(where, "grad_logits of the dual", grad_again);
    expect_finite(where, "grad_logits_tangent", grad_tangent);
    if (labels.empty()) expect_finite(where, "grad_labels_tangent", labels_tangent);
}

// ---- dsa ----

struct Strides {
    int64_t of[4];  // B, C, H, W

    // Elements from the first to the last.
    int64_t extent(const int64_t (&shape)[4]) const {
        int64_t last = 0;
        for (int k = 0; k < 4; ++k) last += (shape[k] - 1) * of[k];
        return last + 1;
    }
};

// Planar, channels-last, and the middle of something two channels and one column larger.
std::vector<Strides> layouts(const int64_t (&s)[4]) {
    const int64_t C = s[1], H = s[2], W = s[3];
    return {{{C * H * W, H * W, W, 1}},
            {{H * W * C, 1, W * C, C}},
            {{(C + 2) * H * (W + 1), H * (W + 1), W + 1, 1}}};
}

// Unchecked values of a random parameter: zero, one, limits of integers, values beyond them, NaN.
const std::vector<double> kExtremes = {0,      1,       -1,     0.37,       -1.2,      3,
                                       1e-3,   -1e-9,   1e-300, -5e2,       1e9,       -1e18,
                                       9.3e18, -9.3e18, 1e300,  -kInfinity, kInfinity, kNan};

template <class T>
void dsa(const int64_t (&shape)[4], const Strides& in, const Strides& out,
         const std::vector<int>& operations, const Buffer<double>& aug_params,
         int64_t cutout_height, int64_t cutout_width, bool linear, int threads,
         int64_t scratch_images) {
    const std::string where =
        describe("dsa", {shape[0], shape[1], shape[2], shape[3], operations[0], threads});
    const Buffer<T> input = Buffer<T>::random(in.extent(shape)),
                    output = Buffer<T>::filled(out.extent(shape), stored<T>(0));
    Dsa<T> p{};
    p.batch = shape[0], p.channels = shape[1], p.height = shape[2], p.width = shape[3];
    p.cutout_height = cutout_height, p.cutout_width = cutout_width;
    p.operation_count = static_cast<int64_t>(operations.size());
    const Buffer<int> numbers = Buffer<int>::filled(p.operation_count * shape[0], kNothing);
    for (int64_t k = 0; k < p.operation_count; ++k)
        for (int64_t b = 0; b < shape[0]; ++b)
            if (b % 7 != 6) numbers[k * shape[0] + b] = operations[static_cast<size_t>(k)];
    const Buffer<Compute<T>> scratch =
        Buffer<Compute<T>>::unwritten(scratch_images * 2 * shape[1] * shape[2] * shape[3]);
    if (scratch_images) p.scratch = scratch.get(), p.scratch_images = scratch_images;
    p.operations = numbers.get(), p.aug_params = aug_params.get(), p.input = input.get(),
    p.output = output.get();
    for (int k = 0; k < 4; ++k) p.input_stride[k] = in.of[k], p.output_stride[k] = out.of[k];
    // Memory between the images of a sliced output stays 0; the images themselves start as NaN.
    const auto spoil = [&] {
        for (int64_t b = 0; b < shape[0]; ++b)
            for (int64_t c = 0; c < shape[1]; ++c)
                for (int64_t i = 0; i < shape[2]; ++i)
                    for (int64_t j = 0; j < shape[3]; ++j)
                        output[b * out.of[0] + c * out.of[1] + i * out.of[2] + j * out.of[3]] =
                            stored<T>(kNan);
    };
    p.linear = linear;
    spoil();
    expect_status(where, kernels::dsa<T>(p, {nullptr, threads}), kSuccess);
    expect_finite(where, "output", output);
    spoil();
    expect_status(where, kernels::dsa_adjoint<T>(p, {nullptr, threads}), kSuccess);
    expect_finite(where + " adjoint", "output", output);
}

// Parameters of color that keep finite pixels finite; all others from kExtremes, height and width
// paired anew in every round.
Buffer<double> extreme_aug_params(int64_t batch, int round) {
    const int64_t count = static_cast<int64_t>(kExtremes.size());
    Buffer<double> aug_params = Buffer<double>::random(kDsaAugParams * batch);
    for (int64_t row = kShiftH; row < kDsaAugParams; ++row)
        for (int64_t b = 0; b < batch; ++b)
            aug_params[row * batch + b] =
                kExtremes[static_cast<size_t>((b + (row % 2) * round) % count)];
    return aug_params;
}

// On the host a call of CUDA's takes a hundred times as long as one of the CPU's, which sees every
// round.
int rounds_apart(int64_t batch) {
    return kCuda && batch > 4 ? 5 : 1;
}

template <class T>
void dsa_all() {
    const int64_t count = static_cast<int64_t>(kExtremes.size());
    const int64_t shapes[][4] = {{count, 1, 1, 1}, {count, 3, 1, 6}, {count, 2, 7, 1},
                                 {count, 3, 5, 4}, {1, 17, 9, 2},    {1, 1, 33, 17},
                                 {2, 3, 8, 8}};
    std::vector<std::vector<int>> lists = {
        {kColor, kCrop, kCutout, kFlip, kScale, kRotate},
        {kRotate, kRotate, kScale, kScale, kCrop, kCrop, kFlip, kColor}};
    for (int operation = kColor; operation <= kRotate; ++operation) lists.push_back({operation});
    for (const auto& shape : shapes) {
        const std::vector<Strides> strides = layouts(shape);
        for (const auto& operations : lists)
            for (int round = 0; round < (shape[0] == count ? count : 4);
                 round += rounds_apart(shape[0])) {
                const int64_t sides[] = {shape[2], 0, 1000, std::numeric_limits<int64_t>::max()};
                const int64_t side = sides[round % 4];
                dsa<T>(shape, strides[round % 3], strides[(round / 3 + 1) % 3], operations,
                       extreme_aug_params(shape[0], round), side, side / 2 + 1, round % 2 == 0,
                       1 + round / 2 % 2, kCuda && round % 3 == 1 ? 1 + round % 2 : 0);
            }
    }
    const Buffer<T> pixel = Buffer<T>::random(1), output = Buffer<T>::unwritten(1);
    const Buffer<double> aug_params = extreme_aug_params(1, 0);
    for (const int unknown : {kNothing - 1, kRotate + 1}) {
        const Buffer<int> numbers = Buffer<int>::filled(1, unknown);
        Dsa<T> p{};
        p.batch = p.channels = p.height = p.width = 1;
        p.operations = numbers.get(), p.operation_count = 1;
        p.aug_params = aug_params.get(), p.input = pixel.get(), p.output = output.get();
        for (int k = 0; k < 4; ++k) p.input_stride[k] = p.output_stride[k] = 1;
        const Status expected = kCuda ? kSuccess : kUnknownOperation;
        expect_status("dsa of an unknown operation", kernels::dsa<T>(p, {nullptr, 1}), expected);
        if (kCuda) expect_nan("dsa of an unknown operation", "output", number(output[0]));
        expect_status("its adjoint", kernels::dsa_adjoint<T>(p, {nullptr, 1}), expected);
        if (kCuda) expect_nan("its adjoint", "output", number(output[0]));
    }
}

// ---- add_rows ----

// `wrong`: a row that there is not; the CPU answers so, CUDA leaves it out.
template <class T>
void add_rows(int64_t count, int64_t added, int64_t length, const std::vector<int64_t>& wrong) {
    const std::string where =
        describe("add_rows", {count, added, length, static_cast<int64_t>(wrong.size())});
    const Buffer<T> target = Buffer<T>::random(count * length),
                    rows = Buffer<T>::random(added * length);
    const Buffer<int64_t> index = Buffer<int64_t>::filled(added, 0);
    for (int64_t r = 0; r < added; ++r) index[r] = r * r % count;
    for (size_t k = 0; k < wrong.size(); ++k) index[static_cast<int64_t>(k)] = wrong[k];
    const Buffer<T> out = Buffer<T>::unwritten(count * length);
    expect_status(
        where,
        kernels::add_rows<T>(
            {count, added, length, target.get(), index.get(), rows.get(), out.get()}, {nullptr, 2}),
        wrong.empty() || kCuda ? kSuccess : kRowOutOfRange);
    if (wrong.empty() || kCuda) expect_finite(where, "out", out);
}

// ---- convnet ----

#if !defined(PDD_CUDA_ON_HOST)
// On 64 bytes, as the passes are promised.
template <class T>
class AlignedBuffer {
  public:
    explicit AlignedBuffer(int64_t size) : size_(size) {
        void* data = nullptr;
        if (posix_memalign(&data, 64, static_cast<size_t>(size) * sizeof(T))) fail("no memory");
        data_.reset(static_cast<T*>(data));
        spoil();
    }
    void spoil() const { std::fill_n(data_.get(), size_, stored<T>(kNan)); }
    T* get() const { return data_.get(); }
    std::vector<T> copy() const { return {data_.get(), data_.get() + size_}; }

  private:
    struct Free {
        void operator()(T* data) const { std::free(data); }
    };
    int64_t size_;
    std::unique_ptr<T[], Free> data_;
};

template <class T>
double dot(const Buffer<T>& a, const Buffer<T>& b) {
    double sum = 0;
    for (int64_t k = 0; k < a.size(); ++k) sum += number(a[k]) * number(b[k]);
    return sum;
}

// Loosely: the tests of the Python package are strict, but do not reach AVX-512's vectors on every
// machine.
template <class T>
void expect_near(const std::string& where, const char* name, double found, double expected,
                 double scale) {
    const double tolerance = sizeof(T) == 8 ? 1e-9 : 1e-3;
    if (!(std::abs(found - expected) <= tolerance * scale))
        fail(where + ": " + name + " must be " + std::to_string(expected) + ", got " +
             std::to_string(found));
}

template <class T>
class ConvNetCase {
  public:
    ConvNetCase(ConvNetShape s, int convolution, int threads, bool soft)
        : shape_(s), convolution_(convolution), context_{nullptr, threads}, soft_(soft) {
        where_ = describe(
            "convnet", {s.batch, s.in_channels, s.height, s.width, s.channels, s.depth, s.classes,
                        convolution, threads, soft, static_cast<int64_t>(sizeof(T))});
        for (int64_t b = 0; b < s.batch; ++b) hard_[b] = (3 * b + 1) % s.classes;
    }

    // Every pass in every variant, on images that lie as `strides` says.
    void run(const Strides& strides) {
        const int64_t extents[4] = {shape_.batch, shape_.in_channels, shape_.height, shape_.width};
        images_ = Buffer<T>::random(strides.extent(extents));
        strides_ = strides;
        forward_and_backward();
        const ConvNetSizes sizes = size(false, true);
        const AlignedBuffer<T> saved(sizes.saved);
        const Buffer<T> gradient = this->gradient(nullptr);
        expect_same("the gradient", this->gradient(saved.get()), gradient);
        for (T* from : {static_cast<T*>(nullptr), saved.get()}) {
            const std::vector<T> before = saved.copy();
            duals(from, gradient);
            if (std::memcmp(before.data(), saved.get(), before.size() * sizeof(T)))
                fail(where_ + ": saved was written");
        }
        if (soft_) return;
        hard_[shape_.batch - 1] = shape_.classes;
        const Buffer<T> losses = unwritten(shape_.batch), grad = unwritten(parameters_);
        const AlignedBuffer<T> workspace(size(true, false).workspace);
        expect_status(where_,
                      kernels::convnet_gradient<T>({input(workspace), hard_.get(), nullptr, nullptr,
                                                    losses.get(), grad.get()},
                                                   context_),
                      kLabelOutOfRange);
        expect_status(where_,
                      kernels::convnet_dual<T>(
                          {input(workspace), hard_.get(), nullptr, nullptr, direction_.get(),
                           nullptr, losses.get(), grad.get(), nullptr, nullptr},
                          context_),
                      kLabelOutOfRange);
    }

  private:
    static Buffer<T> unwritten(int64_t size) { return Buffer<T>::unwritten(size); }

    static int64_t parameters(const ConvNetShape& s) {
        const int64_t features = s.channels * (s.height >> s.depth) * (s.width >> s.depth);
        return 9 * s.channels * (s.in_channels + (s.depth - 1) * s.channels) +
               3 * s.channels * s.depth + s.classes * (features + 1);
    }

    ConvNetSizes size(bool dual, bool saved) const {
        return kernels::convnet_sizes(shape_, convolution_, dual, saved, context_.threads);
    }

    ConvNetInput<T> input(const AlignedBuffer<T>& workspace) const {
        const int64_t(&s)[4] = strides_.of;
        return {shape_,         convolution_,  1e-5,
                theta_.get(),   images_.get(), {s[0], s[1], s[2], s[3]},
                workspace.get()};
    }

    void expect_same(const char* name, const Buffer<T>& found, const Buffer<T>& expected) const {
        if (std::memcmp(found.get(), expected.get(), static_cast<size_t>(found.size()) * sizeof(T)))
            fail(where_ + ": " + name + " has other bits the second time");
    }

    void forward_and_backward() const {
        const AlignedBuffer<T> workspace(size(false, false).workspace),
            less(size(false, true).workspace);
        const AlignedBuffer<T> saved(size(false, true).saved);
        const Buffer<T> logits = unwritten(shape_.batch * shape_.classes),
                        again = unwritten(logits.size());
        expect_status(
            where_,
            kernels::convnet_forward<T>({input(workspace), nullptr, logits.get()}, context_),
            kSuccess);
        expect_finite(where_, "logits", logits);
        expect_status(
            where_, kernels::convnet_forward<T>({input(less), saved.get(), again.get()}, context_),
            kSuccess);
        expect_same("logits", again, logits);
        const Buffer<T> theta = unwritten(parameters_), same = unwritten(parameters_);
        const Buffer<T> images = unwritten(shape_.batch * image());
        less.spoil();
        expect_status(
            where_,
            kernels::convnet_backward<T>(
                {input(less), saved.get(), logits.get(), theta.get(), images.get()}, context_),
            kSuccess);
        expect_finite(where_, "grad_theta", theta);
        expect_finite(where_, "grad_images", images);
        less.spoil();
        expect_status(where_,
                      kernels::convnet_backward<T>(
                          {input(less), saved.get(), logits.get(), same.get(), nullptr}, context_),
                      kSuccess);
        expect_same("grad_theta", same, theta);
    }

    Buffer<T> gradient(T* saved) const {
        const AlignedBuffer<T> workspace(size(false, saved != nullptr).workspace);
        const Buffer<T> losses = unwritten(shape_.batch);
        Buffer<T> grad = unwritten(parameters_);
        expect_status(
            where_,
            kernels::convnet_gradient<T>(
                {input(workspace), hard(), soft(), saved, losses.get(), grad.get()}, context_),
            kSuccess);
        expect_finite(where_, "losses", losses);
        expect_finite(where_, "grad_theta", grad);
        return grad;
    }

    // The Hessian times `direction`; images are wanted where `wanted`.
    Buffer<T> dual(T* saved, const Buffer<T>& direction, const bool* wanted, bool want_theta,
                   const Buffer<T>& gradient) const {
        const AlignedBuffer<T> workspace(size(true, saved != nullptr).workspace);
        const Buffer<T> losses = unwritten(shape_.batch),
                        images = unwritten(wanted ? shape_.batch * image() : 0);
        const Buffer<T> labels = unwritten(soft_ ? shape_.batch * shape_.classes : 0);
        Buffer<T> theta = unwritten(want_theta ? parameters_ : 0);
        expect_status(where_,
                      kernels::convnet_dual<T>(
                          {input(workspace), hard(), soft(), saved, direction.get(), wanted,
                           losses.get(), want_theta ? theta.get() : nullptr,
                           wanted ? images.get() : nullptr, soft_ ? labels.get() : nullptr},
                          context_),
                      kSuccess);
        expect_finite(where_, "losses_tangent", losses);
        expect_finite(where_, "theta_tangent", theta);
        expect_finite(where_, "labels_tangent", labels);
        for (int64_t k = 0; k < images.size(); ++k)
            if (wanted[k / image()] != std::isfinite(number(images[k])))
                fail(where_ + ": images_tangent[" + std::to_string(k) + "] is " +
                     std::to_string(number(images[k])));
        double slope = 0;
        for (int64_t b = 0; b < shape_.batch; ++b)
            slope += number(losses[b]) / static_cast<double>(shape_.batch);
        expect_near<T>(where_, "the slope", slope, dot(gradient, direction),
                       1e-3 + std::sqrt(dot(gradient, gradient) * dot(direction, direction)));
        return theta;
    }

    void duals(T* saved, const Buffer<T>& gradient) const {
        const Buffer<bool> all = Buffer<bool>::filled(shape_.batch, true),
                           some = Buffer<bool>::filled(shape_.batch, 0);
        for (int64_t b = 1; b < shape_.batch; b += 2) some[b] = true;
        const Buffer<T> along = dual(saved, direction_, all.get(), true, gradient);
        const Buffer<T> across = dual(saved, other_, nullptr, true, gradient);
        dual(saved, direction_, some.get(), false, gradient);
        dual(saved, direction_, nullptr, false, gradient);
        // A Hessian is symmetric.
        expect_near<T>(where_, "the Hessian", dot(along, other_), dot(across, direction_),
                       1e-3 + std::sqrt(dot(along, along) * dot(other_, other_)));
    }

    int64_t image() const { return shape_.in_channels * shape_.height * shape_.width; }
    const int64_t* hard() const { return soft_ ? nullptr : hard_.get(); }
    const T* soft() const { return soft_ ? weights_.get() : nullptr; }

    ConvNetShape shape_;
    int convolution_;
    Context context_;
    bool soft_;
    std::string where_;
    int64_t parameters_ = parameters(shape_);
    Buffer<T> theta_ = Buffer<T>::random(parameters_, 0.3),
              direction_ = Buffer<T>::random(parameters_);
    Buffer<T> other_ = Buffer<T>::random(parameters_), images_ = Buffer<T>::unwritten(0);
    Buffer<T> weights_ = Buffer<T>::random(shape_.batch * shape_.classes);
    Buffer<int64_t> hard_ = Buffer<int64_t>::filled(shape_.batch, 0);
    Strides strides_{};
};

// batch, in_channels, height, width, channels, depth, classes: the least; channels that fill blocks
// of 16 and that do not; sides that fill no tile and no window; more images than are convolved at
// once.
const ConvNetShape kConvNets[] = {{1, 1, 2, 2, 1, 1, 1},    {2, 3, 9, 7, 5, 2, 3},
                                  {3, 2, 8, 13, 17, 3, 10}, {1, 17, 6, 4, 16, 2, 17},
                                  {3, 1, 4, 21, 33, 2, 2},  {26, 1, 10, 10, 16, 2, 4},
                                  {2, 4, 16, 18, 16, 4, 3}, {1, 3, 35, 33, 17, 2, 5}};

template <class T>
void convnet_all() {
    int round = 0;
    for (const ConvNetShape& s : kConvNets) {
        const int64_t images[4] = {s.batch, s.in_channels, s.height, s.width};
        for (const int convolution : {kConvolutionDirect, kConvolutionWinograd}) {
            const int threads = (round + round / 2) % 2 ? 3 : 1;
            ConvNetCase<T>(s, convolution, threads, round / 4 % 2 == 1)
                .run(layouts(images)[round % 3]);
            ++round;
        }
    }
}

// Numbers that the passes need, a line a shape: the binding asks one instruction set for all.
void print_sizes() {
    for (const ConvNetShape& s : kConvNets)
        for (const int convolution : {kConvolutionAuto, kConvolutionDirect, kConvolutionWinograd})
            for (const bool dual : {false, true})
                for (const bool saved : {false, true})
                    for (const int threads : {1, 3}) {
                        const ConvNetSizes sizes =
                            kernels::convnet_sizes(s, convolution, dual, saved, threads);
                        std::printf("%" PRId64 " %" PRId64 "\n", sizes.workspace, sizes.saved);
                    }
}
#endif

// ---- launches ----

#if defined(PDD_CUDA_ON_HOST)
// A failure is what the call answers, and nothing is left of it for torch to trip over.
void failed_launch() {
    setenv("PDD_HOST_FAIL", "719", 1);
    const Buffer<float> number = Buffer<float>::random(1), out = Buffer<float>::unwritten(1);
    expect_status("a failed launch",
                  kernels::add_rows<float>({1, 0, 1, number.get(), nullptr, nullptr, out.get()},
                                           {nullptr, 1}),
                  cudaErrorLaunchFailure);
    unsetenv("PDD_HOST_FAIL");
    expect_status("what is left of it", cudaGetLastError(), cudaSuccess);
}
#endif

// ---- all ----

constexpr int64_t kLeast = std::numeric_limits<int64_t>::min(),
                  kMost = std::numeric_limits<int64_t>::max();

// In all types; `largest`: what may be squared and still be stored.
template <class T>
void all_images(double largest) {
    for (const int64_t channels : {1, 3, 4, 5, 8, 9, 16, 17, 33})
        for (const PlaneShape& s : {PlaneShape{1, channels, 2, 2},
                                    {3, channels, 3, 2},
                                    {2, channels, 2, 5},
                                    {1, channels, 9, 7}})
            for (const double spread : {1.0, 0.0, largest})
                for (const int threads : {1, 2})
                    if (!kCuda || threads == 1) norm_relu_pool<T>(s, spread, threads);
    // On CUDA planes of more pixels go through other kernels.
    for (const int64_t channels : {5, 16})
        for (const PlaneShape& s : {PlaneShape{2, channels, 18, 19}, {1, channels, 33, 35}})
            norm_relu_pool<T>(s, 1, 1);
    dsa_all<T>();
}

template <class T>
void all() {
    all_images<T>(1e6);
    for (const int64_t classes : {1, 2, 7, 33, 5000})
        for (const double spread : {1.0, 1e4}) {
            cross_entropy<T>(1, classes, spread, {0}, true);
            cross_entropy<T>(3, classes, spread, {0, classes - 1, classes / 2}, true);
            cross_entropy<T>(3, classes, spread, {}, true);
            for (const int64_t wrong : {classes, int64_t{-1}, kLeast, kMost})
                cross_entropy<T>(3, classes, spread, {0, 0, wrong}, false);
        }
    for (const int64_t length : {1, 2, 3, 4, 33, 1028})
        for (const int64_t added : {0, 1, 9}) {
            add_rows<T>(1, added, length, {});
            add_rows<T>(7, added, length, {});
            for (const int64_t wrong : {int64_t{7}, int64_t{-1}, kLeast, kMost})
                if (added) add_rows<T>(7, added, length, {wrong});
        }
}

}  // namespace

int main(int count, char**) {
#if !defined(PDD_CUDA_ON_HOST)
    if (count > 1) return print_sizes(), 0;
    worth_a_thread = 0;
    convnet_all<float>();
    convnet_all<double>();
#endif
    (void)count;
    all<float>();
    all<double>();
#if defined(PDD_CUDA_ON_HOST)
    all_images<bfloat16>(1e6);
    all_images<float16>(1e2);
    failed_launch();
#endif
    std::printf("%" PRId64 " calls\n", calls);
    return 0;
}
