// The end of scoring: outputs of every token, and the kept ones.
#pragma once

#include "score_device.cuh"
#include "select.cuh"

namespace h2ot {
namespace cuda {

constexpr int kFinishThreads = 512;

// Ascending numbers of the flagged tokens to out; returns how many are flagged. For a whole block.
template <class Out>
H2OT_DEVICE int64_t compact(const uint8_t* flag, int64_t N, Out* out, SelectShared& shared) {
  const int threads = int(blockDim.x), lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  int64_t before = 0;
  for (int64_t from = 0; from < N; from += threads) {
    const int64_t i = from + threadIdx.x;
    const bool flagged = i < N && flag[i];
    const uint32_t bits = __ballot_sync(kAllLanes, flagged);
    if (lane == 0) shared.count[warp] = __popc(bits);
    __syncthreads();
    int64_t at = before + __popc(bits & ((1u << lane) - 1));
#pragma unroll 1
    for (int w = 0; w < threads / kLanes; w++) {
      if (w < warp) at += shared.count[w];
      before += shared.count[w];
    }
    if (flagged) out[at] = Out(i);
    __syncthreads();
  }
  return before;
}

// Density, distance, score and parent where asked for, and the key to select by.
template <class A>
H2OT_DEVICE void write_scores(const Job<A>& job, const Keep& keep, int64_t b, int64_t i) {
  const int64_t at = b * job.x.N + i;
  const bool valid = job.valid[at];
  double density = 0, distance = 0, score = -infinity_of(0.0);
  int64_t parent = -1;
  if (valid) {
    const double largest = value_of(uint64_t(job.largest[2 * b + 1]));
    parent = job.parent[at];
    distance = sqrt((parent < 0 ? largest : job.squared[at]) / double(job.x.C));
    density = job.noise ? -job.key[at] : job.density ? exp(-job.m[at]) : 0;
    score = job.noise ? density * distance : parent < 0 ? infinity_of(0.0) : log(distance) - job.m[at];
  }
  if (job.density) job.density[at] = density;
  if (job.distance) job.distance[at] = distance;
  if (job.parent_out) job.parent_out[at] = parent;
  if (job.score) job.score[at] = score;
  if (job.index) job.keys[at] = selection_key(score, valid, keep.holds(i));
}

template <class A>
H2OT_DEVICE Keep keep_of(const Job<A>& job, int64_t b) {
  return {job.keep + b * job.keep_stride, job.M};
}

// Scores and index of sample b, by one block.
template <class A>
H2OT_DEVICE void finish_sample(const Job<A>& job, int64_t b, SelectShared& shared) {
  const int64_t N = job.x.N;
  const Keep keep = keep_of(job, b);
  for (int64_t i = threadIdx.x; i < N; i += blockDim.x) write_scores(job, keep, b, i);
  if (job.index == nullptr) return;
  write_index(job.keys + b * N, N, job.K, keep, job.index + b * job.K, shared);
}

// The same for samples of many tokens. Grid: blocks of tokens, samples.
template <class A>
__global__ void __launch_bounds__(kFinishThreads) scores_kernel(Job<A> job) {
  const int64_t i = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x, b = blockIdx.y;
  if (i < job.x.N) write_scores(job, keep_of(job, b), b, i);
}

// Grid: 1, samples.
template <class A>
__global__ void __launch_bounds__(kMostWarps* kLanes, 1) index_kernel(Job<A> job) {
  SelectShared& shared = *reinterpret_cast<SelectShared*>(shared_memory());
  const int64_t b = blockIdx.y, N = job.x.N;
  write_index(job.keys + b * N, N, job.K, keep_of(job, b), job.index + b * job.K, shared);
}

}  // namespace cuda
}  // namespace h2ot
