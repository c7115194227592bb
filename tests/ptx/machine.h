// A machine that runs PTX on a CPU: warps of 32 lanes, blocks one after the other, memory that watches its users.
//
// Lanes of a warp run together as far as they can: those that stand at the lowest instruction go first. Warps of a
// block, and blocks of a grid, run in an order drawn from a seed; warps change at barriers. Every access is checked:
// it lies within the memory of a tensor of the launch or the block's shared memory, at a multiple of its size, and no
// other thread has written or read the place without a barrier, or between blocks a release and an acquire, in between.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "../simt/bits.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAll = 0xffffffffu;
constexpr unsigned char kPoison = 0xff;  // NaN, and token -1

using bits::cut, bits::from_bits, bits::read_tf32, bits::to_bits;

struct Warp;
struct Instruction;
typedef void (*Handler)(Warp&, const Instruction&, uint32_t mask);
enum class Kind : int32_t { simple, branch, end, block_barrier, together };
struct Operation {
  Handler handler;
  Kind kind;
};

struct Instruction {
  Operation operation;
  int32_t predicate;  // a register, or -1
  bool negated;
  int64_t target, offset, second_offset;
  int32_t count;  // of the operands
  const int32_t* operands;
};

struct Problem : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Who touched a place last, and when.
struct Mark {
  int32_t block = -1, thread = -1;  // thread -2: several
  uint32_t barriers = 0, warp_barriers = 0;
};
struct Cell {
  Mark written, read;
};

struct Range {
  uint64_t begin, bytes;
  int cell_shift;                                         // of the bytes of a cell, a power of two
  std::unordered_map<uint64_t, std::vector<Cell>> pages;  // of those places that were touched
  uint64_t last_page = ~uint64_t(0);
  Cell* last_cells = nullptr;

  Cell& cell(uint64_t number) {
    constexpr uint64_t kCells = 1024;
    if (number / kCells != last_page) {
      std::vector<Cell>& page = pages[number / kCells];
      if (page.empty()) page.resize(kCells);
      last_page = number / kCells;
      last_cells = page.data();
    }
    return last_cells[number % kCells];
  }

  bool holds(uint64_t address, uint64_t size) const {
    return address >= begin && size <= bytes && address - begin <= bytes - size;
  }
};

struct Copy {  // cp.async: lands when it is waited for
  uint64_t from, to;
  int32_t bytes, valid;
  int64_t group;
};

struct Block;

struct Warp {
  Block* block;
  int32_t number;
  std::vector<uint64_t> registers;  // [register][lane]
  int64_t position[kLanes];
  uint32_t alive, parked;  // parked: lanes that wait for the others at a warp operation or barrier
  bool at_barrier;
  uint32_t barriers;
  std::vector<Copy> copies[kLanes];
  int64_t group[kLanes];

  uint64_t* lanes(int32_t index) { return &registers[size_t(index) * kLanes]; }
};

struct Grid {
  std::vector<Instruction> program;
  std::vector<Range> ranges;
  std::vector<uint32_t> released;  // per block: barriers passed before its last atomic, plus one
  uint64_t random;
  int64_t at = 0;  // the instruction that runs

  uint64_t draw(uint64_t limit) {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random % limit;
  }
};

struct Block {
  Grid* grid;
  int32_t number;
  uint32_t barriers = 0, acquired = 0;  // acquired: barriers passed before its first atomic, plus one
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  Range* shared_range;
};

inline std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(value));
  return text;
}

// Whether what `mark` says happened before what this thread does now.
inline bool ordered(const Mark& mark, const Warp& warp, int32_t thread, bool is_shared) {
  const Block& block = *warp.block;
  if (mark.block < 0) return true;
  if (mark.block != block.number) {
    return is_shared || (block.grid->released[mark.block] > mark.barriers + 1 && block.acquired > 0 &&
                         block.barriers + 1 > block.acquired);
  }
  if (mark.thread == thread || mark.barriers != block.barriers) return true;
  return mark.thread >= 0 && mark.thread / kLanes == thread / kLanes && mark.warp_barriers != warp.barriers;
}

enum class Access { read, write, atomic };

struct Request {
  Warp& warp;
  int lane;
  uint64_t address;
  int bytes;
  Access access;
  bool is_shared;

  int32_t thread() const { return warp.number * kLanes + lane; }

  [[noreturn]] void fail(const std::string& what) const {
    const char* verb = access == Access::read ? " reads " : access == Access::write ? " writes " : " updates ";
    throw Problem("thread " + std::to_string(thread()) + " of block " + std::to_string(warp.block->number) + verb +
                  std::to_string(bytes) + " bytes of " + (is_shared ? "shared" : "global") + " memory at " +
                  hex(address) + ", " + what);
  }
  [[noreturn]] void race(const Mark& other, const char* verb) const {
    fail(std::string("which thread ") + (other.thread < 0 ? "(several)" : std::to_string(other.thread)) + " of block " +
         std::to_string(other.block) + verb + " without a barrier between");
  }
};

// The checked place of an access, of a power of two of bytes. Threads may write the same bits to one place.
inline unsigned char* place(const Request& request, const void* value = nullptr) {
  Warp& warp = request.warp;
  Block& block = *warp.block;
  const uint64_t address = request.address;
  const int32_t thread = request.thread();
  if (address & uint64_t(request.bytes - 1)) request.fail("which is not a multiple of the size");
  Range* range = nullptr;
  if (request.is_shared) {
    if (block.shared_range->holds(address, request.bytes)) range = block.shared_range;
  } else {
    for (Range& candidate : block.grid->ranges) {
      if (candidate.holds(address, request.bytes)) range = &candidate;
    }
  }
  if (!range) request.fail("outside of all that the launch was given");
  unsigned char* found = request.is_shared ? block.shared.data() + address : reinterpret_cast<unsigned char*>(address);
  if (request.access == Access::atomic) return found;
  const uint64_t first = (address - range->begin) >> range->cell_shift;
  const uint64_t last = (address - range->begin + request.bytes - 1) >> range->cell_shift;
  const Mark now = {block.number, thread, block.barriers, warp.barriers};
  for (uint64_t n = first; n <= last; n++) {
    Cell& cell = range->cell(n);
    const bool after_write = ordered(cell.written, warp, thread, request.is_shared);
    if (request.access == Access::read) {
      if (!after_write) request.race(cell.written, " wrote");
      const Mark& read = cell.read;
      const bool others = read.block == block.number && read.barriers == block.barriers && read.thread != thread;
      cell.read = now;
      if (others) cell.read.thread = -2;
      continue;
    }
    if (!after_write && std::memcmp(found, value, request.bytes) != 0) request.race(cell.written, " wrote");
    if (!ordered(cell.read, warp, thread, request.is_shared)) request.race(cell.read, " read");
    cell.written = now;
  }
  return found;
}

inline uint64_t address_of(Warp& warp, int32_t operand, int64_t offset, int lane, bool is_shared) {
  const uint64_t address = warp.lanes(operand)[lane] + uint64_t(offset);
  return is_shared ? uint32_t(address) : address;
}

const std::unordered_map<std::string, Operation>& operations();

}  // namespace ptx
