// Recovery by interpolation in time. Bound by the write of the output.
#include "kernels.h"
#include "vectors.h"
#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

template <class E>
using Lane = decltype(typename VectorOf<E>::bits{}[0] + 0);

// Frames first[i] .. first[i + 1] - 1 lie between kept tokens i and i + 1 (or K - 1 at the end): before[t] = i.
// weight[t] is that of the later one. The arrays over frames have room for whole vectors past the end.
template <class E>
struct Plan {
  int64_t* first;   // [K + 1]
  Lane<E>* before;  // [F]
  E* weight;        // [F]
  E* span;          // [F], only while the weights are made

  Plan(Carver& carver, const InterpolateArgs& a) {
    first = carver.take<int64_t>(a.K + 1);
    before = carver.take<Lane<E>>(a.F + kLanes<E>);
    weight = carver.take<E>(a.F + kLanes<E>);
    span = carver.take<E>(a.F + kLanes<E>);
  }
};

Status check_index(const int64_t* index, int64_t K, int64_t F) {
  if (!in_range(index, K, 0, F)) return Status::index_out_of_range;
  bool ascending = true;
  for (int64_t i = 1; i < K; i++) ascending &= index[i - 1] < index[i];
  return ascending ? Status::ok : Status::index_not_ascending;
}

// Frames [from, to), all after kept token i, as past / span with past counted from `from`: whole vectors, whose
// excess the next interval overwrites.
template <class E>
H2OT_INLINE void fill_interval(const Plan<E>& plan, int64_t i, int64_t from, int64_t to, bool moving) {
  Vector<E> past = {};
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes<E>; lane++) past[lane] = moving ? E(lane) : 0;
  const Vector<E> span = splat<E>(E(moving ? to - from : 1));
  const typename VectorOf<E>::bits before = typename VectorOf<E>::bits{} + Lane<E>(i);
  for (int64_t t = from; t < to; t += kLanes<E>) {
    store(plan.weight + t, past);
    store(plan.span + t, span);
    memcpy(plan.before + t, &before, sizeof before);
    if (moving) past += E(kLanes<E>);
  }
}

template <class E>
void plan_index(const InterpolateArgs& a, const int64_t* index, const Plan<E>& plan) {
  plan.first[0] = 0;
  for (int64_t i = 1; i < a.K; i++) plan.first[i] = index[i];
  plan.first[a.K] = a.F;
  fill_interval(plan, 0, 0, index[0], false);
  for (int64_t i = 0; i + 1 < a.K; i++) fill_interval(plan, i, index[i], index[i + 1], true);
  fill_interval(plan, a.K - 1, index[a.K - 1], a.F, false);
}

template <class E>
void plan_uniform(const InterpolateArgs& a, const Plan<E>& plan) {
  const int64_t step = a.F > 1 ? a.F - 1 : 1;
  int64_t before = 0, past = 0;
  plan.first[0] = 0;
  for (int64_t t = 0; t < a.F; t++) {
    for (; past >= step; past -= step) plan.first[++before] = t;
    plan.before[t] = Lane<E>(before);
    plan.weight[t] = E(past);
    plan.span[t] = E(step);
    past += a.K - 1;
  }
  while (before < a.K) plan.first[++before] = a.F;
}

// The plan of the index row that serves sample b.
template <class E>
Status make_plan(const InterpolateArgs& a, int64_t b, const Plan<E>& plan) {
  if (a.index) {
    const int64_t* const index = a.index + b / (a.B / a.index_rows) * a.K;
    const Status status = check_index(index, a.K, a.F);
    if (status != Status::ok) return status;
    plan_index(a, index, plan);
  } else {
    plan_uniform(a, plan);
  }
  if (a.mode == Interpolation::nearest) {
    for (int64_t t = 0; t < a.F; t++) plan.weight[t] = E(2 * plan.weight[t] > plan.span[t]);
  } else {
    for (int64_t t = 0; t < a.F; t++) plan.weight[t] /= plan.span[t];
  }
  return Status::ok;
}

// Whether samples b - 1 and b have the same index row.
H2OT_INLINE bool same_plan(const InterpolateArgs& a, int64_t b) {
  return !a.index || a.index_rows == 1 || b % (a.B / a.index_rows) != 0;
}

// The last i < K with first[i] <= t.
H2OT_INLINE int64_t find_interval(const int64_t* first, int64_t K, int64_t t) {
  int64_t low = 0, high = K;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first[middle] <= t ? low : high) = middle;
  }
  return low;
}

// Keeps the compiler from merging a product into a multiply-add.
template <class V>
H2OT_INLINE V rounded(V product) {
#if defined(__AVX512F__)
  asm("" : "+v"(product));
#elif defined(__FMA__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// x0 (1 - w) + x1 w, each product rounded: the bits of the definition on every machine.
template <class V>
H2OT_INLINE V blend(V x0, V x1, V rest, V weight) {
  return rounded(x0 * rest) + rounded(x1 * weight);
}

// The same, and a token of weight 0 is not read, whatever it holds.
template <class V>
H2OT_INLINE V blend_or_keep(V x0, V x1, V rest, V weight) {
  return weight == 0 ? x0 : rest == 0 ? x1 : blend(x0, x1, rest, weight);
}

// `count` channels of one frame, at least a vector of them: the last vector overlaps the one before. `next` is what is
// written after these: its lines are asked for, or a store would wait for them (a Xeon: 17 -> 28 GB/s).
template <class T>
H2OT_INLINE void blend_row(const T* x0, const T* x1, int64_t count, Accumulator<T> later, T* out, T* next) {
  if (later == 0 || later == 1) {
    memcpy(out, later == 0 ? x0 : x1, size_t(count) * sizeof(T));
    return;
  }
  const Vector<T> weight = splat<T>(later), rest = splat<T>(1 - later);
  const auto blend_at = [&](int64_t s) {
    __builtin_prefetch(next + s, 1);
    store_narrow(out + s, blend(load_wide(x0 + s), load_wide(x1 + s), rest, weight));
  };
  int64_t s = 0;
  for (; s + kLanes<T> <= count; s += kLanes<T>) blend_at(s);
  if (s < count) blend_at(count - kLanes<T>);
}

// Frames [t, stop) of a sample whose tokens have at least a vector of channels. A tile of the channels of two tokens
// stays in the first-level cache for all the frames between them.
template <class T>
H2OT_INLINE void blend_wide(const InterpolateArgs& a, const Plan<Accumulator<T>>& plan, const T* x, int64_t t,
                            int64_t stop, T* out) {
  constexpr int64_t kTile = 4096 / int64_t(sizeof(T));  // channels; the last tile takes what is left over, too
  const int64_t tiles = a.S < kTile ? 1 : a.S / kTile;
  for (int64_t i = find_interval(plan.first, a.K, t); t < stop; i++) {
    const T* const x0 = x + i * a.S;
    const T* const x1 = i + 1 < a.K ? x0 + a.S : x0;
    const int64_t last = plan.first[i + 1] < stop ? plan.first[i + 1] : stop;
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t s = tile * kTile, count = (tile + 1 < tiles ? s + kTile : a.S) - s;
      T* to = out + t * a.S + s;
      for (int64_t f = t; f < last; f++, to += a.S) blend_row(x0 + s, x1 + s, count, plan.weight[f], to, to + a.S);
    }
    t = last;
  }
}

// The tokens of a sample as [K + 1][W], the last one twice; W is S or more.
template <int W, class T>
H2OT_INLINE void pad_tokens(const InterpolateArgs& a, const T* x, Accumulator<T>* padded) {
  for (int64_t i = 0; i <= a.K; i++) {
    const T* const from = x + (i < a.K ? i : a.K - 1) * a.S;
    for (int64_t s = 0; s < W; s++) padded[i * W + s] = s < a.S ? widen(from[s]) : 0;
  }
}

// The same for S < W channels: vectors of W, each overwriting the excess of the one before, so `out` needs room for
// W - S more.
template <int W, class E>
H2OT_INLINE void blend_narrow(const InterpolateArgs& a, const Plan<E>& plan, const E* padded, int64_t t, int64_t stop,
                              E* out) {
  typedef E Row __attribute__((vector_size(W * sizeof(E))));
  for (; t < stop; t++, out += a.S) {
    Row x0, x1;
    memcpy(&x0, padded + int64_t(plan.before[t]) * W, sizeof x0);
    memcpy(&x1, padded + int64_t(plan.before[t]) * W + W, sizeof x1);
    const E weight = plan.weight[t];
    const Row value = blend_or_keep(x0, x1, (1 - weight) - Row{}, weight - Row{});
    memcpy(out, &value, sizeof value);
  }
}

template <class T>
H2OT_INLINE void narrow_all(const Accumulator<T>* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store_narrow(to + i, load(from + i));
  if (i < count) store_part(to + i, load(from + i), count - i);
}

// Frames go through `buffer` (the arguments' S channels of F frames, and a vector more): its excess stays out of `out`.
template <class T, class E>
H2OT_INLINE void blend_few(const InterpolateArgs& a, const Plan<E>& plan, const T* x, int64_t t, int64_t stop,
                           E* padded, E* buffer, T* out) {
  constexpr int kSmall = kLanes<E> < 4 ? kLanes<E> : 4;
  if (a.S <= kSmall) {
    pad_tokens<kSmall>(a, x, padded);
    blend_narrow<kSmall>(a, plan, padded, t, stop, buffer);
  } else {
    pad_tokens<kLanes<E>>(a, x, padded);
    blend_narrow<kLanes<E>>(a, plan, padded, t, stop, buffer);
  }
  narrow_all(buffer, (stop - t) * a.S, out + t * a.S);
}

template <class T>
Status forward(const InterpolateArgs& a, const Parallel& pool) {
  typedef Accumulator<T> E;
  Outcome outcome;
  parallel_for(pool, a.B * a.F, 1 + 32768 / (a.S + 1), [&](int64_t begin, int64_t end) {
    const bool few = a.S < kLanes<E>;
    const int64_t padded_size = few ? (a.K + 1) * kLanes<E> : 0, buffer_size = few ? a.F * a.S + 2 * kLanes<E> : 0;
    Carver sizes(nullptr);
    Plan<E>(sizes, a);
    sizes.take<E>(padded_size);
    sizes.take<E>(buffer_size);
    void* const memory = scratch(Slot::own, sizes.bytes());
    if (!memory) return outcome.fail(Status::out_of_memory);
    Carver carver(memory);
    const Plan<E> plan(carver, a);
    E* const padded = carver.take<E>(padded_size);
    E* const buffer = carver.take<E>(buffer_size);
    for (int64_t b = begin / a.F, t = begin % a.F; b * a.F < end; b++, t = 0) {
      const int64_t stop = end - b * a.F < a.F ? end - b * a.F : a.F;
      if (b == begin / a.F || !same_plan(a, b)) {
        const Status status = make_plan(a, b, plan);
        if (status != Status::ok) return outcome.fail(status);
      }
      const T* const x = static_cast<const T*>(a.x) + b * a.K * a.S;
      T* const out = static_cast<T*>(a.out) + b * a.F * a.S;
      if (few) {
        blend_few(a, plan, x, t, stop, padded, buffer, out);
      } else {
        blend_wide(a, plan, x, t, stop, out);
      }
    }
  });
  return outcome.result();
}

template <class T>
Status backward(const InterpolateBackwardArgs& args, const Parallel& pool) {
  typedef Accumulator<T> E;
  const InterpolateArgs& a = args.forward;
  Outcome outcome;
  parallel_for(pool, a.B * a.K, 1 + 32768 * a.K / (a.F * a.S + 1), [&](int64_t begin, int64_t end) {
    Carver sizes(nullptr);
    Plan<E>(sizes, a);
    void* const memory = scratch(Slot::own, sizes.bytes());
    if (!memory) return outcome.fail(Status::out_of_memory);
    Carver carver(memory);
    const Plan<E> plan(carver, a);
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / a.K, i = task % a.K;
      if (task == begin || (i == 0 && !same_plan(a, b))) {
        const Status status = make_plan(a, b, plan);
        if (status != Status::ok) return outcome.fail(status);
      }
      // Frames of the interval before read token i with their weight, those of its own with the rest of 1. Weights of 0
      // read nothing; after the last token all are.
      const int64_t start = plan.first[i > 0 ? i - 1 : 0], own = plan.first[i], stop = plan.first[i + 1];
      const T* const grad = static_cast<const T*>(args.grad) + b * a.F * a.S;
      T* const out = static_cast<T*>(args.grad_x) + task * a.S;
      int64_t s = 0;
      for (; s + kLanes<T> <= a.S; s += kLanes<T>) {
        Vector<T> sum = {};
        for (int64_t t = start; t < stop; t++) {
          const E share = t < own ? plan.weight[t] : 1 - plan.weight[t];
          if (share != 0) sum += load_wide(grad + t * a.S + s) * share;
        }
        store_narrow(out + s, sum);
      }
      for (; s < a.S; s++) {
        E sum = 0;
        for (int64_t t = start; t < stop; t++) {
          const E share = t < own ? plan.weight[t] : 1 - plan.weight[t];
          if (share != 0) sum += widen(grad[t * a.S + s]) * share;
        }
        narrow(sum, out[s]);
      }
    }
  });
  return outcome.result();
}

}  // namespace

Status interpolate(const InterpolateArgs& a, const Parallel& pool) {
  if (a.S == 0) return Status::ok;
  Status status = Status::ok;
  for_dtype(a.dtype, [&](auto element) { status = forward<decltype(element)>(a, pool); });
  return status;
}

Status interpolate_backward(const InterpolateBackwardArgs& args, const Parallel& pool) {
  Status status = Status::ok;
  for_dtype(args.forward.dtype, [&](auto element) { status = backward<decltype(element)>(args, pool); });
  return status;
}

}  // namespace H2OT_ISA
}  // namespace h2ot
