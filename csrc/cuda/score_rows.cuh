// From approximate distances to decisions: a warp per token bounds what can matter, and float64 differences decide.
#pragma once

#include "score_finish.cuh"

namespace h2ot {
namespace cuda {

constexpr int kAhead = 8;  // of a row, values asked for per lane before the first is looked at

// One token's row of the stored matrix: approximate squared distances and what they can be off by.
template <class A>
struct Row {
  const A *value, *norm;
  A own, spread;
  int N;  // at most kStoredTokens

  H2OT_DEVICE Row(const Job<A>& job, int64_t b, int64_t i)
      : value(job.matrix + (b * job.x.N + i) * job.matrix_pitch),
        norm(job.norm ? job.norm + b * job.x.N : nullptr),
        own(norm ? norm[i] : A(0)),
        spread(A(job.bound.spread)),
        N(int(job.x.N)) {}

  // Calls f(u, j, low, high, key[j]) on the whole warp for the bounds of kAhead x 32 tokens from `first` on, u from 0:
  // both are infinite where there is no pair. key may be null.
  template <class F>
  H2OT_DEVICE void look(int first, const double* key, int lane, const F& f) const {
    A v[kAhead], n[kAhead];
    double k[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; u++) {
      const int j = first + u * kLanes + lane;
      v[u] = j < N ? value[j] : infinity_of(A());
      n[u] = j < N && norm ? norm[j] : A(0);
      k[u] = j < N && key ? key[j] : 0;
    }
#pragma unroll
    for (int u = 0; u < kAhead; u++) {
      const bool pair = v[u] < infinity_of(A());
      const A error = pair ? spread * (own + n[u]) : A(0), low = v[u] - error;
      f(u, first + u * kLanes + lane, low > 0 ? low : A(0), v[u] + error, k[u]);
    }
  }
  // The same for all tokens.
  template <class F>
  H2OT_DEVICE void scan(const double* key, int lane, const F& f) const {
    for (int first = 0; first < N; first += kAhead * kLanes) look(first, key, lane, f);
  }
};

// The rank-th smallest upper bound of a row (rank from 1; there are as many pairs).
template <class A>
H2OT_DEVICE A ranked_smallest(const Row<A>& row, int rank, int lane) {
  constexpr int kBySteps = 8;
  if (rank <= kBySteps) {
    A last = -1;  // of the value before, at
    int last_at = -1;
    for (int r = 0; r < rank; r++) {
      A least = infinity_of(A());
      int least_at = row.N;
      row.scan(nullptr, lane, [&](int, int j, A, A high, double) {
        const bool later = high > last || (high == last && j > last_at);
        if (later && high < least) {
          least = high;
          least_at = j;
        }
      });
      last = warp_min(least);
      last_at = warp_min(least == last ? least_at : row.N);
    }
    return last;
  }
  // Bisection on the pattern, which orders like the value.
  auto low = pattern(A(0)), high = pattern(infinity_of(A()));
  while (low < high) {
    const auto middle = low + (high - low) / 2;
    int reached = 0;
    row.scan(nullptr, lane, [&](int, int j, A, A bound, double) { reached += j < row.N && pattern(bound) <= middle; });
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

// The warps of a block that decide a token's candidates in float64 together.
struct Team {
  int lane, warp, size, member, token;

  H2OT_DEVICE explicit Team(int32_t team)
      : lane(threadIdx.x % kLanes),
        warp(threadIdx.x / kLanes),
        size(team),
        member(warp & (team - 1)),
        token(int((blockIdx.x * kWarps + warp) / unsigned(team))) {}
};

// values[e], without an array in memory.
template <class T>
H2OT_DEVICE T chosen(const T (&values)[kBatch], int e) {
  static_assert(kBatch == 4);
  return e < 2 ? (e == 0 ? values[0] : values[1]) : (e == 2 ? values[2] : values[3]);
}

// Calls f(j, n, squared) on the whole warp for the pairs of token i with ascending j that test(j, low, high, key[j])
// (asked per lane), every size-th for each member of the team, until f returns false: up to kBatch at a time, of which
// n count, with their squared distances in float64.
template <class A, class Test, class F>
H2OT_DEVICE void for_batches(const Job<A>& job, int64_t b, const Team& team, const Row<A>& row, const double* key,
                             const Test& test, const F& f) {
  const A* const own = job.row(b, team.token);
  int batch[kBatch] = {};
  int held = 0, turn = 0, u = kAhead;
  int first = -kAhead * kLanes;  // of the tokens that were looked at last
  uint32_t found = 0, bits = 0;  // of 32 of them each, one per lane; those of u - 1 that are left
  for (bool more = true; more;) {
    while (bits == 0 && more) {
      if (u < kAhead) {
        bits = __shfl_sync(kAllLanes, found, u++);
      } else if ((first += kAhead * kLanes) < row.N) {
        row.look(first, key, team.lane, [&](int at, int j, A low, A high, double key_of_j) {
          const bool wanted = low < infinity_of(A()) && test(j, low, high, key_of_j);
          const uint32_t flags = __ballot_sync(kAllLanes, wanted);
          found = at == team.lane ? flags : found;
        });
        u = 0;
      } else {
        more = false;
      }
    }
    if (more) {
      const int j = first + (u - 1) * kLanes + __ffs(int(bits)) - 1;
      bits &= bits - 1;
      if ((turn++ & (team.size - 1)) != team.member) continue;
#pragma unroll
      for (int n = 0; n < kBatch; n++) batch[n] = n >= held ? j : batch[n];
      held++;
    }
    if (held == kBatch || (!more && held > 0)) {
      double squared[kBatch];
      if (held == 1) {
        squared[0] = exact_squared(own, job.row(b, batch[0]), job.channels, team.lane);
      } else {
        const A* const rows[kBatch] = {job.row(b, batch[0]), job.row(b, batch[1]), job.row(b, batch[2]),
                                       job.row(b, batch[3])};
        static_assert(kBatch == 4);
        exact_squares(own, rows, job.channels, team.lane, squared);
      }
      if (!f(batch, held, squared)) return;
      held = 0;
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

// What the warps of a block show each other: short lists, or the nearest denser token.
struct RowsShared {
  union {
    struct {
      double squared[kWarps][kLongestList];
      int32_t token[kWarps][kLongestList];
      int32_t count[kWarps];
    } lists;
    struct {
      double squared[kWarps];
      int32_t parent[kWarps];
      bool last;
    } found;
    SelectShared select;
  };
};

// m of every token from the stored matrix, and its k - 1 nearest in order (token -1: there are fewer). A team per
// token; grid: blocks of kWarps / team tokens, samples.
template <class A>
__global__ void __launch_bounds__(kWarps* kLanes, sizeof(A) == 4 ? 2 : 1) nearest_stored_kernel(Job<A> job) {
  RowsShared& shared = *reinterpret_cast<RowsShared*>(shared_memory());
  const Team team(job.team);
  const int lane = team.lane;
  const int64_t b = blockIdx.y, i = team.token, at = (b * job.x.N + i) * job.near;
  const bool valid = i < job.x.N && is_valid(job, b, i);
  const bool own_list = job.near > kLongestList;  // in memory; the team is one warp then
  List list = {own_list ? job.nearest + at : shared.lists.squared[team.warp],
               own_list ? job.nearest_at + at : shared.lists.token[team.warp], 0, int32_t(job.near)};
  int wanted = 0;
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
    if (job.wants_largest && team.member == 0) {
      furthest = warp_max(furthest);
      if (lane == 0) offer_largest(job, b, furthest);
    }
    wanted = job.k - 1 < pairs ? int(job.k - 1) : pairs;
    if (wanted > 0) {
      list.room = wanted;
      const A reach = A(job.bound.reach(wanted == 1 ? warp_min(least) : ranked_smallest(row, wanted, lane)));
      for_batches(
          job, b, team, row, nullptr, [&](int, A low, A, double) { return low <= reach; },
          [&](const int (&j)[kBatch], int n, const double (&squared)[kBatch]) {
#pragma unroll 1
            for (int e = 0; e < n; e++) {
              const double mine = chosen(squared, e);
              // In ascending order: an equal one later never displaces a listed one.
              if (!list.full() || mine < list.worst()) list.insert(mine, chosen(j, e), lane);
            }
            return !(list.full() && list.worst() == 0);
          });
    }
  }
  if (lane == 0 && !own_list) shared.lists.count[team.warp] = int32_t(list.count);
  __syncthreads();
  if (!valid || team.member > 0) return;
#pragma unroll 1
  for (int other = team.warp + 1; other < team.warp + team.size; other++) {
#pragma unroll 1
    for (int32_t r = 0; r < shared.lists.count[other]; r++) {
      list.insert(shared.lists.squared[other][r], shared.lists.token[other][r], lane);
    }
  }
  set_density(job, b, i, list, wanted, lane);
  for (int64_t r = lane; r < job.near; r += kLanes) {
    if (!own_list && r < list.count) {
      job.nearest[at + r] = list.squared[r];
      job.nearest_at[at + r] = list.token[r];
    } else if (r >= list.count) {
      job.nearest_at[at + r] = -1;
    }
  }
}

// The sample's largest distance: of each token those to later tokens that the bounds allow to be it. A team per token;
// grid: blocks of kWarps / team tokens, samples.
template <class A>
__global__ void __launch_bounds__(kWarps* kLanes, sizeof(A) == 4 ? 2 : 1) largest_stored_kernel(Job<A> job) {
  const Team team(job.team);
  const int64_t b = blockIdx.y, i = team.token;
  if (i >= job.x.N || !is_valid(job, b, i)) return;
  const double threshold = largest_threshold(job, b);
  double largest = -1;
  int seen = 0;
  for_batches(
      job, b, team, Row<A>(job, b, i), nullptr,
      [&](int j, A, A high, double) { return j > i && double(high) >= threshold; },
      [&](const int (&)[kBatch], int n, const double (&squared)[kBatch]) {
#pragma unroll
        for (int e = 0; e < kBatch; e++) largest = e < n && squared[e] > largest ? squared[e] : largest;
        return ++seen != kLanes / kBatch || !equals_first(job, b, i, team.lane);
      });
  if (team.lane == 0 && largest > 0) {
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

// The parent of every token from its list and the stored matrix; the block that is a sample's last finishes the sample.
// A team per token; grid: blocks of kWarps / team tokens, samples.
template <class A>
__global__ void __launch_bounds__(kWarps* kLanes, sizeof(A) == 4 ? 2 : 1) parent_stored_kernel(Job<A> job) {
  RowsShared& shared = *reinterpret_cast<RowsShared*>(shared_memory());
  const Team team(job.team);
  const int lane = team.lane;
  const int64_t b = blockIdx.y, N = job.x.N, i = team.token;
  const bool valid = i < N && is_valid(job, b, i);
  double squared = 0;
  int32_t parent = -1;
  if (valid) {
    const Row<A> row(job, b, i);
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
            job, b, team, row, key,
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
  if (lane == 0) {
    shared.found.squared[team.warp] = squared;
    shared.found.parent[team.warp] = parent;
  }
  __syncthreads();
  if (valid && team.member == 0 && lane == 0) {
    for (int other = team.warp + 1; other < team.warp + team.size; other++) {
      const double s = shared.found.squared[other];
      const int32_t j = shared.found.parent[other];
      if (j >= 0 && (parent < 0 || s < squared || (s == squared && j < parent))) {
        squared = s;
        parent = j;
      }
    }
    job.squared[b * N + i] = squared;
    job.parent[b * N + i] = parent;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.found.last = atomicAdd(job.arrived + b, 1) == int32_t(gridDim.x) - 1;
  __syncthreads();
  if (!shared.found.last) return;
  __threadfence();
  __syncthreads();
  finish_sample(job, b, shared.select);
}

}  // namespace cuda
}  // namespace h2ot
