// Squared distances between tokens by direct difference: the float32 tile that searches, the float32 row that sifts,
// the float64 row that decides, and the bounds that tie them together.
//
// Tokens are packed into panels of kPanel tokens, [C][kPanel], scaled by a power of two so that the largest magnitude
// of the sample lies in [1/2, 1): neither squares of 1e30 nor of 1e-30 leave float32. A tile is kRows tokens of one
// panel against all tokens of another; its accumulators stay in registers over kChunk channels.
#pragma once

#include <cmath>

#include "vectors.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;  // 32 vector registers
#else
constexpr int kRows = 4;
#endif
constexpr int kPanel = 2 * kFloats;
constexpr int64_t kChunk = 512;
static_assert(kPanel % kRows == 0);

H2OT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
H2OT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
H2OT_INLINE double smaller_of(double a, double b) { return a < b ? a : b; }
H2OT_INLINE double larger_of(double a, double b) { return a > b ? a : b; }

H2OT_INLINE Floats fill(float v) { return v - Floats{}; }

// column - *row. With AVX-512 the broadcast is folded into the subtraction, where it costs nothing; as an instruction
// of its own it takes the place of an addition (Zen 4: 38 instead of 56 G differences/s a core).
H2OT_INLINE Floats minus_broadcast(Floats column, const float* row) {
#if defined(__AVX512F__)
  Floats d;
  asm("vsubps %2%{1to16%}, %1, %0" : "=v"(d) : "v"(column), "m"(*row));
  return d;
#else
  return column - *row;
#endif
}

// out[r][p] = sum over c of (a[c][r] - b[c][p])^2 for r < kRows and kVectors vectors of p.
template <int kVectors>
__attribute__((noinline)) void distance_tile(const float* a, const float* b, int64_t C, float* out) {
  for (int64_t begin = 0; begin < C; begin += kChunk) {
    const int64_t end = smaller(begin + kChunk, C);
    Floats sum[kRows][kVectors] = {};
#pragma GCC unroll kStepsAtOnce
    for (int64_t c = begin; c < end; c++) {
      Floats column[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) column[v] = load(b + c * kPanel + v * kFloats);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) {
          const Floats d = minus_broadcast(column[v], a + c * kPanel + r);
          sum[r][v] += d * d;
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) {
        float* at = out + r * kPanel + v * kFloats;
        store(at, begin == 0 ? sum[r][v] : sum[r][v] + load(at));
      }
    }
  }
}

// |sqrt(s) - sqrt(v)| <= beta sqrt(v) + eta for the squared distance v of a tile and the true one s, both scaled.
struct Bound {
  double beta, eta;

  double least(float v) const {
    const double r = sqrt(double(v)) * (1 - beta) - eta;
    return r > 0 ? r * r : 0;
  }
  double most(float v) const {
    const double r = sqrt(double(v)) * (1 + beta) + eta;
    return r * r;
  }
  // A tile value above reach(s) belongs to a pair farther apart than s; one below floor_of(s) to a nearer pair.
  float reach(double s) const {
    const double r = (sqrt(s) + eta) / (1 - beta);
    return float(r * r * (1 + 0x1p-22));
  }
  float floor_of(double s) const {
    const double r = (sqrt(s) - eta) / (1 + beta);
    return r > 0 ? float(r * r * (1 - 0x1p-22)) : 0.0f;
  }
  // What holds for values of either form.
  Bound or_that(const Bound& other) const { return {larger_of(beta, other.beta), larger_of(eta, other.eta)}; }
};

// The worst case of distance_tile: each difference is rounded once, each square once and each addition once.
// eta covers squares that underflow, and (float64 tokens) the rounding of packed values up to `magnitude`.
H2OT_INLINE Bound tile_bound(int64_t C, double magnitude) {
  const double roundings = double(smaller(C, kChunk) + groups_of(C, kChunk) + 8);
  return {0.6 * 0x1p-24 * roundings, sqrt(double(C)) * (0x1p-62 + magnitude * 0x1p-22)};
}

template <class A>
H2OT_INLINE Doubles load_doubles(const A* p) {
  typedef A Narrow __attribute__((vector_size(kDoubles * sizeof(A))));
  Narrow v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Doubles);
}
// g++ 12 converts the vector above in halves and joins them, or lane by lane: 100 ns instead of 72 at C 512.
#if defined(__aarch64__)
H2OT_INLINE Doubles load_doubles(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
#elif defined(__AVX512F__)
H2OT_INLINE Doubles load_doubles(const float* p) { return Doubles{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}; }
#elif defined(__AVX2__)
H2OT_INLINE Doubles load_doubles(const float* p) { return Doubles{p[0], p[1], p[2], p[3]}; }
#endif

// sum over c of (a - b)^2 in float64: the same bits for (a, b) and (b, a).
template <class A>
__attribute__((noinline)) double exact_distance(const A* a, const A* b, int64_t C) {
  constexpr int kUnroll = 4;
  Doubles sum[kUnroll] = {};
  int64_t c = 0;
  for (; c + kUnroll * kDoubles <= C; c += kUnroll * kDoubles) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; u++) {
      const Doubles d = load_doubles(a + c + u * kDoubles) - load_doubles(b + c + u * kDoubles);
      sum[u] += d * d;
    }
  }
  for (; c + kDoubles <= C; c += kDoubles) {
    const Doubles d = load_doubles(a + c) - load_doubles(b + c);
    sum[0] += d * d;
  }
  const Doubles folded = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  double total = 0;
  for (int lane = 0; lane < kDoubles; lane++) total += folded[lane];
  for (; c < C; c++) {
    const double d = double(a[c]) - double(b[c]);
    total += d * d;
  }
  return total;
}

// |(row - centre) * scale|^2 in the precision of the tokens.
template <class A>
A scaled_distance(const A* row, const A* centre, A scale, int64_t C) {
  constexpr int kUnroll = 4;
  Vector<A> sum[kUnroll] = {};
  const auto add = [&](Vector<A>& to, Vector<A> a, Vector<A> b) {
    const Vector<A> d = (a - b) * scale;
    to += d * d;
  };
  int64_t c = 0;
  for (; c + kUnroll * kLanes<A> <= C; c += kUnroll * kLanes<A>) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; u++) {
      add(sum[u], load_wide(row + c + u * kLanes<A>), load_wide(centre + c + u * kLanes<A>));
    }
  }
  for (; c + kLanes<A> <= C; c += kLanes<A>) add(sum[0], load_wide(row + c), load_wide(centre + c));
  if (c < C) add(sum[1], load_part(row + c, C - c), load_part(centre + c, C - c));
  return sum_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The largest |row - centre| of a channel.
template <class A>
A largest_difference(const A* row, const A* centre, int64_t C) {
  const auto larger_one = [](Vector<A> a, Vector<A> b) __attribute__((always_inline)) { return a > b ? a : b; };
  Vector<A> most[2] = {};
  const auto add = [&](Vector<A>& to, Vector<A> a, Vector<A> b) __attribute__((always_inline)) {
    const Vector<A> d = a - b;
    to = larger_one(to, larger_one(d, -d));
  };
  int64_t c = 0;
  for (; c + 2 * kLanes<A> <= C; c += 2 * kLanes<A>) {
    add(most[0], load_wide(row + c), load_wide(centre + c));
    add(most[1], load_wide(row + c + kLanes<A>), load_wide(centre + c + kLanes<A>));
  }
  if (c + kLanes<A> <= C) {
    add(most[0], load_wide(row + c), load_wide(centre + c));
    c += kLanes<A>;
  }
  if (c < C) add(most[1], load_part(row + c, C - c), load_part(centre + c, C - c));
  return fold_lanes<A>(larger_one(most[0], most[1]), larger_one);
}

// The worst case of scaled_distance between two float tokens, as tile_bound, where no difference overflows.
H2OT_INLINE Bound scaled_bound(int64_t C) {
  return {0.6 * 0x1p-24 * double(groups_of(C, 4 * kFloats) + kFloats + 8), sqrt(double(C)) * 0x1p-62};
}

// Bit p is set where a[p] <= b[p].
H2OT_INLINE uint32_t at_most(Floats a, Floats b) {
#if defined(__AVX512F__)
  constexpr int kLessOrEqualQuiet = 18, kCurrentRounding = 4;
  return uint32_t(__builtin_ia32_cmpps512_mask(a, b, kLessOrEqualQuiet, -1, kCurrentRounding));
#elif defined(__AVX2__)
  return uint32_t(__builtin_ia32_movmskps256(reinterpret_cast<Floats>(a <= b)));
#elif defined(__SSE__)
  return uint32_t(__builtin_ia32_movmskps(reinterpret_cast<Floats>(a <= b)));
#elif defined(__aarch64__)
  return vaddvq_u32(vcleq_f32(a, b) & uint32x4_t{1, 2, 4, 8});
#else
  const auto less = a <= b;
  uint32_t bits = 0;
  for (int p = 0; p < kFloats; p++) bits |= uint32_t(less[p] & 1) << p;
  return bits;
#endif
}

// Whether a value of a tile of `rows` rows is at most the limit of its row.
H2OT_INLINE bool any_within(const float* tile, int64_t rows, const float* limit) {
#if defined(__aarch64__)
  uint32x4_t any = {};
  for (int64_t at = 0; at < rows * kPanel; at += kFloats) any |= vcleq_f32(load(tile + at), fill(limit[at / kPanel]));
  return vmaxvq_u32(any) != 0;
#else
  uint32_t any = 0;
  for (int64_t at = 0; at < rows * kPanel; at += kFloats) {
    any |= at_most(load(tile + at), fill(limit[at / kPanel]));
  }
  return any != 0;
#endif
}

// Whether a value of a tile is at most the limit of its row or of its column.
H2OT_INLINE bool any_within(const float* tile, int64_t rows, const float* of_row, const float* of_column) {
  uint32_t any = 0;
  for (int64_t at = 0; at < rows * kPanel; at += kFloats) {
    any |= at_most(load(tile + at), load(of_column + at % kPanel));
  }
  return any != 0 || any_within(tile, rows, of_row);
}

// Calls f(j) for ascending j < count with v[j] <= limit, until f says stop by returning false.
template <class F>
H2OT_INLINE void for_each_within(const float* v, int64_t count, float limit, const F& f) {
  const Floats limits = fill(limit);
  for (int64_t j = 0; j < count; j += kFloats) {
    for (uint32_t bits = at_most(load(v + j), limits); bits; bits &= bits - 1) {
      const int64_t at = j + __builtin_ctz(bits);
      if (at >= count || !f(at)) return;
    }
  }
}

// The least of v[0 .. count); v is readable in whole vectors and holds nothing less past count.
inline float least_of(const float* v, int64_t count) {
  const auto lesser = [](Floats a, Floats b) __attribute__((always_inline)) {
#if defined(__aarch64__)
    return vminnmq_f32(a, b);  // half the latency of a comparison and a selection
#else
    return b < a ? b : a;
#endif
  };
  Floats least[2] = {load(v), load(v)};
  int64_t j = kFloats;
  for (; j + kFloats < count; j += 2 * kFloats) {
    least[0] = lesser(least[0], load(v + j));
    least[1] = lesser(least[1], load(v + j + kFloats));
  }
  if (j < count) least[0] = lesser(least[0], load(v + j));
  return fold_lanes<float>(lesser(least[0], least[1]), lesser);
}

// The rank-th smallest of v[0 .. count) (rank from 1), for values that are not negative; v is readable in whole vectors
// and holds infinity past count.
inline float ranked_smallest(const float* v, int64_t count, int64_t rank) {
  constexpr int64_t kListed = 16;
  if (rank == 1) return least_of(v, count);
  if (rank <= kListed) {
    float list[kListed];
    for (int64_t r = 0; r < rank; r++) list[r] = __builtin_inff();
    for (int64_t j = 0; j < count; j += kFloats) {
      for (uint32_t bits = at_most(load(v + j), fill(list[rank - 1])); bits; bits &= bits - 1) {
        const float value = v[j + __builtin_ctz(bits)];
        int64_t at = rank - 1;
        if (!(value < list[at])) continue;
        for (; at > 0 && value < list[at - 1]; at--) list[at] = list[at - 1];
        list[at] = value;
      }
    }
    return list[rank - 1];
  }
  // Bisection on the bit pattern, which orders like the value.
  int32_t low = 0, high = 0x7f800000;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    int64_t reached = 0;
    for (int64_t j = 0; j < count; j++) {
      int32_t bits;
      memcpy(&bits, v + j, 4);
      reached += bits <= middle;
    }
    if (reached >= rank) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  float result;
  memcpy(&result, &low, 4);
  return result;
}

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
