// The workspace of a plan.
#pragma once

#include "buffer.h"
#include "cuda/plan.h"

// What was never written is NaN, or (odd seeds) large numbers, as a call before may have left them. The sanitizer sees
// what touches the bytes between the parts. The seed is also the simulator's.
struct Room : Buffer {
  Room(const h2ot::cuda::Plan& plan, int64_t seed) : Buffer(plan.at.bytes) {
    if (bytes && seed % 2) std::memset(data, simt::kLargePoison, bytes);
    int64_t offsets[sizeof plan.at / sizeof(int64_t)];
    std::memcpy(offsets, &plan.at, sizeof plan.at);
    for (const int64_t end : offsets) {
      if (end > 0) ASAN_POISON_MEMORY_REGION(data + end - h2ot::cuda::kGuardBytes, h2ot::cuda::kGuardBytes);
    }
    simt::machine.random = uint64_t(seed) * 0x9e3779b97f4a7c15u + 1;
  }
};
