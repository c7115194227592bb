// Density by a Gaussian of all distances (Rodriguez & Laio 2014), O(N^2 C) time and no memory beside the panels.
//
// Float32 tiles leave out the pairs whose term is proven to round to 0, float64 decides the others. Terms are multiples
// of 2^-40, so their sum is exact in any order: equal multisets of distances give equal densities.
#pragma once

#include "score_state.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

template <class A>
struct Gaussian {
  State<A>& state;
  double width;  // area cutoff^2: terms are exp(-s / width)
  bool exclude_self;

  // m = -rho for the slots of one panel. Count: n kPanel C differences, and as many in float64 for the pairs in reach.
  void panel(int64_t p) const {
    constexpr double kSteps = 0x1p40, kReach = 28.42;  // exp(-28.42) < 2^-41
    const Sample<A>& sample = state.sample;
    const int64_t n = sample.n, size = sample.panel_size(), first = p * kPanel, rows = smaller(kPanel, n - first);
    const Floats limit = fill(sample.bound.reach(kReach * width * sample.unit()));
    int64_t sum[kPanel] = {};
    float tile[kRows * kPanel] __attribute__((aligned(64)));
    for (int64_t column = 0; column < n; column += kPanel) {
      for (int64_t r = 0; r < rows; r += kRows) {
        sample.template tile<2>(state.panels + p * size + r, state.panels + column / kPanel * size, tile);
        for (int64_t i = r; i < smaller(r + kRows, rows); i++) {
          for (int64_t v = 0; v < kPanel; v += kFloats) {
            for (uint32_t bits = at_most(load(tile + (i - r) * kPanel + v), limit); bits; bits &= bits - 1) {
              const int64_t j = column + v + __builtin_ctz(bits);
              if (j >= n || j == first + i) continue;
              sum[i] += int64_t(__builtin_rint(exp(-sample.distance(first + i, j) / width) * kSteps));
            }
          }
        }
      }
    }
    for (int64_t i = 0; i < rows; i++) {
      state.m[first + i] = -double(sum[i] + (exclude_self ? 0 : int64_t(kSteps))) / kSteps;
    }
  }
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
