// Density-peak scoring (launch.h: ScoreArgs), exact as in float64.
//
// Float32 tiles find which tokens can be the nearest; float64 direct differences of those few decide. A decision that
// the tile bound cannot prove is taken over all tokens in float64. So results do not depend on the tile shape, the
// instruction set's vector width, the number of threads or the place in the batch.
#include "each_sample.h"
#include "kernels.h"
#include "score_gaussian.h"
#include "score_nearby.h"
#include "score_stored.h"
#include "score_streamed.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kRowGrain = 32;

// Neighbours that a Gaussian density asks for, the token itself included: they find most denser tokens.
constexpr int64_t kGaussianNeighbours = 2;

// Everything about one sample, and the steps that score it.
template <class T>
struct Scorer {
  typedef Accumulator<T> A;
  const ScoreArgs& args;
  const Parallel& pool;
  State<A> state;
  Stored<A> matrix;
  Streamed<A> streamed;
  PeakSearch<A> peaks;
  Nearby<A> nearby;
  double* of_row;
  int64_t* sums;  // of a Gaussian density
  int64_t k;      // neighbours that a density needs, the token itself included
  bool gaussian, stored, listed, need_largest, packed;
  bool gathered = false;  // the tokens are: `nearby` instead of `streamed`
  bool failed = false;    // out of memory

  const ClusterArgs* clusters;  // null: scores only

  Scorer(const ScoreArgs& a, const Parallel& p, const ClusterArgs* c = nullptr) : args(a), pool(p), clusters(c) {
    const int64_t N = args.x.N;
    gaussian = args.cutoff > 0;
    k = gaussian ? smaller(N, kGaussianNeighbours) : args.k + args.exclude_self;
    stored = N <= kStoredTokens;
    listed = stored || k <= kLongest;
    need_largest = args.distance || args.noise;
  }

  Search search_kind() const { return stored ? Search::stored : listed ? Search::streamed : Search::exact; }

  void carve(Carver& memory) {
    const int64_t N = args.x.N, C = args.x.C;
    state.sample.carve(memory, N, C, readable_in_place<T>(args.x));
    const int64_t list = stored ? smaller(k, kKept) : smaller(N, listed ? k + kSpare : kKept);
    state.carve(memory, N, stored ? panel_room(C) : Nearby<A>::room(C), list);
    of_row = nullptr;
    sums = gaussian ? memory.take<int64_t>(rounded_up(N, kPanel)) : nullptr;
    matrix.state = &state;
    streamed.state = &state;
    peaks.streamed = &streamed;
    nearby.state = &state;
    if (stored) {
      matrix.carve(memory, N, clusters != nullptr);
      return;
    }
    streamed.lists.carve(memory, N, list);
    streamed.open = memory.take<bool>(N);
    streamed.furthest = need_largest ? memory.take<float>(N) : nullptr;
    if (need_largest) of_row = memory.take<double>(N);
    peaks.carve(memory, N);
    nearby.carve(memory, N, C);
    nearby.row = peaks.peak;
    nearby.other = peaks.column;
  }

  // Memory of the running thread, `bytes` of it; null, and then noted, when there is none.
  void* worker_memory(int64_t bytes) {
    void* memory = worker_scratch.reserve(bytes);
    if (memory == nullptr) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    return memory;
  }

  auto reserve() {
    return [this](int64_t bytes) { return worker_memory(bytes); };
  }

  // f(i, room) for the rows [0, n).
  template <class F>
  void for_rows(const F& f) {
    const int64_t n = state.sample.n, stride = stored ? matrix.stride : 0;
    parallel_for(pool, n, kRowGrain, [&](int64_t begin, int64_t end) {
      void* memory = worker_memory(RowRoom::bytes(n, stride));
      if (memory == nullptr) return;
      Carver carver(memory);
      RowRoom room;
      room.carve(carver, n, stride);
      for (int64_t i = begin; i < end; i++) f(i, room);
    });
  }

  // f(i, room, true) for the rows [0, n) and, after `between`, f(i, room, false) for those that the matrix has open
  // then.
  template <class F, class G>
  void for_rows_twice(const F& f, const G& between) {
    for_rows([&](int64_t i, const RowRoom& room) {
      matrix.open[i] = false;
      f(i, room, true);
    });
    if (failed || !matrix.any_open()) return;
    between();
    for_rows([&](int64_t i, const RowRoom& room) {
      if (matrix.open[i]) f(i, room, false);
    });
  }

  // f(begin, end, memory) for blocks of `count` rows of a search that keeps `list` candidates each.
  template <class F>
  void for_blocks(int64_t count, int64_t list, const F& f) {
    typedef typename RowSearch<A>::Memory Memory;
    const int64_t C = args.x.C, block = RowSearch<A>::kBlock * kPanel, blocks = groups_of(count, block);
    // A task takes one block from either end: later blocks may have more columns to look at.
    parallel_for(pool, groups_of(blocks, 2), 1, [&](int64_t begin, int64_t end) {
      void* bytes = worker_memory(Memory::bytes(C, list));
      if (bytes == nullptr) return;
      Carver carver(bytes);
      Memory memory;
      memory.carve(carver, C, list);
      const auto run = [&](int64_t b) { f(b * block, smaller((b + 1) * block, count), memory); };
      for (int64_t task = begin; task < end; task++) {
        run(task);
        if (blocks - 1 - task != task) run(blocks - 1 - task);
      }
    });
  }

  void find_nearest() {
    const Sample<A>& sample = state.sample;
    const bool refines = sample.form.quantised();
    if (!listed) {
      for_rows([&](int64_t i, const RowRoom& room) {
        streamed.open[i] = true;
        state.set_nearest_exactly(i, room.list);
      });
    } else if (stored) {
      matrix.search(pool, packed, need_largest);
      for_rows_twice(
          [&](int64_t i, const RowRoom& room, bool may_wait) { matrix.set_nearest(i, room, may_wait && refines); },
          [&] { matrix.refine(pool); });
    } else if (gathered) {
      nearby.find_nearest(streamed.lists.length, pool, reserve());
      for_rows([&](int64_t i, const RowRoom& room) {
        if (state.near_count[i] < 0) state.set_nearest_exactly(i, room.list);
      });
    } else {
      pack_panels(sample.form, sample.token, sample.n, pool, state.panels);
      streamed.clear();
      streamed.search_all(pool);
      for_rows([&](int64_t i, const RowRoom& room) {
        streamed.open[i] = !streamed.set_nearest(streamed.lists, sample.form, i, i, room.list);
        if (streamed.open[i] && !refines) state.set_nearest_exactly(i, room.list);
      });
      if (refines) refine_rows();
    }
  }

  // The open rows of a streamed search again, in the fine form; a few of them, and those that are not proven then, over
  // all tokens in float64.
  void refine_rows() {
    constexpr int64_t kFew = 8;
    const Form<A>& fine = state.sample.fine;
    int64_t rows = 0;
    int32_t *row = peaks.peak, *column = peaks.column;
    for (int64_t i = 0; i < state.sample.n; i++) {
      column[i] = int32_t(i);
      if (!streamed.open[i]) continue;
      row[rows++] = int32_t(i);
      state.near_count[i] = -1;
    }
    if (rows > kFew) {
      for_blocks(rows, streamed.lists.length, [&](int64_t begin, int64_t end, typename RowSearch<A>::Memory& memory) {
        RowSearch<A>{state.sample, fine, row, nullptr, column}.search(begin, end, memory);
        Neighbour list[kLongest + kSpare];
        for (int64_t i = begin; i < end; i++) streamed.set_nearest(memory.lists, fine, i - begin, row[i], list);
      });
    }
    for_rows([&](int64_t i, const RowRoom& room) {
      if (streamed.open[i] && state.near_count[i] < 0) state.set_nearest_exactly(i, room.list);
    });
  }

  void sum_gaussian() {
    if (stored && matrix.any_refined) {
      pack_panels(state.sample.form, state.sample.token, state.sample.n, pool, state.panels);
    }
    const Gaussian<A> gaussian_sum = {state, sums, state.area * args.cutoff * args.cutoff};
    const int64_t n = state.sample.n, panels = groups_of(n, kPanel);
    for (int64_t i = 0; i < panels * kPanel; i++) sums[i] = 0;
    // A task takes one panel from either end: earlier panels have more later tokens to look at.
    parallel_for(pool, groups_of(panels, 2), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) {
        gaussian_sum.add(p);
        if (panels - 1 - p != p) gaussian_sum.add(panels - 1 - p);
      }
    });
    for (int64_t i = 0; i < n; i++) state.m[i] = -gaussian_sum.density(i, args.exclude_self);
  }

  void find_parents() {
    if (stored) {
      return for_rows_twice(
          [&](int64_t i, const RowRoom& room, bool may_wait) { matrix.set_parent(i, room, may_wait); },
          [&] { matrix.complete(pool); });
    }
    if (gathered) return nearby.find_parents(pool, reserve());
    for_rows([&](int64_t i, const RowRoom&) {
      if (!state.find_parent_nearby(i)) state.parent[i] = kUnknownParent;
    });
    peaks.collect();
    for_blocks(
        peaks.peaks, PeakSearch<A>::kList,
        [&](int64_t begin, int64_t end, typename RowSearch<A>::Memory& memory) { peaks.search(begin, end, memory); });
  }

  double find_largest() {
    if (stored) return matrix.largest();
    if (gathered) return nearby.largest(pool);
    if (listed) return streamed.largest(pool, of_row);
    for_rows([&](int64_t i, const RowRoom&) {
      of_row[i] = 0;
      for (int64_t j = i + 1; j < state.sample.n; j++) {
        const double s = state.sample.distance(i, j);
        of_row[i] = s > of_row[i] ? s : of_row[i];
      }
    });
    double largest = 0;
    for (int64_t i = 0; i < state.sample.n; i++) largest = of_row[i] > largest ? of_row[i] : largest;
    return largest;
  }

  double density_of(int64_t i) const { return gaussian ? -state.m[i] : exp(-state.m[i]); }

  void write(int64_t b) {
    const int64_t N = args.x.N, at = b * N;
    const Sample<A>& sample = state.sample;
    const double largest = sqrt(state.largest / state.area);
    int64_t i = 0;
    for (int64_t t = 0; t < N; t++) {
      const bool valid = sample.valid[t];
      double density = 0, distance = 0, score = -__builtin_inf();
      int64_t parent = -1;
      if (valid) {
        const bool is_peak = state.parent[i] < 0;
        distance = is_peak ? largest : sqrt(state.delta[i] / state.area);
        density = args.noise ? -state.key[i] : args.density ? density_of(i) : 0;
        if (args.noise) {
          score = density * distance;
        } else if (is_peak) {
          score = __builtin_inf();
        } else {
          score = log(distance) + (gaussian ? log(-state.m[i]) : -state.m[i]);
        }
        parent = is_peak ? -1 : sample.token[state.parent[i]];
        i++;
      }
      args.score[at + t] = score;
      if (args.density) args.density[at + t] = density;
      if (args.distance) args.distance[at + t] = distance;
      if (args.parent) args.parent[at + t] = parent;
      if (args.valid) args.valid[at + t] = valid;
    }
  }

  Status run(int64_t b) {
    Carver count(nullptr);
    carve(count);
    void* memory = sample_scratch.reserve(count.bytes());
    if (memory == nullptr) return Status::out_of_memory;
    Carver carver(memory);
    carve(carver);
    packed = read_sample<T>(args.x, b, args.mask, pool, state.sample, stored ? state.panels : nullptr);
    const int64_t n = state.sample.n;
    state.wanted = smaller(k, n) - 1;
    state.averaged = larger(1, state.wanted + !args.exclude_self);
    state.area = args.area > 0 ? args.area : double(args.x.C);
    state.strict = args.noise != nullptr;
    state.largest = 0;
    gathered = !stored && listed && !gaussian && nearby.places.gathered(nearby.placed, pool);
    if (n > 0) {
      find_nearest();
      if (gaussian && !failed) sum_gaussian();
      for (int64_t i = 0; i < n; i++) {
        state.key[i] = args.noise ? -(density_of(i) + args.noise[b * args.x.N + state.sample.token[i]]) : state.m[i];
      }
      for (int64_t i = n; i % kDoubles; i++) state.key[i] = __builtin_nan("");
      if (!failed) find_parents();
      if (need_largest && !failed) state.largest = find_largest();
    }
    if (failed) return Status::out_of_memory;
    write(b);
    return clusters ? cluster(b) : Status::ok;
  }

  // Selection and labels, once the scores are written.
  Status cluster(int64_t b) {
    const int64_t N = args.x.N;
    const Parallel serial = {pool.run, 1};
    SelectArgs one = clusters->select;
    one.B = 1;
    one.score += b * N;
    one.mask += b * N;
    one.index += b * one.K;
    if (one.keep && one.keep_rows > 1) one.keep += b * one.M;
    one.keep_rows = 1;
    const Status status = select(one, serial);
    if (status != Status::ok) return status;
    int64_t* labels = clusters->labels + b * N;
    if (stored) return label_from_matrix(one.index, one.K, labels);
    if (gathered) return label_nearby(one.index, one.K, labels);
    Tokens x = args.x;
    x.B = 1;
    x.data = static_cast<const T*>(x.data) + b * x.stride_b;
    return assign({x, one.index, 1, one.K, one.mask, labels}, pool);
  }

  Status label_nearby(const int64_t* index, int64_t K, int64_t* labels) {
    for (int64_t t = 0; t < args.x.N; t++) labels[t] = -1;
    for (int64_t j = 0; j < K; j++) labels[index[j]] = state.sample.valid[index[j]] ? j : -1;
    nearby.label(labels, pool, reserve());
    return failed ? Status::out_of_memory : Status::ok;
  }

  Status label_from_matrix(const int64_t* index, int64_t K, int64_t* labels) {
    const Sample<A>& sample = state.sample;
    matrix.set_centres(index, K, labels);
    if (matrix.centres == 0) return Status::ok;
    const auto label = [&](int64_t i, const RowRoom& room, bool may_wait) {
      int64_t& of_row = labels[sample.token[i]];
      if (of_row >= 0) return;
      const int32_t nearest = matrix.nearest_centre(i, room, may_wait);
      if (!may_wait || !matrix.open[i]) of_row = nearest < 0 ? -1 : labels[sample.token[nearest]];
    };
    for_rows_twice(label, [&] { matrix.complete(pool); });
    return failed ? Status::out_of_memory : Status::ok;
  }
};

template <class T>
Status score_samples(const ScoreArgs& args, const Parallel& pool, const ClusterArgs* clusters) {
  return for_each_sample(args.x.B, pool,
                         [&](int64_t b, const Parallel& inner) { return Scorer<T>(args, inner, clusters).run(b); });
}

}  // namespace

ScorePlan plan_score(const ScoreArgs& args) {
  ScorePlan plan = {};
  for_dtype(args.x.dtype, [&](auto element) {
    const Parallel serial = {nullptr, 1};
    Scorer<decltype(element)> scorer(args, serial);
    Carver count(nullptr);
    scorer.carve(count);
    plan = {scorer.search_kind(), count.bytes()};
  });
  return plan;
}

Status score(const ScoreArgs& args, const Parallel& pool) {
  Status status = Status::ok;
  for_dtype(args.x.dtype, [&](auto element) { status = score_samples<decltype(element)>(args, pool, nullptr); });
  return status;
}

Status cluster(const ClusterArgs& args, const Parallel& pool) {
  Status status = Status::ok;
  for_dtype(args.score.x.dtype,
            [&](auto element) { status = score_samples<decltype(element)>(args.score, pool, &args); });
  return status;
}

}  // namespace H2OT_ISA
}  // namespace h2ot
