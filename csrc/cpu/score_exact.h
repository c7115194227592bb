// Search with all distances in float64: for neighbour lists that are too long to be kept sorted at every tile.
#pragma once

#include "score_peaks.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

template <class A>
struct Exact {
  static constexpr bool kLabels = false;

  State<A>* state;
  PeakSearch<A> peaks;
  double* of_row;  // [n], or null: the largest distance is not asked for

  void carve(Carver& memory, int64_t N, bool need_largest) {
    of_row = need_largest ? memory.take<double>(N) : nullptr;
    peaks.state = state;
    peaks.open = nullptr;
    peaks.carve(memory, N);
  }

  void find_nearest(Workers& workers) {
    for_rows(workers, state->sample.n, 0,
             [&](int64_t i, const RowRoom& room) { state->set_nearest_exactly(i, room.list); });
  }

  void find_parents(Workers& workers) { peaks.find_parents(workers); }

  double largest(Workers& workers) const {
    return largest_of_rows(state->sample, workers.pool, of_row, [](int64_t) { return true; });
  }
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
