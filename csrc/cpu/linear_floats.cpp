// Linear layers in float32 (launch_linear.h: LinearFloatsArgs): a block of rows, normed, meets one panel of weights
// after the other, and sums become results in the first-level cache. Count: rows C M multiply-adds; per step of a
// tile's channels kRows broadcasts and kFloatsVectors loads beside kRows kFloatsVectors of them. Few rows a tile: those
// of 1024 channels begin in the same set of the first-level cache, which has 8 places.
#include "gelu.h"
#include "kernels.h"
#include "linear_blocks.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int kRows = 6;
constexpr int64_t kGroups = 8, kBlock = kGroups * kRows;  // rows that meet a panel one after the other
using FloatsPlace = Place<kFloatsPanel>;

// sums [kRows][kFloatsPanel] of `rows` rows of x, in vectors [vector, vectors) of a panel.
template <int V>
H2OT_INLINE void multiply(const LinearFloatsArgs& a, const float* x, int64_t rows, const float* weights, int64_t vector,
                          int64_t vectors, float* sums) {
  const WriteTo<float> to = {sums, kFloatsPanel};
  for (; vector + V <= vectors; vector += V) {
    product_rest<kRows, V>(rows, 0, vector, a.C, x, x_row(a), Fixed<1>(), weights, Fixed<kFloatsPanel>(), to);
  }
  if constexpr (V > 1) multiply<V / 2>(a, x, rows, weights, vector, vectors, sums);
}

// sums of the `count` rows from `first` on become results.
template <bool kGelu>
H2OT_INLINE void finish_rows(const LinearFloatsArgs& a, const FloatsPlace& place, int64_t first, int64_t count,
                             const float* sums) {
  float bias[kFloatsPanel] = {};
  if (a.bias) memcpy(bias, a.bias + place.chunk * a.M + place.column, size_t(place.count) * sizeof(float));
  const int64_t at = place.of_row(a, first), whole = place.count / kFloats * kFloats;
  float* out = a.out + at;
  const float* residual = a.residual ? a.residual + at : nullptr;
  const auto result = [&](int64_t i) __attribute__((always_inline)) {
    const Floats sum = load(sums + i) + load(bias + i);
    return kGelu ? gelu(sum) : sum;
  };
  for (int64_t r = 0; r < count; r++, sums += kFloatsPanel, out += out_row(a)) {
    for (int64_t i = 0; i < whole; i += kFloats) store(out + i, residual ? load(residual + i) + result(i) : result(i));
    if (const int64_t rest = place.count - whole) {  // nothing beyond the last output
      const Floats added = residual ? load_part(residual + whole, rest) : Floats{};
      store_part(out + whole, residual ? added + result(whole) : result(whole), rest);
    }
    if (residual) residual += out_row(a);
  }
}

template <bool kGelu>
void run_block(const LinearFloatsArgs& a, const float* x, int64_t first, int64_t count, int64_t panel, int64_t end,
               float* sums) {
  for (; panel < end; panel++) {
    const FloatsPlace place(a.M, panel);
    const float* const weights = a.packed + panel * a.C * kFloatsPanel;
    for (int64_t row = 0; row < count; row += kRows) {
      const int64_t here = count - row < kRows ? count - row : kRows;
      ask_for_lines<float>(a, place, first + row, here);
      multiply<kFloatsVectors>(a, x + row * x_row(a), here, weights, 0, groups_of(place.count, kFloats), sums);
      finish_rows<kGelu>(a, place, first + row, here, sums);
    }
  }
}

auto runner(const LinearFloatsArgs& a) { return a.activation == Activation::gelu ? run_block<true> : run_block<false>; }

// Calls part(first row, rows, the rows, normed, first panel, end of the panels, sums [kRows][kFloatsPanel], `floats`
// more) on the threads, for all blocks.
template <class Part>
Status by_blocks(const Parallel& pool, const LinearFloatsArgs& a, int64_t floats, int64_t panels, const Part& part) {
  Affine affine;
  if (a.has_norm && affine.read(a.norm_weight, a.norm_bias, Dtype::f32, a.C) != Status::ok) {
    return Status::out_of_memory;
  }
  const Blocks blocks(pool, a.rows, kRows, kGroups, panels);
  Outcome outcome;
  parallel_for(pool, blocks.tasks(), 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t kSums = kRows * kFloatsPanel;
    const int64_t normed = a.has_norm ? kBlock * a.C : 0;
    void* const memory = scratch(Slot::own, (kSums + normed + floats) * int64_t(sizeof(float)));
    if (!memory) return outcome.fail(Status::out_of_memory);
    float *const sums = static_cast<float*>(memory), *const own = sums + kSums, *const more = own + normed;
    blocks.each(begin, end, [&](int64_t first, int64_t count, int64_t panel, int64_t panels_end) {
      const float* const x = a.x + first * x_row(a);
      if (a.has_norm) norm_block(x, x_row(a), count, a.C, a.eps, affine.weight, affine.bias, own);
      part(first, count, a.has_norm ? own : x, panel, panels_end, sums, more);
    });
  });
  return outcome.result();
}

}  // namespace

Status linear_floats(const LinearFloatsArgs& a, const Parallel& pool) {
  const auto run = runner(a);
  LinearFloatsArgs inner = a;
  if (a.has_norm) inner.apart.x = 0;  // what is normed stands in a block of its own
  return by_blocks(pool, a, 0, a.chunks * groups_of(a.M, kFloatsPanel),
                   [&](int64_t first, int64_t count, const float* x, int64_t panel, int64_t end, float* sums, float*) {
                     run(inner, x, first, count, panel, end, sums);
                   });
}

Status mlp_floats(const MlpFloatsArgs& a, const Parallel& pool) {
  const auto run_first = runner(a.first), run_second = runner(a.second);
  const int64_t hidden = a.first.M;
  return by_blocks(pool, a.first, kBlock * hidden, 1,
                   [&](int64_t first, int64_t count, const float* x, int64_t, int64_t, float* sums, float* between) {
                     LinearFloatsArgs inner = a.first;  // its rows are a block's, its results stay with the thread
                     inner.rows = kBlock;
                     if (inner.has_norm) inner.apart.x = 0;
                     inner.out = between;
                     run_first(inner, x, 0, count, 0, groups_of(hidden, kFloatsPanel), sums);
                     run_second(a.second, between, first, count, 0, groups_of(a.second.M, kFloatsPanel), sums);
                   });
}

}  // namespace H2OT_ISA
}  // namespace h2ot
