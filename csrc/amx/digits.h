// Rows of float32 numbers as scaled whole numbers of digits.
//
// The largest of a row becomes kWhole, so that three digits are off by at most 2^-24 of it: by 2^-24 r / sqrt(3) of the
// row's root mean square, on average, r being how many times that the largest is. A dot product of two rows is then off
// by 3.4e-8 sqrt(r^2 + s^2) of its size for random signs, |x| |w| / sqrt(C), and leaving out its products of order 3
// costs 2.8e-8 r s: 1.6e-7 and 3.1e-7 for rows of 512 normal numbers (r = 3.3), float32's own sums 3e-7 to 4e-7. With
// order 3, and four digits of x, 3.4e-8 s is left.
#pragma once

#include "tiles.h"

namespace h2ot {
namespace H2OT_ISA {

constexpr float kWhole = 0x1.fdfcp30f;  // in units of digit 3; what rounding adds does not carry digit 0 past 127
// Rows, and weights, within this range have scales, sums and sums of squares that are neither infinite nor 0.
constexpr float kLargest = 0x1p48f, kSmallest = 0x1p-48f;
// Above this r s the products of order 3 are taken: without them a result would be off by 4.5e-7 of its size.
constexpr float kMostSpread = 16.0f;

// `even` with the odd 16-bit words, or bytes, of `odd`.
H2OT_INLINE Words odd_words(Words even, Words odd) {
  return reinterpret_cast<Words>(
      _mm512_mask_blend_epi16(0xaaaaaaaau, reinterpret_cast<__m512i>(even), reinterpret_cast<__m512i>(odd)));
}
H2OT_INLINE Words odd_bytes(Words even, Words odd) {
  return reinterpret_cast<Words>(
      _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaau, reinterpret_cast<__m512i>(even), reinterpret_cast<__m512i>(odd)));
}

// Of a row: its largest magnitude, NaN where one is no number, and the sum of squares.
struct Extent {
  float largest, squares;

  bool has_digits() const { return largest == 0 || (largest >= kSmallest && largest < kLargest); }
  // r^2 / C, r being as above.
  float spread() const { return largest * largest / squares; }
};
// Collects it from the vectors of a row.
class Measure {
 public:
  __attribute__((always_inline)) void add(Floats v) {
    const Words bits = as_words(v) & 0x7fffffffu;
    most_ = bits > most_ ? bits : most_;  // in the order of the numbers, NaN above infinity
    squares_ += v * v;
  }
  __attribute__((always_inline)) Extent extent() const {
    uint32_t bits = 0;
    for (int lane = 0; lane < kFloats; lane++) bits = most_[lane] > bits ? most_[lane] : bits;
    Extent extent;
    memcpy(&extent.largest, &bits, sizeof bits);
    extent.squares = sum_lanes<float>(squares_);
    return extent;
  }

 private:
  Words most_ = {};
  Floats squares_ = {};
};
// Channels from c on of x[C], times their scales (packed_tiles.h) where there are some.
H2OT_INLINE Floats scaled(const float* x, const float* channels, int64_t C, int64_t c) {
  const Floats v = load_some(x + c, C - c);
  return channels ? v * load(channels + c) : v;
}
H2OT_INLINE Extent extent_of(const float* x, const float* channels, int64_t C) {
  Measure measure;
  for (int64_t c = 0; c < C; c += kFloats) measure.add(scaled(x, channels, C, c));
  return measure.extent();
}

// Channels [c, c + kDepth) of x[C], scaled, times `to_whole`, as row `to` of tiles `stride` apart, one of each digit:
// byte 4 i + v is channel c + 16 v + i. The last of kRowDigits digits is written where `has_last`.
H2OT_INLINE void put_digits(const float* x, const float* channels, int64_t C, int64_t c, float to_whole, bool has_last,
                            int8_t* to, int64_t stride) {
  constexpr uint32_t kHalf = 0x80808080;  // digits between 0 and 255, of those between -128 and 127
  Words v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const Floats whole = scaled(x, channels, C, c + i * kFloats) * to_whole;
    v[i] = reinterpret_cast<Words>(_mm512_maskz_cvtps_epi32(kAll, reinterpret_cast<__m512>(whole))) + kHalf;
  }
  const Words high = odd_words(v[0] >> 16, v[2]), high_odd = odd_words(v[1] >> 16, v[3]);
  const Words low = odd_words(v[0], v[2] << 16), low_odd = odd_words(v[1], v[3] << 16);
  const Words digits[kRowDigits] = {odd_bytes(high >> 8, high_odd), odd_bytes(high, high_odd << 8),
                                    odd_bytes(low >> 8, low_odd), odd_bytes(low, low_odd << 8)};
#pragma GCC unroll 4
  for (int digit = 0; digit < kRowDigits; digit++) {
    const Words signed_digits = digits[digit] ^ kHalf;
    if (digit < kRowDigits - 1 || has_last) memcpy(to + digit * stride, &signed_digits, sizeof signed_digits);
  }
}

}  // namespace H2OT_ISA
}  // namespace h2ot
