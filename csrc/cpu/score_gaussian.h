// Density by a Gaussian of all distances (Rodriguez & Laio 2014), O(N^2 C) time and O(N) memory beside the panels.
//
// Float32 tiles leave out the pairs whose term is proven to round to 0, float64 decides the others. Terms are multiples
// of 2^-40 and are added as integers: the sum is exact in any order, so threads may add to it as they come, and equal
// multisets of distances give equal densities.
#pragma once

#include "score_state.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

template <class A>
struct Gaussian {
  static constexpr double kSteps = 0x1p40, kReach = 28.42;  // exp(-28.42) < 2^-41

  State<A>& state;
  int64_t* sum;  // [n rounded up to panels] terms times 2^40
  double width;  // area cutoff^2: terms are exp(-s / width)

  void add_all(const Parallel& pool) const {
    const int64_t panels = groups_of(state.sample.n, kPanel);
    for (int64_t i = 0; i < panels * kPanel; i++) sum[i] = 0;
    // A task takes one panel from either end: earlier panels have more later tokens to look at.
    parallel_for(pool, groups_of(panels, 2), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) {
        add(p);
        if (panels - 1 - p != p) add(panels - 1 - p);
      }
    });
  }

  double density(int64_t i, bool exclude_self) const {
    return double(sum[i] + (exclude_self ? 0 : int64_t(kSteps))) / kSteps;
  }

 private:
  // Adds the pairs of panel p with itself and all later ones to both tokens. Count: kPanel C differences for each later
  // token, and as many in float64, with an exponential, for the pairs in reach.
  void add(int64_t p) const {
    const Sample<A>& sample = state.sample;
    const Form<A>& form = sample.form;
    const int64_t n = sample.n, size = form.panel_size(), first = p * kPanel, rows = smaller(kPanel, n - first);
    const int64_t height = form.height();
    const TileHold registers(form);
    const Floats limit = fill(form.bound.reach(kReach * width * form.unit()));
    int64_t of_row[kPanel] = {};
    float tile[kMostRows * kPanel] __attribute__((aligned(64)));
    for (int64_t column = first; column < n; column += kPanel) {
      int64_t of_column[kPanel] = {};
      for (int64_t r = 0; r < rows; r += height) {
        form.template tile<2>(form.at(state.panels + p * size, r), state.panels + column / kPanel * size, tile);
        for (int64_t i = r; i < smaller(r + height, rows); i++) {
          for (int64_t v = 0; v < kPanel; v += kFloats) {
            for (uint32_t bits = at_most(load(tile + (i - r) * kPanel + v), limit); bits; bits &= bits - 1) {
              const int64_t at = v + __builtin_ctz(bits), j = column + at;
              if (j >= n || j <= first + i) continue;
              const double term = exp(-sample.distance(first + i, j) / width);
              const int64_t steps = int64_t(__builtin_rint(term * kSteps));
              of_row[i] += steps;
              of_column[at] += steps;
            }
          }
        }
      }
      add_to(column, of_column);
    }
    add_to(first, of_row);
  }

  void add_to(int64_t first, const int64_t* steps) const {
    for (int64_t p = 0; p < kPanel; p++) __atomic_fetch_add(sum + first + p, steps[p], __ATOMIC_RELAXED);
  }
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
