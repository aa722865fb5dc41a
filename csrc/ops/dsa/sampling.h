// Scale and rotate of one image, and their transposes. Positions and weights are computed once for
// all channels, and a tap is up to four channels of a pixel in one register. The image has a frame
// of zeros as wide as taps reach, so no tap needs a bounds check.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/vector.h"
#include "ops/dsa/four.h"
#include "ops/dsa/math.h"
#include "ops/dsa/view.h"

namespace pdd::PDD_BACKEND {

// Vectors with as many elements as a vector of doubles.
using Doubles = Vector<double>;
typedef int64_t Integers __attribute__((vector_size(PDD_VECTOR_BYTES)));
template <class T>
struct Narrow;
template <>
struct Narrow<float> {
    typedef float type __attribute__((vector_size(PDD_VECTOR_BYTES / 2), aligned(4), may_alias));
};
template <>
struct Narrow<double> {
    using type = VectorOf<double>::unaligned;
};

inline Doubles floor_of(Doubles v) {
    for (int l = 0; l < kLanes<double, Doubles>; ++l) v[l] = std::floor(v[l]);
    return v;
}

// Rounded once if the instruction set can, as compilers do with the formulas in math.h where both
// factors change.
inline Doubles multiply_add(double a, double b, Doubles c) {
#if defined(__FP_FAST_FMA)
    for (int l = 0; l < kLanes<double, Doubles>; ++l) c[l] = std::fma(a, b, c[l]);
    return c;
#else
    return c + a * b;
#endif
}

// Returns the integer in whole + 2^52, a double whose lowest digit is worth 1, because no
// instruction before AVX-512 converts.
constexpr double kOnes = 4503599627370496.0;
inline Integers integers(Doubles whole_and_ones) {
    return reinterpret_cast<Integers>(whole_and_ones) - int64_t{0x4330000000000000};
}

// N channels of a pixel: a scalar, or a vector whose first N lanes are used.
template <class T, int N>
struct PixelOf {
    using type = Four<T>;
    static T get(const type& pixel, int c) { return pixel[c]; }
    static void set(type& pixel, int c, T value) { pixel[c] = value; }
};
template <class T>
struct PixelOf<T, 1> {
    using type = T;
    static T get(T pixel, int) { return pixel; }
    static void set(T& pixel, int, T value) { pixel = value; }
};

// Taps lie in rows -1 to height + 1, and likewise in columns.
struct Frame {
    int64_t height, width;

    explicit Frame(ImageShape image) : height(image.height + 3), width(image.width + 3) {}
    int64_t pixels() const { return height * width; }
};

// Sampling positions of the outputs of one row. Columns are rounded up to whole vectors.
template <class T>
class SamplingRow {
  public:
    static int64_t bytes(ImageShape shape) {
        return rounded(shape.width) *
               static_cast<int64_t>(3 * sizeof(double) + sizeof(int64_t) + 4 * sizeof(T));
    }

    SamplingRow(void* memory, const Sampling& sampling, ImageShape shape, int64_t pixel_bytes)
        : sampling_(sampling),
          columns_(rounded(shape.width)),
          height_(static_cast<double>(shape.height)),
          width_(static_cast<double>(shape.width)),
          across_(static_cast<double>(pixel_bytes)),
          down_(static_cast<double>(pixel_bytes * Frame(shape).width)),
          corner_(kOnes + down_ + across_),
          turned_(sampling.xy != 0 || sampling.yx != 0) {
        for (int k = 0; k < 3; ++k) of_column_[k] = static_cast<double*>(memory) + k * columns_;
        at_ = reinterpret_cast<int64_t*>(of_column_[2] + columns_);
        for (int k = 0; k < 4; ++k)
            weights_[k] = reinterpret_cast<T*>(at_ + columns_) + k * columns_;
        for (int64_t j = 0; j < columns_; ++j) of_column_[0][j] = sampling.column_x(j);
        if (turned_) {
            for (int64_t j = 0; j < columns_; ++j) of_column_[1][j] = sampling.column_y(j);
            return;
        }
        for (int64_t j = 0; j < columns_; j += kTogether) {
            const Doubles x = held(of_column(0, j), -1, width_);
            const Neighbors<Doubles> columns(x, floor_of(x));
            M::store(of_column_[0] + j, columns.first);
            M::store(of_column_[1] + j, columns.weight);
            M::store(of_column_[2] + j, columns.next_weight);
        }
    }

    const int64_t* at() const {
        return at_;
    }  // bytes from the frame's corner to the upper left tap
    const T* weights(int k) const {
        return weights_[k];
    }  // of that tap, the one to its right, and those below

    void move_to(int64_t i) {
        const SamplingRow row = *this;  // a copy, which no store can change, stays in registers
        const double dy = static_cast<double>(i) - row.sampling_.cy;
        if (!row.turned_) {  // a row has one y, and all rows have the same x
            const double y = held(row.sampling_.y(i, 0), -1, row.height_);
            const Neighbors<double> rows(y, std::floor(y));
            for (int64_t j = 0; j < row.columns_; j += kTogether)
                row.set(j, rows, row.of_column(0, j), row.of_column(1, j), row.of_column(2, j));
            return;
        }
        for (int64_t j = 0; j < row.columns_; j += kTogether) {
            const Doubles y =
                held(multiply_add(row.sampling_.yy, dy, row.of_column(1, j)), -1, row.height_);
            const Doubles x =
                held(multiply_add(row.sampling_.xy, dy, row.of_column(0, j)), -1, row.width_);
            const Neighbors<Doubles> columns(x, floor_of(x));
            row.set(j, Neighbors<Doubles>(y, floor_of(y)), columns.first, columns.weight,
                    columns.next_weight);
        }
    }

  private:
    using M = Memory<Doubles>;
    static constexpr int64_t kTogether = kLanes<double, Doubles>;

    static int64_t rounded(int64_t width) {
        return (width + kTogether - 1) / kTogether * kTogether;
    }

    Doubles of_column(int k, int64_t j) const { return M::load(of_column_[k] + j); }

    template <class Rows>
    void set(int64_t j, const Rows& rows, Doubles first, Doubles weight,
             Doubles next_weight) const {
        const Integers at = integers(rows.first * down_ + (first * across_ + corner_));
        std::memcpy(at_ + j, &at, sizeof(at));
        store(weights_[0] + j, rows.weight * weight);
        store(weights_[1] + j, rows.weight * next_weight);
        store(weights_[2] + j, rows.next_weight * weight);
        store(weights_[3] + j, rows.next_weight * next_weight);
    }

    static void store(T* to, Doubles values) {
        using Some = typename Narrow<T>::type;
        *reinterpret_cast<Some*>(to) = __builtin_convertvector(values, Some);
    }

    Sampling sampling_;
    int64_t columns_;
    double height_, width_, across_, down_, corner_;
    bool turned_;
    // With a rotation: the column's parts of x and y. Otherwise: the column of its first tap, and
    // the weights of that tap and the next.
    double* of_column_[3];
    int64_t* at_;
    T* weights_[4];
};

// Calls body(j, pixel) for the pixels of a row of N channels of `from`.
template <class T, int N, class Body>
void load_row(const View<const T>& from, int64_t c, int64_t i, int64_t width, const Body& body) {
    using Pixel = typename PixelOf<T, N>::type;
    const T* row = from.at(c, i);
    int64_t j = 0;
    if constexpr (N > 1) {
        if (from.column == 1) {
            for (; j + 4 <= width; j += 4) {
                Pixel v[4] = {};
                for (int n = 0; n < N; ++n) v[n] = load_four(row + n * from.channel + j);
                transpose<T>(v);
                for (int k = 0; k < 4; ++k) body(j + k, v[k]);
            }
        }
    }
    for (; j < width; ++j) {
        Pixel pixel{};
        for (int n = 0; n < N; ++n)
            PixelOf<T, N>::set(pixel, n, row[n * from.channel + j * from.column]);
        body(j, pixel);
    }
}

// Writes a row of N channels of `to` from pixel(j).
template <class T, int N, class MakePixel>
void store_row(const View<T>& to, int64_t c, int64_t i, int64_t width, const MakePixel& pixel) {
    T* row = to.at(c, i);
    int64_t j = 0;
    if constexpr (N > 1) {
        if (to.column == 1) {
            for (; j + 4 <= width; j += 4) {
                typename PixelOf<T, N>::type v[4] = {pixel(j), pixel(j + 1), pixel(j + 2),
                                                     pixel(j + 3)};
                transpose<T>(v);
                for (int n = 0; n < N; ++n) store_four(row + n * to.channel + j, v[n]);
            }
        }
    }
    for (; j < width; ++j) {
        const auto value = pixel(j);
        for (int n = 0; n < N; ++n)
            row[n * to.channel + j * to.column] = PixelOf<T, N>::get(value, n);
    }
}

template <class T, int N>
struct Sampler {
    using Pixel = typename PixelOf<T, N>::type;
    ImageShape shape;
    Frame frame;
    Pixel* framed;
    SamplingRow<T> row;

    Pixel* line(int64_t i) const { return framed + (i + 1) * frame.width + 1; }

    // Channels [c, c + N).
    void sample(const View<const T>& image, const View<T>& out, int64_t c) {
        std::fill_n(framed, frame.width, Pixel{});
        for (int64_t i = 0; i < shape.height; ++i) {
            Pixel* target = line(i);
            target[-1] = target[shape.width] = target[shape.width + 1] = Pixel{};
            load_row<T, N>(image, c, i, shape.width,
                           [=](int64_t j, const Pixel& pixel) { target[j] = pixel; });
        }
        std::fill_n(line(shape.height) - 1, 2 * frame.width, Pixel{});

        const int64_t* at = row.at();
        const T *w0 = row.weights(0), *w1 = row.weights(1), *w2 = row.weights(2),
                *w3 = row.weights(3);
        const char *above = reinterpret_cast<const char*>(framed),
                   *below = reinterpret_cast<const char*>(framed + frame.width);
        for (int64_t i = 0; i < shape.height; ++i) {
            row.move_to(i);
            store_row<T, N>(out, c, i, shape.width, [=](int64_t j) {
                const Pixel *two_above = reinterpret_cast<const Pixel*>(above + at[j]),
                            *two_below = reinterpret_cast<const Pixel*>(below + at[j]);
                Pixel sum{};
                sum += w0[j] * two_above[0];
                sum += w1[j] * two_above[1];
                sum += w2[j] * two_below[0];
                sum += w3[j] * two_below[1];
                return sum;
            });
        }
    }

    // Every output adds to its sampled pixels, row after row: the sums of gather() in the order of
    // gather().
    void sample_adjoint(const View<const T>& grad, const View<T>& out, int64_t c) {
        std::fill_n(framed, frame.pixels(), Pixel{});
        const int64_t* at = row.at();
        const T *w0 = row.weights(0), *w1 = row.weights(1), *w2 = row.weights(2),
                *w3 = row.weights(3);
        char *above = reinterpret_cast<char*>(framed),
             *below = reinterpret_cast<char*>(framed + frame.width);
        for (int64_t i = 0; i < shape.height; ++i) {
            row.move_to(i);
            load_row<T, N>(grad, c, i, shape.width, [=](int64_t j, const Pixel& value) {
                Pixel *two_above = reinterpret_cast<Pixel*>(above + at[j]),
                      *two_below = reinterpret_cast<Pixel*>(below + at[j]);
                two_above[0] += w0[j] * value;
                two_above[1] += w1[j] * value;
                two_below[0] += w2[j] * value;
                two_below[1] += w3[j] * value;
            });
        }
        for (int64_t i = 0; i < shape.height; ++i)
            store_row<T, N>(out, c, i, shape.width,
                            [pixels = line(i)](int64_t j) { return pixels[j]; });
    }
};

template <class T>
int64_t frame_bytes(ImageShape shape) {
    const size_t pixel = shape.channels == 1 ? sizeof(T) : 4 * sizeof(T);
    return (Frame(shape).pixels() * static_cast<int64_t>(pixel) + 63) / 64 * 64;
}

// Returns the bytes of resample()'s scratch memory.
template <class T>
int64_t sampling_bytes(ImageShape shape) {
    return frame_bytes<T>(shape) + SamplingRow<T>::bytes(shape);
}

template <class T>
void resample(const View<const T>& from, const View<T>& to, ImageShape shape,
              const Sampling& sampling, bool adjoint, char* memory) {
    const auto some = [&](auto number, int64_t c) {
        using Pixel = typename PixelOf<T, number>::type;
        Sampler<T, number> sampler{
            shape,
            Frame(shape),
            reinterpret_cast<Pixel*>(memory),
            {memory + frame_bytes<T>(shape), sampling, shape, static_cast<int64_t>(sizeof(Pixel))}};
        if (adjoint) {
            sampler.sample_adjoint(from, to, c);
        } else {
            sampler.sample(from, to, c);
        }
    };
    for (int64_t c = 0; c < shape.channels; c += 4) {
        const int64_t left = shape.channels - c;
        if (left == 1) some(std::integral_constant<int, 1>{}, c);
        if (left == 2) some(std::integral_constant<int, 2>{}, c);
        if (left == 3) some(std::integral_constant<int, 3>{}, c);
        if (left >= 4) some(std::integral_constant<int, 4>{}, c);
    }
}

}  // namespace pdd::PDD_BACKEND
