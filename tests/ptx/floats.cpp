// Instructions on floating point numbers, and conversions.
//
// Approximate instructions are off by as much as the manual allows, in a direction that depends on their operand alone.
#include "elementwise.h"

namespace ptx {
namespace {

// To nearest, and to zero where a result or an operand is subnormal (.ftz).
float flushed(float a) { return std::fabs(a) < 0x1p-126f ? std::copysign(0.0f, a) : a; }

// -1, 0 or 1, by the bits of the operand.
int direction(uint64_t bits) { return int((bits * 0x9e3779b97f4a7c15ull) >> 62) % 3 - 1; }

float off(float exact, int ulps, float operand) {
  if (!std::isfinite(exact) || exact == 0) return exact;
  return from_bits<float>(to_bits(exact) + uint64_t(int64_t(ulps * direction(to_bits(operand)))));
}

template <class T>
void add_arithmetic(Table& table, const std::string& type) {
  for (const char* rounding : {"", "rn."}) {
    table["add." + (rounding + type)] = two<T, [](T a, T b) { return a + b; }>();
    table["sub." + (rounding + type)] = two<T, [](T a, T b) { return a - b; }>();
    table["mul." + (rounding + type)] = two<T, [](T a, T b) { return a * b; }>();
  }
  table["fma.rn." + type] = three<T, T, [](T a, T b, T c) { return std::fma(a, b, c); }>();
  table["div.rn." + type] = two<T, [](T a, T b) { return a / b; }>();
  table["sqrt.rn." + type] = one<T, [](T a) { return std::sqrt(a); }>();
  table["neg." + type] = one<T, [](T a) { return -a; }>();
  table["abs." + type] = one<T, [](T a) { return std::fabs(a); }>();
  table["min." + type] = two<T, [](T a, T b) { return std::fmin(a, b); }>();
  table["max." + type] = two<T, [](T a, T b) { return std::fmax(a, b); }>();
  table["setp.num." + type] = two<T, [](T a, T b) { return !std::isunordered(a, b); }>();
  table["setp.nan." + type] = two<T, [](T a, T b) { return std::isunordered(a, b); }>();
  table["setp.equ." + type] = two<T, [](T a, T b) { return !(a < b || b < a); }>();
  table["setp.neu." + type] = two<T, [](T a, T b) { return !(a == b); }>();
  table["setp.ltu." + type] = two<T, [](T a, T b) { return !(b <= a); }>();
  table["setp.leu." + type] = two<T, [](T a, T b) { return !(b < a); }>();
  table["setp.gtu." + type] = two<T, [](T a, T b) { return !(a <= b); }>();
  table["setp.geu." + type] = two<T, [](T a, T b) { return !(a < b); }>();
}

// Divisors beyond 2^126 give zero.
float roughly_divided(float a, float b) {
  if (std::isfinite(b) && std::fabs(b) > 0x1p126f) return std::copysign(0.0f, a * b);
  return off(a / b, 2, b);
}

void add_approximations(Table& table) {
  table["fma.rn.ftz.f32"] = three<float, float, [](float a, float b, float c) {
    return flushed(std::fma(flushed(a), flushed(b), flushed(c)));
  }>();
  table["abs.ftz.f32"] = one<float, [](float a) { return std::fabs(flushed(a)); }>();
  table["ex2.approx.f32"] = one<float, [](float a) { return off(std::exp2(a), 2, a); }>();
  table["ex2.approx.ftz.f32"] = one<float, [](float a) { return flushed(off(std::exp2(flushed(a)), 2, a)); }>();
  table["sqrt.approx.ftz.f32"] = one<float, [](float a) { return off(std::sqrt(flushed(a)), 1, a); }>();
  table["div.full.f32"] = two<float, roughly_divided>();
  table["rcp.approx.ftz.f64"] = one<double, [](double a) {  // only the upper halves are read and written
    return from_bits<double>(to_bits(1 / from_bits<double>(to_bits(a) >> 32 << 32)) >> 32 << 32);
  }>();
}

// bfloat16 as a type.
struct Bfloat {
  uint16_t bits;
  Bfloat() = default;
  Bfloat(float v);
  operator float() const { return from_bits<float>(uint64_t(bits) << 16); }
};
Bfloat::Bfloat(float v) {
  const uint32_t whole = uint32_t(to_bits(v));
  bits = std::isnan(v) ? 0x7fff : uint16_t((whole + 0x7fff + (whole >> 16 & 1)) >> 16);
}
uint32_t half_bits(float v) { return uint32_t(to_bits(_Float16(v))); }

// A sum, difference or product in float32, rounded again, is rounded as if once: 24 bits are 2 x 11 + 2.
template <class T>
void add_halves(Table& table, const std::string& type) {
  for (const char* rounding : {"", "rn."}) {
    table["add." + (rounding + type)] = two<T, [](T a, T b) { return T(float(a) + float(b)); }>();
    table["sub." + (rounding + type)] = two<T, [](T a, T b) { return T(float(a) - float(b)); }>();
    table["mul." + (rounding + type)] = two<T, [](T a, T b) { return T(float(a) * float(b)); }>();
  }
  table["neg." + type] = one<uint16_t, [](uint16_t a) { return uint16_t(a ^ 0x8000u); }>();
  table["abs." + type] = one<uint16_t, [](uint16_t a) { return uint16_t(a & 0x7fffu); }>();
  add_comparisons<T>(table, type);
}

template <class To, class From>
void convert(Table& table, const std::string& name) {
  table["cvt." + name] = one<From, [](From a) { return To(a); }>();
}

// Towards zero, within what the integer holds; NaN of 64 bits: the least.
template <class To, class From>
void add_cuts(Table& table, const std::string& name) {
  table["cvt.rzi." + name] = one<From, [](From a) {
    constexpr From limit = From(1) * (uint64_t(1) << (sizeof(To) * 8 - 1));
    if (std::isnan(a)) return sizeof(To) == 8 || sizeof(From) == 8 ? std::numeric_limits<To>::min() : To(0);
    if (a <= -limit) return std::numeric_limits<To>::min();
    return limit <= a ? std::numeric_limits<To>::max() : To(a);
  }>();
}

void add_conversions(Table& table) {
  add_cuts<int32_t, float>(table, "s32.f32");
  add_cuts<int64_t, float>(table, "s64.f32");
  add_cuts<int32_t, double>(table, "s32.f64");
  add_cuts<int64_t, double>(table, "s64.f64");
  convert<uint64_t, uint32_t>(table, "u64.u32");
  convert<uint32_t, uint64_t>(table, "u32.u64");
  convert<int64_t, int32_t>(table, "s64.s32");
  convert<int32_t, int64_t>(table, "s32.s64");
  convert<uint32_t, uint16_t>(table, "u32.u16");
  convert<uint16_t, uint32_t>(table, "u16.u32");
  convert<uint64_t, uint16_t>(table, "u64.u16");
  convert<uint16_t, uint64_t>(table, "u16.u64");
  convert<int32_t, int16_t>(table, "s32.s16");
  convert<int32_t, int8_t>(table, "s32.s8");
  convert<int16_t, int8_t>(table, "s16.s8");
  convert<int64_t, int8_t>(table, "s64.s8");
  convert<float, int32_t>(table, "rn.f32.s32");
  convert<float, uint32_t>(table, "rn.f32.u32");
  convert<float, int64_t>(table, "rn.f32.s64");
  convert<float, uint64_t>(table, "rn.f32.u64");
  convert<double, int32_t>(table, "rn.f64.s32");
  convert<double, uint32_t>(table, "rn.f64.u32");
  convert<double, int64_t>(table, "rn.f64.s64");
  convert<double, uint64_t>(table, "rn.f64.u64");
  convert<double, float>(table, "f64.f32");
  convert<float, double>(table, "rn.f32.f64");
  convert<float, _Float16>(table, "f32.f16");
  convert<double, _Float16>(table, "f64.f16");
  convert<float, Bfloat>(table, "f32.bf16");
  table["cvt.f64.bf16"] = one<Bfloat, [](Bfloat a) { return double(float(a)); }>();
  table["cvt.rn.f16.f32"] = one<float, [](float a) { return _Float16(a); }>();
  table["cvt.rn.f16.f64"] = one<double, [](double a) { return _Float16(a); }>();
  table["cvt.rn.bf16.f32"] = one<float, [](float a) { return Bfloat(a); }>();
  table["cvt.rn.f16x2.f32"] = two<float, [](float a, float b) { return half_bits(a) << 16 | half_bits(b); }>();
  table["cvt.rn.bf16x2.f32"] =
      two<float, [](float a, float b) { return uint32_t(Bfloat(a).bits) << 16 | Bfloat(b).bits; }>();
  table["cvt.rna.tf32.f32"] = one<float, [](float a) {
    const uint32_t bits = uint32_t(to_bits(a));
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
  }>();
}

// The halves of 32 bits, each by itself.
template <class T, auto function>
uint32_t halves(uint32_t a, uint32_t b) {
  const uint64_t low = to_bits(T(function(from_bits<T>(a & 0xffff), from_bits<T>(b & 0xffff))));
  const uint64_t high = to_bits(T(function(from_bits<T>(a >> 16), from_bits<T>(b >> 16))));
  return uint32_t(low | high << 16);
}
template <class T>
void add_pairs(Table& table, const std::string& type) {
  for (const char* rounding : {"", "rn."}) {
    table["add." + (rounding + type)] = two<uint32_t, halves<T, [](float a, float b) { return a + b; }>>();
    table["sub." + (rounding + type)] = two<uint32_t, halves<T, [](float a, float b) { return a - b; }>>();
    table["mul." + (rounding + type)] = two<uint32_t, halves<T, [](float a, float b) { return a * b; }>>();
  }
  table["neg." + type] = one<uint32_t, [](uint32_t a) { return a ^ 0x80008000u; }>();
  table["abs." + type] = one<uint32_t, [](uint32_t a) { return a & 0x7fff7fffu; }>();
}

// setp with two results, of the halves of 32 bits.
template <class T>
void equal_pairs(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(mask, [&](int lane) {
    const uint64_t a = warp.lanes(in.operands[2])[lane], b = warp.lanes(in.operands[3])[lane];
    for (int half = 0; half < 2; half++) {
      const float x = from_bits<T>(a >> 16 * half & 0xffff), y = from_bits<T>(b >> 16 * half & 0xffff);
      warp.lanes(in.operands[half])[lane] = x == y;
    }
  });
}

}  // namespace

void add_floats(Table& table) {
  add_arithmetic<float>(table, "f32");
  add_arithmetic<double>(table, "f64");
  add_comparisons<float>(table, "f32");
  add_comparisons<double>(table, "f64");
  add_halves<_Float16>(table, "f16");
  add_halves<Bfloat>(table, "bf16");
  add_pairs<_Float16>(table, "f16x2");
  add_pairs<Bfloat>(table, "bf16x2");
  table["setp.eq.f16x2"] = {equal_pairs<_Float16>, Kind::simple};
  table["setp.eq.bf16x2"] = {equal_pairs<Bfloat>, Kind::simple};
  add_approximations(table);
  add_conversions(table);
}

}  // namespace ptx
