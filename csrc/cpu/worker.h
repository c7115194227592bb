// What a kernel needs beside arithmetic: scratch that stays with its thread, a status that several threads may set, and
// a look at indices.
#pragma once

#include "scratch.h"
#include "simd.h"

namespace h2ot {
namespace H2OT_ISA {

// A thread that calls a kernel may run a part of it too: `shared` is what it prepares for all threads, `own` what each
// thread uses alone, `taker` what takes rows from the kernel does meanwhile (RowsTaker).
enum class Slot { shared, own, taker };

// At least `bytes` bytes, valid until the thread asks again for the same slot; null if there is no memory.
H2OT_INLINE void* scratch(Slot slot, int64_t bytes) {
  static thread_local Scratch slots[3];
  return slots[int(slot)].reserve(bytes);
}

// Collects the failures of all threads; the result does not depend on which came first.
class Outcome {
 public:
  __attribute__((always_inline)) void fail(Status status) {
    __atomic_fetch_or(&failed_, 1u << int(status), __ATOMIC_RELAXED);
  }
  __attribute__((always_inline)) Status result() const { return failed_ ? Status(__builtin_ctz(failed_)) : Status::ok; }

 private:
  uint32_t failed_ = 0;
};

// Whether from <= value < to for all of them.
H2OT_INLINE bool in_range(const int64_t* values, int64_t count, int64_t from, int64_t to) {
  bool ok = true;
  for (int64_t i = 0; i < count; i++) ok &= values[i] >= from && values[i] < to;
  return ok;
}

}  // namespace H2OT_ISA
}  // namespace h2ot
