// The short lists of the streamed search: how pairs come onto them, what they prove, and what is done where they do not
// prove enough: all tokens are looked at, and those that bounds leave are compared in float64.
#pragma once

#include "score_rows.cuh"

namespace h2ot {
namespace cuda {

constexpr int32_t kNoToken = 0x7fffffff;  // above every token

// Puts the pairs that are open (bit u: lower bound low[u], or 0 up to `vanishing`, to token column[u * 32 + lane])
// where they are among the `room` least by (lower bound, token): equal tokens have the bound 0. A warp keeps the list,
// entry r in lane r; empty ones are infinite, their token -1. Least first: as many steps as a list has room for,
// however many pairs are near.
template <class A, int kOwn>
H2OT_DEVICE void list_nearest(A& listed, int32_t& listed_at, int32_t room, const A (&low)[kOwn], A vanishing,
                              const int32_t* column, uint32_t open, int lane) {
  while (true) {
    A own = infinity_of(A());
    int own_u = -1;
#pragma unroll
    for (int u = 0; u < kOwn; u++) {  // tokens ascend with u
      const A bound = low[u] > vanishing ? low[u] : A(0);
      if ((open >> u & 1) && bound < own) {
        own = bound;
        own_u = u;
      }
    }
    const int32_t own_at = own_u < 0 ? kNoToken : column[own_u * kLanes + lane];
    const A least = warp_min(own);
    const int32_t at = warp_min(own == least ? own_at : kNoToken);
    const A last = __shfl_sync(kAllLanes, listed, room - 1);
    const int32_t last_at = __shfl_sync(kAllLanes, listed_at, room - 1);
    if (!(least < last || (least == last && at < last_at))) return;
    if (own_at == at) open &= ~(1u << own_u);
    const int32_t place = __popc(__ballot_sync(kAllLanes, listed < least || (listed == least && listed_at < at)));
    const A before = __shfl_up_sync(kAllLanes, listed, 1);
    const int32_t before_at = __shfl_up_sync(kAllLanes, listed_at, 1);
    if (lane >= place && lane < room) {
      listed = lane == place ? least : before;
      listed_at = lane == place ? at : before_at;
    }
  }
}

// Tiles of columns, those around the rows first: in a video the nearest tokens stand there.
struct TileOrder {
  int32_t first, last, tile, left;  // of first .. last - 1, the one at hand, and how many there are from it on

  H2OT_DEVICE TileOrder(int64_t first_tile, int64_t end, int64_t around)
      : first(int32_t(first_tile)),
        last(int32_t(end)),
        tile(int32_t(around < first_tile ? first_tile
                     : around < end      ? around
                                         : end - 1)),
        left(last - first) {}
  H2OT_DEVICE void next() {
    tile = tile + 1 < last ? tile + 1 : first;
    left--;
  }
};

// Approximate squared distances of one token to several, as scaled, by their first channels: no more than those by all.
template <class T, int kMany>
H2OT_DEVICE void squares_by(const T* a, const T* const (&b)[kMany], int channels, Accumulator<T> scale, int lane,
                            Accumulator<T> (&squared)[kMany]) {
  typedef Accumulator<T> A;
  for (A& sum : squared) sum = 0;
  for (int c = 4 * lane; c < channels; c += 4 * kLanes) {
    const Quad<T> p = *reinterpret_cast<const Quad<T>*>(a + c);
    Quad<T> q[kMany];
#pragma unroll
    for (int n = 0; n < kMany; n++) q[n] = *reinterpret_cast<const Quad<T>*>(b[n] + c);
#pragma unroll
    for (int n = 0; n < kMany; n++) {
      for (int u = 0; u < 4; u++) {
        const A d = A(widen(p.v[u])) * scale - A(widen(q[n].v[u])) * scale;
        squared[n] = fma(d, d, squared[n]);
      }
    }
  }
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    for (A& sum : squared) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
}

// Which tokens may be within reach of one, as cheap bounds say: first by norms, for | |a| - |b| | <= |a - b|, then by
// first channels.
template <class T>
struct Sieve {
  typedef Accumulator<T> A;
  static constexpr int kMany = 4;  // rows that are read together
  static constexpr int kFirstChannels = 4 * kLanes;

  const Bound& bound;
  const A* norm;  // of the sample; null: there are none
  const T* own;
  A own_length, scale, reach;
  double limit;
  int channels, lane;

  H2OT_DEVICE Sieve(const RowJob<T>& job, int64_t b, int64_t i, int own_lane)
      : bound(job.bound),
        norm(job.norm ? job.norm + b * job.x.N : nullptr),
        own(job.row(b, i)),
        own_length(norm ? root(norm[i]) : A(0)),
        scale(sample_scale(job, b, own_lane)),
        channels(job.channels < kFirstChannels ? job.channels : kFirstChannels),
        lane(own_lane) {
    set_limit(infinity_of(0.0));
  }
  // Squared distances above it do not matter.
  H2OT_DEVICE void set_limit(double squared) {
    limit = squared;
    // Norms are as far off as spread says of their sum.
    reach = A(sqrt(squared) * double(scale) * (1 + 0x1p-20) + 2 * bound.eta);
  }
  H2OT_DEVICE bool passes(A squared_norm) const {
    if (norm == nullptr) return true;
    const A length = root(squared_norm), apart = length > own_length ? length - own_length : own_length - length;
    return !(apart - A(bound.spread) * (length + own_length) > reach);
  }
  // Which of the rows, a bit each.
  H2OT_DEVICE uint32_t pass(const T* const (&rows)[kMany]) const {
    A first[kMany];
    squares_by(own, rows, channels, scale, lane, first);
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < kMany; e++) bits |= uint32_t(!(unscaled(scale, bound.least(double(first[e]))) > limit)) << e;
    return bits;
  }
};

// What the lists of all splits say of a token, which are those of `place` (the token, or its place among the peaks):
// tokens that are on no list are no nearer than `limit` (a float64 squared distance), and those that equal it have
// numbers above `last_equal`: their lower bound is 0, and of such ones those of lower numbers are listed.
template <class A>
struct Lists {
  const Bound& bound;
  const A* low;
  const int32_t* token;
  int64_t entries;
  A scale;
  double limit;
  int32_t last_equal;

  H2OT_DEVICE Lists(const Job<A>& job, int64_t b, int64_t place, int64_t splits, int lane) : bound(job.bound) {
    const int64_t at = b * job.x.N * job.splits + place * splits;
    low = job.listed + at * job.list;
    token = job.listed_at + at * job.list;
    entries = splits * job.list;
    scale = sample_scale(job, b, lane);
    A least = infinity_of(A());
    int32_t equal = kNoToken;
    for (int64_t split = lane; split < splits; split += kLanes) {
      const int64_t end = (split + 1) * job.list - 1;
      const A last = low[end];
      least = last < least ? last : least;
      if (last == 0 && token[end] < equal) equal = token[end];
    }
    limit = least_of(warp_min(least));
    last_equal = warp_min(equal);
  }
  // The least that a lower bound allows for the distance.
  H2OT_DEVICE double least_of(A bounded) const {
    return bounded < infinity_of(A()) ? unscaled(scale, bound.least(bounded)) : infinity_of(0.0);
  }
  // Whether no unlisted token is nearer than j, at s, or as near and of a lower number.
  H2OT_DEVICE bool prove(double s, int32_t j) const { return s < limit || (s == 0 && j <= last_equal); }

  // Fills a sorted list with the nearest of the entries, two read together.
  template <class T>
  H2OT_DEVICE void take(const RowJob<T>& job, int64_t b, int64_t i, List& list, int lane) const {
    static_assert(kBatch == 2);
    int64_t e = 0;
    const auto next = [&] {                             // the next entry that may be among the nearest, or -1
      if (list.full() && list.worst() == 0) return -1;  // equals that are still to come have higher numbers
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

constexpr int kNormsAhead = 8;  // per lane, asked for before the first is looked at

// Lists the nearest in float64 of a warp's share of the tokens that test(j): which may be nearer than the last one of
// another list that is known, whose tokens are passed over, and no farther than limit.
template <class T, class Test>
H2OT_DEVICE void search_exactly(const RowJob<T>& job, int64_t b, int64_t i, const List& known, List& found,
                                double limit, const Share& share, const Test& test) {
  typedef Accumulator<T> A;
  constexpr int kAtOnce = kNormsAhead * kLanes, kMany = Sieve<T>::kMany;
  const int lane = threadIdx.x % kLanes;
  const int64_t N = job.x.N;
  if (known.full() && known.worst() < limit) limit = known.worst();
  Sieve<T> sieve(job, b, i, lane);
  const auto passed = [&](const List& list, int64_t end) {  // equals that are still to come have higher numbers
    return list.full() && list.worst() == 0 && list.token[list.count - 1] < end;
  };
  for (int64_t first = share.member * kAtOnce; first < N; first += share.size * kAtOnce) {
    if (found.full() && found.worst() < limit) limit = found.worst();
    sieve.set_limit(limit);
    A norm[kNormsAhead];
    uint32_t wanted = 0;
#pragma unroll
    for (int u = 0; u < kNormsAhead; u++) {
      const int64_t j = first + u * kLanes + lane;
      wanted |= uint32_t(j < N && j != i && is_valid(job, b, j)) << u;
      norm[u] = j < N && sieve.norm ? sieve.norm[j] : A(0);
    }
#pragma unroll
    for (int u = 0; u < kNormsAhead; u++) wanted &= ~(uint32_t(!sieve.passes(norm[u])) << u);
#pragma unroll 1
    for (int u = 0; u < kNormsAhead; u++) {
      const int64_t mine = first + u * kLanes + lane;
      const bool asked = (wanted >> u & 1) && test(mine) && !known.holds(int32_t(mine));
      for (uint32_t bits = __ballot_sync(kAllLanes, asked); bits;) {
        int64_t j[kMany];
        const T* rows[kMany];
        int n = 0;
#pragma unroll
        for (int e = 0; e < kMany; e++) {
          j[e] = bits ? first + u * kLanes + __ffs(int(bits)) - 1 : j[0];
          n += bits != 0;
          bits &= bits - 1;
          rows[e] = job.row(b, j[e]);
        }
        const uint32_t near = sieve.pass(rows) & ((1u << n) - 1);
        if (near == 0) continue;
        double squared[kMany];
        exact_squares(sieve.own, rows, job.channels, lane, squared);
#pragma unroll
        for (int e = 0; e < kMany; e++) {
          if ((near >> e & 1) && squared[e] <= sieve.limit) found.insert(squared[e], int32_t(j[e]), lane);
        }
        if (found.full() && found.worst() < sieve.limit) sieve.set_limit(found.worst());
      }
    }
    if (passed(known, first + kAtOnce) || passed(found, first + kAtOnce)) return;
  }
}

struct CompleteShared {
  WarpLists lists;
  double around[kLanes];   // the most that the squared distances of tokens nearby in time can be
  int32_t listed[kWarps];  // entries of the list of each warp's token, where it is to be completed; else -1
};

// No less than the squared distance of the rank-th nearest of the tokens that test(j): what the rank-th of those nearby
// in time can be. For a whole block.
template <class T, class Test>
H2OT_DEVICE double limit_around(const RowJob<T>& job, int64_t b, int64_t i, int rank, CompleteShared& shared,
                                const Test& test) {
  constexpr int kMany = kLanes / kWarps;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const Accumulator<T> scale = sample_scale(job, b, lane);
  const T* rows[kMany];
  bool there[kMany];
#pragma unroll
  for (int e = 0; e < kMany; e++) {
    const int place = warp * kMany + e;
    const int64_t j = i + place - kLanes / 2 + (place >= kLanes / 2);
    there[e] = j >= 0 && j < job.x.N && is_valid(job, b, j) && test(j);
    rows[e] = job.row(b, there[e] ? j : i);
  }
  Accumulator<T> about[kMany];
  squares_by(job.row(b, i), rows, job.channels, scale, lane, about);
#pragma unroll
  for (int e = 0; e < kMany; e++) {
    const double most = there[e] ? unscaled(scale, job.bound.most(double(about[e]))) : infinity_of(0.0);
    if (lane == 0) shared.around[warp * kMany + e] = most;
  }
  __syncthreads();
  const double mine = shared.around[lane];
  int nearer = 0;
#pragma unroll 1
  for (int other = 0; other < kLanes; other++) {
    const double theirs = shared.around[other];
    nearer += theirs < mine || (theirs == mine && other < lane);
  }
  return warp_min(nearer == rank - 1 ? mine : infinity_of(0.0));
}

// Completes a sorted list of some of the tokens that test(j) to that of the nearest, in the first warp. For a whole
// block.
template <class T, class Test>
H2OT_DEVICE void complete(const RowJob<T>& job, int64_t b, int64_t i, List& list, CompleteShared& shared,
                          const Test& test) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const double limit = limit_around(job, b, i, list.room, shared, test);
  List found = shared.lists.own(warp, list.room);
  search_exactly(job, b, i, list, found, limit, {kWarps, warp}, test);
  if (lane == 0) shared.lists.count[warp] = found.count;
  __syncthreads();
  if (warp == 0) shared.lists.join(list, 0, lane);
}

}  // namespace cuda
}  // namespace h2ot
