// What follows the triangle in rotated channels (launch.h: RecoverRotatedArgs): a row's squares and its products with
// the head, summed panel by panel, each in the lanes of a vector.
#pragma once

#include "vectors.h"

namespace h2ot {
namespace H2OT_ISA {

constexpr int kRotatedVectors = kRotatedPanel / kLanes<float>;

H2OT_INLINE int64_t rotated_width(int64_t C) { return rounded_up(C, kRotatedPanel); }
H2OT_INLINE int64_t sums_width(int64_t M) { return (1 + M) * kLanes<float>; }

// Adds kVectors vectors of products of a row of query `frame`, from rotated channel c on, token included.
template <int kVectors>
H2OT_INLINE void add_channels(const RecoverRotatedArgs& a, int64_t frame, int64_t c, const Floats (&product)[kVectors],
                              float* sums) {
  constexpr int L = kLanes<float>;
  const int64_t width = rotated_width(a.attention.C);
  const float* const token = a.token + frame * width + c;
  Floats z[kVectors], square = load(sums);
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; v++) {
    z[v] = product[v] + load(token + v * L);
    square += z[v] * z[v];
  }
  store(sums, square);
  for (int64_t m = 0; m < a.M; m++) {
    const float* const head = a.head + m * width + c;
    Floats dot = load(sums + (1 + m) * L);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) dot += z[v] * load(head + v * L);
    store(sums + (1 + m) * L, dot);
  }
}
// A whole panel of them.
H2OT_INLINE void add_panel(const RecoverRotatedArgs& a, int64_t frame, int64_t c, const float* products, float* sums) {
  Floats product[kRotatedVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kRotatedVectors; v++) product[v] = load(products + v * kLanes<float>);
  add_channels(a, frame, c, product, sums);
}

template <class T>
H2OT_INLINE void finish_row(const RecoverRotatedArgs& a, int64_t b, int64_t frame, const float* sums) {
  constexpr int L = kLanes<float>;
  const double square = sum_lanes<float>(load(sums));
  const float scale = 1 / float(__builtin_sqrt(square / double(a.attention.C) + a.eps));
  T* const out = static_cast<T*>(a.out) + (b * a.attention.F + frame) * a.M;
  for (int64_t m = 0; m < a.M; m++) {
    narrow(sum_lanes<float>(load(sums + (1 + m) * L)) * scale + a.bias[m], out[m]);
  }
}

// Attention whose rows go to rotate(args, b, first, count, rows), a function like RowsTaker::take.
template <Status (*rotate)(const RecoverRotatedArgs&, int64_t, int64_t, int64_t, const void*)>
Status rotate_attended(const RecoverRotatedArgs& a, const Parallel& pool,
                       Status (*attend)(const RecoverAttentionArgs&, const Parallel&)) {
  const RowsTaker taker = {[](const void* context, int64_t b, int64_t first, int64_t count, const void* rows) {
                             return rotate(*static_cast<const RecoverRotatedArgs*>(context), b, first, count, rows);
                           },
                           &a};
  RecoverAttentionArgs attention = a.attention;
  attention.taker = &taker;
  return attend(attention, pool);
}

}  // namespace H2OT_ISA
}  // namespace h2ot
