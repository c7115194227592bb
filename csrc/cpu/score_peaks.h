// The parents of slots that have no denser token among their nearest.
#pragma once

#include "score_rows.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// The search for denser tokens of the slots that have none among their proven neighbours: against columns in order of
// density, so that the denser tokens of each slot are a prefix.
template <class A>
struct PeakSearch {
  static constexpr int64_t kList = 4;  // candidates per slot

  State<A>* state;
  const bool* open;  // [n] slots whose distances take the fine form; null: all
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

  // The parents of all slots.
  void find_parents(Workers& workers) {
    parallel_for(workers.pool, state->sample.n, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        if (!state->find_parent_nearby(i)) state->parent[i] = state->key[i] == state->key[i] ? kUnknownParent : -1;
      }
    });
    collect();
    RowSearch<A>::for_blocks(
        peaks, state->sample.C, kList, workers,
        [&](int64_t begin, int64_t end, typename RowSearch<A>::Memory& memory) { search(begin, end, memory); });
  }

 private:
  static constexpr int32_t kUnknownParent = -2;

  // The slots to search for are those whose parent is kUnknownParent.
  void collect() {
    const int64_t n = state->sample.n;
    for (int64_t i = 0; i < n; i++) {
      const double key = state->key[i];
      order[i] = {key == key ? key : __builtin_inf(), int32_t(i)};  // NaN, by noise, is denser than nobody
    }
    sort_neighbours(order, n);
    peaks = 0;
    int64_t equal_from = 0;
    for (int64_t at = 0; at < n; at++) {
      const int32_t slot = order[at].slot;
      column[at] = slot;
      if (order[at].s != order[equal_from].s) equal_from = at;
      if (state->parent[slot] != kUnknownParent) continue;
      peak[peaks] = slot;
      denser[peaks++] = state->strict ? equal_from : at;
    }
  }

  void search(int64_t begin, int64_t end, typename RowSearch<A>::Memory& memory) const {
    bool is_fine = open == nullptr;
    for (int64_t i = begin; !is_fine && i < end; i++) is_fine = open[peak[i]];
    const Form<A>& form = is_fine ? state->sample.fine : state->sample.form;
    RowSearch<A>{state->sample, form, peak, denser, column}.search(begin, end, memory);
    for (int64_t i = begin; i < end; i++) {
      Neighbour list[kList];
      if (denser[i] == 0) {
        state->parent[peak[i]] = -1;
      } else if (prove(state->sample, form, memory.lists, i - begin, peak[i], denser[i], list) > 0) {
        state->delta[peak[i]] = list[0].s;
        state->parent[peak[i]] = list[0].slot;
      } else {
        state->find_parent_exactly(peak[i]);
      }
    }
  }
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
