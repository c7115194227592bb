// The streamed search by products: tiles as large as the stored search's, sums through shared memory to the warps that
// keep the lists of their rows. Shared memory is short: lists lie in the workspace, for most tiles change few of them.
#pragma once

#include "score_products.cuh"
#include "score_stream.cuh"

namespace h2ot {
namespace cuda {

constexpr float kLargest = 0x1.fffffep127f;

template <class Operand>
using StreamedTile = ProductTile<Operand, kStreamedSide>;

template <class Tiles>
struct StreamProductsShared {
  static constexpr int kSide = Tiles::kRows, kOwned = kSide / (Tiles::kThreads / kLanes);
  typename Tiles::Tokens tokens;
  float column_norm[kSide];  // infinite for no token
  float worst[kSide];        // lower bounds above it are not listed: at least what equal tokens can have
  float furthest[kSide];     // upper bounds of the largest distances
  TileOrder order;           // here rather than in registers
  union {
    typename Tiles::Slab slab;
    TileSums<kSide, kSide> values;
  };
};

// Lists those pairs of row r, in one tile, that are near enough: low, their lower bounds (NaN: not a pair), of the
// columns u * 32 + lane.
template <class Tiles>
H2OT_DEVICE void list_near(const Job<float>& job, int64_t b, int r, StreamProductsShared<Tiles>& shared,
                           const float (&low)[Tiles::kColumns / kLanes], int lane) {
  constexpr int kColumnsOfLane = Tiles::kColumns / kLanes;
  const int32_t i = shared.tokens.row[r], room = int32_t(job.list);
  const double* key = job.key + b * job.x.N;
  uint32_t near = 0;
#pragma unroll
  for (int u = 0; u < kColumnsOfLane; u++) {
    const int32_t j = shared.tokens.column[u * kLanes + lane];
    bool hit = low[u] <= shared.worst[r] && j != i;
    if (hit && job.for_peaks) hit = is_denser(key[j], j, key[i], i, job.noise != nullptr);
    near |= uint32_t(hit) << u;
  }
  const int64_t at = SearchPart(job, b, blockIdx.x).list_of(job, b, r, i) * room + lane;
  float listed = lane < room ? job.listed[at] : infinity_of(0.0f);
  int32_t listed_at = lane < room ? job.listed_at[at] : -1;
  const float vanishing = job.bound.vanishing;
  list_nearest(listed, listed_at, room, low, vanishing, shared.tokens.column, near, lane);
  __syncwarp();
  if (lane < room) {
    job.listed[at] = listed;
    job.listed_at[at] = listed_at;
  }
  if (lane == room - 1) shared.worst[r] = listed > kLargest ? kLargest : listed > vanishing ? listed : vanishing;
}

// The pairs of a warp's rows in one tile. Nearly all rows of nearly all tiles have none to list: what they take is what
// the search takes beside its products. So the few that have are listed after all were looked at.
template <class Tiles>
H2OT_DEVICE void list_rows(const Job<float>& job, int64_t b, int first, StreamProductsShared<Tiles>& shared, int lane) {
  constexpr int kColumnsOfLane = Tiles::kColumns / kLanes, kOwned = StreamProductsShared<Tiles>::kOwned;
  const float spread = job.bound.spread;
  const bool wants_largest = job.wants_largest && !job.for_peaks;
  const int32_t own_row = lane < kOwned ? shared.tokens.row[first + lane] : -1;
  const float own_norm = own_row >= 0 ? job.norm[b * job.x.N + own_row] : 0;
  const float own_count = own_row >= 0 ? of_row<typename Tiles::Entered>(job, b, own_row) : 0;
  const auto counts = [&](int u) {
    return Entry<typename Tiles::Entered>::kPairs ? shared.values.counts[u * kLanes + lane] : 1;
  };
  // The distance of a pair, not yet rounded up to 0, whose norms are `both` together.
  const auto squared = [&](int r, int u, float count, float both) {
    return fma(count * shared.values.value[r][u * kLanes + lane], counts(u), both);
  };
  float norm[kColumnsOfLane], lowest = -1;
  uint32_t hits = 0;  // rows with pairs to list
#pragma unroll
  for (int u = 0; u < kColumnsOfLane; u++) norm[u] = shared.column_norm[u * kLanes + lane];
#pragma unroll 1
  for (int r = first; r < first + kOwned; r++) {
    if (shared.tokens.row[r] < 0) continue;
    const float own = __shfl_sync(kAllLanes, own_norm, r - first);
    const float count = __shfl_sync(kAllLanes, own_count, r - first);
    const float worst = shared.worst[r];
    float low[kColumnsOfLane];
    bool near = false;
#pragma unroll
    for (int u = 0; u < kColumnsOfLane; u++) {  // of a column that is no token the norm is infinite, and this NaN
      const float both = own + norm[u];
      low[u] = squared(r, u, count, both) - spread * both;
      near |= low[u] <= worst;
    }
    if (wants_largest) {
      float furthest = -1;
#pragma unroll
      for (int u = 0; u < kColumnsOfLane; u++) {
        const int32_t j = shared.tokens.column[u * kLanes + lane];
        if (j < 0 || j == shared.tokens.row[r]) continue;
        const float both = own + norm[u], v = squared(r, u, count, both);
        const float high = (v > 0 ? v : 0) + spread * both;
        furthest = high > furthest ? high : furthest;
        lowest = low[u] > lowest ? low[u] : lowest;
      }
      if (__ballot_sync(kAllLanes, furthest > shared.furthest[r])) {
        furthest = warp_max(furthest);
        __syncwarp();
        if (lane == 0) shared.furthest[r] = furthest;
      }
    }
    hits |= uint32_t(__ballot_sync(kAllLanes, near) != 0) << (r - first);
  }
  if (wants_largest) {
    lowest = warp_max(lowest);
    if (lane == 0 && lowest > 0) offer_largest(job, b, lowest);
  }
  for (; hits; hits &= hits - 1) {
    const int own_r = __ffs(int(hits)) - 1, r = first + own_r;
    const float own = __shfl_sync(kAllLanes, own_norm, own_r), count = __shfl_sync(kAllLanes, own_count, own_r);
    float low[kColumnsOfLane];
#pragma unroll
    for (int u = 0; u < kColumnsOfLane; u++) {
      const float both = own + shared.column_norm[u * kLanes + lane];
      low[u] = squared(r, u, count, both) - spread * both;
    }
    list_near(job, b, r, shared, low, lane);
  }
}

// Grid: blocks of rows x splits of the columns, samples.
template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, Tiles::kBlocks) stream_products_kernel(Job<float> job) {
  typedef StreamProductsShared<Tiles> Shared;
  constexpr int kSide = Tiles::kRows;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t b = blockIdx.y, N = job.x.N;
  const SearchPart part(job, b, blockIdx.x);
  if (part.first_row >= part.rows) return;
  const uint8_t* valid = job.valid + b * N;
  const int32_t room = int32_t(job.list);
  for (int r = threadIdx.x; r < kSide; r += Tiles::kThreads) {
    const int64_t at = part.first_row + r;
    const int64_t i = at >= part.rows ? -1 : job.for_peaks ? job.peaks[b * N + at] : at;
    shared.tokens.row[r] = i >= 0 && valid[i] ? int32_t(i) : -1;
    shared.worst[r] = kLargest;
    shared.furthest[r] = -1;
  }
  if (threadIdx.x == 0) {
    const int64_t tiles = ceil_div(N, kSide);
    const int64_t around = job.for_peaks ? job.peaks[b * N + part.first_row] : part.first_row;
    shared.order = TileOrder(tiles * part.split / part.splits, tiles * (part.split + 1) / part.splits, around / kSide);
  }
  __syncthreads();
  for (int r = warp * Shared::kOwned; r < (warp + 1) * Shared::kOwned; r++) {
    const int32_t i = shared.tokens.row[r];
    if (i < 0 || lane >= room) continue;
    const int64_t at = part.list_of(job, b, r, i) * room + lane;
    job.listed[at] = infinity_of(0.0f);
    job.listed_at[at] = -1;
  }
  while (shared.order.left > 0) {
    {
      const int64_t at = block_y_here() * job.x.N;
      for (int c = thread_here(); c < kSide; c += Tiles::kThreads) {
        const int64_t j = int64_t(shared.order.tile) * kSide + c;
        const bool there = j < job.x.N && job.valid[at + j];
        shared.tokens.column[c] = there ? int32_t(j) : -1;
        shared.column_norm[c] = there ? job.norm[at + j] : infinity_of(0.0f);
      }
    }
    {
      Tiles tile;
      tile.compute(job, block_y_here(), shared.tokens, shared.slab);
      __syncthreads();
      tile.put_sums(shared.values);
    }
    for (int c = thread_here(); c < kSide; c += Tiles::kThreads) {
      shared.values.counts[c] = of_column<typename Tiles::Entered>(job, block_y_here(), shared.tokens.column[c]);
    }
    __syncthreads();
    {
      const int thread = thread_here();
      list_rows(job, block_y_here(), thread / kLanes * Shared::kOwned, shared, thread % kLanes);
    }
    if (thread_here() == 0) shared.order.next();
    __syncthreads();
  }
  for (int r = thread_here(); job.wants_largest && !job.for_peaks && r < kSide; r += Tiles::kThreads) {
    const int32_t i = shared.tokens.row[r];
    if (i < 0) continue;
    job.furthest[(block_y_here() * job.x.N + i) * job.splits + blockIdx.x % job.splits] = shared.furthest[r];
  }
}

}  // namespace cuda
}  // namespace h2ot
