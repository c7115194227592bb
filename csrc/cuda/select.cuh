// Selection by one block: the K largest keys, ties to the lowest token, as ascending numbers. The K-th key is found
// digit by digit from counts (integer sums have no order), the kept tokens stand at prefix sums of their flags.
#pragma once

#include "device.cuh"
#include "warp.cuh"

namespace h2ot {
namespace cuda {

constexpr int kDigits = 256;
constexpr int kMostWarps = 32;  // of a block
constexpr int kKeysAhead = 4;   // asked for per thread before the first is looked at

struct SelectShared {
  int32_t bins[3][kDigits];  // counted, found from, cleared: in turn; digits at bin_of
  int32_t count[kMostWarps], ties[kMostWarps];
};

// Keys in the order of selection: kept tokens, then valid ones by score, then the others. A score that is NaN (infinity
// less infinity) counts as not valid; 0 and -0 tie.
H2OT_DEVICE uint64_t selection_key(double score, bool valid, bool kept) {
  if (kept) return ~uint64_t(0);
  if (!valid || score != score) return 0;
  const double clean = score == 0 ? 0.0 : score;
  uint64_t bits;
  memcpy(&bits, &clean, 8);
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

// The row of kept tokens of sample b, of M numbers.
struct Keep {
  const int64_t* row;
  int64_t M;

  H2OT_DEVICE bool holds(int64_t i) const {
    bool found = false;
    for (int64_t m = 0; m < M; m++) found |= row[m] == i;
    return found;
  }
};

// The digits that a lane adds up lie kLanes apart: all lanes read different banks.
constexpr int kOwnDigits = kDigits / kLanes;
H2OT_DEVICE uint32_t bin_of(uint32_t digit) { return digit % kOwnDigits * kLanes + digit / kOwnDigits; }

// The largest key T with at least K keys >= T, and how many of those equal to T are wanted: all (limit N) where the
// keys from T on are K, T then being the least that they have in common.
struct Threshold {
  uint64_t key;
  int64_t ties;
};

H2OT_DEVICE Threshold threshold_of(const uint64_t* keys, int64_t N, int64_t K, SelectShared& shared) {
  const int threads = int(blockDim.x), lane = threadIdx.x % kLanes;
  uint64_t chosen = 0, known = 0;
  int64_t wanted = K;
  for (int t = threadIdx.x; t < kDigits; t += threads) shared.bins[0][t] = 0;
  __syncthreads();
  uint64_t key[kKeysAhead];
  const auto read = [&](int64_t from) {
#pragma unroll
    for (int u = 0; u < kKeysAhead; u++) key[u] = from + u * threads < N ? keys[from + u * threads] : 0;
  };
  const bool fits = N <= kKeysAhead * threads;  // all keys are read once
  if (fits) read(threadIdx.x);
  int use = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    int32_t (&bins)[kDigits] = shared.bins[use];
    use = use == 2 ? 0 : use + 1;
    for (int t = threadIdx.x; t < kDigits; t += threads) shared.bins[use][t] = 0;
    for (int64_t from = threadIdx.x; from - threadIdx.x < N; from += kKeysAhead * threads) {
      if (!fits) read(from);
#pragma unroll
      for (int u = 0; u < kKeysAhead; u++) {
        const bool counts = from + u * threads < N && (key[u] & known) == chosen;
        const int digit = int(key[u] >> shift) & (kDigits - 1);
        // Many keys share a digit: the first lane's is counted once for all that have it.
        const uint32_t open = __ballot_sync(kAllLanes, counts);
        if (open == 0) continue;
        const int leader = __ffs(int(open)) - 1, common = __shfl_sync(kAllLanes, digit, leader);
        const uint32_t same = __ballot_sync(kAllLanes, counts && digit == common);
        if (lane == leader) atomicAdd(&bins[bin_of(common)], __popc(same));
        if (counts && digit != common) atomicAdd(&bins[bin_of(digit)], 1);
      }
    }
    __syncthreads();
    // Every warp finds the digit: eight of them a lane, the highest first.
    int32_t own = 0;
    for (int u = 0; u < kOwnDigits; u++) own += bins[bin_of(kDigits - 1 - (lane * kOwnDigits + u))];
    int32_t upto = own;
    for (int d = 1; d < kLanes; d *= 2) {
      const int32_t before = __shfl_up_sync(kAllLanes, upto, d);
      if (lane >= d) upto += before;
    }
    const int holder = __ffs(int(__ballot_sync(kAllLanes, upto >= wanted))) - 1;
    int32_t above = upto - own, digit = kDigits - 1 - lane * kOwnDigits;
    while (lane == holder && above + bins[bin_of(digit)] < wanted) above += bins[bin_of(digit--)];
    above = __shfl_sync(kAllLanes, above, holder);
    digit = __shfl_sync(kAllLanes, digit, holder);
    wanted -= above;
    chosen |= uint64_t(digit) << shift;
    known |= uint64_t(kDigits - 1) << shift;
    if (bins[bin_of(digit)] == wanted) return {chosen, N};
  }
  return {chosen, wanted};
}

// index [K]: ascending numbers of the K first of N >= K keys; K from 1. For a whole block, N threads or fewer.
H2OT_DEVICE void select_in_block(const uint64_t* keys, int64_t N, int64_t K, int64_t* index, SelectShared& shared) {
  const int threads = int(blockDim.x), lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const Threshold least = threshold_of(keys, N, K, shared);
  int64_t placed = 0, tied = 0;  // before this round
  for (int64_t from = 0; from < N; from += threads) {
    const int64_t i = from + threadIdx.x;
    const uint64_t key = i < N ? keys[i] : 0;
    const bool above = i < N && (least.ties == N ? key >= least.key : key > least.key);
    const bool tie = i < N && least.ties < N && key == least.key;
    const uint32_t aboves = __ballot_sync(kAllLanes, above), ties = __ballot_sync(kAllLanes, tie);
    if (lane == 0) {
      shared.count[warp] = __popc(aboves);
      shared.ties[warp] = __popc(ties);
    }
    __syncthreads();
    const uint32_t lower = (1u << lane) - 1;
    int64_t at = placed + __popc(aboves & lower), own_ties = tied + __popc(ties & lower);
#pragma unroll 1
    for (int w = 0; w < threads / kLanes; w++) {
      const int32_t count = shared.count[w], more = shared.ties[w];
      if (w < warp) {
        at += count;
        own_ties += more;
      }
      placed += count;
      tied += more;
    }
    const int64_t earlier = own_ties < least.ties ? own_ties : least.ties;
    if (above || (tie && own_ties < least.ties)) index[at + (least.ties < N ? earlier : 0)] = i;
    __syncthreads();
  }
}

// The index row of a sample whose keys stand in memory: -1 throughout where a number to keep is wrong, or more are kept
// than selected. For a whole block, each of whose threads t reads keys t, t + blockDim.x, ...
H2OT_DEVICE void write_index(const uint64_t* keys, int64_t N, int64_t K, const Keep& keep, int64_t* index,
                             SelectShared& shared) {
  const int threads = int(blockDim.x), lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  if (keep.M > 0) {
    bool wrong = false;
    for (int64_t m = threadIdx.x; m < keep.M; m += threads) wrong |= keep.row[m] < 0 || keep.row[m] >= N;
    int32_t kept = 0;
    for (int64_t i = threadIdx.x; keep.M > K && i < N; i += threads) kept += keys[i] == ~uint64_t(0);
    kept = warp_sum(kept);
    wrong = __ballot_sync(kAllLanes, wrong) != 0;
    if (lane == 0) shared.count[warp] = wrong ? -1 : kept;
    __syncthreads();
    int64_t all = 0;
#pragma unroll 1
    for (int w = 0; w < threads / kLanes; w++) {
      wrong |= shared.count[w] < 0;
      all += shared.count[w];
    }
    if (wrong || all > K) {
      for (int64_t r = threadIdx.x; r < K; r += threads) index[r] = -1;
      return;
    }
  }
  select_in_block(keys, N, K, index, shared);
}

}  // namespace cuda
}  // namespace h2ot
