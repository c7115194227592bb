// Recovery by cross-attention: every frame asks the kept tokens, head by head.
//
// A task is one head of one sample and one panel of queries, which stand in the lanes: logits [K][panel] = K rows
// times the panel of queries; exact softmax down the lanes; output rows = weights times V. K and V are copied once per
// head: their rows are C apart, and at powers of two those fall into the same few cache sets.
// Multiply-adds per sample: 2 F K C; exponentials: F K H.
#include "heads.h"
#include "kernels.h"
#include "softmax.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// Sizes that follow from the arguments.
template <class E>
struct Layout {
  int64_t D, width, panels;  // channels of a head, the same in whole vectors, panels of queries
  E rate, sign;

  explicit Layout(const RecoverAttentionArgs& a)
      : D(a.C / a.H),
        width(rounded_up(D, kLanes<E>)),
        panels(groups_of(a.F, kPanel<E>)),
        rate(E((a.scale < 0 ? -a.scale : a.scale) * kLog2E)),
        sign(E(sign_of(a.scale))) {}
  int64_t count(const RecoverAttentionArgs& a, int64_t panel) const {
    const int64_t left = a.F - panel * kPanel<E>;
    return left < kPanel<E> ? left : kPanel<E>;
  }
};

H2OT_INLINE int64_t task_grain(const RecoverAttentionArgs& a, int64_t D, int64_t panel) {
  return 1 + 500000 / (a.K * D * panel + 1);
}

// logits[k][lane] = rows[k] . panel[lane], rows being `width` apart
template <class E>
H2OT_INLINE void dot_rows(const E* rows, int64_t K, const Layout<E>& at, const E* panel, int64_t vectors, E* logits) {
  product(K, vectors, at.D, rows, at.width, Fixed<1>(), panel, Fixed<kPanel<E>>(), WriteTo<E>{logits, kPanel<E>});
}

// One row of a head, times `factor`.
template <class T, class E>
H2OT_INLINE void unpack_row(const E* row, int64_t D, E factor, T* out) {
  int64_t d = 0;
  for (; d + kLanes<E> <= D; d += kLanes<E>) store_narrow(out + d, load(row + d) * factor);
  if (d < D) store_part(out + d, load(row + d) * factor, D - d);
}

// All panels of the shared queries: [H][panels][D][kPanel].
template <class T, class E>
void pack_shared_queries(const RecoverAttentionArgs& a, const Layout<E>& at, E* packed, const Parallel& pool) {
  parallel_for(pool, a.H * at.panels, 1 + 16384 / (at.D * kPanel<E>), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t h = task / at.panels, panel = task % at.panels;
      const T* const query = static_cast<const T*>(a.query) + panel * kPanel<E> * a.query_at.stride_n + h * at.D;
      pack_panel(query, a.query_at.stride_n, 1, at.count(a, panel), at.D, at.sign, packed + task * at.D * kPanel<E>);
    }
  });
}

// What a thread works in.
template <class T, class E>
struct Forward {
  typedef T Element;
  struct Registers {};  // nothing to be set up
  const RecoverAttentionArgs& a;
  const Layout<E>& at;
  const E* shared_panels;  // null: each sample has queries of its own
  E *key, *value;          // [K][width] of a head
  E* own_panel;            // [D][kPanel] queries of a sample
  E* weights;              // [K][kPanel]
  E* results;              // [kPanel][width]

  Forward(Carver& memory, const RecoverAttentionArgs& args, const Layout<E>& layout, const E* shared)
      : a(args), at(layout), shared_panels(shared) {
    key = memory.take<E>(a.K * at.width);
    value = memory.take<E>(a.K * at.width);
    own_panel = memory.take<E>(at.D * kPanel<E>);
    weights = memory.take<E>(a.K * kPanel<E>);
    results = memory.take<E>(kPanel<E> * at.width);
  }

  void take_head(int64_t b, int64_t h) const {
    pack_rows(head_of<T>(a.key, a.key_at, b, h * at.D), a.key_at.stride_n, 1, a.K, at.D, at.width, key);
    pack_rows(head_of<T>(a.value, a.value_at, b, h * at.D), a.value_at.stride_n, 1, a.K, at.D, at.width, value);
  }
  void ask_for_head(int64_t b, int64_t h, int64_t from, int64_t to) const {
    ask_for_rows(head_of<T>(a.key, a.key_at, b, h * at.D), a.key_at.stride_n, at.D, from, to);
    ask_for_rows(head_of<T>(a.value, a.value_at, b, h * at.D), a.value_at.stride_n, at.D, from, to);
  }
  void attend(int64_t b, int64_t h, int64_t panel, T* rows) const {
    const int64_t first = panel * kPanel<E>, count = at.count(a, panel), vectors = count > kLanes<E> ? 2 : 1;
    T* const out = rows + h * at.D;
    ask_for_rows(out, a.C, at.D, 0, count);
    const E* const queries = shared_panels ? shared_panels + (h * at.panels + panel) * at.D * kPanel<E> : own_panel;
    if (!shared_panels) {
      const T* const query = head_of<T>(a.query, a.query_at, b, h * at.D) + first * a.query_at.stride_n;
      pack_panel(query, a.query_at.stride_n, 1, count, at.D, at.sign, own_panel);
    }
    dot_rows(key, a.K, at, queries, vectors, weights);
    Vector<E> total[kTileVectors];
    E share[kPanel<E>];
    exponentiate(weights, a.K, vectors, at.rate, total);
    for (int64_t v = 0; v < vectors; v++) store(share + v * kLanes<E>, E(1) / total[v]);
    product(count, at.width / kLanes<E>, a.K, weights, 1, Fixed<kPanel<E>>(), value, at.width,
            WriteTo<E>{results, at.width});
    for (int64_t q = 0; q < count; q++) unpack_row(results + q * at.width, at.D, share[q], out + q * a.C);
  }
};

template <class T>
Status forward(const RecoverAttentionArgs& a, const Parallel& pool) {
  typedef Accumulator<T> E;
  if (a.K == 0) {
    memset(a.out, 0, size_t(a.B * a.F * a.C) * sizeof(T));
    return Status::ok;
  }
  const Layout<E> at(a);
  E* shared_panels = nullptr;
  if (a.query_rows == 1) {
    const int64_t size = a.H * at.panels * at.D * kPanel<E>;
    shared_panels = static_cast<E*>(scratch(Slot::shared, size * int64_t(sizeof(E))));
    if (!shared_panels) return Status::out_of_memory;
    pack_shared_queries<T>(a, at, shared_panels, pool);
  }
  return attend_heads<Forward<T, E>>(a, pool, kPanel<E>, task_grain(a, at.D, kPanel<E>),
                                     [&](Carver& memory) { return Forward<T, E>(memory, a, at, shared_panels); });
}

// Samples whose gradients of a shared query are summed one after the other; the sums of groups are added in order.
// Fixed, so that the result does not depend on the number of threads.
constexpr int64_t kGroup = 16;

// What one task of the backward pass works in: a head of a group of samples.
template <class E>
struct Gradients {
  E *key, *value, *grad_key, *grad_value;  // [K][width]
  E *query_rows, *grad_rows;               // [kPanel][width]
  E *query_panel, *grad_panel;             // [D][kPanel]
  E *weights, *slopes;                     // [K][kPanel]
  E* grad_query;                           // [F][width]

  Gradients(Carver& carver, const RecoverAttentionArgs& a, const Layout<E>& at) {
    key = carver.take<E>(a.K * at.width);
    value = carver.take<E>(a.K * at.width);
    grad_key = carver.take<E>(a.K * at.width);
    grad_value = carver.take<E>(a.K * at.width);
    query_rows = carver.take<E>(kPanel<E> * at.width);
    grad_rows = carver.take<E>(kPanel<E> * at.width);
    query_panel = carver.take<E>(at.D * kPanel<E>);
    grad_panel = carver.take<E>(at.D * kPanel<E>);
    weights = carver.take<E>(a.K * kPanel<E>);
    slopes = carver.take<E>(a.K * kPanel<E>);
    grad_query = carver.take<E>(a.F * at.width);
  }
};

// The gradients of one panel of queries, added to g.grad_query, g.grad_key and g.grad_value.
template <class T, class E>
H2OT_INLINE void add_panel(const RecoverAttentionArgs& a, const Layout<E>& at, const T* query, const T* grad,
                           int64_t first, int64_t count, const Gradients<E>& g) {
  const int64_t K = a.K, width = at.width, columns = width / kLanes<E>, vectors = count > kLanes<E> ? 2 : 1;
  pack_panel(query, a.C, 1, count, at.D, at.sign, g.query_panel);
  pack_panel(grad, a.C, 1, count, at.D, E(1), g.grad_panel);
  pack_rows(query, a.C, 1, count, at.D, width, g.query_rows);
  pack_rows(grad, a.C, 1, count, at.D, width, g.grad_rows);
  dot_rows(g.key, K, at, g.query_panel, vectors, g.weights);
  Vector<E> total[kTileVectors];
  exponentiate(g.weights, K, vectors, at.rate, total);
  dot_rows(g.value, K, at, g.grad_panel, vectors, g.slopes);
  // weights: the softmax p; slopes: scale p (s - sum of p s)
  for (int64_t v = 0; v < vectors; v++) {
    E* const weights = g.weights + v * kLanes<E>;
    E* const slopes = g.slopes + v * kLanes<E>;
    const Vector<E> factor = E(1) / total[v];
    Vector<E> mean = {};
    for (int64_t k = 0; k < K; k++) {
      const Vector<E> weight = load(weights + k * kPanel<E>) * factor;
      store(weights + k * kPanel<E>, weight);
      mean += weight * load(slopes + k * kPanel<E>);
    }
    for (int64_t k = 0; k < K; k++) {
      const Vector<E> slope = load(slopes + k * kPanel<E>) - mean;
      store(slopes + k * kPanel<E>, load(weights + k * kPanel<E>) * slope * E(a.scale));
    }
  }
  product(count, columns, K, g.slopes, 1, Fixed<kPanel<E>>(), g.key, width,
          AddTo<E>{g.grad_query + first * width, width});
  product(K, columns, count, g.slopes, kPanel<E>, Fixed<1>(), g.query_rows, width, AddTo<E>{g.grad_key, width});
  product(K, columns, count, g.weights, kPanel<E>, Fixed<1>(), g.grad_rows, width, AddTo<E>{g.grad_value, width});
}

template <class T, class E>
H2OT_INLINE void unpack_rows(const E* rows, int64_t count, const Layout<E>& at, T* out, int64_t C) {
  for (int64_t i = 0; i < count; i++) unpack_row(rows + i * at.width, at.D, E(1), out + i * C);
}

template <class T>
Status backward(const RecoverAttentionBackwardArgs& args, const Parallel& pool) {
  typedef Accumulator<T> E;
  const RecoverAttentionArgs& a = args.forward;
  const Layout<E> at(a);
  const bool shared = a.query_rows == 1;
  const int64_t group = shared ? kGroup : 1, groups = groups_of(a.B, group), rows = a.F * a.C;
  E* partial = nullptr;  // [groups][F][C]
  if (shared) {
    partial = static_cast<E*>(scratch(Slot::shared, groups * rows * int64_t(sizeof(E))));
    if (!partial) return Status::out_of_memory;
  }
  Outcome outcome;
  parallel_for(pool, groups * a.H, 1, [&](int64_t begin, int64_t end) {
    Carver sizes(nullptr);
    Gradients<E>(sizes, a, at);
    void* const memory = scratch(Slot::own, sizes.bytes());
    if (!memory) return outcome.fail(Status::out_of_memory);
    Carver carver(memory);
    const Gradients<E> g(carver, a, at);
    for (int64_t task = begin; task < end; task++) {
      const int64_t from = task % groups * group, to = from + group < a.B ? from + group : a.B;
      const int64_t h = task / groups * at.D;
      memset(g.grad_query, 0, size_t(a.F * at.width) * sizeof(E));
      for (int64_t b = from; b < to; b++) {
        const int64_t kept = b * a.K * a.C + h;
        const T* const query = static_cast<const T*>(a.query) + (shared ? 0 : b * rows) + h;
        const T* const grad = static_cast<const T*>(args.grad) + b * rows + h;
        pack_rows(static_cast<const T*>(a.key) + kept, a.C, 1, a.K, at.D, at.width, g.key);
        pack_rows(static_cast<const T*>(a.value) + kept, a.C, 1, a.K, at.D, at.width, g.value);
        memset(g.grad_key, 0, size_t(a.K * at.width) * sizeof(E));
        memset(g.grad_value, 0, size_t(a.K * at.width) * sizeof(E));
        for (int64_t panel = 0; panel < at.panels; panel++) {
          const int64_t first = panel * kPanel<E>;
          add_panel(a, at, query + first * a.C, grad + first * a.C, first, at.count(a, panel), g);
        }
        unpack_rows(g.grad_key, a.K, at, static_cast<T*>(args.grad_key) + kept, a.C);
        unpack_rows(g.grad_value, a.K, at, static_cast<T*>(args.grad_value) + kept, a.C);
      }
      if (shared) {
        unpack_rows(g.grad_query, a.F, at, partial + task % groups * rows + h, a.C);
      } else {
        unpack_rows(g.grad_query, a.F, at, static_cast<T*>(args.grad_query) + from * rows + h, a.C);
      }
    }
  });
  if (shared) {
    parallel_for(pool, rows, 16384, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        E sum = 0;
        for (int64_t g = 0; g < groups; g++) sum += partial[g * rows + i];
        narrow(sum, static_cast<T*>(args.grad_query)[i]);
      }
    });
  }
  return outcome.result();
}

}  // namespace

Status recover_attention(const RecoverAttentionArgs& a, const Parallel& pool) {
  if (a.B * a.F * a.C == 0) return Status::ok;
  Status status = Status::ok;
  for_dtype(a.dtype, [&](auto element) { status = forward<decltype(element)>(a, pool); });
  return status;
}

Status recover_attention_backward(const RecoverAttentionBackwardArgs& args, const Parallel& pool) {
  if (args.forward.C == 0) return Status::ok;
  Status status = Status::ok;
  for_dtype(args.forward.dtype, [&](auto element) { status = backward<decltype(element)>(args, pool); });
  return status;
}

}  // namespace H2OT_ISA
}  // namespace h2ot
