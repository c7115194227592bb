// Selection on given scores: a block per sample makes the keys and finds the K first (select.cuh).
//
// Bytes: 8 N read, 8 N + 8 K written per sample, the keys again a few times from cache. Floor: the launch.
#include "launch_cuda.h"
#include "select.cuh"

namespace h2ot {
namespace cuda {
namespace {

struct SelectJob {
  SelectArgs args;
  uint64_t* keys;
  int64_t first;  // sample of the grid's first block
};

// Grid: 1, samples.
__global__ void __launch_bounds__(kMostWarps* kLanes) select_kernel(SelectJob job) {
  SelectShared& shared = *reinterpret_cast<SelectShared*>(shared_memory());
  const SelectArgs& in = job.args;
  const int64_t b = job.first + blockIdx.y, at = b * in.N;
  const Keep keep = {in.keep + (in.keep_rows > 1 ? b * in.M : 0), in.keep ? in.M : 0};
  for (int64_t i = threadIdx.x; i < in.N; i += blockDim.x) {
    job.keys[at + i] = selection_key(in.score[at + i], in.mask == nullptr || in.mask[at + i], keep.holds(i));
  }
  write_index(job.keys + at, in.N, in.K, keep, in.index + b * in.K, shared);
}

}  // namespace

#if defined(__CUDACC__)
// Of any kernel: all are compiled for the same devices.
int32_t read_code(int32_t* code) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, select_kernel);
  if (error) {
    cudaGetLastError();  // which forgets it
    return static_cast<int32_t>(error);
  }
  *code = attributes.ptxVersion;
  return 0;
}
#endif

int32_t launch_select(const SelectArgs& args, uint64_t* keys, void* stream) {
  if (args.K == 0) return 0;
  const int64_t most = kMostWarps * kLanes, threads = args.N < most ? ceil_div(args.N, kLanes) * kLanes : most;
  for (int64_t first = 0; first < args.B; first += kGridLimit) {
    const int64_t left = args.B - first, samples = left < kGridLimit ? left : kGridLimit;
    const int32_t error =
        launch(select_kernel, 1, samples, int32_t(threads), sizeof(SelectShared), stream, SelectJob{args, keys, first});
    if (error) return error;
  }
  return 0;
}

}  // namespace cuda
}  // namespace h2ot
