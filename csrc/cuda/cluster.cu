// Labels of all tokens by the nearest centre on CUDA devices (launch_cuda.h), exact as in float64.
//
// Given centres: the tokens (pooled, and as they enter products: score.cu), a search among the centres, labels. After
// scoring the tokens are there: of few tokens the stored matrix holds all distances, and labels alone are left.
#include "cluster_label.cuh"
#include "cluster_search.cuh"
#include "score_launch.cuh"

namespace h2ot {
namespace cuda {
namespace {

// With rows of T.
template <class T>
struct Labelling : Issuer<Accumulator<T>> {
  typedef Accumulator<T> A;
  using Issuer<A>::follow;
  using Issuer<A>::job;
  using Issuer<A>::plan;

  template <class Tiles>
  void search_by_tiles() {
    follow(centre_kernel<Tiles>, ceil_div(job.x.N, Tiles::kRows) * job.label_splits, Tiles::kThreads,
           sizeof(CentreShared<Tiles>));
  }
  template <class Operand>
  void multiply() {
    if (plan.labels.tile_rows == kProductSides[0]) {
      search_by_tiles<StreamedTile<Operand>>();
    } else {
      search_by_tiles<ProductTile<Operand, kProductSides[1]>>();
    }
  }
  void search_directly() {
    if (plan.labels.tile_rows == kSmallRows) {
      search_by_tiles<SmallTile<A>>();
    } else {
      search_by_tiles<LargeTile<A>>();
    }
  }
  void search() {
    search_by<T>(plan, job.x.dtype, [&](auto operand) { multiply<decltype(operand)>(); }, [&] { search_directly(); });
  }
  void label(void (*kernel)(RowJob<T>)) { follow(kernel, job.groups, kWarps * kLanes, 0); }
};

static_assert(kStreamedSide == kProductSides[0]);
static_assert(sizeof(CentreShared<StreamedTile<Pairs>>) <= kSharedMost);
static_assert(sizeof(CentreShared<LargeTile<double>>) <= kSharedUnasked);

template <class T>
int32_t launch_passes(const AssignArgs& args, const Plan& plan, void* workspace, void* stream) {
  CudaScoreArgs tokens = {};
  tokens.score.x = args.x;
  tokens.score.mask = args.mask;
  tokens.K = args.K;
  tokens.labels = args.labels;
  for (int64_t first = 0; first < args.x.B; first += plan.samples) {
    const int64_t left = args.x.B - first, samples = left < plan.samples ? left : plan.samples;
    Job<Accumulator<T>> job = make_job<T>(tokens, plan, workspace, first);
    job.centre_stride = args.index_rows > 1 ? args.K : 0;
    job.centres = args.index + first * job.centre_stride;
    int32_t error = issue_tokens<T>(job, plan, samples, stream);
    if (error == 0) {
      error = with_rows<T>(plan, [&](auto row) { return issue_labels<decltype(row)>(job, plan, samples, stream); });
    }
    if (error) return error;
  }
  return 0;
}

}  // namespace

template <class T>
int32_t issue_labels(const Job<Accumulator<T>>& job, const Plan& plan, int64_t samples, void* stream) {
  Labelling<T> issue = {{job, plan, samples, stream}};
  if (plan.labels.splits == 0) {
    issue.label(label_stored_kernel<T>);
  } else {
    issue.search();
    issue.label(label_listed_kernel<T>);
  }
  return issue.error;
}
template int32_t issue_labels<float>(const Job<float>&, const Plan&, int64_t, void*);
template int32_t issue_labels<double>(const Job<double>&, const Plan&, int64_t, void*);
template int32_t issue_labels<BFloat16>(const Job<float>&, const Plan&, int64_t, void*);
template int32_t issue_labels<Float16>(const Job<float>&, const Plan&, int64_t, void*);

int32_t launch_assign(const AssignArgs& args, const Plan& plan, void* workspace, void* stream) {
  return with_element(args.x.dtype,
                      [&](auto element) { return launch_passes<decltype(element)>(args, plan, workspace, stream); });
}

}  // namespace cuda
}  // namespace h2ot
