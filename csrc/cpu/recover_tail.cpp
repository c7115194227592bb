// The end of a recovery module whose result goes straight into a pose head: residual, LayerNorm and linear layer in
// one read of the projected tokens. Bound by that read: about 3 + M operations for each of its elements.
#include "kernels.h"
#include "layer_norm.h"
#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// Outputs that share one pass over a row, and rows that share one load of the head's weights.
constexpr int kOutputs = 4, kRows = 2;

// head(w n + b) = (head w) n + (head b + bias): weight [M rounded up][width], zero beyond M and C; bias [M rounded up].
template <class T, class E>
void fold_head(const RecoverTailArgs& a, int64_t width, int64_t outputs, E* weight, E* bias) {
  const T* const head = static_cast<const T*>(a.head_weight);
  memset(weight, 0, size_t(outputs * width) * sizeof(E));
  memset(bias, 0, size_t(outputs) * sizeof(E));
  for (int64_t m = 0; m < a.M; m++) {
    double sum = a.head_bias ? widen(static_cast<const T*>(a.head_bias)[m]) : 0;
    for (int64_t c = 0; c < a.C; c++) {
      const E h = widen(head[m * a.C + c]);
      weight[m * width + c] = a.norm_weight ? h * widen(static_cast<const T*>(a.norm_weight)[c]) : h;
      if (a.norm_bias) sum += double(h) * widen(static_cast<const T*>(a.norm_bias)[c]);
    }
    bias[m] = E(sum);
  }
}

// x = token + projected, and its sum over the channels; zero beyond C. Asks for the rows after these: memory would rest
// while they are projected.
template <class T, class E>
H2OT_INLINE E add_projected(const T* token, const T* projected, int64_t C, E* x) {
  constexpr int L = kLanes<T>;
  Vector<E> sum[2] = {};
  int64_t c = 0;
  for (; c + 2 * L <= C; c += 2 * L) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      __builtin_prefetch(projected + kRows * C + c + v * L);
      const Vector<E> value = load_wide(token + c + v * L) + load_wide(projected + c + v * L);
      store(x + c + v * L, value);
      sum[v] += value;
    }
  }
  for (; c < C; c += L) {
    const int64_t count = C - c < L ? C - c : L;
    const Vector<E> value = load_part(token + c, count) + load_part(projected + c, count);
    store(x + c, value);
    sum[0] += value;
  }
  return sum_lanes<T>(sum[0] + sum[1]);
}

// The mean of x [C, then zeros], which rounded sums gave as `about`, without what rounding took from it.
template <class E>
H2OT_INLINE E mean_of(const E* x, int64_t C, E about) {
  constexpr int L = kLanes<E>;
  Vector<E> off[2] = {};
  int64_t c = 0;
  for (; c + 2 * L <= C; c += 2 * L) {
    off[0] += load(x + c) - about;
    off[1] += load(x + c + L) - about;
  }
  for (; c < C; c += L) off[0] += between<E>(load(x + c) - about, 0, int(C - c < L ? C - c : L));
  return about + sum_lanes<E>(off[0] + off[1]) / E(C);
}

// For rows x[R][width] with their means: the sums of squared deviations, and of deviations times kOutputs weight rows.
template <int R, class E>
H2OT_INLINE void project_rows(const E* x, int64_t C, int64_t width, const E* mean, const E* weight, E* squares,
                              E (*dots)[kOutputs]) {
  constexpr int L = kLanes<E>;
  Vector<E> square[R] = {}, dot[R][kOutputs] = {};
  for (int64_t c = 0; c < width; c += L) {
    Vector<E> w[kOutputs];
#pragma GCC unroll 4
    for (int m = 0; m < kOutputs; m++) w[m] = load(weight + m * width + c);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      Vector<E> deviation = load(x + r * width + c) - mean[r];
      if (c + L > C) {
        for (int lane = 0; lane < L; lane++) deviation[lane] = c + lane < C ? deviation[lane] : 0;
      }
      square[r] += deviation * deviation;
#pragma GCC unroll 4
      for (int m = 0; m < kOutputs; m++) dot[r][m] += deviation * w[m];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    squares[r] = sum_lanes<E>(square[r]);
#pragma GCC unroll 4
    for (int m = 0; m < kOutputs; m++) dots[r][m] = sum_lanes<E>(dot[r][m]);
  }
}

// One compilation for every row: inlined, two could round in different places, and a row's bits depend on its partner.
template <class T, class E>
__attribute__((noinline)) void put_row(const RecoverTailArgs& a, E squares, const E* dots, const E* bias, int64_t count,
                                       T* out) {
  const E scale = E(1) / E(__builtin_sqrt(double(squares) / double(a.C) + a.eps));
  for (int64_t i = 0; i < count; i++) narrow(dots[i] * scale + bias[i], out[i]);
}

template <int R, class T, class E>
H2OT_INLINE void finish_rows(const RecoverTailArgs& a, int64_t first, int64_t width, const E* weight, const E* bias,
                             E* x) {
  E mean[R], squares[R], dots[R][kOutputs];
  for (int r = 0; r < R; r++) {
    const T* const token = static_cast<const T*>(a.token) + (first + r) % a.F * a.C;
    const T* const projected = static_cast<const T*>(a.projected) + (first + r) * a.C;
    mean[r] = add_projected(token, projected, a.C, x + r * width) / E(a.C);
  }
  T* const out = static_cast<T*>(a.out) + first * a.M;
  for (int64_t m = 0; m < a.M; m += kOutputs) {
    const int64_t count = a.M - m < kOutputs ? a.M - m : kOutputs;
    project_rows<R>(x, a.C, width, mean, weight + m * width, squares, dots);
    for (int r = 0; m == 0 && r < R; r++) {
      if (!is_far(mean[r], squares[r], a.C)) continue;
      mean[r] = mean_of(x + r * width, a.C, mean[r]);
      project_rows<1>(x + r * width, a.C, width, mean + r, weight + m * width, squares + r, dots + r);
    }
    for (int r = 0; r < R; r++) put_row(a, squares[r], dots[r], bias + m, count, out + r * a.M + m);
  }
}

template <class T>
Status run(const RecoverTailArgs& a, const Parallel& pool) {
  typedef Accumulator<T> E;
  const int64_t width = rounded_up(a.C, kLanes<T>);
  const int64_t outputs = rounded_up(a.M, kOutputs);
  E* const weight = static_cast<E*>(scratch(Slot::shared, outputs * (width + 1) * int64_t(sizeof(E))));
  if (!weight) return Status::out_of_memory;
  E* const bias = weight + outputs * width;
  fold_head<T>(a, width, outputs, weight, bias);
  Outcome outcome;
  parallel_for(pool, a.R * a.F, 1 + 65536 / (a.C + 1), [&](int64_t begin, int64_t end) {
    E* const x = static_cast<E*>(scratch(Slot::own, kRows * width * int64_t(sizeof(E))));
    if (!x) return outcome.fail(Status::out_of_memory);
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows) finish_rows<kRows, T>(a, row, width, weight, bias, x);
    for (; row < end; row++) finish_rows<1, T>(a, row, width, weight, bias, x);
  });
  return outcome.result();
}

}  // namespace

Status recover_tail(const RecoverTailArgs& a, const Parallel& pool) {
  Status status = Status::ok;
  for_dtype(a.dtype, [&](auto element) { status = run<decltype(element)>(a, pool); });
  return status;
}

}  // namespace H2OT_ISA
}  // namespace h2ot
