// Operators as the binding calls them, with either back end: bind/cpu.cpp selects the instruction
// set once, bind/cuda.cpp forwards to the CUDA launchers.
#pragma once

#include <map>
#include <string>

#include "ops/operators.h"

namespace pdd::bind {

PDD_OPERATORS(PDD_DECLARE)

#ifdef PDD_CPU
PDD_CPU_OPERATORS(PDD_DECLARE)

ConvNetSizes convnet_sizes(ConvNetShape shape, int convolution, bool dual, bool saved, int threads);
#endif

int64_t dsa_scratch_images(DsaShape shape, int number_bytes);

// Returns why a call failed, for a status other than kSuccess.
std::string status_string(Status status);

// Returns what this library can run on here, for `pdd-fast env`.
std::map<std::string, std::string> capabilities();

}  // namespace pdd::bind
