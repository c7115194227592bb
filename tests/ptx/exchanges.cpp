// Instructions of memory and of whole warps: loads, stores, asynchronous copies, atomics, shuffles, branches.
#include "elementwise.h"

namespace ptx {
namespace {

void land(Warp& warp, int lane, const Copy& copy) {
  unsigned char bytes[16] = {};
  if (copy.valid > 0) std::memcpy(bytes, reinterpret_cast<const void*>(copy.from), copy.valid);
  std::memcpy(place({warp, lane, copy.to, copy.bytes, Access::write, true}, bytes), bytes, copy.bytes);
}

template <class T, int count, bool is_shared>
void load(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(mask, [&](int lane) {
    const uint64_t address = address_of(warp, in.operands[count], in.offset, lane, is_shared);
    const unsigned char* from = place({warp, lane, address, int(sizeof(T)) * count, Access::read, is_shared});
    for (int n = 0; n < count; n++) {
      T value;
      std::memcpy(&value, from + n * sizeof(T), sizeof(T));
      using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
      warp.lanes(in.operands[n])[lane] = uint64_t(Wide(value));
    }
  });
}

template <class T, int count, bool is_shared>
void store(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(mask, [&](int lane) {
    T values[count];
    for (int n = 0; n < count; n++) values[n] = T(warp.lanes(in.operands[1 + n])[lane]);
    const uint64_t address = address_of(warp, in.operands[0], in.offset, lane, is_shared);
    unsigned char* to = place({warp, lane, address, int(sizeof values), Access::write, is_shared}, values);
    std::memcpy(to, values, sizeof values);
  });
}

template <class T, int count>
void add_accesses(Table& table, const std::string& type) {
  const std::string vector = count == 1 ? "." : ".v" + std::to_string(count) + ".";
  if constexpr (sizeof(T) * count <= 16) {
    for (const char* cache : {"", ".ca", ".cg"}) {
      table[std::string("ld.global") + cache + vector + type] = {load<T, count, false>, Kind::simple};
    }
    table["ld.shared" + vector + type] = {load<T, count, true>, Kind::simple};
    table["st.global" + vector + type] = {store<T, count, false>, Kind::simple};
    table["st.shared" + vector + type] = {store<T, count, true>, Kind::simple};
  }
}

template <class T>
void add_vectors(Table& table, const std::string& type) {
  add_accesses<T, 1>(table, type);
  add_accesses<T, 2>(table, type);
  add_accesses<T, 4>(table, type);
}

// Lanes one after the other, beginning anywhere. What the block did before a barrier is released by it.
template <class T, auto function>
void atomic(Warp& warp, const Instruction& in, uint32_t mask) {
  Block& block = *warp.block;
  const int first = int(block.grid->draw(kLanes));
  for (int n = 0; n < kLanes; n++) {
    const int lane = (first + n) % kLanes;
    if (!(mask >> lane & 1)) continue;
    const uint64_t address = address_of(warp, in.operands[1], in.offset, lane, false);
    unsigned char* at = place({warp, lane, address, int(sizeof(T)), Access::atomic, false});
    T before, given = from_bits<T>(warp.lanes(in.operands[2])[lane]);
    std::memcpy(&before, at, sizeof before);
    const T after = function(before, given);
    std::memcpy(at, &after, sizeof after);
    warp.lanes(in.operands[0])[lane] = to_bits(before);
    block.grid->released[block.number] = block.barriers + 1;
    if (block.acquired == 0) block.acquired = block.barriers + 1;
  }
}

template <class T>
void add_atomics(Table& table, const std::string& type) {
  const std::string start = "atom.global.gpu.acq_rel.";
  table[start + "add." + type] = {atomic<T, [](T a, T b) { return T(a + b); }>, Kind::simple};
  table[start + "min." + type] = {atomic<T, [](T a, T b) { return std::min(a, b); }>, Kind::simple};
  table[start + "max." + type] = {atomic<T, [](T a, T b) { return std::max(a, b); }>, Kind::simple};
}

void begin_copy(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(mask, [&](int lane) {
    Copy copy;
    copy.to = address_of(warp, in.operands[0], in.offset, lane, true);
    copy.from = address_of(warp, in.operands[1], in.second_offset, lane, false);
    copy.bytes = int32_t(warp.lanes(in.operands[2])[lane]);
    copy.valid = int32_t(warp.lanes(in.operands[3])[lane]);
    copy.group = warp.group[lane];
    if (copy.valid < 0 || copy.valid > copy.bytes) throw Problem("cp.async of more than its size");
    if (copy.valid > 0) {
      if (copy.from % copy.bytes) throw Problem("cp.async from an address that is not a multiple of its size");
      const int step = copy.valid == copy.bytes ? copy.bytes : 1;
      for (int n = 0; n < copy.valid; n += step) place({warp, lane, copy.from + n, step, Access::read, false});
    }
    warp.copies[lane].push_back(copy);
  });
}
void commit_copies(Warp& warp, const Instruction&, uint32_t mask) {
  for (int lane = 0; lane < kLanes; lane++) warp.group[lane] += mask >> lane & 1;
}
// Copies land as late as they may.
void wait_for_copies(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(mask, [&](int lane) {
    const int64_t landed = warp.group[lane] - int64_t(warp.lanes(in.operands[0])[lane]);
    auto& copies = warp.copies[lane];
    while (!copies.empty() && copies.front().group < landed) {
      land(warp, lane, copies.front());
      copies.erase(copies.begin());
    }
  });
}

void check_members(Warp& warp, int32_t operand) {
  if (uint32_t(warp.lanes(operand)[0]) != kAll) throw Problem("a warp operation of some lanes only");
}

enum class Shuffle { bfly, up, down, idx };
template <Shuffle how>
void shuffle(Warp& warp, const Instruction& in, uint32_t) {
  check_members(warp, in.operands[4]);
  uint64_t values[kLanes];
  std::copy_n(warp.lanes(in.operands[1]), kLanes, values);
  for (int lane = 0; lane < kLanes; lane++) {
    const int b = int(warp.lanes(in.operands[2])[lane] & 31), c = int(warp.lanes(in.operands[3])[lane]);
    if (c != (how == Shuffle::up ? 0 : 31)) throw Problem("a shuffle within a part of the warp");
    int from = how == Shuffle::bfly ? lane ^ b : how == Shuffle::idx ? b : how == Shuffle::up ? lane - b : lane + b;
    if (from < 0 || from >= kLanes) from = lane;
    warp.lanes(in.operands[0])[lane] = uint32_t(values[from]);
  }
}

template <class T, auto function>
void reduce(Warp& warp, const Instruction& in, uint32_t) {
  check_members(warp, in.operands[2]);
  const uint64_t* given = warp.lanes(in.operands[1]);
  T all = from_bits<T>(given[0]);
  for (int lane = 1; lane < kLanes; lane++) all = function(all, from_bits<T>(given[lane]));
  std::fill_n(warp.lanes(in.operands[0]), kLanes, to_bits(all));
}

template <class T>
void add_reductions(Table& table, const std::string& type) {
  using U = uint32_t;
  table["redux.sync.add." + type] = {reduce<U, [](U a, U b) { return a + b; }>, Kind::together};
  table["redux.sync.min." + type] = {reduce<T, [](T a, T b) { return std::min(a, b); }>, Kind::together};
  table["redux.sync.max." + type] = {reduce<T, [](T a, T b) { return std::max(a, b); }>, Kind::together};
}

}  // namespace

void add_memory(Table& table) {
  add_vectors<uint8_t>(table, "b8");
  add_vectors<uint16_t>(table, "b16");
  add_vectors<uint32_t>(table, "b32");
  add_vectors<uint64_t>(table, "b64");
  add_accesses<uint8_t, 1>(table, "u8");
  add_accesses<int8_t, 1>(table, "s8");
  add_accesses<uint16_t, 1>(table, "u16");
  add_accesses<int16_t, 1>(table, "s16");
  add_accesses<int32_t, 1>(table, "s32");
  add_atomics<uint32_t>(table, "u32");
  add_atomics<int32_t>(table, "s32");
  add_atomics<uint64_t>(table, "u64");
  add_atomics<int64_t>(table, "s64");
  table["cp.async.ca.shared.global"] = table["cp.async.cg.shared.global"] = {begin_copy, Kind::simple};
  table["cp.async.commit_group"] = {commit_copies, Kind::simple};
  table["cp.async.wait_group"] = {wait_for_copies, Kind::simple};
}

void add_warps(Table& table) {
  table["shfl.sync.bfly.b32"] = {shuffle<Shuffle::bfly>, Kind::together};
  table["shfl.sync.up.b32"] = {shuffle<Shuffle::up>, Kind::together};
  table["shfl.sync.down.b32"] = {shuffle<Shuffle::down>, Kind::together};
  table["shfl.sync.idx.b32"] = {shuffle<Shuffle::idx>, Kind::together};
  add_reductions<int32_t>(table, "s32");
  add_reductions<uint32_t>(table, "u32");
  table["bar.warp.sync"] = {[](Warp& warp, const Instruction& in, uint32_t) {
                              check_members(warp, in.operands[0]);
                              warp.barriers++;
                            },
                            Kind::together};
  table["bra"] = table["bra.uni"] = {nullptr, Kind::branch};
  table["ret"] = {nullptr, Kind::end};
  table["bar.sync"] = {nullptr, Kind::block_barrier};
}

}  // namespace ptx
