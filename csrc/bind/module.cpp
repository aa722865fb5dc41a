// The Python module: takes numbers and addresses, fills the parameter structs, calls the back end. Compiled
// twice, as pdd_fast._cpu and (with PDD_WITH_CUDA) as pdd_fast._cuda. All checking of shapes, types and
// layouts happens in pdd_fast/ops/ before an address gets here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bind/backend.h"

namespace py = pybind11;
using namespace pdd;

namespace {

// Addresses travel as integers; 0 is "absent".
template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Runs call(float{}) or call(double{}) without the interpreter lock.
template <class Call>
Status by_type(bool is_double, const Call& call) {
    py::gil_scoped_release release;
    return is_double ? call(double{}) : call(float{});
}

using Address = uintptr_t;

}  // namespace

PYBIND11_MODULE(PDD_MODULE, m) {
    m.doc() = "Kernels of pdd-fast; called through pdd_fast.ops only.";
    m.def("status_string", &bind::status_string);
    m.def("capabilities", &bind::capabilities);

    m.def("norm_relu_pool",
          [](bool f64, Address stream, int threads, int64_t B, int64_t C, int64_t H, int64_t W, double eps, Address z,
             Address weight, Address bias, Address out, Address mean, Address rstd) {
              return by_type(f64, [&](auto t) {
                  using T = decltype(t);
                  return bind::norm_relu_pool<T>(
                      {{B, C, H, W}, eps, at<T>(z), at<T>(weight), at<T>(bias), at<T>(out), at<T>(mean), at<T>(rstd)},
                      {at<void>(stream), threads});
              });
          });
    m.def("norm_relu_pool_backward",
          [](bool f64, Address stream, int threads, int64_t B, int64_t C, int64_t H, int64_t W, Address grad_out,
             Address z, Address mean, Address rstd, Address weight, Address bias, Address grad_z,
             Address grad_weight_parts, Address grad_bias_parts) {
              return by_type(f64, [&](auto t) {
                  using T = decltype(t);
                  return bind::norm_relu_pool_backward<T>({{B, C, H, W},
                                                           at<T>(grad_out),
                                                           at<T>(z),
                                                           at<T>(mean),
                                                           at<T>(rstd),
                                                           at<T>(weight),
                                                           at<T>(bias),
                                                           at<T>(grad_z),
                                                           at<T>(grad_weight_parts),
                                                           at<T>(grad_bias_parts)},
                                                          {at<void>(stream), threads});
              });
          });
    m.def("norm_relu_pool_dual",
          [](bool f64, Address stream, int threads, int64_t B, int64_t C, int64_t H, int64_t W, double eps, Address z,
             Address z_tangent, Address weight, Address weight_tangent, Address bias, Address bias_tangent, Address out,
             Address out_tangent, Address mean, Address rstd, Address mean_tangent, Address kappa) {
              return by_type(f64, [&](auto t) {
                  using T = decltype(t);
                  return bind::norm_relu_pool_dual<T>({{B, C, H, W},
                                                       eps,
                                                       at<T>(z),
                                                       at<T>(z_tangent),
                                                       at<T>(weight),
                                                       at<T>(weight_tangent),
                                                       at<T>(bias),
                                                       at<T>(bias_tangent),
                                                       at<T>(out),
                                                       at<T>(out_tangent),
                                                       at<T>(mean),
                                                       at<T>(rstd),
                                                       at<T>(mean_tangent),
                                                       at<T>(kappa)},
                                                      {at<void>(stream), threads});
              });
          });
    m.def("norm_relu_pool_dual_backward",
          [](bool f64, Address stream, int threads, int64_t B, int64_t C, int64_t H, int64_t W, Address grad_out,
             Address grad_out_tangent, Address z, Address z_tangent, Address mean, Address rstd, Address mean_tangent,
             Address kappa, Address weight, Address weight_tangent, Address bias, Address grad_z,
             Address grad_z_tangent, Address grad_weight_tangent_parts, Address grad_bias_tangent_parts) {
              return by_type(f64, [&](auto t) {
                  using T = decltype(t);
                  return bind::norm_relu_pool_dual_backward<T>({{B, C, H, W},
                                                                at<T>(grad_out),
                                                                at<T>(grad_out_tangent),
                                                                at<T>(z),
                                                                at<T>(z_tangent),
                                                                at<T>(mean),
                                                                at<T>(rstd),
                                                                at<T>(mean_tangent),
                                                                at<T>(kappa),
                                                                at<T>(weight),
                                                                at<T>(weight_tangent),
                                                                at<T>(bias),
                                                                at<T>(grad_z),
                                                                at<T>(grad_z_tangent),
                                                                at<T>(grad_weight_tangent_parts),
                                                                at<T>(grad_bias_tangent_parts)},
                                                               {at<void>(stream), threads});
              });
          });
    m.def("cross_entropy", [](bool f64, Address stream, int threads, int64_t B, int64_t K, Address logits, Address hard,
                              Address soft, Address losses, Address grad_logits) {
        return by_type(f64, [&](auto t) {
            using T = decltype(t);
            return bind::cross_entropy<T>(
                {B, K, at<T>(logits), at<int64_t>(hard), at<T>(soft), at<T>(losses), at<T>(grad_logits)},
                {at<void>(stream), threads});
        });
    });
    m.def("cross_entropy_dual", [](bool f64, Address stream, int threads, int64_t B, int64_t K, Address logits,
                                   Address logits_tangent, Address hard, Address soft, Address losses_tangent,
                                   Address grad_logits, Address grad_logits_tangent, Address grad_labels_tangent) {
        return by_type(f64, [&](auto t) {
            using T = decltype(t);
            return bind::cross_entropy_dual<T>(
                {B, K, at<T>(logits), at<T>(logits_tangent), at<int64_t>(hard), at<T>(soft), at<T>(losses_tangent),
                 at<T>(grad_logits), at<T>(grad_logits_tangent), at<T>(grad_labels_tangent)},
                {at<void>(stream), threads});
        });
    });

    const auto define_dsa = [&m](const char* name, auto function_float, auto function_double) {
        m.def(name, [=](bool f64, Address stream, int threads, const std::vector<int64_t>& shape, int64_t cutout_height,
                        int64_t cutout_width, const std::vector<int>& operations, bool linear, Address draws,
                        Address input, const std::vector<int64_t>& input_stride, Address output,
                        const std::vector<int64_t>& output_stride) {
            if (shape.size() != 4 || input_stride.size() != 4 || output_stride.size() != 4 ||
                operations.size() > static_cast<size_t>(kDsaMaxOperations))
                throw std::invalid_argument("dsa: shape and strides must hold 4 numbers each, operations at most 8");
            const auto fill = [&](auto t) {
                using T = decltype(t);
                Dsa<T> p{};
                p.batch = shape[0], p.channels = shape[1], p.height = shape[2], p.width = shape[3];
                p.cutout_height = cutout_height, p.cutout_width = cutout_width;
                for (size_t i = 0; i < operations.size(); ++i) p.operations[i] = operations[i];
                p.operation_count = static_cast<int>(operations.size());
                p.linear = linear;
                p.draws = at<double>(draws);
                p.input = at<T>(input), p.output = at<T>(output);
                for (int i = 0; i < 4; ++i) p.input_stride[i] = input_stride[i], p.output_stride[i] = output_stride[i];
                return p;
            };
            const Context context{at<void>(stream), threads};
            py::gil_scoped_release release;
            return f64 ? function_double(fill(double{}), context) : function_float(fill(float{}), context);
        });
    };
    define_dsa("dsa", &bind::dsa<float>, &bind::dsa<double>);
    define_dsa("dsa_adjoint", &bind::dsa_adjoint<float>, &bind::dsa_adjoint<double>);
}
