// Instructions that compute each lane from its own registers.
#pragma once

#include "machine.h"

namespace ptx {

using Table = std::unordered_map<std::string, Operation>;

// All of them is the usual case: no lane depends on another's, so the compiler may take several at once.
template <class Function>
inline void each_lane(uint32_t mask, Function function) {
  if (mask == kAll) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; lane++) function(lane);
    return;
  }
  for (; mask != 0; mask &= mask - 1) function(__builtin_ctz(mask));
}

template <class A, auto function>
void unary(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t* d = warp.lanes(in.operands[0]);
  const uint64_t* a = warp.lanes(in.operands[1]);
  each_lane(mask, [&](int lane) { d[lane] = to_bits(function(from_bits<A>(a[lane]))); });
}

template <class A, class B, auto function>
void binary(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t* d = warp.lanes(in.operands[0]);
  const uint64_t *a = warp.lanes(in.operands[1]), *b = warp.lanes(in.operands[2]);
  each_lane(mask, [&](int lane) { d[lane] = to_bits(function(from_bits<A>(a[lane]), from_bits<B>(b[lane]))); });
}

template <class A, class B, class C, auto function>
void ternary(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t* d = warp.lanes(in.operands[0]);
  const uint64_t *a = warp.lanes(in.operands[1]), *b = warp.lanes(in.operands[2]), *c = warp.lanes(in.operands[3]);
  each_lane(mask, [&](int lane) {
    d[lane] = to_bits(function(from_bits<A>(a[lane]), from_bits<B>(b[lane]), from_bits<C>(c[lane])));
  });
}

template <class T, auto function>
Operation one() {
  return {unary<T, function>, Kind::simple};
}
template <class T, auto function>
Operation two() {
  return {binary<T, T, function>, Kind::simple};
}
// a by an amount.
template <class T, auto function>
Operation shift() {
  return {binary<T, uint32_t, function>, Kind::simple};
}
// a and b of one type, c perhaps of another.
template <class T, class C, auto function>
Operation three() {
  return {ternary<T, T, C, function>, Kind::simple};
}

template <class T>
void add_comparisons(Table& table, const std::string& type) {
  table["setp.eq." + type] = two<T, [](T a, T b) { return a == b; }>();
  table["setp.ne." + type] = two<T, [](T a, T b) { return a < b || b < a; }>();
  table["setp.lt." + type] = two<T, [](T a, T b) { return a < b; }>();
  table["setp.le." + type] = two<T, [](T a, T b) { return a <= b; }>();
  table["setp.gt." + type] = two<T, [](T a, T b) { return b < a; }>();
  table["setp.ge." + type] = two<T, [](T a, T b) { return b <= a; }>();
}

}  // namespace ptx
