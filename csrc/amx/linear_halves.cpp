// Linear layers in bfloat16 (launch.h: LinearHalvesArgs) by products of pairs in vectors: a block of rows, normed and
// packed as tiles, meets one panel of weights after the other, and sums become results in the first-level cache.
// Count: rows C M / 2 products of pairs, 16 an instruction; on Zen 4 it takes as long as one of float32 multiply-adds.
#include "../cpu/linear_blocks.h"
#include "gelu_halves.h"
#include "half_products.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kGroups = 4, kBlock = kGroups * kSide;  // rows that meet a panel one after the other
using HalvesPlace = Place<kLinearPanel>;
static_assert(kLinearPanel == 2 * kFloats && kLinearPanel == kSumsStep && kLinearPanel == kStepHalves);
static_assert(kFewestChannels >= kFloats);  // a norm takes whole vectors

// What a thread works in.
struct Arrays {
  uint16_t* rows;    // [kGroups][steps][kSide][kStepHalves]
  float* sums;       // [kSide][kLinearPanel]
  BFloat16* given;   // [kBlock][channels]: rows that have a norm, or come as float32
  BFloat16* hidden;  // [kBlock][hidden_channels]: what is between two layers

  Arrays(Carver& memory, int64_t channels, int64_t hidden_channels) {
    const int64_t most = channels > hidden_channels ? channels : hidden_channels;
    rows = memory.take<uint16_t>(kBlock * groups_of(most, kStepHalves) * kStepHalves);
    sums = memory.take<float>(kSide * kLinearPanel);
    given = memory.take<BFloat16>(kBlock * channels);
    hidden = memory.take<BFloat16>(kBlock * hidden_channels);
  }
};

// Rows [first, first + count) as the product takes them.
template <class X>
const BFloat16* given_rows(const LinearHalvesArgs& a, const Affine& affine, int64_t first, int64_t count,
                           BFloat16* to) {
  const X* const x = static_cast<const X*>(a.x) + first * a.C;
  if (a.has_norm) {
    norm_block(x, count, a.C, a.eps, affine.weight, affine.bias, to);
  } else if constexpr (sizeof(X) == sizeof(BFloat16)) {
    return x;
  } else {
    const int64_t numbers = count * a.C, whole = numbers / kFloats * kFloats;
    for (int64_t i = 0; i < whole; i += kFloats) store_narrow(to + i, load(x + i));
    if (whole < numbers) store_part(to + whole, load_part(x + whole, numbers - whole), numbers - whole);
  }
  return to;
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

// sums [count][kLinearPanel] of the rows from `first` on become results.
template <bool kGelu, class O>
H2OT_INLINE void finish_rows(const LinearHalvesArgs& a, const HalvesPlace& place, int64_t first, int64_t count,
                             const float* sums, [[maybe_unused]] const GeluOfHalves& gelu) {
  float bias[kLinearPanel] = {};
  if (a.bias) memcpy(bias, a.bias + place.chunk * a.M + place.column, size_t(place.count) * sizeof(float));
  const int64_t at = place.of_row(a.rows, a.M, first);
  O* out = static_cast<O*>(a.out) + at;
  const O* residual = a.residual ? static_cast<const O*>(a.residual) + at : nullptr;
  for (int64_t r = 0; r < count; r++, sums += kLinearPanel, out += a.M) {
    Floats low = load(sums) + load(bias), high = load(sums + kFloats) + load(bias + kFloats);
    if constexpr (kGelu) {
      low = gelu(low);
      high = gelu(high);
    }
    if (place.count == kLinearPanel) {
      put(low, high, residual, out);
    } else {  // nothing beyond the last output
      const size_t bytes = size_t(place.count) * sizeof(O);
      O part[kLinearPanel], added[kLinearPanel] = {};
      if (residual) memcpy(added, residual, bytes);
      put(low, high, residual ? added : nullptr, part);
      memcpy(out, part, bytes);
    }
    if (residual) residual += a.M;
  }
}

template <bool kGelu, class O>
void run_block(const LinearHalvesArgs& a, const BFloat16* x, int64_t first, int64_t count, int64_t panel, int64_t end,
               const Arrays& at) {
  static const GeluOfHalves gelu;
  const int64_t steps = groups_of(a.C, kStepHalves), pairs = groups_of(a.C, 2);
  pack_rows(reinterpret_cast<const uint16_t*>(x), count, a.C, groups_of(count, kSide), steps, at.rows);
  for (; panel < end; panel++) {
    const HalvesPlace place(a.M, panel);
    const uint16_t* const weights = static_cast<const uint16_t*>(a.packed) + panel * steps * 2 * kTileHalves;
    for (int64_t row = 0; row < count; row += kSide) {
      const int64_t here = count - row < kSide ? count - row : kSide;
      ask_for_lines<O>(place, a.rows, a.M, first + row, here, a.out, a.residual);
      multiply<1>(at.rows + row * steps * kStepHalves, 0, weights, kTileHalves, 2 * kTileHalves, pairs, at.sums);
      finish_rows<kGelu, O>(a, place, first + row, here, at.sums, gelu);
    }
  }
}

auto runner(const LinearHalvesArgs& a) {
  return a.activation == Activation::gelu
             ? (a.out_dtype == Dtype::bf16 ? run_block<true, BFloat16> : run_block<true, float>)
             : (a.out_dtype == Dtype::bf16 ? run_block<false, BFloat16> : run_block<false, float>);
}

// Calls part(first row, rows, what the first layer takes of them, first panel, end of the panels, a thread's arrays) on
// the threads, for all blocks.
template <class Part>
Status by_blocks(const Parallel& pool, const LinearHalvesArgs& a, int64_t hidden_channels, int64_t panels,
                 const Part& part) {
  const auto given = a.x_dtype == Dtype::bf16 ? given_rows<BFloat16> : given_rows<float>;
  Affine affine;
  if (a.has_norm && affine.read(a.norm_weight, a.norm_bias, a.norm_dtype, a.C) != Status::ok) {
    return Status::out_of_memory;
  }
  const Blocks blocks(pool, a.rows, kSide, kGroups, panels);
  Outcome outcome;
  parallel_for(pool, blocks.tasks(), 1, [&](int64_t begin, int64_t end) {
    Carver sizes(nullptr);
    Arrays(sizes, a.C, hidden_channels);
    void* const memory = scratch(Slot::own, sizes.bytes());
    if (!memory) return outcome.fail(Status::out_of_memory);
    Carver carver(memory);
    const Arrays at(carver, a.C, hidden_channels);
    blocks.each(begin, end, [&](int64_t first, int64_t count, int64_t panel, int64_t panels_end) {
      part(first, count, given(a, affine, first, count, at.given), panel, panels_end, at);
    });
  });
  return outcome.result();
}

}  // namespace

Status linear_halves(const LinearHalvesArgs& a, const Parallel& pool) {
  const auto run = runner(a);
  return by_blocks(pool, a, 0, a.chunks * groups_of(a.M, kLinearPanel),
                   [&](int64_t first, int64_t count, const BFloat16* x, int64_t panel, int64_t end, const Arrays& at) {
                     run(a, x, first, count, panel, end, at);
                   });
}

Status mlp_halves(const MlpHalvesArgs& a, const Parallel& pool) {
  const auto run_first = runner(a.first), run_second = runner(a.second);
  const int64_t hidden = a.first.M;
  return by_blocks(pool, a.first, hidden, 1,
                   [&](int64_t first, int64_t count, const BFloat16* x, int64_t, int64_t, const Arrays& at) {
                     LinearHalvesArgs inner = a.first;  // its rows are a block's, its results stay with the thread
                     inner.rows = kBlock;
                     inner.out = at.hidden;
                     run_first(inner, x, 0, count, 0, groups_of(hidden, kLinearPanel), at);
                     run_second(a.second, at.hidden, first, count, 0, groups_of(a.second.M, kLinearPanel), at);
                   });
}

}  // namespace H2OT_ISA
}  // namespace h2ot
