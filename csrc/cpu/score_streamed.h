// Search without storing distances: every slot keeps its `kept` nearest by tile distance, row and column side of each
// tile alike; memory O(N kept). Rows whose list proves too little (near-duplicates, quantised) are searched again in
// the fine form, against all columns.
#pragma once

#include "score_state.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int32_t kUnknownParent = -2;

template <class A>
struct Streamed {
  State<A>* state;
  Lists lists;
  float* furthest;  // [n] the largest tile distance seen from the row side, or null
  bool* open;       // [n] rows whose list proves too little

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

  void clear() const {
    const int64_t n = state->sample.n;
    for (int64_t i = 0; i < n; i++) open[i] = false;
    for (int64_t i = 0; furthest && i < n; i++) furthest[i] = 0;
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

  // The largest squared distance: rows whose largest tile distance may be the largest of all, in float64.
  double largest(const Parallel& pool, double* of_row) const {
    const Sample<A>& sample = state->sample;
    float most = 0;
    for (int64_t i = 0; i < sample.n; i++) most = furthest[i] > most ? furthest[i] : most;
    if (most == 0 && state->all_equal()) return 0;
    const Bound& bound = sample.form.bound;
    const float from = bound.floor_of(bound.least(most));
    parallel_for(pool, sample.n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        of_row[i] = 0;
        for (int64_t j = i + 1; furthest[i] >= from && j < sample.n; j++) {
          const double s = sample.distance(i, j);
          of_row[i] = s > of_row[i] ? s : of_row[i];
        }
      }
    });
    double largest = 0;
    for (int64_t i = 0; i < sample.n; i++) largest = of_row[i] > largest ? of_row[i] : largest;
    return largest;
  }
};

// Some slots (rows) against all slots in some order (columns): the nearest of each row's first `among` columns.
template <class A>
struct RowSearch {
  static constexpr int64_t kBlock = 4;  // panels of rows per task

  const Sample<A>& sample;
  const Form<A>& form;
  const int32_t* row;     // slots
  const int64_t* among;   // per row, not descending; null: all
  const int32_t* column;  // [n] slots

  struct Memory {
    float *rows, *columns;
    Lists lists;

    void carve(Carver& memory, int64_t C, int64_t list) {
      rows = memory.take<float>(kBlock * panel_room(C));
      columns = memory.take<float>(panel_room(C));
      lists.carve(memory, kBlock * kPanel, list);
    }
    static int64_t bytes(int64_t C, int64_t list) {
      Carver count(nullptr);
      Memory().carve(count, C, list);
      return count.bytes();
    }
  };

  void pack(const int32_t* slot, int64_t count, float* panel) const {
    int32_t token[kPanel];
    for (int64_t p = 0; p < count; p++) token[p] = sample.token[slot[p]];
    form.pack(token, count, panel);
  }
  int64_t columns_of(int64_t i) const { return among ? among[i] : sample.n; }

  // Rows [begin, end), at most kBlock panels of them: row i is row i - begin of memory.lists.
  void search(int64_t begin, int64_t end, Memory& memory) const {
    const int64_t size = form.panel_size(), height = form.height();
    Lists& lists = memory.lists;
    lists.clear(end - begin);
    for (int64_t first = begin; first < end; first += kPanel) {
      pack(row + first, smaller(kPanel, end - first), memory.rows + (first - begin) / kPanel * size);
    }
    const TileHold registers(form);
    EarlyStop stops(form);
    float tile[kMostRows * kPanel] __attribute__((aligned(64)));
    for (int64_t at = 0; at < columns_of(end - 1); at += kPanel) {
      pack(column + at, smaller(kPanel, sample.n - at), memory.columns);
      for (int64_t r = begin; r < end; r += height) {
        const int64_t last = smaller(r + height, end), panel = (r - begin) / kPanel;
        if (columns_of(last - 1) <= at) continue;
        const float* a = form.at(memory.rows + panel * size, (r - begin) % kPanel);
        const auto far = [&] {
          form.lower_tile(a, memory.columns, tile);
          return !any_within(tile, height, lists.threshold + r - begin);
        };
        if (stops(far)) continue;
        form.template tile<2>(a, memory.columns, tile);
        for (int64_t i = r; i < last; i++) {
          for (int64_t p = 0; p < kPanel; p += kFloats) {
            const float* v = tile + (i - r) * kPanel + p;
            uint32_t bits = at_most(load(v), fill(lists.threshold[i - begin]));
            for (; bits; bits &= bits - 1) {
              const int64_t lane = __builtin_ctz(bits), c = at + p + lane;
              if (c < columns_of(i) && column[c] != row[i]) lists.offer(i - begin, v[lane], column[c]);
            }
          }
        }
      }
    }
  }
};

// The search for denser tokens of the slots that have none among their proven neighbours: against columns in order of
// density, so that the denser tokens of each slot are a prefix.
template <class A>
struct PeakSearch {
  static constexpr int64_t kList = 4;  // candidates per slot

  Streamed<A>* streamed;
  Neighbour* order;  // [n] (key, slot) ascending: the densest first
  int32_t* column;   // [n] its slots
  int32_t* peak;     // [peaks] slots, ascending in density order
  int64_t* denser;   // [peaks] how many tokens are denser
  int64_t peaks;

  void carve(Carver& memory, int64_t N) {
    order = memory.take<Neighbour>(N);
    column = memory.take<int32_t>(N);
    peak = memory.take<int32_t>(N);
    denser = memory.take<int64_t>(N);
  }

  // The slots to search for are those whose parent is kUnknownParent.
  void collect() {
    const State<A>& state = *streamed->state;
    const int64_t n = state.sample.n;
    for (int64_t i = 0; i < n; i++) order[i] = {state.key[i], int32_t(i)};
    sort_neighbours(order, n);
    peaks = 0;
    int64_t equal_from = 0;
    for (int64_t at = 0; at < n; at++) {
      const int32_t slot = order[at].slot;
      column[at] = slot;
      if (order[at].s != order[equal_from].s) equal_from = at;
      if (state.parent[slot] != kUnknownParent) continue;
      peak[peaks] = slot;
      denser[peaks++] = state.strict ? equal_from : at;
    }
  }

  void search(int64_t begin, int64_t end, typename RowSearch<A>::Memory& memory) const {
    State<A>& state = *streamed->state;
    bool is_fine = false;
    for (int64_t i = begin; i < end; i++) is_fine |= streamed->open[peak[i]];
    const Form<A>& form = is_fine ? state.sample.fine : state.sample.form;
    RowSearch<A>{state.sample, form, peak, denser, column}.search(begin, end, memory);
    for (int64_t i = begin; i < end; i++) {
      Neighbour list[kList];
      if (denser[i] == 0) {
        state.parent[peak[i]] = -1;
      } else if (prove(state.sample, form, memory.lists, i - begin, peak[i], denser[i], list) > 0) {
        state.delta[peak[i]] = list[0].s;
        state.parent[peak[i]] = list[0].slot;
      } else {
        state.find_parent_exactly(peak[i]);
      }
    }
  }
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
