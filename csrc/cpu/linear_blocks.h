// How linear layers share their work: blocks of rows, each of which meets one panel of weights after the other.
#pragma once

#include "layer_norm.h"
#include "product.h"
#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {

// Outputs of a panel of float32 weights: those of a tile, whose other side is 6 rows, so that it has 24 accumulators,
// or 12, as tiles of attention have. A panel is read from its begin to its end, as caches and the machine's own
// prefetch want it.
constexpr int kFloatsVectors = kTileRows == 12 ? 4 : 2;
constexpr int64_t kFloatsPanel = kFloatsVectors * kFloats;

// Rows in groups of `side`. A thread takes up to `most` groups as a block; of fewer groups than threads, some of a
// group's panels.
struct Blocks {
  int64_t rows, side, most, panels, parts;

  Blocks(const Parallel& pool, int64_t all_rows, int64_t group, int64_t most_groups, int64_t all_panels)
      : rows(all_rows), side(group), most(most_groups), panels(all_panels) {
    const int64_t wanted = groups_of(pool.threads, groups_of(rows, side));
    parts = wanted < panels ? wanted : panels;
  }
  int64_t tasks() const { return groups_of(rows, side) * parts; }

  // Calls f(first row, rows, first panel, end of the panels) for the blocks of tasks [begin, end).
  template <class F>
  __attribute__((always_inline)) void each(int64_t begin, int64_t end, const F& f) const {
    const int64_t step = parts == 1 ? groups_of(end - begin, groups_of(end - begin, most)) : 1;  // of equal size
    for (int64_t task = begin; task < end; task += step) {
      const int64_t part = task % parts, first = task / parts * side;
      const int64_t taken = end - task < step ? end - task : step, left = rows - first;
      f(first, left < taken * side ? left : taken * side, part * panels / parts, (part + 1) * panels / parts);
    }
  }
};

// A panel's place in results [chunks, rows, M].
template <int64_t kPanel>
struct Place {
  int64_t chunk, column, count;

  Place(int64_t M, int64_t panel) {
    const int64_t panels = groups_of(M, kPanel);
    chunk = panel / panels;
    column = panel % panels * kPanel;
    count = M - column < kPanel ? M - column : kPanel;
  }
  template <class Args>
  int64_t of_row(const Args& a, int64_t row) const {
    return chunk * a.rows * a.M + row * out_row(a) + column;
  }
};

// The lines of `count` rows from `first` on that results are written to, and what is added to them is read from: they
// come while the product is made.
template <class O, int64_t kPanel, class Args>
H2OT_INLINE void ask_for_lines(const Args& a, const Place<kPanel>& place, int64_t first, int64_t count) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(O));
  for (int64_t r = 0; r < count; r++) {
    const int64_t at = place.of_row(a, first + r);
    for (int64_t i = 0; i < place.count; i += kLine) {
      __builtin_prefetch(static_cast<O*>(a.out) + at + i, 1);
      if (a.residual) __builtin_prefetch(static_cast<const O*>(a.residual) + at + i);
    }
  }
}

namespace {

// LayerNorm's weight and bias, of any dtype or null, in whole vectors, for all threads.
struct Affine {
  float *weight = nullptr, *bias = nullptr;

  Status read(const void* from_weight, const void* from_bias, Dtype dtype, int64_t C) {
    const int64_t width = rounded_up(C, kFloats);
    weight = static_cast<float*>(scratch(Slot::shared, 2 * width * int64_t(sizeof(float))));
    if (!weight) return Status::out_of_memory;
    bias = weight + width;
    widen_all(from_weight, dtype, 1.0f, C, width, weight);
    widen_all(from_bias, dtype, 0.0f, C, width, bias);
    return Status::ok;
  }
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
