// A layer of a graph over the nodes of a line (the frames of a joint, the joints of a frame): who is a neighbour of
// whom, the sums over them, BatchNorm, activation, scale and residual, read once and written once.
//
// Neighbours by similarity: a panel of nodes stands in the lanes; products [T][panel] = T rows times the panel; each
// lane keeps its largest, sorted, with their rows. Then what reaches the last of them is counted: equal products may
// be more, and such lanes are read again one by one. Every product is one chain over the channels, so equal tokens
// have equal products.
// Multiply-adds per line: T T C for the products, (degree + 4) T C for the rest. Memory per thread: T (C + panel) and
// the lists.
#include "kernels.h"
#include "softmax.h"
#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// The neighbours of the nodes of a line, and each node's degree to the power -1/2.
template <class E>
struct Neighbours {
  int64_t T;
  int64_t* start;  // [T + 1]
  int32_t* node;   // [T T], the most there can be: pages that are never touched take no memory
  E* weight;       // [T]

  Neighbours(Carver& memory, int64_t nodes) : T(nodes) {
    start = memory.take<int64_t>(T + 1);
    node = memory.take<int32_t>(T * T);
    weight = memory.take<E>(T);
  }

  // start and node are filled. A node without neighbours has no finite weight, and products with it are NaN.
  __attribute__((always_inline)) void weigh() const {
    bool alone = false;
    for (int64_t n = 0; n < T; n++) {
      const int64_t degree = start[n + 1] - start[n];
      weight[n] = E(1 / __builtin_sqrt(double(degree)));
      alone |= degree == 0;
    }
    for (int64_t n = 0; alone && n < T; n++) weight[n] = E(__builtin_nan(""));
  }

  __attribute__((always_inline)) void read(const bool* adjacency) const {
    int64_t count = 0;
    for (int64_t n = 0; n < T; n++) {
      start[n] = count;
      for (int64_t m = 0; m < T; m++) {
        if (adjacency[n * T + m]) node[count++] = int32_t(m);
      }
    }
    start[T] = count;
    weigh();
  }
};

// What a vector of nodes finds among its products: the largest, descending, with their rows; how many are NaN.
template <class E>
struct Largest {
  typedef typename VectorOf<E>::bits Bits;
  E value[kMostNeighbours][kLanes<E>];
  decltype(Bits{}[0] + 0u) row[kMostNeighbours][kLanes<E>];
  decltype(Bits{}[0] + 0u) unordered[kLanes<E>], reaching[kLanes<E>];

  // products: those of row 0, kPanel from row to row. kCount: `count` where it is known, so that the lists stay in
  // registers, else 0.
  template <int kCount>
  __attribute__((always_inline)) void search(const E* products, int64_t T, int given_count) {
    const int count = kCount ? kCount : given_count;
    Vector<E> values[kMostNeighbours];
    Bits rows[kMostNeighbours] = {}, nans = {}, reached = {};
    for (int i = 0; i < count; i++) values[i] = splat<E>(-E(__builtin_inf()));
    for (int64_t m = 0; m < T; m++) {
      Vector<E> next = load(products + m * kPanel<E>);
      Bits from = Bits{} + decltype(Bits{}[0] + 0u)(m);
      nans += reinterpret_cast<Bits>(next <= splat<E>(E(__builtin_inf()))) + 1;  // -1 but for NaN
#pragma GCC unroll 4
      for (int i = 0; i < count; i++) {
        const Vector<E> least = values[i];
        const Bits below = rows[i];
        const auto above = next > least;
        values[i] = above ? next : least;
        next = above ? least : next;
        rows[i] = above ? from : below;
        from = above ? below : from;
      }
    }
    for (int64_t m = 0; m < T; m++) {
      reached -= reinterpret_cast<Bits>(load(products + m * kPanel<E>) >= values[count - 1]);
    }
    for (int i = 0; i < count; i++) {
      memcpy(value[i], &values[i], sizeof values[i]);
      memcpy(row[i], &rows[i], sizeof rows[i]);
    }
    memcpy(unordered, &nans, sizeof nans);
    memcpy(reaching, &reached, sizeof reached);
  }

  // The neighbours of one lane into `node`, ascending; how many. NaN is larger than everything, as torch.topk has it,
  // and reaches nothing. Products of -inf are on no list: where all T are to be neighbours, they are read one by one.
  __attribute__((always_inline)) int64_t list(int lane, const E* products, int64_t T, int count, int32_t* node) const {
    const int left = count - 1 - int(unordered[lane] < unsigned(count) ? unordered[lane] : count);
    if (left < 0) return 0;
    int64_t found = 0;
    if (unordered[lane] == 0 && reaching[lane] == unsigned(count) && count < T) {
      for (; found < count; found++) {
        const int32_t m = int32_t(row[found][lane]);
        int64_t at = found;
        for (; at > 0 && node[at - 1] > m; at--) node[at] = node[at - 1];
        node[at] = m;
      }
      return found;
    }
    for (int64_t m = 0; m < T; m++) {
      if (products[m * kPanel<E> + lane] >= value[left][lane]) node[found++] = int32_t(m);
    }
    return found;
  }
};

// The nodes of one line: T rows of C channels, `step` apart, the first at `first`.
template <class T>
struct Line {
  typedef Accumulator<T> E;
  const GraphArgs& a;
  int64_t first, step;

  __attribute__((always_inline)) const T* row(const void* x, int64_t n) const {
    return static_cast<const T*>(x) + first + n * step;
  }

  __attribute__((always_inline)) void find(const Neighbours<E>& found, int64_t width, E* rows, E* panel,
                                           E* products) const {
    pack_rows(row(a.x, 0), step, 1, a.T, a.C, width, rows);
    int64_t total = 0;
    for (int64_t begin = 0; begin < a.T; begin += kPanel<E>) {
      const int64_t count = begin + kPanel<E> < a.T ? kPanel<E> : a.T - begin;
      pack_panel(row(a.x, begin), step, 1, count, a.C, E(1), panel);
      const int64_t vectors = count > kLanes<E> ? 2 : 1;
      product(a.T, vectors, a.C, rows, width, Fixed<1>(), panel, Fixed<kPanel<E>>(), WriteTo<E>{products, kPanel<E>});
      for (int64_t v = 0; v < vectors; v++) {
        const E* const of_vector = products + v * kLanes<E>;
        Largest<E> largest;
        if (a.neighbours == 4) {
          largest.template search<4>(of_vector, a.T, 4);
        } else {
          largest.template search<0>(of_vector, a.T, int(a.neighbours));
        }
        for (int64_t lane = 0; lane < kLanes<E> && v * kLanes<E> + lane < count; lane++) {
          found.start[begin + v * kLanes<E> + lane] = total;
          total += largest.list(int(lane), of_vector, a.T, int(a.neighbours), found.node + total);
        }
      }
    }
    found.start[a.T] = total;
    found.weigh();
  }

  // V vectors of node n from channel c on, or (V = 1) the `part` channels that are left. normed: mean, gain and bias.
  template <int V>
  __attribute__((always_inline)) void update(const Neighbours<E>& by, const E* normed, int64_t n, int64_t c,
                                             int64_t part) const {
    const auto read = [&](const T* from, int v) __attribute__((always_inline)) {
      return part ? load_part(from + c, part) : load_wide(from + c + v * kLanes<T>);
    };
    const E mean = normed[n], gain = normed[a.T + n], bias = normed[2 * a.T + n], own = by.weight[n];
    const int64_t begin = by.start[n], end = by.start[n + 1];
    Vector<T> sum[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[v] = begin == end ? splat<T>(own) : Vector<T>{};  // NaN, or nothing yet
    for (int64_t i = begin; i < end; i++) {
      const int64_t m = by.node[i];
      const T* const from = row(a.v, m);
      const E weight = own * by.weight[m];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[v] += weight * read(from, v);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const Vector<T> y = (sum[v] + read(row(a.u, n), v) - mean) * gain + bias;
      const Vector<T> z = read(row(a.x, n), v) + y, active = z < 0 ? Vector<T>{} : z;
      const Vector<T> out = read(row(a.residual, n), v) + read(static_cast<const T*>(a.scale), v) * active;
      T* const to = static_cast<T*>(a.out) + first + n * step + c;
      if (part) {
        store_part(to, out, part);
      } else {
        store_narrow(to + v * kLanes<T>, out);
      }
    }
  }

  // Asks for what node n reads alone, and for the lines of its result: nodes may stand far apart.
  __attribute__((always_inline)) void ask_for(int64_t n) const {
    for (int64_t c = 0; c < a.C; c += 64 / int64_t(sizeof(T))) {
      __builtin_prefetch(row(a.u, n) + c);
      __builtin_prefetch(row(a.residual, n) + c);
      __builtin_prefetch(row(a.out, n) + c, 1);
    }
  }

  __attribute__((always_inline)) void update_all(const Neighbours<E>& by, const E* normed) const {
    constexpr int64_t L = kLanes<T>;
    for (int64_t n = 0; n < a.T; n++) {
      ask_for(n + 2);
      int64_t c = 0;
      for (; c + 4 * L <= a.C; c += 4 * L) update<4>(by, normed, n, c, 0);
      for (; c + L <= a.C; c += L) update<1>(by, normed, n, c, 0);
      if (c < a.C) update<1>(by, normed, n, c, a.C - c);
    }
  }
};

// [3][T]: mean, gain and bias of each node's BatchNorm.
template <class T, class E>
H2OT_INLINE void prepare_norm(const GraphArgs& a, E* normed) {
  const auto at = [](const void* x, int64_t n, double missing) __attribute__((always_inline)) {
    return x ? double(widen(static_cast<const T*>(x)[n])) : missing;
  };
  for (int64_t n = 0; n < a.T; n++) {
    normed[n] = E(at(a.mean, n, 0));
    normed[a.T + n] = E(at(a.norm_weight, n, 1) / __builtin_sqrt(at(a.variance, n, 1) + a.eps));
    normed[2 * a.T + n] = E(at(a.norm_bias, n, 0));
  }
}

// The task-th line: `inner` of them lie side by side.
template <class T>
H2OT_INLINE Line<T> line(const GraphArgs& a, int64_t task) {
  return {a, (task / a.inner * a.T * a.inner + task % a.inner) * a.C, a.inner * a.C};
}

template <class T>
Status run(const GraphArgs& a, const Parallel& pool) {
  typedef Accumulator<T> E;
  const bool finds = !a.adjacency, shares = a.adjacency && a.adjacency_stride == 0;
  // The norms, and adjacency that all lines have, are prepared once.
  Carver shared_sizes(nullptr);
  shared_sizes.take<E>(3 * a.T);
  Neighbours<E>(shared_sizes, shares ? a.T : 0);
  void* const shared = scratch(Slot::shared, shared_sizes.bytes());
  if (!shared) return Status::out_of_memory;
  Carver shared_carver(shared);
  E* const normed = shared_carver.take<E>(3 * a.T);
  prepare_norm<T>(a, normed);
  const Neighbours<E> of_all(shared_carver, shares ? a.T : 0);
  if (shares) of_all.read(a.adjacency);

  Outcome outcome;
  const int64_t grain = 1 + 65536 / (a.T * (shares ? a.C : finds ? a.T * a.C : a.T + a.C) + 1);
  parallel_for(pool, a.lines * a.inner, grain, [&](int64_t begin, int64_t end) {
    if (shares) {
      for (int64_t task = begin; task < end; task++) line<T>(a, task).update_all(of_all, normed);
      return;
    }
    const int64_t width = rounded_up(a.C, kLanes<E>);
    const int64_t counts[] = {finds ? a.T * width : 0, finds ? a.C * kPanel<E> : 0, finds ? a.T * kPanel<E> : 0};
    Carver sizes(nullptr);
    for (int64_t count : counts) sizes.take<E>(count);
    Neighbours<E>(sizes, a.T);
    void* const memory = scratch(Slot::own, sizes.bytes());
    if (!memory) return outcome.fail(Status::out_of_memory);
    Carver carver(memory);
    E* const rows = carver.take<E>(counts[0]);
    E* const panel = carver.take<E>(counts[1]);
    E* const products = carver.take<E>(counts[2]);
    const Neighbours<E> of_line(carver, a.T);
    for (int64_t task = begin; task < end; task++) {
      const Line<T> nodes = line<T>(a, task);
      if (finds) {
        nodes.find(of_line, width, rows, panel, products);
      } else {
        of_line.read(a.adjacency + task * a.adjacency_stride);
      }
      nodes.update_all(of_line, normed);
    }
  });
  return outcome.result();
}

}  // namespace

Status graph_update(const GraphArgs& a, const Parallel& pool) {
  Status status = Status::ok;
  for_dtype(a.dtype, [&](auto element) { status = run<decltype(element)>(a, pool); });
  return status;
}

}  // namespace H2OT_ISA
}  // namespace h2ot
