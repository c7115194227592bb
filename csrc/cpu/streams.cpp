// Two streams of tokens, weighted token by token: a layer of two outputs over both, softmax, and the sum, in one pass
// over memory. Of two weights that sum to 1 only the difference of the logits counts.
// Per token 4 C multiply-adds; both streams are read twice, the second time from the cache.
#include "kernels.h"
#include "softmax.h"
#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// Rows at a time, against the latency of the sums.
constexpr int kRows = 4;

// Calls f(first channel, how many: kLanes, or what is left).
template <class T, class F>
H2OT_INLINE void by_vectors(int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + kLanes<T> <= C; c += kLanes<T>) f(c, int64_t(kLanes<T>));
  if (c < C) f(c, C - c);
}
template <class T>
H2OT_INLINE Vector<T> read(const T* x, int64_t count) {
  return count == kLanes<T> ? load_wide(x) : load_part(x, count);
}

template <int R, class T>
H2OT_INLINE void mix_rows(const StreamsArgs& a, const Accumulator<T>* weights, Accumulator<T> bias, int64_t row) {
  typedef Accumulator<T> E;
  const int64_t C = a.C;
  const T *first[R], *second[R];
  for (int r = 0; r < R; r++) {
    first[r] = static_cast<const T*>(a.first) + (row + r) * C;
    second[r] = static_cast<const T*>(a.second) + (row + r) * C;
  }
  Vector<T> sums[R] = {};
  by_vectors<T>(C, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
    const Vector<T> of_first = load(weights + 2 * c), of_second = load(weights + 2 * c + kLanes<T>);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      sums[r] += read(first[r] + c, count) * of_first;
      sums[r] += read(second[r] + c, count) * of_second;
    }
  });
  // The stream of the larger weight, and the other's weight, at most 1/2: exact where one takes all.
  const T *larger[R], *smaller[R];
  E share[R];
  for (int r = 0; r < R; r++) {
    const E logit = sum_lanes<T>(sums[r]) + bias, size = logit < 0 ? -logit : logit;
    const E small = exp2_negative<E>(splat<E>(-size * E(kLog2E)))[0];
    larger[r] = logit < 0 ? second[r] : first[r];
    smaller[r] = logit < 0 ? first[r] : second[r];
    share[r] = small / (1 + small);
  }
  by_vectors<T>(C, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Vector<T> most = read(larger[r] + c, count);
      const Vector<T> mixed = most + (read(smaller[r] + c, count) - most) * share[r];
      T* const to = static_cast<T*>(a.out) + (row + r) * C + c;
      if (count == kLanes<T>) {
        store_narrow(to, mixed);
      } else {
        store_part(to, mixed, count);
      }
    }
  });
}

// What the first logit's weights are above the second's: a vector of the first stream's, one of the second's, and so
// on.
template <class T, class E>
H2OT_INLINE void subtract_weights(const StreamsArgs& a, E* to) {
  const T* const weight = static_cast<const T*>(a.weight);
  by_vectors<T>(a.C, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
    for (int stream = 0; stream < 2; stream++) {
      const T* const at = weight + stream * a.C + c;
      store(to + 2 * c + stream * kLanes<T>, read(at, count) - read(at + 2 * a.C, count));
    }
  });
}

template <class T>
Status run(const StreamsArgs& a, const Parallel& pool) {
  typedef Accumulator<T> E;
  const int64_t width = (a.C + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  E* const weights = static_cast<E*>(scratch(Slot::shared, 2 * width * int64_t(sizeof(E))));
  if (!weights) return Status::out_of_memory;
  subtract_weights<T>(a, weights);
  const T* const biases = static_cast<const T*>(a.bias);
  const E bias = biases ? widen(biases[0]) - widen(biases[1]) : 0;
  parallel_for(pool, a.rows, 1 + 65536 / (a.C + 1), [&](int64_t begin, int64_t end) {
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows) mix_rows<kRows, T>(a, weights, bias, row);
    for (; row < end; row++) mix_rows<1, T>(a, weights, bias, row);
  });
  return Status::ok;
}

}  // namespace

Status mix_streams(const StreamsArgs& a, const Parallel& pool) {
  Status status = Status::ok;
  for_dtype(a.dtype, [&](auto element) { status = run<decltype(element)>(a, pool); });
  return status;
}

}  // namespace H2OT_ISA
}  // namespace h2ot
