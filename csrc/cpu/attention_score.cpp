// The mean weight that each frame receives in an attention: logits by register tiles, in float32 (float64 for f64).
#include "kernels.h"
#include "received.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// What a thread works in.
template <class T>
struct Received {
  typedef Accumulator<T> E;
  struct Registers {};  // nothing to be set up
  const AttentionScoreArgs& a;
  E rate, sign;
  E* panel;  // [D][kPanel] queries
  E* keys;   // [F][D] of a head
  E* all;    // [F][kPanel] logits

  Received(Carver& memory, const AttentionScoreArgs& args)
      : a(args), rate(E((a.scale < 0 ? -a.scale : a.scale) * kLog2E)), sign(E(sign_of(a.scale))) {
    panel = memory.take<E>(a.D * kPanel<E>);
    keys = memory.take<E>(a.F * a.D);
    all = memory.take<E>(a.F * kPanel<E>);
  }
  void take_key(const T* key) const { pack_rows(key, a.key_stride[3], a.key_stride[4], a.F, a.D, a.D, keys); }
  E* logits(const T* query, int64_t first, int64_t count) const {
    const T* const from = query + first * a.query_stride[3];
    pack_panel(from, a.query_stride[3], a.query_stride[4], count, a.D, sign, panel);
    product(a.F, count > kLanes<E> ? 2 : 1, a.D, keys, a.D, Fixed<1>(), panel, Fixed<kPanel<E>>(),
            WriteTo<E>{all, kPanel<E>});
    return all;
  }
};

}  // namespace

Status attention_score(const AttentionScoreArgs& a, const Parallel& pool) {
  Status status = Status::ok;
  for_dtype(a.dtype, [&](auto element) {
    typedef decltype(element) T;
    status = receive_heads<T, Received<T>>(a, pool);
  });
  return status;
}

}  // namespace H2OT_ISA
}  // namespace h2ot
