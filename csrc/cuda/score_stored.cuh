// The decisions of the stored search, a warp per token: the nearest tokens, the largest distance, the parents; the
// block that is a sample's last finishes it.
#pragma once

#include "score_finish.cuh"
#include "score_rows.cuh"

namespace h2ot {
namespace cuda {

// A row that so many candidates have not settled is taken by all warps of its block: one after the other they take
// long.
constexpr int kFewCandidates = 8;

template <class A>
struct NearestShared {
  WarpLists lists;
  A reach[kWarps];         // of each warp's row
  int32_t wanted[kWarps];  // its neighbours, where all warps are to find them, else 0
};

// Lists a share of the row's candidates, those that bounds reach; false where more than `most` would be needed.
template <class T, class A>
H2OT_DEVICE bool list_candidates(const RowJob<T>& job, int64_t b, int64_t i, const Row<A>& row, A reach,
                                 const Share& share, int most, List& list) {
  const int lane = threadIdx.x % kLanes;
  for_batches(
      job, b, i, row, nullptr, share, [&](int, A low, A, double) { return low <= reach; },
      [&](const int (&j)[kBatch], int n, const double (&squared)[kBatch]) {
#pragma unroll 1
        for (int e = 0; e < n; e++) {
          const double mine = e == 0 ? squared[0] : squared[1];
          // In ascending order: an equal one later never displaces a listed one.
          if (!list.full() || mine < list.worst()) list.insert(mine, e == 0 ? j[0] : j[1], lane);
        }
        most -= n;
        return most > 0 && !(list.full() && list.worst() == 0);
      });
  return most > 0 || (list.full() && list.worst() == 0);
}

// m of token i and its k - 1 nearest in order (token -1: there are fewer), from its list.
template <class A>
H2OT_DEVICE void set_nearest(const Job<A>& job, int64_t b, int64_t i, const List& list, int wanted, int lane) {
  set_density(job, b, i, list, wanted, lane);
  const int64_t at = (b * job.x.N + i) * job.near;
  const bool elsewhere = list.squared != job.nearest + at;
  for (int r = lane; r < int(job.near); r += kLanes) {
    if (r >= list.count) {
      job.nearest_at[at + r] = -1;
    } else if (elsewhere) {
      job.nearest[at + r] = list.squared[r];
      job.nearest_at[at + r] = list.token[r];
    }
  }
}

// m and the nearest of every token, from the stored matrix. A warp per token; grid: groups, samples.
template <class T>
__global__ void __launch_bounds__(kWarps* kLanes, sizeof(T) < 8 ? 3 : 1) nearest_stored_kernel(RowJob<T> job) {
  follow_previous();
  typedef Accumulator<T> A;
  NearestShared<A>& shared = *reinterpret_cast<NearestShared<A>*>(shared_memory());
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t b = blockIdx.y, first = int64_t(blockIdx.x) * kWarps, i = first + warp;
  const int64_t at = (b * job.x.N + i) * job.near;
  const bool shares = job.near <= kLongestList;  // else lists lie in memory, and each warp is alone
  if (lane == 0) shared.wanted[warp] = 0;
  const bool valid = i < job.x.N && is_valid(job, b, i);
  if (!valid && i < job.x.N && lane == 0) job.key[b * job.x.N + i] = infinity_of(0.0);  // rows are read whole
  if (valid) {
    const Row<A> row(job, b, i);
    int pairs = 0;
    A furthest = 0, least = infinity_of(A());
    row.scan(nullptr, lane, [&](int, int, A low, A high, double) {
      const bool pair = low < infinity_of(A());
      pairs += pair;
      furthest = pair && low > furthest ? low : furthest;
      least = high < least ? high : least;
    });
    pairs = warp_sum(pairs);
    if (job.wants_largest) {
      furthest = warp_max(furthest);
      if (lane == 0) offer_largest(job, b, furthest);
    }
    const int wanted = job.k - 1 < pairs ? int(job.k - 1) : pairs;
    List list = shares ? shared.lists.own(warp, wanted) : List{job.nearest + at, job.nearest_at + at, 0, wanted};
    bool settled = true;
    if (wanted > 0) {
      const A reach = A(job.bound.reach(wanted == 1 ? warp_min(least) : ranked_smallest(row, wanted, lane)));
      settled = list_candidates(job, b, i, row, reach, {1, 0}, shares ? kFewCandidates : row.N, list);
      if (!settled && lane == 0) {
        shared.reach[warp] = reach;
        shared.wanted[warp] = wanted;
      }
    }
    if (settled) set_nearest(job, b, i, list, wanted, lane);
  }
  __syncthreads();
  for (int owner = 0; owner < kWarps; owner++) {
    const int wanted = shared.wanted[owner];
    if (wanted == 0) continue;
    List list = shared.lists.own(warp, wanted);
    list_candidates(job, b, first + owner, Row<A>(job, b, first + owner), shared.reach[owner], {kWarps, warp},
                    int(job.x.N), list);
    if (lane == 0) shared.lists.count[warp] = list.count;
    __syncthreads();
    if (warp == 0) {
      shared.lists.join(list, 1, lane);
      set_nearest(job, b, first + owner, list, wanted, lane);
    }
    __syncthreads();
  }
}

// The sample's largest distance: of each token those to later tokens that the bounds allow to be it. A warp per token;
// grid: groups, samples.
template <class T>
__global__ void __launch_bounds__(kWarps* kLanes, sizeof(T) < 8 ? 2 : 1) largest_stored_kernel(RowJob<T> job) {
  follow_previous();
  typedef Accumulator<T> A;
  const int lane = threadIdx.x % kLanes;
  const int64_t b = blockIdx.y, i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (i >= job.x.N || !is_valid(job, b, i)) return;
  const double threshold = largest_threshold(job, b);
  double largest = -1;
  int seen = 0;
  for_batches(
      job, b, i, Row<A>(job, b, i), nullptr, {1, 0},
      [&](int j, A, A high, double) { return j > i && double(high) >= threshold; },
      [&](const int (&)[kBatch], int n, const double (&squared)[kBatch]) {
#pragma unroll
        for (int e = 0; e < kBatch; e++) largest = e < n && squared[e] > largest ? squared[e] : largest;
        return ++seen != kLanes / kBatch || !equals_first(job, b, i, lane);
      });
  if (lane == 0 && largest > 0) {
    atomicMax(job.largest + 2 * b + 1, static_cast<unsigned long long>(pattern(largest)));
  }
}

// The first denser one among the k - 1 nearest of token i, at its place there, or -1. All others are farther.
template <class A, class Denser>
H2OT_DEVICE int64_t denser_neighbour(const Job<A>& job, int64_t at, int lane, const Denser& denser) {
  for (int64_t from = 0; from < job.near; from += kLanes) {
    const int64_t r = from + lane;
    const int32_t j = r < job.near ? job.nearest_at[at + r] : -1;
    const uint32_t found = __ballot_sync(kAllLanes, j >= 0 && denser(j));
    if (found) return from + __ffs(int(found)) - 1;
  }
  return -1;
}

// Whether token j has an equal of a lower number that is denser than i, too: that one's distance is j's, so j is never
// the parent.
template <class A, class Denser>
H2OT_DEVICE bool is_repeated(const Job<A>& job, int64_t b, int64_t j, const Denser& denser) {
  if (job.near == 0) return false;
  const int64_t at = (b * job.x.N + j) * job.near;
  const int32_t equal = job.nearest_at[at];
  return equal >= 0 && equal < j && job.nearest[at] == 0 && denser(equal);
}

// With their keys, fewer values of a row: more blocks of a multiprocessor hide what each of them waits for.
constexpr int kParentAhead = 4;

struct ParentShared {
  SelectShared select;
  bool last;
};

// The parent of every token from its list and the stored matrix; the block that is a sample's last finishes the sample.
// A warp per token; grid: groups, samples.
template <class T>
__global__ void __launch_bounds__(kWarps* kLanes, sizeof(T) < 8 ? 3 : 1) parent_stored_kernel(RowJob<T> job) {
  follow_previous();
  typedef Accumulator<T> A;
  ParentShared& shared = *reinterpret_cast<ParentShared*>(shared_memory());
  const int lane = threadIdx.x % kLanes;
  const int64_t b = blockIdx.y, N = job.x.N, i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const bool valid = i < N && is_valid(job, b, i);
  double squared = 0;
  int32_t parent = -1;
  if (valid) {
    const Row<A, kParentAhead> row(job, b, i);
    const double* key = job.key + b * N;
    const double own = key[i];
    const bool strict = job.noise != nullptr;
    const auto denser = [&](int64_t j) { return is_denser(key[j], j, own, i, strict); };
    const int64_t at = (b * N + i) * job.near, place = denser_neighbour(job, at, lane, denser);
    if (place >= 0) {
      parent = job.nearest_at[at + place];
      squared = job.nearest[at + place];
    } else {
      A nearest = infinity_of(A());
      row.scan(key, lane, [&](int, int j, A, A high, double key_of_j) {
        nearest = high < nearest && is_denser(key_of_j, j, own, i, strict) ? high : nearest;
      });
      nearest = warp_min(nearest);
      if (nearest < infinity_of(A())) {
        const A reach = A(job.bound.reach(nearest));
        for_batches(
            job, b, i, row, key, {1, 0},
            [&](int j, A low, A, double key_of_j) {
              return low <= reach && is_denser(key_of_j, j, own, i, strict) && !is_repeated(job, b, j, denser);
            },
            [&](const int (&j)[kBatch], int n, const double (&squares)[kBatch]) {
#pragma unroll
              for (int e = 0; e < kBatch; e++) {
                if (e < n && (parent < 0 || squares[e] < squared)) {
                  squared = squares[e];
                  parent = int32_t(j[e]);
                }
              }
              return squared > 0;
            });
      }
    }
  }
  if (valid && lane == 0) {
    job.squared[b * N + i] = squared;
    job.parent[b * N + i] = parent;
  }
  // One thread's fences stand for the block: the barriers order what the others wrote before and read after.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    shared.last = atomicAdd(job.arrived + b, 1) == int32_t(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!shared.last) return;
  finish_sample(job, b, shared.select);
}

}  // namespace cuda
}  // namespace h2ot
