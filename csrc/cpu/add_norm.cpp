// A residual addition and the LayerNorm of its result, row by row: one pass over memory, three over a row in cache.
// About 25 operations for each vector of a row, and three sums over lanes that wait for each other.
#include "kernels.h"
#include "vectors.h"
#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// Accumulators of a row, and rows at a time, against the latency of an addition: as many as there are registers for.
constexpr int kSums = 2, kRows = kVectorBytes == 64 ? 4 : 2;

// Calls f(accumulator, first channel, how many of its lanes were met before) for the vectors of C >= L channels.
template <int L, class F>
H2OT_INLINE void by_vectors(int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + kSums * L <= C; c += kSums * L) {
#pragma GCC unroll 2
    for (int i = 0; i < kSums; i++) f(i, c + i * L, 0);
  }
  if (c + L <= C) {
    f(0, c, 0);
    c += L;
  }
  if (c < C) f(1, C - L, int(c + L - C));
}

// v, zero in the lanes outside [first, end).
template <class T>
H2OT_INLINE Vector<T> between(Vector<T> v, int first, int end) {
  if (first == 0 && end == kLanes<T>) return v;
  typename VectorOf<T>::bits lane = {};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; i++) lane[i] = unsigned(i);
  return (lane >= unsigned(first)) & (lane < unsigned(end)) ? v : Vector<T>{};
}

// A row's result is ((x - mean) * scale + shift) * weight + bias. The shift is for what rounding took from the mean.
template <class E>
struct Moments {
  E mean, scale, shift;
};

// Of C deviations from a mean that rounded sums gave: their sum and that of their squares.
template <class E>
H2OT_INLINE Moments<E> moments_of(E about, E sum, E squares, int64_t C, double eps) {
  const double off = double(sum) / double(C), variance = double(squares) / double(C) - off * off;
  const double scale = 1 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps);  // NaN stays NaN
  const E mean = E(double(about) + off);
  const double rest = (double(about) - double(mean)) + off;
  return {mean, E(scale), E(-rest * scale)};
}

// sum = x + y; the sum over the channels of what is stored. y null: of x.
template <class T, class Y>
H2OT_INLINE Accumulator<T> add_row(const T* x, const Y* y, int64_t C, T* sum) {
  constexpr int L = kLanes<T>;
  Vector<T> sums[kSums] = {};
  if (y) {
    by_vectors<L>(C, [&](int i, int64_t c, int met) __attribute__((always_inline)) {
      const Vector<T> value = load_wide(x + c) + load_wide(y + c);
      store_narrow(sum + c, value);
      sums[i] += between<T>(sizeof(T) == 2 ? load_wide(sum + c) : value, met, L);
    });
  } else {
    by_vectors<L>(C, [&](int i, int64_t c, int met)
                         __attribute__((always_inline)) { sums[i] += between<T>(load_wide(x + c), met, L); });
  }
  return sum_lanes<T>(sums[0] + sums[1]);
}

template <int R, class T, class N, class E>
H2OT_INLINE void norm_rows(const T* const* x, const E* mean, int64_t C, double eps, const E* weight, const E* bias,
                           N* out) {
  constexpr int L = kLanes<T>;
  Vector<T> sums[R][kSums] = {}, squares[R][kSums] = {};
  by_vectors<L>(C, [&](int i, int64_t c, int met) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Vector<T> deviation = between<T>(load_wide(x[r] + c) - mean[r], met, L);
      sums[r][i] += deviation;
      squares[r][i] += deviation * deviation;
    }
  });
  Moments<E> m[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    const E sum = sum_lanes<T>(sums[r][0] + sums[r][1]), squared = sum_lanes<T>(squares[r][0] + squares[r][1]);
    m[r] = moments_of(mean[r], sum, squared, C, eps);
  }
  by_vectors<L>(C, [&](int, int64_t c, int) __attribute__((always_inline)) {
    const Vector<T> w = load(weight + c), b = load(bias + c);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Vector<T> normed = (load_wide(x[r] + c) - m[r].mean) * m[r].scale + m[r].shift;
      store_narrow(out + r * C + c, normed * w + b);
    }
  });
}

// The arrays of one call. T: of x and sum; Y: of y; N: of out.
template <class T, class Y, class N>
struct Arrays {
  typedef Accumulator<T> E;
  const AddNormArgs& a;
  const E *weight, *bias;  // whole vectors

  const T* x(int64_t row) const { return static_cast<const T*>(a.x) + row * a.x_stride; }
  const Y* y(int64_t row) const { return a.y ? static_cast<const Y*>(a.y) + row * a.y_stride : nullptr; }
  T* sum(int64_t row) const { return static_cast<T*>(a.sum) + row * a.C; }
  N* out(int64_t row) const { return static_cast<N*>(a.out) + row * a.C; }

  template <int R>
  __attribute__((always_inline)) void run(int64_t first) const {
    const T* rows[R];
    E mean[R];
    for (int r = 0; r < R; r++) {
      mean[r] = add_row(x(first + r), y(first + r), a.C, sum(first + r)) / E(a.C);
      rows[r] = a.y ? sum(first + r) : x(first + r);
    }
    norm_rows<R>(rows, mean, a.C, a.eps, weight, bias, out(first));
  }

  // A row of less than a vector.
  __attribute__((always_inline)) void run_short(int64_t row) const {
    const int C = int(a.C);
    Vector<T> value = load_part(x(row), C);
    if (a.y) {
      store_part(sum(row), value + load_part(y(row), C), C);
      value = load_part(sum(row), C);
    }
    const E mean = sum_lanes<T>(value) / E(C);
    const Vector<T> deviation = between<T>(value - mean, 0, C);
    const Moments<E> m = moments_of(mean, sum_lanes<T>(deviation), sum_lanes<T>(deviation * deviation), C, a.eps);
    const Vector<T> normed = (value - m.mean) * m.scale + m.shift;
    store_part(out(row), normed * load(weight) + load(bias), C);
  }
};

// [C] of any dtype, or null, in whole vectors.
template <class E>
H2OT_INLINE void widen_all(const void* from, Dtype dtype, E missing, int64_t C, int64_t width, E* to) {
  for (int64_t c = 0; c < width; c++) to[c] = missing;
  if (!from) return;
  for_dtype(dtype, [&](auto element) {
    for (int64_t c = 0; c < C; c++) to[c] = E(widen(static_cast<const decltype(element)*>(from)[c]));
  });
}

template <class T, class Y, class N>
Status run(const AddNormArgs& a, const Parallel& pool) {
  typedef Accumulator<T> E;
  const int64_t C = a.C, width = (C + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  E* const weight = static_cast<E*>(scratch(Slot::shared, 2 * width * int64_t(sizeof(E))));
  if (!weight) return Status::out_of_memory;
  widen_all(a.weight, a.weight_dtype, E(1), C, width, weight);
  widen_all(a.bias, a.weight_dtype, E(0), C, width, weight + width);
  const Arrays<T, Y, N> arrays = {a, weight, weight + width};
  parallel_for(pool, a.rows, 1 + 65536 / (C + 1), [&](int64_t begin, int64_t end) {
    int64_t row = begin;
    if (C < kLanes<T>) {
      for (; row < end; row++) arrays.run_short(row);
    }
    for (; row + kRows <= end; row += kRows) arrays.template run<kRows>(row);
    for (; row < end; row++) arrays.template run<1>(row);
  });
  return Status::ok;
}

template <class Y>
Status run_float(const AddNormArgs& a, const Parallel& pool) {
  if (a.out_dtype == Dtype::bf16) return run<float, Y, BFloat16>(a, pool);
  if (a.out_dtype == Dtype::f16) return run<float, Y, Half>(a, pool);
  return run<float, Y, float>(a, pool);
}

}  // namespace

Status add_norm(const AddNormArgs& a, const Parallel& pool) {
  if (a.dtype == Dtype::f64) return run<double, double, double>(a, pool);
  if (a.dtype == Dtype::bf16) return run<BFloat16, BFloat16, BFloat16>(a, pool);
  if (a.dtype == Dtype::f16) return run<Half, Half, Half>(a, pool);
  if (a.y && a.y_dtype == Dtype::bf16) return run_float<BFloat16>(a, pool);
  if (a.y && a.y_dtype == Dtype::f16) return run_float<Half>(a, pool);
  return run_float<float>(a, pool);
}

}  // namespace H2OT_ISA
}  // namespace h2ot
