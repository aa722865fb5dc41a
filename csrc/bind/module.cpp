// Python module: takes numbers and addresses, fills the parameter structs, calls the back end. It
// is compiled twice, as pdd_fast._cpu and (with PDD_WITH_CUDA) as pdd_fast._cuda. pdd_fast/ops/
// checks shapes, types and layouts before it passes an address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <stdexcept>
#include <string>
#include <vector>

#include "bind/backend.h"
#ifdef PDD_CPU
#include "core/threads.h"
#endif

namespace py = pybind11;
using namespace pdd;

namespace {

// Addresses are passed as integers; 0 means absent.
template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Types in the order of pdd_fast/ops/_native.py.
enum Type : int { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kFloat16 = 3 };

// Runs call(T{}) without the interpreter lock.
template <class Call>
Status by_full_type(int type, const Call& call) {
    if (type != kFloat32 && type != kFloat64)
        throw std::invalid_argument("not a type of this kernel");
    py::gil_scoped_release release;
    return type == kFloat64 ? call(double{}) : call(float{});
}

template <class Call>
Status by_type(int type, const Call& call) {
#ifdef PDD_HALF
    if (type == kBfloat16 || type == kFloat16) {
        py::gil_scoped_release release;
        return type == kBfloat16 ? call(bfloat16{}) : call(float16{});
    }
#endif
    return by_full_type(type, call);
}

using Address = uintptr_t;

#ifdef PDD_CPU
// shape: batch, in_channels, height, width, channels, depth, classes.
ConvNetShape convnet_shape(const std::vector<int64_t>& shape) {
    if (shape.size() != 7) throw std::invalid_argument("convnet: shape must hold 7 numbers");
    return {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6]};
}

// Memory of a number of elements of the pass's type; address 0: absent.
struct Piece {
    Address address;
    int64_t elements;
};

void require_elements(const char* name, int64_t needed, int64_t elements) {
    if (elements < needed)
        throw std::invalid_argument("convnet: " + std::string(name) + " must hold " +
                                    std::to_string(needed) + " elements, got " +
                                    std::to_string(elements));
}

// Arguments of all passes, in the order of pdd_fast/ops/convnet.py.
struct ConvNetArguments {
    std::vector<int64_t> shape;
    int convolution;
    double eps;
    Address theta, images;
    std::vector<int64_t> image_stride;
    Piece workspace, saved;

    template <class T>
    T* saved_at() const {
        return at<T>(saved.address);
    }

    // Checks that both pieces are as large as the pass needs; they come from a pool that many
    // threads share.
    void check(bool dual, int threads) const {
        const ConvNetSizes sizes = bind::convnet_sizes(convnet_shape(shape), convolution, dual,
                                                       saved.address != 0, threads);
        require_elements("workspace", sizes.workspace, workspace.elements);
        if (saved.address) require_elements("saved", sizes.saved, saved.elements);
    }

    template <class T>
    ConvNetInput<T> input() const {
        if (image_stride.size() != 4)
            throw std::invalid_argument("convnet: image_stride must hold 4 numbers");
        const auto& s = image_stride;
        return {convnet_shape(shape),
                convolution,
                eps,
                at<T>(theta),
                at<T>(images),
                {s[0], s[1], s[2], s[3]},
                at<T>(workspace.address)};
    }
};

// Requests pages of 2 MB for buffers that have room for them. A pass traverses megabytes in 36
// places at once, and a new buffer is otherwise mapped 4 KB at a time. This is only advice, and
// nothing depends on it.
void advise_large_pages([[maybe_unused]] Address address, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr size_t page = 2 << 20;
    const Address first = (address + page - 1) / page * page,
                  last = (address + bytes) / page * page;
    if (first < last) madvise(at<void>(first), last - first, MADV_HUGEPAGE);
#endif
}

void define_convnet(py::module_& m) {
    m.def("advise_large_pages", &advise_large_pages);
    m.def("set_worth_a_thread",
          [](double nanoseconds) { return worth_a_thread.exchange(nanoseconds); });
    py::class_<ConvNetArguments>(m, "ConvNetArguments")
        .def(py::init([](std::vector<int64_t> shape, int convolution, double eps, Address theta,
                         Address images, std::vector<int64_t> image_stride, Address workspace,
                         int64_t workspace_elements, Address saved, int64_t saved_elements) {
            return ConvNetArguments{std::move(shape),
                                    convolution,
                                    eps,
                                    theta,
                                    images,
                                    std::move(image_stride),
                                    {workspace, workspace_elements},
                                    {saved, saved_elements}};
        }));
    m.def("convnet_sizes", [](const std::vector<int64_t>& shape, int convolution, bool dual,
                              bool saved, int threads) {
        const ConvNetSizes sizes =
            bind::convnet_sizes(convnet_shape(shape), convolution, dual, saved, threads);
        return std::pair{sizes.workspace, sizes.saved};
    });
    m.def("convnet_forward", [](int type, Address stream, int threads,
                                const ConvNetArguments& arguments, Address logits) {
        arguments.check(false, threads);
        return by_full_type(type, [&](auto t) {
            using T = decltype(t);
            return bind::convnet_forward<T>(
                {arguments.input<T>(), arguments.saved_at<T>(), at<T>(logits)},
                {at<void>(stream), threads});
        });
    });
    m.def("convnet_backward",
          [](int type, Address stream, int threads, const ConvNetArguments& arguments,
             Address grad_logits, Address grad_theta, Address grad_images) {
              arguments.check(false, threads);
              return by_full_type(type, [&](auto t) {
                  using T = decltype(t);
                  return bind::convnet_backward<T>(
                      {arguments.input<T>(), arguments.saved_at<T>(), at<T>(grad_logits),
                       at<T>(grad_theta), at<T>(grad_images)},
                      {at<void>(stream), threads});
              });
          });
    m.def("convnet_gradient",
          [](int type, Address stream, int threads, const ConvNetArguments& arguments, Address hard,
             Address soft, Address losses, Address grad_theta) {
              arguments.check(false, threads);
              return by_full_type(type, [&](auto t) {
                  using T = decltype(t);
                  return bind::convnet_gradient<T>(
                      {arguments.input<T>(), at<int64_t>(hard), at<T>(soft),
                       arguments.saved_at<T>(), at<T>(losses), at<T>(grad_theta)},
                      {at<void>(stream), threads});
              });
          });
    m.def(
        "convnet_dual",
        [](int type, Address stream, int threads, const ConvNetArguments& arguments, Address hard,
           Address soft, Address direction, Address wanted, Address losses_tangent,
           Address theta_tangent, Address images_tangent, Address labels_tangent) {
            arguments.check(true, threads);
            return by_full_type(type, [&](auto t) {
                using T = decltype(t);
                return bind::convnet_dual<T>(
                    {arguments.input<T>(), at<int64_t>(hard), at<T>(soft), arguments.saved_at<T>(),
                     at<T>(direction), at<bool>(wanted), at<T>(losses_tangent),
                     at<T>(theta_tangent), at<T>(images_tangent), at<T>(labels_tangent)},
                    {at<void>(stream), threads});
            });
        });
}
#endif

}  // namespace

PYBIND11_MODULE(PDD_MODULE, m) {
    m.doc() = "Kernels of pdd-fast; called through pdd_fast.ops only.";
    m.def("status_string", &bind::status_string);
    m.def("capabilities", &bind::capabilities);

    m.def("norm_relu_pool", [](int type, Address stream, int threads, int64_t B, int64_t C,
                               int64_t H, int64_t W, double eps, Address z, Address weight,
                               Address bias, Address out, Address mean, Address rstd) {
        return by_type(type, [&](auto t) {
            using T = decltype(t);
            return bind::norm_relu_pool<T>({{B, C, H, W},
                                            eps,
                                            at<T>(z),
                                            at<Compute<T>>(weight),
                                            at<Compute<T>>(bias),
                                            at<T>(out),
                                            at<Compute<T>>(mean),
                                            at<Compute<T>>(rstd)},
                                           {at<void>(stream), threads});
        });
    });
    m.def("norm_relu_pool_backward",
          [](int type, Address stream, int threads, int64_t B, int64_t C, int64_t H, int64_t W,
             Address grad_out, Address z, Address mean, Address rstd, Address weight, Address bias,
             Address grad_z, Address grad_weight_parts, Address grad_bias_parts) {
              return by_type(type, [&](auto t) {
                  using T = decltype(t);
                  return bind::norm_relu_pool_backward<T>({{B, C, H, W},
                                                           at<T>(grad_out),
                                                           at<T>(z),
                                                           at<Compute<T>>(mean),
                                                           at<Compute<T>>(rstd),
                                                           at<Compute<T>>(weight),
                                                           at<Compute<T>>(bias),
                                                           at<T>(grad_z),
                                                           at<Compute<T>>(grad_weight_parts),
                                                           at<Compute<T>>(grad_bias_parts)},
                                                          {at<void>(stream), threads});
              });
          });
    m.def("norm_relu_pool_dual",
          [](int type, Address stream, int threads, int64_t B, int64_t C, int64_t H, int64_t W,
             double eps, Address z, Address z_tangent, Address weight, Address weight_tangent,
             Address bias, Address bias_tangent, Address out, Address out_tangent, Address mean,
             Address rstd, Address mean_tangent, Address kappa) {
              return by_type(type, [&](auto t) {
                  using T = decltype(t);
                  return bind::norm_relu_pool_dual<T>({{B, C, H, W},
                                                       eps,
                                                       at<T>(z),
                                                       at<T>(z_tangent),
                                                       at<Compute<T>>(weight),
                                                       at<Compute<T>>(weight_tangent),
                                                       at<Compute<T>>(bias),
                                                       at<Compute<T>>(bias_tangent),
                                                       at<T>(out),
                                                       at<T>(out_tangent),
                                                       at<Compute<T>>(mean),
                                                       at<Compute<T>>(rstd),
                                                       at<Compute<T>>(mean_tangent),
                                                       at<Compute<T>>(kappa)},
                                                      {at<void>(stream), threads});
              });
          });
    m.def("norm_relu_pool_dual_backward",
          [](int type, Address stream, int threads, int64_t B, int64_t C, int64_t H, int64_t W,
             Address grad_out, Address grad_out_tangent, Address z, Address z_tangent, Address mean,
             Address rstd, Address mean_tangent, Address kappa, Address weight,
             Address weight_tangent, Address bias, Address grad_z, Address grad_z_tangent,
             Address grad_weight_tangent_parts, Address grad_bias_tangent_parts) {
              return by_type(type, [&](auto t) {
                  using T = decltype(t);
                  return bind::norm_relu_pool_dual_backward<T>(
                      {{B, C, H, W},
                       at<T>(grad_out),
                       at<T>(grad_out_tangent),
                       at<T>(z),
                       at<T>(z_tangent),
                       at<Compute<T>>(mean),
                       at<Compute<T>>(rstd),
                       at<Compute<T>>(mean_tangent),
                       at<Compute<T>>(kappa),
                       at<Compute<T>>(weight),
                       at<Compute<T>>(weight_tangent),
                       at<Compute<T>>(bias),
                       at<T>(grad_z),
                       at<T>(grad_z_tangent),
                       at<Compute<T>>(grad_weight_tangent_parts),
                       at<Compute<T>>(grad_bias_tangent_parts)},
                      {at<void>(stream), threads});
              });
          });
    m.def("cross_entropy",
          [](int type, Address stream, int threads, int64_t B, int64_t K, Address logits,
             Address hard, Address soft, Address losses, Address grad_logits) {
              return by_full_type(type, [&](auto t) {
                  using T = decltype(t);
                  return bind::cross_entropy<T>({B, K, at<T>(logits), at<int64_t>(hard),
                                                 at<T>(soft), at<T>(losses), at<T>(grad_logits)},
                                                {at<void>(stream), threads});
              });
          });
    m.def("cross_entropy_dual",
          [](int type, Address stream, int threads, int64_t B, int64_t K, Address logits,
             Address logits_tangent, Address hard, Address soft, Address losses_tangent,
             Address grad_logits, Address grad_logits_tangent, Address grad_labels_tangent) {
              return by_full_type(type, [&](auto t) {
                  using T = decltype(t);
                  return bind::cross_entropy_dual<T>(
                      {B, K, at<T>(logits), at<T>(logits_tangent), at<int64_t>(hard), at<T>(soft),
                       at<T>(losses_tangent), at<T>(grad_logits), at<T>(grad_logits_tangent),
                       at<T>(grad_labels_tangent)},
                      {at<void>(stream), threads});
              });
          });

    m.def("add_rows", [](int type, Address stream, int threads, int64_t n, int64_t b, int64_t D,
                         Address target, Address index, Address rows, Address out) {
        return by_full_type(type, [&](auto t) {
            using T = decltype(t);
            return bind::add_rows<T>(
                {n, b, D, at<T>(target), at<int64_t>(index), at<T>(rows), at<T>(out)},
                {at<void>(stream), threads});
        });
    });

#ifdef PDD_CPU
    define_convnet(m);
#endif
    m.def("dsa_scratch_images", [](int64_t B, int64_t C, int64_t H, int64_t W, int number_bytes) {
        return bind::dsa_scratch_images({B, C, H, W}, number_bytes);
    });
    const auto define_dsa = [&m](const char* name, const auto& function) {
        m.def(name, [=](int type, Address stream, int threads, const std::vector<int64_t>& shape,
                        int64_t cutout_height, int64_t cutout_width, int64_t operation_count,
                        Address operations, bool linear, Address aug_params, Address input,
                        const std::vector<int64_t>& input_stride, Address output,
                        const std::vector<int64_t>& output_stride, Address scratch,
                        int64_t scratch_images) {
            if (shape.size() != 4 || input_stride.size() != 4 || output_stride.size() != 4)
                throw std::invalid_argument("dsa: shape and strides must hold 4 numbers each");
            return by_type(type, [&](auto t) {
                using T = decltype(t);
                Dsa<T> p{};
                p.batch = shape[0], p.channels = shape[1], p.height = shape[2], p.width = shape[3];
                p.cutout_height = cutout_height, p.cutout_width = cutout_width;
                p.operation_count = operation_count, p.operations = at<int>(operations),
                p.linear = linear;
                p.aug_params = at<double>(aug_params), p.input = at<T>(input),
                p.output = at<T>(output);
                for (int i = 0; i < 4; ++i)
                    p.input_stride[i] = input_stride[i], p.output_stride[i] = output_stride[i];
                p.scratch = at<Compute<T>>(scratch), p.scratch_images = scratch_images;
                return function(p, Context{at<void>(stream), threads});
            });
        });
    };
    define_dsa("dsa", [](const auto& p, Context context) { return bind::dsa(p, context); });
    define_dsa("dsa_adjoint",
               [](const auto& p, Context context) { return bind::dsa_adjoint(p, context); });
}
