// From approximate distances to decisions: a warp per token bounds what can matter, and float64 differences decide.
#pragma once

#include "score_device.cuh"

namespace h2ot {
namespace cuda {

// Bounds of one token's approximate distances, from its row of the stored matrix.
template <class A>
struct Row {
  const A *value, *norm;
  A own, spread;

  H2OT_DEVICE Row(const Job<A>& job, int64_t b, int64_t i)
      : value(job.matrix + (b * job.x.N + i) * job.matrix_pitch),
        norm(job.norm ? job.norm + b * job.x.N : nullptr),
        own(norm ? norm[i] : A(0)),
        spread(A(job.bound.spread)) {}

  // Infinite where there is no pair, as both bounds then are.
  H2OT_DEVICE bool pair(int64_t j) const { return value[j] < infinity_of(A()); }
  H2OT_DEVICE A high(int64_t j) const { return norm && pair(j) ? value[j] + spread * (own + norm[j]) : value[j]; }
  H2OT_DEVICE A low(int64_t j) const {
    if (!norm || !pair(j)) return value[j];
    const A v = value[j] - spread * (own + norm[j]);
    return v > 0 ? v : A(0);
  }
};

// The rank-th smallest upper bound of a row (rank from 1; there are as many pairs).
template <class A>
H2OT_DEVICE A ranked_smallest(const Row<A>& row, int64_t pitch, int64_t rank, int lane) {
  constexpr int64_t kBySteps = 8;
  if (rank <= kBySteps) {
    A last = -1;  // of the value before, at
    int64_t last_at = -1;
    for (int64_t r = 0; r < rank; r++) {
      A least = infinity_of(A());
      int64_t least_at = pitch;
      for (int64_t j = lane; j < pitch; j += kLanes) {
        const A v = row.high(j);
        const bool later = v > last || (v == last && j > last_at);
        if (later && v < least) {
          least = v;
          least_at = j;
        }
      }
      last = warp_min(least);
      last_at = warp_min(least == last ? least_at : pitch);
    }
    return last;
  }
  // Bisection on the pattern, which orders like the value.
  auto low = pattern(A(0)), high = pattern(infinity_of(A()));
  while (low < high) {
    const auto middle = low + (high - low) / 2;
    int64_t reached = 0;
    for (int64_t j = lane; j < pitch; j += kLanes) reached += pattern(row.high(j)) <= middle;
    if (warp_sum(reached) >= rank) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return value_of(low);
}

// Calls f(j) on the whole warp for ascending j < count that test(j) (asked per lane), until f returns false.
template <class Test, class F>
H2OT_DEVICE void for_each(int64_t count, int lane, const Test& test, const F& f) {
  for (int64_t from = 0; from < count; from += kLanes) {
    const int64_t mine = from + lane;
    for (uint32_t bits = __ballot_sync(kAllLanes, mine < count && test(mine)); bits; bits &= bits - 1) {
      if (!f(from + __ffs(int(bits)) - 1)) return;
    }
  }
}

template <class A>
H2OT_DEVICE bool is_valid(const Job<A>& job, int64_t b, int64_t i) {
  return job.valid[b * job.x.N + i];
}

// m and key of token i from its `wanted` nearest.
template <class A>
H2OT_DEVICE void set_density(const Job<A>& job, int64_t b, int64_t i, const List& list, int64_t wanted, int lane) {
  double total = 0;
  for (int64_t r = 0; r < wanted; r++) total += list.squared[r];
  if (lane == 0) {
    const double m = total / double((wanted + 1) * job.x.C);
    job.m[b * job.x.N + i] = m;
    job.key[b * job.x.N + i] = job.noise ? -(exp(-m) + job.noise[b * job.x.N + i]) : m;
  }
}

// Remembers a lower bound (as scaled) of the sample's largest distance.
template <class A>
H2OT_DEVICE void offer_largest(const Job<A>& job, int64_t b, A low) {
  atomicMax(job.largest + 2 * b, static_cast<unsigned long long>(pattern(double(low))));
}

// Whether token i equals the sample's first, another one: the first one's distances are then i's as well.
template <class A>
H2OT_DEVICE bool equals_first(const Job<A>& job, int64_t b, int64_t i, int lane) {
  const int64_t first = first_valid(job, b, lane);
  return first != i && exact_squared(job.row(b, i), job.row(b, first), job.channels, lane) == 0;
}

// The threshold that the upper bound of a pair at the largest distance reaches.
template <class A>
H2OT_DEVICE double largest_threshold(const Job<A>& job, int64_t b) {
  return job.bound.below(value_of(uint64_t(job.largest[2 * b])));
}

// Room for a short list of each warp in shared memory.
struct ListShared {
  double squared[kWarps][kLongestList];
  int32_t token[kWarps][kLongestList];
};

template <class A>
H2OT_DEVICE List list_of(const Job<A>& job, int64_t b, int64_t i, int warp) {
  if (job.near <= kLongestList) {
    ListShared& shared = *reinterpret_cast<ListShared*>(shared_memory());
    return {shared.squared[warp], shared.token[warp], 0, job.near};
  }
  const int64_t at = (b * job.x.N + i) * job.near;
  return {job.nearest + at, job.nearest_at + at, 0, job.near};
}

// m of every token from the stored matrix. A warp per token; grid: groups, samples.
template <class A>
__global__ void __launch_bounds__(kWarps* kLanes, 2) nearest_stored_kernel(Job<A> job) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t b = blockIdx.y, i = int64_t(blockIdx.x) * kTokensPerBlock + warp;
  if (i >= job.x.N || !is_valid(job, b, i)) return;
  const Row<A> row(job, b, i);
  int64_t pairs = 0;
  A furthest = 0;
  for (int64_t j = lane; j < job.matrix_pitch; j += kLanes) {
    if (!row.pair(j)) continue;
    pairs++;
    furthest = row.low(j) > furthest ? row.low(j) : furthest;
  }
  pairs = warp_sum(pairs);
  if (job.wants_largest) {
    furthest = warp_max(furthest);
    if (lane == 0) offer_largest(job, b, furthest);
  }
  const int64_t wanted = job.k - 1 < pairs ? job.k - 1 : pairs;
  List list = list_of(job, b, i, warp);
  if (wanted > 0) {
    list.room = wanted;
    const A reach = A(job.bound.reach(ranked_smallest(row, job.matrix_pitch, wanted, lane)));
    for_each(
        job.matrix_pitch, lane, [&](int64_t j) { return row.pair(j) && row.low(j) <= reach; },
        [&](int64_t j) {
          list.insert(exact_squared(job.row(b, i), job.row(b, j), job.channels, lane), int32_t(j), lane);
          return !(list.full() && list.worst() == 0);
        });
  }
  set_density(job, b, i, list, wanted, lane);
}

// The largest distance among those of token i to later tokens, where the bounds allow it to be the sample's.
template <class A>
H2OT_DEVICE void search_largest(const Job<A>& job, int64_t b, int64_t i, const Row<A>& row, int lane) {
  const double threshold = largest_threshold(job, b);
  double largest = -1;
  int32_t seen = 0;
  for_each(
      job.matrix_pitch, lane, [&](int64_t j) { return j > i && row.pair(j) && double(row.high(j)) >= threshold; },
      [&](int64_t j) {
        if (++seen == kLanes && equals_first(job, b, i, lane)) return false;
        const double s = exact_squared(job.row(b, i), job.row(b, j), job.channels, lane);
        largest = s > largest ? s : largest;
        return true;
      });
  if (lane == 0 && largest > 0) atomicMax(job.largest + 2 * b + 1, static_cast<unsigned long long>(pattern(largest)));
}

// The parent of every token from the stored matrix. A warp per token; grid: groups, samples.
template <class A>
__global__ void __launch_bounds__(kWarps* kLanes, 2) parent_stored_kernel(Job<A> job) {
  const int lane = threadIdx.x % kLanes;
  const int64_t b = blockIdx.y, N = job.x.N, i = int64_t(blockIdx.x) * kTokensPerBlock + threadIdx.x / kLanes;
  if (i >= N || !is_valid(job, b, i)) return;
  const Row<A> row(job, b, i);
  const double* key = job.key + b * N;
  const double own = key[i];
  const auto denser = [&](int64_t j) { return row.pair(j) && is_denser(key[j], j, own, i, job.noise != nullptr); };
  A nearest = infinity_of(A());
  for (int64_t j = lane; j < N; j += kLanes) {
    if (denser(j) && row.high(j) < nearest) nearest = row.high(j);
  }
  nearest = warp_min(nearest);
  double squared = 0;
  int32_t parent = -1;
  if (nearest < infinity_of(A())) {
    const A reach = A(job.bound.reach(nearest));
    for_each(
        N, lane, [&](int64_t j) { return denser(j) && row.low(j) <= reach; },
        [&](int64_t j) {
          const double s = exact_squared(job.row(b, i), job.row(b, j), job.channels, lane);
          if (parent < 0 || s < squared) {
            squared = s;
            parent = int32_t(j);
          }
          return squared > 0;
        });
  }
  if (lane == 0) {
    job.squared[b * N + i] = squared;
    job.parent[b * N + i] = parent;
  }
  if (job.wants_largest) search_largest(job, b, i, row, lane);
}

}  // namespace cuda
}  // namespace h2ot
