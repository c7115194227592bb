// The mean weight that each frame receives in an attention, without its F x F weights.
#include "kernels.h"
#include "softmax.h"
#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// The sums over the queries of one head, received[F][kLanes], one column per lane: panel by panel, ascending.
template <class T, class E>
H2OT_INLINE void receive(const AttentionScoreArgs& a, const T* query, const T* key, E* panel, E* keys, E* logits,
                         E* received) {
  const int sign = sign_of(a.scale);
  const E rate = E((a.scale < 0 ? -a.scale : a.scale) * kLog2E);
  memset(received, 0, size_t(a.F * kLanes<T>) * sizeof(E));
  pack_rows(key, a.key_stride[3], a.key_stride[4], a.F, a.D, a.D, keys);
  for (int64_t first = 0; first < a.F; first += kPanel<E>) {
    const int64_t count = a.F - first < kPanel<E> ? a.F - first : kPanel<E>, vectors = count > kLanes<T> ? 2 : 1;
    pack_panel(query + first * a.query_stride[3], a.query_stride[3], a.query_stride[4], count, a.D, E(sign), panel);
    product(a.F, vectors, a.D, keys, a.D, Fixed<1>(), panel, Fixed<kPanel<E>>(), WriteTo<E>{logits, kPanel<E>});
    Vector<E> sum[kTileVectors];
    exponentiate(logits, a.F, vectors, rate, sum);
    for (int64_t v = 0; v < vectors; v++) {
      E lane[kLanes<T>];
      for (int i = 0; i < kLanes<T>; i++) lane[i] = E(v * kLanes<T> + i);
      const Vector<E> share = E(1) / sum[v];
      const auto used = load(lane) < E(count);
      for (int64_t k = 0; k < a.F; k++) {
        const Vector<E> weight = load(logits + k * kPanel<E> + v * kLanes<T>) * share;
        store(received + k * kLanes<T>, load(received + k * kLanes<T>) + (used ? weight : Vector<E>{}));
      }
    }
  }
}

template <class T>
Status run(const AttentionScoreArgs& a, const Parallel& pool) {
  typedef Accumulator<T> E;
  const int64_t heads = a.P * a.H;
  double* const partial = static_cast<double*>(scratch(Slot::shared, a.B * heads * a.F * 8));
  if (!partial) return Status::out_of_memory;
  Outcome outcome;
  parallel_for(pool, a.B * heads, 1 + 100000 / (a.F * a.F * a.D + 1), [&](int64_t begin, int64_t end) {
    Carver sizes(nullptr);
    const int64_t counts[] = {a.D * kPanel<E>, a.F * a.D, a.F * kPanel<E>, a.F * kLanes<T>};
    for (int64_t count : counts) sizes.take<E>(count);
    void* const memory = scratch(Slot::own, sizes.bytes());
    if (!memory) return outcome.fail(Status::out_of_memory);
    Carver carver(memory);
    E* const panel = carver.take<E>(counts[0]);
    E* const keys = carver.take<E>(counts[1]);
    E* const logits = carver.take<E>(counts[2]);
    E* const received = carver.take<E>(counts[3]);
    for (int64_t task = begin; task < end; task++) {
      const int64_t at[] = {task / heads, task % heads / a.H, task % a.H};
      const T* query = static_cast<const T*>(a.query);
      const T* key = static_cast<const T*>(a.key);
      for (int axis = 0; axis < 3; axis++) {
        query += at[axis] * a.query_stride[axis];
        key += at[axis] * a.key_stride[axis];
      }
      receive(a, query, key, panel, keys, logits, received);
      for (int64_t t = 0; t < a.F; t++) partial[task * a.F + t] = sum_lanes<T>(load(received + t * kLanes<T>));
    }
  });
  const double count = double(heads) * double(a.F);
  parallel_for(pool, a.B, 1 + 32768 / (heads * a.F + 1), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      double* const sum = partial + b * heads * a.F;
      for (int64_t head = 1; head < heads; head++) {
        for (int64_t t = 0; t < a.F; t++) sum[t] += sum[head * a.F + t];
      }
      E* const score = static_cast<E*>(a.score) + b * a.F;
      for (int64_t t = 0; t < a.F; t++) score[t] = E(heads > 0 ? sum[t] / count : 0 / count);
    }
  });
  return outcome.result();
}

}  // namespace

Status attention_score(const AttentionScoreArgs& a, const Parallel& pool) {
  Status status = Status::ok;
  for_dtype(a.dtype, [&](auto element) { status = run<decltype(element)>(a, pool); });
  return status;
}

}  // namespace H2OT_ISA
}  // namespace h2ot
