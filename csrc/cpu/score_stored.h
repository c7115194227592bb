// Search with all tile distances stored: for samples small enough that the N x N matrix stays in the caches.
#pragma once

#include "score_state.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kStoredTokens = 1536;

// [n][stride] floats; the diagonal and the columns past n hold infinity.
struct Matrix {
  float* data;
  int64_t stride;
  float* operator[](int64_t i) const { return data + i * stride; }
};

H2OT_INLINE Matrix carve_matrix(Carver& memory, int64_t N) {
  const int64_t stride = ceil_div(N, kPanel) * kPanel;
  return {memory.take<float>(stride * stride), stride};
}

// Tile distances between panels p <= q, written on both sides of the diagonal.
template <class A>
void fill_block(const State<A>& state, int64_t p, int64_t q, const Matrix& matrix) {
  const int64_t size = state.sample.panel_size();
  float tile[kRows * kPanel] __attribute__((aligned(64)));
  const float* b = state.panels + q * size;
  for (int64_t r = 0; r < kPanel; r += kRows) {
    const float* a = state.panels + p * size + r;
    const int64_t row = p * kPanel + r, column = q * kPanel;
    // Rows of the lower half of a diagonal block need its right half only: the other is above them, mirrored.
    const int64_t from = p == q && r >= kFloats ? kFloats : 0;
    if (from) {
      state.sample.template tile<1>(a, b + from, tile + from);
    } else {
      state.sample.template tile<2>(a, b, tile);
    }
    for (int64_t i = 0; i < kRows; i++) {
      memcpy(matrix[row + i] + column + from, tile + i * kPanel + from, size_t(kPanel - from) * sizeof(float));
    }
    const int64_t mirrored = p == q ? (r < kFloats ? kFloats : kPanel) : 0;
    for (int64_t j = mirrored; j < kPanel; j++) {
      for (int64_t i = 0; i < kRows; i++) matrix[column + j][row + i] = tile[i * kPanel + j];
    }
  }
}

// The rank-th smallest of v[0 .. count) (rank from 1), for values that are not negative; v is readable in whole vectors
// and holds infinity past count.
inline float ranked_smallest(const float* v, int64_t count, int64_t rank) {
  if (rank == 1) return least_of(v, count);
  if (rank <= kKept) {
    float list[kKept];
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

// m and the nearest neighbours of slot i from its row of the matrix. list: room for n.
template <class A>
void nearest_from_row(State<A>& state, const float* v, int64_t i, Neighbour* list) {
  const int64_t n = state.sample.n, wanted = state.wanted;
  const float ranked = wanted ? ranked_smallest(v, n, wanted) : 0;
  int64_t count = 0;
  if (ranked == 0) {  // equal tokens settle it: any further ones have higher slots
    for_each_within(v, n, 0, [&](int64_t j) {
      if (count < wanted && state.sample.equal(i, j)) list[count++] = {0.0, int32_t(j)};
      return count < wanted;
    });
    if (count == wanted) {
      state.set_nearest(i, list, count);
      return;
    }
    count = 0;
  }
  const Bound& bound = state.sample.bound;
  for_each_within(v, n, bound.reach(bound.most(ranked)), [&](int64_t j) {
    if (j != i) list[count++] = {state.sample.distance(i, j), int32_t(j)};
    return true;
  });
  if (count < wanted) {
    state.set_nearest_exactly(i, list);
    return;
  }
  sort_neighbours(list, count);
  state.set_nearest(i, list, wanted);
}

// Whether the matrix leaves so many neighbours undecided that a finer search is cheaper: near-duplicates, quantised.
template <class A>
bool too_coarse(const State<A>& state, const Matrix& matrix) {
  constexpr int64_t kSampled = 8, kUndecided = 12;
  const int64_t n = state.sample.n;
  const Bound& bound = state.sample.bound;
  int64_t undecided = 0;
  for (int64_t t = 0; t < kSampled && state.wanted > 0; t++) {
    const float* v = matrix[t * n / kSampled];
    for_each_within(v, n, bound.reach(bound.most(ranked_smallest(v, n, state.wanted))), [&](int64_t) {
      undecided++;
      return true;
    });
  }
  return undecided > kSampled * (state.wanted + kUndecided);
}

// The nearest denser token of slot i from its row of the matrix.
template <class A>
void parent_from_row(State<A>& state, const float* v, int64_t i) {
  if (state.find_parent_nearby(i)) return;
  const int64_t n = state.sample.n;
  const double key = state.key[i];
  // Bit patterns of non-negative floats order like integers, which lets the loops below vectorise.
  const auto least_denser = [&](int64_t begin, int64_t end, bool or_equal) {
    constexpr int32_t kNone = 0x7fffffff;
    int32_t least = kNone;
    for (int64_t j = begin; j < end; j++) {
      int32_t bits;
      memcpy(&bits, v + j, 4);
      const bool denser = or_equal ? state.key[j] <= key : state.key[j] < key;
      bits = denser ? bits : kNone;
      least = bits < least ? bits : least;
    }
    return least;
  };
  const int32_t before = least_denser(0, i, !state.strict), after = least_denser(i + 1, n, false);
  const int32_t bits = before < after ? before : after;
  state.parent[i] = -1;
  if (bits >= 0x7f800000) {
    if (bits != 0x7fffffff) state.find_parent_exactly(i);
    return;
  }
  float least;
  memcpy(&least, &bits, 4);
  const Bound& bound = state.sample.bound;
  for_each_within(v, n, bound.reach(bound.most(least)), [&](int64_t j) {
    if (j == i || !state.denser(j, i)) return true;
    const double s = state.sample.distance(i, j);
    if (state.parent[i] < 0 || s < state.delta[i]) {
      state.delta[i] = s;
      state.parent[i] = int32_t(j);
    }
    return state.delta[i] > 0;
  });
}

// The largest squared distance over all pairs.
template <class A>
double largest_stored(const State<A>& state, const Matrix& matrix) {
  const int64_t n = state.sample.n;
  const auto largest_of = [&](int64_t i) {
    int32_t most = 0;
    for (int64_t j = i + 1; j < n; j++) {
      int32_t bits;
      memcpy(&bits, matrix[i] + j, 4);
      most = bits > most ? bits : most;
    }
    float v;
    memcpy(&v, &most, 4);
    return v;
  };
  float most = 0;
  for (int64_t i = 0; i < n; i++) {
    const float v = largest_of(i);
    most = v > most ? v : most;
  }
  if (most == 0 && state.all_equal()) return 0;
  const Bound& bound = state.sample.bound;
  const float from = bound.floor_of(bound.least(most));
  double largest = 0;
  for (int64_t i = 0; i < n; i++) {
    if (largest_of(i) < from) continue;
    for (int64_t j = i + 1; j < n; j++) {
      if (matrix[i][j] < from) continue;
      const double s = state.sample.distance(i, j);
      largest = s > largest ? s : largest;
    }
  }
  return largest;
}

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
