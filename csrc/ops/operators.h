// List of operators. Each back end (CPU per instruction set, CUDA) defines every function in its
// own namespace PDD_BACKEND; ops/<op>/cpu.cpp and ops/<op>/cuda.cu keep the same order. All
// operators take float and double. With PDD_HALF, those of PDD_HALF_OPERATORS also take bfloat16
// and float16 (on the CPU, pdd_fast/ops/ converts instead).
#pragma once

#include "core/context.h"
#include "core/storage.h"
#include "ops/add_rows/params.h"
#include "ops/convnet/params.h"
#include "ops/cross_entropy/params.h"
#include "ops/dsa/params.h"
#include "ops/norm_relu_pool/params.h"

#define PDD_HALF_OPERATORS(X)                                 \
    X(norm_relu_pool, NormReluPool)                           \
    X(norm_relu_pool_backward, NormReluPoolBackward)          \
    X(norm_relu_pool_dual, NormReluPoolDual)                  \
    X(norm_relu_pool_dual_backward, NormReluPoolDualBackward) \
    X(dsa, Dsa)                                               \
    X(dsa_adjoint, Dsa)

#define PDD_FULL_OPERATORS(X)               \
    X(cross_entropy, CrossEntropy)          \
    X(cross_entropy_dual, CrossEntropyDual) \
    X(add_rows, AddRows)

// Passes over the whole network. On a GPU, pdd_fast/engines/ composes them from the operators
// above, and a graph removes the launch overhead.
#define PDD_CPU_OPERATORS(X)             \
    X(convnet_forward, ConvNetForward)   \
    X(convnet_backward, ConvNetBackward) \
    X(convnet_gradient, ConvNetGradient) \
    X(convnet_dual, ConvNetDual)

#define PDD_OPERATORS(X)  \
    PDD_HALF_OPERATORS(X) \
    PDD_FULL_OPERATORS(X)

#define PDD_DECLARE(name, Params) \
    template <class T>            \
    ::pdd::Status name(const ::pdd::Params<T>& params, ::pdd::Context context);

#define PDD_INSTANTIATE(name, Params)                                  \
    template ::pdd::Status name(const ::pdd::Params<float>&, Context); \
    template ::pdd::Status name(const ::pdd::Params<double>&, Context);

#ifdef PDD_HALF
#define PDD_INSTANTIATE_HALF(name, Params)                                       \
    PDD_INSTANTIATE(name, Params)                                                \
    template ::pdd::Status name(const ::pdd::Params<::pdd::bfloat16>&, Context); \
    template ::pdd::Status name(const ::pdd::Params<::pdd::float16>&, Context);
#else
#define PDD_INSTANTIATE_HALF PDD_INSTANTIATE
#endif

#ifdef PDD_BACKEND
namespace pdd::PDD_BACKEND {
PDD_OPERATORS(PDD_DECLARE)
PDD_CPU_OPERATORS(PDD_DECLARE)

// Returns the buffer sizes of the passes over the whole network. `saved`: whether a pass is given a
// buffer for saved activations.
ConvNetSizes convnet_sizes(ConvNetShape shape, int convolution, bool dual, bool saved, int threads);

// Returns for how many images a call of dsa needs scratch memory on the device; number_bytes =
// sizeof(Compute<T>).
int64_t dsa_scratch_images(DsaShape shape, int number_bytes);
}  // namespace pdd::PDD_BACKEND
#endif
