// The faster search: tokens as 16-bit integers, distances from exact integer products, at twice the rate of the float
// tile (with VNNI; 1.4 times without).
//
// q = round((x - centre) * scale) with |q| <= kRadius in Euclidean norm, so that |q_i - q_j|^2 and every partial sum of
// a product fit 32 bits (Cauchy-Schwarz) and nothing but the quantisation itself is rounded: it moves a token by at
// most kRounding sqrt(C). Near-duplicates fall inside that and are left to float64, or to the float tile if there are
// many.
//
// Panel: [norms, int32][norms of the prefix, int32][infinity past the last token, float][C / 2, rounded up][kPanel]
// pairs of channels.
#pragma once

#include "distance.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

#if defined(__SSE2__)
constexpr bool kQuantises = true;
#else
constexpr bool kQuantises = false;
#endif
constexpr double kRadius = 23000, kRounding = 0.504;
constexpr int64_t kHeader = 3;              // rows of a panel before its channels
constexpr int64_t kQuantisedChannels = 32;  // fewer are not worth it

typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));

template <class A>
struct IntegerOf {
  typedef int32_t type;
};
template <>
struct IntegerOf<double> {
  typedef int64_t type;
};

H2OT_INLINE int64_t pairs_of(int64_t C) { return (C + 1) / 2; }

// The first channels, whose distances may already show that two tokens are not near: an even number, at most C.
H2OT_INLINE int64_t prefix_of(int64_t C) { return C < 64 ? C / 2 * 2 : smaller(C / 16 * 2, kChunk); }

H2OT_INLINE bool has_vnni() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// sum + the products of column's 16-bit pairs with the pair at `row`, added in pairs.
template <bool kVnni>
H2OT_INLINE Ints add_products(Ints sum, [[maybe_unused]] Ints column, [[maybe_unused]] const float* row) {
#if defined(__AVX512F__)
  if (kVnni) {
    asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(column), "m"(*row));
    return sum;
  }
#endif
#if defined(__SSE2__)
  int32_t pair;
  memcpy(&pair, row, 4);
  const Ints pairs = pair - Ints{};
#if defined(__AVX512F__)
  return sum + Ints(_mm512_madd_epi16(__m512i(column), __m512i(pairs)));
#elif defined(__AVX2__)
  return sum + Ints(__builtin_ia32_pmaddwd256(Shorts(column), Shorts(pairs)));
#else
  return sum + Ints(__builtin_ia32_pmaddwd128(Shorts(column), Shorts(pairs)));
#endif
#else
  return sum;
#endif
}

H2OT_INLINE Ints load_ints(const float* p) {
  Ints v;
  memcpy(&v, p, sizeof v);
  return v;
}

// out[r][p] = |q_r - q_p|^2 over the first `pairs` pairs of channels, whose norms are row `norms` of the panels, as
// distance_tile; infinity past the last token of either panel.
template <int kVectors, bool kVnni>
__attribute__((noinline)) void quantised_tile(const float* a, const float* b, int64_t pairs, int64_t norms,
                                              float* out) {
  Ints sum[kRows][kVectors] = {};
  const float *row = a + kHeader * kPanel, *columns = b + kHeader * kPanel;
#pragma GCC unroll kStepsAtOnce
  for (int64_t c = 0; c < pairs; c++, row += kPanel, columns += kPanel) {
    Ints column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) column[v] = load_ints(columns + v * kFloats);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sum[r][v] = add_products<kVnni>(sum[r][v], column[v], row + r);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) {
    int32_t norm;
    memcpy(&norm, a + norms * kPanel + r, 4);
    const float past = a[(kHeader - 1) * kPanel + r];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      const Ints s = (norm - sum[r][v]) + (load_ints(b + norms * kPanel + v * kFloats) - sum[r][v]);
      const Floats past_column = load(b + (kHeader - 1) * kPanel + v * kFloats);
      store(out + r * kPanel + v * kFloats, __builtin_convertvector(s, Floats) + past_column + past);
    }
  }
}

// |sqrt(s) - sqrt(v)|: both tokens moved; v was rounded to float once. kRounding: half a step, and two roundings to
// float of a value of at most 2^15 before it.
H2OT_INLINE Bound quantised_bound(int64_t C) { return {0x1p-23, 2 * kRounding * sqrt(double(C))}; }

// q of channels [begin, begin + count) into out, which holds an even number; returns their squared norm.
template <class A>
H2OT_INLINE int32_t quantise(const A* row, const A* centre, A scale, int64_t count, int16_t* out) {
  constexpr A kMagic = sizeof(A) == 4 ? A(0x1.8p23) : A(0x1.8p52);  // adding it rounds to an integer in the low bits
  int32_t norm = 0;
  for (int64_t c = 0; c < count; c++) {
    const A shifted = (row[c] - centre[c]) * scale + kMagic;
    typename IntegerOf<A>::type bits;
    memcpy(&bits, &shifted, sizeof bits);
    const int16_t q = int16_t(bits);
    out[c] = q;
    norm += int32_t(q) * q;
  }
  if (count % 2) out[count] = 0;
  return norm;
}

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
