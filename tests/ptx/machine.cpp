// Blocks and warps of a launch, one instruction at a time, and what Python calls.
#include "machine.h"

namespace ptx {
namespace {

// What a kernel may ask of where it runs, in this order in Launch::special.
enum Special { kThreadX, kBlockX, kBlockY, kBlockZ, kGridX, kGridY, kGridZ, kThreads, kLane, kSpecials };

struct Launch {
  int64_t registers, threads, shared_bytes, shared_cell;  // bytes that are watched together
  int64_t grid[3];
  int64_t special[kSpecials];  // registers, or -1
  int64_t constants;
  const int64_t* constant_registers;
  const uint64_t* constant_values;
};

uint32_t at(const Warp& warp, int64_t position, uint32_t among) {
  uint32_t found = 0;
  for (int lane = 0; lane < kLanes; lane++)
    found |= uint32_t((among >> lane & 1) && warp.position[lane] == position) << lane;
  return found;
}

int64_t lowest(const Warp& warp, uint32_t among) {
  int64_t found = INT64_MAX;
  for (int lane = 0; lane < kLanes; lane++) {
    if (among >> lane & 1) found = std::min(found, warp.position[lane]);
  }
  return found;
}

uint32_t chosen_by_predicate(Warp& warp, const Instruction& in, uint32_t mask) {
  if (in.predicate < 0) return mask;
  const uint64_t* predicate = warp.lanes(in.predicate);
  uint32_t found = 0;
  for (int lane = 0; lane < kLanes; lane++) found |= uint32_t((predicate[lane] != 0) != in.negated) << lane;
  return found & mask;
}

void go_to(Warp& warp, int64_t position, uint32_t mask) {
  for (int lane = 0; lane < kLanes; lane++) {
    if (mask >> lane & 1) warp.position[lane] = position;
  }
}

// Until all of the warp have ended or wait at a barrier of the block.
void run_warp(Warp& warp) {
  const std::vector<Instruction>& program = warp.block->grid->program;
  bool together = at(warp, warp.position[__builtin_ctz(warp.alive)], warp.alive) == warp.alive;
  int64_t position = lowest(warp, warp.alive);
  while (true) {
    uint32_t mask = warp.alive;
    if (!together) {
      uint32_t free = warp.alive & ~warp.parked;
      if (free == 0) throw Problem("lanes of a warp wait for others, which wait elsewhere or have ended");
      position = lowest(warp, free);
      mask = at(warp, position, warp.alive);
      warp.parked &= ~mask;
      together = mask == warp.alive;
    }
    const Instruction& in = program[position];
    warp.block->grid->at = position;
    const uint32_t chosen = chosen_by_predicate(warp, in, mask);
    int64_t next = position + 1;
    switch (in.operation.kind) {
      case Kind::simple:
        in.operation.handler(warp, in, chosen);
        break;
      case Kind::branch:
        if (chosen == mask) {
          next = in.target;
        } else if (chosen) {
          go_to(warp, in.target, chosen);
          go_to(warp, next, mask & ~chosen);
          together = false;
          continue;
        }
        break;
      case Kind::end:
        for (int lane = 0; lane < kLanes; lane++) {
          if ((chosen >> lane & 1) && !warp.copies[lane].empty()) throw Problem("a thread ends before its copies land");
        }
        warp.alive &= ~chosen;
        if (warp.alive == 0) return;
        go_to(warp, next, mask & ~chosen);
        together = false;
        continue;
      case Kind::block_barrier:
      case Kind::together:
        if (mask != kAll) {
          if (warp.alive != kAll) throw Problem("a warp operation after some of its lanes have ended");
          warp.parked |= mask;
          continue;
        }
        if (chosen != kAll) throw Problem("a warp operation under a condition");
        if (in.operation.kind == Kind::block_barrier) {
          go_to(warp, next, mask);
          warp.at_barrier = true;
          return;
        }
        in.operation.handler(warp, in, mask);
        break;
    }
    if (together) {
      position = next;
    } else {
      go_to(warp, next, mask);
    }
  }
}

void start(Block& block, const Launch& launch, const int64_t (&index)[3]) {
  for (int64_t number = 0; number < launch.threads / kLanes; number++) {
    Warp& warp = block.warps[number];
    warp.block = &block;
    warp.number = int32_t(number);
    warp.registers.assign(size_t(launch.registers) * kLanes, ~uint64_t(0));
    warp.alive = kAll;
    warp.parked = warp.barriers = 0;
    warp.at_barrier = false;
    go_to(warp, 0, kAll);
    std::fill_n(warp.group, kLanes, 0);
    for (auto& copies : warp.copies) copies.clear();
    for (int64_t n = 0; n < launch.constants; n++) {
      std::fill_n(warp.lanes(int32_t(launch.constant_registers[n])), kLanes, launch.constant_values[n]);
    }
    for (int lane = 0; lane < kLanes; lane++) {
      const int64_t values[kSpecials] = {
          number * kLanes + lane, index[0],       index[1],       index[2], launch.grid[0],
          launch.grid[1],         launch.grid[2], launch.threads, lane};
      for (int n = 0; n < kSpecials; n++) {
        if (launch.special[n] >= 0) warp.lanes(int32_t(launch.special[n]))[lane] = uint64_t(values[n]);
      }
    }
  }
}

void run_block(Block& block) {
  Grid& grid = *block.grid;
  std::vector<Warp*> ready, waiting;
  for (Warp& warp : block.warps) ready.push_back(&warp);
  while (!ready.empty()) {
    waiting.clear();
    bool ended = false;
    while (!ready.empty()) {
      std::swap(ready[grid.draw(ready.size())], ready.back());
      Warp& warp = *ready.back();
      ready.pop_back();
      run_warp(warp);
      if (warp.at_barrier) {
        waiting.push_back(&warp);
      } else {
        ended = true;
      }
      warp.at_barrier = false;
    }
    if (ended && !waiting.empty()) throw Problem("a thread ends while others wait at a barrier");
    block.barriers++;
    ready = waiting;
  }
}

void run_grid(Grid& grid, const Launch& launch) {
  std::vector<int64_t> order(launch.grid[0] * launch.grid[1] * launch.grid[2]);
  for (size_t n = 0; n < order.size(); n++) order[n] = int64_t(n);
  for (size_t n = order.size(); n > 1; n--) std::swap(order[n - 1], order[grid.draw(n)]);
  grid.released.assign(order.size(), 0);
  Range shared = {0, uint64_t(launch.shared_bytes), __builtin_ctzll(launch.shared_cell), {}};
  Block block;
  block.grid = &grid;
  block.shared_range = &shared;
  block.warps.resize(launch.threads / kLanes);
  for (const int64_t n : order) {
    block.number = int32_t(n);
    block.barriers = block.acquired = 0;
    block.shared.assign(launch.shared_bytes, kPoison);
    start(block, launch,
          {n % launch.grid[0], n / launch.grid[0] % launch.grid[1], n / launch.grid[0] / launch.grid[1]});
    run_block(block);
  }
}

// Of an instruction: operation, predicate, negated, target, two offsets, number of operands, the first of them.
constexpr int kFields = 8;

}  // namespace
}  // namespace ptx

extern "C" {

// A number for the instruction of this name, -1 where it is not known.
int64_t ptx_operation(const char* name) {
  const auto& known = ptx::operations();
  const auto found = known.find(name);
  return found == known.end() ? -1 : std::distance(known.begin(), found);
}

// Runs a launch. instructions: [count][kFields]; operands: of all of them; ranges: [range_count][begin, bytes, bytes of
// a cell]. 0, or 1, with what went wrong in `message` and the instruction in `at`.
int32_t ptx_run(const int64_t* instructions, int64_t count, const int32_t* operands, const ptx::Launch* launch,
                const int64_t* ranges, int64_t range_count, uint64_t seed, int64_t* at, char* message,
                int64_t message_bytes) {
  using namespace ptx;
  static const std::vector<Operation> known = [] {
    std::vector<Operation> found;
    for (const auto& [name, operation] : operations()) found.push_back(operation);
    return found;
  }();
  Grid grid;
  grid.random = seed * 0x9e3779b97f4a7c15ull + 1;
  grid.program.resize(count);
  for (int64_t n = 0; n < count; n++) {
    const int64_t* given = instructions + n * kFields;
    Instruction& in = grid.program[n];
    in.operation = known[given[0]];
    in.predicate = int32_t(given[1]);
    in.negated = given[2] != 0;
    in.target = given[3];
    in.offset = given[4];
    in.second_offset = given[5];
    in.count = int32_t(given[6]);
    in.operands = operands + given[7];
  }
  for (int64_t n = 0; n < range_count; n++) {
    const int64_t* given = ranges + n * 3;
    grid.ranges.push_back({uint64_t(given[0]), uint64_t(given[1]), __builtin_ctzll(given[2]), {}});
  }
  try {
    run_grid(grid, *launch);
  } catch (const Problem& problem) {
    std::snprintf(message, message_bytes, "%s", problem.what());
    *at = grid.at;
    return 1;
  }
  return 0;
}
}
