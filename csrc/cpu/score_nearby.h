// The steps of scoring for tokens that are gathered, by NearbySearch: neighbours, parents, the largest distance,
// labels. On a walk the time grows as N^1.2. What a search does not prove is decided over all in
// float64.
#pragma once

#include "nearby.h"
#include "score_state.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// What a search may accept: every column, or every one but the row itself.
constexpr auto any_token = [](int32_t, int32_t) { return true; };
constexpr auto another_token = [](int32_t i, int32_t j) { return i != j; };
constexpr auto any_ball = [](int64_t, int64_t) { return [](int64_t) { return true; }; };

template <class A>
struct Nearby {
  static constexpr int64_t kList = 4;  // candidates that prove the nearest one

  State<A>* state;
  Places<A> places;  // in the memory of state->panels, until the tokens are packed there
  Balls<A> balls;
  Placed* placed;        // [N]
  int32_t* place;        // [N] slots in an order by place
  int32_t *row, *other;  // [N] some of them: those that ask, those that are asked; lent
  double* of_ball;       // [balls]
  double far_apart;      // a large distance, squared

  // Floats of a panel, which has room for the places, too.
  static int64_t room(int64_t C) { return larger(panel_room(C), kPanel * kPanel); }

  void carve(Carver& memory, int64_t N, int64_t C) {
    const int64_t most = groups_of(N, kPanel);
    places = {&state->sample, state->panels};
    balls.carve(memory, most, C);
    placed = memory.take<Placed>(N);
    place = memory.take<int32_t>(N);
    of_ball = memory.take<double>(most);
  }

  // m and the `length` - 1 nearest or fewer of every slot; near_count is -1 where they are not proven.
  // reserve(bytes): memory of the running thread, or null.
  template <class Reserve>
  void find_nearest(int64_t length, const Parallel& pool, const Reserve& reserve) {
    const int64_t n = state->sample.n;
    places.order(placed, place, pool);
    const int32_t far = places.far_from(0, placed, n);
    far_apart = state->sample.distance(far, places.far_from(far, placed, n));
    balls.build(state->sample, place, n, kPanel, state->panels, pool);
    const NearbySearch<A> search = {state->sample, balls, place};
    search.for_blocks(n, length, pool, reserve, [&](int64_t begin, int64_t end, auto& memory) {
      search.search(begin, end, memory, another_token, any_ball);
      Neighbour list[kLongest + kSpare];
      for (int64_t at = begin; at < end; at++) {
        const int32_t i = place[at];
        const int64_t proven = search.prove(memory.lists, at - begin, i, list);
        state->near_count[i] = -1;
        if (proven >= state->wanted) state->set_nearest(i, list, proven);
      }
    });
  }

  // The parents of the slots that find_parent_nearby does not find.
  template <class Reserve>
  void find_parents(const Parallel& pool, const Reserve& reserve) {
    int64_t rows = 0;
    for (int64_t at = 0; at < state->sample.n; at++) {
      if (!state->find_parent_nearby(place[at])) row[rows++] = place[at];
    }
    double* const densest = of_ball;
    for (int64_t p = 0; p < balls.count; p++) {
      densest[p] = __builtin_inf();
      for (int64_t at = balls.begin(p); at < balls.end(p); at++) {
        densest[p] = smaller_of(densest[p], state->key[place[at]]);
      }
    }
    const auto denser = [&](int32_t i, int32_t j) { return state->denser(j, i); };
    const auto with_denser = [&](int64_t from, int64_t to) {
      double sparsest = state->key[row[from]];
      for (int64_t at = from; at < to; at++) sparsest = larger_of(sparsest, state->key[row[at]]);
      return [=](int64_t ball) { return densest[ball] <= sparsest; };
    };
    const NearbySearch<A> search = {state->sample, balls, row};
    search.for_blocks(rows, kList, pool, reserve, [&](int64_t begin, int64_t end, auto& memory) {
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

  double largest(const Parallel& pool) const {
    return largest_distance(state->sample, balls, far_apart, pool, of_ball);
  }

  // labels[t]: at a selected token its position, else -1; becomes that of the nearest selected one. The balls are then
  // those of the selected.
  template <class Reserve>
  void label(int64_t* labels, const Parallel& pool, const Reserve& reserve) {
    const Sample<A>& sample = state->sample;
    int64_t centres = 0, rows = 0;
    for (int64_t at = 0; at < sample.n; at++) {
      const bool selected = labels[sample.token[place[at]]] >= 0;
      (selected ? other[centres++] : row[rows++]) = place[at];
    }
    if (centres == 0) return;
    balls.build(sample, other, centres, kPanel, state->panels, pool);
    const NearbySearch<A> search = {sample, balls, row};
    search.for_blocks(rows, kList, pool, reserve, [&](int64_t begin, int64_t end, auto& memory) {
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
