// Weights of linear layers in float32 on the tile unit (AMX), as digits.
#pragma once

#include "tiles.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr float kScale = 0x1p16f;  // of a row: a sum of order 2 counts its square
constexpr int64_t kSpread = 16;    // floats behind the scales: the weights' spread, and room

// What pack_tiles() makes: digits [chunks][panels][steps][kWeightStep], scales [chunks][panels][kSide], the spread, and
// the channels' scales [steps][kDepth]: weights stand divided by them, and rows are multiplied by them, so that a
// channel of large numbers and small weights takes no digits from the others. The first is negative where there are
// none.
struct Packed {
  const int8_t* digits;
  int64_t chunks, steps, panels;
  const float *scales, *channels;

  Packed(const int8_t* packed, int64_t chunks_, int64_t M, int64_t C)
      : digits(packed), chunks(chunks_), steps(groups_of(C, kDepth)), panels(groups_of(M, kSide)) {
    scales = reinterpret_cast<const float*>(packed + digit_bytes());
    channels = scales + chunks * panels * kSide + kSpread;
  }
  int64_t digit_bytes() const { return chunks * panels * steps * kWeightStep; }
  int64_t bytes() const {
    return digit_bytes() + (chunks * panels * kSide + kSpread + steps * kDepth) * int64_t(sizeof(float));
  }
  float spread() const { return scales[chunks * panels * kSide]; }
  const float* channel_scales() const { return channels[0] < 0 ? nullptr : channels; }
  const int8_t* panel(int64_t panel) const { return digits + panel * steps * kWeightStep; }
  // Of output m of a panel at channel c; the digits are kTile apart.
  static int64_t place(int64_t m, int64_t c) {
    const int64_t i = c % kSide, v = c % kDepth / kSide;
    return c / kDepth * kWeightStep + i * kDepth + m * 4 + v;
  }
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
