// Words of 32 bits, turned.
#pragma once

#include "unit.h"

namespace h2ot {
namespace H2OT_ISA {

// Sixteen rows of words as sixteen columns.
template <int kStep = 1>
H2OT_INLINE void transpose(Words* x) {
  constexpr Words kLow = lanes_of<Words>([](int lane) { return lane & kStep ? kSide + lane - kStep : lane; });
  constexpr Words kHigh = lanes_of<Words>([](int lane) { return lane & kStep ? kSide + lane : lane + kStep; });
#pragma GCC unroll 16
  for (int i = 0; i < kSide; i++) {
    if (i & kStep) continue;
    const Words first = x[i], second = x[i + kStep];
    x[i] = __builtin_shuffle(first, second, kLow);
    x[i + kStep] = __builtin_shuffle(first, second, kHigh);
  }
  if constexpr (2 * kStep < kSide) transpose<2 * kStep>(x);
}

}  // namespace H2OT_ISA
}  // namespace h2ot
