// Which tokens of a large sample are among the K first: the K-th key by bisection on its 64 bits.
#pragma once

#include "score_finish.cuh"

namespace h2ot {
namespace cuda {

constexpr int kRankThreads = 1024;
constexpr int kRankWarps = kRankThreads / kLanes;
constexpr int kKeysHeld = 16;  // of a thread, in registers

struct RankShared {
  int32_t count[2][kRankWarps];
};

// Keys order like (kept, valid, score); kept tokens need no order among themselves: with more than K of them there is
// no index.
H2OT_DEVICE uint64_t rank_key(int32_t order, double score) {
  if (order & 2) return ~uint64_t(0);
  if (order == 0) return 0;
  uint64_t bits;
  score += 0.0;  // -0 equals 0
  memcpy(&bits, &score, 8);
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

// The sum over the block, on all threads. Calls alternate `turn`.
H2OT_DEVICE int64_t rank_sum(int32_t own, RankShared& shared, int turn) {
  const int lane = threadIdx.x % kLanes;
  own = warp_sum(own);
  if (lane == 0) shared.count[turn][threadIdx.x / kLanes] = own;
  __syncthreads();
  return warp_sum(shared.count[turn][lane]);
}

// Flags in `rank` the K first tokens by (key descending, number ascending). Grid: 1, samples.
template <class A>
__global__ void __launch_bounds__(kRankThreads) rank_kernel(Job<A> job) {
  static_assert(kRankWarps == kLanes);
  RankShared& shared = *reinterpret_cast<RankShared*>(shared_memory());
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t b = blockIdx.y, N = job.x.N;
  const uint8_t* order = job.order + b * N;
  const double* score = job.score + b * N;
  const auto key_of = [&](int64_t i) { return rank_key(order[i], score[i]); };
  uint64_t held[kKeysHeld];
#pragma unroll
  for (int h = 0; h < kKeysHeld; h++) {
    const int64_t i = int64_t(h) * kRankThreads + threadIdx.x;
    held[h] = i < N ? key_of(i) : 0;  // 0 reaches nothing that is tried
  }
  constexpr int64_t kHeld = int64_t(kKeysHeld) * kRankThreads;
  uint64_t last = 0;  // the largest that at least K keys reach
  for (int bit = 63; bit >= 0; bit--) {
    const uint64_t tried = last | uint64_t(1) << bit;
    int32_t reached = 0;
#pragma unroll
    for (int h = 0; h < kKeysHeld; h++) reached += held[h] >= tried;
    for (int64_t i = kHeld + threadIdx.x; i < N; i += kRankThreads) reached += key_of(i) >= tried;
    if (rank_sum(reached, shared, bit % 2) >= job.K) last = tried;
  }
  int32_t above = 0;
  for (int64_t i = threadIdx.x; i < N; i += kRankThreads) above += key_of(i) > last;
  int64_t left = job.K - rank_sum(above, shared, 1);  // places for tokens with the last key, in their order
  int turn = 0;
  for (int64_t from = 0; from < N; from += kRankThreads) {
    const int64_t i = from + threadIdx.x;
    const uint64_t key = i < N ? key_of(i) : 0;
    const bool equal = i < N && key == last;
    const uint32_t bits = __ballot_sync(kAllLanes, equal);
    if (lane == 0) shared.count[turn][warp] = __popc(bits);
    __syncthreads();
    const int32_t count = shared.count[turn][lane];
    const int64_t before = warp_sum(lane < warp ? count : 0) + __popc(bits & ((1u << lane) - 1));
    if (i < N) job.rank[b * N + i] = key > last || (equal && before < left);
    left -= warp_sum(count);
    turn = 1 - turn;
  }
}

}  // namespace cuda
}  // namespace h2ot
