// Words of 32 bits, turned.
#pragma once

#include "unit.h"

namespace h2ot {
namespace H2OT_ISA {

// Sixteen rows of words as sixteen columns.
H2OT_INLINE void transpose(Words* x) {
#pragma GCC unroll 4
  for (int step = 1; step < kSide; step *= 2) {
    Words low, high;
#pragma GCC unroll 16
    for (unsigned lane = 0; lane < kSide; lane++) {
      const bool second = lane & unsigned(step);
      low[lane] = second ? kSide + lane - step : lane;
      high[lane] = second ? kSide + lane : lane + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSide; i++) {
      if (i & step) continue;
      const Words first = x[i], second = x[i + step];
      x[i] = __builtin_shuffle(first, second, low);
      x[i + step] = __builtin_shuffle(first, second, high);
    }
  }
}

}  // namespace H2OT_ISA
}  // namespace h2ot
