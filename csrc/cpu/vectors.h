// Whole vectors of the four element types: loads that widen, stores that narrow, sums over the lanes.
#pragma once

#include "simd.h"

namespace h2ot {
namespace H2OT_ISA {

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint64_t LongWords __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));

// The vector that arithmetic on T runs in, and the unsigned integers of the same lanes.
template <class T>
struct VectorOf {
  typedef Floats type;
  typedef Words bits;
};
template <>
struct VectorOf<double> {
  typedef Doubles type;
  typedef LongWords bits;
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(Accumulator<T>));

template <class T>
H2OT_INLINE Vector<T> splat(Accumulator<T> v) {
  return v - Vector<T>{};  // exact for every v, so no subtraction is left
}

H2OT_INLINE Floats as_floats(Words v) { return reinterpret_cast<Floats>(v); }
H2OT_INLINE Words as_words(Floats v) { return reinterpret_cast<Words>(v); }

// 16-bit words to and from the low halves of 32-bit ones, and float16 to and from floats. One instruction where there
// is one: g++ 12 makes two vectors of half the width, or goes lane by lane.
#if defined(__AVX512F__)
constexpr __mmask16 kAll = 0xffff;  // g++ 12 warns of the forms without a mask
H2OT_INLINE Words load_halves(const void* p) {
  return reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256(static_cast<const __m256i*>(p))));
}
H2OT_INLINE void store_halves(void* p, Words v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(kAll, reinterpret_cast<__m512i>(v)));
}
H2OT_INLINE Floats load_float16(const void* p) {
  return reinterpret_cast<Floats>(_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(static_cast<const __m256i*>(p))));
}
H2OT_INLINE void store_float16(void* p, Floats v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(kAll, v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
H2OT_INLINE Words load_halves(const void* p) {
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
H2OT_INLINE void store_halves(void* p, Words v) {
  const __m256i wide = reinterpret_cast<__m256i>(v);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), packed);
}
H2OT_INLINE Floats load_float16(const void* p) {
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
H2OT_INLINE void store_float16(void* p, Floats v) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
H2OT_INLINE Words load_halves(const void* p) { return vmovl_u16(vld1_u16(static_cast<const uint16_t*>(p))); }
H2OT_INLINE void store_halves(void* p, Words v) { vst1_u16(static_cast<uint16_t*>(p), vmovn_u32(v)); }
H2OT_INLINE Floats load_float16(const void* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(p))));
}
H2OT_INLINE void store_float16(void* p, Floats v) {
  vst1_u16(static_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
}
#else
H2OT_INLINE Words load_halves(const void* p) {
  HalfWords half;
  memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, Words);
}
H2OT_INLINE void store_halves(void* p, Words v) {
  const HalfWords half = __builtin_convertvector(v, HalfWords);
  memcpy(p, &half, sizeof half);
}
H2OT_INLINE Floats load_float16(const void* p) {  // the same steps as widen(Half)
  const Words v = load_halves(p), sign = (v & 0x8000u) << 16, rest = v & 0x7fffu;
  const Words finite = as_words(as_floats(rest << 13) * 0x1p112f), special = 0x7f800000u | (rest << 13);
  return as_floats((rest >= 0x7c00u ? special : finite) | sign);
}
H2OT_INLINE void store_float16(void* p, Floats v) {  // the same steps as narrow(float, Half&)
  const Words all = as_words(v), sign = all >> 16 & 0x8000u, bits = all & 0x7fffffffu;
  const Words normal = (bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13;
  const Words small = as_words(as_floats(bits) + 0.5f) - 0x3f000000u;
  Words half = bits < 0x38800000u ? small : normal;
  half = bits >= 0x47800000u ? Words{} + 0x7c00u : half;
  half = bits > 0x7f800000u ? Words{} + 0x7e00u : half;
  store_halves(p, half | sign);
}
#endif

H2OT_INLINE Floats load_wide(const float* p) { return load(p); }
H2OT_INLINE Doubles load_wide(const double* p) { return load(p); }
H2OT_INLINE Floats load_wide(const BFloat16* p) { return as_floats(load_halves(p) << 16); }
H2OT_INLINE Floats load_wide(const Half* p) { return load_float16(p); }

// The bits of narrow(), NaN's too.
H2OT_INLINE void store_narrow(float* p, Floats v) { store(p, v); }
H2OT_INLINE void store_narrow(double* p, Doubles v) { store(p, v); }
H2OT_INLINE void store_narrow(BFloat16* p, Floats v) {
  const Words bits = as_words(v);
  const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, nan = bits >> 16 | 0x40u;
  store_halves(p, v == v ? rounded : nan);
}
H2OT_INLINE void store_narrow(Half* p, Floats v) {
  store_float16(p, v == v ? v : as_floats((as_words(v) & 0x80000000u) | 0x7fc00000u));
}

// The first `count` lanes only; the rest of a load is 0.
template <class T>
H2OT_INLINE Vector<T> load_part(const T* p, int64_t count) {
  T lanes[kLanes<T>] = {};
  memcpy(lanes, p, size_t(count) * sizeof(T));
  return load_wide(lanes);
}
template <class T>
H2OT_INLINE void store_part(T* p, Vector<T> v, int64_t count) {
  T lanes[kLanes<T>];
  store_narrow(lanes, v);
  memcpy(p, lanes, size_t(count) * sizeof(T));
}

// All lanes as one: f puts halves together.
template <class T, int kStep = kLanes<T> / 2, class F>
H2OT_INLINE Accumulator<T> fold_lanes(Vector<T> v, const F& f) {
  if constexpr (kStep == 0) {
    return v[0];
  } else {
    return fold_lanes<T, kStep / 2>(f(v, shuffle(v, v, [](int lane) { return lane ^ kStep; })), f);
  }
}
template <class T>
H2OT_INLINE Accumulator<T> sum_lanes(Vector<T> v) {
  return fold_lanes<T>(v, [](Vector<T> a, Vector<T> b) __attribute__((always_inline)) { return a + b; });
}

}  // namespace H2OT_ISA
}  // namespace h2ot
