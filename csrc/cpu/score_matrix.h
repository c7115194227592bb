// The matrix of all tile distances of a sample, in blocks of a panel of tokens by another.
//
// Blocks whose tokens are far from each other by their lower bounds alone (first channels, high digits) keep those.
// Where the search form leaves many neighbours undecided (near-duplicates, quantised), the blocks that hold them are
// computed again in the fine form. All values are in the unit of the search form.
#pragma once

#include "score_state.h"
#include "transpose.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kTriedBlocks = 8;  // so many that are not left out, and the next ones are not tried
// Leaving blocks out saves more than deciding costs from so many channels on, and for more panels than this; blocks of
// digits are soon computed.
constexpr int64_t kLongToken = 512, kFewPanels = 4, kFewPanelsOfDigits = 8;

template <class A>
struct Matrix {
  State<A>* state;
  int64_t stride, panels;
  float* values;        // [n][stride], infinity on the diagonal and past n
  int32_t* undecided;   // [panels][panels] candidates of undecided rows; from `refine` on, nonzero: a refined block
  bool* open;           // [n] rows that wait for `refine` or `complete`
  bool* far;            // [panels][panels] blocks of lower bounds: no neighbour of their rows or columns is there
  int32_t* sought;      // [panels][panels] candidates of open rows
  bool *refined, *cut;  // [panels] panels of rows with a refined block, with a far one
  float* limit;         // [stride] what no neighbour's value passes, by the blocks beside the diagonal; -1 past n
  bool any_refined;
  Bound bound, fine;  // of all values, of those in refined blocks

  void carve(Carver& memory, int64_t N) {
    panels = groups_of(N, kPanel);
    stride = panels * kPanel;
    values = memory.take<float>(stride * stride);
    undecided = memory.take<int32_t>(panels * panels);
    open = memory.take<bool>(N);
    far = memory.take<bool>(panels * panels);
    sought = memory.take<int32_t>(panels * panels);
    refined = memory.take<bool>(panels);
    cut = memory.take<bool>(panels);
    limit = memory.take<float>(stride);
  }
  const float* row(int64_t i) const { return values + i * stride; }

  // Writes block (p, q), p <= q, times `unit`, on both sides of the diagonal; of a diagonal one not its lower left
  // quarter.
  void write(const float* block, float unit, int64_t p, int64_t q) const {
    for (int64_t r = 0; r < kPanel; r += kFloats) {
      for (int64_t c = p == q ? r : 0; c < kPanel; c += kFloats) {
        const int64_t row = p * kPanel + r, column = q * kPanel + c;
        Floats x[kFloats];
#pragma GCC unroll 16
        for (int i = 0; i < kFloats; i++) {
          x[i] = load(block + (r + i) * kPanel + c) * unit;
          store(values + (row + i) * stride + column, x[i]);
        }
        if (row == column) continue;
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < kFloats; i++) store(values + (column + i) * stride + row, x[i]);
      }
    }
  }

  // Tile distances between panels p <= q in `form`, times `unit`.
  void fill_block(const Form<A>& form, float unit, int64_t p, int64_t q) const {
    const int64_t size = form.panel_size(), height = form.height();
    float block[kPanel * kPanel] __attribute__((aligned(64)));
    const float* b = state->panels + q * size;
    const amx::LaterBlock above = {values + p * kPanel * stride + q * kPanel, stride},
                          below = {values + q * kPanel * stride + p * kPanel, stride};
    for (int64_t r = 0; r < kPanel; r += height) {
      const float* a = form.at(state->panels + p * size, r);
      // Rows of the lower half of a diagonal block need its right half only: the other is above them, mirrored.
      const int64_t from = p == q && r >= kFloats ? kFloats : 0;
      float* const tile = block + r * kPanel;
      if (from) {
        form.template tile<1>(a, form.at(b, from), tile + from);
      } else {
        form.template tile<2>(a, b, tile, r == 0 ? above : below);
      }
    }
    write(block, unit, p, q);
  }

  // Whether the lower bounds show that no neighbour is in block (p, q), p < q; it is then written.
  bool leave_out(int64_t p, int64_t q) const {
    const Form<A>& form = state->sample.form;
    const int64_t size = form.panel_size(), height = form.height();
    float block[kPanel * kPanel] __attribute__((aligned(64)));
    for (int64_t r = 0; r < kPanel; r += height) {
      float* const tile = block + r * kPanel;
      form.lower_tile(form.at(state->panels + p * size, r), state->panels + q * size, tile);
      if (any_within(tile, height, limit + p * kPanel + r, limit + q * kPanel)) return false;
    }
    write(block, 1, p, q);
    far[p * panels + q] = far[q * panels + p] = true;
    return true;
  }

  // Fills the blocks (p, q), p <= q, that `wanted`, copied for each task, names.
  template <class F>
  void fill(const Form<A>& form, float unit, const Parallel& pool, const F& wanted) const {
    const int64_t n = state->sample.n, count = groups_of(n, kPanel);
    const int64_t grain = larger(1, 200000 / (state->sample.C * kPanel * kPanel / kFloats));
    parallel_for(pool, count * (count + 1) / 2, grain, [&](int64_t begin, int64_t end) {
      const TileHold registers(form);
      F wants = wanted;
      int64_t q = 0;  // block t is (p, q) with p <= q and t = q (q + 1) / 2 + p
      while ((q + 1) * (q + 2) / 2 <= begin) q++;
      for (int64_t t = begin, p = begin - q * (q + 1) / 2; t < end; t++) {
        if (wants(p, q)) fill_block(form, unit, p, q);
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

  // packed: the panels are. whole: no block may be left out.
  void search(const Parallel& pool, bool packed, bool whole) {
    const Form<A>& form = state->sample.form;
    const int64_t n = state->sample.n;
    bound = fine = form.bound;
    any_refined = false;
    for (int64_t at = 0; at < panels * panels; at++) undecided[at] = sought[at] = far[at] = 0;
    for (int64_t p = 0; p < panels; p++) refined[p] = cut[p] = false;
    if (!packed) pack_panels(form, state->sample.token, n, pool, state->panels);
    EarlyStop stops(form, kTriedBlocks);
    const bool few = n <= kPanel * (form.in_digits() ? kFewPanelsOfDigits : kFewPanels);
    if (whole || few || state->wanted != 1 || state->sample.C < kLongToken || !stops.enabled) {
      return fill(form, 1, pool, [](int64_t, int64_t) { return true; });
    }
    fill(form, 1, pool, [](int64_t p, int64_t q) { return q <= p + 1; });
    set_limits();
    fill(form, 1, pool,
         [this, stops](int64_t p, int64_t q) mutable { return q > p + 1 && !stops([&] { return leave_out(p, q); }); });
    note_cuts();
  }

  // Neighbours in time are in the blocks beside the diagonal: what is farther than the nearest of those, whichever form
  // the values are in later, is no neighbour.
  void set_limits() const {
    const int64_t n = state->sample.n;
    const Bound either = bound.or_that(state->sample.fine.bound_in(state->sample.form));
    for (int64_t i = 0; i < stride; i++) {
      const int64_t v = i / kFloats, begin = larger(0, v - 1) * kFloats, end = smaller(n, (v + 2) * kFloats);
      limit[i] = i < n ? either.reach(either.most(least_of(row(i) + begin, end - begin))) : -1;
    }
  }

  void note_cuts() const {
    for (int64_t p = 0; p < panels; p++) cut[p] = false;
    for (int64_t at = 0; at < panels * panels; at++) cut[at / panels] |= far[at];
  }

  // Adds the candidates list[0 .. count) of slot i to the counts [panels][panels] of their blocks.
  void tally(int32_t* counts, int64_t i, const Neighbour* list, int64_t count) const {
    for (int64_t c = 0, run = 1; c < count; c++, run++) {
      const int64_t p = list[c].slot / kPanel;
      if (c + 1 < count && list[c + 1].slot / kPanel == p) continue;
      __atomic_fetch_add(counts + i / kPanel * panels + p, int32_t(run), __ATOMIC_RELAXED);
      run = 0;
    }
  }

  // Whether slot i is to wait for `complete`, many of its candidates list[0 .. count) being in far blocks.
  bool wait(int64_t i, const Neighbour* list, int64_t count) const {
    constexpr int64_t kFew = 8;
    const int64_t panel = i / kPanel;
    if (count <= kFew || !cut[panel]) return false;
    int64_t there = 0;
    for (int64_t c = 0; c < count; c++) there += far[panel * panels + list[c].slot / kPanel];
    if (there <= kFew) return false;
    open[i] = true;
    tally(sought, i, list, count);
    return true;
  }

  // Computes the far blocks that hold many candidates of the open rows in full.
  void complete(const Parallel& pool) {
    constexpr int32_t kMany = 100;  // so many candidates, one by one, cost as much as their whole block does here
    bool any = false;
    for (int64_t p = 0; p < panels; p++) {
      for (int64_t q = p; q < panels; q++) {
        int32_t &upper = sought[p * panels + q], &lower = sought[q * panels + p];
        upper = lower = far[p * panels + q] && upper + lower >= kMany;
        any |= upper != 0;
        if (upper) far[p * panels + q] = far[q * panels + p] = false;
      }
    }
    if (any) {
      const Sample<A>& sample = state->sample;
      if (any_refined) pack_panels(sample.form, sample.token, sample.n, pool, state->panels);
      fill(sample.form, 1, pool, [this](int64_t p, int64_t q) { return sought[p * panels + q] != 0; });
      note_cuts();
    }
    for (int64_t at = 0; at < panels * panels; at++) sought[at] = 0;
  }

  // Computes the blocks that hold many candidates of the open rows again, in the fine form. Packs over state->panels.
  void refine(const Parallel& pool) {
    // So many candidates, one by one, cost as much as their whole block does here.
    const int64_t worth = larger(48, state->sample.C / 2);
    const Form<A>&form = state->sample.form, &finer = state->sample.fine;
    for (int64_t p = 0; p < panels; p++) {
      for (int64_t q = p; q < panels; q++) {
        int32_t &upper = undecided[p * panels + q], &lower = undecided[q * panels + p];
        upper = lower = (p == q ? upper : upper + lower) >= worth;
        refined[p] |= upper != 0;
        refined[q] |= upper != 0;
        any_refined |= upper != 0;
      }
    }
    if (!any_refined) return;
    fine = finer.bound_in(form);
    bound = bound.or_that(fine);
    pack_panels(finer, state->sample.token, state->sample.n, pool, state->panels,
                [&](int64_t p) { return refined[p]; });
    fill(finer, float(form.unit() / finer.unit()), pool,
         [this](int64_t p, int64_t q) { return undecided[p * panels + q] != 0; });
  }
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
