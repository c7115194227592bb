// Softmax of logits that stand with their queries in the lanes: [K][panel], a panel being two vectors of queries.
#pragma once

#include "product.h"

namespace h2ot {
namespace H2OT_ISA {

template <class E>
constexpr int kPanel = kTileVectors * kLanes<E>;

template <class E>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr float kShift = 0x1.8p23f, kLowest = -126.0f;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kTerms[] = {0x1.62e430p-1f, 0x1.ebfbe0p-3f,  0x1.c6af6cp-5f,
                                     0x1.3b2a54p-7f, 0x1.5f0890p-10f, 0x1.44138ap-13f};
};
template <>
struct Exp2<double> {
  static constexpr double kShift = 0x1.8p52, kLowest = -1022.0;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kTerms[] = {0x1.62e42fefa39efp-1,  0x1.ebfbdff82c598p-3,  0x1.c6b08d704a0c2p-5,
                                      0x1.3b2ab6fba1ddap-7,  0x1.5d87fe78a5276p-10, 0x1.430913096fd9fp-13,
                                      0x1.ffcbfc670dcd4p-17, 0x1.62bfd47773353p-20, 0x1.b524fae627834p-24,
                                      0x1.e6063f7217bc6p-28, 0x1.e9d3fe3952179p-32};
};

// 2^x for x <= 0, within 1.1 ulp; 0 where the result would be subnormal, NaN for NaN.
// x = n + f with |f| <= 1/2; 2^f = 1 + f q(f), q through Chebyshev nodes (error 5e-9, or 9e-18 for double).
template <class E>
H2OT_INLINE Vector<E> exp2_negative(Vector<E> x) {
  typedef typename VectorOf<E>::bits Bits;
  typedef Exp2<E> Of;
  const Vector<E> shifted = x + Of::kShift, f = x - (shifted - Of::kShift);
  constexpr int terms = int(sizeof(Of::kTerms) / sizeof(E));
  Vector<E> q = splat<E>(Of::kTerms[terms - 1]);
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; i--) q = q * f + Of::kTerms[i];
  const Vector<E> power = q * f + E(1);
  const Bits exponent = (reinterpret_cast<Bits>(shifted) + Of::kBias) << Of::kMantissa;
  return x < Of::kLowest ? Vector<E>{} : power * reinterpret_cast<Vector<E>>(exponent);
}

// Of the K logits of each lane, kPanel from one to the next: four at a time, for a maximum waits for the one before it.
template <class E>
H2OT_INLINE Vector<E> largest_of(const E* logits, int64_t K) {
  const auto larger = [](Vector<E> a, Vector<E> b) __attribute__((always_inline)) { return a > b ? a : b; };
  Vector<E> most[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) most[i] = load(logits);
  int64_t k = 0;
  for (; k + 4 <= K; k += 4, logits += 4 * kPanel<E>) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) most[i] = larger(load(logits + i * kPanel<E>), most[i]);
  }
  for (; k < K; k++, logits += kPanel<E>) most[0] = larger(load(logits), most[0]);
  return larger(larger(most[0], most[1]), larger(most[2], most[3]));
}

// Turns logits [K][kPanel], of which V vectors are in use, into exp(scale (logit - the lane's largest)), `rate` being
// scale / ln 2, not negative. sum[v]: their sums.
template <int V, class E>
H2OT_INLINE void exponentiate(E* logits, int64_t K, E rate, Vector<E>* sum) {
  Vector<E> largest[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) {
    largest[v] = largest_of<E>(logits + v * kLanes<E>, K);
    sum[v] = Vector<E>{};
  }
  for (int64_t k = 0; k < K; k++) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      E* const at = logits + k * kPanel<E> + v * kLanes<E>;
      const Vector<E> weight = exp2_negative<E>((load(at) - largest[v]) * rate);
      store(at, weight);
      sum[v] += weight;
    }
  }
}

template <class E>
H2OT_INLINE void exponentiate(E* logits, int64_t K, int64_t vectors, E rate, Vector<E>* sum) {
  if (vectors == 2) {
    exponentiate<2>(logits, K, rate, sum);
  } else {
    exponentiate<1>(logits, K, rate, sum);
  }
}

constexpr double kLog2E = 1.4426950408889634;

// Four rows of four neighbouring channels, as four columns.
template <class T>
H2OT_INLINE void transpose_quad(const T* x, int64_t row_stride, Accumulator<T> sign, Accumulator<T>* out,
                                int64_t out_stride) {
  typedef Accumulator<T> E;
  typedef E Quad __attribute__((vector_size(4 * sizeof(E))));
  Quad row[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const T* const at = x + i * row_stride;
    if constexpr (kLanes<T> == 4) {
      row[i] = load_wide(at) * sign;
    } else {
      row[i] = Quad{widen(at[0]), widen(at[1]), widen(at[2]), widen(at[3])} * sign;
    }
  }
  store_columns(row, out, out_stride);
}

// Rows of x, `count` of them, as columns: panel[d][kPanel], times `sign`; missing columns are 0.
template <class T>
H2OT_INLINE void pack_panel(const T* x, int64_t row_stride, int64_t channel_stride, int64_t count, int64_t D,
                            Accumulator<T> sign, Accumulator<T>* panel) {
  typedef Accumulator<T> E;
  constexpr int P = kPanel<E>;
  if (count < P) memset(panel, 0, size_t(D * P) * sizeof(E));
  const int64_t quad_rows = channel_stride == 1 ? count / 4 * 4 : 0, quad_channels = D / 4 * 4;
  for (int64_t i = 0; i < quad_rows; i += 4) {
    for (int64_t d = 0; d < quad_channels; d += 4) {
      transpose_quad(x + i * row_stride + d, row_stride, sign, panel + d * P + i, P);
    }
  }
  for (int64_t i = 0; i < count; i++) {
    const T* const row = x + i * row_stride;
    for (int64_t d = i < quad_rows ? quad_channels : 0; d < D; d++) {
      panel[d * P + i] = widen(row[d * channel_stride]) * sign;
    }
  }
}

// Rows of x widened to rows of `width` (D or more; the rest 0).
template <class T>
H2OT_INLINE void pack_rows(const T* x, int64_t row_stride, int64_t channel_stride, int64_t rows, int64_t D,
                           int64_t width, Accumulator<T>* out) {
  for (int64_t i = 0; i < rows; i++) {
    const T* const from = x + i * row_stride;
    Accumulator<T>* const to = out + i * width;
    int64_t d = 0;
    if (channel_stride == 1) {
      for (; d + kLanes<T> <= D; d += kLanes<T>) store(to + d, load_wide(from + d));
    }
    for (; d < D; d++) to[d] = widen(from[d * channel_stride]);
    for (; d < width; d++) to[d] = 0;
  }
}

// The sign of the scale goes into the packed queries, so that the largest logit is always the largest weight.
H2OT_INLINE int sign_of(double scale) { return (scale > 0) - (scale < 0); }

}  // namespace H2OT_ISA
}  // namespace h2ot
