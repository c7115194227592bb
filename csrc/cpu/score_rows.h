// Rows one by one: what a thread needs for one, the largest distance of each, and the search of some of them against
// all.
#pragma once

#include "each_sample.h"
#include "score_state.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kRowGrain = 32;

// What one thread needs for a row: a list of neighbours, and room for the parts of a row.
struct RowRoom {
  Neighbour* list;           // [n + kKept]
  float *rest, *fine, *far;  // [stride] each

  static int64_t bytes(int64_t n, int64_t stride) {
    Carver count(nullptr);
    RowRoom().carve(count, n, stride);
    return count.bytes();
  }
  void carve(Carver& memory, int64_t n, int64_t stride) {
    list = memory.take<Neighbour>(n + kKept);
    rest = memory.take<float>(stride);
    fine = memory.take<float>(stride);
    far = memory.take<float>(stride);
  }
};

// f(i, room) for the rows [0, n); stride: of their parts, if f needs them.
template <class F>
void for_rows(Workers& workers, int64_t n, int64_t stride, const F& f) {
  parallel_for(workers.pool, n, kRowGrain, [&](int64_t begin, int64_t end) {
    void* memory = workers.reserve(RowRoom::bytes(n, stride));
    if (memory == nullptr) return;
    Carver carver(memory);
    RowRoom room;
    room.carve(carver, n, stride);
    for (int64_t i = begin; i < end; i++) f(i, room);
  });
}

// The largest squared distance, in float64, between a slot that `wanted` names and a later one. of_row: [n].
template <class A, class F>
double largest_of_rows(const Sample<A>& sample, const Parallel& pool, double* of_row, const F& wanted) {
  parallel_for(pool, sample.n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      of_row[i] = 0;
      for (int64_t j = wanted(i) ? i + 1 : sample.n; j < sample.n; j++) {
        const double s = sample.distance(i, j);
        of_row[i] = s > of_row[i] ? s : of_row[i];
      }
    }
  });
  double largest = 0;
  for (int64_t i = 0; i < sample.n; i++) largest = of_row[i] > largest ? of_row[i] : largest;
  return largest;
}

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

  // f(begin, end, memory) for blocks of `count` rows whose lists are `length` long.
  template <class F>
  static void for_blocks(int64_t count, int64_t C, int64_t length, Workers& workers, const F& f) {
    const int64_t block = kBlock * kPanel, blocks = groups_of(count, block);
    // A task takes one block from either end: later blocks may have more columns to look at.
    parallel_for(workers.pool, groups_of(blocks, 2), 1, [&](int64_t begin, int64_t end) {
      void* bytes = workers.reserve(Memory::bytes(C, length));
      if (bytes == nullptr) return;
      Carver carver(bytes);
      Memory memory;
      memory.carve(carver, C, length);
      const auto run = [&](int64_t b) { f(b * block, smaller((b + 1) * block, count), memory); };
      for (int64_t task = begin; task < end; task++) {
        run(task);
        if (blocks - 1 - task != task) run(blocks - 1 - task);
      }
    });
  }

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

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
