// Rows of tokens as digits, for products with packed weights on the tile unit (tiles.h), and what such products give.
#pragma once

#include "../cpu/worker.h"
#include "digits.h"
#include "norm.h"
#include "packed_tiles.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kBlockBytes = 768 << 10;  // of the digits of a block's rows, up to kMostGroups of them
constexpr int64_t kMostGroups = 6;

// Groups of rows with `channels` channels in a block, at most.
H2OT_INLINE int64_t most_groups(int64_t channels) {
  const int64_t fitting = kBlockBytes / (groups_of(channels, kDepth) * kRowStep);
  return fitting < 1 ? 1 : fitting < kMostGroups ? fitting : kMostGroups;
}

// The rows of a block, whole groups of them but for the last one, which may be half of one, and their digits.
struct DigitRows {
  const float* x;  // of the rows that are there
  int64_t stride, count, halves;
  int8_t* digits;  // [groups][steps][kRowStep]
  float* scale;    // [groups][kGroup]: of sums of order 2; 0 of rows without digits, or that are not there
  float* low;      // [groups][kGroup]: what a sum of order 3 counts, 1 / 256 or 0
  bool* has_low;   // [groups]: whether one of it is not 0
  bool has_plain;  // a row has no digits

  DigitRows(Carver& memory, int64_t C, int64_t most) : x(nullptr), stride(0), count(0), halves(most) {
    const int64_t groups = groups_of(most, 2);
    digits = memory.take<int8_t>(groups * groups_of(C, kDepth) * kRowStep);
    scale = memory.take<float>(groups * kGroup);
    low = memory.take<float>(groups * kGroup);
    has_low = memory.take<bool>(groups);
    has_plain = false;
  }
  int64_t groups() const { return groups_of(halves, 2); }
  int64_t height(int64_t group) const { return 2 * group + 1 < halves ? kGroup : kSide; }
};

// sums of group g of rows of `steps` steps and a panel of weights, from step `from` on.
template <class Beside>
H2OT_INLINE void multiply_group(const DigitRows& rows, int64_t g, const int8_t* panel, int64_t from, int64_t steps,
                                int32_t* sums, const Beside& beside) {
  const int8_t* const digits = rows.digits + (g * steps + from) * kRowStep;
  panel += from * kWeightStep;
  if (rows.height(g) == kGroup) {
    multiply<2>(digits, panel, steps - from, sums, beside);
    if (rows.has_low[g]) multiply_low<2>(digits, panel, steps - from, sums);
  } else {
    multiply<1>(digits, panel, steps - from, sums, beside);
    if (rows.has_low[g]) multiply_low<1>(digits, panel, steps - from, sums);
  }
}

H2OT_INLINE Floats numbers(const int32_t* sums, int64_t order) {
  Words whole;
  memcpy(&whole, sums + order * kGroup * kSide, sizeof whole);
  return reinterpret_cast<Floats>(_mm512_maskz_cvtepi32_ps(kAll, reinterpret_cast<__m512i>(whole)));
}

// The product of row `row` of a block, whose sums begin at `sums`, with kSide outputs of that scale. Few instructions:
// they take the place of tile instructions that wait for their turn.
H2OT_INLINE Floats joined(const DigitRows& rows, int64_t row, const int32_t* sums, bool has_low, Floats scale) {
  Floats v = numbers(sums, 0);
  v = v * 256.0f + numbers(sums, 1);
  v = v * 256.0f + numbers(sums, 2);
  if (has_low) v += rows.low[row] * numbers(sums, 3);
  return v * rows.scale[row] * scale;
}

// The digits of group g as tiles; zeros for rows that are not there or have none. normed: room for its rows, where
// there is a norm.
void split_group(const LinearTilesArgs& a, const Packed& p, int64_t g, DigitRows& rows, float* normed) {
  const float* x[kGroup];
  float to_whole[kGroup];
  const float* const channels = p.channel_scales();
  const float spread = p.spread();
  const int64_t steps = groups_of(a.C, kDepth);
  rows.has_low[g] = false;
  const int64_t height = rows.height(g);
  for (int64_t r = 0; r < height; r++) {
    const int64_t row = g * kGroup + r;
    const bool is_there = row < rows.count;
    x[r] = is_there ? rows.x + row * rows.stride : nullptr;
    Extent extent = {};
    if (is_there) {  // the machine foresees lines of a page of memory only
      const float* const later = x[r] + 2 * rows.stride;
      for (int64_t c = 0; c < a.C; c += kFloats) __builtin_prefetch(later + c, 0, 2);
    }
    if (is_there && a.has_norm) {
      extent = norm_row(x[r], a.C, a.norm_weight, a.norm_bias, a.eps, normed + r * a.C);
      x[r] = normed + r * a.C;
    }
    if (is_there && (channels || !a.has_norm)) extent = extent_of(x[r], channels, a.C);
    const bool has_digits = extent.has_digits();
    rows.has_plain |= !has_digits;
    to_whole[r] = has_digits && extent.largest != 0 ? kWhole / extent.largest : 0;
    rows.scale[row] = to_whole[r] != 0 ? kScale / to_whole[r] : 0;
    const bool has_low = to_whole[r] != 0 && extent.spread() * spread > kMostSpread * kMostSpread;
    rows.low[row] = has_low ? 1.0f / 256 : 0;
    rows.has_low[g] |= has_low;
  }
  int8_t* tiles = rows.digits + g * steps * kRowStep;
  for (int64_t c = 0; c < a.C; c += kDepth, tiles += kRowStep) {
    for (int64_t r = 0; r < height; r++) {
      int8_t* const to = tiles + r * kDepth;
      if (to_whole[r] != 0) {
        put_digits(x[r], channels, a.C, c, to_whole[r], rows.has_low[g], to, 2 * kTile);
      } else {
        for (int d = 0; d < kRowDigits; d++) memset(to + d * 2 * kTile, 0, kDepth);
      }
    }
  }
}

// Rows of C numbers, `stride` apart, as a layer of these weights takes them.
void split(const LinearTilesArgs& a, const Packed& p, const float* x, int64_t stride, int64_t count, DigitRows& rows,
           float* normed) {
  rows.x = x;
  rows.stride = stride;
  rows.count = count;
  rows.halves = groups_of(count, kSide);
  rows.has_plain = false;
  for (int64_t g = 0; g < rows.groups(); g++) split_group(a, p, g, rows, normed);
}

// The product of a row without digits with the kSide outputs of a panel, by multiply-adds in the order of the channels.
H2OT_INLINE Floats plain_product(const Packed& p, const float* x, int64_t C, int64_t panel) {
  const int8_t* const weights = p.panel(panel);
  const float* const channels = p.channel_scales();
  const Floats scale = load(p.scales + panel * kSide) * (256 / kScale);
  Floats sum = {};
  for (int64_t c = 0; c < C; c++) {
    Floats weight = {};
    for (int lane = 0; lane < kFloats; lane++) {
      const int8_t* const digits = weights + Packed::place(lane, c);
      weight[lane] = float((digits[0] * 256 + digits[kTile]) * 256 + digits[2 * kTile]);
    }
    sum += x[c] * (channels ? weight * scale * channels[c] : weight * scale);
  }
  return sum;
}

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
