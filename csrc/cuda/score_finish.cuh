// The end of scoring: outputs of every token, their rank by counting, and the kept tokens by a prefix sum.
#pragma once

#include "score_device.cuh"

namespace h2ot {
namespace cuda {

constexpr int kFinishThreads = 512;
constexpr int32_t kWriteScores = 1, kRankTokens = 2, kWriteIndex = 4;  // stages

struct FinishShared {
  int32_t count[kFinishThreads / kLanes];
};

// Ascending numbers of the flagged tokens to out[0 .. room); returns how many are flagged. For a whole block.
template <class Out>
H2OT_DEVICE int64_t compact(const uint8_t* flag, int64_t N, Out* out, int64_t room, FinishShared& shared) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  int64_t before = 0;
  for (int64_t from = 0; from < N; from += kFinishThreads) {
    const int64_t i = from + threadIdx.x;
    const bool flagged = i < N && flag[i];
    const uint32_t bits = __ballot_sync(kAllLanes, flagged);
    if (lane == 0) shared.count[warp] = __popc(bits);
    __syncthreads();
    int64_t at = before + __popc(bits & ((1u << lane) - 1));
    for (int w = 0; w < kFinishThreads / kLanes; w++) {
      if (w < warp) at += shared.count[w];
      before += shared.count[w];
    }
    if (flagged && at < room) out[at] = Out(i);
    __syncthreads();
  }
  return before;
}

template <class A>
H2OT_DEVICE void write_scores(const Job<A>& job, int64_t b, int64_t i) {
  const int64_t at = b * job.x.N + i;
  const bool valid = job.valid[at];
  double density = 0, distance = 0, score = -infinity_of(0.0);
  int64_t parent = -1;
  if (valid) {
    const double largest = value_of(uint64_t(job.largest[2 * b + 1]));
    parent = job.parent[at];
    distance = sqrt((parent < 0 ? largest : job.squared[at]) / double(job.x.C));
    density = job.noise ? -job.key[at] : exp(-job.m[at]);
    score = job.noise ? density * distance : parent < 0 ? infinity_of(0.0) : log(distance) - job.m[at];
  }
  if (job.density) job.density[at] = density;
  if (job.distance) job.distance[at] = distance;
  if (job.parent_out) job.parent_out[at] = parent;
  job.score[at] = score;
}

// 2 for a kept token, 1 for a valid one, 0 for others; NaN scores (infinity less infinity) count as not valid.
template <class A>
H2OT_DEVICE int32_t order_class(const Job<A>& job, int64_t b, int64_t i) {
  const double score = job.score[b * job.x.N + i];
  int32_t order = job.valid[b * job.x.N + i] && score == score;
  const int64_t* keep = job.keep + b * job.keep_stride;
  for (int64_t m = 0; m < job.M; m++) order |= keep[m] == i ? 2 : 0;
  return order;
}

// Grid: blocks of a sample (one where the stages follow each other), samples.
template <class A>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(Job<A> job) {
  FinishShared& shared = *reinterpret_cast<FinishShared*>(shared_memory());
  const int64_t b = blockIdx.y, N = job.x.N, step = int64_t(gridDim.x) * kFinishThreads;
  const int64_t begin = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x;
  uint8_t* order = job.order + b * N;
  uint8_t* rank = job.rank + b * N;
  if (job.stages & kWriteScores) {
    for (int64_t i = begin; i < N; i += step) {
      write_scores(job, b, i);
      if (job.index) order[i] = uint8_t(order_class(job, b, i));
    }
    __syncthreads();
  }
  if (job.stages & kRankTokens) {
    const double* score = job.score + b * N;
    for (int64_t i = begin; i < N; i += step) {
      const int32_t own_order = order[i];
      const double own = own_order & 1 ? score[i] : 0;
      int64_t better = 0;
#pragma unroll 4
      for (int64_t j = 0; j < N; j++) {
        const int32_t other = order[j];
        const double s = own_order & 1 ? score[j] : 0;
        better += other > own_order || (other == own_order && (s > own || (s == own && j < i)));
      }
      rank[i] = better < job.K;
    }
    __syncthreads();
  }
  if (job.stages & kWriteIndex) {
    const int64_t* keep = job.keep + b * job.keep_stride;
    bool wrong = false;
    for (int64_t m = threadIdx.x; m < job.M; m += kFinishThreads) wrong |= keep[m] < 0 || keep[m] >= N;
    int64_t kept = 0;
    for (int64_t i = threadIdx.x; job.M > job.K && i < N; i += kFinishThreads) kept += order[i] >= 2;
    kept = warp_sum(kept);
    wrong = __ballot_sync(kAllLanes, wrong) != 0;
    if (threadIdx.x % kLanes == 0) shared.count[threadIdx.x / kLanes] = wrong ? -1 : int32_t(kept);
    __syncthreads();
    kept = 0;
    for (int w = 0; w < kFinishThreads / kLanes; w++) {
      wrong |= shared.count[w] < 0;
      kept += shared.count[w];
    }
    __syncthreads();
    int64_t* index = job.index + b * job.K;
    if (wrong || kept > job.K) {
      for (int64_t r = threadIdx.x; r < job.K; r += kFinishThreads) index[r] = -1;
    } else {
      compact(rank, N, index, job.K, shared);
    }
  }
}

}  // namespace cuda
}  // namespace h2ot
