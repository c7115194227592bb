// What both simulators (tests/simt, tests/ptx) know of numbers on a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace bits {

template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// What a tensor core reads of a TF32 operand: the upper 19 bits.
inline float read_tf32(uint64_t bits) { return from_bits<float>(bits & 0xffffe000u); }

// As it cuts off a sum: float32, towards zero.
inline float cut(double exact) {
  const float near = float(exact);
  return std::fabs(double(near)) > std::fabs(exact) ? std::nextafter(near, 0.0f) : near;
}

}  // namespace bits
