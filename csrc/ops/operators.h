// The list of operators. Each back end (CPU per instruction set, CUDA) defines every function of it, for
// float and double, in its own namespace PDD_BACKEND; ops/<op>/cpu.cpp and ops/<op>/cuda.cu do so in the same
// order.
#pragma once

#include "core/context.h"
#include "ops/cross_entropy/params.h"
#include "ops/dsa/params.h"
#include "ops/norm_relu_pool/params.h"

#define PDD_OPERATORS(X)                                      \
    X(norm_relu_pool, NormReluPool)                           \
    X(norm_relu_pool_backward, NormReluPoolBackward)          \
    X(norm_relu_pool_dual, NormReluPoolDual)                  \
    X(norm_relu_pool_dual_backward, NormReluPoolDualBackward) \
    X(cross_entropy, CrossEntropy)                            \
    X(cross_entropy_dual, CrossEntropyDual)                   \
    X(dsa, Dsa)                                               \
    X(dsa_adjoint, Dsa)

#define PDD_DECLARE(name, Params) \
    template <class T>            \
    ::pdd::Status name(const ::pdd::Params<T>& params, ::pdd::Context context);

#define PDD_INSTANTIATE(name, Params)                                  \
    template ::pdd::Status name(const ::pdd::Params<float>&, Context); \
    template ::pdd::Status name(const ::pdd::Params<double>&, Context);

#ifdef PDD_BACKEND
namespace pdd::PDD_BACKEND {
PDD_OPERATORS(PDD_DECLARE)
}
#endif
