// The tile unit of recent x86 processors (AMX): its registers, and their shape.
#pragma once

#include <immintrin.h>

#include "../cpu/vectors.h"

namespace h2ot {
namespace H2OT_ISA {

constexpr int64_t kSide = 16, kDepth = 64, kTile = kSide * kDepth;  // bytes; of sums kSide x kSide of 32 bits, as large

// The first `count` numbers from x on, zeros behind them.
H2OT_INLINE Floats load_some(const float* x, int64_t count) {
  return count >= kFloats ? load(x) : count > 0 ? load_part(x, count) : Floats{};
}

#ifdef __AMX_TILE__
// Eight tiles of kSide rows of kDepth bytes. A constant: g++ 12 believes that the instruction reads 8 bytes of it, and
// leaves out what a function writes behind them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t row_bytes[16] = {kDepth, kDepth, kDepth, kDepth, kDepth, kDepth, kDepth, kDepth};
  uint8_t rows[16] = {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide};
};
constexpr TileShapes kTileShapes;

// Registers 0 to 5, sums of products of bytes in three planes.
H2OT_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
}

H2OT_INLINE void hold_registers() { _tile_loadconfig(&kTileShapes); }

// The thread has the tiles while this lives.
class TileRegisters {
 public:
  TileRegisters() { hold_registers(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { _tile_release(); }
};
#endif

}  // namespace H2OT_ISA
}  // namespace h2ot
