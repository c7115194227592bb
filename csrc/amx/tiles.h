// Products of float32 numbers on the tile unit of recent x86 processors (AMX), which multiplies bfloat16 only.
//
// A float32 number is hi + mid + lo, three bfloat16 numbers, exactly. Of the nine products of two such sums the six
// largest are taken; the others are below 2^-25 of the whole.
#pragma once

#include <immintrin.h>

#include "../cpu/vectors.h"

namespace h2ot {
namespace H2OT_ISA {

constexpr int64_t kSide = 16, kDepth = 32, kTile = kSide * kDepth;  // a tile of bfloat16; of sums kSide x kSide floats
constexpr int64_t kGroup = 2 * kSide;                               // rows, or outputs, of 2 x 2 tiles of sums
constexpr int64_t kSums = kGroup * kGroup;
// Of rows, and of weights, within this range no product of pieces overflows, and what the unit takes for 0 (products
// below 2^-126) is below 2^-30 of the largest. Rows beyond it are left to plain multiply-adds.
constexpr float kLargest = 0x1p63f, kSmallest = 0x1p-48f;

constexpr int kPieces = 3;
constexpr int64_t kStep = kPieces * 2 * kTile;  // a step of kGroup rows, or outputs: [piece][2][kTile]

// The tile registers: 0 - 3 sums, 4 and 5 rows, 6 and 7 weights. The thread has them while this lives.
class TileRegisters {
 public:
  TileRegisters() {
    Shapes all;
    for (int i = 0; i < 8; i++) {
      all.row_bytes[i] = kDepth * 2;
      all.rows[i] = kSide;
    }
    _tile_loadconfig(&all);
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { _tile_release(); }

 private:
  struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

// The two tiles of a piece, of [piece][2][kTile].
H2OT_INLINE void load_rows(const uint16_t* a, int64_t piece) {
  _tile_loadd(4, a + piece * 2 * kTile, kDepth * 2);
  _tile_loadd(5, a + piece * 2 * kTile + kTile, kDepth * 2);
}
H2OT_INLINE void load_weights(const uint16_t* b, int64_t piece) {
  _tile_loadd(6, b + piece * 2 * kTile, kDepth * 2);
  _tile_loadd(7, b + piece * 2 * kTile + kTile, kDepth * 2);
}
H2OT_INLINE void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// One step: kDepth channels of kGroup rows and of kGroup outputs. Of the nine products of pieces the six largest.
H2OT_INLINE void step(const uint16_t* a, const uint16_t* b) {
  constexpr int kHi = 0, kMid = 1, kLo = 2;
  load_rows(a, kMid);
  load_weights(b, kMid);
  add_products();
  load_rows(a, kHi);
  add_products();
  load_weights(b, kLo);
  add_products();
  load_weights(b, kHi);
  add_products();
  load_rows(a, kMid);
  add_products();
  load_rows(a, kLo);
  add_products();
}

// sums[2][2][kSide][kSide] = all steps. After each one beside(s): work for the vector units while the tile unit is
// busy.
template <class Beside>
__attribute__((noinline)) static void multiply(const uint16_t* a, const uint16_t* b, int64_t steps, float* sums,
                                               Beside beside) {
  constexpr int64_t kQuarter = kSide * kSide, kRow = kSide * 4;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; s++) {
    step(a + s * kStep, b + s * kStep);
    beside(s);
  }
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + kQuarter, kRow);
  _tile_stored(2, sums + 2 * kQuarter, kRow);
  _tile_stored(3, sums + 3 * kQuarter, kRow);
}

// A vector as bfloat16, and what that leaves of it.
H2OT_INLINE __m256i take_bfloat16(Floats& v) {
  const auto bits = reinterpret_cast<__m256i>(_mm512_maskz_cvtneps_pbh(kAll, reinterpret_cast<__m512>(v)));
  v -= as_floats(reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(kAll, bits)) << 16);
  return bits;
}

// Whether all of a row x[C] can be split: its largest number is 0 or in the range, and all are numbers.
H2OT_INLINE bool can_split(const float* x, int64_t C) {
  Floats largest = {};
  Words unordered = {};
  for (int64_t c = 0; c < C; c += kFloats) {
    const Floats v = as_floats(as_words(c + kFloats <= C ? load(x + c) : load_part(x + c, C - c)) & 0x7fffffffu);
    largest = v > largest ? v : largest;
    unordered |= reinterpret_cast<Words>(v != v);
  }
  float most = 0;
  for (int lane = 0; lane < kFloats; lane++) {
    if (unordered[lane]) return false;
    most = largest[lane] > most ? largest[lane] : most;
  }
  return most == 0 || (most >= kSmallest && most < kLargest);
}

H2OT_INLINE Floats load_some(const float* x, int64_t count) {
  return count >= kFloats ? load(x) : count > 0 ? load_part(x, count) : Floats{};
}

// Step c / kDepth of row x[C] as row `to` of its tiles, [piece][2][kTile].
H2OT_INLINE void put_step(const float* x, int64_t C, int64_t c, uint16_t* to) {
#pragma GCC unroll 2
  for (int64_t first = 0; first < kDepth; first += kFloats) {
    Floats rest = load_some(x + c + first, C - c - first);
#pragma GCC unroll 3
    for (int p = 0; p < kPieces; p++) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + p * 2 * kTile + first), take_bfloat16(rest));
    }
  }
}

}  // namespace H2OT_ISA
}  // namespace h2ot
