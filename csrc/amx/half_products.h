// Products of bfloat16 numbers with sums in float32, by the tile unit (AMX) or, compiled without it, by the vector
// units' instruction for pairs of them (AVX512-BF16).
//
// Both read tiles: rows hold kSide rows of kStepHalves numbers; columns hold, for each pair of rows below each other,
// the pairs of kSide columns.
#pragma once

#include "unit.h"

namespace h2ot {
namespace H2OT_ISA {

constexpr int64_t kStepHalves = kDepth / int64_t(sizeof(uint16_t));
constexpr int64_t kTileHalves = kTile / int64_t(sizeof(uint16_t));
constexpr int64_t kSumsStep = 2 * kSide;  // from one row of sums to the next

// The first `count` of the kStepHalves numbers from x on, zeros behind them.
H2OT_INLINE Words load_step(const uint16_t* x, int64_t count) {
  if (count < kStepHalves) {
    const auto wanted = __mmask32((uint64_t(1) << (count > 0 ? count : 0)) - 1);
    return reinterpret_cast<Words>(_mm512_maskz_loadu_epi16(wanted, x));
  }
  Words words;
  memcpy(&words, x, sizeof words);
  return words;
}

// `count` rows of C numbers, `apart` from each other, as `groups` times kSide rows in tiles, zeros for the others and
// behind channel C.
static inline void pack_rows(const uint16_t* x, int64_t apart, int64_t count, int64_t C, int64_t groups, int64_t steps,
                             uint16_t* to) {
  for (int64_t r = 0; r < groups * kSide; r++) {
    for (int64_t s = 0; s < steps; s++) {
      uint16_t* const at = to + ((r / kSide * steps + s) * kSide + r % kSide) * kStepHalves;
      const Words words = r < count ? load_step(x + r * apart + s * kStepHalves, C - s * kStepHalves) : Words{};
      memcpy(at, &words, sizeof words);
    }
  }
}

struct Nothing {
  __attribute__((always_inline)) void operator()() const {}
};

#ifdef __AMX_BF16__

typedef TileRegisters ProductRegisters;

// sums [kTiles kSide][2 kSide]: kTiles times kSide rows, `rows_apart`, times two times kSide columns, `columns_apart`.
// Both have their first `pairs` pairs in ceil(pairs / kSide) tiles, columns `columns_step` from one to the next, and
// zeros behind. Where `more`, the products are added to what sums hold. After each step beside(): work for the vector
// units while the tile unit is busy. Rows that pass leave the columns in the first-level cache.
// Tile registers: 0 to 3 sums, 4 and 5 rows, 6 and 7 columns; the macros of the compiler want literals.
template <int kTiles, bool kPass = false, class Beside = Nothing>
H2OT_INLINE void multiply(const uint16_t* rows, int64_t rows_apart, const uint16_t* columns, int64_t columns_apart,
                          int64_t columns_step, int64_t pairs, float* sums, bool more = false,
                          const Beside& beside = {}) {
  constexpr int64_t kRow = kSumsStep * int64_t(sizeof(float));
  float* const below = sums + kSide * kSumsStep;
  if (more) {
    _tile_loadd(0, sums, kRow);
    _tile_loadd(1, sums + kSide, kRow);
    if constexpr (kTiles == 2) {
      _tile_loadd(2, below, kRow);
      _tile_loadd(3, below + kSide, kRow);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t p = 0; p < pairs; p += kSide, rows += kTileHalves, columns += columns_step) {
    _tile_loadd(6, columns, kDepth);
    if constexpr (kPass) {
      _tile_stream_loadd(4, rows, kDepth);
    } else {
      _tile_loadd(4, rows, kDepth);
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, columns + columns_apart, kDepth);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTiles == 2) {
      if constexpr (kPass) {
        _tile_stream_loadd(5, rows + rows_apart, kDepth);
      } else {
        _tile_loadd(5, rows + rows_apart, kDepth);
      }
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    beside();
  }
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + kSide, kRow);
  if constexpr (kTiles == 2) {
    _tile_stored(2, below, kRow);
    _tile_stored(3, below + kSide, kRow);
  }
}

#else

struct ProductRegisters {};  // nothing to be set up

// One tile of sums, a register for each row. The pair of a row is broadcast by the instruction itself: an instruction
// for it would take one of the two slots for arithmetic on Zen 4.
__attribute__((noinline)) static void multiply_tile(const uint16_t* rows, const uint16_t* columns, int64_t columns_step,
                                                    int64_t pairs, float* sums) {
  typedef uint32_t __attribute__((may_alias)) Pair;
  Floats sum[kSide] = {};
  for (; pairs > 0; pairs -= kSide, rows += kTileHalves, columns += columns_step) {
    const int64_t here = pairs < kSide ? pairs : kSide;
#pragma GCC unroll 2
    for (int64_t pair = 0; pair < here; pair++) {
      Words column;
      memcpy(&column, columns + pair * kStepHalves, sizeof column);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kSide; r++) {
        const Pair& row = *reinterpret_cast<const Pair*>(rows + r * kStepHalves + 2 * pair);
        asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum[r]) : "v"(column), "m"(row));
      }
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < kSide; r++) store(sums + r * kSumsStep, sum[r]);
}

// As above, but always anew, with nothing beside it: who multiplies by vectors takes all pairs at once.
template <int kTiles, bool kPass = false, class Beside = Nothing>
H2OT_INLINE void multiply(const uint16_t* rows, int64_t rows_apart, const uint16_t* columns, int64_t columns_apart,
                          int64_t columns_step, int64_t pairs, float* sums, bool = false, const Beside& = {}) {
  for (int64_t tile = 0; tile < kTiles; tile++) {
    for (int64_t half = 0; half < 2; half++) {
      multiply_tile(rows + tile * rows_apart, columns + half * columns_apart, columns_step, pairs,
                    sums + tile * kSide * kSumsStep + half * kSide);
    }
  }
}

#endif

}  // namespace H2OT_ISA
}  // namespace h2ot
