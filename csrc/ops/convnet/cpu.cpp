// Passes over the whole network on the CPU. Between a layer's products and the next layer, only
// data that are needed again are written to memory: a plane of 16 channels of a convolution's
// result passes through norm, ReLU and pooling, and its gradient back through them, in the cache of
// the thread that computed it. docs/mathematics.md, section 2, has the dual pass,
// docs/performance.md its cost.
#include <algorithm>
#include <array>
#include <utility>

#include "core/context.h"
#include "core/parallel.h"
#include "ops/convnet/classifier.h"
#include "ops/convnet/direct_layer.h"
#include "ops/convnet/image_layer.h"
#include "ops/convnet/winograd_layer.h"
#include "ops/norm_relu_pool/plane.h"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {
namespace {

constexpr int64_t kMostBlocks = 32;  // each block halves the sides of an image

// ---- memory of a pass ----

// Activations of a block, with their tangents in a dual pass.
template <class T>
struct Activations {
    BlockedImages<T> input[2];  // of the block (none for the first block, whose input is the image)
    BlockedImages<T> z[2];      // result of its convolution (recomputed for the first block)
    BlockedImages<T> grad_out[2];  // gradient of the block's output
    T* statistics[4];  // [B, C] each: mean, rstd and, in a dual pass, mean_tangent and kappa
    T* affine[4];      // [C] each: weight, bias and their tangents
    T* parts[2];       // [B, C] each: an image's terms of the gradients of weight and bias
};

// k: 0 for values, 1 for tangents.
template <class T>
void place_activations(const ConvNetShape& s, int k, Arena<T>& arena, Activations<T>* all) {
    for (int64_t l = 0; l < s.depth; ++l) {
        const LayerShape shape = layer_shape(s, l);
        const int64_t pooled = (shape.height / 2) * (shape.width / 2);
        if (l > 0) {
            all[l].input[k] = arena.images(s.batch, shape.in_blocks, shape.pixels());
            all[l].z[k] = arena.images(s.batch, shape.out_blocks, shape.pixels());
        }
        all[l].grad_out[k] = arena.images(s.batch, shape.out_blocks, pooled);
        for (int i = 2 * k; i < 2 * k + 2; ++i)
            all[l].statistics[i] = arena.take(s.batch * shape.out_blocks * kBlock);
    }
}

// Places the values that a later pass can continue from, the content of `saved` buffers. Returns
// the place of the features [B, F].
template <class T>
T* place_values(const ConvNetShape& s, Arena<T>& arena, Activations<T>* all) {
    place_activations(s, 0, arena, all);
    return arena.take(s.batch * features_of(s));
}

template <class T>
int64_t scratch_of(const ConvNetShape& s, int numbers) {
    int64_t most = 0;
    for (int64_t l = 0; l < s.depth; ++l) {
        const LayerShape shape = layer_shape(s, l);
        const int64_t planes = numbers * shape.pixels() * kBlock;
        const int64_t own =
            l == 0 ? ImageLayer<T>::scratch(shape) : WinogradLayer<T>::scratch(shape);
        most = std::max(most, planes + own);
    }
    return most + kBlock;  // threads write to lines of their own
}

// Winograd takes 36 products per tile of 4x4 results, the direct convolution 9 per result. Measured
// with 8, 16, 32 and 128 channels (AVX2): Winograd is faster wherever it takes fewer products, from
// 1.03 times at 5x5 to 2.3 times at 16x16 (gradients of whole networks of two blocks). At 2x2,
// where it takes as many, it is equal or slower.
inline bool by_winograd(const LayerShape& s, int convolution) {
    if (convolution != kConvolutionAuto) return convolution == kConvolutionWinograd;
    return winograd::kPoints * winograd::tiles(s.height) * winograd::tiles(s.width) <
           9 * s.pixels();
}

// One pass over a batch, with everything that is in memory while it runs.
template <class T>
class Pass {
    using Layer = Activations<T>;

  public:
    // `direction`: tangent of the parameters, which makes the pass compute on dual numbers; nullptr
    // for a pass on values. `saved`: memory of the values; nullptr: the workspace. A dual pass
    // finds the values in `saved`, or else recomputes them.
    Pass(const ConvNetInput<T>& input, const T* direction, T* saved, int threads)
        : in_(input),
          s_(input.shape),
          parameters_{input.theta, direction},
          numbers_(direction ? 2 : 1),
          first_(direction && saved ? 1 : 0),
          threads_(threads),
          arena_(input.workspace),
          images_(layer_shape(s_, 0), Needs{true, numbers_}, arena_),
          classifier_{s_.batch, features_of(s_), s_.classes, threads} {
        Arena<T> own(saved);
        features_[0] = place_values(s_, saved ? own : arena_, layers_);
        if (dual()) {
            place_activations(s_, 1, arena_, layers_);
            features_[1] = arena_.take(s_.batch * features_of(s_));
        }
        const int64_t channels = blocks_of(s_.channels) * kBlock;
        for (int64_t l = 0; l < s_.depth; ++l) {
            for (int k = 0; k < 2 * numbers_; ++k) layers_[l].affine[k] = arena_.take(channels);
            for (T*& part : layers_[l].parts) part = arena_.take(s_.batch * channels);
        }
        for (int k = 0; k < numbers_; ++k) {
            grad_features_[k] = arena_.take(s_.batch * features_of(s_));
            logits_[k] = arena_.take(s_.batch * s_.classes);
            grad_logits_[k] = arena_.take(s_.batch * s_.classes);
        }
        scratch_each_ = (scratch_of<T>(s_, numbers_) + kBlock - 1) / kBlock * kBlock;
        scratch_ = arena_.take(scratch_each_ * threads);
    }

    // Elements of the workspace.
    int64_t size() const {
        int64_t most = 0;
        for (int64_t l = 1; l < s_.depth; ++l) {
            for (const bool backward : {false, true}) {
                Arena<T> counting(nullptr);
                with_layer(l, backward, counting, [](const auto&) {});
                most = std::max(most, counting.used());
            }
        }
        return arena_.used() + most;
    }

    T* logits(int k) const { return logits_[k]; }
    T* const* grad_logits() const { return grad_logits_; }

    // ---- forward ----

    // Lays out the images and the parameters that are not transformed layer by layer.
    void start() const {
        images_.set_images(in_.images, in_.image_stride, threads_);
        const int64_t channels = blocks_of(s_.channels) * kBlock;
        for (int k = 0; k < numbers_; ++k) {
            images_.set_weights(k, parameters_[k] + block_offsets(s_, 0).convolution);
            for (int64_t l = 0; l < s_.depth; ++l) {
                const BlockOffsets at = block_offsets(s_, l);
                for (const auto& [to, from] : {std::pair{layers_[l].affine[2 * k], at.weight},
                                               std::pair{layers_[l].affine[2 * k + 1], at.bias}}) {
                    std::copy_n(parameters_[k] + from, s_.channels, to);
                    std::fill(to + s_.channels, to + channels, T(0));
                }
            }
        }
    }

    // Images to logits.
    void forward() const {
        const LayerShape first = layer_shape(s_, 0);
        const double each = numbers_ * images_.plane_time() + norm_time(first);
        parallel_with_scratch(
            s_.batch * first.out_blocks, threads_, each, [&](int64_t i, int thread) {
                const int64_t image = i / first.out_blocks, block = i % first.out_blocks;
                const Planes z = planes_in(scratch(thread), first);
                for (int k = 0; k < numbers_; ++k) images_.convolve(k, image, block, z[k]);
                norm(0, image, block, z);
            });
        for (int64_t l = 1; l < s_.depth; ++l) {
            Arena<T> own = arena_;
            with_layer(l, false, own, [&](const auto& layer) { forward_layer(l, layer); });
        }
        for (int k = first_; k < numbers_; ++k) gather_features(k);
        classifier_.forward(features_[0], weight(0), bias(0), logits_[0], false);
        if (!dual()) return;
        classifier_.forward(features_[0], weight(1), bias(1), logits_[1], false);
        classifier_.forward(features_[1], weight(0), nullptr, logits_[1], true);
    }

    // ---- backward ----

    // Computes the gradients of theta and of the images [B, C_in, H, W] from those of the logits;
    // in a dual pass, the tangents of both. `grad_logits`: one, or two in a dual pass, where
    // `grad_theta` may be nullptr. `grad_images` may be nullptr in any pass. `wanted` [B] says
    // whose gradient is wanted; nullptr: all.
    void backward(const T* const* grad_logits, T* grad_theta, const bool* wanted,
                  T* grad_images) const {
        const int asked = numbers_ - 1;  // index of the component whose gradients are wanted
        if (grad_theta) {
            T* grad = grad_theta + classifier_offset(s_);
            classifier_.weight_grad(grad_logits[asked], features_[0], grad, false);
            if (dual()) classifier_.weight_grad(grad_logits[0], features_[1], grad, true);
            classifier_.bias_grad(grad_logits[asked], grad + s_.classes * classifier_.features);
        }
        for (int k = first_; k < numbers_; ++k) {
            classifier_.input_grad(grad_logits[k], weight(0), grad_features_[k], false);
            if (k == 1) classifier_.input_grad(grad_logits[0], weight(1), grad_features_[1], true);
            scatter_features(k);
        }
        for (int64_t l = s_.depth - 1; l > 0; --l) {
            Arena<T> own = arena_;
            with_layer(l, true, own,
                       [&](const auto& layer) { backward_layer(l, layer, grad_theta); });
        }
        const LayerShape first = layer_shape(s_, 0);
        const double each =
            first.out_blocks * (3 * numbers_ * images_.plane_time() + norm_time(first));
        parallel_with_scratch(s_.batch, threads_, each, [&](int64_t image, int thread) {
            const bool moves = grad_images && (!wanted || wanted[image]);
            if (!moves && !grad_theta) return;
            const Planes z = planes_in(scratch(thread), first);
            T* by_tap = scratch(thread) + numbers_ * first.pixels() * kBlock;
            for (int64_t block = 0; block < first.out_blocks; ++block) {
                for (int k = 0; k < numbers_; ++k) images_.convolve(k, image, block, z[k]);
                // In place. The images' tangent needs the values' gradient too.
                norm_backward(0, image, block, z, dual() && !moves ? Planes{nullptr, z[1]} : z);
                if (grad_theta) images_.set_weight_grad(image, block, z[asked]);
                if (!moves) continue;
                images_.add_by_tap(0, block, z[asked], by_tap, block ? Write::add : Write::replace);
                if (dual()) images_.add_by_tap(1, block, z[0], by_tap, Write::add);
            }
            if (moves) image_grad(by_tap, grad_images, image);
        });
        if (!grad_theta) return;
        images_.weight_grad(grad_theta + block_offsets(s_, 0).convolution, threads_);
        finish_affine(grad_theta);
    }

  private:
    bool dual() const { return numbers_ == 2; }

    // The linear layer's parameters, or their tangents.
    const T* weight(int k) const { return parameters_[k] + classifier_offset(s_); }
    const T* bias(int k) const { return weight(k) + s_.classes * classifier_.features; }

    T* scratch(int thread) const { return scratch_ + thread * scratch_each_; }

    // Calls use(layer) with block l's convolution, whose memory is in `own`.
    template <class Use>
    void with_layer(int64_t l, bool backward, Arena<T>& own, const Use& use) const {
        const LayerShape shape = layer_shape(s_, l);
        if (by_winograd(shape, in_.convolution)) {
            const WinogradLayer<T> layer(shape, Needs{backward, numbers_}, own);
            use(layer);
        } else {
            const DirectLayer<T> layer(shape, Needs{backward, numbers_}, own);
            use(layer);
        }
    }

    // ---- norm, ReLU and pooling of one plane of 16 channels ----

    // A plane of values and, in a dual pass, that of their tangents.
    using Planes = std::array<T*, 2>;
    Planes planes_in(T* memory, const LayerShape& s) const {
        return {memory, dual() ? memory + s.pixels() * kBlock : nullptr};
    }
    Planes planes_of(const BlockedImages<T> (&images)[2], int64_t image, int64_t block) const {
        return {images[0].plane(image, block), dual() ? images[1].plane(image, block) : nullptr};
    }

    int64_t of_plane(int64_t image, int64_t block) const {
        return (image * blocks_of(s_.channels) + block) * kBlock;
    }
    PlaneShape plane_shape(int64_t l) const { return {1, kBlock, s_.height >> l, s_.width >> l}; }
    // Place of block l's result; after the last block, the place where its gradient will be.
    T* result(int64_t l, int k, int64_t image, int64_t block) const {
        return (l + 1 < s_.depth ? layers_[l + 1].input[k] : layers_[l].grad_out[k])
            .plane(image, block);
    }

    // Nanoseconds of norm or norm_backward of a plane.
    double norm_time(const LayerShape& s) const {
        return numbers_ * move_time<T>(4 * s.pixels() * kBlock);
    }

    template <class Params, class Run>
    static void each_vector(const Params& p, const Run& run) {
        for (int64_t lane = 0; lane < kBlock; lane += kLanes<T, Vector<T>>)
            run(Plane<T, Vector<T>>{p.shape, 0, lane}, p);
    }

    void norm(int64_t l, int64_t image, int64_t block, const Planes& z) const {
        const Layer& a = layers_[l];
        const int64_t at = of_plane(image, block), c = block * kBlock;
        if (!dual()) {
            const NormReluPool<T> p{plane_shape(l),
                                    in_.eps,
                                    z[0],
                                    a.affine[0] + c,
                                    a.affine[1] + c,
                                    result(l, 0, image, block),
                                    a.statistics[0] + at,
                                    a.statistics[1] + at};
            return each_vector(p, [](const auto& plane, const auto& params) {
                norm_relu_pool_plane(plane, params);
            });
        }
        const NormReluPoolDual<T> p{plane_shape(l),
                                    in_.eps,
                                    z[0],
                                    z[1],
                                    a.affine[0] + c,
                                    a.affine[2] + c,
                                    a.affine[1] + c,
                                    a.affine[3] + c,
                                    first_ == 0 ? result(l, 0, image, block) : nullptr,
                                    result(l, 1, image, block),
                                    a.statistics[0] + at,
                                    a.statistics[1] + at,
                                    a.statistics[2] + at,
                                    a.statistics[3] + at};
        each_vector(p, [](const auto& plane, const auto& params) {
            norm_relu_pool_dual_plane(plane, params);
        });
    }

    // In a dual pass, the values' grad_z may be nullptr.
    void norm_backward(int64_t l, int64_t image, int64_t block, const Planes& z,
                       const Planes& grad_z) const {
        const Layer& a = layers_[l];
        const int64_t at = of_plane(image, block), c = block * kBlock;
        if (!dual()) {
            const NormReluPoolBackward<T> p{plane_shape(l),
                                            a.grad_out[0].plane(image, block),
                                            z[0],
                                            a.statistics[0] + at,
                                            a.statistics[1] + at,
                                            a.affine[0] + c,
                                            a.affine[1] + c,
                                            grad_z[0],
                                            a.parts[0] + at,
                                            a.parts[1] + at};
            return each_vector(p, [](const auto& plane, const auto& params) {
                norm_relu_pool_backward_plane(plane, params);
            });
        }
        const NormReluPoolDualBackward<T> p{plane_shape(l),
                                            a.grad_out[0].plane(image, block),
                                            a.grad_out[1].plane(image, block),
                                            z[0],
                                            z[1],
                                            a.statistics[0] + at,
                                            a.statistics[1] + at,
                                            a.statistics[2] + at,
                                            a.statistics[3] + at,
                                            a.affine[0] + c,
                                            a.affine[2] + c,
                                            a.affine[1] + c,
                                            grad_z[0],
                                            grad_z[1],
                                            a.parts[0] + at,
                                            a.parts[1] + at};
        each_vector(p, [](const auto& plane, const auto& params) {
            norm_relu_pool_dual_backward_plane(plane, params);
        });
    }

    // Writes the sums of the images' terms as the gradients of norm weight and bias; biases of
    // convolutions have no gradient.
    void finish_affine(T* grad) const {
        for (int64_t l = 0; l < s_.depth; ++l) {
            const BlockOffsets at = block_offsets(s_, l);
            std::fill_n(grad + at.convolution_bias, s_.channels, T(0));
            for (int k = 0; k < 2; ++k) {
                T* to = grad + (k == 0 ? at.weight : at.bias);
                std::fill_n(to, s_.channels, T(0));
                for (int64_t b = 0; b < s_.batch; ++b) {
                    const T* part = layers_[l].parts[k] + of_plane(b, 0);
                    for (int64_t c = 0; c < s_.channels; ++c) to[c] += part[c];
                }
            }
        }
    }

    // ---- blocks after the first ----

    // Calls chunk(first image, count) for all images, as many at a time as the layer takes.
    template <class Conv, class Chunk>
    void each_chunk(const Conv& conv, const Chunk& chunk) const {
        const int64_t most = conv.images_at_once(), chunks = (s_.batch + most - 1) / most;
        for (int64_t i = 0; i < chunks; ++i) {
            const int64_t first = s_.batch * i / chunks;
            chunk(first, s_.batch * (i + 1) / chunks - first);
        }
    }

    // Calls body(task, whether of tangents) for the components that are computed. A tangent takes
    // two products and a value one. They alternate, so that threads, which get contiguous ranges,
    // get equal shares of both.
    template <class Body>
    void each_made(int64_t tasks, double of_values, const Body& body) const {
        const int64_t made = numbers_ - first_;
        const double each = of_values * (dual() ? 3 - first_ : 1) / made;
        parallel_for(tasks * made, threads_, each,
                     [&](int64_t i) { body(i / made, first_ + i % made == 1); });
    }

    template <class Conv>
    void forward_layer(int64_t l, const Conv& conv) const {
        const Layer& a = layers_[l];
        const int64_t blocks = blocks_of(s_.channels);
        for (int k = 0; k < numbers_; ++k)
            conv.set_weights(k, parameters_[k] + block_offsets(s_, l).convolution, false, threads_);
        const double moved = numbers_ * conv.plane_time(), normed = norm_time(layer_shape(s_, l));
        each_chunk(conv, [&](int64_t first, int64_t count) {
            parallel_with_scratch(count * blocks, threads_, moved, [&](int64_t i, int thread) {
                const int64_t image = i / blocks, block = i % blocks;
                for (int k = 0; k < numbers_; ++k)
                    conv.set_input(k, image, block, a.input[k].plane(first + image, block),
                                   scratch(thread));
            });
            each_made(conv.forward_tasks(count), conv.forward_time(count),
                      [&](int64_t task, bool tangent) { conv.forward(task, count, tangent); });
            parallel_with_scratch(count * blocks, threads_, moved + normed,
                                  [&](int64_t i, int thread) {
                                      const int64_t image = i / blocks, block = i % blocks;
                                      const Planes z = planes_of(a.z, first + image, block);
                                      for (int k = first_; k < numbers_; ++k)
                                          conv.get_output(k, image, block, z[k], scratch(thread));
                                      norm(l, first + image, block, z);
                                  });
        });
    }

    template <class Conv>
    void backward_layer(int64_t l, const Conv& conv, T* grad_theta) const {
        const Layer &a = layers_[l], &below = layers_[l - 1];
        const LayerShape shape = layer_shape(s_, l);
        const int64_t blocks = blocks_of(s_.channels), at = block_offsets(s_, l).convolution;
        for (int k = 0; k < numbers_; ++k) conv.set_weights(k, parameters_[k] + at, true, threads_);
        if (grad_theta) conv.clear_weight_grad(threads_);
        const double moved = numbers_ * conv.plane_time(), normed = norm_time(shape);
        each_chunk(conv, [&](int64_t first, int64_t count) {
            parallel_with_scratch(
                count * blocks, threads_, 2 * moved + normed, [&](int64_t i, int thread) {
                    const int64_t image = i / blocks, block = i % blocks;
                    const Planes grad_z = planes_in(scratch(thread), shape);
                    T* own = scratch(thread) + numbers_ * shape.pixels() * kBlock;
                    norm_backward(l, first + image, block, planes_of(a.z, first + image, block),
                                  grad_z);
                    for (int k = 0; k < numbers_; ++k) {
                        conv.set_grad(k, image, block, grad_z[k], own);
                        if (grad_theta)
                            conv.set_input(k, image, block, a.input[k].plane(first + image, block),
                                           own);
                    }
                });
            each_made(conv.input_grad_tasks(count), conv.input_grad_time(count),
                      [&](int64_t task, bool tangent) { conv.input_grad(task, count, tangent); });
            if (grad_theta)
                parallel_for(conv.weight_grad_tasks(count), threads_,
                             numbers_ * conv.weight_grad_time(count),
                             [&](int64_t task) { conv.add_weight_grad(task, count, dual()); });
            parallel_with_scratch(count * blocks, threads_, moved, [&](int64_t i, int thread) {
                const int64_t image = i / blocks, block = i % blocks;
                for (int k = first_; k < numbers_; ++k)
                    conv.get_input_grad(k, image, block,
                                        below.grad_out[k].plane(first + image, block),
                                        scratch(thread));
            });
        });
        if (grad_theta) conv.weight_grad(grad_theta + at, threads_);
    }

    // ---- between the last block and the linear layer: features in the order (channel, row,
    // column) ----

    template <class Move>
    void each_feature(int k, T* features, const Move& move) const {
        const int64_t pixels = (s_.height >> s_.depth) * (s_.width >> s_.depth),
                      each = classifier_.features;
        const BlockedImages<T>& images = layers_[s_.depth - 1].grad_out[k];
        for (int64_t b = 0; b < s_.batch; ++b)
            for (int64_t c = 0; c < images.blocks * kBlock; ++c)
                for (int64_t p = 0; p < pixels; ++p)
                    move(images.plane(b, c / kBlock) + p * kBlock + c % kBlock,
                         c < s_.channels ? features + b * each + c * pixels + p : nullptr);
    }
    void gather_features(int k) const {
        each_feature(k, features_[k], [](const T* blocked, T* feature) {
            if (feature) *feature = *blocked;
        });
    }
    void scatter_features(int k) const {
        each_feature(k, grad_features_[k],
                     [](T* blocked, const T* feature) { *blocked = feature ? *feature : T(0); });
    }

    void image_grad(T* by_tap, T* images, int64_t row) const {
        const LayerShape first = layer_shape(s_, 0);
        T* own = by_tap + first.pixels() * blocks_of(9 * s_.in_channels) * kBlock;
        images_.image_grad(by_tap, own, images + row * s_.in_channels * first.pixels());
    }

    const ConvNetInput<T>& in_;
    const ConvNetShape& s_;
    const T* parameters_[2];  // theta, and the direction
    int numbers_;             // 1: values; 2: values and tangents
    int first_;               // first component that is computed: 1 if values were saved
    int threads_;
    Arena<T> arena_;
    ImageLayer<T> images_;
    Classifier<T> classifier_;
    Layer layers_[kMostBlocks] = {};
    T *features_[2] = {}, *grad_features_[2] = {}, *logits_[2] = {}, *grad_logits_[2] = {};
    int64_t scratch_each_ = 0;
    T* scratch_ = nullptr;
};

template <class T>
Status loss(const Pass<T>& pass, const ConvNetGradient<T>& p, Context context) {
    return cross_entropy<T>({p.input.shape.batch, p.input.shape.classes, pass.logits(0), p.hard,
                             p.soft, p.losses, pass.grad_logits()[0]},
                            context);
}

template <class T>
Status loss_dual(const Pass<T>& pass, const ConvNetDual<T>& p, Context context) {
    return cross_entropy_dual<T>(
        {p.input.shape.batch, p.input.shape.classes, pass.logits(0), pass.logits(1), p.hard, p.soft,
         p.losses_tangent, pass.grad_logits()[0], pass.grad_logits()[1], p.labels_tangent},
        context);
}

}  // namespace

template <class T>
Status convnet_forward(const ConvNetForward<T>& p, Context context) {
    const Pass<T> pass(p.input, nullptr, p.saved, context.threads);
    pass.start();
    pass.forward();
    std::copy_n(pass.logits(0), p.input.shape.batch * p.input.shape.classes, p.logits);
    return kSuccess;
}

template <class T>
Status convnet_backward(const ConvNetBackward<T>& p, Context context) {
    const Pass<T> pass(p.input, nullptr, p.saved, context.threads);
    pass.start();
    pass.backward(&p.grad_logits, p.grad_theta, nullptr, p.grad_images);
    return kSuccess;
}

template <class T>
Status convnet_gradient(const ConvNetGradient<T>& p, Context context) {
    const Pass<T> pass(p.input, nullptr, p.saved, context.threads);
    pass.start();
    pass.forward();
    if (const Status bad = loss(pass, p, context)) return bad;
    pass.backward(pass.grad_logits(), p.grad_theta, nullptr, nullptr);
    return kSuccess;
}

template <class T>
Status convnet_dual(const ConvNetDual<T>& p, Context context) {
    const Pass<T> pass(p.input, p.direction, p.saved, context.threads);
    pass.start();
    pass.forward();
    if (const Status bad = loss_dual(pass, p, context)) return bad;
    if (p.theta_tangent || p.images_tangent)
        pass.backward(pass.grad_logits(), p.theta_tangent, p.wanted, p.images_tangent);
    return kSuccess;
}

PDD_INSTANTIATE(convnet_forward, ConvNetForward)
PDD_INSTANTIATE(convnet_backward, ConvNetBackward)
PDD_INSTANTIATE(convnet_gradient, ConvNetGradient)
PDD_INSTANTIATE(convnet_dual, ConvNetDual)

ConvNetSizes convnet_sizes(ConvNetShape shape, int convolution, bool dual, bool saved,
                           int threads) {
    ConvNetInput<float> input{};
    input.shape = shape;
    input.convolution = convolution;
    Arena<float> values(nullptr);
    Activations<float> unused[kMostBlocks];
    place_values(shape, values, unused);
    const float along{};  // only its presence matters for the sizes
    const Pass<float> pass(input, dual ? &along : nullptr, nullptr, threads);
    return {pass.size() - (saved ? values.used() : 0), values.used()};
}

}  // namespace pdd::PDD_BACKEND
