// x Phi(x), Phi the standard normal distribution: GELU in its exact form.
#pragma once

#include "softmax.h"

namespace h2ot {
namespace H2OT_ISA {

// Phi(-t) = exp(-t^2 / 2) m(t) for t >= 0; with z = 1 / (1 + 0.35 t), m = z p(z) to 3.2e-8 of itself (least-squares
// fits, reweighted until the largest error of each swing was the same). 1 + erf would cancel on the negative side.
constexpr float kTailRate = 0.35f;
constexpr float kTail[] = {0x1.1df1f6p-3f, 0x1.1e6da4p-3f,  0x1.eaf58ep-4f, 0x1.afafb2p-4f, -0x1.764476p-6f,
                           0x1.45372cp-3f, -0x1.05853cp-2f, 0x1.268a4ap-3f, -0x1.dd0542p-6f};

H2OT_INLINE Floats gelu(Floats x) {
  constexpr float kHalfLog2E = 0x1.715476p-1f;
  const Floats t = as_floats(as_words(x) & 0x7fffffffu), z = 1.0f / (kTailRate * t + 1.0f);
  constexpr int terms = int(sizeof kTail / sizeof *kTail);
  Floats m = splat<float>(kTail[terms - 1]);
#pragma GCC unroll 9
  for (int i = terms - 2; i >= 0; i--) m = m * z + kTail[i];
  const Floats below = exp2_negative<float>(t * t * -kHalfLog2E) * (m * z) * t;  // t Phi(-t)
  const Floats tail = t > 14.0f ? Floats{} : below;                              // where inf times 0 would be NaN
  return x != x ? x : (x > 0 ? x : Floats{}) - tail;
}

}  // namespace H2OT_ISA
}  // namespace h2ot
