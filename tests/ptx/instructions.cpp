// What each PTX instruction does, by its full name, after the PTX manual (ISA 8.7); integers and moves here. Other
// names are refused. Registers hold 64 bits; what an instruction reads of them is cut to its type.
#include "elementwise.h"

namespace ptx {
namespace {

// Division by zero has no defined result on a GPU: it is an error here.
template <class T>
T divided(T a, T b) {
  if (b == 0) throw Problem("an integer is divided by zero");
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return T(0 - std::make_unsigned_t<T>(a));
  }
  return a / b;
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) throw Problem("the remainder of a division by zero");
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return 0;
  }
  return a % b;
}

// bfe: `count` bits of a from `begin` on, with their sign.
template <class T>
T extracted(T a, T begin, uint32_t count) {
  const uint32_t first = begin & 255, bits = count & 255;
  if (bits < 1 || first + bits > 32) throw Problem("bfe beyond its register");
  return T(uint32_t(a) << (32 - first - bits)) >> (32 - bits);
}

template <class T>
void add_integers(Table& table, const std::string& type) {
  using U = std::make_unsigned_t<T>;
  table["add." + type] = two<U, [](U a, U b) { return U(a + b); }>();
  table["sub." + type] = two<U, [](U a, U b) { return U(a - b); }>();
  table["mul.lo." + type] = two<U, [](U a, U b) { return U(uint64_t(a) * b); }>();
  table["mad.lo." + type] = three<U, U, [](U a, U b, U c) { return U(uint64_t(a) * b + c); }>();
  table["mul.hi." + type] = two<T, [](T a, T b) { return T(__int128(a) * b >> sizeof(T) * 8); }>();
  table["div." + type] = two<T, divided<T>>();
  table["rem." + type] = two<T, remainder<T>>();
  table["min." + type] = two<T, [](T a, T b) { return a < b ? a : b; }>();
  table["max." + type] = two<T, [](T a, T b) { return a < b ? b : a; }>();
  table["neg." + type] = one<U, [](U a) { return U(0 - a); }>();
  table["shr." + type] = shift<T, [](T a, uint32_t n) {
    const uint32_t most = sizeof(T) * 8 - 1;
    return n <= most ? T(a >> n) : std::is_signed_v<T> ? T(a >> most) : T(0);
  }>();
  if constexpr (sizeof(T) <= 4) {
    using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;  // cut by what reads it
    table["mul.wide." + type] = two<T, [](T a, T b) { return Wide(a) * b; }>();
    table["mad.wide." + type] = three<T, uint64_t, [](T a, T b, uint64_t c) { return uint64_t(Wide(a) * b) + c; }>();
  }
  if constexpr (sizeof(T) == 4) {
    table["max.relu." + type] = two<T, [](T a, T b) { return std::max({a, b, T(0)}); }>();
    table["bfe." + type] = three<T, uint32_t, extracted<T>>();
  }
}

template <class T>
void add_bits(Table& table, const std::string& type) {
  table["and." + type] = two<T, [](T a, T b) { return T(a & b); }>();
  table["or." + type] = two<T, [](T a, T b) { return T(a | b); }>();
  table["xor." + type] = two<T, [](T a, T b) { return T(a ^ b); }>();
  table["not." + type] = one<T, [](T a) { return T(~a); }>();
  table["shl." + type] = shift<T, [](T a, uint32_t n) { return n < sizeof(T) * 8 ? T(uint64_t(a) << n) : T(0); }>();
}

template <class T>
void add_moves(Table& table, const std::string& type) {
  table["mov." + type] = one<T, [](T a) { return a; }>();
  using Wide = std::conditional_t<std::is_floating_point_v<T> || std::is_unsigned_v<T>, T, int64_t>;
  table["ld.param." + type] = one<T, [](T a) { return Wide(a); }>();
  table["selp." + type] = three<T, bool, [](T a, T b, bool chosen) { return chosen ? a : b; }>();
}

template <int count, int bits>
void pack(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(mask, [&](int lane) {
    uint64_t whole = 0;
    for (int n = 0; n < count; n++) {
      whole |= (warp.lanes(in.operands[1 + n])[lane] & ((uint64_t(1) << bits) - 1)) << bits * n;
    }
    warp.lanes(in.operands[0])[lane] = whole;
  });
}
template <int count, int bits>
void unpack(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(mask, [&](int lane) {
    const uint64_t whole = warp.lanes(in.operands[count])[lane];
    for (int n = 0; n < count; n++) {
      warp.lanes(in.operands[n])[lane] = whole >> bits * n & ((uint64_t(1) << bits) - 1);
    }
  });
}

uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | uint64_t(b) << 32;
  uint32_t found = 0;
  for (int n = 0; n < 4; n++) {
    const uint32_t nibble = selector >> 4 * n & 15;
    const uint32_t byte = bytes >> 8 * (nibble & 7) & 255;
    found |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * n;
  }
  return found;
}

}  // namespace

void add_floats(Table& table);
void add_memory(Table& table);
void add_warps(Table& table);
void add_matrices(Table& table);

const Table& operations() {
  static const Table made = [] {
    Table table;
    add_integers<int16_t>(table, "s16");
    add_integers<uint16_t>(table, "u16");
    add_integers<int32_t>(table, "s32");
    add_integers<uint32_t>(table, "u32");
    add_integers<int64_t>(table, "s64");
    add_integers<uint64_t>(table, "u64");
    add_bits<uint16_t>(table, "b16");
    add_bits<uint32_t>(table, "b32");
    add_bits<uint64_t>(table, "b64");
    const auto for_types = [&](auto add) {
      add(uint16_t(), {"u16", "b16"});
      add(uint32_t(), {"u32", "b32"});
      add(uint64_t(), {"u64", "b64"});
      add(int16_t(), {"s16"});
      add(int32_t(), {"s32"});
      add(int64_t(), {"s64"});
    };
    for_types([&](auto zero, std::vector<std::string> names) {
      for (const std::string& name : names) {
        add_moves<decltype(zero)>(table, name);
        add_comparisons<decltype(zero)>(table, name);
      }
    });
    table["and.pred"] = two<bool, [](bool a, bool b) { return a && b; }>();
    table["or.pred"] = two<bool, [](bool a, bool b) { return a || b; }>();
    table["xor.pred"] = two<bool, [](bool a, bool b) { return a != b; }>();
    table["not.pred"] = one<bool, [](bool a) { return !a; }>();
    table["mov.pred"] = one<uint8_t, [](uint8_t a) { return a != 0; }>();
    table["popc.b32"] = one<uint32_t, [](uint32_t a) { return uint32_t(__builtin_popcount(a)); }>();
    table["clz.b32"] = one<uint32_t, [](uint32_t a) { return uint32_t(a ? __builtin_clz(a) : 32); }>();
    table["pack.b32.v2"] = {pack<2, 16>, Kind::simple};
    table["pack.b64.v2"] = {pack<2, 32>, Kind::simple};
    table["pack.b64.v4"] = {pack<4, 16>, Kind::simple};
    table["unpack.b32.v2"] = {unpack<2, 16>, Kind::simple};
    table["unpack.b64.v2"] = {unpack<2, 32>, Kind::simple};
    table["unpack.b64.v4"] = {unpack<4, 16>, Kind::simple};
    table["prmt.b32"] = three<uint32_t, uint32_t, permuted>();
    add_moves<float>(table, "f32");
    add_moves<double>(table, "f64");
    add_floats(table);
    add_memory(table);
    add_warps(table);
    add_matrices(table);
    return table;
  }();
  return made;
}

}  // namespace ptx
