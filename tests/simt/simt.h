// Runs CUDA kernels on a CPU: csrc/cuda/device.cuh includes this instead of CUDA's headers, and g++ compiles the kernel
// source unmodified.
//
// A fiber per thread of a block; blocks one after the other. Threads run in an order drawn from a seed (of half the
// blocks every warp as far as it comes before the next one), change at every barrier and warp operation, and all of a
// warp (of a block) must meet at the same one: else the run aborts with the place. Shared memory is a heap block of
// exactly the size asked for, filled with a pattern that reads as NaN and as token -1: AddressSanitizer sees what lies
// outside, comparisons see what was never written; watch.h sees races. x86-64 only.
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
#include "watch.h"

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

using bits::from_bits, bits::to_bits;

constexpr int kLanes = 32;
constexpr unsigned char kPoison = 0xff, kLargePoison = 0x70;  // NaN and -1; large numbers

struct Index {
  uint32_t x, y, z;
};

// What the lanes of a warp bring to an operation; what they take from it stands in `value` or behind the pointers.
struct Lanes {
  uint64_t value[kLanes];
  int32_t source[kLanes];  // a lane, or what is xored with or subtracted from the lane
  float* c[kLanes];
  const uint32_t *a[kLanes], *b[kLanes];
  uint32_t* loaded[kLanes];
  uint32_t meetings;  // of __syncwarp
};
typedef void (*WarpOperation)(Lanes& lanes);

// A product of a warpgroup, of which a thread adds its share to c when it waits.
struct GroupProduct {
  float (*c)[4];
  uint64_t a, b;  // the matrices' first values
  bool adds, is_brain;
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
  uint64_t committed = 0;              // groups
  bool unpublished = false;            // some landed that products must not read yet
  std::vector<GroupProduct> products;  // started
};

// What kernels and drivers see of the block that runs.
struct Machine {
  unsigned char* shared = nullptr;
  Copies* copies = nullptr;                                   // of each thread
  Lanes* lanes = nullptr;                                     // of each warp
  int running = 0;                                            // the thread
  int unpublished = 0;                                        // threads with copies that products must not read yet
  bool is_inside = false;                                     // a thread runs
  uint32_t era = 1, first_of_block = 1, first_of_launch = 1;  // launches, blocks and their barriers, counted
  uint64_t random = 1;

  Lanes& own_lanes() { return lanes[running / kLanes]; }
  int lane() const { return running % kLanes; }

  uint64_t draw() {
    random ^= random << 13;
    random ^= random >> 7;
    return random ^= random << 17;
  }
  uint64_t draw(uint64_t limit) { return uint64_t((unsigned __int128)(draw()) * limit >> 64); }
};
extern Machine machine;
extern Index thread_index, block_index, block_size, grid_size;

// threads.cpp
[[noreturn]] void stop(const char* what, const char* place);
void run_block(int threads, void (*body)(void*), void* argument);
void block_barrier(const char* place);
void warp_operation(WarpOperation operation, const char* place);
uint64_t exchanged(uint32_t mask, uint64_t value, int source, WarpOperation operation, const char* place);
void take_from_lane(Lanes& lanes);
void take_from_xor(Lanes& lanes);
void take_from_below(Lanes& lanes);
void take_ballot(Lanes& lanes);
void only_meet(Lanes& lanes);
void multiply_float16(Lanes& lanes);
void multiply_bfloat16(Lanes& lanes);
void multiply_line(const uint16_t (&row)[16], const uint16_t (&columns)[16][16], bool is_brain, float (&c)[16]);

template <class T>
__attribute__((no_sanitize("address", "undefined"))) T shuffle(uint32_t mask, T v, int source, WarpOperation operation,
                                                               const char* place) {
  static_assert(sizeof(T) <= 8);
  return from_bits<T>(exchanged(mask, to_bits(v), source, operation, place));
}

}  // namespace simt

#include "tensor.h"

namespace simt {

// Runs kernel(job) over the grid, blocks in an order drawn from the seed.
template <class Job>
void run_grid(void (*kernel)(Job), uint32_t grid_x, uint32_t grid_y, int threads, size_t shared_bytes, const Job& job,
              bool overlaps) {
  struct Call {
    void (*kernel)(Job);
    const Job* job;
  } call = {kernel, &job};
  const auto body = [](void* argument) {
    const Call& c = *static_cast<Call*>(argument);
    c.kernel(*c.job);
  };
  std::vector<uint64_t> blocks(uint64_t(grid_x) * grid_y);
  for (uint64_t n = 0; n < blocks.size(); n++) blocks[n] = n;
  for (uint64_t n = blocks.size(); n > 1; n--) std::swap(blocks[n - 1], blocks[machine.draw(n)]);
  block_size = {uint32_t(threads), 1, 1};
  grid_size = {grid_x, grid_y, 1};
  watch_launch(reinterpret_cast<const void*>(kernel), overlaps);
  for (const uint64_t n : blocks) {
    block_index = {uint32_t(n % grid_x), uint32_t(n / grid_x), 0};
    void* shared = nullptr;
    if (shared_bytes > 0) {
      shared = std::aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024);
      std::memset(shared, machine.draw(2) ? kPoison : kLargePoison, shared_bytes);
    }
    machine.shared = static_cast<unsigned char*>(shared);
    watch_shared(shared, shared_bytes);
    run_block(threads, body, &call);
    watch_shared(nullptr, 0);
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
SIMT_UNWATCHED inline unsigned long long atomicMax(unsigned long long* at, unsigned long long v) {
  simt::touch(simt::Access::atomic, at, sizeof *at);
  const unsigned long long before = *at;
  if (v > before) *at = v;
  return before;
}
SIMT_UNWATCHED inline int32_t atomicAdd(int32_t* at, int32_t v) {
  simt::touch(simt::Access::atomic, at, sizeof *at);
  const int32_t before = *at;
  *at += v;
  return before;
}
inline void __threadfence() { simt::fence(); }

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

inline __attribute__((always_inline)) void copy_async(void* shared, const void* from, bool there) {
  simt::start_copy(shared, from, there);
}
inline void commit_copies() { simt::machine.copies[simt::machine.running].committed++; }
template <int kNewest>
void wait_for_copies() {
  simt::wait_for_groups(kNewest);
}

inline void load_matrices(uint32_t (&r)[4], const void* shared) {
  simt::Lanes& lanes = simt::machine.own_lanes();
  lanes.value[simt::machine.lane()] = reinterpret_cast<uint64_t>(shared);
  lanes.loaded[simt::machine.lane()] = r;
  simt::warp_operation(simt::load, "load_matrices");
}
inline void mma_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::multiply_in_warp(c, a, b, simt::multiply_float16, "mma_float16");
}
inline void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::multiply_in_warp(c, a, b, simt::multiply_bfloat16, "mma_bfloat16");
}

constexpr int kGroupSide = 64, kGroupThreads = 4 * 32;
#if defined(SIMT_GROUPS)
constexpr bool kHasGroups = true;
#else
constexpr bool kHasGroups = false;
#endif
inline uint64_t shared_matrix(const void* first) { return reinterpret_cast<uint64_t>(first); }
inline uint64_t moved_matrix(uint64_t matrix, int c) { return matrix + uint64_t(c * 2); }
inline void start_float16_products(float (&c)[8][4], uint64_t a, uint64_t b, bool adds) {
  simt::start_product({c, a, b, adds, false});
}
inline void start_bfloat16_products(float (&c)[8][4], uint64_t a, uint64_t b, bool adds) {
  simt::start_product({c, a, b, adds, true});
}
inline void begin_products() { simt::check_published(); }
inline void commit_products() {}
inline void wait_for_products(float (&)[8][4]) { simt::finish_products(); }
inline void publish_copies() { simt::set_unpublished(false); }

constexpr int64_t kSharedUnasked = 48 << 10, kSharedMost = 99 << 10;

inline void follow_previous() { simt::follow(); }  // kernels run one after the other

template <class Job>
int32_t launch(void (*kernel)(Job), int64_t grid_x, int64_t grid_y, int32_t threads, int64_t shared_bytes, void*,
               const Job& job, bool overlaps = false) {
  if (grid_x < 1 || grid_x > INT32_MAX || grid_y < 1 || grid_y > 65535 || threads > 1024 ||
      shared_bytes > kSharedMost) {
    return 9;  // cudaErrorInvalidConfiguration
  }
  simt::run_grid(kernel, uint32_t(grid_x), uint32_t(grid_y), threads, size_t(shared_bytes), job, overlaps);
  return 0;
}

}  // namespace cuda
}  // namespace h2ot
