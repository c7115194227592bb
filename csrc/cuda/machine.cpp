// Facts of a device for the plans, and the names of errors, through the CUDA runtime.
#include <cuda_runtime_api.h>

#include "launch_cuda.h"

namespace h2ot {
namespace cuda {

int32_t read_machine(int32_t device, Machine* machine) {
  const auto read = [device](cudaDeviceAttr attribute, int32_t* value) {
    return static_cast<int32_t>(cudaDeviceGetAttribute(value, attribute, device));
  };
  if (const int32_t error = read(cudaDevAttrComputeCapabilityMajor, &machine->major)) return error;
  if (const int32_t error = read(cudaDevAttrComputeCapabilityMinor, &machine->minor)) return error;
  if (const int32_t error = read_code(&machine->code)) return error;
  return read(cudaDevAttrMultiProcessorCount, &machine->multiprocessors);
}

const char* error_name(int32_t error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace cuda
}  // namespace h2ot
