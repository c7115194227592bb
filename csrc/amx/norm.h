// LayerNorm of a row, in float32 as PyTorch does it: the mean, then the mean of squares about it.
#pragma once

#include "digits.h"

namespace h2ot {
namespace H2OT_ISA {

// The first `count` lanes, 0 in the others.
H2OT_INLINE Floats only(Floats v, int64_t count) {
  const __mmask16 lanes = count >= kFloats ? kAll : count > 0 ? __mmask16((1u << count) - 1) : __mmask16(0);
  return reinterpret_cast<Floats>(_mm512_maskz_mov_ps(lanes, reinterpret_cast<__m512>(v)));
}

// Into `to`; returns the extent of the result.
H2OT_INLINE Extent norm_row(const float* x, int64_t C, const float* weight, const float* bias, float eps, float* to) {
  Floats sum[2] = {}, squares[2] = {};
  for (int64_t c = 0; c < C; c += 2 * kFloats) {
    sum[0] += load_some(x + c, C - c);
    sum[1] += load_some(x + c + kFloats, C - c - kFloats);
  }
  const float mean = sum_lanes<float>(sum[0] + sum[1]) / float(C);
  for (int64_t c = 0; c < C; c += 2 * kFloats) {
    const Floats first = only(load_some(x + c, C - c) - mean, C - c);
    const Floats second = only(load_some(x + c + kFloats, C - c - kFloats) - mean, C - c - kFloats);
    squares[0] += first * first;
    squares[1] += second * second;
  }
  const float scale = 1 / __builtin_sqrtf(sum_lanes<float>(squares[0] + squares[1]) / float(C) + eps);
  Measure measure;
  for (int64_t c = 0; c < C; c += kFloats) {
    Floats v = (load_some(x + c, C - c) - mean) * scale;
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
