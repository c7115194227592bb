// The nearest columns of rows among tokens that are gathered: ball by ball, the nearest balls first, until none that is
// left can hold a nearer token. In motion a few of a hundred balls are looked at.
#pragma once

#include "balls.h"
#include "each_sample.h"
#include "lists.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

template <class A>
struct NearbySearch {
  static constexpr int64_t kBlock = kRows * kRows;  // rows per task: as many balls as a row of tiles has

  const Sample<A>& sample;
  const Balls<A>& columns;
  const int32_t* row;  // slots in an order by place

  struct Memory {
    float *rows, *least;
    Neighbour* waiting;  // balls, as a heap: the nearest on top
    Balls<A> balls;      // of kRows rows
    Lists lists;

    void carve(Carver& memory, int64_t C, int64_t columns, int64_t length) {
      rows = memory.take<float>(rounded_up(kBlock, kPanel) * C);
      least = memory.take<float>(kRows * rounded_up(columns, kPanel));
      waiting = memory.take<Neighbour>(columns);
      balls.carve(memory, kRows, C);
      lists.carve(memory, kBlock, length);
    }
  };

  // For rows [begin, end), at most kBlock, row i as row i - begin of memory.lists: the nearest of the columns that
  // accepts(slot of the row, slot of the column). wants(from, to) gives a test of balls: those that hold none that rows
  // [from, to) accept may fail it.
  template <class Accepts, class Wants>
  void search(int64_t begin, int64_t end, Memory& memory, const Accepts& accepts, const Wants& wants) const {
    const Balls<A>& rows = memory.balls;
    memory.lists.clear(end - begin);
    memory.balls.build(sample, row + begin, end - begin, kRows, memory.rows, {nullptr, 1});
    columns.separate(rows, memory.least);
    EarlyStop stops(sample.fine);
    for (int64_t r = 0; r < rows.count; r++) {
      search_ball(r, memory, stops, accepts, wants(begin + rows.begin(r), begin + rows.end(r)));
    }
  }

  // The rows of one ball against all columns.
  template <class Accepts, class Wanted>
  void search_ball(int64_t r, Memory& memory, EarlyStop& stops, const Accepts& accepts, const Wanted& wanted) const {
    const Lists& lists = memory.lists;
    const int64_t stride = rounded_up(columns.count, kPanel);
    float* const least = memory.least + r * stride;
    const int64_t from = memory.balls.begin(r), to = memory.balls.end(r);
    for (int64_t q = 0; q < columns.count; q++) least[q] = wanted(q) ? least[q] : __builtin_inff();
    const float nearest = least_of(least, stride);
    if (nearest == __builtin_inff()) return;
    for_each_within(least, columns.count, nearest, [&](int64_t q) {
      compare(r, q, memory, stops, accepts);
      least[q] = __builtin_inff();
      return false;
    });
    const auto nearer = [](const Neighbour& a, const Neighbour& b) { return before(a, b); };
    int64_t count = 0;
    for_each_within(least, columns.count, lists.reach(from, to), [&](int64_t q) {
      if (least[q] < __builtin_inff()) memory.waiting[count++] = {least[q], int32_t(q)};
      return true;
    });
    for (int64_t at = count / 2; at-- > 0;) sink(memory.waiting, at, count, nearer);
    for (; count > 0; count--) {
      const Neighbour ball = memory.waiting[0];
      if (!lists.may_take(from, to, ball.s, 0)) return;
      if (lists.may_take(from, to, ball.s, columns.first[ball.slot])) compare(r, ball.slot, memory, stops, accepts);
      memory.waiting[0] = memory.waiting[count - 1];
      sink(memory.waiting, 0, count - 1, nearer);
    }
  }

  // The rows of ball r and the columns of ball q, pair by pair.
  template <class Accepts>
  void compare(int64_t r, int64_t q, Memory& memory, EarlyStop& stops, const Accepts& accepts) const {
    Lists& lists = memory.lists;
    const Form<A>& form = sample.fine;
    const Balls<A>& rows = memory.balls;
    const int64_t tokens = columns.end(q) - columns.begin(q);
    float tile[kRows * kPanel] __attribute__((aligned(64)));
    const auto far = [&] {
      form.lower_tile(rows.at(r), columns.at(q), tile);
      return !any_within(tile, kRows, lists.threshold + rows.begin(r));
    };
    if (stops(far)) return;
    form.template tile<2>(rows.at(r), columns.at(q), tile);
    for (int64_t i = rows.begin(r); i < rows.end(r); i++) {
      const float* v = tile + (i - rows.begin(r)) * kPanel;
      for_each_within(v, tokens, lists.threshold[i], [&](int64_t at) {
        const int32_t column = columns.slot[columns.begin(q) + at];
        if (accepts(rows.slot[i], column)) lists.offer(i, v[at], column);
        return true;
      });
    }
  }

  // As H2OT_ISA::prove; what is not listed was left out as too far, or does not exist.
  int64_t prove(const Lists& found, int64_t at, int64_t i, Neighbour* list) const {
    return H2OT_ISA::prove(sample, sample.fine, found, at, i, found.is_full(at) ? -1 : found.count(at), list);
  }

  // f(begin, end, memory) for blocks of `count` rows whose lists are `length` long.
  template <class F>
  void for_blocks(int64_t count, int64_t length, Workers& workers, const F& f) const {
    const int64_t C = sample.C;
    Carver sizes(nullptr);
    Memory().carve(sizes, C, columns.count, length);
    parallel_for(workers.pool, groups_of(count, kBlock), 1, [&](int64_t begin, int64_t end) {
      void* bytes = workers.reserve(sizes.bytes());
      if (bytes == nullptr) return;
      Carver carver(bytes);
      Memory memory;
      memory.carve(carver, C, columns.count, length);
      for (int64_t b = begin; b < end; b++) f(b * kBlock, smaller((b + 1) * kBlock, count), memory);
    });
  }
};

// The largest squared distance of all pairs, in float64, from one of them; of_ball: room for a number per ball.
template <class A>
double largest_distance(const Sample<A>& sample, const Balls<A>& balls, double from, const Parallel& pool,
                        double* of_ball) {
  const Form<A>& form = sample.fine;
  parallel_for(pool, balls.count, 1, [&](int64_t begin, int64_t end) {
    float tile[kRows * kPanel] __attribute__((aligned(64)));
    for (int64_t p = begin; p < end; p++) {
      double& largest = of_ball[p];
      largest = from;
      balls.for_each_ball(p, [&](int64_t q, float apart) {
        const double reach = sqrt(form.bound.most(apart)) + balls.radius[p] + balls.radius[q];
        if (q < p || reach * reach * (1 + 0x1p-40) < largest * form.unit()) return;
        for (int64_t row = balls.begin(p); row < balls.end(p); row += kRows) {
          form.template tile<2>(balls.at(p) + row - balls.begin(p), balls.at(q), tile);
          for (int64_t i = row; i < smaller(row + kRows, balls.end(p)); i++) {
            for (int64_t j = balls.begin(q); j < balls.end(q); j++) {
              const float v = tile[(i - row) * kPanel + j - balls.begin(q)];
              if (v < form.bound.floor_of(largest * form.unit())) continue;
              const double s = sample.distance(balls.slot[i], balls.slot[j]);
              largest = s > largest ? s : largest;
            }
          }
        }
      });
    }
  });
  double largest = from;
  for (int64_t p = 0; p < balls.count; p++) largest = of_ball[p] > largest ? of_ball[p] : largest;
  return largest;
}

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
