// The mean weight that each frame receives in an attention, without its F x F weights: head by head, in panels of
// queries, which stand in the lanes.
#pragma once

#include "heads.h"
#include "softmax.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// Logits [F][kPanel] of `count` queries as what each frame receives of them: added to received[F][kLanes], one column
// per lane. The logits are spent.
template <class E>
H2OT_INLINE void add_received(E* logits, int64_t F, int64_t count, E rate, E* received) {
  const int64_t vectors = count > kLanes<E> ? 2 : 1;
  Vector<E> share[kTileVectors];
  exponentiate(logits, F, vectors, rate, share);
  for (int64_t v = 0; v < vectors; v++) share[v] = E(1) / share[v];
  if (count == kPanel<E>) {
    for (int64_t k = 0; k < F; k++) {
      const E* const weights = logits + k * kPanel<E>;
      E* const to = received + k * kLanes<E>;
      store(to, load(to) + load(weights) * share[0] + load(weights + kLanes<E>) * share[1]);
    }
    return;
  }
  for (int64_t v = 0; v < vectors; v++) {
    E lane[kLanes<E>];
    for (int i = 0; i < kLanes<E>; i++) lane[i] = E(v * kLanes<E> + i);
    const auto used = load(lane) < E(count);
    for (int64_t k = 0; k < F; k++) {
      const Vector<E> weight = load(logits + k * kPanel<E> + v * kLanes<E>) * share[v];
      E* const to = received + k * kLanes<E>;
      store(to, load(to) + (used ? weight : Vector<E>{}));
    }
  }
}

// The first channel of a head's first frame.
template <class T>
H2OT_INLINE const T* head_at(const void* x, const int64_t* stride, int64_t b, int64_t p, int64_t h) {
  return static_cast<const T*>(x) + b * stride[0] + p * stride[1] + h * stride[2];
}

// Every head of every sample. Work is what one thread works in, from memory by Work(Carver&, a): take_key(key) packs
// the keys of a head; logits(query, first, count) gives the logits [F][kPanel] of its queries from `first` on; rate is
// the factor that they have within the exponent; Registers are held meanwhile.
template <class T, class Work>
Status receive_heads(const AttentionScoreArgs& a, const Parallel& pool) {
  typedef Accumulator<T> E;
  const int64_t heads = a.P * a.H;
  const bool is_adjacent = a.query_stride[4] == 1 && a.key_stride[4] == 1;
  double* const partial = static_cast<double*>(scratch(Slot::shared, a.B * heads * a.F * 8));
  if (!partial) return Status::out_of_memory;
  Outcome outcome;
  parallel_for(pool, a.B * heads, 1 + 100000 / (a.F * a.F * a.D + 1), [&](int64_t begin, int64_t end) {
    Carver sizes(nullptr);
    Work(sizes, a);
    sizes.take<E>(a.F * kLanes<E>);
    void* const memory = scratch(Slot::own, sizes.bytes());
    if (!memory) return outcome.fail(Status::out_of_memory);
    Carver carver(memory);
    const Work work(carver, a);
    E* const received = carver.take<E>(a.F * kLanes<E>);
    [[maybe_unused]] const typename Work::Registers registers = {};
    for (int64_t task = begin; task < end; task++) {
      const T* const query = head_at<T>(a.query, a.query_stride, task / heads, task % heads / a.H, task % a.H);
      const T* const key = head_at<T>(a.key, a.key_stride, task / heads, task % heads / a.H, task % a.H);
      const int64_t next = task + 1;
      memset(received, 0, size_t(a.F * kLanes<E>) * sizeof(E));
      work.take_key(key);
      for (int64_t first = 0; first < a.F; first += kPanel<E>) {
        const int64_t count = a.F - first < kPanel<E> ? a.F - first : kPanel<E>;
        if (next < end && is_adjacent) {
          const int64_t b = next / heads, p = next % heads / a.H, h = next % a.H;
          ask_for_rows(head_at<T>(a.query, a.query_stride, b, p, h), a.query_stride[3], a.D, first, first + count);
          ask_for_rows(head_at<T>(a.key, a.key_stride, b, p, h), a.key_stride[3], a.D, first, first + count);
        }
        add_received(work.logits(query, first, count), a.F, count, work.rate, received);
      }
      for (int64_t t = 0; t < a.F; t++) partial[task * a.F + t] = sum_lanes<E>(load(received + t * kLanes<E>));
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
}  // namespace H2OT_ISA
}  // namespace h2ot
