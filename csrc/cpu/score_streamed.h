// Search without storing distances: every slot keeps its `kept` nearest by tile distance, row and column side of each
// tile alike; memory O(N kept). Rows whose list proves too little (near-duplicates, quantised) are searched again in
// the fine form, against all columns.
#pragma once

#include "score_peaks.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

template <class A>
struct Streamed {
  static constexpr bool kLabels = false;

  State<A>* state;
  PeakSearch<A> peaks;
  Lists lists;
  bool* open;       // [n] rows whose list proves too little
  float* furthest;  // [n] the largest tile distance seen from the row side, or null
  double* of_row;   // [n], with `furthest`

  void carve(Carver& memory, int64_t N, int64_t list, bool need_largest) {
    lists.carve(memory, N, list);
    open = memory.take<bool>(N);
    furthest = need_largest ? memory.take<float>(N) : nullptr;
    of_row = need_largest ? memory.take<double>(N) : nullptr;
    peaks.state = state;
    peaks.open = open;
    peaks.carve(memory, N);
  }

  void find_nearest(Workers& workers) {
    const Sample<A>& sample = state->sample;
    const bool refines = sample.form.quantised();
    pack_panels(sample.form, sample.token, sample.n, workers.pool, state->panels);
    for (int64_t i = 0; furthest && i < sample.n; i++) furthest[i] = 0;
    search_all(workers.pool);
    for_rows(workers, sample.n, 0, [&](int64_t i, const RowRoom& room) {
      open[i] = !set_nearest(lists, sample.form, i, i, room.list);
      if (open[i] && !refines) state->set_nearest_exactly(i, room.list);
    });
    if (refines && !workers.failed) refine(workers);
  }

  void find_parents(Workers& workers) { peaks.find_parents(workers); }

  // The largest squared distance: of rows whose largest tile distance may be the largest of all.
  double largest(Workers& workers) const {
    const Sample<A>& sample = state->sample;
    float most = 0;
    for (int64_t i = 0; i < sample.n; i++) most = furthest[i] > most ? furthest[i] : most;
    if (most == 0 && state->all_equal()) return 0;
    const Bound& bound = sample.form.bound;
    const float from = bound.floor_of(bound.least(most));
    return largest_of_rows(sample, workers.pool, of_row, [&](int64_t i) { return furthest[i] >= from; });
  }

 private:
  // Offers every pair of a tile (`height` slots from `row`, a panel of slots from `column`) to both its slots.
  void offer_tile(const float* tile, int64_t height, int64_t row, int64_t column) {
    const int64_t n = state->sample.n, rows = smaller(height, n - row);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t i = row + r;
      for (int64_t p = 0; p < kPanel; p += kFloats) {
        const Floats v = load(tile + r * kPanel + p);
        uint32_t of_row = at_most(v, fill(lists.threshold[i])),
                 of_column = at_most(v, load(lists.threshold + column + p));
        if (column + p <= i) {  // a tile that touches the diagonal: pairs above it only
          const int64_t below = i + 1 - column - p;
          const uint32_t above = below >= 32 ? 0 : ~uint32_t(0) << below;
          of_row &= above;
          of_column &= above;
        }
        for (; of_row; of_row &= of_row - 1) {
          const int64_t at = p + __builtin_ctz(of_row);
          if (column + at < n) lists.offer(i, tile[r * kPanel + at], int32_t(column + at));
        }
        for (; of_column; of_column &= of_column - 1) {
          const int64_t at = p + __builtin_ctz(of_column);
          lists.offer(column + at, tile[r * kPanel + at], int32_t(i));
        }
      }
      if (furthest) {
        float most = furthest[i];
        for (int64_t p = larger(0, i + 1 - column); p < smaller(kPanel, n - column); p++) {
          most = tile[r * kPanel + p] > most ? tile[r * kPanel + p] : most;
        }
        furthest[i] = most;
      }
    }
  }

  // All pairs between the panels [row_begin, row_end) and [column_begin, column_end): the same range, or a later one.
  // Neighbours in time come first: they fill the lists, and what is farther is soon left out.
  void search(int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end) {
    const Form<A>& form = state->sample.form;
    const int64_t n = state->sample.n, size = form.panel_size(), height = form.height();
    const bool same = row_begin == column_begin;
    const TileHold registers(form);
    EarlyStop stops(form);
    stops.enabled &= furthest == nullptr;
    float tile[kMostRows * kPanel] __attribute__((aligned(64)));
    const auto search_panels = [&](int64_t p, int64_t q) {
      const float* b = state->panels + q * size;
      for (int64_t r = 0; r < kPanel && p * kPanel + r < n; r += height) {
        const float* a = form.at(state->panels + p * size, r);
        const auto far = [&] {
          form.lower_tile(a, b, tile);
          return !any_within(tile, height, lists.threshold + p * kPanel + r, lists.threshold + q * kPanel);
        };
        if (q > p + 1 && stops(far)) continue;
        form.template tile<2>(a, b, tile);
        offer_tile(tile, height, p * kPanel + r, q * kPanel);
      }
    };
    for (int64_t q = row_begin; same && q < row_end; q++) {
      if (q > row_begin) search_panels(q - 1, q);
      search_panels(q, q);
    }
    const int64_t block = larger(1, 65536 / size);  // panels of rows that stay in the second-level cache
    for (int64_t first = row_begin; first < row_end; first += block) {
      const int64_t last = smaller(first + block, row_end);
      for (int64_t q = same ? first + 2 : column_begin; q < column_end; q++) {
        for (int64_t p = first; p < (same ? smaller(last, q - 1) : last); p++) search_panels(p, q);
      }
    }
  }

  // Every pair once, in rounds whose tasks share no slot: no locks, and lists are written by one thread at a time.
  void search_all(const Parallel& pool) {
    lists.clear(state->sample.n);
    const int64_t panels = groups_of(state->sample.n, kPanel), pairs = smaller(pool.threads, panels / 2);
    if (pairs < 2) {
      search(0, panels, 0, panels);
      return;
    }
    const int64_t parts = 2 * pairs;
    const auto from = [=](int64_t part) { return part * panels / parts; };
    parallel_for(pool, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; part++) search(from(part), from(part + 1), from(part), from(part + 1));
    });
    for (int64_t round = 0; round < parts - 1; round++) {  // the circle method of a round-robin tournament
      parallel_for(pool, pairs, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
          const int64_t one = t == 0 ? parts - 1 : (round + t) % (parts - 1);
          const int64_t other = (round + parts - 1 - t) % (parts - 1);
          const int64_t a = smaller(one, other), b = larger(one, other);
          search(from(a), from(a + 1), from(b), from(b + 1));
        }
      });
    }
  }

  // m and the nearest of slot i from row `row` of `found`; false if they are not proven.
  bool set_nearest(const Lists& found, const Form<A>& form, int64_t row, int64_t i, Neighbour* list) const {
    const int64_t proven = prove(state->sample, form, found, row, i, state->sample.n - 1, list);
    if (proven < state->wanted) return false;
    state->set_nearest(i, list, proven);
    return true;
  }

  // The open rows again, in the fine form; a few of them, and those that are not proven then, over all tokens in
  // float64.
  void refine(Workers& workers) {
    constexpr int64_t kFew = 8;
    const Sample<A>& sample = state->sample;
    int64_t rows = 0;
    int32_t *row = peaks.peak, *column = peaks.column;
    for (int64_t i = 0; i < sample.n; i++) {
      column[i] = int32_t(i);
      if (!open[i]) continue;
      row[rows++] = int32_t(i);
      state->near_count[i] = -1;
    }
    if (rows > kFew) {
      typedef RowSearch<A> Search;
      const Search search = {sample, sample.fine, row, nullptr, column};
      Search::for_blocks(rows, sample.C, lists.length, workers,
                         [&](int64_t begin, int64_t end, typename Search::Memory& memory) {
                           search.search(begin, end, memory);
                           Neighbour list[kLongest + kSpare];
                           for (int64_t i = begin; i < end; i++) {
                             set_nearest(memory.lists, sample.fine, i - begin, row[i], list);
                           }
                         });
    }
    for_rows(workers, sample.n, 0, [&](int64_t i, const RowRoom& room) {
      if (open[i] && state->near_count[i] < 0) state->set_nearest_exactly(i, room.list);
    });
  }
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
