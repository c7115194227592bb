// What a search keeps of each row, and how float64 proves it.
//
// Neighbours of a slot exclude itself and are ordered by (squared distance in float64, slot): this order decides every
// tie.
#pragma once

#include "pack.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// A token, and what it is sorted by: its squared distance in float64, or, in other lists, a key or a distance.
struct Neighbour {
  double s;
  int32_t slot;
};

H2OT_INLINE bool before(const Neighbour& a, const Neighbour& b) { return a.s < b.s || (a.s == b.s && a.slot < b.slot); }

// Moves heap[at] down to where nothing below it is to stand above it: above(a, b) where a is.
template <class Above>
void sink(Neighbour* heap, int64_t at, int64_t count, const Above& above) {
  const Neighbour moved = heap[at];
  for (int64_t child = 2 * at + 1; child < count; child = 2 * at + 1) {
    if (child + 1 < count && above(heap[child + 1], heap[child])) child++;
    if (!above(heap[child], moved)) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = moved;
}

// Heapsort past a handful: ascending.
inline void sort_neighbours(Neighbour* list, int64_t count) {
  if (count <= 32) {
    for (int64_t i = 1; i < count; i++) {
      const Neighbour moved = list[i];
      int64_t at = i;
      for (; at > 0 && before(moved, list[at - 1]); at--) list[at] = list[at - 1];
      list[at] = moved;
    }
    return;
  }
  const auto farther = [](const Neighbour& a, const Neighbour& b) { return before(b, a); };
  for (int64_t at = count / 2; at-- > 0;) sink(list, at, count, farther);
  for (int64_t end = count; end-- > 1;) {
    const Neighbour last = list[end];
    list[end] = list[0];
    list[0] = last;
    sink(list, 0, end, farther);
  }
}

// Puts `next` in its place in the sorted list[0 .. count), which keeps `most` at most; returns how many there are then.
inline int64_t insert(Neighbour* list, int64_t count, int64_t most, const Neighbour& next) {
  if (count == most && !before(next, list[count - 1])) return count;
  int64_t at = count < most ? count++ : count - 1;
  for (; at > 0 && before(next, list[at - 1]); at--) list[at] = list[at - 1];
  list[at] = next;
  return count;
}

constexpr int32_t kNoSlot = 0x7fffffff;

// Per row the `length` smallest tile distances, ordered by (distance, slot): which ones does not depend on the order of
// the offers.
struct Lists {
  int64_t length;
  float* v;          // [rows][length]
  int32_t* slot;     // [rows][length], kNoSlot where there are fewer
  float* threshold;  // [rows, rounded up to panels] the last v; -1 past the last row

  void carve(Carver& memory, int64_t rows, int64_t list) {
    length = list;
    v = memory.take<float>(rows * length);
    slot = memory.take<int32_t>(rows * length);
    threshold = memory.take<float>(rounded_up(rows, kPanel));
  }
  void clear(int64_t rows) {
    for (int64_t at = 0; at < rows * length; at++) {
      v[at] = __builtin_inff();
      slot[at] = kNoSlot;
    }
    for (int64_t row = 0; row < rounded_up(rows, kPanel); row++) threshold[row] = row < rows ? __builtin_inff() : -1;
  }
  int64_t count(int64_t row) const {
    int64_t found = 0;
    while (found < length && slot[row * length + found] != kNoSlot) found++;
    return found;
  }
  bool is_full(int64_t row) const { return slot[(row + 1) * length - 1] != kNoSlot; }
  // Whether rows [begin, end) may take an entry whose distance (its root, at least `least`) and slot (at least `first`)
  // are not known any better.
  bool may_take(int64_t begin, int64_t end, double least, int32_t first) const {
    const float squared = least > 0 ? float(least * least * (1 - 0x1p-22)) : 0;
    for (int64_t row = begin; row < end; row++) {
      if (squared < threshold[row] || (squared == threshold[row] && first <= slot[(row + 1) * length - 1])) return true;
    }
    return false;
  }
  // What is farther than this (a root) cannot get into the lists of rows [begin, end).
  float reach(int64_t begin, int64_t end) const {
    float most = 0;
    for (int64_t row = begin; row < end; row++) most = threshold[row] > most ? threshold[row] : most;
    return float(sqrt(double(most)) * (1 + 0x1p-22));
  }
  void offer(int64_t row, float value, int32_t from) {
    float* values = v + row * length;
    int32_t* slots = slot + row * length;
    int64_t at = length - 1;
    if (value > values[at] || (value == values[at] && from > slots[at])) return;
    for (; at > 0 && (value < values[at - 1] || (value == values[at - 1] && from < slots[at - 1])); at--) {
      values[at] = values[at - 1];
      slots[at] = slots[at - 1];
    }
    values[at] = value;
    slots[at] = from;
    threshold[row] = values[length - 1];
  }
};

// Row `row` of `found`, searched in `form` for slot i, in float64 order: `list` gets the entries, and the result is how
// many of them are proven to be the nearest of the `among` slots that were offered.
template <class A>
int64_t prove(const Sample<A>& sample, const Form<A>& form, const Lists& found, int64_t row, int64_t i, int64_t among,
              Neighbour* list) {
  const float* v = found.v + row * found.length;
  const int32_t* slot = found.slot + row * found.length;
  int64_t count = 0;
  for (; count < found.length && slot[count] != kNoSlot; count++) {
    list[count] = {sample.distance(i, slot[count]), slot[count]};
  }
  sort_neighbours(list, count);
  if (count == among) return count;
  // What is not listed is no nearer than this, and equal tokens that are not listed have higher slots.
  const double unlisted = count == found.length ? form.bound.least(v[count - 1]) / form.unit() : 0;
  int64_t proven = 0;
  while (proven < count && (list[proven].s == 0 || list[proven].s < unlisted)) proven++;
  return proven;
}

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
