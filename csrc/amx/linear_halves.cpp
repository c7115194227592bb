// Linear layers in bfloat16 (launch_linear.h: LinearHalvesArgs) by the tile unit, or by products of pairs in vectors: a
// block of rows, normed and packed as tiles, meets one panel of weights after the other, and the sums of one product
// become results beside the next. Count: rows C M / 2 products of pairs; in vectors 16 an instruction, which on Zen 4
// takes as long as one of float32 multiply-adds; by the unit 4096 in 16 cycles, for 2 x 2 tiles four loads of 1 KB
// beside them, of which two are rows from the second-level cache: the weights of a panel stay in the first.
#include "../cpu/linear_blocks.h"
#include "gelu_halves.h"
#include "half_products.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

#ifdef __AMX_BF16__
constexpr int kTiles = 2;  // of rows in a product
constexpr int64_t kGroups = 6, kMostSteps = 16;
#else
constexpr int kTiles = 1;
constexpr int64_t kGroups = 4, kMostSteps = INT64_MAX;  // all at once (half_products.h)
#endif
constexpr int64_t kRows = kTiles * kSide;    // of a product, which takes up to kMostSteps steps of channels at once
constexpr int64_t kBlock = kGroups * kRows;  // rows that meet a panel one group after the other
using HalvesPlace = Place<kLinearPanel>;
static_assert(kLinearPanel == 2 * kFloats && kLinearPanel == kSumsStep && kLinearPanel == kStepHalves);
static_assert(kFewestChannels >= kFloats);  // a norm takes whole vectors

// What a thread works in.
struct Arrays {
  float* sums;       // [2][kBlock][kLinearPanel]
  uint16_t* rows;    // of tiles (pack_rows), kBlock
  uint16_t* hidden;  // the same of hidden_channels: what is between two layers
  BFloat16* given;   // [kBlock][channels]: rows that have a norm, or come as float32

  Arrays(Carver& memory, int64_t channels, int64_t hidden_channels) {
    sums = memory.take<float>(2 * kBlock * kLinearPanel);
    rows = memory.take<uint16_t>(kBlock * rounded_up(channels, kStepHalves));
    hidden = memory.take<uint16_t>(kBlock * rounded_up(hidden_channels, kStepHalves));
    given = memory.take<BFloat16>(kBlock * channels);
  }
};

// Rows [first, first + count) as the product takes them, into tiles of `groups` times kSide rows.
template <class X>
void take_rows(const LinearHalvesArgs& a, const Affine& affine, int64_t first, int64_t count, int64_t groups,
               BFloat16* given, uint16_t* tiles) {
  const X* const x = static_cast<const X*>(a.x) + first * x_row(a);
  const void* rows = given;
  int64_t apart = a.C;
  if (a.has_norm) {
    norm_block(x, x_row(a), count, a.C, a.eps, affine.weight, affine.bias, given);
  } else if constexpr (sizeof(X) == sizeof(BFloat16)) {
    rows = x;
    apart = x_row(a);
  } else {
    const int64_t whole = a.C / kFloats * kFloats;
    for (int64_t r = 0; r < count; r++) {
      const X* const from = x + r * x_row(a);
      BFloat16* const to = given + r * a.C;
      for (int64_t c = 0; c < whole; c += kFloats) store_narrow(to + c, load(from + c));
      if (whole < a.C) store_part(to + whole, load_part(from + whole, a.C - whole), a.C - whole);
    }
  }
  pack_rows(static_cast<const uint16_t*>(rows), apart, count, a.C, groups, groups_of(a.C, kStepHalves), tiles);
}

// Two vectors of sums, and of what is added to them, as results: rounded to nearest even, a subnormal result to 0.
H2OT_INLINE void put(Floats low, Floats high, const BFloat16* residual, BFloat16* out) {
  if (residual) {
    low += load_wide(residual);
    high += load_wide(residual + kFloats);
  }
  const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
  memcpy(out, &both, sizeof both);
}
// What is added to float32 numbers are bfloat16 ones.
H2OT_INLINE Floats rounded(Floats v) {
  const __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
  return as_floats(reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(kAll, half)) << 16);
}
H2OT_INLINE void put(Floats low, Floats high, const float* residual, float* out) {
  store(out, rounded(low) + load(residual));
  store(out + kFloats, rounded(high) + load(residual + kFloats));
}

// Rows [first, first + count) of a panel.
struct Product {
  HalvesPlace place;
  int64_t first, count;
  const float* sums;  // [count][kLinearPanel]
};

// Where its results go: into `out`, or rows of a block into its tiles, which are whole.
template <class O>
struct Outside {
  typedef O Result;
  const LinearHalvesArgs& a;

  int64_t at(const HalvesPlace& place, int64_t row) const { return place.of_row(a, row); }
  static bool is_whole(const HalvesPlace& place) { return place.count == kLinearPanel; }
  void ask_for_lines(const Product& of) const { H2OT_ISA::ask_for_lines<O>(a, of.place, of.first, of.count); }
};
struct Inside {
  typedef BFloat16 Result;
  const LinearHalvesArgs& a;

  int64_t at(const HalvesPlace& place, int64_t row) const {
    const int64_t steps = groups_of(a.M, kStepHalves), step = place.column / kStepHalves;
    return ((row / kSide * steps + step) * kSide + row % kSide) * kStepHalves;
  }
  static bool is_whole(const HalvesPlace&) { return true; }
  void ask_for_lines(const Product&) const {}  // they are in the cache
};

// Rows [begin, end) of it, as far as it has them, become results.
template <bool kGelu, class To>
H2OT_INLINE void finish(const To& to, const Product& of, int64_t begin, int64_t end,
                        [[maybe_unused]] const GeluOfHalves& gelu) {
  typedef typename To::Result O;
  const LinearHalvesArgs& a = to.a;
  const HalvesPlace& place = of.place;
  if (end > of.count) end = of.count;
  const float* const bias = a.bias ? a.bias + place.chunk * a.M + place.column : nullptr;
  const Floats bias_low = bias ? load_some(bias, place.count) : Floats{};
  const Floats bias_high = bias ? load_some(bias + kFloats, place.count - kFloats) : Floats{};
  for (int64_t r = begin; r < end; r++) {
    const float* const sums = of.sums + r * kLinearPanel;
    const int64_t at = to.at(place, of.first + r);
    O* const out = static_cast<O*>(a.out) + at;
    const O* const residual = a.residual ? static_cast<const O*>(a.residual) + at : nullptr;
    Floats low = load(sums) + bias_low, high = load(sums + kFloats) + bias_high;
    if constexpr (kGelu) {
      low = gelu(low);
      high = gelu(high);
    }
    if (To::is_whole(place)) {
      put(low, high, residual, out);
    } else {  // nothing beyond the last output
      const size_t bytes = size_t(place.count) * sizeof(O);
      O part[kLinearPanel], added[kLinearPanel] = {};
      if (residual) memcpy(added, residual, bytes);
      put(low, high, residual ? added : nullptr, part);
      memcpy(out, part, bytes);
    }
  }
}

// Panels [panel, end) of `count` rows from `first` on, which stand in tiles.
template <bool kGelu, class To>
void run_block(const LinearHalvesArgs& a, const uint16_t* tiles, int64_t first, int64_t count, int64_t panel,
               int64_t end, float* all_sums) {
  static const GeluOfHalves gelu;
  const To to = {a};
  const int64_t steps = groups_of(a.C, kStepHalves), pairs = groups_of(a.C, 2);
  const int64_t most = steps < kMostSteps ? steps : kMostSteps, share = groups_of(kRows, most);
  Product before = {HalvesPlace(a.M, panel), first, 0, nullptr};
  int64_t turn = 0;
  for (; panel < end; panel++) {
    const HalvesPlace place(a.M, panel);
    for (int64_t step = 0; step < steps; step += most) {
      const uint16_t* const weights = static_cast<const uint16_t*>(a.packed) + (panel * steps + step) * 2 * kTileHalves;
      const int64_t left = pairs - step * kSide, taken = left < most * kSide ? left : most * kSide;
      for (int64_t row = 0; row < count; row += kRows, turn++) {
        // Of products in parts, all that a panel has are kept.
        const int64_t slot = steps == most ? turn % 2 : panel % 2 * kGroups + row / kRows;
        float* const sums = all_sums + slot * kRows * kLinearPanel;
        const Product now = {place, first + row, count - row < kRows ? count - row : kRows, sums};
        to.ask_for_lines(now);
        int64_t done = 0;
        multiply<kTiles, true>(tiles + (row * steps + step * kSide) * kStepHalves, steps * kTileHalves, weights,
                               kTileHalves, 2 * kTileHalves, taken, sums, step > 0, [&] {
                                 finish<kGelu>(to, before, done, done + share, gelu);
                                 done += share;
                               });
        finish<kGelu>(to, before, done, kRows, gelu);
        before = now;
        if (step + most < steps) before.count = 0;
      }
    }
  }
  finish<kGelu>(to, before, 0, kRows, gelu);
}

auto runner(const LinearHalvesArgs& a) {
  return a.activation == Activation::gelu
             ? (a.out_dtype == Dtype::bf16 ? run_block<true, Outside<BFloat16>> : run_block<true, Outside<float>>)
             : (a.out_dtype == Dtype::bf16 ? run_block<false, Outside<BFloat16>> : run_block<false, Outside<float>>);
}

// Calls part(first row, rows, first panel, end of the panels, a thread's arrays) on the threads, for all blocks; the
// rows stand in the arrays' tiles.
template <class Part>
Status by_blocks(const Parallel& pool, const LinearHalvesArgs& a, int64_t hidden_channels, int64_t panels,
                 const Part& part) {
  const auto take = a.x_dtype == Dtype::bf16 ? take_rows<BFloat16> : take_rows<float>;
  Affine affine;
  if (a.has_norm && affine.read(a.norm_weight, a.norm_bias, a.norm_dtype, a.C) != Status::ok) {
    return Status::out_of_memory;
  }
  const Blocks blocks(pool, a.rows, kRows, kGroups, panels);
  Outcome outcome;
  parallel_for(pool, blocks.tasks(), 1, [&](int64_t begin, int64_t end) {
    Carver sizes(nullptr);
    Arrays(sizes, a.C, hidden_channels);
    void* const memory = scratch(Slot::own, sizes.bytes());
    if (!memory) return outcome.fail(Status::out_of_memory);
    Carver carver(memory);
    const Arrays at(carver, a.C, hidden_channels);
    [[maybe_unused]] const ProductRegisters registers = {};
    blocks.each(begin, end, [&](int64_t first, int64_t count, int64_t panel, int64_t panels_end) {
      take(a, affine, first, count, groups_of(count, kRows) * kTiles, at.given, at.rows);
      part(first, count, panel, panels_end, at);
    });
  });
  return outcome.result();
}

}  // namespace

Status linear_halves(const LinearHalvesArgs& a, const Parallel& pool) {
  const auto run = runner(a);
  return by_blocks(pool, a, 0, a.chunks * groups_of(a.M, kLinearPanel),
                   [&](int64_t first, int64_t count, int64_t panel, int64_t end, const Arrays& at) {
                     run(a, at.rows, first, count, panel, end, at.sums);
                   });
}

Status mlp_halves(const MlpHalvesArgs& a, const Parallel& pool) {
  const auto run_second = runner(a.second);
  const int64_t hidden = groups_of(a.first.M, kLinearPanel), outputs = groups_of(a.second.M, kLinearPanel);
  return by_blocks(pool, a.first, a.first.M, 1, [&](int64_t first, int64_t count, int64_t, int64_t, const Arrays& at) {
    LinearHalvesArgs inner = a.first;
    inner.out = at.hidden;
    run_block<true, Inside>(inner, at.rows, 0, count, 0, hidden, at.sums);
    run_second(a.second, at.hidden, first, count, 0, outputs, at.sums);
  });
}

}  // namespace H2OT_ISA
}  // namespace h2ot
