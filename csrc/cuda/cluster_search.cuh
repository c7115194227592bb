// The centres that can be the nearest of each token, from tiles of tokens x centres: approximate distances by the tiles
// of the scoring search, and per token a short list of those that the bounds leave.
//
// A tile's columns are tokens by number, so centres are read where they lie: nothing is gathered.
//
// Count for N 8192, C 256, K 2048: 64 x 16 tiles of 128 x 128, 26 GFLOP as three products; a tile reads 2 x 128 KiB of
// operands from L2, its 16 thousand sums pass through shared memory once. Written: some candidates per token, 12 bytes
// each, and 8 bytes.
#pragma once

#include "score_products.cuh"
#include "score_stream_products.cuh"
#include "score_tiles.cuh"

namespace h2ot {
namespace cuda {

template <class Tiles>
using CentreValues = typename std::conditional<Tiles::kProducts, TileSums<Tiles::kRows, Tiles::kColumns>,
                                               TileValues<typename Tiles::A, Tiles::kRows, Tiles::kColumns>>::type;

template <class Tiles>
struct CentreShared {
  typedef typename Tiles::A A;
  typename Tiles::Tokens tokens;
  A column_norm[Tiles::kColumns];  // of products
  A reach[Tiles::kRows];           // lower bounds above it are not listed; -1: the token is a centre itself
  int32_t count[Tiles::kRows];     // listed; -1: there was no room
  int32_t tile, last_tile;         // here rather than in registers
  union {
    typename Tiles::Slab slab;
    CentreValues<Tiles> values;
  };
};

// Drops the entries of a list that are no longer within reach, in order; returns how many are left. For a whole warp.
template <class A>
H2OT_DEVICE int32_t compact_list(A* low, int32_t* at, int32_t count, A reach, int lane) {
  const A mine = lane < count ? low[lane] : infinity_of(A());
  const int32_t mine_at = lane < count ? at[lane] : -1;
  __syncwarp();
  const uint32_t kept = __ballot_sync(kAllLanes, mine <= reach);
  if (mine <= reach) {
    const int place = __popc(kept & ((1u << lane) - 1));
    low[place] = mine;
    at[place] = mine_at;
  }
  return __popc(kept);
}

// Row r of one tile. For the warp that owns the row.
template <class Tiles>
H2OT_DEVICE void list_centres(const Job<typename Tiles::A>& job, int64_t b, int r, CentreShared<Tiles>& shared,
                              int lane) {
  typedef typename Tiles::A A;
  constexpr int kColumnsOfLane = Tiles::kColumns / kLanes;
  const int32_t i = shared.tokens.row[r], first = shared.tile * Tiles::kColumns;
  const int64_t at = (b * job.x.N + i) * job.label_splits + blockIdx.x % job.label_splits;
  A* const listed = job.centre_low + at * kCandidates;
  int32_t* const listed_at = job.centre_at + at * kCandidates;
  A reach = shared.reach[r], low[kColumnsOfLane], least = infinity_of(A());
  int32_t itself = -1;
  bool near = false;
#pragma unroll
  for (int u = 0; u < kColumnsOfLane; u++) {
    const int c = u * kLanes + lane;
    const int32_t j = shared.tokens.column[c];
    A v = shared.values.value[r][c], error = 0;
    if constexpr (Tiles::kProducts) {
      const A both = job.norm[b * job.x.N + i] + shared.column_norm[c];
      v = fma(of_row<typename Tiles::Entered>(job, b, i) * v, shared.values.counts[c], both);
      v = v > 0 ? v : 0;
      error = job.bound.spread * both;
    }
    const bool pair = j >= 0 && j != i && v < infinity_of(A());
    low[u] = !pair ? infinity_of(A()) : v > error ? v - error : A(0);
    least = pair && v + error < least ? v + error : least;
    near |= low[u] <= reach;
    itself = j == i ? first + c : itself;
  }
  if (__ballot_sync(kAllLanes, itself >= 0)) {
    itself = warp_max(itself);
    __syncwarp();  // all have read the row's reach
    if (lane == 0) {
      listed[0] = -1;
      listed_at[0] = itself;
      shared.reach[r] = -1;
      shared.count[r] = 1;
    }
    return;
  }
  int32_t count = shared.count[r];
  if (__ballot_sync(kAllLanes, near) == 0 || count < 0) return;
  const A nearer = A(job.bound.reach(warp_min(least)));
  reach = nearer < reach ? nearer : reach;
  int32_t more = 0;
#pragma unroll
  for (int u = 0; u < kColumnsOfLane; u++) more += __popc(__ballot_sync(kAllLanes, low[u] <= reach));
  if (count + more > kCandidates) count = compact_list(listed, listed_at, count, reach, lane);
  if (count + more > kCandidates) {
    count = -1;
  } else {
#pragma unroll
    for (int u = 0; u < kColumnsOfLane; u++) {
      const uint32_t bits = __ballot_sync(kAllLanes, low[u] <= reach);
      if (low[u] <= reach) {
        const int place = count + __popc(bits & ((1u << lane) - 1));
        listed[place] = low[u];
        listed_at[place] = first + u * kLanes + lane;
      }
      count += __popc(bits);
    }
  }
  __syncwarp();
  if (lane == 0) {
    shared.reach[r] = reach;
    shared.count[r] = count;
  }
}

// Of small tiles one block less than the stored search has: what the loop over tiles keeps takes registers, too.
template <class Tiles>
constexpr int kCentreBlocks = Tiles::kProducts || Tiles::kBlocks < 2 ? Tiles::kBlocks : 2;

// Grid: blocks of rows x splits of the centres, samples.
template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, kCentreBlocks<Tiles>) centre_kernel(Job<typename Tiles::A> job) {
  follow_previous();
  typedef typename Tiles::A A;
  CentreShared<Tiles>& shared = *reinterpret_cast<CentreShared<Tiles>*>(shared_memory());
  {
    const int64_t b = blockIdx.y, N = job.x.N, split = blockIdx.x % job.label_splits;
    const int64_t first = blockIdx.x / job.label_splits * Tiles::kRows;
    for (int r = threadIdx.x; r < Tiles::kRows; r += Tiles::kThreads) {
      const int64_t i = first + r;
      shared.tokens.row[r] = i < N && job.valid[b * N + i] ? int32_t(i) : -1;
      shared.reach[r] = value_of(pattern(infinity_of(A())) - 1);  // the largest number
      shared.count[r] = 0;
    }
    if (threadIdx.x == 0) {
      const int64_t tiles = ceil_div(job.K, Tiles::kColumns);
      shared.tile = int32_t(tiles * split / job.label_splits);
      shared.last_tile = int32_t(tiles * (split + 1) / job.label_splits);
    }
  }
  __syncthreads();
  while (shared.tile < shared.last_tile) {
    {
      const int64_t b = block_y_here(), N = job.x.N;
      const int64_t* centre = job.centres + b * job.centre_stride;
      for (int c = thread_here(); c < Tiles::kColumns; c += Tiles::kThreads) {
        const int64_t p = int64_t(shared.tile) * Tiles::kColumns + c, j = p < job.K ? centre[p] : -1;
        const bool there = j >= 0 && j < N && job.valid[b * N + j];
        shared.tokens.column[c] = there ? int32_t(j) : -1;
        if constexpr (Tiles::kProducts) shared.column_norm[c] = there ? job.norm[b * N + j] : A(0);
      }
    }
    __syncthreads();
    {
      Tiles tile;
      tile.compute(job, block_y_here(), shared.tokens, shared.slab);
      __syncthreads();
      if constexpr (Tiles::kProducts) {
        tile.put_sums(shared.values);
      } else {
        tile.put(job, block_y_here(), shared.tokens, shared.slab, shared.values);
      }
    }
    if constexpr (Tiles::kProducts) {
      for (int c = thread_here(); c < Tiles::kColumns; c += Tiles::kThreads) {
        shared.values.counts[c] = of_column<typename Tiles::Entered>(job, block_y_here(), shared.tokens.column[c]);
      }
    }
    __syncthreads();
    {
      const int thread = thread_here();
      for (int r = thread / kLanes; r < Tiles::kRows; r += Tiles::kThreads / kLanes) {
        if (shared.tokens.row[r] >= 0) list_centres(job, block_y_here(), r, shared, thread % kLanes);
      }
    }
    __syncthreads();
    if (thread_here() == 0) shared.tile++;
    __syncthreads();
  }
  for (int r = thread_here(); r < Tiles::kRows; r += Tiles::kThreads) {
    const int32_t i = shared.tokens.row[r];
    if (i < 0) continue;
    const int64_t at = (block_y_here() * job.x.N + i) * job.label_splits + blockIdx.x % job.label_splits;
    job.centre_reach[at] = shared.reach[r];
    job.centre_count[at] = shared.count[r];
  }
}

}  // namespace cuda
}  // namespace h2ot
