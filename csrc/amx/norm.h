// LayerNorm of a row, in float32: the mean, then the mean of squares about it; where that is far below the mean, both
// once more about what the deviations say the mean is.
#pragma once

#include "../cpu/layer_norm.h"
#include "digits.h"

namespace h2ot {
namespace H2OT_ISA {

// The first `count` lanes, 0 in the others.
H2OT_INLINE Floats only(Floats v, int64_t count) {
  const __mmask16 lanes = count >= kFloats ? kAll : count > 0 ? __mmask16((1u << count) - 1) : __mmask16(0);
  return reinterpret_cast<Floats>(_mm512_maskz_mov_ps(lanes, reinterpret_cast<__m512>(v)));
}

// Sums of x [C] - about, and of their squares.
struct Deviations {
  float sum, squares;
};

H2OT_INLINE Deviations deviations(const float* x, int64_t C, float about) {
  Floats sum[2] = {}, squares[2] = {};
  for (int64_t c = 0; c < C; c += 2 * kFloats) {
    for (int i = 0; i < 2; i++) {
      const int64_t at = c + i * kFloats;
      const Floats deviation = only(load_some(x + at, C - at) - about, C - at);
      sum[i] += deviation;
      squares[i] += deviation * deviation;
    }
  }
  return {sum_lanes<float>(sum[0] + sum[1]), sum_lanes<float>(squares[0] + squares[1])};
}

// Into `to`; returns the extent of the result.
H2OT_INLINE Extent norm_row(const float* x, int64_t C, const float* weight, const float* bias, float eps, float* to) {
  const float about = deviations(x, C, 0).sum / float(C), squares = deviations(x, C, about).squares;
  Moments<float> m = {about, 1 / __builtin_sqrtf(squares / float(C) + eps), 0};
  if (is_far(about, squares, C)) {
    const float nearer = about + deviations(x, C, about).sum / float(C);
    const Deviations from = deviations(x, C, nearer);
    m = moments_of(nearer, from.sum, from.squares, C, eps);
  }
  Measure measure;
  for (int64_t c = 0; c < C; c += kFloats) {
    Floats v = (load_some(x + c, C - c) - m.mean) * m.scale + m.shift;
    if (weight) v *= load_some(weight + c, C - c);
    if (bias) v += load_some(bias + c, C - c);
    v = only(v, C - c);
    measure.add(v);
    if (C - c >= kFloats) {
      store(to + c, v);
    } else {
      store_part(to + c, v, C - c);
    }
  }
  return measure.extent();
}

}  // namespace H2OT_ISA
}  // namespace h2ot
