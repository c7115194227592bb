// Density-peak scoring (launch.h: ScoreArgs), exact as in float64.
//
// Float32 tiles find which tokens can be the nearest; float64 direct differences of those few decide. A decision that
// the tile bound cannot prove is taken over all tokens in float64. So results do not depend on the tile shape, the
// instruction set's vector width, the number of threads or the place in the batch.
#include "each_sample.h"
#include "kernels.h"
#include "score_exact.h"
#include "score_gaussian.h"
#include "score_nearby.h"
#include "score_stored.h"
#include "score_streamed.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// Neighbours that a Gaussian density asks for, the token itself included: they find most denser tokens.
constexpr int64_t kGaussianNeighbours = 2;

// Scores one sample by one of the searches, which have the same steps:
//   find_nearest(workers)   m and the nearest neighbours of every slot (State)
//   find_parents(workers)   parent and delta of every slot, by their keys
//   largest(workers)        the largest squared distance
//   label(index, K, labels, workers), with kLabels, where that is less work than `assign`
template <class T>
struct Scorer {
  typedef Accumulator<T> A;
  const ScoreArgs& args;
  const ClusterArgs* clusters;  // null: scores only
  Workers workers;
  const bool gaussian, need_largest;
  const int64_t k;      // neighbours that a density needs, the token itself included
  const Search search;  // by sizes alone
  State<A> state;
  Stored<A> stored;
  Streamed<A> streamed;
  Nearby<A> nearby;  // instead of `streamed` where the tokens are gathered
  Exact<A> exact;
  int64_t* sums;  // of a Gaussian density

  Scorer(const ScoreArgs& a, const Parallel& pool, const ClusterArgs* c = nullptr)
      : args(a),
        clusters(c),
        workers{pool},
        gaussian(a.cutoff > 0),
        need_largest(a.distance || a.noise),
        k(gaussian ? smaller(a.x.N, kGaussianNeighbours) : a.k + a.exclude_self),
        search(a.x.N <= kStoredTokens ? Search::stored
               : k <= kLongest        ? Search::streamed
                                      : Search::exact) {}

  void carve(Carver& memory) {
    const int64_t N = args.x.N, C = args.x.C;
    state.sample.carve(memory, N, C, readable_in_place<T>(args.x));
    sums = gaussian ? memory.take<int64_t>(rounded_up(N, kPanel)) : nullptr;
    stored.state = streamed.state = nearby.state = exact.state = &state;
    if (search == Search::stored) {
      state.carve(memory, N, panel_room(C), smaller(k, kKept));
      stored.carve(memory, N, clusters != nullptr, need_largest);
    } else if (search == Search::exact) {
      state.carve(memory, N, 0, smaller(N, kKept));
      exact.carve(memory, N, need_largest);
    } else {
      const int64_t list = smaller(N, k + kSpare);
      state.carve(memory, N, Nearby<A>::room(C), list);
      streamed.carve(memory, N, list, need_largest);
      nearby.carve(memory, N, C, list, streamed.peaks.peak, streamed.peaks.column);
    }
  }

  Status run(int64_t b) {
    Carver count(nullptr);
    carve(count);
    void* memory = sample_scratch.reserve(count.bytes());
    if (memory == nullptr) return Status::out_of_memory;
    Carver carver(memory);
    carve(carver);
    const Parallel& pool = workers.pool;
    stored.packed =
        read_sample<T>(args.x, b, args.mask, pool, state.sample, search == Search::stored ? state.panels : nullptr);
    state.wanted = smaller(k, state.sample.n) - 1;
    state.averaged = larger(1, state.wanted + !args.exclude_self);
    state.area = args.area > 0 ? args.area : double(args.x.C);
    state.strict = args.noise != nullptr;
    state.largest = 0;
    if (search == Search::stored) return run_by(stored, b);
    if (search == Search::exact) return run_by(exact, b);
    if (!gaussian && nearby.takes(pool)) return run_by(nearby, b);
    return run_by(streamed, b);
  }

  template <class Steps>
  Status run_by(Steps& steps, int64_t b) {
    if (state.sample.n > 0) {
      steps.find_nearest(workers);
      if (gaussian && !workers.failed) sum_gaussian();
      set_keys(b);
      if (!workers.failed) steps.find_parents(workers);
      if (need_largest && !workers.failed) state.largest = steps.largest(workers);
    }
    if (workers.failed) return Status::out_of_memory;
    write(b);
    return clusters ? cluster_by(steps, b) : Status::ok;
  }

  void sum_gaussian() {
    if (search == Search::stored && stored.any_refined) {
      pack_panels(state.sample.form, state.sample.token, state.sample.n, workers.pool, state.panels);
    }
    const Gaussian<A> gaussian_sum = {state, sums, state.area * args.cutoff * args.cutoff};
    gaussian_sum.add_all(workers.pool);
    for (int64_t i = 0; i < state.sample.n; i++) state.m[i] = -gaussian_sum.density(i, args.exclude_self);
  }

  double density_of(int64_t i) const { return gaussian ? -state.m[i] : exp(-state.m[i]); }

  void set_keys(int64_t b) {
    const int64_t n = state.sample.n;
    for (int64_t i = 0; i < n; i++) {
      state.key[i] = args.noise ? -(density_of(i) + args.noise[b * args.x.N + state.sample.token[i]]) : state.m[i];
    }
    for (int64_t i = n; i % kDoubles; i++) state.key[i] = __builtin_nan("");
  }

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

  // Selection and labels, once the scores are written.
  template <class Steps>
  Status cluster_by(Steps& steps, int64_t b) {
    const int64_t N = args.x.N;
    const Parallel serial = {workers.pool.run, 1};
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
    if constexpr (Steps::kLabels) {
      steps.label(one.index, one.K, labels, workers);
      return workers.status();
    } else {
      Tokens x = args.x;
      x.B = 1;
      x.data = static_cast<const T*>(x.data) + b * x.stride_b;
      return assign({x, one.index, 1, one.K, one.mask, labels}, workers.pool);
    }
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
    plan = {scorer.search, count.bytes()};
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
