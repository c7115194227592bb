// Density-peak scoring (launch.h: ScoreArgs), exact as in float64.
//
// Float32 tiles find which tokens can be the nearest; float64 direct differences of those few decide. A decision that
// the tile bound cannot prove is taken over all tokens in float64. So results do not depend on the tile shape, the
// instruction set's vector width, the number of threads or the place in the batch.
#include "kernels.h"
#include "score_gaussian.h"
#include "score_stored.h"
#include "score_streamed.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

thread_local Scratch sample_scratch, worker_scratch;

constexpr int64_t kKeptBytes = int64_t(64) << 20;  // scratch above this goes back after the call

// Neighbours remembered beyond those that m averages, when streaming: they prove the others and find denser tokens.
constexpr int64_t kSpare = 3;
// A longer neighbour list than this is not worth keeping sorted at every tile: rows are then searched in float64.
constexpr int64_t kLongest = 64;

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
  Matrix matrix;
  Streamed<A> streamed;
  PeakSearch<A> peaks;
  double* of_row;
  int64_t* sums;  // of a Gaussian density
  int64_t k;      // neighbours that a density needs, the token itself included
  bool gaussian, stored, listed, need_largest;
  bool failed = false;  // out of memory

  Scorer(const ScoreArgs& a, const Parallel& p) : args(a), pool(p) {
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
    state.carve(memory, N, C, list);
    of_row = nullptr;
    sums = gaussian ? memory.take<int64_t>(ceil_div(N, kPanel) * kPanel) : nullptr;
    streamed.state = &state;
    peaks.streamed = &streamed;
    if (stored) {
      matrix = carve_matrix(memory, N);
      return;
    }
    streamed.lists.carve(memory, N, list);
    streamed.furthest = need_largest ? memory.take<float>(N) : nullptr;
    if (need_largest) of_row = memory.take<double>(N);
    peaks.carve(memory, N);
  }

  // Rows [0, n) with room for n neighbours per thread.
  template <class F>
  void for_rows(const F& f) {
    const int64_t n = state.sample.n;
    parallel_for(pool, n, kRowGrain, [&](int64_t begin, int64_t end) {
      Neighbour* list = static_cast<Neighbour*>(worker_scratch.reserve((n + kKept) * int64_t(sizeof(Neighbour))));
      if (list == nullptr) {
        __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t i = begin; i < end; i++) f(i, list);
    });
  }

  // Tile distances of all pairs: the matrix, or the lists.
  void search() {
    const int64_t n = state.sample.n, panels = ceil_div(n, kPanel);
    pack_panels(state.sample, state.sample.token, n, pool, state.panels);
    if (!stored) {
      streamed.lists.clear(n);
      for (int64_t i = 0; streamed.furthest && i < n; i++) streamed.furthest[i] = 0;
      streamed.search_all(pool);
      return;
    }
    const int64_t grain = larger(1, 200000 / (state.sample.C * kPanel * kPanel / kFloats));
    parallel_for(pool, panels * (panels + 1) / 2, grain, [&](int64_t begin, int64_t end) {
      int64_t q = 0;  // block t is (p, q) with p <= q and t = q (q + 1) / 2 + p
      while ((q + 1) * (q + 2) / 2 <= begin) q++;
      for (int64_t t = begin, p = begin - q * (q + 1) / 2; t < end; t++) {
        fill_block(state, p, q, matrix);
        if (p++ == q) {
          q++;
          p = 0;
        }
      }
    });
    for (int64_t i = 0; i < n; i++) matrix[i][i] = __builtin_inff();
  }

  void find_nearest() {
    if (!listed) {
      state.sample.use_floats();
      for_rows([&](int64_t i, Neighbour* list) { state.set_nearest_exactly(i, list); });
      return;
    }
    search();
    if (state.sample.packing.quantised && (stored ? too_coarse(state, matrix) : streamed.too_coarse())) {
      state.sample.use_floats();
      search();
    }
    if (stored) {
      for_rows([&](int64_t i, Neighbour* list) { nearest_from_row(state, matrix[i], i, list); });
    } else {
      for_rows([&](int64_t i, Neighbour* list) { streamed.set_nearest(i, list); });
    }
  }

  void sum_gaussian() {
    const Gaussian<A> gaussian_sum = {state, sums, state.area * args.cutoff * args.cutoff};
    const int64_t n = state.sample.n, panels = ceil_div(n, kPanel);
    for (int64_t i = 0; i < panels * kPanel; i++) sums[i] = 0;
    // A task takes one panel from either end: earlier panels have more later tokens to look at.
    parallel_for(pool, ceil_div(panels, 2), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) {
        gaussian_sum.add(p);
        if (panels - 1 - p != p) gaussian_sum.add(panels - 1 - p);
      }
    });
    for (int64_t i = 0; i < n; i++) state.m[i] = -gaussian_sum.density(i, args.exclude_self);
  }

  void find_parents() {
    if (stored) {
      for_rows([&](int64_t i, Neighbour*) { parent_from_row(state, matrix[i], i); });
      return;
    }
    for_rows([&](int64_t i, Neighbour*) {
      if (!state.find_parent_nearby(i)) state.parent[i] = kUnknownParent;
    });
    peaks.collect();
    const int64_t block = PeakSearch<A>::kBlock * kPanel, blocks = ceil_div(peaks.peaks, block);
    // A task takes one block from either end: later blocks have more denser tokens to look at.
    parallel_for(pool, ceil_div(blocks, 2), 1, [&](int64_t begin, int64_t end) {
      void* memory = worker_scratch.reserve(PeakSearch<A>::worker_bytes(args.x.C));
      if (memory == nullptr) {
        __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        return;
      }
      const auto run = [&](int64_t b) { peaks.search(b * block, smaller((b + 1) * block, peaks.peaks), memory); };
      for (int64_t task = begin; task < end; task++) {
        run(task);
        if (blocks - 1 - task != task) run(blocks - 1 - task);
      }
    });
  }

  double find_largest() {
    if (stored) return largest_stored(state, matrix);
    if (listed) return streamed.largest(pool, of_row);
    for_rows([&](int64_t i, Neighbour*) {
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
    read_sample<T>(args.x, b, args.mask, pool, state.sample);
    const int64_t n = state.sample.n;
    state.wanted = smaller(k, n) - 1;
    state.averaged = larger(1, state.wanted + !args.exclude_self);
    state.area = args.area > 0 ? args.area : double(args.x.C);
    state.strict = args.noise != nullptr;
    state.largest = 0;
    if (n > 0) {
      find_nearest();
      if (gaussian && !failed) sum_gaussian();
      for (int64_t i = 0; i < n; i++) {
        state.key[i] = args.noise ? -(density_of(i) + args.noise[b * args.x.N + state.sample.token[i]]) : state.m[i];
      }
      if (!failed) find_parents();
      if (need_largest && !failed) state.largest = find_largest();
    }
    if (failed) return Status::out_of_memory;
    write(b);
    return Status::ok;
  }
};

template <class T>
Status score_samples(const ScoreArgs& args, const Parallel& pool) {
  const Parallel serial = {pool.run, 1};
  // Whole rounds of samples side by side, one per thread; the rest with all threads on each.
  const int64_t aside = pool.threads > 1 ? args.x.B / pool.threads * pool.threads : 0;
  int32_t worst = int32_t(Status::ok);
  const auto run = [&](int64_t b, const Parallel& inner) {
    const Status status = Scorer<T>(args, inner).run(b);
    if (status != Status::ok) __atomic_store_n(&worst, int32_t(status), __ATOMIC_RELAXED);
  };
  parallel_for(pool, aside, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) run(b, serial);
    worker_scratch.trim(kKeptBytes);
    sample_scratch.trim(kKeptBytes);
  });
  for (int64_t b = aside; b < args.x.B; b++) run(b, pool);
  sample_scratch.trim(kKeptBytes);
  return Status(worst);
}

}  // namespace

ScorePlan plan_score(const ScoreArgs& args) {
  ScorePlan plan = {};
  for_dtype(args.x.dtype, [&](auto element) {
    Scorer<decltype(element)> scorer(args, {nullptr, 1});
    Carver count(nullptr);
    scorer.carve(count);
    plan = {scorer.search_kind(), count.bytes()};
  });
  return plan;
}

Status score(const ScoreArgs& args, const Parallel& pool) {
  Status status = Status::ok;
  for_dtype(args.x.dtype, [&](auto element) { status = score_samples<decltype(element)>(args, pool); });
  return status;
}

}  // namespace H2OT_ISA
}  // namespace h2ot
