// From approximate distances to decisions: what a warp does with a token's row of them. Bounds say what can matter, and
// float64 differences decide.
#pragma once

#include "score_device.cuh"

namespace h2ot {
namespace cuda {

constexpr int kRowAhead = 8;  // of a row, values asked for per lane before the first is looked at

// One token's row of the stored matrix: approximate squared distances and what they can be off by.
template <class A, int kMany = kRowAhead>
struct Row {
  static constexpr int kAhead = kMany;
  const A *value, *norm;
  A own, spread;
  int N;  // at most kStoredTokens

  H2OT_DEVICE Row(const Job<A>& job, int64_t b, int64_t i)
      : value(job.matrix + (b * job.x.N + i) * job.matrix_pitch),
        norm(job.norm ? job.norm + b * job.x.N : nullptr),
        own(norm ? norm[i] : A(0)),
        spread(A(job.bound.spread)),
        N(int(job.x.N)) {}

  H2OT_DEVICE int token(int j) const { return j; }
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

// A warp's share of a token's candidates: every size-th (a power of two) from the member-th on.
struct Share {
  int size, member;
};

// Calls f(j, n, squared) on the whole warp for its share of the pairs of token i with ascending j that
// test(j, low, high, key[j]) (asked per lane), until f returns false: up to kBatch at a time, of which n count, with
// their squared distances in float64. Values: Row, or what has its look, N and token.
template <class T, class Values, class Test, class F>
H2OT_DEVICE void for_batches(const RowJob<T>& job, int64_t b, int64_t i, const Values& row, const double* key,
                             const Share& share, const Test& test, const F& f) {
  constexpr int kAhead = Values::kAhead;
  typedef Accumulator<T> A;
  const int lane = threadIdx.x % kLanes;
  const T* const own = job.row(b, i);
  int batch[kBatch] = {};
  int held = 0, turn = 0, u = kAhead;
  int first = -kAhead * kLanes;  // of the tokens that were looked at last
  uint32_t found = 0, bits = 0;  // of 32 of them each, one per lane; those of u - 1 that are left
  for (bool more = true; more;) {
    while (bits == 0 && more) {
      if (u < kAhead) {
        bits = __shfl_sync(kAllLanes, found, u++);
      } else if ((first += kAhead * kLanes) < row.N) {
        row.look(first, key, lane, [&](int at, int j, A low, A high, double key_of_j) {
          const bool wanted = low < infinity_of(A()) && test(j, low, high, key_of_j);
          const uint32_t flags = __ballot_sync(kAllLanes, wanted);
          found = at == lane ? flags : found;
        });
        u = 0;
      } else {
        more = false;
      }
    }
    if (more) {
      const int j = first + (u - 1) * kLanes + __ffs(int(bits)) - 1;
      bits &= bits - 1;
      if ((turn++ & (share.size - 1)) != share.member) continue;
#pragma unroll
      for (int n = 0; n < kBatch; n++) batch[n] = n >= held ? j : batch[n];
      held++;
    }
    if (held == kBatch || (!more && held > 0)) {
      double squared[kBatch];
      if (held == 1) {
        squared[0] = exact_squared(own, job.row(b, row.token(batch[0])), job.channels, lane);
      } else {
        const T* const rows[kBatch] = {job.row(b, row.token(batch[0])), job.row(b, row.token(batch[1]))};
        static_assert(kBatch == 2);
        exact_squares(own, rows, job.channels, lane, squared);
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

// A short list of each warp of a block.
struct WarpLists {
  double squared[kWarps][kLongestList];
  int32_t token[kWarps][kLongestList];
  int32_t count[kWarps];

  H2OT_DEVICE List own(int warp, int32_t room) { return {squared[warp], token[warp], 0, room}; }
  // Adds what the warps from `first` on have listed. For one warp, when all are done.
  H2OT_DEVICE void join(List& list, int first, int lane) {
#pragma unroll 1
    for (int other = first; other < kWarps; other++) {
#pragma unroll 1
      for (int r = 0; r < count[other]; r++) list.insert(squared[other][r], token[other][r], lane);
    }
  }
};

// Remembers a lower bound (as scaled) of the sample's largest distance.
template <class A>
H2OT_DEVICE void offer_largest(const Job<A>& job, int64_t b, A low) {
  atomicMax(job.largest + 2 * b, static_cast<unsigned long long>(pattern(double(low))));
}

// Whether token i equals the sample's first, another one: the first one's distances are then i's as well.
template <class T>
H2OT_DEVICE bool equals_first(const RowJob<T>& job, int64_t b, int64_t i, int lane) {
  const int64_t first = first_valid(job, b, lane);
  return first != i && exact_squared(job.row(b, i), job.row(b, first), job.channels, lane) == 0;
}

// The threshold that the upper bound of a pair at the largest distance reaches.
template <class A>
H2OT_DEVICE double largest_threshold(const Job<A>& job, int64_t b) {
  return job.bound.below(value_of(uint64_t(job.largest[2 * b])));
}

}  // namespace cuda
}  // namespace h2ot
