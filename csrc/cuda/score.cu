// Density-peak scoring and selection on CUDA devices (launch_cuda.h), exact as in float64.
//
// Passes over parts of the batch, each a few kernels in a row on the caller's stream:
//   pool      one read of x: pooled float32 (float64) tokens where x has no such rows, which are valid, their magnitude
//   operands  for products, the tokens as they enter them; of float32 tokens in place, by the same read
//   search    approximate distances with a proven bound: all of them stored (N up to kStoredTokens), or the few nearest
//             of each token streamed; by direct difference, or products on tensor cores
//   nearest   m from the k nearest, decided in float64
//   parent    the nearest denser token, and the largest distance, decided in float64; density, distance, score; the
//             kept tokens (many tokens: kernels of their own)
//   labels    where asked for: of all tokens by the kept ones (cluster.cu)
// Every decision is float64, every sum has one order: results do not depend on the plan, the device or the batch.
#include "score_finish.cuh"
#include "score_launch.cuh"
#include "score_pairs.cuh"
#include "score_pool.cuh"
#include "score_products.cuh"
#include "score_stored.cuh"
#include "score_stream.cuh"
#include "score_stream_products.cuh"
#include "score_tiles.cuh"

namespace h2ot {
namespace cuda {
namespace {

// With rows of T.
template <class T>
struct Issue : Issuer<Accumulator<T>> {
  typedef Accumulator<T> A;
  using Issuer<A>::follow;
  using Issuer<A>::job;
  using Issuer<A>::plan;
  using Issuer<A>::run;

  // A warp per token.
  void per_token(void (*kernel)(RowJob<T>), int64_t shared_bytes) {
    run(kernel, job.groups, kWarps * kLanes, shared_bytes);
  }

  template <class Tiles>
  void search_stored() {
    follow(stored_kernel<Tiles>, plan.tiles, Tiles::kThreads, sizeof(StoredShared<Tiles>));
  }
  template <class Tiles>
  void search_streamed() {
    run(stream_kernel<Tiles>, ceil_div(job.x.N, Tiles::kRows) * job.splits, kTileThreads, sizeof(StreamShared<Tiles>));
  }
  void search_directly() {
    if (plan.search == Search::streamed) {
      search_streamed<DirectTile<A>>();
    } else if (plan.tile_rows == kSmallRows) {
      search_stored<SmallTile<A>>();
    } else {
      search_stored<LargeTile<A>>();
    }
  }
  template <class Operand>
  void multiply() {
    if (plan.search == Search::streamed) {
      typedef StreamedTile<Operand> Tiles;
      run(stream_products_kernel<Tiles>, ceil_div(job.x.N, Tiles::kRows) * job.splits, Tiles::kThreads,
          sizeof(StreamProductsShared<Tiles>));
    } else if (plan.tile_rows == 128) {
      multiply_stored<ProductTile<Operand, 128>>();
    } else {
      multiply_stored<ProductTile<Operand, 64>>();
    }
  }
  template <class Tiles>
  void multiply_stored() {
    follow(stored_products_kernel<Tiles>, plan.tiles, Tiles::kThreads, sizeof(ProductShared<Tiles>));
  }
  void search() {
    search_by<T>(plan, job.x.dtype, [&](auto operand) { multiply<decltype(operand)>(); }, [&] { search_directly(); });
  }

  void stored() {
    search();
    const int32_t threads = kWarps * kLanes;
    follow(nearest_stored_kernel<T>, job.groups, threads, sizeof(NearestShared<A>));
    if (job.wants_largest) follow(largest_stored_kernel<T>, job.groups, threads, 0);
    follow(parent_stored_kernel<T>, job.groups, threads, sizeof(ParentShared));
  }

  void streamed() {
    if (plan.list > 0) search();
    per_token(nearest_streamed_kernel<T>, sizeof(CompleteShared));
    per_token(parent_streamed_kernel<T>, 0);
    run(peaks_kernel<A>, 1, kFinishThreads, sizeof(SelectShared));
    job.for_peaks = true;
    job.list = kPeakList;
    search();
    per_token(peak_parent_kernel<T>, sizeof(CompleteShared));
    run(scores_kernel<A>, ceil_div(job.x.N, kFinishThreads), kFinishThreads, 0);
    if (job.index) run(index_kernel<A>, 1, kMostWarps * kLanes, sizeof(SelectShared));
  }
};

static_assert(sizeof(StoredShared<SmallTile<double>>) <= kSharedUnasked);
static_assert(sizeof(StoredShared<LargeTile<double>>) <= kSharedUnasked);
static_assert(sizeof(StreamShared<DirectTile<double>>) <= kSharedUnasked);
static_assert(sizeof(StreamProductsShared<StreamedTile<Pairs>>) <= kSharedMost);
static_assert(sizeof(ProductShared<ProductTile<Pairs, 128>>) <= kSharedMost);

// One pass from where its tokens are there.
template <class T>
int32_t issue_rows(const Job<Accumulator<T>>& job, const Plan& plan, int64_t samples, void* stream) {
  Issue<T> issue = {{job, plan, samples, stream}};
  if (plan.search == Search::stored) {
    issue.stored();
  } else {
    issue.streamed();
  }
  if (issue.error == 0 && job.labels) issue.error = issue_labels<T>(job, plan, samples, stream);
  return issue.error;
}

template <class T>
int32_t launch_passes(const CudaScoreArgs& args, const Plan& plan, void* workspace, void* stream) {
  for (int64_t first = 0; first < args.score.x.B; first += plan.samples) {
    const int64_t left = args.score.x.B - first, samples = left < plan.samples ? left : plan.samples;
    const Job<Accumulator<T>> job = make_job<T>(args, plan, workspace, first);
    int32_t error = issue_tokens<T>(job, plan, samples, stream);
    if (error == 0) {
      error = with_rows<T>(plan, [&](auto row) { return issue_rows<decltype(row)>(job, plan, samples, stream); });
    }
    if (error) return error;
  }
  return 0;
}

}  // namespace

template <class T>
int32_t issue_tokens(const Job<Accumulator<T>>& job, const Plan& plan, int64_t samples, void* stream) {
  Issuer<Accumulator<T>> issue = {job, plan, samples, stream};
  const bool pairs = plan.distance == Distance::products;
  if (!pairs || job.copy) {
    issue.follow(pool_kernel<T>, job.groups, plan.pool_warps * kTokensPerBlock * kLanes,
                 sizeof(PoolShared<Accumulator<T>>));
  }
  if constexpr (std::is_same<Accumulator<T>, float>::value) {
    const auto make_operands = [&](void (*kernel)(Job<float>)) {
      issue.follow(kernel, job.groups, kWarps * kLanes, kWarps * sizeof(int32_t));
    };
    if (pairs) {
      issue.follow(pair_kernel<float>, job.groups, kWarps * kLanes, sizeof(PairShared));
      issue.follow(scale_kernel<float>, ceil_div(job.x.N, kScaleThreads), kScaleThreads, 0);
    }
    if (plan.distance == Distance::exact_products) {
      make_operands(job.x.dtype == Dtype::bf16 ? operand_kernel<BFloat16> : operand_kernel<Float16>);
    }
  }
  return issue.error;
}
template int32_t issue_tokens<float>(const Job<float>&, const Plan&, int64_t, void*);
template int32_t issue_tokens<double>(const Job<double>&, const Plan&, int64_t, void*);
template int32_t issue_tokens<BFloat16>(const Job<float>&, const Plan&, int64_t, void*);
template int32_t issue_tokens<Float16>(const Job<float>&, const Plan&, int64_t, void*);

int32_t launch_score(const CudaScoreArgs& args, const Plan& plan, void* workspace, void* stream) {
  return with_element(args.score.x.dtype,
                      [&](auto element) { return launch_passes<decltype(element)>(args, plan, workspace, stream); });
}

}  // namespace cuda
}  // namespace h2ot
