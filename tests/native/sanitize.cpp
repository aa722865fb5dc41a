// Runs every operator of one back end (the CPU's for one instruction set, or CUDA's on the host), in all of its types,
// over ugly sizes and extreme values, for test_sanitizers.py, which builds this file and the kernels under
// AddressSanitizer and UndefinedBehaviorSanitizer. Every buffer is a heap block of its exact size, so one element too
// many is seen. Outputs start as NaN, so an element that is never written is seen too.
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ops/operators.h"

#if defined(PDD_CUDA_ON_HOST)
#include <cuda_runtime.h>
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
            fail(where + ": " + name + "[" + std::to_string(k) + "] is " + std::to_string(number(buffer.get()[k])));
}

void expect_nan(const std::string& where, const char* name, double value) {
    if (!std::isnan(value)) fail(where + ": " + name + " must be NaN, got " + std::to_string(value));
}

void expect_status(const std::string& where, Status found, Status expected) {
    ++calls;
    if (found != expected)
        fail(where + ": status must be " + std::to_string(expected) + ", got " + std::to_string(found));
}

std::string describe(const char* name, const std::vector<int64_t>& numbers) {
    std::string text = name;
    for (const int64_t number : numbers) text += " " + std::to_string(number);
    return text;
}

// ---- norm_relu_pool ---------------------------------------------------------------------------------------------

// `spread` 0 makes every plane constant: a variance of 0, and activations that are all equal.
template <class T>
void norm_relu_pool(PlaneShape s, double spread, int threads) {
    using S = Compute<T>;
    const std::string where = describe("norm_relu_pool", {s.batch, s.channels, s.height, s.width, threads});
    const Context context{nullptr, threads};
    const double eps = 1e-5;
    const int64_t planes = s.batch * s.channels, full = planes * s.height * s.width;
    const int64_t pooled = planes * (s.height / 2) * (s.width / 2);
    const auto vector = [&] { return Buffer<S>::random(s.channels); };
    const auto unwritten = [](int64_t size) { return Buffer<T>::unwritten(size); };
    const auto sums = [&] { return Buffer<S>::unwritten(planes); };
    const Buffer<T> z = Buffer<T>::random(full, spread), z_tangent = Buffer<T>::random(full);
    const Buffer<S> weight = vector(), weight_tangent = vector(), bias = vector(), bias_tangent = vector();
    const Buffer<T> grad_out = Buffer<T>::random(pooled), grad_out_tangent = Buffer<T>::random(pooled);
    const Buffer<T> out = unwritten(pooled);
    const Buffer<S> mean = sums(), rstd = sums();
    expect_status(where,
                  kernels::norm_relu_pool<T>(
                      {s, eps, z.get(), weight.get(), bias.get(), out.get(), mean.get(), rstd.get()}, context),
                  kSuccess);
    expect_finite(where, "out", out);
    expect_finite(where, "mean", mean);
    expect_finite(where, "rstd", rstd);

    const Buffer<T> grad_z = unwritten(full);
    const Buffer<S> weight_parts = sums(), bias_parts = sums();
    expect_status(where,
                  kernels::norm_relu_pool_backward<T>({s, grad_out.get(), z.get(), mean.get(), rstd.get(), weight.get(),
                                                       bias.get(), grad_z.get(), weight_parts.get(), bias_parts.get()},
                                                      context),
                  kSuccess);
    expect_finite(where, "grad_z", grad_z);
    expect_finite(where, "grad_weight_parts", weight_parts);
    expect_finite(where, "grad_bias_parts", bias_parts);

    for (const bool tangent_only : {false, true}) {
        const Buffer<T> value = unwritten(pooled), tangent = unwritten(pooled);
        const Buffer<S> mean_tangent = sums(), kappa = sums();
        expect_status(
            where,
            kernels::norm_relu_pool_dual<T>({s, eps, z.get(), z_tangent.get(), weight.get(), weight_tangent.get(),
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
        expect_status(
            where,
            kernels::norm_relu_pool_dual_backward<T>(
                {s, grad_out.get(), grad_out_tangent.get(), z.get(), z_tangent.get(), mean.get(), rstd.get(),
                 mean_tangent.get(), kappa.get(), weight.get(), weight_tangent.get(), bias.get(),
                 tangent_only ? nullptr : grad.get(), grad_tangent.get(), weight_tangents.get(), bias_tangents.get()},
                context),
            kSuccess);
        if (!tangent_only) expect_finite(where, "grad_z", grad);
        expect_finite(where, "grad_z_tangent", grad_tangent);
        expect_finite(where, "grad_weight_tangent_parts", weight_tangents);
        expect_finite(where, "grad_bias_tangent_parts", bias_tangents);
    }
}

// ---- cross_entropy ----------------------------------------------------------------------------------------------

// Hard labels as given, or soft ones where there are none. `valid`: whether the last label is one; else the CPU answers
// so, and CUDA, which does not wait for an answer, with a loss of NaN.
template <class T>
void cross_entropy(int64_t batch, int64_t classes, double spread, const std::vector<int64_t>& labels, bool valid) {
    const Status expected = valid || kCuda ? kSuccess : kLabelOutOfRange;
    const std::string where = describe("cross_entropy", {batch, classes, static_cast<int64_t>(labels.size())});
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
        kernels::cross_entropy<T>({batch, classes, logits.get(), hard, weights, losses.get(), grad.get()}, context),
        expected);
    const Buffer<T> losses_tangent = Buffer<T>::unwritten(batch), grad_again = Buffer<T>::unwritten(size);
    const Buffer<T> grad_tangent = Buffer<T>::unwritten(size), labels_tangent = Buffer<T>::unwritten(size);
    expect_status(where,
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

// ---- dsa --------------------------------------------------------------------------------------------------------

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
    return {{{C * H * W, H * W, W, 1}}, {{H * W * C, 1, W * C, C}}, {{(C + 2) * H * (W + 1), H * (W + 1), W + 1, 1}}};
}

// What a draw may be where nothing is checked: nothing, all, integers' limits and what does not fit them, NaN.
const std::vector<double> kExtremes = {0,    1,   -1,    0.37,   -1.2,    3,     1e-3,       -1e-9,     1e-300,
                                       -5e2, 1e9, -1e18, 9.3e18, -9.3e18, 1e300, -kInfinity, kInfinity, kNan};

template <class T>
void dsa(const int64_t (&shape)[4], const Strides& in, const Strides& out, const std::vector<int>& operations,
         const Buffer<double>& draws, int64_t cutout_height, int64_t cutout_width, bool linear, int threads,
         int64_t scratch_images) {
    const std::string where = describe("dsa", {shape[0], shape[1], shape[2], shape[3], operations[0], threads});
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
    p.operations = numbers.get(), p.draws = draws.get(), p.input = input.get(), p.output = output.get();
    for (int k = 0; k < 4; ++k) p.input_stride[k] = in.of[k], p.output_stride[k] = out.of[k];
    // What lies between the images of a sliced output stays 0; the images themselves start as NaN.
    const auto spoil = [&] {
        for (int64_t b = 0; b < shape[0]; ++b)
            for (int64_t c = 0; c < shape[1]; ++c)
                for (int64_t i = 0; i < shape[2]; ++i)
                    for (int64_t j = 0; j < shape[3]; ++j)
                        output[b * out.of[0] + c * out.of[1] + i * out.of[2] + j * out.of[3]] = stored<T>(kNan);
    };
    p.linear = linear;
    spoil();
    expect_status(where, kernels::dsa<T>(p, {nullptr, threads}), kSuccess);
    expect_finite(where, "output", output);
    spoil();
    expect_status(where, kernels::dsa_adjoint<T>(p, {nullptr, threads}), kSuccess);
    expect_finite(where + " adjoint", "output", output);
}

// Draws of colour that keep finite pixels finite; all others from kExtremes, height and width paired anew in every
// round.
Buffer<double> extreme_draws(int64_t batch, int round) {
    const int64_t count = static_cast<int64_t>(kExtremes.size());
    Buffer<double> draws = Buffer<double>::random(kDsaDraws * batch);
    for (int64_t row = kShiftH; row < kDsaDraws; ++row)
        for (int64_t b = 0; b < batch; ++b)
            draws[row * batch + b] = kExtremes[static_cast<size_t>((b + (row % 2) * round) % count)];
    return draws;
}

// On the host a call of CUDA's takes a hundred times as long as one of the CPU's, which sees every round.
int rounds_apart(int64_t batch) {
    return kCuda && batch > 4 ? 5 : 1;
}

template <class T>
void dsa_all() {
    const int64_t count = static_cast<int64_t>(kExtremes.size());
    const int64_t shapes[][4] = {{count, 1, 1, 1}, {count, 3, 1, 6}, {count, 2, 7, 1}, {count, 3, 5, 4},
                                 {1, 17, 9, 2},    {1, 1, 33, 17},   {2, 3, 8, 8}};
    std::vector<std::vector<int>> lists = {{kColor, kCrop, kCutout, kFlip, kScale, kRotate},
                                           {kRotate, kRotate, kScale, kScale, kCrop, kCrop, kFlip, kColor}};
    for (int operation = kColor; operation <= kRotate; ++operation) lists.push_back({operation});
    for (const auto& shape : shapes) {
        const std::vector<Strides> strides = layouts(shape);
        for (const auto& operations : lists)
            for (int round = 0; round < (shape[0] == count ? count : 4); round += rounds_apart(shape[0])) {
                const int64_t sides[] = {shape[2], 0, 1000, std::numeric_limits<int64_t>::max()};
                const int64_t side = sides[round % 4];
                dsa<T>(shape, strides[round % 3], strides[(round / 3 + 1) % 3], operations,
                       extreme_draws(shape[0], round), side, side / 2 + 1, round % 2 == 0, 1 + round / 2 % 2,
                       kCuda && round % 3 == 1 ? 1 + round % 2 : 0);
            }
    }
    const Buffer<T> pixel = Buffer<T>::random(1), output = Buffer<T>::unwritten(1);
    const Buffer<double> draws = extreme_draws(1, 0);
    for (const int unknown : {kNothing - 1, kRotate + 1}) {
        const Buffer<int> numbers = Buffer<int>::filled(1, unknown);
        Dsa<T> p{};
        p.batch = p.channels = p.height = p.width = 1;
        p.operations = numbers.get(), p.operation_count = 1;
        p.draws = draws.get(), p.input = pixel.get(), p.output = output.get();
        for (int k = 0; k < 4; ++k) p.input_stride[k] = p.output_stride[k] = 1;
        const Status expected = kCuda ? kSuccess : kUnknownOperation;
        expect_status("dsa of an unknown operation", kernels::dsa<T>(p, {nullptr, 1}), expected);
        if (kCuda) expect_nan("dsa of an unknown operation", "output", number(output[0]));
        expect_status("its adjoint", kernels::dsa_adjoint<T>(p, {nullptr, 1}), expected);
        if (kCuda) expect_nan("its adjoint", "output", number(output[0]));
    }
}

// ---- add_rows ---------------------------------------------------------------------------------------------------

// `wrong`: a row that there is not; the CPU answers so, CUDA leaves it out.
template <class T>
void add_rows(int64_t count, int64_t added, int64_t length, const std::vector<int64_t>& wrong) {
    const std::string where = describe("add_rows", {count, added, length, static_cast<int64_t>(wrong.size())});
    const Buffer<T> target = Buffer<T>::random(count * length), rows = Buffer<T>::random(added * length);
    const Buffer<int64_t> index = Buffer<int64_t>::filled(added, 0);
    for (int64_t r = 0; r < added; ++r) index[r] = r * r % count;
    for (size_t k = 0; k < wrong.size(); ++k) index[static_cast<int64_t>(k)] = wrong[k];
    const Buffer<T> out = Buffer<T>::unwritten(count * length);
    expect_status(
        where,
        kernels::add_rows<T>({count, added, length, target.get(), index.get(), rows.get(), out.get()}, {nullptr, 2}),
        wrong.empty() || kCuda ? kSuccess : kRowOutOfRange);
    if (wrong.empty() || kCuda) expect_finite(where, "out", out);
}

// ---- launches ---------------------------------------------------------------------------------------------------

#if defined(PDD_CUDA_ON_HOST)
// A failure is what the call answers, and nothing is left of it for torch to trip over.
void failed_launch() {
    setenv("PDD_HOST_FAIL", "719", 1);
    const Buffer<float> number = Buffer<float>::random(1), out = Buffer<float>::unwritten(1);
    expect_status("a failed launch",
                  kernels::add_rows<float>({1, 0, 1, number.get(), nullptr, nullptr, out.get()}, {nullptr, 1}),
                  cudaErrorLaunchFailure);
    unsetenv("PDD_HOST_FAIL");
    expect_status("what is left of it", cudaGetLastError(), cudaSuccess);
}
#endif

// ---- all --------------------------------------------------------------------------------------------------------

constexpr int64_t kLeast = std::numeric_limits<int64_t>::min(), kMost = std::numeric_limits<int64_t>::max();

// In all types; `largest`: what may be squared and still be stored.
template <class T>
void all_images(double largest) {
    for (const int64_t channels : {1, 3, 4, 5, 8, 9, 16, 17, 33})
        for (const PlaneShape& s :
             {PlaneShape{1, channels, 2, 2}, {3, channels, 3, 2}, {2, channels, 2, 5}, {1, channels, 9, 7}})
            for (const double spread : {1.0, 0.0, largest})
                for (const int threads : {1, 2})
                    if (!kCuda || threads == 1) norm_relu_pool<T>(s, spread, threads);
    // On CUDA planes of more pixels go through other kernels.
    for (const int64_t channels : {5, 16})
        for (const PlaneShape& s : {PlaneShape{2, channels, 18, 19}, {1, channels, 33, 35}}) norm_relu_pool<T>(s, 1, 1);
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

int main() {
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
