// What scoring keeps per sample, and the decisions that its searches (score_stored.h, score_streamed.h, score_nearby.h,
// score_exact.h) share.
//
// Slots 0 .. n - 1 are the valid tokens in ascending order.
#pragma once

#include "lists.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kKept = 16;  // neighbours remembered per slot, at most: enough to find most denser ones

// Neighbours remembered beyond those that m averages, when streaming: they prove the others and find denser tokens.
constexpr int64_t kSpare = 3;
constexpr int64_t kSifted = 256;  // channels from which on float distances before those in float64 pay

// A longer neighbour list than this is not worth keeping sorted at every tile: rows are then searched in float64.
constexpr int64_t kLongest = 64;

constexpr int32_t kNoBits = 0x7fffffff, kInfiniteBits = 0x7f800000;

typedef int32_t Integers __attribute__((vector_size(kDoubles * 4)));
typedef int64_t LongIntegers __attribute__((vector_size(kVectorBytes)));

template <class A>
struct State {
  Sample<A> sample;
  int64_t wanted;       // neighbours that m averages besides the token itself
  int64_t averaged;     // how many distances m averages: those, and the token's own unless it is excluded
  double area;          // divides squared distances
  int64_t kept;         // capacity of each row of `near`
  bool strict;          // noise given: denser is strictly larger rho; else ties go to the lower slot
  double *m, *key;      // [n]; j is denser than i when key[j] < key[i] (or equal, j < i, unless strict)
  double* delta;        // [n] squared distance to the parent
  int32_t* parent;      // [n], -1: no denser token
  Neighbour* near;      // [n][kept], the nearest ones in order
  int32_t* near_count;  // [n] how many of them are proven to be the nearest
  float* panels;        // [ceil(n / kPanel)] of any form
  double largest;       // squared, over all valid pairs; only when asked for

  void carve(Carver& memory, int64_t N, int64_t room, int64_t list) {
    kept = list;
    m = memory.take<double>(N);
    key = memory.take<double>(rounded_up(N, kDoubles));
    delta = memory.take<double>(N);
    parent = memory.take<int32_t>(N);
    near = memory.take<Neighbour>(N * kept);
    near_count = memory.take<int32_t>(N);
    panels = memory.take<float>(groups_of(N, kPanel) * room);
  }
  bool denser(int64_t j, int64_t i) const { return key[j] < key[i] || (!strict && key[j] == key[i] && j < i); }

  // The least of v[j] over the slots j that are denser than i, kNoBits where there are none. As bit patterns: those of
  // floats that are not negative order like them. v is readable in whole vectors; keys past n
  // are NaN.
  int32_t least_denser(int64_t i, const float* v) const {
    const Doubles limit = key[i] - Doubles{};
    const int64_t before = strict ? 0 : i;
    Integers least = Integers{} + kNoBits;
    LongIntegers slot = lanes_of<LongIntegers>([](int lane) { return lane; });
    for (int64_t j = 0; j < sample.n; j += kDoubles, slot += kDoubles) {
      const Doubles keys = load(key + j);
      const LongIntegers denser = (keys < limit) | ((keys == limit) & (slot < before));
      Integers bits;
      memcpy(&bits, v + j, sizeof bits);
      bits = __builtin_convertvector(denser, Integers) ? bits : kNoBits;
      least = bits < least ? bits : least;
    }
    int32_t lanes[kDoubles], result = kNoBits;
    memcpy(lanes, &least, sizeof lanes);
    for (int p = 0; p < kDoubles; p++) result = lanes[p] < result ? lanes[p] : result;
    return result;
  }

  // m of slot i from at least `wanted` sorted nearest neighbours, of which the first `kept` are remembered.
  void set_nearest(int64_t i, const Neighbour* sorted, int64_t count) {
    double total = 0;
    for (int64_t r = 0; r < wanted; r++) total += sorted[r].s;
    m[i] = total / (double(averaged) * area);
    near_count[i] = int32_t(smaller(count, kept));
    for (int64_t r = 0; r < near_count[i]; r++) near[i * kept + r] = sorted[r];
  }

  // Brings the `wanted` nearest to slot i (one at least) of the candidates list[0 .. count) to the front, in order,
  // with their distances.
  void resolve(int64_t i, Neighbour* list, int64_t count, int64_t wanted) const {
    const bool pays = sizeof(A) == 4 && sample.form.quantised() && sample.C >= kSifted;
    // Below that no difference overflows.
    if (pays && count > 2 * wanted - (wanted == 1) && sample.most < 0x1p126) count = sift(i, list, count, wanted);
    const bool many = wanted > 2 * kKept;
    int64_t found = 0;
    for (int64_t c = 0; c < count; c++) {
      list[c].s = sample.distance(i, list[c].slot);
      if (!many) found = insert(list, found, wanted, Neighbour(list[c]));
    }
    if (many) sort_neighbours(list, count);
  }

  // Leaves those of list[0 .. count) that may be among the `wanted` nearest to slot i by float distances, at a third of
  // the cost of float64; returns how many.
  int64_t sift(int64_t i, Neighbour* list, int64_t count, int64_t wanted) const {
    constexpr int64_t kAlike = 8;  // if so many cannot be told apart, the others cannot, either
    const Bound bound = scaled_bound(sample.C);
    const A scale = A(sample.fine.packing.scale);
    double least = __builtin_inf(), most = 0;
    for (int64_t c = 0; c < count; c++) {
      const double s = list[c].s = double(scaled_distance(sample.row(i), sample.row(list[c].slot), scale, sample.C));
      least = smaller_of(least, s);
      most = larger_of(most, s);
      if (c + 1 == kAlike && most <= bound.reach(bound.most(float(least)))) return count;
    }
    if (wanted > 1) {
      sort_neighbours(list, count);
      least = list[wanted - 1].s;
    }
    const double reach = bound.reach(bound.most(float(least)));
    int64_t near = 0;
    for (int64_t c = 0; c < count; c++) {
      if (list[c].s <= reach) list[near++] = list[c];
    }
    return near;
  }

  // m and the nearest neighbours from all distances in float64. list: room for n.
  void set_nearest_exactly(int64_t i, Neighbour* list) {
    const int64_t needed = larger(wanted, kept);
    const bool many = needed > 2 * kKept;
    int64_t count = 0;
    for (int64_t j = 0; j < sample.n; j++) {
      if (j == i) continue;
      const Neighbour next = {sample.distance(i, j), int32_t(j)};
      if (many) {
        list[count++] = next;
      } else {
        count = insert(list, count, needed, next);
      }
    }
    if (many) sort_neighbours(list, count);
    set_nearest(i, list, count);
  }

  bool all_equal() const {
    for (int64_t i = 1; i < sample.n; i++) {
      if (!sample.equal(0, i)) return false;
    }
    return true;
  }

  // Looks for the nearest denser token among the proven neighbours.
  bool find_parent_nearby(int64_t i) {
    const Neighbour* list = near + i * kept;
    for (int64_t r = 0; r < near_count[i]; r++) {
      if (denser(list[r].slot, i)) {
        delta[i] = list[r].s;
        parent[i] = list[r].slot;
        return true;
      }
    }
    return false;
  }

  // The same over all tokens in float64.
  void find_parent_exactly(int64_t i) {
    parent[i] = -1;
    for (int64_t j = 0; j < sample.n; j++) {
      if (!denser(j, i)) continue;
      const double s = sample.distance(i, j);
      if (parent[i] < 0 || s < delta[i]) {
        delta[i] = s;
        parent[i] = int32_t(j);
      }
    }
  }
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
