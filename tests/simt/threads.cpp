// Threads of a block in the simulator, and their meetings. Always optimised and without sanitizers, which see the
// kernels: nothing here touches memory of theirs.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "simt.h"

namespace simt {

Machine machine;
Index thread_index, block_index, block_size, grid_size;

// Saves the callee-saved registers on this stack, stores its pointer, and continues on another.
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kMostThreads = 1024;

struct Warp {
  int arrived = 0;
  WarpOperation operation = nullptr;  // that its lanes meet at
  const char* place = "";
};

// The one block that runs.
struct Block {
  void* stack_pointer[kMostThreads];
  bool done[kMostThreads];
  int ready[kMostThreads], ready_count = 0;
  Warp warps[kMostThreads / kLanes];
  Lanes lanes[kMostThreads / kLanes];
  std::vector<std::unique_ptr<unsigned char[]>> stacks;
  std::vector<Copies> copies;
  int threads = 0, at_block = 0, alive = 0;
  bool warp_by_warp = false;
  const char* place = "";  // of the barrier
  void* scheduler = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};
Block block;

bool same_place(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

// Leaves this thread, or the start of the block, for the next one that is ready; for the end of the block without one.
void go_on(void** save) {
  if (block.ready_count == 0) return simt_switch(save, block.scheduler);
  const int last = --block.ready_count, pick = block.warp_by_warp ? last : int(machine.draw(uint64_t(last) + 1));
  const int t = block.ready[pick];
  block.ready[pick] = block.ready[last];
  if (t == machine.running && save != &block.scheduler) return;
  machine.running = t;
  thread_index.x = uint32_t(t);
  simt_switch(save, block.stack_pointer[t]);
}

void enter() {
  block.body(block.argument);
  block.done[machine.running] = true;
  block.alive--;
  if (!block.copies[machine.running].under_way.empty()) stop("a thread ends with copies under way", "cp.async");
  if (!block.copies[machine.running].products.empty()) stop("a thread ends with products under way", "wgmma");
  if (block.at_block > 0) stop("a thread ends while others wait at a barrier", block.place);
  go_on(&block.stack_pointer[machine.running]);
  std::abort();
}

// Stacks begin at different places of their pages: caches hold few lines of the same place.
void prepare(int t) {
  unsigned char* stack = block.stacks[t].get() + kStackBytes - t % 64 * 576;
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack) & ~uintptr_t(63));
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&enter);
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  block.stack_pointer[t] = top;
  block.done[t] = false;
}

}  // namespace

void stop(const char* what, const char* place) {
  std::fprintf(stderr, "simt: %s (%s)\n", what, place);
  std::fflush(stderr);
  std::_Exit(70);
}

void run_block(int threads, void (*body)(void*), void* argument) {
  block.body = body;
  block.argument = argument;
  if (int(block.copies.size()) < threads) block.copies.resize(threads);
  for (Copies& copies : block.copies) {
    copies.under_way.clear();
    copies.products.clear();
    copies.committed = 0;
    copies.unpublished = false;
  }
  machine.copies = block.copies.data();
  machine.lanes = block.lanes;
  machine.unpublished = 0;
  while (int(block.stacks.size()) < threads) block.stacks.emplace_back(new unsigned char[kStackBytes]);
  std::fill(block.warps, block.warps + kMostThreads / kLanes, Warp());
  block.threads = block.alive = block.ready_count = threads;
  block.at_block = 0;
  for (int t = 0; t < threads; t++) {
    prepare(t);
    block.ready[t] = t;
  }
  block.warp_by_warp = machine.draw(2) == 1;
  if (block.warp_by_warp && machine.draw(2) == 1) std::reverse(block.ready, block.ready + threads);
  thread_index = {};
  machine.first_of_block = ++machine.era;
  machine.is_inside = true;
  go_on(&block.scheduler);
  machine.is_inside = false;
  if (block.alive > 0) {
    for (const Warp& warp : block.warps) {
      if (warp.arrived > 0) stop("a warp operation that not all lanes reach", warp.place);
    }
    stop("a barrier that not all threads reach", block.place);
  }
}

void block_barrier(const char* place) {
  if (block.at_block > 0 && !same_place(block.place, place)) stop("threads wait at different barriers", place);
  block.place = place;
  if (++block.at_block == block.alive) {
    block.at_block = 0;
    machine.era++;
    for (int t = 0; t < block.threads; t++) {
      if (!block.done[t]) block.ready[block.ready_count++] = t;
    }
  }
  go_on(&block.stack_pointer[machine.running]);
}

void warp_operation(WarpOperation operation, const char* place) {
  const int self = machine.running, number = self / kLanes;
  Warp& warp = block.warps[number];
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.place = place;
  } else if (warp.operation != operation || !same_place(warp.place, place)) {
    stop("lanes meet at different warp operations", place);
  }
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    for (int lane = 0; lane < kLanes; lane++) block.ready[block.ready_count++] = number * kLanes + lane;
    operation(block.lanes[number]);
  }
  go_on(&block.stack_pointer[self]);
}

uint64_t exchanged(uint32_t mask, uint64_t value, int source, WarpOperation operation, const char* place) {
  if (mask != 0xffffffff) stop("a warp operation of some lanes only", place);
  Lanes& lanes = machine.own_lanes();
  const int lane = machine.lane();
  lanes.value[lane] = value;
  lanes.source[lane] = source;
  warp_operation(operation, place);
  return lanes.value[lane];
}

namespace {

template <class Source>
void take(Lanes& lanes, Source source) {
  uint64_t brought[kLanes];
  std::memcpy(brought, lanes.value, sizeof brought);
  for (int lane = 0; lane < kLanes; lane++) lanes.value[lane] = brought[source(lane, lanes.source[lane]) & 31];
}

}  // namespace

void take_from_lane(Lanes& lanes) {
  take(lanes, [](int, int source) { return source; });
}
void take_from_xor(Lanes& lanes) {
  take(lanes, [](int lane, int source) { return lane ^ source; });
}
void take_from_below(Lanes& lanes) {
  take(lanes, [](int lane, int delta) { return lane < delta ? lane : lane - delta; });
}
void take_ballot(Lanes& lanes) {
  uint64_t bits = 0;
  for (int lane = 0; lane < kLanes; lane++) bits |= uint64_t(lanes.value[lane] != 0) << lane;
  for (uint64_t& value : lanes.value) value = bits;
}
void only_meet(Lanes& lanes) { lanes.meetings++; }

}  // namespace simt
