// LayerNorm of rows: sums of what is stored, the mean, then squares about it, in float32 (float64 for float64).
#pragma once

#include "vectors.h"

namespace h2ot {
namespace H2OT_ISA {

// Accumulators of a row, and rows at a time, against the latency of an addition: as many as there are registers for.
constexpr int kNormSums = 2, kNormRows = kVectorBytes == 64 ? 4 : 2;

// Calls f(accumulator, first channel, how many of its lanes were met before) for the vectors of C >= L channels.
template <int L, class F>
H2OT_INLINE void by_vectors(int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + kNormSums * L <= C; c += kNormSums * L) {
#pragma GCC unroll 2
    for (int i = 0; i < kNormSums; i++) f(i, c + i * L, 0);
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
  constexpr auto lane = lanes_of<typename VectorOf<T>::bits>([](int i) { return i; });
  return ((lane >= unsigned(first)) & (lane < unsigned(end))) ? v : Vector<T>{};
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

// Whether C deviations with this sum of squares are small beside their mean, so that what rounding took from it counts
// among them. Also where that is not known (NaN).
template <class E>
H2OT_INLINE bool is_far(E mean, E squares, int64_t C) {
  const E near = mean / 64;
  return !(squares >= E(C) * near * near);
}

// sum = x + y; the sum over the channels of what is stored. y null: of x.
template <class T, class Y>
H2OT_INLINE Accumulator<T> add_row(const T* x, const Y* y, int64_t C, T* sum) {
  constexpr int L = kLanes<T>;
  Vector<T> sums[kNormSums] = {};
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
  Vector<T> sums[R][kNormSums] = {}, squares[R][kNormSums] = {};
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
      __builtin_prefetch(out + (r + R) * C + c, 1);  // stores that have to wait for their lines take 1.5 times as long
      store_narrow(out + r * C + c, normed * w + b);
    }
  });
}

// LayerNorm of `count` rows `apart` from each other, into rows one behind the other, C at least a vector; weight and
// bias in whole vectors. The next rows are asked for.
template <int R = kNormRows, class T, class N, class E>
H2OT_INLINE void norm_block(const T* x, int64_t apart, int64_t count, int64_t C, double eps, const E* weight,
                            const E* bias, N* out) {
  int64_t row = 0;
  for (; row + R <= count; row += R) {
    const T* at[R];
    E mean[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      at[r] = x + (row + r) * apart;
      for (int64_t c = 0; c < C; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(at[r] + R * apart + c, 0, 2);
      mean[r] = add_row<T, T>(at[r], nullptr, C, nullptr) / E(C);
    }
    norm_rows<R>(at, mean, C, eps, weight, bias, out + row * C);
  }
  if constexpr (R > 1) norm_block<1>(x + row * apart, apart, count - row, C, eps, weight, bias, out + row * C);
}

// [C] of any dtype, or null, in whole vectors.
template <class E>
H2OT_INLINE void widen_all(const void* from, Dtype dtype, E missing, int64_t C, int64_t width, E* to) {
  for (int64_t c = 0; c < width; c++) to[c] = missing;
  if (!from) return;
  for_dtype(dtype, [&](auto element) {
    for (int64_t c = 0; c < C; c++) to[c] = E(widen(static_cast<const decltype(element)*>(from)[c]));
  });
}

}  // namespace H2OT_ISA
}  // namespace h2ot
