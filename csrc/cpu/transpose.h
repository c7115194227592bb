// Squares of 32-bit lanes, turned.
#pragma once

#include "vectors.h"

namespace h2ot {
namespace H2OT_ISA {

// As many rows as a vector has lanes, as columns: squares of kStep, then of twice that, change places.
template <int kStep = 1, class V>
H2OT_INLINE void transpose(V* x) {
  constexpr auto kLow = [](int lane) { return lane & kStep ? kFloats + lane - kStep : lane; };
  constexpr auto kHigh = [](int lane) { return lane & kStep ? kFloats + lane : lane + kStep; };
#pragma GCC unroll 16
  for (int i = 0; i < kFloats; i++) {
    if (i & kStep) continue;
    const V first = x[i], second = x[i + kStep];
    x[i] = shuffle(first, second, kLow);
    x[i + kStep] = shuffle(first, second, kHigh);
  }
  if constexpr (2 * kStep < kFloats) transpose<2 * kStep>(x);
}

}  // namespace H2OT_ISA
}  // namespace h2ot
