// Vectors of the instruction set that this file is compiled for, and conversions of the four element types.
//
// Each csrc/cpu/*.cpp is compiled once per instruction set, with H2OT_ISA naming the namespace (portable, avx2, avx512,
// neon) and the compiler flags deciding the width. Only always-inline or static functions here, and no std:: function
// templates in the kernels: a weak symbol compiled with AVX-512 must never be the copy that the linker keeps for an
// older machine.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

#include "../launch_cpu.h"

#define H2OT_INLINE static inline __attribute__((always_inline))

namespace h2ot {
namespace H2OT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Steps of a register tile that are written out: of 12 accumulators, in place of 24, pointers are a tenth of a step.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kStepsAtOnce = 4;
#else
constexpr int kStepsAtOnce = 1;
#endif

// How many groups of `size` hold `count`; how many they hold together.
H2OT_INLINE int64_t groups_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
H2OT_INLINE int64_t rounded_up(int64_t count, int64_t size) { return groups_of(count, size) * size; }

constexpr int kFloats = kVectorBytes / 4;
constexpr int kDoubles = kVectorBytes / 8;
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));

// f(0), f(1), ... as the lanes of a constant. What a loop writes lane by lane g++ 12 puts together anew at every use.
template <class V, class F, int... lane>
H2OT_INLINE constexpr V lanes_of(F f, std::integer_sequence<int, lane...>) {
  return V{decltype(V{}[0] + 0)(f(lane))...};
}
template <class V, class F>
H2OT_INLINE constexpr V lanes_of(F f) {
  return lanes_of<V>(f, std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])>());
}

// Lanes of a, then of b, by their numbers: written out, or as f(0), f(1), ... (f captures nothing).
template <int... lane, class V>
H2OT_INLINE V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane...);
#else  // g++ 11 has no other
  return __builtin_shuffle(a, b, decltype(V{} < V{}){lane...});
#endif
}
template <class V, class F, int... lane>
H2OT_INLINE V shuffle(V a, V b, F, std::integer_sequence<int, lane...>) {
  return shuffle<F{}(lane)...>(a, b);
}
template <class V, class F>
H2OT_INLINE V shuffle(V a, V b, F f) {
  return shuffle(a, b, f, std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])>());
}

// Four rows of four, as columns; out: the first of them, `apart` numbers before the next.
template <class Quad, class E>
H2OT_INLINE void store_columns(const Quad (&row)[4], E* out, int64_t apart) {
  const Quad low02 = shuffle<0, 4, 1, 5>(row[0], row[2]), low13 = shuffle<0, 4, 1, 5>(row[1], row[3]);
  const Quad high02 = shuffle<2, 6, 3, 7>(row[0], row[2]), high13 = shuffle<2, 6, 3, 7>(row[1], row[3]);
  const Quad column[4] = {shuffle<0, 4, 1, 5>(low02, low13), shuffle<2, 6, 3, 7>(low02, low13),
                          shuffle<0, 4, 1, 5>(high02, high13), shuffle<2, 6, 3, 7>(high02, high13)};
  for (int i = 0; i < 4; i++) memcpy(out + i * apart, &column[i], sizeof(Quad));
}

H2OT_INLINE Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
H2OT_INLINE Doubles load(const double* p) {
  Doubles v;
  memcpy(&v, p, sizeof v);
  return v;
}
#if defined(__aarch64__)  // g++ 12 takes a memcpy of them through the integer registers
H2OT_INLINE void store(float* p, Floats v) { vst1q_f32(p, v); }
H2OT_INLINE void store(double* p, Doubles v) { vst1q_f64(p, v); }
#else
H2OT_INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
H2OT_INLINE void store(double* p, Doubles v) { memcpy(p, &v, sizeof v); }
#endif

// Storage types of the half formats; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

H2OT_INLINE float widen(float v) { return v; }
H2OT_INLINE double widen(double v) { return v; }
H2OT_INLINE float widen(BFloat16 v) { return __builtin_bit_cast(float, uint32_t(v.bits) << 16); }
#if defined(__F16C__)
H2OT_INLINE float widen(Half v) { return _cvtsh_ss(v.bits); }
#else
H2OT_INLINE float widen(Half v) {
  // The exponent is moved by a multiplication, which also makes subnormals exact; infinity and NaN stay as they are.
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  uint32_t bits = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, rest << 13) * 0x1p112f);
  if (rest >= 0x7c00u) bits = 0x7f800000u | (rest & 0x3ffu) << 13;
  return __builtin_bit_cast(float, bits | sign);
}
#endif

H2OT_INLINE void narrow(float v, float& out) { out = v; }
H2OT_INLINE void narrow(double v, double& out) { out = v; }
H2OT_INLINE void narrow(float v, BFloat16& out) {  // round to nearest even
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = uint16_t(bits >> 16 | 0x40u);
  } else {
    out.bits = uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}
#if defined(__F16C__)
H2OT_INLINE void narrow(float v, Half& out) {  // to nearest even; NaN keeps only its sign
  out.bits = v == v ? _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT) : uint16_t(__builtin_signbit(v) ? 0xfe00u : 0x7e00u);
}
#else
H2OT_INLINE void narrow(float v, Half& out) {  // round to nearest even
  uint32_t bits = __builtin_bit_cast(uint32_t, v);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x47800000u) {  // 65536 and more
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // below the smallest normal: let an addition round
    half = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, bits) + 0.5f) - 0x3f000000u;
  } else {
    bits += 0xfffu + (bits >> 13 & 1u);
    half = (bits - 0x38000000u) >> 13;
  }
  out.bits = uint16_t(sign | half);
}
#endif

// The type that arithmetic on T accumulates in.
template <class T>
struct AccumulatorOf {
  typedef float type;
};
template <>
struct AccumulatorOf<double> {
  typedef double type;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// Calls f(T()) for the element type that dtype names.
template <class F>
H2OT_INLINE void for_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32:
      f(float());
      break;
    case Dtype::f64:
      f(double());
      break;
    case Dtype::bf16:
      f(BFloat16());
      break;
    case Dtype::f16:
      f(Half());
      break;
  }
}

// Runs f(begin, end) over [0, tasks) on the caller's pool.
template <class F>
H2OT_INLINE void parallel_for(const Parallel& pool, int64_t tasks, int64_t grain, const F& f) {
  if (tasks <= 0) return;
  if (tasks <= grain || pool.threads == 1) {
    f(int64_t(0), tasks);
    return;
  }
  pool.run(
      tasks, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace H2OT_ISA
}  // namespace h2ot
