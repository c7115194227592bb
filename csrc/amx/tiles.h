// Products of float32 numbers on the tile unit of recent x86 processors (AMX), which multiplies bytes exactly.
//
// A row of numbers is a scale times whole numbers of digits to the base 256, between -128 and 127 (digits.h): three for
// weights, four for tokens. Digit 0 is the highest. Of their products the six largest are taken, of orders 0, 1 and 2;
// where a token has a number that stands far above the others, so that lower digits matter, the three of order 3, too.
#pragma once

#include "unit.h"

namespace h2ot {
namespace H2OT_ISA {

constexpr int64_t kGroup = 2 * kSide;  // rows of a product, or half of them; it has kSide outputs
constexpr int kRowDigits = 4, kWeightDigits = 3, kOrders = 4;
constexpr int64_t kRowStep = kRowDigits * 2 * kTile;    // a step of kGroup rows: [digit][2][kTile]
constexpr int64_t kWeightStep = kWeightDigits * kTile;  // a step of kSide outputs: [digit][kTile]
constexpr int64_t kSums = kOrders * kGroup * kSide;

// The tile registers: 0 - 5 sums, 6 weights, 7 rows.
H2OT_INLINE void load_weights(const int8_t* weights, int digit) { _tile_loadd(6, weights + digit * kTile, kDepth); }
// Marked so that they leave the weights in the first-level cache: 960 -> 730 ns for 512 channels.
H2OT_INLINE void load_rows(const int8_t* rows, int digit, int half) {
  _tile_stream_loadd(7, rows + (2 * digit + half) * kTile, kDepth);
}

// One step, which loads each tile of rows once: kDepth channels of kHalves times kSide rows and of kSide outputs. Sums
// of order o are in registers 2 o and 2 o + 1; the macros of the compiler want literals.
template <int kHalves, class Beside>
H2OT_INLINE void step(const int8_t* rows, const int8_t* weights, Beside beside) {
  load_rows(rows, 0, 0);
  load_weights(weights, 1);
  _tile_dpbssd(2, 7, 6);
  load_weights(weights, 2);
  _tile_dpbssd(4, 7, 6);
  load_weights(weights, 0);
  _tile_dpbssd(0, 7, 6);
  beside();
  if constexpr (kHalves == 2) {
    load_rows(rows, 0, 1);
    _tile_dpbssd(1, 7, 6);
    load_weights(weights, 1);
    _tile_dpbssd(3, 7, 6);
    load_weights(weights, 2);
    _tile_dpbssd(5, 7, 6);
  }
  beside();
  load_rows(rows, 1, 0);
  if constexpr (kHalves == 2) load_weights(weights, 0);
  _tile_dpbssd(2, 7, 6);
  load_weights(weights, 1);
  _tile_dpbssd(4, 7, 6);
  if constexpr (kHalves == 2) {
    load_rows(rows, 1, 1);
    _tile_dpbssd(5, 7, 6);
  }
  beside();
  load_weights(weights, 0);
  if constexpr (kHalves == 2) _tile_dpbssd(3, 7, 6);
  load_rows(rows, 2, 0);
  _tile_dpbssd(4, 7, 6);
  if constexpr (kHalves == 2) {
    load_rows(rows, 2, 1);
    _tile_dpbssd(5, 7, 6);
  }
  beside();
}

// sums[order][2][kSide][kSide], orders 0 to 2, of all steps; of one half the second is left alone. Four times in each
// step beside(): work for the vector units while the tile unit is busy.
template <int kHalves, class Beside>
__attribute__((noinline)) static void multiply(const int8_t* rows, const int8_t* weights, int64_t steps, int32_t* sums,
                                               Beside beside) {
  zero_sums();
  for (int64_t s = 0; s < steps; s++, rows += kRowStep, weights += kWeightStep) {
    step<kHalves>(rows, weights, beside);
  }
  constexpr int64_t kQuarter = kSide * kSide;
  _tile_stored(0, sums, kDepth);
  _tile_stored(2, sums + 2 * kQuarter, kDepth);
  _tile_stored(4, sums + 4 * kQuarter, kDepth);
  if constexpr (kHalves == 2) {
    _tile_stored(1, sums + kQuarter, kDepth);
    _tile_stored(3, sums + 3 * kQuarter, kDepth);
    _tile_stored(5, sums + 5 * kQuarter, kDepth);
  }
}

// The same of order 3, in the registers of order 0.
template <int kHalves>
static inline void multiply_low(const int8_t* rows, const int8_t* weights, int64_t steps, int32_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t s = 0; s < steps; s++, rows += kRowStep, weights += kWeightStep) {
    for (int digit = 1; digit < kRowDigits; digit++) {
      load_weights(weights, 3 - digit);
      load_rows(rows, digit, 0);
      _tile_dpbssd(0, 7, 6);
      if constexpr (kHalves == 2) {
        load_rows(rows, digit, 1);
        _tile_dpbssd(1, 7, 6);
      }
    }
  }
  constexpr int64_t kQuarter = kSide * kSide;
  _tile_stored(0, sums + 6 * kQuarter, kDepth);
  if constexpr (kHalves == 2) _tile_stored(1, sums + 7 * kQuarter, kDepth);
}

}  // namespace H2OT_ISA
}  // namespace h2ot
