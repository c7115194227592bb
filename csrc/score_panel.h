// Panels of tokens for the search on the tile unit (AMX): whole numbers q of two digits to the base 256, high and low,
// each between -128 and 127.
//
// A panel is two halves of kTokens tokens. A half holds their norms, infinity past the last token, and for each step of
// kChannels channels four tiles: both digits with a token a row, and both turned, with four channels a row. The last
// step is filled with zeros.
#pragma once

#include "cpu/simd.h"

namespace h2ot {
namespace amx {

constexpr int64_t kTokens = 16, kChannels = 64;
constexpr int64_t kLargestDigits = 128 * 255 - 2;  // what rounding adds carries no digit past 127
// Squared distances of the high digits fit 32 bits, and so do all sums of products.
constexpr int64_t kMostChannels = 32767;

struct alignas(64) HalfPanel {
  double norm[kTokens];   // of q
  int32_t high[kTokens];  // of the high digits
  float margin[kTokens];  // what the lower ones may bring a token nearer by, in squared distances; - infinity past it
};

// In floats, as panels are counted.
H2OT_INLINE constexpr int64_t half_panel_size(int64_t C) {
  return (int64_t(sizeof(HalfPanel)) + (C + kChannels - 1) / kChannels * 4 * kTokens * kChannels) / 4;
}

// Tokens row[0 .. 2 kTokens), null past the last, as a panel of round((row - centre) * scale). Returns the largest
// magnitude of those before rounding, NaN for any: above kLargestDigits, or NaN, the panel is not to be used.
float pack_digits(const float* const* row, const float* centre, float scale, int64_t C, float* panel);
// A block of 2 kTokens rows of as many floats, or null, that is written later: its lines are asked for.
struct LaterBlock {
  const float* data;
  int64_t stride;
};
// out[r][p], 2 kTokens apart: |q_r - q_p|^2 of the tokens of half a panel and of `halves` adjacent halves, exact, then
// rounded to float once.
void digit_tile(const float* rows, const float* columns, int64_t halves, int64_t C, const LaterBlock& later,
                float* out);
// The same of two halves from the high digits alone, at a quarter of the products: never more than digit_tile gives.
// With h and l for the differences of the digits, |256 h + l|^2 >= (1 - e) |256 h|^2 - (1 / e - 1) |l|^2 for any e, and
// |l|^2 is at most twice the sum of both tokens'.
void high_digit_tile(const float* rows, const float* columns, int64_t C, float* out);
// The thread has the registers of the unit, which digit_tile wants, between these.
void hold_tiles();
void release_tiles();

}  // namespace amx
}  // namespace h2ot
