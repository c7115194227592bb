// What follows the triangle in rotated channels (launch.h: RecoverRotatedArgs): a row's squares and its products with
// the head, summed panel by panel, each in the lanes of a vector.
#pragma once

#include "vectors.h"

namespace h2ot {
namespace H2OT_ISA {

constexpr int kRotatedVectors = kRotatedPanel / kLanes<float>;

H2OT_INLINE int64_t rotated_width(int64_t C) { return rounded_up(C, kRotatedPanel); }
H2OT_INLINE int64_t sums_width(int64_t M) { return (1 + M) * kLanes<float>; }

// Adds kVectors vectors of products of a row, from a rotated channel on, with `token` and `head` from there on, too, to
// the row's sums. kM: the outputs, if they are known; their number is M.
template <int kM, int kVectors>
H2OT_INLINE void add_row(const Floats (&product)[kVectors], const float* token, const float* head, int64_t width,
                         int64_t M, float* sums) {
  constexpr int L = kLanes<float>;
  Floats z[kVectors], square = load(sums);
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; v++) {
    z[v] = product[v] + load(token + v * L);
    square += z[v] * z[v];
  }
  store(sums, square);
#pragma GCC unroll 4
  for (int64_t m = 0; m < (kM ? kM : M); m++) {
    Floats dot = load(sums + (1 + m) * L);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) dot += z[v] * load(head + m * width + v * L);
    store(sums + (1 + m) * L, dot);
  }
}

template <int kM>
H2OT_INLINE void add_rows(const RecoverRotatedArgs& a, int64_t first, int64_t count, int64_t c, const float* products,
                          float* sums) {
  const int64_t width = rotated_width(a.attention.C), M = a.M;
  const float *const token = a.token + first * width + c, *const head = a.head + c;
  for (int64_t r = 0; r < count; r++) {
    Floats product[kRotatedVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kRotatedVectors; v++) product[v] = load(products + r * kRotatedPanel + v * kLanes<float>);
    add_row<kM>(product, token + r * width, head, width, M, sums + r * sums_width(M));
  }
}
// A panel of products of `count` rows, of queries `first` and later.
H2OT_INLINE void add_panel(const RecoverRotatedArgs& a, int64_t first, int64_t count, int64_t c, const float* products,
                           float* sums) {
  if (a.M == 3) return add_rows<3>(a, first, count, c, products, sums);  // coordinates
  add_rows<0>(a, first, count, c, products, sums);
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
