// Labels and merging (launch.h: AssignArgs, MergeArgs).
#include "each_sample.h"
#include "kernels.h"
#include "pack.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// Labels of one sample.
template <class T>
struct Assigner {
  typedef Accumulator<T> A;
  const AssignArgs& args;
  Workers workers;
  Sample<A> sample;
  int64_t centres = 0, others = 0;
  int32_t *centre, *position, *other;  // [K] tokens, [K] their positions in index, [N] tokens to label
  float* panels;                       // the centres'

  Assigner(const AssignArgs& a, const Parallel& pool) : args(a), workers{pool} {}

  void carve(Carver& memory) {
    sample.carve(memory, args.x.N, args.x.C, readable_in_place<T>(args.x));
    centre = memory.take<int32_t>(args.K);
    position = memory.take<int32_t>(args.K);
    other = memory.take<int32_t>(args.x.N);
    panels = memory.take<float>(groups_of(args.K, kPanel) * panel_room(args.x.C));
  }

  int64_t worker_bytes() const {
    return (panel_room(args.x.C) + kPanel * rounded_up(args.K, kPanel)) * int64_t(sizeof(float));
  }

  // Labels a panel of tokens: tile distances to all centres, then float64 among those within reach of the least.
  // Centres that stand near the tokens come first; of the others, tiles that are beyond reach by their first channels
  // are left out.
  void label(const int32_t* token, int64_t count, int64_t* labels, void* memory, EarlyStop& stops) {
    const Form<A>& form = sample.form;
    const int64_t C = args.x.C, stride = rounded_up(centres, kPanel), size = form.panel_size();
    const int64_t height = form.height();
    float* rows = static_cast<float*>(memory);
    float* distances = rows + panel_room(C);  // [kPanel][stride]
    float tile[kMostRows * kPanel] __attribute__((aligned(64)));
    float limit[kPanel];
    for (int64_t r = 0; r < kPanel; r++) limit[r] = r < count ? __builtin_inff() : -1;
    form.pack(token, count, rows);
    int64_t nearby = 0;
    while (nearby < centres && centre[nearby] < token[0]) nearby++;
    const int64_t start = larger(0, nearby / kPanel - 1) * kPanel;
    for (int64_t at = 0; at < stride; at += kPanel) {
      const int64_t q = (start + at) % stride;
      const float* columns = panels + q / kPanel * size;
      for (int64_t r = 0; r < count; r += height) {
        const float* first = form.at(rows, r);
        const auto far = [&] {
          form.lower_tile(first, columns, tile);
          return !any_within(tile, height, limit + r);
        };
        const bool left_out = stops(far);
        if (!left_out) form.template tile<2>(first, columns, tile);
        for (int64_t i = 0; i < height; i++) {
          float* to = distances + (r + i) * stride + q;
          const Floats limits = fill(limit[r + i]);
          uint32_t near = 0;
          for (int64_t p = 0; p < kPanel; p += kFloats) {
            const Floats v = left_out ? fill(__builtin_inff()) : load(tile + i * kPanel + p);
            store(to + p, v);
            near |= at_most(v, limits);
          }
          if (left_out || !near) continue;
          limit[r + i] = smaller_of(limit[r + i], form.bound.reach(form.bound.most(least_of(to, kPanel))));
        }
      }
    }
    for (int64_t r = 0; r < count; r++) {
      const float* v = distances + r * stride;
      const A* row = sample.rows[token[r]];
      int64_t best = -1;
      double best_distance = 0;
      for_each_within(v, centres, limit[r], [&](int64_t j) {
        const double s = exact_distance(row, sample.rows[centre[j]], C);
        if (best < 0 || s < best_distance) {
          best_distance = s;
          best = j;
        }
        return best_distance > 0;
      });
      labels[token[r]] = best < 0 || best_distance == __builtin_inf() ? -1 : position[best];
    }
  }

  // Labels by the chains of parents. Every token is walked once; a chain that meets itself ends.
  void follow(const int64_t* parent, int64_t* labels) {
    constexpr int64_t kUnknown = -1, kOnPath = -2, kNone = -3;
    const int64_t N = args.x.N;
    int32_t* path = other;
    for (int64_t t = 0; t < N; t++) labels[t] = sample.valid[t] ? labels[t] : kNone;
    for (int64_t t = 0; t < N; t++) {
      int64_t count = 0, at = t;
      for (; at >= 0 && labels[at] == kUnknown; at = parent[at]) {
        labels[at] = kOnPath;
        path[count++] = int32_t(at);
      }
      const int64_t label = at >= 0 && labels[at] >= 0 ? labels[at] : kNone;
      for (int64_t step = 0; step < count; step++) labels[path[step]] = label;
    }
    for (int64_t t = 0; t < N; t++) labels[t] = larger(labels[t], -1);
  }

  Status run(int64_t b) {
    Carver sizes(nullptr);
    carve(sizes);
    void* memory = sample_scratch.reserve(sizes.bytes());
    if (memory == nullptr) return Status::out_of_memory;
    Carver carver(memory);
    carve(carver);
    const Parallel& pool = workers.pool;
    const int64_t N = args.x.N, K = args.K;
    const int64_t* index = args.index + (args.index_rows == 1 ? 0 : b * K);
    int64_t* labels = args.labels + b * N;
    read_sample<T>(args.x, b, args.mask, pool, sample);
    for (int64_t t = 0; t < N; t++) labels[t] = -1;
    for (int64_t j = 0; j < K; j++) {
      const int64_t t = index[j];
      if (t < 0 || !sample.valid[t]) continue;
      labels[t] = j;
      centre[centres] = int32_t(t);
      position[centres++] = int32_t(j);
    }
    if (centres == 0) return Status::ok;
    if (args.parent) {
      follow(args.parent + b * N, labels);
      return Status::ok;
    }
    for (int64_t i = 0; i < sample.n; i++) {
      if (labels[sample.token[i]] < 0) other[others++] = sample.token[i];
    }
    pack_panels(sample.form, centre, centres, pool, panels);
    parallel_for(pool, groups_of(others, kPanel), 1, [&](int64_t begin, int64_t end) {
      void* scratch = workers.reserve(worker_bytes());
      if (scratch == nullptr) return;
      const TileHold registers(sample.form);
      EarlyStop stops(sample.form);
      for (int64_t p = begin; p < end; p++) {
        label(other + p * kPanel, smaller(kPanel, others - p * kPanel), labels, scratch, stops);
      }
    });
    return workers.status();
  }
};

template <class T>
Status assign_samples(const AssignArgs& args, const Parallel& pool) {
  return for_each_sample(args.x.B, pool,
                         [&](int64_t b, const Parallel& inner) { return Assigner<T>(args, inner).run(b); });
}

// The tokens of each cluster of a sample, ascending: cluster k has token[start[k]] to token[start[k + 1] - 1].
struct Members {
  int32_t *start, *token;  // [K + 1], [N]

  void sort(const int64_t* labels, int64_t N, int64_t K) {
    for (int64_t k = 0; k <= K; k++) start[k] = 0;
    for (int64_t t = 0; t < N; t++) {
      if (labels[t] >= 0) start[labels[t]]++;
    }
    for (int64_t k = 0, before = 0; k <= K; k++) {
      before += start[k];
      start[k] = int32_t(before);  // where cluster k ends: filled from there
    }
    for (int64_t t = N - 1; t >= 0; t--) {
      if (labels[t] >= 0) token[--start[labels[t]]] = int32_t(t);
    }
  }
};

// The weighted mean of some tokens, in their order. A few vectors of channels at a time stay in registers over the
// tokens, so that tokens are read and the mean is written once.
template <class T>
struct Mean {
  typedef Accumulator<T> A;
  const T* x;
  int64_t stride_n, stride_c;
  const A* weight;  // of every token of x, or null
  const int32_t* token;
  int64_t count;
  A total;

  Mean(const MergeArgs& args, int64_t b, const int32_t* first, int64_t tokens)
      : x(static_cast<const T*>(args.x) + b * args.stride_b),
        stride_n(args.stride_n),
        stride_c(args.stride_c),
        weight(args.weight ? static_cast<const A*>(args.weight) + b * args.N : nullptr),
        token(first),
        count(tokens),
        total(weight ? 0 : A(tokens)) {
    for (int64_t at = 0; weight && at < count; at++) total += weight_of(at);
  }

  A weight_of(int64_t at) const { return weight ? weight[token[at]] : A(1); }

  template <int kVectors>
  void vectors(int64_t c, T* out) const {
    Vector<T> sum[kVectors] = {};
    for (int64_t at = 0; at < count; at++) {
      const T* const row = x + token[at] * stride_n + c;
      const A w = weight_of(at);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) sum[v] += w * load_wide(row + v * kLanes<T>);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) {
      store_narrow(out + c + v * kLanes<T>, total == 0 ? Vector<T>{} : sum[v] / total);
    }
  }

  void channel(int64_t c, T* out) const {
    A sum = 0;
    for (int64_t at = 0; at < count; at++) sum += weight_of(at) * widen(x[token[at] * stride_n + c * stride_c]);
    narrow(total == 0 ? A(0) : sum / total, out[c]);
  }

  void write(int64_t C, T* out) const {
    int64_t c = 0;
    if (stride_c == 1) {
      for (; c + 8 * kLanes<T> <= C; c += 8 * kLanes<T>) vectors<8>(c, out);
      for (; c + kLanes<T> <= C; c += kLanes<T>) vectors<1>(c, out);
    }
    for (; c < C; c++) channel(c, out);
  }
};

template <class T>
Status merge_samples(const MergeArgs& args, const Parallel& pool) {
  const int64_t N = args.N, K = args.K;
  int32_t* const memory =
      static_cast<int32_t*>(sample_scratch.reserve(args.B * (K + 1 + N) * int64_t(sizeof(int32_t))));
  if (memory == nullptr) return Status::out_of_memory;
  const auto members = [&](int64_t b) { return Members{memory + b * (K + 1), memory + args.B * (K + 1) + b * N}; };
  parallel_for(pool, args.B, 1 + 8192 / (N + K + 1), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) members(b).sort(args.labels + b * N, N, K);
  });
  const int64_t read = groups_of(N, larger(1, K)) * args.C;  // elements of a cluster
  parallel_for(pool, args.B * K, 1 + 16384 / (read + 1), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / K, k = task % K;
      const Members of = members(b);
      const Mean<T> mean(args, b, of.token + of.start[k], of.start[k + 1] - of.start[k]);
      mean.write(args.C, static_cast<T*>(args.out) + task * args.C);
      static_cast<Accumulator<T>*>(args.total)[task] = mean.total;
    }
  });
  give_back(pool);
  return Status::ok;
}

}  // namespace

Status assign(const AssignArgs& args, const Parallel& pool) {
  if (!in_range(args.index, args.index_rows * args.K, -1, args.x.N)) return Status::index_out_of_range;
  if (args.parent && !in_range(args.parent, args.x.B * args.x.N, -1, args.x.N)) return Status::parent_out_of_range;
  Status status = Status::ok;
  for_dtype(args.x.dtype, [&](auto element) { status = assign_samples<decltype(element)>(args, pool); });
  return status;
}

Status merge(const MergeArgs& args, const Parallel& pool) {
  if (!in_range(args.labels, args.B * args.N, -1, args.K)) return Status::index_out_of_range;
  Status status = Status::ok;
  for_dtype(args.dtype, [&](auto element) { status = merge_samples<decltype(element)>(args, pool); });
  return status;
}

}  // namespace H2OT_ISA
}  // namespace h2ot
