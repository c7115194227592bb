// Which threads work on which samples of a batch, the scratch that they work in, and what goes wrong.
#pragma once

#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// What a sample's threads share, and what each of them uses alone. Every file has its own: scoring calls labels.
thread_local Scratch sample_scratch, worker_scratch;

constexpr int64_t kKeptBytes = int64_t(64) << 20;  // a scratch above this goes back after the call

// All threads of the pool give back what they have too much of: as much as the caller, who takes part in everything.
inline void give_back(const Parallel& pool) {
  const int64_t threads = worker_scratch.exceeds(kKeptBytes) || sample_scratch.exceeds(kKeptBytes) ? pool.threads : 1;
  parallel_for(pool, threads, 1, [](int64_t, int64_t) {
    sample_scratch.trim(kKeptBytes);
    worker_scratch.trim(kKeptBytes);
  });
}

// The threads that work on one sample, and whether one of them got no memory.
struct Workers {
  const Parallel& pool;
  bool failed = false;

  // Memory of the running thread, `bytes` of it; null, and then noted, when there is none.
  void* reserve(int64_t bytes) {
    void* memory = worker_scratch.reserve(bytes);
    if (memory == nullptr) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    return memory;
  }
  Status status() const { return failed ? Status::out_of_memory : Status::ok; }
};

// run(b, pool), a Status, for every sample: whole rounds of samples side by side, one per thread; the rest with all
// threads on each.
template <class F>
Status for_each_sample(int64_t B, const Parallel& pool, const F& run) {
  const Parallel serial = {pool.run, 1};
  const int64_t aside = pool.threads > 1 ? B / pool.threads * pool.threads : 0;
  Outcome outcome;
  const auto run_one = [&](int64_t b, const Parallel& inner) {
    const Status status = run(b, inner);
    if (status != Status::ok) outcome.fail(status);
  };
  parallel_for(pool, aside, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) run_one(b, serial);
  });
  for (int64_t b = aside; b < B; b++) run_one(b, pool);
  give_back(pool);
  return outcome.result();
}

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
