// The nearest centre of a token, a warp per token: bounds say which can be it, float64 differences decide, the lowest
// position on a tie.
//
// Bytes of the stored form: K of N values of each row of the matrix (L2) and the centres (8 K, L1), 8 N written. Rows
// of tokens are read only where several centres can be the nearest.
#pragma once

#include "score_lists.cuh"

namespace h2ot {
namespace cuda {

// A token's row of the stored matrix at the centres, by their positions. Bounds of the token itself are -1.
template <class A>
struct StoredCentres {
  static constexpr int kAhead = kRowAhead;
  const A *value, *norm;
  const int64_t* centre;
  int64_t self;
  A own, spread;
  int N;

  H2OT_DEVICE StoredCentres(const Job<A>& job, int64_t b, int64_t i)
      : value(job.matrix + (b * job.x.N + i) * job.matrix_pitch),
        norm(job.norm ? job.norm + b * job.x.N : nullptr),
        centre(job.centres + b * job.centre_stride),
        self(i),
        own(norm ? norm[i] : A(0)),
        spread(A(job.bound.spread)),
        N(int(job.K)) {}

  H2OT_DEVICE int32_t position(int p) const { return p; }
  H2OT_DEVICE int64_t token(int p) const { return centre[p]; }
  template <class F>
  H2OT_DEVICE void look(int first, const double*, int lane, const F& f) const {
    int64_t j[kAhead];
    A v[kAhead], n[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; u++) {
      const int p = first + u * kLanes + lane;
      j[u] = p < N ? centre[p] : -1;
    }
#pragma unroll
    for (int u = 0; u < kAhead; u++) {
      v[u] = j[u] >= 0 ? value[j[u]] : infinity_of(A());
      n[u] = j[u] >= 0 && norm ? norm[j[u]] : A(0);
    }
#pragma unroll
    for (int u = 0; u < kAhead; u++) {
      const bool pair = v[u] < infinity_of(A()), itself = j[u] == self;
      const A error = pair ? spread * (own + n[u]) : A(0), low = v[u] - error;
      f(u, first + u * kLanes + lane, itself ? A(-1) : low > 0 ? low : A(0), itself ? A(-1) : v[u] + error, 0.0);
    }
  }
};

// What the search among the centres has listed for a token.
template <class A>
struct ListedCentres {
  static constexpr int kAhead = kRowAhead;
  const A* low;
  const int32_t *at, *count;
  const int64_t* centre;
  int N;  // entries

  H2OT_DEVICE ListedCentres(const Job<A>& job, int64_t b, int64_t i)
      : low(job.centre_low + (b * job.x.N + i) * job.label_splits * kCandidates),
        at(job.centre_at + (b * job.x.N + i) * job.label_splits * kCandidates),
        count(job.centre_count + (b * job.x.N + i) * job.label_splits),
        centre(job.centres + b * job.centre_stride),
        N(int(job.label_splits) * kCandidates) {}

  H2OT_DEVICE int32_t position(int e) const { return at[e]; }
  H2OT_DEVICE int64_t token(int e) const { return centre[at[e]]; }
  template <class F>
  H2OT_DEVICE void look(int first, const double*, int lane, const F& f) const {
#pragma unroll
    for (int u = 0; u < kAhead; u++) {
      const int e = first + u * kLanes + lane;
      const bool there = e < N && lane < count[e / kCandidates];
      const A bounded = there ? low[e] : infinity_of(A());
      f(u, e, bounded, bounded, 0.0);
    }
  }
};
static_assert(kCandidates == kLanes);

template <class Values, class F>
H2OT_DEVICE void look_at_all(const Values& row, int lane, const F& f) {
  for (int first = 0; first < row.N; first += Values::kAhead * kLanes) row.look(first, nullptr, lane, f);
}

// The position of the nearest of a row's centres whose lower bound is within reach, -1 where there is none.
template <class T, class Values, class A>
H2OT_DEVICE int32_t nearest_within(const RowJob<T>& job, int64_t b, int64_t i, const Values& row, A reach, int lane) {
  const auto within = [&](A low) { return low < infinity_of(A()) && low <= reach; };
  int found = 0, last = -1;
  look_at_all(row, lane, [&](int, int p, A low, A, double) {
    if (!within(low)) return;
    found++;
    last = p;
  });
  found = warp_sum(found);
  last = warp_max(last);
  if (found <= 1) return last < 0 ? -1 : row.position(last);
  double least = infinity_of(0.0);
  int best = -1;
  for_batches(
      job, b, i, row, nullptr, {1, 0}, [&](int, A low, A, double) { return within(low); },
      [&](const int (&p)[kBatch], int n, const double (&squared)[kBatch]) {
#pragma unroll
        for (int e = 0; e < kBatch; e++) {
          if (e < n && squared[e] < least) {
            least = squared[e];
            best = p[e];
          }
        }
        return least > 0;
      });
  return best < 0 ? -1 : row.position(best);
}

// The same among all centres; what is far by its norm or its first channels is left.
template <class T>
H2OT_DEVICE int32_t nearest_of_all(const RowJob<T>& job, int64_t b, int64_t i, Accumulator<T> reach, int lane) {
  constexpr int kMany = Sieve<T>::kMany;
  const int64_t* centre = job.centres + b * job.centre_stride;
  Sieve<T> sieve(job, b, i, lane);
  // Of a sample that is not multiplied no bound is known; its norms are 0.
  if (!sieve.norm || sieve.own_length > 0) sieve.set_limit(unscaled(sieve.scale, double(reach)));
  double least = infinity_of(0.0);
  int64_t best = -1;
  for (int64_t from = 0; from < job.K && least > 0; from += kLanes) {
    const int64_t mine = from + lane, j = mine < job.K ? centre[mine] : -1;
    const bool there = j >= 0 && j < job.x.N && is_valid(job, b, j);
    const bool near = there && sieve.passes(sieve.norm ? sieve.norm[j] : Accumulator<T>(0));
    for (uint32_t bits = __ballot_sync(kAllLanes, near); bits && least > 0;) {
      int64_t position[kMany];
      const T* rows[kMany];
      int n = 0;
#pragma unroll
      for (int e = 0; e < kMany; e++) {
        position[e] = bits ? from + __ffs(int(bits)) - 1 : position[0];
        n += bits != 0;
        bits &= bits - 1;
        rows[e] = job.row(b, centre[position[e]]);
      }
      const uint32_t passed = sieve.pass(rows);
#pragma unroll
      for (int e = 0; e < kMany; e++) {
        if (e >= n || !(passed >> e & 1)) continue;
        const double squared = exact_squared(sieve.own, rows[e], job.channels, lane);
        if (squared < least) {
          least = squared;
          best = position[e];
          sieve.set_limit(squared);
        }
      }
    }
  }
  return int32_t(best);
}

// Labels from the stored matrix. A warp per token; grid: groups, samples.
template <class T>
__global__ void __launch_bounds__(kWarps* kLanes, sizeof(T) < 8 ? 3 : 1) label_stored_kernel(RowJob<T> job) {
  follow_previous();
  typedef Accumulator<T> A;
  const int lane = threadIdx.x % kLanes;
  const int64_t b = blockIdx.y, i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (i >= job.x.N) return;
  int32_t label = -1;
  if (is_valid(job, b, i)) {
    const StoredCentres<A> row(job, b, i);
    A least = infinity_of(A());
    look_at_all(row, lane, [&](int, int p, A low, A high, double) {
      label = low < 0 ? p : label;
      least = high < least ? high : least;
    });
    label = warp_max(label);
    least = warp_min(least);
    if (label < 0) label = nearest_within(job, b, i, row, A(job.bound.reach(least)), lane);
  }
  if (lane == 0) job.labels[b * job.x.N + i] = label;
}

// Labels from the lists of the search among the centres. A warp per token; grid: groups, samples.
template <class T>
__global__ void __launch_bounds__(kWarps* kLanes, sizeof(T) < 8 ? 2 : 1) label_listed_kernel(RowJob<T> job) {
  follow_previous();
  typedef Accumulator<T> A;
  const int lane = threadIdx.x % kLanes;
  const int64_t b = blockIdx.y, N = job.x.N, i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (i >= N) return;
  int32_t label = -1;
  if (is_valid(job, b, i)) {
    const int64_t at = (b * N + i) * job.label_splits;
    A reach = infinity_of(A());
    bool open = false;
    for (int64_t split = lane; split < job.label_splits; split += kLanes) {
      const A own = job.centre_reach[at + split];
      reach = own < reach ? own : reach;
      open |= job.centre_count[at + split] < 0;
      if (own < 0) label = job.centre_at[(at + split) * kCandidates];  // splits ascend
    }
    label = warp_max(label);
    reach = warp_min(reach);
    if (label < 0) {
      label = __ballot_sync(kAllLanes, open) ? nearest_of_all(job, b, i, reach, lane)
                                             : nearest_within(job, b, i, ListedCentres<A>(job, b, i), reach, lane);
    }
  }
  if (lane == 0) job.labels[b * N + i] = label;
}

}  // namespace cuda
}  // namespace h2ot
