// Search among tokens that are gathered, by NearbySearch. On a walk the time grows as N^1.2. What a search does not
// prove is decided over all in float64.
#pragma once

#include "nearby.h"
#include "score_rows.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// What a search may accept: every column, or every one but the row itself.
constexpr auto any_token = [](int32_t, int32_t) { return true; };
constexpr auto another_token = [](int32_t i, int32_t j) { return i != j; };
constexpr auto any_ball = [](int64_t, int64_t) { return [](int64_t) { return true; }; };

template <class A>
struct Nearby {
  static constexpr bool kLabels = true;
  static constexpr int64_t kList = 4;  // candidates that prove the nearest one

  State<A>* state;
  Places<A> places;  // in the memory of state->panels, until the tokens are packed there
  Balls<A> balls;
  Placed* placed;        // [N]
  int32_t* place;        // [N] slots in an order by place
  int32_t *row, *other;  // [N] some of them: those that ask, those that are asked; lent
  double* of_ball;       // [balls]
  double far_apart;      // a large distance, squared
  int64_t length;        // of a list of neighbours

  // Floats of a panel, which has room for the places, too.
  static int64_t room(int64_t C) { return larger(panel_room(C), kPanel * kPanel); }

  void carve(Carver& memory, int64_t N, int64_t C, int64_t list, int32_t* lent, int32_t* lent_too) {
    length = list;
    row = lent;
    other = lent_too;
    const int64_t most = groups_of(N, kPanel);
    places = {&state->sample, state->panels};
    balls.carve(memory, most, C);
    placed = memory.take<Placed>(N);
    place = memory.take<int32_t>(N);
    of_ball = memory.take<double>(most);
  }

  // Whether the tokens are gathered, so that balls pay.
  bool takes(const Parallel& pool) { return places.gathered(placed, pool); }

  // The nearest are `length` - 1 or fewer.
  void find_nearest(Workers& workers) {
    const Parallel& pool = workers.pool;
    const int64_t n = state->sample.n;
    places.order(placed, place, pool);
    const int32_t far = places.far_from(0, placed, n);
    far_apart = state->sample.distance(far, places.far_from(far, placed, n));
    balls.build(state->sample, place, n, kPanel, state->panels, pool);
    const NearbySearch<A> search = {state->sample, balls, place};
    search.for_blocks(n, length, workers, [&](int64_t begin, int64_t end, auto& memory) {
      search.search(begin, end, memory, another_token, any_ball);
      Neighbour list[kLongest + kSpare];
      for (int64_t at = begin; at < end; at++) {
        const int32_t i = place[at];
        const int64_t proven = search.prove(memory.lists, at - begin, i, list);
        state->near_count[i] = -1;
        if (proven >= state->wanted) state->set_nearest(i, list, proven);
      }
    });
    for_rows(workers, n, 0, [&](int64_t i, const RowRoom& room) {
      if (state->near_count[i] < 0) state->set_nearest_exactly(i, room.list);
    });
  }

  void find_parents(Workers& workers) {
    int64_t rows = 0;
    for (int64_t at = 0; at < state->sample.n; at++) {
      if (!state->find_parent_nearby(place[at])) row[rows++] = place[at];
    }
    double* const densest = of_ball;
    for (int64_t p = 0; p < balls.count; p++) {
      densest[p] = __builtin_inf();
      for (int64_t at = balls.begin(p); at < balls.end(p); at++) {
        densest[p] = smaller_of(state->key[place[at]], densest[p]);  // NaN, by noise, is not
      }
    }
    const auto denser = [&](int32_t i, int32_t j) { return state->denser(j, i); };
    const auto with_denser = [&](int64_t from, int64_t to) {
      double sparsest = -__builtin_inf();
      for (int64_t at = from; at < to; at++) sparsest = larger_of(state->key[row[at]], sparsest);
      return [=](int64_t ball) { return densest[ball] <= sparsest; };
    };
    const NearbySearch<A> search = {state->sample, balls, row};
    search.for_blocks(rows, kList, workers, [&](int64_t begin, int64_t end, auto& memory) {
      search.search(begin, end, memory, denser, with_denser);
      Neighbour list[kList];
      for (int64_t at = begin; at < end; at++) {
        const int32_t i = row[at];
        if (memory.lists.count(at - begin) == 0) {
          state->parent[i] = -1;
        } else if (search.prove(memory.lists, at - begin, i, list) > 0) {
          state->delta[i] = list[0].s;
          state->parent[i] = list[0].slot;
        } else {
          state->find_parent_exactly(i);
        }
      }
    });
  }

  double largest(Workers& workers) const {
    return largest_distance(state->sample, balls, far_apart, workers.pool, of_ball);
  }

  // labels [N] by the nearest of the selected tokens index [K], whose balls take the place of all tokens'.
  void label(const int64_t* index, int64_t K, int64_t* labels, Workers& workers) {
    const Sample<A>& sample = state->sample;
    for (int64_t t = 0; t < sample.N; t++) labels[t] = -1;
    for (int64_t j = 0; j < K; j++) labels[index[j]] = sample.valid[index[j]] ? j : -1;
    int64_t centres = 0, rows = 0;
    for (int64_t at = 0; at < sample.n; at++) {
      const bool selected = labels[sample.token[place[at]]] >= 0;
      (selected ? other[centres++] : row[rows++]) = place[at];
    }
    if (centres == 0) return;
    balls.build(sample, other, centres, kPanel, state->panels, workers.pool);
    const NearbySearch<A> search = {sample, balls, row};
    search.for_blocks(rows, kList, workers, [&](int64_t begin, int64_t end, auto& memory) {
      search.search(begin, end, memory, any_token, any_ball);
      Neighbour list[kList];
      for (int64_t at = begin; at < end; at++) {
        const int32_t i = row[at];
        if (search.prove(memory.lists, at - begin, i, list) == 0) list[0] = nearest_centre(i, centres);
        if (list[0].s < __builtin_inf()) labels[sample.token[i]] = labels[sample.token[list[0].slot]];
      }
    });
  }

 private:
  Neighbour nearest_centre(int32_t i, int64_t centres) const {
    Neighbour nearest = {__builtin_inf(), kNoSlot};
    for (int64_t at = 0; at < centres; at++) {
      const Neighbour next = {state->sample.distance(i, other[at]), other[at]};
      if (before(next, nearest)) nearest = next;
    }
    return nearest;
  }
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
