// Search with all tile distances stored: for samples small enough that the N x N matrix stays in the caches.
//
// Where the search form leaves many neighbours undecided (near-duplicates, quantised), the blocks that hold them are
// computed again in the fine form. Values of both are in the unit of the search form.
#pragma once

#include "score_state.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kStoredTokens = 1536;

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

// What one thread needs for a row: a list of neighbours, and room for the parts of a row.
struct RowRoom {
  Neighbour* list;     // [n + kKept]
  float *rest, *fine;  // [stride] each

  static int64_t bytes(int64_t n, int64_t stride) {
    Carver count(nullptr);
    RowRoom().carve(count, n, stride);
    return count.bytes();
  }
  void carve(Carver& memory, int64_t n, int64_t stride) {
    list = memory.take<Neighbour>(n + kKept);
    rest = memory.take<float>(stride);
    fine = memory.take<float>(stride);
  }
};

template <class A>
struct Stored {
  State<A>* state;
  int64_t stride, panels;
  float* values;       // [n][stride], infinity on the diagonal and past n
  int32_t* undecided;  // [panels][panels] candidates of undecided rows; from `refine` on, nonzero: a refined block
  bool* open;          // [n] rows that `refine` is for
  bool* refined;       // [panels] panels of rows with a refined block
  bool any_refined;
  Bound bound, fine;  // of all values, of those in refined blocks

  void carve(Carver& memory, int64_t N) {
    panels = ceil_div(N, kPanel);
    stride = panels * kPanel;
    values = memory.take<float>(stride * stride);
    undecided = memory.take<int32_t>(panels * panels);
    open = memory.take<bool>(N);
    refined = memory.take<bool>(panels);
  }
  const float* row(int64_t i) const { return values + i * stride; }

  // Tile distances between panels p <= q in `form`, times `unit`, on both sides of the diagonal.
  void fill_block(const Form<A>& form, float unit, int64_t p, int64_t q) const {
    const int64_t size = form.panel_size();
    float tile[kRows * kPanel] __attribute__((aligned(64)));
    const float* b = state->panels + q * size;
    for (int64_t r = 0; r < kPanel; r += kRows) {
      const float* a = state->panels + p * size + r;
      const int64_t row = p * kPanel + r, column = q * kPanel;
      // Rows of the lower half of a diagonal block need its right half only: the other is above them, mirrored.
      const int64_t from = p == q && r >= kFloats ? kFloats : 0;
      if (from) {
        form.template tile<1>(a, b + from, tile + from);
      } else {
        form.template tile<2>(a, b, tile);
      }
      for (int64_t at = 0; unit != 1 && at < kRows * kPanel; at++) tile[at] *= unit;
      for (int64_t i = 0; i < kRows; i++) {
        memcpy(values + (row + i) * stride + column + from, tile + i * kPanel + from,
               size_t(kPanel - from) * sizeof(float));
      }
      const int64_t mirrored = p == q ? (r < kFloats ? kFloats : kPanel) : 0;
      for (int64_t j = mirrored; j < kPanel; j++) {
        for (int64_t i = 0; i < kRows; i++) values[(column + j) * stride + row + i] = tile[i * kPanel + j];
      }
    }
  }

  // Fills the blocks (p, q), p <= q, that `wanted` names, from panels that hold some of them.
  template <class P, class F>
  void fill(const Form<A>& form, float unit, const Parallel& pool, const P& holds_some, const F& wanted) const {
    const int64_t n = state->sample.n, count = ceil_div(n, kPanel);
    pack_panels(form, state->sample.token, n, pool, state->panels, holds_some);
    const int64_t grain = larger(1, 200000 / (state->sample.C * kPanel * kPanel / kFloats));
    parallel_for(pool, count * (count + 1) / 2, grain, [&](int64_t begin, int64_t end) {
      int64_t q = 0;  // block t is (p, q) with p <= q and t = q (q + 1) / 2 + p
      while ((q + 1) * (q + 2) / 2 <= begin) q++;
      for (int64_t t = begin, p = begin - q * (q + 1) / 2; t < end; t++) {
        if (wanted(p, q)) fill_block(form, unit, p, q);
        if (p++ == q) {
          q++;
          p = 0;
        }
      }
    });
    for (int64_t i = 0; i < n; i++) values[i * stride + i] = __builtin_inff();
  }

  bool any_open() const {
    bool any = false;
    for (int64_t i = 0; i < state->sample.n; i++) any |= open[i];
    return any;
  }

  void search(const Parallel& pool) {
    bound = fine = state->sample.form.bound;
    any_refined = false;
    for (int64_t at = 0; at < panels * panels; at++) undecided[at] = 0;
    for (int64_t i = 0; i < state->sample.n; i++) open[i] = false;
    for (int64_t p = 0; p < panels; p++) refined[p] = false;
    fill(state->sample.form, 1, pool, [](int64_t) { return true; }, [](int64_t, int64_t) { return true; });
  }

  // Computes the blocks that hold many candidates of the open rows again, in the fine form. Packs over state->panels.
  void refine(const Parallel& pool) {
    constexpr int32_t kWorth = 48;  // so many candidates cost as much in float64 as their whole block does here
    const Form<A>&form = state->sample.form, &finer = state->sample.fine;
    for (int64_t p = 0; p < panels; p++) {
      for (int64_t q = p; q < panels; q++) {
        int32_t &upper = undecided[p * panels + q], &lower = undecided[q * panels + p];
        upper = lower = (p == q ? upper : upper + lower) >= kWorth;
        refined[p] |= upper != 0;
        refined[q] |= upper != 0;
        any_refined |= upper != 0;
      }
    }
    if (!any_refined) return;
    fine = finer.bound_in(form);
    bound = {fine.beta > bound.beta ? fine.beta : bound.beta, fine.eta > bound.eta ? fine.eta : bound.eta};
    fill(
        finer, float(form.unit() / finer.unit()), pool, [&](int64_t p) { return refined[p]; },
        [&](int64_t p, int64_t q) { return undecided[p * panels + q] != 0; });
  }

  // The values of row i at the slots column(0 .. count - 1) by what they are worth: those of refined blocks in
  // room.fine, the others in room.rest, infinity where the value is in the other one.
  template <class F>
  void split(int64_t i, int64_t count, const F& column, const RowRoom& room) const {
    const float* v = row(i);
    const int64_t padded = ceil_div(count, kFloats) * kFloats;
    for (int64_t j = 0; j < count; j++) room.rest[j] = v[column(j)];
    for (int64_t j = count; j < padded; j++) room.rest[j] = __builtin_inff();
    if (!refined[i / kPanel]) return;
    const int32_t* is_refined = undecided + i / kPanel * panels;
    for (int64_t j = 0; j < padded; j++) {
      const bool is_fine = j < count && is_refined[column(j) / kPanel] != 0;
      room.fine[j] = is_fine ? room.rest[j] : __builtin_inff();
      room.rest[j] = is_fine ? __builtin_inff() : room.rest[j];
    }
  }

  // Calls f(j) for all j < count whose value in row i, split, may belong to a squared distance of at most s (finite).
  template <class F>
  void for_each_in_reach(int64_t i, const RowRoom& room, int64_t count, double s, const F& f) const {
    for_each_within(room.rest, count, bound.reach(s), f);
    if (refined[i / kPanel]) for_each_within(room.fine, count, fine.reach(s), f);
  }

  // m and the nearest neighbours of slot i. may_open: if many candidates are left, they are counted for `refine`
  // instead.
  void set_nearest(int64_t i, const RowRoom& room, bool may_open) const {
    const int64_t n = state->sample.n, wanted = state->wanted;
    const float *v = row(i), ranked = wanted ? ranked_smallest(v, n, wanted) : 0;
    Neighbour* const list = room.list;
    int64_t count = 0;
    if (ranked == 0) {  // equal tokens settle it: any further ones have higher slots
      for_each_within(v, n, 0, [&](int64_t j) {
        if (count < wanted && state->sample.equal(i, j)) list[count++] = {0.0, int32_t(j)};
        return count < wanted;
      });
      if (count == wanted) return state->set_nearest(i, list, count);
      count = 0;
    }
    const auto collect = [&](int64_t j) {
      if (j != i) list[count++].slot = int32_t(j);
      return true;
    };
    if (refined[i / kPanel]) {
      split(i, n, [](int64_t j) { return j; }, room);
      const double s = smaller_of(bound.most(ranked), fine.most(ranked_smallest(room.fine, n, wanted)));
      if (s < __builtin_inf()) for_each_in_reach(i, room, n, s, collect);
    } else {
      for_each_within(v, n, bound.reach(bound.most(ranked)), collect);
    }
    if (count < wanted) return state->set_nearest_exactly(i, list);
    if (may_open && count > 2 * wanted + 2) {
      open[i] = true;
      for (int64_t c = 0; c < count; c++) {
        __atomic_fetch_add(undecided + i / kPanel * panels + list[c].slot / kPanel, 1, __ATOMIC_RELAXED);
      }
      return;
    }
    for (int64_t c = 0; c < count; c++) list[c].s = state->sample.distance(i, list[c].slot);
    sort_neighbours(list, count);
    state->set_nearest(i, list, wanted);
  }

  // The parent of slot i: the nearest denser token, or -1.
  void set_parent(int64_t i, const RowRoom& room) const {
    if (state->find_parent_nearby(i)) return;
    const int64_t n = state->sample.n;
    const double key = state->key[i], *keys = state->key;
    // Bit patterns of non-negative floats order like integers, which lets the loops below vectorise.
    constexpr int32_t kNone = 0x7fffffff, kInfinite = 0x7f800000;
    const auto least_denser = [&](const float* v) {
      const auto scan = [&](int64_t begin, int64_t end, bool or_equal) {
        int32_t least = kNone;
        for (int64_t j = begin; j < end; j++) {
          int32_t bits;
          memcpy(&bits, v + j, 4);
          const bool denser = or_equal ? keys[j] <= key : keys[j] < key;
          bits = denser ? bits : kNone;
          least = bits < least ? bits : least;
        }
        return least;
      };
      const int32_t before = scan(0, i, !state->strict), after = scan(i + 1, n, false);
      return before < after ? before : after;
    };
    const auto as_float = [](int32_t bits) {
      float v;
      memcpy(&v, &bits, 4);
      return v;
    };
    const int32_t least = least_denser(row(i));
    state->parent[i] = -1;
    if (least >= kInfinite) {
      if (least != kNone) state->find_parent_exactly(i);
      return;
    }
    double s = bound.most(as_float(least));
    const auto consider = [&](int64_t j) {
      if (j == i || !state->denser(j, i)) return true;
      const Neighbour next = {state->sample.distance(i, j), int32_t(j)};
      if (state->parent[i] < 0 || before(next, {state->delta[i], state->parent[i]})) {
        state->delta[i] = next.s;
        state->parent[i] = next.slot;
      }
      return true;
    };
    if (refined[i / kPanel]) {
      split(i, n, [](int64_t j) { return j; }, room);
      const int32_t finer = least_denser(room.fine);
      if (finer < kInfinite) s = smaller_of(s, fine.most(as_float(finer)));
      for_each_in_reach(i, room, n, s, consider);
    } else {
      for_each_within(row(i), n, bound.reach(s), consider);
    }
  }

  // The largest squared distance over all pairs.
  double largest() const {
    const int64_t n = state->sample.n;
    const auto largest_of = [&](int64_t i) {
      int32_t most = 0;
      for (int64_t j = i + 1; j < n; j++) {
        int32_t bits;
        memcpy(&bits, row(i) + j, 4);
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
    if (most == 0 && state->all_equal()) return 0;
    const float from = bound.floor_of(bound.least(most));
    double found = 0;
    for (int64_t i = 0; i < n; i++) {
      if (largest_of(i) < from) continue;
      for (int64_t j = i + 1; j < n; j++) {
        if (row(i)[j] < from) continue;
        const double s = state->sample.distance(i, j);
        found = s > found ? s : found;
      }
    }
    return found;
  }

  // Which of the slots centre[0 .. count) (ascending) is nearest to slot i: a position in centre, the lowest on a
  // tie; -1 where float64 cannot hold the distance.
  int64_t nearest_centre(int64_t i, const int32_t* centre, int64_t count, const RowRoom& room) const {
    split(i, count, [&](int64_t j) { return centre[j]; }, room);
    double s = bound.most(least_of(room.rest, count));
    if (refined[i / kPanel]) s = smaller_of(s, fine.most(least_of(room.fine, count)));
    const auto distance_to = [&](int64_t j) { return state->sample.distance(i, centre[j]); };
    int64_t candidates = 0;
    Neighbour best = {0, -1};
    const auto consider = [&](int64_t j) {
      if (candidates++ == 0) {  // the only one needs no distance
        best.slot = int32_t(j);
        return true;
      }
      if (candidates == 2) best.s = distance_to(best.slot);
      const Neighbour next = {distance_to(j), int32_t(j)};
      if (before(next, best)) best = next;
      return true;
    };
    for_each_in_reach(i, room, count, s, consider);
    const bool overflows = sizeof(A) == 8 && best.slot >= 0 && distance_to(best.slot) == __builtin_inf();
    return overflows ? -1 : best.slot;
  }
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
