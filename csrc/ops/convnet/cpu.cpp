// The passes over the whole network on the CPU. Between a layer's products and the next layer nothing is written to
// memory that is not needed again: a plane of 16 channels of a convolution's result goes through norm, ReLU and
// pooling, and its gradient back through them, in the cache of the thread that made it. docs/mathematics.md, section 2,
// has the dual pass; docs/performance.md what it takes.
#include <algorithm>
#include <utility>

#include "core/context.h"
#include "core/parallel.h"
#include "ops/convnet/classifier.h"
#include "ops/convnet/direct_layer.h"
#include "ops/convnet/image_layer.h"
#include "ops/convnet/winograd_layer.h"
#include "ops/cross_entropy/math.h"
#include "ops/norm_relu_pool/plane.h"
#include "ops/operators.h"

namespace pdd::PDD_BACKEND {
namespace {

constexpr int64_t kMostBlocks = 32;  // a side of an image is halved by each

// ---- what a pass has in memory ----

// A number and, in a dual pass, its tangent.
template <class T>
struct Activations {
    BlockedImages<T> input[2];     // of the block (the first block's is the image: none)
    BlockedImages<T> z[2];         // its convolution's result (the first block's is made again)
    BlockedImages<T> grad_out[2];  // gradient of what the block gives
    T* statistics[4];              // [B, C] each: mean, rstd and, in a dual pass, mean_tangent and kappa
    T* affine[4];                  // [C] each: weight, bias and their tangents
    T* parts[2];                   // [B, C] each: an image's terms of the gradients of weight and bias
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
        for (int i = 2 * k; i < 2 * k + 2; ++i) all[l].statistics[i] = arena.take(s.batch * shape.out_blocks * kBlock);
    }
}

// Values that a later pass can go on from; what `kept` buffers hold. Gives the place of the features [B, F].
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
        const int64_t own = l == 0 ? ImageLayer<T>::scratch(shape) : WinogradLayer<T>::scratch(shape);
        most = std::max(most, planes + own);
    }
    return most + kBlock;  // threads write to lines of their own
}

// Winograd takes 36 products a tile of 4x4 results where the direct convolution takes 9 a result. Measured with 8, 16,
// 32 and 128 channels (AVX2): faster wherever that is fewer, 1.03 times at 5x5 to 2.3 times at 16x16 (gradients of
// whole networks of two blocks); equal or slower at 2x2, where it is as many.
inline bool by_winograd(const LayerShape& s, int convolution) {
    if (convolution != kConvolutionAuto) return convolution == kConvolutionWinograd;
    const int64_t tiles = ((s.height + 3) / 4) * ((s.width + 3) / 4);
    return 36 * tiles < 9 * s.pixels();
}

// One pass over a batch: everything that lies in memory while it runs.
template <class T>
class Pass {
    using Layer = Activations<T>;

  public:
    // `numbers`: 1 for values, 2 for values and tangents. `kept`: where the values lie, or nullptr: in the workspace; a
    // dual pass finds them there, or has to make them again.
    Pass(const ConvNetInput<T>& input, int numbers, T* kept, int threads)
        : in_(input),
          s_(input.shape),
          numbers_(numbers),
          remade_(numbers == 2 && !kept),
          threads_(threads),
          arena_(input.workspace),
          images_(layer_shape(s_, 0), Needs{true, numbers}, arena_),
          classifier_{s_.batch, features_of(s_), s_.classes, threads} {
        Arena<T> own(kept);
        features_[0] = place_values(s_, kept ? own : arena_, layers_);
        if (numbers == 2) {
            place_activations(s_, 1, arena_, layers_);
            features_[1] = arena_.take(s_.batch * features_of(s_));
        }
        const int64_t channels = blocks_of(s_.channels) * kBlock;
        for (int64_t l = 0; l < s_.depth; ++l) {
            for (int k = 0; k < 2 * numbers; ++k) layers_[l].affine[k] = arena_.take(channels);
            for (T*& part : layers_[l].parts) part = arena_.take(s_.batch * channels);
        }
        for (int k = 0; k < numbers; ++k) {
            grad_features_[k] = arena_.take(s_.batch * features_of(s_));
            logits_[k] = arena_.take(s_.batch * s_.classes);
            grad_logits_[k] = arena_.take(s_.batch * s_.classes);
        }
        scratch_each_ = (scratch_of<T>(s_, numbers) + kBlock - 1) / kBlock * kBlock;
        scratch_ = arena_.take(scratch_each_ * threads);
    }

    // Numbers of the workspace.
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
    T* grad_logits(int k) const { return grad_logits_[k]; }

    // ---- forward ----

    void start(const T* direction) {
        images_.set_images(in_.images, in_.image_stride, threads_);
        const T* parameters[2] = {in_.theta, direction};
        for (int k = 0; k < numbers_; ++k) {
            images_.set_weights(k, parameters[k] + block_offsets(s_, 0).convolution);
            for (int64_t l = 0; l < s_.depth; ++l) {
                const BlockOffsets at = block_offsets(s_, l);
                const int64_t channels = blocks_of(s_.channels) * kBlock;
                for (const auto& [to, from] : {std::pair{layers_[l].affine[2 * k], at.weight},
                                               std::pair{layers_[l].affine[2 * k + 1], at.bias}}) {
                    std::copy_n(parameters[k] + from, s_.channels, to);
                    std::fill(to + s_.channels, to + channels, T(0));
                }
            }
        }
    }

    // Images to logits, values.
    void forward() {
        const LayerShape first = layer_shape(s_, 0);
        parallel_with_scratch(s_.batch * first.out_blocks, threads_, [&](int64_t i, int thread) {
            const int64_t image = i / first.out_blocks, block = i % first.out_blocks;
            T* z = scratch(thread);
            images_.convolve(0, image, block, z);
            norm(0, image, block, z);
        });
        for (int64_t l = 1; l < s_.depth; ++l) {
            Arena<T> own = arena_;
            with_layer(l, false, own, [&](const auto& layer) { forward_layer(l, layer); });
        }
        gather_features(0);
        const T* weight = in_.theta + classifier_offset(s_);
        classifier_.forward(features_[0], weight, weight + s_.classes * classifier_.features, logits_[0], false);
    }

    // Images to logits, values and tangents; values that were kept are not made again.
    void forward_dual(const T* direction) {
        const LayerShape first = layer_shape(s_, 0);
        parallel_with_scratch(s_.batch * first.out_blocks, threads_, [&](int64_t i, int thread) {
            const int64_t image = i / first.out_blocks, block = i % first.out_blocks;
            T *z = scratch(thread), *z_tangent = z + first.pixels() * kBlock;
            images_.convolve(0, image, block, z);
            images_.convolve(1, image, block, z_tangent);
            norm_dual(0, image, block, z, z_tangent);
        });
        for (int64_t l = 1; l < s_.depth; ++l) {
            Arena<T> own = arena_;
            with_layer(l, false, own, [&](const auto& layer) { forward_layer_dual(l, layer, direction); });
        }
        for (int k = remade_ ? 0 : 1; k < 2; ++k) gather_features(k);
        const T *weight = in_.theta + classifier_offset(s_), *along = direction + classifier_offset(s_);
        const int64_t biases = s_.classes * classifier_.features;
        classifier_.forward(features_[0], weight, weight + biases, logits_[0], false);
        classifier_.forward(features_[0], along, along + biases, logits_[1], false);
        classifier_.forward(features_[1], weight, nullptr, logits_[1], true);
    }

    // ---- backward ----

    void backward(const T* grad_logits, T* grad_theta, T* grad_images) {
        T* linear = grad_theta + classifier_offset(s_);
        classifier_.weight_grad(grad_logits, features_[0], linear, false);
        classifier_.bias_grad(grad_logits, linear + s_.classes * classifier_.features);
        classifier_.input_grad(grad_logits, in_.theta + classifier_offset(s_), grad_features_[0], false);
        scatter_features(0);
        for (int64_t l = s_.depth - 1; l > 0; --l) {
            Arena<T> own = arena_;
            with_layer(l, true, own, [&](const auto& layer) { backward_layer(l, layer, grad_theta); });
        }
        const LayerShape first = layer_shape(s_, 0);
        parallel_with_scratch(s_.batch, threads_, [&](int64_t image, int thread) {
            T *z = scratch(thread), *by_tap = z + first.pixels() * kBlock;
            for (int64_t block = 0; block < first.out_blocks; ++block) {
                images_.convolve(0, image, block, z);
                norm_backward(0, image, block, z, z);
                images_.set_weight_grad(image, block, z);
                if (grad_images) images_.add_by_tap(0, block, z, by_tap, block ? Write::add : Write::replace);
            }
            if (grad_images) image_grad(by_tap, grad_images, image);
        });
        images_.weight_grad(grad_theta + block_offsets(s_, 0).convolution, threads_);
        finish_affine(grad_theta);
    }

    // `wanted`: as in ConvNetDual. Either of theta_tangent and images_tangent may be absent.
    void backward_dual(const T* direction, const bool* wanted, T* theta_tangent, T* images_tangent) {
        const int64_t linear = classifier_offset(s_);
        if (theta_tangent) {
            classifier_.weight_grad(grad_logits_[1], features_[0], theta_tangent + linear, false);
            classifier_.weight_grad(grad_logits_[0], features_[1], theta_tangent + linear, true);
            classifier_.bias_grad(grad_logits_[1], theta_tangent + linear + s_.classes * classifier_.features);
        }
        classifier_.input_grad(grad_logits_[1], in_.theta + linear, grad_features_[1], false);
        classifier_.input_grad(grad_logits_[0], direction + linear, grad_features_[1], true);
        scatter_features(1);
        if (remade_) {
            classifier_.input_grad(grad_logits_[0], in_.theta + linear, grad_features_[0], false);
            scatter_features(0);
        }
        for (int64_t l = s_.depth - 1; l > 0; --l) {
            Arena<T> own = arena_;
            with_layer(l, true, own,
                       [&](const auto& layer) { backward_layer_dual(l, layer, direction, theta_tangent); });
        }
        const LayerShape first = layer_shape(s_, 0);
        parallel_with_scratch(s_.batch, threads_, [&](int64_t image, int thread) {
            const bool moves = wanted && wanted[image];
            if (!moves && !theta_tangent) return;
            const int64_t plane = first.pixels() * kBlock;
            T *z = scratch(thread), *z_tangent = z + plane, *by_tap = z_tangent + plane;
            for (int64_t block = 0; block < first.out_blocks; ++block) {
                images_.convolve(0, image, block, z);
                images_.convolve(1, image, block, z_tangent);
                norm_dual_backward(0, image, block, z, z_tangent, moves ? z : nullptr, z_tangent);
                if (theta_tangent) images_.set_weight_grad(image, block, z_tangent);
                if (!moves) continue;
                images_.add_by_tap(0, block, z_tangent, by_tap, block ? Write::add : Write::replace);
                images_.add_by_tap(1, block, z, by_tap, Write::add);
            }
            if (moves) image_grad(by_tap, images_tangent, image);
        });
        if (!theta_tangent) return;
        images_.weight_grad(theta_tangent + block_offsets(s_, 0).convolution, threads_);
        finish_affine(theta_tangent);
    }

  private:
    T* scratch(int thread) const { return scratch_ + thread * scratch_each_; }

    // Calls use(layer) with block l's convolution, which works in `own`.
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

    int64_t of_plane(int64_t image, int64_t block) const { return (image * blocks_of(s_.channels) + block) * kBlock; }
    PlaneShape plane_shape(int64_t l) const { return {1, kBlock, s_.height >> l, s_.width >> l}; }
    // Where block l's result goes; after the last block, where its gradient will lie.
    T* result(int64_t l, int k, int64_t image, int64_t block) const {
        return (l + 1 < s_.depth ? layers_[l + 1].input[k] : layers_[l].grad_out[k]).plane(image, block);
    }

    template <class Params, class Run>
    static void each_vector(const Params& p, const Run& run) {
        for (int64_t lane = 0; lane < kBlock; lane += kLanes<T, Vector<T>>)
            run(Plane<T, Vector<T>>{p.shape, 0, lane}, p);
    }

    void norm(int64_t l, int64_t image, int64_t block, const T* z) const {
        const Layer& a = layers_[l];
        const int64_t at = of_plane(image, block), c = block * kBlock;
        const NormReluPool<T> p{plane_shape(l),
                                in_.eps,
                                z,
                                a.affine[0] + c,
                                a.affine[1] + c,
                                result(l, 0, image, block),
                                a.statistics[0] + at,
                                a.statistics[1] + at};
        each_vector(p, [](const auto& plane, const auto& params) { norm_relu_pool_plane(plane, params); });
    }

    void norm_backward(int64_t l, int64_t image, int64_t block, const T* z, T* grad_z) const {
        const Layer& a = layers_[l];
        const int64_t at = of_plane(image, block), c = block * kBlock;
        const NormReluPoolBackward<T> p{plane_shape(l),
                                        a.grad_out[0].plane(image, block),
                                        z,
                                        a.statistics[0] + at,
                                        a.statistics[1] + at,
                                        a.affine[0] + c,
                                        a.affine[1] + c,
                                        grad_z,
                                        a.parts[0] + at,
                                        a.parts[1] + at};
        each_vector(p, [](const auto& plane, const auto& params) { norm_relu_pool_backward_plane(plane, params); });
    }

    void norm_dual(int64_t l, int64_t image, int64_t block, const T* z, const T* z_tangent) const {
        const Layer& a = layers_[l];
        const int64_t at = of_plane(image, block), c = block * kBlock;
        const NormReluPoolDual<T> p{plane_shape(l),
                                    in_.eps,
                                    z,
                                    z_tangent,
                                    a.affine[0] + c,
                                    a.affine[2] + c,
                                    a.affine[1] + c,
                                    a.affine[3] + c,
                                    remade_ ? result(l, 0, image, block) : nullptr,
                                    result(l, 1, image, block),
                                    a.statistics[0] + at,
                                    a.statistics[1] + at,
                                    a.statistics[2] + at,
                                    a.statistics[3] + at};
        each_vector(p, [](const auto& plane, const auto& params) { norm_relu_pool_dual_plane(plane, params); });
    }

    void norm_dual_backward(int64_t l, int64_t image, int64_t block, const T* z, const T* z_tangent, T* grad_z,
                            T* grad_z_tangent) const {
        const Layer& a = layers_[l];
        const int64_t at = of_plane(image, block), c = block * kBlock;
        const NormReluPoolDualBackward<T> p{plane_shape(l),
                                            a.grad_out[0].plane(image, block),
                                            a.grad_out[1].plane(image, block),
                                            z,
                                            z_tangent,
                                            a.statistics[0] + at,
                                            a.statistics[1] + at,
                                            a.statistics[2] + at,
                                            a.statistics[3] + at,
                                            a.affine[0] + c,
                                            a.affine[2] + c,
                                            a.affine[1] + c,
                                            grad_z,
                                            grad_z_tangent,
                                            a.parts[0] + at,
                                            a.parts[1] + at};
        each_vector(p,
                    [](const auto& plane, const auto& params) { norm_relu_pool_dual_backward_plane(plane, params); });
    }

    // Sums of the images' terms, to where norm weight and bias lie; biases of convolutions have no gradient.
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

    template <class Conv>
    void set_inputs(const Conv& conv, int64_t l, int k, int64_t first, int64_t i, int thread) const {
        const int64_t blocks = blocks_of(s_.channels), image = i / blocks, block = i % blocks;
        conv.set_input(k, image, block, layers_[l].input[k].plane(first + image, block), scratch(thread));
    }

    // Calls chunk(first image, count) for all images, as many at a time as the layer takes.
    template <class Conv, class Chunk>
    void each_chunk(const Conv& conv, const Chunk& chunk) const {
        const int64_t most = conv.images_at_once(), chunks = (s_.batch + most - 1) / most;
        for (int64_t i = 0; i < chunks; ++i) {
            const int64_t first = s_.batch * i / chunks;
            chunk(first, s_.batch * (i + 1) / chunks - first);
        }
    }

    template <class Conv>
    void forward_layer(int64_t l, const Conv& conv) const {
        const Layer& a = layers_[l];
        const int64_t blocks = blocks_of(s_.channels);
        conv.set_weights(0, in_.theta + block_offsets(s_, l).convolution, false, threads_);
        each_chunk(conv, [&](int64_t first, int64_t count) {
            parallel_with_scratch(count * blocks, threads_,
                                  [&](int64_t i, int thread) { set_inputs(conv, l, 0, first, i, thread); });
            parallel_for(conv.forward_tasks(count), threads_, [&](int64_t task) { conv.forward(task, count, false); });
            parallel_with_scratch(count * blocks, threads_, [&](int64_t i, int thread) {
                const int64_t image = i / blocks, block = i % blocks;
                T* z = a.z[0].plane(first + image, block);
                conv.get_output(0, image, block, z, scratch(thread));
                norm(l, first + image, block, z);
            });
        });
    }

    template <class Conv>
    void backward_layer(int64_t l, const Conv& conv, T* grad_theta) const {
        const Layer &a = layers_[l], &below = layers_[l - 1];
        const int64_t blocks = blocks_of(s_.channels), plane = layer_shape(s_, l).pixels() * kBlock;
        const int64_t at = block_offsets(s_, l).convolution;
        conv.set_weights(0, in_.theta + at, true, threads_);
        conv.clear_weight_grad(threads_);
        each_chunk(conv, [&](int64_t first, int64_t count) {
            parallel_with_scratch(count * blocks, threads_, [&](int64_t i, int thread) {
                const int64_t image = i / blocks, block = i % blocks;
                T *grad_z = scratch(thread), *own = grad_z + plane;
                norm_backward(l, first + image, block, a.z[0].plane(first + image, block), grad_z);
                conv.set_grad(0, image, block, grad_z, own);
                conv.set_input(0, image, block, a.input[0].plane(first + image, block), own);
            });
            const int64_t inputs = conv.input_grad_tasks(count);
            parallel_for(inputs + conv.weight_grad_tasks(count), threads_, [&](int64_t task) {
                task < inputs ? conv.input_grad(task, count, false) : conv.add_weight_grad(task - inputs, count, false);
            });
            parallel_with_scratch(count * blocks, threads_, [&](int64_t i, int thread) {
                const int64_t image = i / blocks, block = i % blocks;
                conv.get_input_grad(0, image, block, below.grad_out[0].plane(first + image, block), scratch(thread));
            });
        });
        conv.weight_grad(grad_theta + at, threads_);
    }

    template <class Conv>
    void forward_layer_dual(int64_t l, const Conv& conv, const T* direction) const {
        const Layer& a = layers_[l];
        const int64_t blocks = blocks_of(s_.channels), at = block_offsets(s_, l).convolution;
        conv.set_weights(0, in_.theta + at, false, threads_);
        conv.set_weights(1, direction + at, false, threads_);
        each_chunk(conv, [&](int64_t first, int64_t count) {
            parallel_with_scratch(count * blocks, threads_, [&](int64_t i, int thread) {
                for (int k = 0; k < 2; ++k) set_inputs(conv, l, k, first, i, thread);
            });
            const int64_t tasks = conv.forward_tasks(count);
            parallel_for(tasks * (1 + remade_), threads_,
                         [&](int64_t task) { conv.forward(task % tasks, count, task < tasks); });
            parallel_with_scratch(count * blocks, threads_, [&](int64_t i, int thread) {
                const int64_t image = i / blocks, block = i % blocks;
                T *z = a.z[0].plane(first + image, block), *z_tangent = a.z[1].plane(first + image, block);
                if (remade_) conv.get_output(0, image, block, z, scratch(thread));
                conv.get_output(1, image, block, z_tangent, scratch(thread));
                norm_dual(l, first + image, block, z, z_tangent);
            });
        });
    }

    template <class Conv>
    void backward_layer_dual(int64_t l, const Conv& conv, const T* direction, T* theta_tangent) const {
        const Layer &a = layers_[l], &below = layers_[l - 1];
        const int64_t blocks = blocks_of(s_.channels), plane = layer_shape(s_, l).pixels() * kBlock;
        const int64_t at = block_offsets(s_, l).convolution;
        conv.set_weights(0, in_.theta + at, true, threads_);
        conv.set_weights(1, direction + at, true, threads_);
        if (theta_tangent) conv.clear_weight_grad(threads_);
        each_chunk(conv, [&](int64_t first, int64_t count) {
            parallel_with_scratch(count * blocks, threads_, [&](int64_t i, int thread) {
                const int64_t image = i / blocks, block = i % blocks;
                T *grad_z = scratch(thread), *grad_z_tangent = grad_z + plane, *own = grad_z_tangent + plane;
                norm_dual_backward(l, first + image, block, a.z[0].plane(first + image, block),
                                   a.z[1].plane(first + image, block), grad_z, grad_z_tangent);
                conv.set_grad(0, image, block, grad_z, own);
                conv.set_grad(1, image, block, grad_z_tangent, own);
                for (int k = 0; k < 2 && theta_tangent; ++k)
                    conv.set_input(k, image, block, a.input[k].plane(first + image, block), own);
            });
            const int64_t inputs = conv.input_grad_tasks(count), all_inputs = inputs * (1 + remade_);
            const int64_t weights = theta_tangent ? conv.weight_grad_tasks(count) : 0;
            parallel_for(all_inputs + weights, threads_, [&](int64_t task) {
                task < all_inputs ? conv.input_grad(task % inputs, count, task < inputs)
                                  : conv.add_weight_grad(task - all_inputs, count, true);
            });
            parallel_with_scratch(count * blocks, threads_, [&](int64_t i, int thread) {
                const int64_t image = i / blocks, block = i % blocks;
                for (int k = remade_ ? 0 : 1; k < 2; ++k)
                    conv.get_input_grad(k, image, block, below.grad_out[k].plane(first + image, block),
                                        scratch(thread));
            });
        });
        if (theta_tangent) conv.weight_grad(theta_tangent + at, threads_);
    }

    // ---- between the last block and the linear layer: features in the order (channel, row, column) ----

    template <class Move>
    void each_feature(int k, T* features, const Move& move) const {
        const int64_t pixels = (s_.height >> s_.depth) * (s_.width >> s_.depth), each = classifier_.features;
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
        each_feature(k, grad_features_[k], [](T* blocked, const T* feature) { *blocked = feature ? *feature : T(0); });
    }

    void image_grad(T* by_tap, T* images, int64_t row) const {
        const LayerShape first = layer_shape(s_, 0);
        T* own = by_tap + first.pixels() * blocks_of(9 * s_.in_channels) * kBlock;
        images_.image_grad(by_tap, own, images + row * s_.in_channels * first.pixels());
    }

    const ConvNetInput<T>& in_;
    const ConvNetShape& s_;
    int numbers_;
    bool remade_;
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
    return cross_entropy<T>(
        {p.input.shape.batch, p.input.shape.classes, pass.logits(0), p.hard, p.soft, p.losses, pass.grad_logits(0)},
        context);
}

template <class T>
Status loss_dual(const Pass<T>& pass, const ConvNetDual<T>& p, Context context) {
    return cross_entropy_dual<T>({p.input.shape.batch, p.input.shape.classes, pass.logits(0), pass.logits(1), p.hard,
                                  p.soft, p.losses_tangent, pass.grad_logits(0), pass.grad_logits(1), p.labels_tangent},
                                 context);
}

}  // namespace

template <class T>
Status convnet_forward(const ConvNetForward<T>& p, Context context) {
    Pass<T> pass(p.input, 1, p.kept, context.threads);
    pass.start(nullptr);
    pass.forward();
    std::copy_n(pass.logits(0), p.input.shape.batch * p.input.shape.classes, p.logits);
    return kSuccess;
}

template <class T>
Status convnet_backward(const ConvNetBackward<T>& p, Context context) {
    Pass<T> pass(p.input, 1, p.kept, context.threads);
    pass.start(nullptr);
    pass.backward(p.grad_logits, p.grad_theta, p.grad_images);
    return kSuccess;
}

template <class T>
Status convnet_gradient(const ConvNetGradient<T>& p, Context context) {
    Pass<T> pass(p.input, 1, p.kept, context.threads);
    pass.start(nullptr);
    pass.forward();
    if (const Status bad = loss(pass, p, context)) return bad;
    pass.backward(pass.grad_logits(0), p.grad_theta, nullptr);
    return kSuccess;
}

template <class T>
Status convnet_dual(const ConvNetDual<T>& p, Context context) {
    Pass<T> pass(p.input, 2, p.kept, context.threads);
    pass.start(p.direction);
    pass.forward_dual(p.direction);
    if (const Status bad = loss_dual(pass, p, context)) return bad;
    if (p.theta_tangent || p.wanted) pass.backward_dual(p.direction, p.wanted, p.theta_tangent, p.images_tangent);
    return kSuccess;
}

PDD_INSTANTIATE(convnet_forward, ConvNetForward)
PDD_INSTANTIATE(convnet_backward, ConvNetBackward)
PDD_INSTANTIATE(convnet_gradient, ConvNetGradient)
PDD_INSTANTIATE(convnet_dual, ConvNetDual)

ConvNetSizes convnet_sizes(ConvNetShape shape, int convolution, bool dual, bool kept, int threads) {
    ConvNetInput<float> input{};
    input.shape = shape;
    input.convolution = convolution;
    Arena<float> values(nullptr);
    Activations<float> unused[kMostBlocks];
    place_values(shape, values, unused);
    const Pass<float> pass(input, dual ? 2 : 1, nullptr, threads);
    return {pass.size() - (kept ? values.used() : 0), values.used()};
}

}  // namespace pdd::PDD_BACKEND
