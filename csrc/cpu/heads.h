// Attention head by head, in panels of queries: which thread attends which, and where the results go.
#pragma once

#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// The first row of sample b's channels from `channel` on.
template <class T>
H2OT_INLINE const T* head_of(const void* x, const Rows& at, int64_t b, int64_t channel) {
  return static_cast<const T*>(x) + b * at.stride_b + channel;
}

// Asks for rows [first, last) of the D channels at x, which are read later, or written soon: their short, distant
// pieces defeat the machine's own prefetching.
template <bool kWritten = false, class T>
H2OT_INLINE void ask_for_rows(const T* x, int64_t stride, int64_t D, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(T))) {
      __builtin_prefetch(x + i * stride + d, kWritten, kWritten ? 3 : 2);
    }
  }
}

// Into how many parts, at most `most`, each of B samples is cut so that the threads have about equal shares: no other
// number keeps them busier by more than a twentieth.
H2OT_INLINE int64_t parts_of(int64_t B, int64_t most, int64_t threads) {
  int64_t best = 1;
  double busiest = 0;
  for (int64_t parts = 1; parts <= most; parts++) {
    const int64_t tasks = B * parts, rounds = groups_of(tasks, threads);
    const double busy = double(tasks) / double(rounds * threads);
    if (busy <= busiest * 1.05) continue;
    busiest = busy;
    best = parts;
  }
  return best;
}

// Calls body(what a thread works in, room for `rows` results of all heads) where there is memory. Work is what one
// thread works in; make(Carver&) gives it.
template <class Work, class Make, class Body>
H2OT_INLINE void with_work(const RecoverAttentionArgs& a, int64_t rows, const Make& make, Outcome& outcome,
                           const Body& body) {
  typedef typename Work::Element T;
  Carver sizes(nullptr);
  make(sizes);
  sizes.take<T>(rows * a.C);
  void* const memory = scratch(Slot::own, sizes.bytes());
  if (!memory) return outcome.fail(Status::out_of_memory);
  Carver carver(memory);
  const Work work = make(carver);
  body(work, carver.take<T>(rows * a.C));
}

// Every head of every sample by panels of `width` queries. Work has take_head(b, h), which packs the keys and values of
// a head, ask_for_head(b, h, from, to), which asks for some of the next, attend(b, h, panel, rows), which writes the
// results of a panel into its rows, all heads of a query beside each other, and Registers, which attend() has (50 ns to
// set up on the tile unit, where a panel takes 2 us and more); a taker sets up its own.
template <class Work, class Make>
Status attend_heads(const RecoverAttentionArgs& a, const Parallel& pool, int64_t width, int64_t grain,
                    const Make& make) {
  typedef typename Work::Element T;
  const int64_t panels = groups_of(a.F, width), heads = a.B * a.H;
  Outcome outcome;
  // Panel `panel` of [first, end), which are taken one after the other.
  const auto attend = [&](const Work& work, int64_t which, int64_t panel, int64_t first, int64_t end, T* rows) {
    const int64_t next = which + 1, from = a.K * (panel - first) / (end - first);
    if (next < heads) {
      work.ask_for_head(next / a.H, next % a.H, from, a.K * (panel + 1 - first) / (end - first));
    }
    work.attend(which / a.H, which % a.H, panel, rows);
  };
  if (!a.taker) {
    parallel_for(pool, heads * panels, grain, [&](int64_t begin, int64_t past) {
      with_work<Work>(a, 0, make, outcome, [&](const Work& work, T*) {
        [[maybe_unused]] const typename Work::Registers registers = {};
        for (int64_t task = begin; task < past; task++) {
          const int64_t which = task / panels, panel = task % panels;
          if (task == begin || panel == 0) work.take_head(which / a.H, which % a.H);
          attend(work, which, panel, 0, panels, static_cast<T*>(a.out) + (which / a.H * a.F + panel * width) * a.C);
        }
      });
    });
    return outcome.result();
  }
  const int64_t parts = parts_of(a.B, panels, pool.threads), most = groups_of(panels, parts) * width;
  parallel_for(pool, a.B * parts, 1, [&](int64_t begin, int64_t past) {
    with_work<Work>(a, most, make, outcome, [&](const Work& work, T* rows) {
      for (int64_t task = begin; task < past; task++) {
        const int64_t b = task / parts, part = task % parts;
        const int64_t first = panels * part / parts, end = panels * (part + 1) / parts;
        {
          [[maybe_unused]] const typename Work::Registers registers = {};
          for (int64_t h = 0; h < a.H; h++) {
            work.take_head(b, h);
            for (int64_t panel = first; panel < end; panel++) {
              attend(work, b * a.H + h, panel, first, end, rows + (panel - first) * width * a.C);
            }
          }
        }
        const int64_t last = end * width < a.F ? end * width : a.F;
        const Status status = a.taker->take(a.taker->context, b, first * width, last - first * width, rows);
        if (status != Status::ok) return outcome.fail(status);
      }
    });
  });
  return outcome.result();
}

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
