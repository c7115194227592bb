// What both simulators (tests/simt, tests/ptx) know of numbers on a GPU.
#pragma once

#include <cmath>
#include <cstdint>

namespace bits {

template <int kBytes>
struct Unsigned;
template <>
struct Unsigned<1> {
  typedef uint8_t type;
};
template <>
struct Unsigned<2> {
  typedef uint16_t type;
};
template <>
struct Unsigned<4> {
  typedef uint32_t type;
};
template <>
struct Unsigned<8> {
  typedef uint64_t type;
};

// No memcpy: AddressSanitizer would watch over its operands at every call.
template <class T>
uint64_t to_bits(T value) {
  return __builtin_bit_cast(typename Unsigned<sizeof(T)>::type, value);
}
template <class T>
T from_bits(uint64_t bits) {
  return __builtin_bit_cast(T, typename Unsigned<sizeof(T)>::type(bits));
}

// What a tensor core reads of a TF32 operand: the upper 19 bits.
inline float read_tf32(uint64_t bits) { return from_bits<float>(bits & 0xffffe000u); }

// As it cuts off a sum: float32, towards zero.
inline float cut(double exact) {
  const float near = float(exact);
  return from_bits<float>(to_bits(near) - (std::fabs(double(near)) > std::fabs(exact)));
}

}  // namespace bits
