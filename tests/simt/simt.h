// Runs CUDA kernels on a CPU: csrc/cuda/device.cuh includes this instead of CUDA's headers, and g++ compiles the kernel
// source unmodified.
//
// A fiber per thread of a block; blocks one after the other. Threads run in an order drawn from a seed (of half the
// blocks every warp as far as it comes before the next one), change at every barrier and warp operation, and all of a
// warp (of a block) must meet at the same one: else the run aborts with the place. Shared memory is a heap block of
// exactly the size asked for, filled with a pattern that reads as NaN and as token -1: AddressSanitizer sees what lies
// outside, comparisons see what was never written. x86-64 only.
#pragma once

#if !defined(__x86_64__) || !defined(__linux__)
#error "the simulator switches fibers in x86-64 assembly"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "bits.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

#define __global__
#define __launch_bounds__(...)
#define H2OT_DEVICE inline __attribute__((noinline))

namespace simt {

using bits::cut, bits::from_bits, bits::to_bits;

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned char kPoison = 0xff;

struct Index {
  uint32_t x, y, z;
};

// What a lane brings to a warp operation, and takes from it.
struct Exchange {
  const char* place;
  uint64_t value, result;
  int32_t source;  // a lane, or what is xored with or subtracted from the lane
  float* c;
  const uint32_t *a, *b;
  uint32_t* loaded;
};
typedef void (*WarpOperation)(Exchange* const (&lanes)[kLanes]);

enum class State { ready, at_warp, at_block, done };

struct Thread {
  void* stack_pointer;
  State state;
  Exchange* exchange;
  WarpOperation operation;
};

// An asynchronous copy of 16 bytes into shared memory, on its way until its thread waits for its group.
struct Copy {
  unsigned char* to;
  const void* from;
  bool there;
  uint64_t group;
};
struct Copies {
  std::vector<Copy> under_way;
  uint64_t committed = 0;  // groups
};

[[noreturn]] inline void stop(const char* what, const char* place) {
  std::fprintf(stderr, "simt: %s (%s)\n", what, place);
  std::fflush(stderr);
  std::_Exit(70);
}

// The one block that runs.
struct Machine {
  std::vector<Thread> threads;
  std::vector<std::unique_ptr<unsigned char[]>> stacks;
  std::vector<Copies> copies;
  std::vector<int> ready;
  std::vector<int> at_warp;  // arrived lanes per warp
  int at_block = 0, running = 0, alive = 0;
  const char* block_place = "";
  void* scheduler = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  unsigned char* shared = nullptr;
  uint64_t random = 1;

  uint64_t draw(uint64_t limit) {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random % limit;
  }
};
inline Machine machine;

inline Index thread_index, block_index, block_size, grid_size;

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

inline void to_scheduler() { simt_switch(&machine.threads[machine.running].stack_pointer, machine.scheduler); }

inline void enter() {
  machine.body(machine.argument);
  machine.threads[machine.running].state = State::done;
  machine.alive--;
  if (!machine.copies[machine.running].under_way.empty()) stop("a thread ends with copies under way", "cp.async");
  if (machine.at_block > 0) stop("a thread ends while others wait at a barrier", machine.block_place);
  to_scheduler();
  std::abort();
}

inline void prepare(int t) {
  unsigned char* stack = machine.stacks[t].get();
  ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t(63));
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&enter);
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  machine.threads[t] = {top, State::ready, nullptr, nullptr};
}

inline void run_block(int threads) {
  machine.threads.resize(threads);
  machine.copies.assign(threads, Copies());
  while (int(machine.stacks.size()) < threads) machine.stacks.emplace_back(new unsigned char[kStackBytes]);
  machine.at_warp.assign((threads + kLanes - 1) / kLanes, 0);
  machine.at_block = 0;
  machine.alive = threads;
  machine.ready.clear();
  for (int t = 0; t < threads; t++) {
    prepare(t);
    machine.ready.push_back(t);
  }
  const bool warp_by_warp = machine.draw(2) == 1;
  if (warp_by_warp && machine.draw(2) == 1) std::reverse(machine.ready.begin(), machine.ready.end());
  while (!machine.ready.empty()) {
    const uint64_t last = machine.ready.size() - 1, pick = warp_by_warp ? last : machine.draw(last + 1);
    const int t = machine.ready[pick];
    machine.ready[pick] = machine.ready.back();
    machine.ready.pop_back();
    machine.running = t;
    thread_index = {uint32_t(t), 0, 0};
    simt_switch(&machine.scheduler, machine.threads[t].stack_pointer);
  }
  if (machine.alive > 0) {
    for (const Thread& thread : machine.threads) {
      if (thread.state == State::at_warp) stop("a warp operation that not all lanes reach", thread.exchange->place);
    }
    stop("a barrier that not all threads reach", machine.block_place);
  }
}

inline void block_barrier(const char* place) {
  if (machine.at_block > 0 && std::strcmp(machine.block_place, place) != 0) {
    stop("threads wait at different barriers", place);
  }
  machine.block_place = place;
  machine.threads[machine.running].state = State::at_block;
  if (++machine.at_block == machine.alive) {
    machine.at_block = 0;
    for (int t = 0; t < int(machine.threads.size()); t++) {
      if (machine.threads[t].state != State::at_block) continue;
      machine.threads[t].state = State::ready;
      machine.ready.push_back(t);
    }
  }
  to_scheduler();
}

inline void warp_operation(WarpOperation operation, Exchange& exchange) {
  const int self = machine.running, warp = self / kLanes;
  Thread& thread = machine.threads[self];
  thread.exchange = &exchange;
  thread.operation = operation;
  thread.state = State::at_warp;
  if (++machine.at_warp[warp] == kLanes) {
    machine.at_warp[warp] = 0;
    Exchange* lanes[kLanes];
    for (int lane = 0; lane < kLanes; lane++) {
      Thread& other = machine.threads[warp * kLanes + lane];
      if (other.operation != operation || std::strcmp(other.exchange->place, exchange.place) != 0) {
        stop("lanes meet at different warp operations", exchange.place);
      }
      lanes[lane] = other.exchange;
      other.state = State::ready;
      machine.ready.push_back(warp * kLanes + lane);
    }
    operation(lanes);
  }
  to_scheduler();
}

inline void check_all(uint32_t mask, const char* place) {
  if (mask != 0xffffffff) stop("a warp operation of some lanes only", place);
}

template <class T>
T shuffle(uint32_t mask, T v, int source, WarpOperation operation, const char* place) {
  static_assert(sizeof(T) <= 8);
  check_all(mask, place);
  Exchange exchange = {place, to_bits(v), 0, source, nullptr, nullptr, nullptr, nullptr};
  warp_operation(operation, exchange);
  return from_bits<T>(exchange.result);
}

inline void take_from_lane(Exchange* const (&lanes)[kLanes]) {
  for (Exchange* lane : lanes) lane->result = lanes[lane->source & 31]->value;
}
inline void take_from_xor(Exchange* const (&lanes)[kLanes]) {
  for (int lane = 0; lane < kLanes; lane++) lanes[lane]->result = lanes[(lane ^ lanes[lane]->source) & 31]->value;
}
inline void take_from_below(Exchange* const (&lanes)[kLanes]) {
  for (int lane = 0; lane < kLanes; lane++) {
    const int source = lane - lanes[lane]->source;
    lanes[lane]->result = lanes[source < 0 ? lane : source]->value;
  }
}
inline void take_ballot(Exchange* const (&lanes)[kLanes]) {
  uint64_t bits = 0;
  for (int lane = 0; lane < kLanes; lane++) bits |= uint64_t(lanes[lane]->value != 0) << lane;
  for (Exchange* lane : lanes) lane->result = bits;
}
inline void only_meet(Exchange* const (&)[kLanes]) {}

}  // namespace simt

#include "tensor.h"

namespace simt {

// Runs kernel(job) over the grid, blocks in an order drawn from the seed.
template <class Job>
void run_grid(void (*kernel)(Job), uint32_t grid_x, uint32_t grid_y, int threads, size_t shared_bytes, const Job& job) {
  struct Call {
    void (*kernel)(Job);
    const Job* job;
  } call = {kernel, &job};
  machine.body = [](void* argument) {
    const Call& c = *static_cast<Call*>(argument);
    c.kernel(*c.job);
  };
  machine.argument = &call;
  std::vector<uint64_t> blocks(uint64_t(grid_x) * grid_y);
  for (uint64_t n = 0; n < blocks.size(); n++) blocks[n] = n;
  for (uint64_t n = blocks.size(); n > 1; n--) std::swap(blocks[n - 1], blocks[machine.draw(n)]);
  block_size = {uint32_t(threads), 1, 1};
  grid_size = {grid_x, grid_y, 1};
  for (const uint64_t n : blocks) {
    block_index = {uint32_t(n % grid_x), uint32_t(n / grid_x), 0};
    void* shared = nullptr;
    if (shared_bytes > 0) {
      shared = std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128);
      std::memset(shared, kPoison, shared_bytes);
    }
    machine.shared = static_cast<unsigned char*>(shared);
    run_block(threads);
    std::free(shared);
  }
}

}  // namespace simt

#define SIMT_STRING_(x) #x
#define SIMT_STRING(x) SIMT_STRING_(x)
#define SIMT_PLACE __FILE__ ":" SIMT_STRING(__LINE__)

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_size
#define gridDim simt::grid_size
#define __syncthreads() simt::block_barrier(SIMT_PLACE)
#define __syncwarp() ((void)simt::shuffle(0xffffffffu, 0, 0, simt::only_meet, SIMT_PLACE))
#define __shfl_sync(mask, v, lane) simt::shuffle(mask, v, lane, simt::take_from_lane, SIMT_PLACE)
#define __shfl_xor_sync(mask, v, lane) simt::shuffle(mask, v, lane, simt::take_from_xor, SIMT_PLACE)
#define __shfl_up_sync(mask, v, delta) simt::shuffle(mask, v, delta, simt::take_from_below, SIMT_PLACE)
#define __ballot_sync(mask, flag) \
  uint32_t(simt::shuffle(mask, uint64_t((flag) ? 1 : 0), 0, simt::take_ballot, SIMT_PLACE))

inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }

// Atomics: fibers change only at barriers and warp operations.
inline unsigned long long atomicMax(unsigned long long* at, unsigned long long v) {
  const unsigned long long before = *at;
  if (v > before) *at = v;
  return before;
}
inline int32_t atomicAdd(int32_t* at, int32_t v) {
  const int32_t before = *at;
  *at += v;
  return before;
}
inline void __threadfence() {}

namespace h2ot {
namespace cuda {

constexpr uint32_t kAllLanes = 0xffffffff;

inline unsigned char* shared_memory() { return simt::machine.shared; }

inline int32_t block_y_here() { return int32_t(blockIdx.y); }
inline int32_t thread_here() { return int32_t(threadIdx.x); }

inline float widen_half(uint16_t bits) { return float(simt::from_bits<_Float16>(bits)); }

inline uint16_t narrow_half(float v) { return v != v ? 0x7fff : uint16_t(simt::to_bits(_Float16(v))); }
inline uint16_t narrow_brain(float v) {
  const uint32_t bits = uint32_t(simt::to_bits(v));
  return v != v ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void copy_async(void* shared, const void* from, bool there) { simt::start_copy(shared, from, there); }
inline void commit_copies() { simt::machine.copies[simt::machine.running].committed++; }
template <int kNewest>
void wait_for_copies() {
  simt::wait_for_groups(kNewest);
}

inline void load_matrices(uint32_t (&r)[4], const void* shared) {
  simt::Exchange exchange = {"load_matrices", reinterpret_cast<uint64_t>(shared), 0, 0, nullptr, nullptr, nullptr, r};
  simt::warp_operation(simt::load, exchange);
}
inline void mma_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::Exchange exchange = {"mma_float16", 0, 0, 0, c, a, b, nullptr};
  simt::warp_operation(simt::multiply<simt::read_float16>, exchange);
}
inline void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::Exchange exchange = {"mma_bfloat16", 0, 0, 0, c, a, b, nullptr};
  simt::warp_operation(simt::multiply<simt::read_bfloat16>, exchange);
}

constexpr int64_t kSharedUnasked = 48 << 10, kSharedMost = 99 << 10;

inline void follow_previous() {}  // kernels run one after the other

template <class Job>
int32_t launch(void (*kernel)(Job), int64_t grid_x, int64_t grid_y, int32_t threads, int64_t shared_bytes, void*,
               const Job& job, bool = false) {
  if (grid_x < 1 || grid_x > INT32_MAX || grid_y < 1 || grid_y > 65535 || threads > 1024 ||
      shared_bytes > kSharedMost) {
    return 9;  // cudaErrorInvalidConfiguration
  }
  simt::run_grid(kernel, uint32_t(grid_x), uint32_t(grid_y), threads, size_t(shared_bytes), job);
  return 0;
}

}  // namespace cuda
}  // namespace h2ot
