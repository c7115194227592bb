// Search with all tile distances stored: for samples small enough that the N x N matrix stays in the caches.
#pragma once

#include "score_matrix.h"
#include "score_rows.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kStoredTokens = 1536;

template <class A>
struct Stored : Matrix<A> {
  static constexpr bool kLabels = true;

  using Matrix<A>::state, Matrix<A>::panels, Matrix<A>::stride, Matrix<A>::row, Matrix<A>::bound, Matrix<A>::fine;
  using Matrix<A>::undecided, Matrix<A>::refined, Matrix<A>::far, Matrix<A>::cut, Matrix<A>::open;
  float* apart;  // [stride] 0 for the selected slots, else infinity
  int64_t centres;
  bool packed;        // the panels are
  bool need_largest;  // so no block may be left out

  void carve(Carver& memory, int64_t N, bool labels, bool largest_too) {
    Matrix<A>::carve(memory, N);
    need_largest = largest_too;
    apart = labels ? memory.take<float>(stride) : nullptr;
  }

  void find_nearest(Workers& workers) {
    const bool refines = state->sample.form.quantised();
    this->search(workers.pool, packed, need_largest);
    for_rows_twice(
        workers, [&](int64_t i, const RowRoom& room, bool may_wait) { set_nearest(i, room, may_wait && refines); },
        [&] { this->refine(workers.pool); });
  }

  void find_parents(Workers& workers) {
    for_rows_twice(
        workers, [&](int64_t i, const RowRoom& room, bool may_wait) { set_parent(i, room, may_wait); },
        [&] { this->complete(workers.pool); });
  }

  // labels [N] by the nearest of the selected tokens index [K].
  void label(const int64_t* index, int64_t K, int64_t* labels, Workers& workers) {
    const Sample<A>& sample = state->sample;
    set_centres(index, K, labels);
    if (centres == 0) return;
    const auto set_label = [&](int64_t i, const RowRoom& room, bool may_wait) {
      int64_t& of_row = labels[sample.token[i]];
      if (of_row >= 0) return;
      const int32_t nearest = nearest_centre(i, room, may_wait);
      if (!may_wait || !open[i]) of_row = nearest < 0 ? -1 : labels[sample.token[nearest]];
    };
    for_rows_twice(workers, set_label, [&] { this->complete(workers.pool); });
  }

  // The largest squared distance over all pairs; no block is far.
  double largest(Workers&) const {
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

 private:
  // f(i, room, true) for all rows and, after `between`, f(i, room, false) for those that are open then.
  template <class F, class G>
  void for_rows_twice(Workers& workers, const F& f, const G& between) const {
    const int64_t n = state->sample.n;
    for_rows(workers, n, stride, [&](int64_t i, const RowRoom& room) {
      open[i] = false;
      f(i, room, true);
    });
    if (workers.failed || !this->any_open()) return;
    between();
    for_rows(workers, n, stride, [&](int64_t i, const RowRoom& room) {
      if (open[i]) f(i, room, false);
    });
  }

  // Row i by what its values are worth: those of far blocks in room.far, of refined ones in room.fine, the others in
  // room.rest; infinity where the value is in another one, or where `apart`, if given, says so (its 0 or infinity is
  // added).
  void split(int64_t i, const float* apart, const RowRoom& room) const {
    const float* v = row(i);
    const int64_t panel = i / kPanel, count = groups_of(state->sample.n, kPanel);
    const auto put = [&](float* to, int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j++) to[j] = apart ? v[j] + apart[j] : v[j];
    };
    if (!refined[panel] && !cut[panel]) return put(room.rest, 0, count * kPanel);
    for (int64_t j = 0; j < count * kPanel; j++) room.rest[j] = room.fine[j] = room.far[j] = __builtin_inff();
    for (int64_t p = 0; p < count; p++) {
      const int64_t block = panel * panels + p;
      put(far[block]                           ? room.far
          : undecided[block] && refined[panel] ? room.fine
                                               : room.rest,
          p * kPanel, (p + 1) * kPanel);
    }
  }

  // Whether s keeps out infinity, which in a split row is no value. It does not where nothing is proven.
  bool reaches(double s) const { return bound.reach(s) < __builtin_inff(); }

  // Calls f(j) for all slots j whose value in row i, split, may belong to a squared distance of at most s (reaches).
  template <class F>
  void for_each_in_reach(int64_t i, const RowRoom& room, double s, const F& f) const {
    const int64_t n = state->sample.n;
    for_each_within(room.rest, n, bound.reach(s), f);
    if (refined[i / kPanel]) for_each_within(room.fine, n, fine.reach(s), f);
    if (cut[i / kPanel]) for_each_within(room.far, n, bound.reach(s), f);
  }

  // m and the nearest neighbours of slot i. may_wait: if many candidates are left, they are counted for `refine`
  // instead.
  void set_nearest(int64_t i, const RowRoom& room, bool may_wait) const {
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
      split(i, nullptr, room);
      const double s = smaller_of(bound.most(ranked), fine.most(ranked_smallest(room.fine, n, wanted)));
      if (reaches(s)) for_each_in_reach(i, room, s, collect);
    } else {
      for_each_within(v, n, bound.reach(bound.most(ranked)), collect);
    }
    if (count < wanted) return state->set_nearest_exactly(i, list);
    if (may_wait && count > 2 * wanted + 2) {
      open[i] = true;
      return this->tally(undecided, i, list, count);
    }
    state->resolve(i, list, count, wanted);
    state->set_nearest(i, list, wanted);
  }

  // The parent of slot i: the nearest denser token, or -1. may_wait: not where that takes many distances.
  void set_parent(int64_t i, const RowRoom& room, bool may_wait) const {
    if (state->find_parent_nearby(i)) return;
    const int64_t n = state->sample.n;
    const auto as_float = [](int32_t bits) {
      float v;
      memcpy(&v, &bits, 4);
      return v;
    };
    const int32_t least = state->least_denser(i, row(i));
    state->parent[i] = -1;
    if (least >= kInfiniteBits) {
      if (least != kNoBits) state->find_parent_exactly(i);
      return;
    }
    int64_t count = 0;
    const auto collect = [&](int64_t j) {
      if (j != i && state->denser(j, i)) room.list[count++].slot = int32_t(j);
      return true;
    };
    if (!refined[i / kPanel] && !cut[i / kPanel]) {
      for_each_within(row(i), n, bound.reach(bound.most(as_float(least))), collect);
    } else {
      split(i, nullptr, room);
      double s = bound.most(as_float(state->least_denser(i, room.rest)));
      if (refined[i / kPanel]) s = smaller_of(s, fine.most(as_float(state->least_denser(i, room.fine))));
      if (!reaches(s)) return state->find_parent_exactly(i);  // in far blocks only, or out of floats' range
      for_each_in_reach(i, room, s, collect);
    }
    if (may_wait && this->wait(i, room.list, count)) return;
    state->resolve(i, room.list, count, 1);
    state->delta[i] = room.list[0].s;
    state->parent[i] = room.list[0].slot;
  }

  // Takes the valid tokens of index [K] (ascending) as centres; labels [N]: their positions in index, else -1.
  void set_centres(const int64_t* index, int64_t K, int64_t* labels) {
    const Sample<A>& sample = state->sample;
    for (int64_t t = 0; t < sample.N; t++) labels[t] = -1;
    for (int64_t i = 0; i < stride; i++) apart[i] = __builtin_inff();
    centres = 0;
    for (int64_t i = 0, j = 0; i < sample.n && j < K; i++) {
      while (j < K && index[j] < sample.token[i]) j++;  // selected, but not valid
      if (j == K || index[j] != sample.token[i]) continue;
      labels[sample.token[i]] = j;
      apart[i] = 0;
      centres++;
    }
  }

  // The centre (a slot) that is nearest to slot i, the lowest on a tie; -1 where float64 cannot hold the distance.
  // may_wait: any where that takes many distances; the row is then open.
  int32_t nearest_centre(int64_t i, const RowRoom& room, bool may_wait) const {
    const int64_t n = state->sample.n;
    split(i, apart, room);
    double s = bound.most(least_of(room.rest, n));
    if (refined[i / kPanel]) s = smaller_of(s, fine.most(least_of(room.fine, n)));
    Neighbour* const list = room.list;
    int64_t found = 0;
    const auto collect = [&](int64_t j) {
      list[found++].slot = int32_t(j);
      return true;
    };
    if (reaches(s)) {
      for_each_in_reach(i, room, s, collect);
    } else {  // in far blocks only, or out of the range of floats
      for (int64_t j = 0; j < n; j++) {
        if (apart[j] == 0) collect(j);
      }
    }
    if (found == 1 && sizeof(A) == 4) return list[0].slot;  // the only one needs no distance
    if (may_wait && this->wait(i, list, found)) return list[0].slot;
    state->resolve(i, list, found, 1);
    return list[0].s < __builtin_inf() ? list[0].slot : -1;
  }
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
