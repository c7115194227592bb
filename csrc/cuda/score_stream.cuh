// The streamed search, for samples whose matrix would be too large: tiles pass by, each token keeps a short list of its
// nearest by (lower bound, token). What the list cannot prove in float64 is searched over all tokens in float64.
#pragma once

#include "score_finish.cuh"
#include "score_lists.cuh"
#include "score_tiles.cuh"

namespace h2ot {
namespace cuda {

template <class Tiles>
struct StreamShared {
  typedef typename Tiles::A A;
  TileTokens<Tiles::kRows, Tiles::kColumns> tokens;
  A furthest[Tiles::kRows];
  A low[Tiles::kRows][kLongestList];
  int32_t at[Tiles::kRows][kLongestList];
  union {
    typename Tiles::Slab slab;
    TileValues<A, Tiles::kRows, Tiles::kColumns, Tiles::kAcrossThreads> tile;  // read by rows only
  };
};

constexpr int64_t kMostPeakSplits = 32;  // more lists of a peak take longer to read than the search of its tiles

// What a block of the search does: rows first_row to .. of `rows`, split `split` of `splits` of the columns. The second
// search spreads its few rows over as many blocks as the first one has.
struct SearchPart {
  int64_t rows, splits, first_row, split;

  template <class A>
  H2OT_DEVICE SearchPart(const Job<A>& job, int64_t b, int64_t block)
      : rows(job.for_peaks ? job.peak_count[2 * b] : job.x.N),
        splits(job.for_peaks ? job.peak_count[2 * b + 1] : job.splits),
        first_row(block / splits * job.search_rows),
        split(block % splits) {}
  // Where the list of row r of the block (token i) begins, in lists.
  template <class A>
  H2OT_DEVICE int64_t list_of(const Job<A>& job, int64_t b, int64_t r, int64_t i) const {
    return b * job.x.N * job.splits + (job.for_peaks ? first_row + r : i) * splits + split;
  }
};

// Grid: blocks of rows x splits of the columns, samples.
template <class Tiles>
__global__ void __launch_bounds__(kTileThreads, 2) stream_kernel(Job<typename Tiles::A> job) {
  typedef typename Tiles::A A;
  StreamShared<Tiles>& shared = *reinterpret_cast<StreamShared<Tiles>*>(shared_memory());
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t b = blockIdx.y, N = job.x.N;
  const SearchPart part(job, b, blockIdx.x);
  if (part.first_row >= part.rows) return;
  const uint8_t* valid = job.valid + b * N;
  const double* key = job.key + b * N;
  const int32_t room = int32_t(job.list);
  for (int r = threadIdx.x; r < Tiles::kRows; r += kTileThreads) {
    const int64_t at = part.first_row + r;
    const int64_t i = at >= part.rows ? -1 : job.for_peaks ? job.peaks[b * N + at] : at;
    shared.tokens.row[r] = i >= 0 && valid[i] ? int32_t(i) : -1;
    shared.furthest[r] = -1;
  }
  for (int r = warp; r < Tiles::kRows; r += kTileThreads / kLanes) {
    if (lane < room) {
      shared.low[r][lane] = infinity_of(A());
      shared.at[r][lane] = -1;
    }
  }
  const int64_t tiles = ceil_div(N, Tiles::kColumns);
  const int64_t around = job.for_peaks ? job.peaks[b * N + part.first_row] : part.first_row;
  TileOrder order(tiles * part.split / part.splits, tiles * (part.split + 1) / part.splits, around / Tiles::kColumns);
  const bool wants_largest = job.wants_largest && !job.for_peaks;
  for (; order.left > 0; order.next()) {
    __syncthreads();
    for (int c = threadIdx.x; c < Tiles::kColumns; c += kTileThreads) {
      const int64_t j = int64_t(order.tile) * Tiles::kColumns + c;
      shared.tokens.column[c] = j < N && valid[j] ? int32_t(j) : -1;
    }
    __syncthreads();
    Tiles block;
    block.compute(job, b, shared.tokens, shared.slab);
    __syncthreads();
    block.put(job, b, shared.tokens, shared.slab, shared.tile);
    __syncthreads();
    for (int r = warp; r < Tiles::kRows; r += kTileThreads / kLanes) {
      const int32_t i = shared.tokens.row[r];
      if (i < 0) continue;
      constexpr int kColumnsOfLane = Tiles::kColumns / kLanes;
      A value[kColumnsOfLane], furthest = -1;
      uint32_t near = 0;
#pragma unroll
      for (int u = 0; u < kColumnsOfLane; u++) {
        const int32_t j = shared.tokens.column[u * kLanes + lane];
        value[u] = shared.tile.value[r][u * kLanes + lane];
        if (!(value[u] < infinity_of(A()))) continue;
        furthest = value[u] > furthest ? value[u] : furthest;
        const bool eligible = !job.for_peaks || is_denser(key[j], j, key[i], i, job.noise != nullptr);
        near |= uint32_t(eligible && value[u] <= shared.low[r][room - 1]) << u;
      }
      if (wants_largest && __ballot_sync(kAllLanes, furthest > shared.furthest[r])) {
        furthest = warp_max(furthest);
        __syncwarp();
        if (lane == 0) shared.furthest[r] = furthest;
      }
      if (__ballot_sync(kAllLanes, near != 0) == 0) continue;
      A listed = lane < room ? shared.low[r][lane] : infinity_of(A());
      int32_t listed_at = lane < room ? shared.at[r][lane] : -1;
      list_nearest(listed, listed_at, room, value, A(0), shared.tokens.column, near, lane);
      __syncwarp();
      if (lane < room) {
        shared.low[r][lane] = listed;
        shared.at[r][lane] = listed_at;
      }
    }
  }
  __syncthreads();
  for (int r = warp; r < Tiles::kRows; r += kTileThreads / kLanes) {
    const int32_t i = shared.tokens.row[r];
    if (i < 0) continue;
    const int64_t at = part.list_of(job, b, r, i);
    if (lane < room) {
      job.listed[at * room + lane] = shared.low[r][lane];
      job.listed_at[at * room + lane] = shared.at[r][lane];
    }
    if (wants_largest && lane == 0) {
      job.furthest[at] = shared.furthest[r];
      if (shared.furthest[r] > 0) offer_largest(job, b, shared.furthest[r]);
    }
  }
}

// m of every token, and its nearest in order. A warp per token, the block together where lists prove too little; grid:
// groups, samples.
template <class T>
__global__ void __launch_bounds__(kWarps* kLanes, sizeof(T) < 8 ? 2 : 1) nearest_streamed_kernel(RowJob<T> job) {
  CompleteShared& shared = *reinterpret_cast<CompleteShared*>(shared_memory());
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t b = blockIdx.y, N = job.x.N, block = int64_t(blockIdx.x) * kWarps;
  const auto finish = [&](int64_t i, const List& list, int64_t proven) {
    const int64_t wanted = job.k - 1 < list.count ? job.k - 1 : list.count;
    set_density(job, b, i, list, wanted, lane);
    if (lane == 0) job.proven[b * N + i] = int32_t(proven);
  };
  const auto list_of = [&](int64_t i, int32_t count) {
    return List{job.nearest + (b * N + i) * job.near, job.nearest_at + (b * N + i) * job.near, count,
                int32_t(job.near)};
  };
  const auto any = [](int64_t) { return true; };
  if (lane == 0) shared.listed[warp] = -1;
  if (block + warp < N && is_valid(job, b, block + warp)) {
    const int64_t i = block + warp;
    List list = list_of(i, 0);
    if (job.list == 0) {  // too long for a list in shared memory
      search_exactly(job, b, i, {nullptr, nullptr, 0, 1}, list, infinity_of(0.0), {1, 0}, any);
      finish(i, list, list.count);
    } else {
      const Lists<Accumulator<T>> lists(job, b, i, job.splits, lane);
      lists.take(job, b, i, list, lane);
      int64_t proven = 0;
      while (proven < list.count && lists.prove(list.squared[proven], list.token[proven])) proven++;
      // Values tie at the limit without harm to m; with fewer than k - 1 listed, all valid tokens are.
      if (list.count < job.k - 1 || job.k == 1 || list.squared[job.k - 2] <= lists.limit) {
        finish(i, list, proven);
      } else if (lane == 0) {
        shared.listed[warp] = list.count;
      }
    }
  }
  __syncthreads();
  for (int owner = 0; owner < kWarps; owner++) {
    if (shared.listed[owner] < 0) continue;
    List list = list_of(block + owner, shared.listed[owner]);
    complete(job, b, block + owner, list, shared, any);
    if (warp == 0) finish(block + owner, list, list.count);
  }
}

// The parents that are among the proven neighbours (nearly all); `flag` marks the tokens left. The sample's largest
// distance. A warp per token; grid: groups, samples.
template <class T>
__global__ void __launch_bounds__(kWarps* kLanes, 2) parent_streamed_kernel(RowJob<T> job) {
  const int lane = threadIdx.x % kLanes;
  const int64_t b = blockIdx.y, N = job.x.N, i = int64_t(blockIdx.x) * kTokensPerBlock + threadIdx.x / kLanes;
  if (i >= N) return;
  const bool valid = is_valid(job, b, i);
  bool found = false;
  if (valid) {
    const double* key = job.key + b * N;
    const int64_t at = (b * N + i) * job.near;
    for (int64_t r = 0; r < job.proven[b * N + i] && !found; r++) {
      const int32_t j = job.nearest_at[at + r];
      found = is_denser(key[j], j, key[i], i, job.noise != nullptr);
      if (found && lane == 0) {
        job.parent[b * N + i] = j;
        job.squared[b * N + i] = job.nearest[at + r];
      }
    }
  }
  if (lane == 0) job.flag[b * N + i] = valid && !found;
  if (!valid || !job.wants_largest) return;
  const double threshold = largest_threshold(job, b);
  bool furthest = job.list == 0;
  for (int64_t split = 0; split < job.splits && !furthest; split++) {
    furthest = double(job.furthest[(b * N + i) * job.splits + split]) >= threshold;
  }
  if (!furthest || equals_first(job, b, i, lane)) return;
  double largest = 0;
  constexpr int kMany = 4;
  const Accumulator<T> scale = sample_scale(job, b, lane);
  for (int64_t from = 0; from < N; from += kMany) {
    const T* rows[kMany];
    for (int e = 0; e < kMany; e++) rows[e] = job.row(b, from + e < N ? from + e : i);
    Accumulator<T> about[kMany];
    squares_by(job.row(b, i), rows, job.channels, scale, lane, about);
#pragma unroll
    for (int e = 0; e < kMany; e++) {
      if (from + e >= N || double(about[e]) < threshold || !is_valid(job, b, from + e)) continue;
      const double s = exact_squared(job.row(b, i), rows[e], job.channels, lane);
      largest = s > largest ? s : largest;
    }
  }
  if (lane == 0) atomicMax(job.largest + 2 * b + 1, static_cast<unsigned long long>(pattern(largest)));
}

// The flagged tokens, as a list, and how their search is spread. Grid: 1, samples.
template <class A>
__global__ void __launch_bounds__(kFinishThreads) peaks_kernel(Job<A> job) {
  SelectShared& shared = *reinterpret_cast<SelectShared*>(shared_memory());
  const int64_t b = blockIdx.y, N = job.x.N;
  const int64_t count = compact(job.flag + b * N, N, job.peaks + b * N, shared);
  if (threadIdx.x > 0) return;
  int64_t splits = 1;
  if (count > 0) {
    const int64_t blocks = ceil_div(N, job.search_rows) * job.splits / ceil_div(count, job.search_rows);
    const int64_t room = N * job.splits / count;  // for lists
    splits = blocks < room ? blocks : room;
    splits = splits < kMostPeakSplits ? splits : kMostPeakSplits;
  }
  job.peak_count[2 * b] = int32_t(count);
  job.peak_count[2 * b + 1] = int32_t(splits);
}

// The parents of the listed tokens. A warp per token, the block together where lists prove too little; grid: groups,
// samples.
template <class T>
__global__ void __launch_bounds__(kWarps* kLanes, sizeof(T) < 8 ? 2 : 1) peak_parent_kernel(RowJob<T> job) {
  CompleteShared& shared = *reinterpret_cast<CompleteShared*>(shared_memory());
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t b = blockIdx.y, N = job.x.N, block = int64_t(blockIdx.x) * kWarps, count = job.peak_count[2 * b];
  if (block >= count) return;
  const double* key = job.key + b * N;
  const auto finish = [&](int64_t i, const List& list) {
    if (lane > 0) return;
    job.parent[b * N + i] = list.count > 0 ? list.token[0] : -1;
    job.squared[b * N + i] = list.count > 0 ? list.squared[0] : 0;
  };
  const auto list_of = [&](int64_t i, int32_t listed) {
    return List{job.nearest + (b * N + i) * job.near, job.nearest_at + (b * N + i) * job.near, listed, 1};
  };
  if (lane == 0) shared.listed[warp] = -1;
  if (block + warp < count) {
    const int64_t i = job.peaks[b * N + block + warp];
    List list = list_of(i, 0);
    const Lists<Accumulator<T>> lists(job, b, block + warp, job.peak_count[2 * b + 1], lane);
    lists.take(job, b, i, list, lane);
    if (list.count == 0 || lists.prove(list.squared[0], list.token[0])) {
      finish(i, list);
    } else if (lane == 0) {
      shared.listed[warp] = list.count;
    }
  }
  __syncthreads();
  for (int owner = 0; owner < kWarps; owner++) {
    if (shared.listed[owner] < 0) continue;
    const int64_t i = job.peaks[b * N + block + owner];
    List list = list_of(i, shared.listed[owner]);
    complete(job, b, i, list, shared, [&](int64_t j) { return is_denser(key[j], j, key[i], i, job.noise != nullptr); });
    if (warp == 0) finish(i, list);
  }
}

}  // namespace cuda
}  // namespace h2ot
