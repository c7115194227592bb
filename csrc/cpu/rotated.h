// What follows the triangle in rotated channels (launch.h: RecoverRotatedArgs): a row's squares and its products with
// the head, summed panel by panel, each in the lanes of a vector.
#pragma once

#include "product.h"

namespace h2ot {
namespace H2OT_ISA {

constexpr int kRotatedVectors = kRotatedPanel / kLanes<float>;

H2OT_INLINE int64_t rotated_width(int64_t C) { return (C + kRotatedPanel - 1) / kRotatedPanel * kRotatedPanel; }
H2OT_INLINE int64_t sums_width(int64_t M) { return (1 + M) * kLanes<float>; }

// Adds a panel of row `row`, from channel c on, token included.
H2OT_INLINE void add_channels(const RecoverRotatedArgs& a, int64_t row, int64_t c, const float* product, float* sums) {
  constexpr int L = kLanes<float>;
  const int64_t width = rotated_width(a.C);
  const float* const token = a.token + row % a.F * width + c;
  Floats z[kRotatedVectors], square = load(sums);
#pragma GCC unroll 8
  for (int v = 0; v < kRotatedVectors; v++) {
    z[v] = load(product + v * L) + load(token + v * L);
    square += z[v] * z[v];
  }
  store(sums, square);
  for (int64_t m = 0; m < a.M; m++) {
    const float* const head = a.head + m * width + c;
    Floats dot = load(sums + (1 + m) * L);
#pragma GCC unroll 8
    for (int v = 0; v < kRotatedVectors; v++) dot += z[v] * load(head + v * L);
    store(sums + (1 + m) * L, dot);
  }
}

template <class T>
H2OT_INLINE void finish_row(const RecoverRotatedArgs& a, int64_t row, const float* sums) {
  constexpr int L = kLanes<float>;
  const float scale = 1 / float(__builtin_sqrt(double(sum_lanes<float>(load(sums))) / double(a.C) + a.eps));
  T* const out = static_cast<T*>(a.out) + row * a.M;
  for (int64_t m = 0; m < a.M; m++) {
    narrow(sum_lanes<float>(load(sums + (1 + m) * L)) * scale + a.bias[m], out[m]);
  }
}

}  // namespace H2OT_ISA
}  // namespace h2ot
