// Forwards every operator to its CUDA launcher. The runtime is linked statically, so this library
// loads on machines without a driver. A launch there returns an error that status_string names.
#include <cuda_runtime_api.h>

#include "bind/backend.h"
#include "bind/status.h"

namespace pdd::cuda {
PDD_OPERATORS(PDD_DECLARE)
int64_t dsa_scratch_images(DsaShape shape, int number_bytes);
}  // namespace pdd::cuda

namespace pdd::bind {

#define PDD_FORWARD(function, Params)                           \
    template <class T>                                          \
    Status function(const Params<T>& params, Context context) { \
        return cuda::function(params, context);                 \
    }

PDD_OPERATORS(PDD_FORWARD)
PDD_HALF_OPERATORS(PDD_INSTANTIATE_HALF)
PDD_FULL_OPERATORS(PDD_INSTANTIATE)

int64_t dsa_scratch_images(DsaShape shape, int number_bytes) {
    return cuda::dsa_scratch_images(shape, number_bytes);
}

std::string status_string(Status status) {
    if (status <= 0) return own_status_string(status);
    const auto error = static_cast<cudaError_t>(status);
    return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

std::map<std::string, std::string> capabilities() {
    int runtime = 0, driver = 0, devices = 0;
    cudaRuntimeGetVersion(&runtime);
    cudaDriverGetVersion(&driver);
    if (cudaGetDeviceCount(&devices) != cudaSuccess) {
        devices = 0;
        cudaGetLastError();
    }
    const auto version = [](int number) {
        return number ? std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10)
                      : std::string("none");
    };
    return {{"runtime", version(runtime)},
            {"driver", version(driver)},
            {"devices", std::to_string(devices)}};
}

}  // namespace pdd::bind
