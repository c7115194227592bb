// GELU for results that are rounded to bfloat16: x Phi(x), Phi the standard normal distribution, from a table of
// cubics.
#pragma once

#include <cmath>

#include "../cpu/vectors.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// max(x, 0) - t Phi(-t), t = |x|; Phi(-t) by the cubic of the interval whose middle is nearest to t. Off by at most
// 4.3e-7, and above x = -4 by 2.7e-4 of itself (half a step of bfloat16 is up to 3.9e-3); 0 from -5.72 on, where it
// is 3.1e-8. 12 instructions a vector, of which four pick coefficients, beside the units for multiply-adds: a third of
// what the form of float32 (gelu.h) takes.
class GeluOfHalves {
 public:
  GeluOfHalves() {
    for (int i = 0; i < kIntervals; i++) {
      const double low = i == 0 ? 0 : (i - 0.5) / kPerUnit, high = (i + 0.5) / kPerUnit;
      double cubic[kTerms] = {};
      if (i + 1 < kIntervals) fit((low + high) / 2, (high - low) / 2, cubic);
      for (int term = 0; term < kTerms; term++) table_[term][i] = float(cubic[term]);
    }
  }

  __attribute__((always_inline)) Floats operator()(Floats value) const {
    const __m512 x = reinterpret_cast<__m512>(value);
    const __m512 t = _mm512_maskz_min_ps(kAll, _mm512_abs_ps(x), _mm512_set1_ps(float((kIntervals - 1) / kPerUnit)));
    // The last bits of a number from 2^23 on are those of a whole number.
    const __m512i interval =
        _mm512_castps_si512(_mm512_fmadd_ps(t, _mm512_set1_ps(float(kPerUnit)), _mm512_set1_ps(0x1p23f)));
    __m512 tail = pick(interval, kTerms - 1);
#pragma GCC unroll 4
    for (int term = kTerms - 2; term >= 0; term--) tail = _mm512_fmadd_ps(tail, t, pick(interval, term));
    const __m512 above = _mm512_maskz_max_ps(kAll, _mm512_setzero_ps(), x);  // NaN stays NaN
    return reinterpret_cast<Floats>(_mm512_fnmadd_ps(tail, t, above));
  }

 private:
  static constexpr int kIntervals = 32, kTerms = 4;
  static constexpr double kPerUnit = 16.0 / 3;

  // Phi(-t) through the Chebyshev nodes of an interval, as a polynomial of t: Newton's form, multiplied out.
  static void fit(double middle, double half, double* cubic) {
    double node[kTerms], value[kTerms];
    for (int k = 0; k < kTerms; k++) {
      node[k] = middle + half * std::cos(M_PI * (2 * k + 1) / (2 * kTerms));
      value[k] = 0.5 * std::erfc(node[k] * M_SQRT1_2);
    }
    for (int order = 1; order < kTerms; order++) {
      for (int k = kTerms - 1; k >= order; k--) value[k] = (value[k] - value[k - 1]) / (node[k] - node[k - order]);
    }
    for (int k = kTerms - 1; k >= 0; k--) {
      for (int term = kTerms - 1; term > 0; term--) cubic[term] = cubic[term - 1] - node[k] * cubic[term];
      cubic[0] = value[k] - node[k] * cubic[0];
    }
  }

  __attribute__((always_inline)) __m512 pick(__m512i interval, int term) const {
    return _mm512_permutex2var_ps(_mm512_load_ps(table_[term]), interval, _mm512_load_ps(table_[term] + kFloats));
  }

  alignas(64) float table_[kTerms][kIntervals];
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
