// Threads of a block in the simulator, their meetings, and what a warp computes from registers alone. Always optimised
// and without sanitizers, which see the kernels: nothing here touches memory of theirs.
#include <algorithm>
#include <cmath>
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

using bits::cut;

constexpr size_t kStackBytes = 128 << 10;

enum class State { ready, at_warp, at_block, done };

struct Thread {
  void* stack_pointer;
  State state;
  Exchange* exchange;
  WarpOperation operation;
};

// The one block that runs.
struct Block {
  std::vector<Thread> threads;
  std::vector<std::unique_ptr<unsigned char[]>> stacks;
  std::vector<Copies> copies;
  std::vector<int> ready;
  std::vector<int> at_warp;  // arrived lanes per warp
  int at_block = 0, alive = 0;
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
  if (block.ready.empty()) return simt_switch(save, block.scheduler);
  const uint64_t last = block.ready.size() - 1, pick = block.warp_by_warp ? last : machine.draw(last + 1);
  const int t = block.ready[pick];
  block.ready[pick] = block.ready.back();
  block.ready.pop_back();
  if (t == machine.running && save != &block.scheduler) return;
  machine.running = t;
  thread_index = {uint32_t(t), 0, 0};
  simt_switch(save, block.threads[t].stack_pointer);
}

void enter() {
  block.body(block.argument);
  block.threads[machine.running].state = State::done;
  block.alive--;
  if (!block.copies[machine.running].under_way.empty()) stop("a thread ends with copies under way", "cp.async");
  if (block.at_block > 0) stop("a thread ends while others wait at a barrier", block.place);
  go_on(&block.threads[machine.running].stack_pointer);
  std::abort();
}

void prepare(int t) {
  unsigned char* stack = block.stacks[t].get();
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t(63));
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&enter);
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  block.threads[t] = {top, State::ready, nullptr, nullptr};
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
  block.threads.resize(threads);
  block.copies.assign(threads, Copies());
  machine.copies = block.copies.data();
  while (int(block.stacks.size()) < threads) block.stacks.emplace_back(new unsigned char[kStackBytes]);
  block.at_warp.assign((threads + kLanes - 1) / kLanes, 0);
  block.at_block = 0;
  block.alive = threads;
  block.ready.clear();
  for (int t = 0; t < threads; t++) {
    prepare(t);
    block.ready.push_back(t);
  }
  block.warp_by_warp = machine.draw(2) == 1;
  if (block.warp_by_warp && machine.draw(2) == 1) std::reverse(block.ready.begin(), block.ready.end());
  go_on(&block.scheduler);
  if (block.alive > 0) {
    for (const Thread& thread : block.threads) {
      if (thread.state == State::at_warp) stop("a warp operation that not all lanes reach", thread.exchange->place);
    }
    stop("a barrier that not all threads reach", block.place);
  }
}

void block_barrier(const char* place) {
  if (block.at_block > 0 && !same_place(block.place, place)) stop("threads wait at different barriers", place);
  block.place = place;
  block.threads[machine.running].state = State::at_block;
  if (++block.at_block == block.alive) {
    block.at_block = 0;
    for (int t = 0; t < int(block.threads.size()); t++) {
      if (block.threads[t].state != State::at_block) continue;
      block.threads[t].state = State::ready;
      block.ready.push_back(t);
    }
  }
  go_on(&block.threads[machine.running].stack_pointer);
}

void warp_operation(WarpOperation operation, Exchange& exchange) {
  const int self = machine.running, warp = self / kLanes;
  Thread& thread = block.threads[self];
  thread.exchange = &exchange;
  thread.operation = operation;
  thread.state = State::at_warp;
  if (++block.at_warp[warp] == kLanes) {
    block.at_warp[warp] = 0;
    Exchange* lanes[kLanes];
    for (int lane = 0; lane < kLanes; lane++) {
      Thread& other = block.threads[warp * kLanes + lane];
      if (other.operation != operation || !same_place(other.exchange->place, exchange.place)) {
        stop("lanes meet at different warp operations", exchange.place);
      }
      lanes[lane] = other.exchange;
      other.state = State::ready;
      block.ready.push_back(warp * kLanes + lane);
    }
    operation(lanes);
  }
  go_on(&thread.stack_pointer);
}

uint64_t exchanged(uint32_t mask, uint64_t value, int source, WarpOperation operation, const char* place) {
  if (mask != 0xffffffff) stop("a warp operation of some lanes only", place);
  Exchange exchange = {place, value, 0, source, nullptr, nullptr, nullptr, nullptr};
  warp_operation(operation, exchange);
  return exchange.result;
}

void take_from_lane(Exchange* const (&lanes)[kLanes]) {
  for (Exchange* lane : lanes) lane->result = lanes[lane->source & 31]->value;
}
void take_from_xor(Exchange* const (&lanes)[kLanes]) {
  for (int lane = 0; lane < kLanes; lane++) lanes[lane]->result = lanes[(lane ^ lanes[lane]->source) & 31]->value;
}
void take_from_below(Exchange* const (&lanes)[kLanes]) {
  for (int lane = 0; lane < kLanes; lane++) {
    const int source = lane - lanes[lane]->source;
    lanes[lane]->result = lanes[source < 0 ? lane : source]->value;
  }
}
void take_ballot(Exchange* const (&lanes)[kLanes]) {
  uint64_t bits = 0;
  for (int lane = 0; lane < kLanes; lane++) bits |= uint64_t(lanes[lane]->value != 0) << lane;
  for (Exchange* lane : lanes) lane->result = bits;
}
void only_meet(Exchange* const (&)[kLanes]) {}

namespace {

double read_float16(uint32_t bits) { return double(from_bits<_Float16>(bits & 0xffffu)); }
double read_bfloat16(uint32_t bits) { return double(from_bits<float>(uint64_t(bits & 0xffffu) << 16)); }

// Of normal numbers: products of floats of 16 bits, and float32, are.
int exponent_of(double v) { return int(to_bits(v) >> 52 & 0x7ff) - 1023; }
double two_to(int power) { return from_bits<double>(uint64_t(power + 1023) << 52); }

}  // namespace

double half_value(uint32_t bits, bool is_brain) { return is_brain ? read_bfloat16(bits) : read_float16(bits); }

// c + products as a tensor core adds them at worst: all are cut off at 24 bits below the largest, and so is their sum.
float add_products(float c, const double (&products)[16]) {
  double most = std::fabs(double(c));
  for (const double p : products) most = !(std::fabs(p) <= most) ? std::fabs(p) : most;
  if (most == 0) return c;
  if (!(most < HUGE_VAL)) {
    double sum = c;
    for (const double p : products) sum += p;
    return float(sum);
  }
  const int unit = exponent_of(most) - 23;
  const double to_units = two_to(-unit);
  int64_t sum = int64_t(c * to_units);
  for (const double p : products) sum += int64_t(p * to_units);
  return cut(double(sum) * two_to(unit));
}

namespace {

// mma.sync.aligned.m16n8k16.row.col.f32.*.*.f32 with the fragments of the PTX manual, groupID = lane / 4, threadID =
// lane % 4, two values to a register. A (16 x 16): register e at row groupID + (e % 2) 8, columns 2 threadID + (e / 2)
// 8 and the next. B (16 x 8): register e at rows 2 threadID + 8 e and the next, column groupID. C (16 x 8): c0, c1 at
// (groupID, 2 threadID + {0, 1}), c2, c3 at (groupID + 8, ...).
template <double (*kRead)(uint32_t)>
void multiply(Exchange* const (&lanes)[kLanes]) {
  double a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; lane++) {
    const int group = lane / 4, thread = lane % 4;
    for (int half = 0; half < 2; half++) {
      for (int e = 0; e < 4; e++) {
        a[group + e % 2 * 8][2 * thread + e / 2 * 8 + half] = kRead(lanes[lane]->a[e] >> (16 * half));
      }
      for (int e = 0; e < 2; e++) b[2 * thread + e * 8 + half][group] = kRead(lanes[lane]->b[e] >> (16 * half));
    }
  }
  for (int lane = 0; lane < kLanes; lane++) {
    for (int e = 0; e < 4; e++) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      double products[16];
      for (int k = 0; k < 16; k++) products[k] = a[row][k] * b[k][column];
      lanes[lane]->c[e] = add_products(lanes[lane]->c[e], products);
    }
  }
}

}  // namespace

void multiply_float16(Exchange* const (&lanes)[kLanes]) { multiply<read_float16>(lanes); }
void multiply_bfloat16(Exchange* const (&lanes)[kLanes]) { multiply<read_bfloat16>(lanes); }

}  // namespace simt
