// The streamed search, for samples whose matrix would be too large: tiles pass by, each token keeps a short list of its
// nearest by (lower bound, token). What the list cannot prove in float64 is searched over all tokens in float64.
#pragma once

#include "score_finish.cuh"
#include "score_products.cuh"
#include "score_rows.cuh"
#include "score_tiles.cuh"

namespace h2ot {
namespace cuda {

template <class Tiles>
struct StreamShared {
  typedef typename Tiles::A A;
  TileTokens<Tiles::kRows, Tiles::kColumns> tokens;
  int32_t count[Tiles::kRows];
  A lowest_furthest[Tiles::kRows], furthest[Tiles::kRows];  // largest lower and upper bound
  A low[Tiles::kRows][kLongestList];
  int32_t at[Tiles::kRows][kLongestList];
  union {
    typename Tiles::Slab slab;
    TileValues<A, Tiles::kRows, Tiles::kColumns> tile;
  };
};

// Adds a pair to a sorted list of at most `room` (up to a warp's width). For a whole warp; returns the new count.
template <class A>
H2OT_DEVICE int32_t list_pair(A* low, int32_t* at, int32_t count, int32_t room, A value, int32_t token, int lane) {
  const A mine = lane < count ? low[lane] : infinity_of(A());
  const int32_t mine_at = lane < count ? at[lane] : -1;
  const bool before = lane < count && (mine < value || (mine == value && mine_at < token));
  const int32_t place = __popc(__ballot_sync(kAllLanes, before));
  const A above = __shfl_up_sync(kAllLanes, mine, 1);
  const int32_t above_at = __shfl_up_sync(kAllLanes, mine_at, 1);
  const int32_t end = count < room ? count + 1 : room;
  if (lane >= place && lane < end) {
    low[lane] = lane == place ? value : above;
    at[lane] = lane == place ? token : above_at;
  }
  __syncwarp();
  return end;
}

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
  for (int r = threadIdx.x; r < Tiles::kRows; r += kTileThreads) {
    const int64_t at = part.first_row + r;
    const int64_t i = at >= part.rows ? -1 : job.for_peaks ? job.peaks[b * N + at] : at;
    shared.tokens.row[r] = i >= 0 && valid[i] ? int32_t(i) : -1;
    shared.count[r] = 0;
    shared.lowest_furthest[r] = -1;
    shared.furthest[r] = -1;
  }
  const int64_t tiles = ceil_div(N, Tiles::kColumns);
  const int32_t room = int32_t(job.list);
  const bool wants_largest = job.wants_largest && !job.for_peaks;
  const A spread = A(job.bound.spread);
  for (int64_t t = tiles * part.split / part.splits; t < tiles * (part.split + 1) / part.splits; t++) {
    __syncthreads();
    for (int c = threadIdx.x; c < Tiles::kColumns; c += kTileThreads) {
      const int64_t j = t * Tiles::kColumns + c;
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
      int32_t count = shared.count[r];
      for (int c = lane; c < Tiles::kColumns; c += kLanes) {
        const int32_t j = shared.tokens.column[c];
        const A v = shared.tile.value[r][c];
        const bool pair = v < infinity_of(A());
        const A slack = pair && job.norm ? spread * (job.norm[b * N + i] + job.norm[b * N + j]) : A(0);
        const A low = v > slack ? v - slack : A(0), high = v + slack;
        if (wants_largest) {
          const bool further = pair && (high > shared.furthest[r] || low > shared.lowest_furthest[r]);
          if (__ballot_sync(kAllLanes, further)) {
            const A most = warp_max(pair ? high : A(-1)), least = warp_max(pair ? low : A(-1));
            if (lane == 0) {
              if (most > shared.furthest[r]) shared.furthest[r] = most;
              if (least > shared.lowest_furthest[r]) shared.lowest_furthest[r] = least;
            }
            __syncwarp();
          }
        }
        const bool eligible = pair && (!job.for_peaks || is_denser(key[j], j, key[i], i, job.noise != nullptr));
        // Columns come in ascending order: an equal one later never displaces a listed one.
        const bool wanted = eligible && (count < room || low < shared.low[r][room - 1]);
        for (uint32_t bits = __ballot_sync(kAllLanes, wanted); bits; bits &= bits - 1) {
          const int from = __ffs(int(bits)) - 1;
          const A value = __shfl_sync(kAllLanes, low, from);
          const int32_t token = __shfl_sync(kAllLanes, j, from);
          if (count < room || value < shared.low[r][room - 1]) {
            count = list_pair(shared.low[r], shared.at[r], count, room, value, token, lane);
          }
        }
      }
      __syncwarp();
      if (lane == 0) shared.count[r] = count;
    }
  }
  __syncthreads();
  for (int r = warp; r < Tiles::kRows; r += kTileThreads / kLanes) {
    const int32_t i = shared.tokens.row[r];
    if (i < 0) continue;
    const int64_t at = part.list_of(job, b, r, i);
    if (lane < room) {
      const bool listed = lane < shared.count[r];
      job.listed[at * room + lane] = listed ? shared.low[r][lane] : infinity_of(A());
      job.listed_at[at * room + lane] = listed ? shared.at[r][lane] : -1;
    }
    if (wants_largest && lane == 0) {
      job.furthest[at] = shared.furthest[r];
      if (shared.lowest_furthest[r] > 0) offer_largest(job, b, shared.lowest_furthest[r]);
    }
  }
}

// What the lists of all splits say of a token, which are those of `place` (the token, or its place among the peaks):
// tokens that are on no list are no nearer than `limit` (a float64 squared distance).
template <class A>
struct Lists {
  const Bound& bound;
  const A* low;
  const int32_t* token;
  int64_t entries;
  A scale;
  double limit;
  bool one;

  H2OT_DEVICE Lists(const Job<A>& job, int64_t b, int64_t place, int64_t splits, int lane) : bound(job.bound) {
    const int64_t at = b * job.x.N * job.splits + place * splits;
    low = job.listed + at * job.list;
    token = job.listed_at + at * job.list;
    entries = splits * job.list;
    one = splits == 1;
    scale = sample_scale(job, b, lane);
    A least = infinity_of(A());
    for (int64_t split = lane; split < splits; split += kLanes) {
      const A last = low[(split + 1) * job.list - 1];
      least = last < least ? last : least;
    }
    limit = least_of(warp_min(least));
  }
  // The least that a lower bound allows for the distance.
  H2OT_DEVICE double least_of(A bounded) const {
    return bounded < infinity_of(A()) ? unscaled(scale, bound.least(bounded)) : infinity_of(0.0);
  }
  // Whether no unlisted token is nearer than s, or as near and of a lower number. A single list is in ascending order
  // of (lower bound, token), and the bound of a distance of zero is zero: its ties at zero are in order too.
  H2OT_DEVICE bool prove(double s) const { return s < limit || (s == 0 && one); }

  // Fills a sorted list with the nearest of the entries, two read together.
  template <class T>
  H2OT_DEVICE void take(const RowJob<T>& job, int64_t b, int64_t i, List& list, int lane) const {
    static_assert(kBatch == 2);
    int64_t e = 0;
    const auto next = [&] {  // the next entry that may be among the nearest, or -1
      for (; e < entries; e++) {
        if (token[e] >= 0 && !(list.full() && least_of(low[e]) > list.worst())) return token[e++];
      }
      return -1;
    };
    for (int32_t first = next(); first >= 0; first = next()) {
      const int32_t other = next();
      const T* const rows[kBatch] = {job.row(b, first), job.row(b, other < 0 ? first : other)};
      double squared[kBatch];
      exact_squares(job.row(b, i), rows, job.channels, lane, squared);
      list.insert(squared[0], first, lane);
      if (other >= 0) list.insert(squared[1], other, lane);
    }
  }
};

constexpr int kFarAhead = 4;  // tokens whose first channels are read together

// The squared distances of one token to several by their first channels: no more than those by all of them.
template <class T>
H2OT_DEVICE void first_squares(const T* a, const T* const (&b)[kFarAhead], int channels, int lane,
                               double (&squared)[kFarAhead]) {
  const int c = 4 * lane;
  for (double& sum : squared) sum = 0;
  if (c < channels) {
    const Quad<T> p = *reinterpret_cast<const Quad<T>*>(a + c);
    Quad<T> q[kFarAhead];
#pragma unroll
    for (int n = 0; n < kFarAhead; n++) q[n] = *reinterpret_cast<const Quad<T>*>(b[n] + c);
#pragma unroll
    for (int n = 0; n < kFarAhead; n++) {
      for (int u = 0; u < 4; u++) {
        const double d = double(widen(p.v[u])) - double(widen(q[n].v[u]));
        squared[n] = fma(d, d, squared[n]);
      }
    }
  }
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    for (double& sum : squared) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
}

// Completes a sorted list, which may hold some of them, by all tokens that test(j), decided in float64. What is far by
// its first channels is left.
template <class T, class Test>
H2OT_DEVICE void search_exactly(const RowJob<T>& job, int64_t b, int64_t i, List& list, int lane, const Test& test) {
  const T* const own = job.row(b, i);
  const auto holds = [&](int64_t j) {
    bool found = false;
    for (int r = 0; r < list.count; r++) found |= list.token[r] == j;
    return found;
  };
  for (int64_t from = 0; from < job.x.N; from += kLanes) {
    const int64_t mine = from + lane;
    const bool wanted = mine < job.x.N && mine != i && is_valid(job, b, mine) && test(mine) && !holds(mine);
    for (uint32_t bits = __ballot_sync(kAllLanes, wanted); bits;) {
      int64_t j[kFarAhead];
      int n = 0;
#pragma unroll
      for (int e = 0; e < kFarAhead; e++) {
        j[e] = bits ? from + __ffs(int(bits)) - 1 : j[0];
        n += bits != 0;
        bits &= bits - 1;
      }
      const T* const rows[kFarAhead] = {job.row(b, j[0]), job.row(b, j[1]), job.row(b, j[2]), job.row(b, j[3])};
      static_assert(kFarAhead == 4);
      double least[kFarAhead];
      first_squares(own, rows, job.channels, lane, least);
#pragma unroll
      for (int e = 0; e < kFarAhead; e++) {
        if (e >= n || (list.full() && least[e] * (1 - 0x1p-40) > list.worst())) continue;  // the sums round
        list.insert(exact_squared(own, rows[e], job.channels, lane), int32_t(j[e]), lane);
      }
    }
    if (!list.full() || list.worst() > 0) continue;
    bool passed = true;  // ties that are still to come have higher numbers
    for (int r = 0; r < list.count; r++) passed &= list.token[r] < from + kLanes;
    if (passed) return;
  }
}

// m of every token, and its nearest in order. A warp per token; grid: groups, samples.
template <class T>
__global__ void __launch_bounds__(kWarps* kLanes, 2) nearest_streamed_kernel(RowJob<T> job) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t b = blockIdx.y, N = job.x.N, i = int64_t(blockIdx.x) * kTokensPerBlock + warp;
  if (i >= N || !is_valid(job, b, i)) return;
  List list = {job.nearest + (b * N + i) * job.near, job.nearest_at + (b * N + i) * job.near, 0, int32_t(job.near)};
  int64_t proven = 0;
  bool settled = false;
  if (job.list > 0) {
    const Lists<Accumulator<T>> lists(job, b, i, job.splits, lane);
    lists.take(job, b, i, list, lane);
    while (proven < list.count && lists.prove(list.squared[proven])) proven++;
    // Values tie at the limit without harm to m; with fewer than k - 1 listed, all valid tokens are.
    settled = list.count < job.k - 1 || job.k == 1 || list.squared[job.k - 2] <= lists.limit;
  }
  if (!settled) {
    search_exactly(job, b, i, list, lane, [](int64_t) { return true; });
    proven = list.count;
  }
  const int64_t wanted = job.k - 1 < list.count ? job.k - 1 : list.count;
  set_density(job, b, i, list, wanted, lane);
  if (lane == 0) job.proven[b * N + i] = int32_t(proven);
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
  for_each(
      N, lane, [&](int64_t j) { return j != i && is_valid(job, b, j); },
      [&](int64_t j) {
        const double s = exact_squared(job.row(b, i), job.row(b, j), job.channels, lane);
        largest = s > largest ? s : largest;
        return true;
      });
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

// The parents of the listed tokens. A warp per token; grid: groups, samples.
template <class T>
__global__ void __launch_bounds__(kWarps* kLanes, 2) peak_parent_kernel(RowJob<T> job) {
  const int lane = threadIdx.x % kLanes;
  const int64_t b = blockIdx.y, N = job.x.N, at = int64_t(blockIdx.x) * kTokensPerBlock + threadIdx.x / kLanes;
  if (at >= job.peak_count[2 * b]) return;
  const int64_t i = job.peaks[b * N + at];
  const double* key = job.key + b * N;
  List list = {job.nearest + (b * N + i) * job.near, job.nearest_at + (b * N + i) * job.near, 0, 1};
  const Lists<Accumulator<T>> lists(job, b, at, job.peak_count[2 * b + 1], lane);
  lists.take(job, b, i, list, lane);
  if (list.count > 0 && !lists.prove(list.squared[0])) {
    search_exactly(job, b, i, list, lane,
                   [&](int64_t j) { return is_denser(key[j], j, key[i], i, job.noise != nullptr); });
  }
  if (lane == 0) {
    job.parent[b * N + i] = list.count > 0 ? list.token[0] : -1;
    job.squared[b * N + i] = list.count > 0 ? list.squared[0] : 0;
  }
}

}  // namespace cuda
}  // namespace h2ot
