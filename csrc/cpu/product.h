// The matrix product that attention is made of, in register tiles.
#pragma once

#include "vectors.h"

namespace h2ot {
namespace H2OT_ISA {

// A tile of kTileRows x 2 vectors leaves room for two vectors of b and one broadcast of a: with 32 registers
// 24 accumulators cover the latency of two multiply-add pipes (4 cycles each) three times over.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVectors = 2;

// A distance that is known when a tile is compiled: as a_step, b_step below.
template <int64_t n>
using Fixed = std::integral_constant<int64_t, n>;

// What becomes of an element of the product: written, or added to what is there.
template <class E>
struct WriteTo {
  E* at;
  int64_t step;
  __attribute__((always_inline)) void operator()(int64_t row, int64_t vector, Vector<E> sum) const {
    store(at + row * step + vector * kLanes<E>, sum);
  }
};
template <class E>
struct AddTo {
  E* at;
  int64_t step;
  __attribute__((always_inline)) void operator()(int64_t row, int64_t vector, Vector<E> sum) const {
    E* const to = at + row * step + vector * kLanes<E>;
    store(to, load(to) + sum);
  }
};

// One tile: done(row, vector, sum) for sum over s < depth, in this order, of a[row a_row + s a_step] times the vector
// at b[s b_step + vector kLanes]. Not inlined: inside a larger function its accumulators are spilled. One pointer for
// three rows: twelve row offsets would not fit the integer registers.
template <int R, int V, class E, class AStep, class BStep, class Done>
__attribute__((noinline)) static void product_tile(int64_t row, int64_t vector, int64_t depth, const E* a,
                                                   int64_t a_row, AStep a_step, const E* b, BStep b_step, Done done) {
  constexpr int kPointers = (R + 2) / 3;
  Vector<E> sum[R][V] = {};
  const E* at[kPointers];
#pragma GCC unroll 4
  for (int i = 0; i < kPointers; i++) at[i] = a + (row + 3 * i) * a_row;
  b += vector * kLanes<E>;
#pragma GCC unroll kStepsAtOnce
  for (int64_t s = 0; s < depth; s++, b += b_step) {
    Vector<E> right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) right[v] = load(b + v * kLanes<E>);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const Vector<E> left = splat<E>(at[r / 3][r % 3 * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[r][v] += left * right[v];
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; i++) at[i] += a_step;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) done(row + r, vector + v, sum[r][v]);
  }
}

template <int R, int V, class E, class AStep, class BStep, class Done>
H2OT_INLINE void product_rest(int64_t rest, int64_t row, int64_t vector, int64_t depth, const E* a, int64_t a_row,
                              AStep a_step, const E* b, BStep b_step, Done done) {
  if (rest == R) {
    product_tile<R, V>(row, vector, depth, a, a_row, a_step, b, b_step, done);
  } else if constexpr (R > 1) {
    product_rest<R - 1, V>(rest, row, vector, depth, a, a_row, a_step, b, b_step, done);
  }
}

template <int V, class E, class AStep, class BStep, class Done>
H2OT_INLINE void product_column(int64_t rows, int64_t vector, int64_t depth, const E* a, int64_t a_row, AStep a_step,
                                const E* b, BStep b_step, Done done) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    product_tile<kTileRows, V>(row, vector, depth, a, a_row, a_step, b, b_step, done);
  }
  product_rest<kTileRows - 1, V>(rows - row, row, vector, depth, a, a_row, a_step, b, b_step, done);
}

// The product of a (rows x depth) and b (depth x vectors): each element is one chain of multiply-adds in the order of
// depth, whatever tile it falls in.
template <class E, class AStep, class BStep, class Done>
H2OT_INLINE void product(int64_t rows, int64_t vectors, int64_t depth, const E* a, int64_t a_row, AStep a_step,
                         const E* b, BStep b_step, Done done) {
  int64_t vector = 0;
  for (; vector + kTileVectors <= vectors; vector += kTileVectors) {
    product_column<kTileVectors>(rows, vector, depth, a, a_row, a_step, b, b_step, done);
  }
  if (vector < vectors) product_column<1>(rows, vector, depth, a, a_row, a_step, b, b_step, done);
}

}  // namespace H2OT_ISA
}  // namespace h2ot
