// Density-peak scoring and selection on CUDA devices (launch_cuda.h), exact as in float64.
//
// Passes over parts of the batch, each a few kernels in a row on the caller's stream:
//   pool      one read of x: pooled float32 (float64) tokens, which are valid, their magnitude
//   search    approximate distances with a proven bound: all of them stored (N up to kStoredTokens), or the few nearest
//             of each token streamed; by direct difference, or products on tensor cores
//   nearest   m from the k nearest, decided in float64
//   parent    the nearest denser token, and the largest distance, decided in float64; density, distance, score; the
//             kept tokens (many tokens: kernels of their own)
// Every decision is float64, every sum has one order: results do not depend on the plan, the device or the batch.
#include "score_finish.cuh"
#include "score_pool.cuh"
#include "score_products.cuh"
#include "score_stored.cuh"
#include "score_stream.cuh"
#include "score_stream_products.cuh"
#include "score_tiles.cuh"

namespace h2ot {
namespace cuda {
namespace {

template <class T>
T* at(void* workspace, int64_t offset) {
  return offset < 0 ? nullptr : reinterpret_cast<T*>(static_cast<unsigned char*>(workspace) + offset);
}
template <class T>
T* offset_by(T* pointer, int64_t count) {
  return pointer ? pointer + count : nullptr;
}

// Whether pooling can read quads of channels.
bool readable_in_quads(const Tokens& x) {
  const int64_t bytes = element_bytes(x.dtype), vector = 4 * bytes < 16 ? 4 * bytes : 16;
  const auto whole = [&](int64_t stride) { return stride * bytes % vector == 0; };
  return x.stride_c == 1 && x.C % 4 == 0 && whole(x.stride_b) && whole(x.stride_n) && whole(x.stride_j) &&
         reinterpret_cast<uintptr_t>(x.data) % vector == 0;
}

// The job of samples first .. of the call.
template <class T>
Job<Accumulator<T>> make_job(const CudaScoreArgs& args, const Plan& plan, void* workspace, int64_t first) {
  typedef Accumulator<T> A;
  const ScoreArgs& in = args.score;
  const Workspace& where = plan.at;
  Job<A> job = {};
  job.x = in.x;
  job.x.data = static_cast<const T*>(in.x.data) + first * in.x.stride_b;
  job.vectors = readable_in_quads(in.x);
  job.mask = offset_by(in.mask, first * in.x.N);
  job.noise = offset_by(in.noise, first * in.x.N);
  job.k = in.k;
  job.wants_largest = in.distance != nullptr || in.noise != nullptr;
  job.copy = at<A>(workspace, where.rows);
  job.rows = job.copy ? job.copy : static_cast<const A*>(job.x.data);
  job.row_stride_n = job.copy ? plan.pitch : in.x.stride_n;
  job.row_stride_b = job.copy ? plan.pitch * in.x.N : in.x.stride_b;
  job.channels = int32_t(job.copy ? plan.pitch : in.x.C);
  job.valid = at<uint8_t>(workspace, where.valid);
  job.exponent = at<int32_t>(workspace, where.exponent);
  job.groups = ceil_div(in.x.N, kTokensPerBlock);
  job.norm = at<A>(workspace, where.norm);
  job.bound = search_bound({in.x.B, in.x.N, in.x.J, in.x.C, in.k, in.x.dtype, plan.pitch == 0}, plan.distance);
  job.operands.in_place = plan.distance == Distance::exact_products && readable_in_place(in.x)
                              ? static_cast<const uint16_t*>(job.x.data)
                              : nullptr;
  job.operands.stride_b = in.x.stride_b;
  job.operands.stride_n = in.x.stride_n;
  job.operands.copy = at<uint16_t>(workspace, where.operands);
  job.operands.pitch = plan.line_pitch;
  job.operands.scale = at<float>(workspace, where.scale);
  job.matrix = at<A>(workspace, where.matrix);
  job.matrix_pitch = plan.matrix_pitch;
  job.tile_ratio = plan.tile_columns / plan.tile_rows;
  job.listed = at<A>(workspace, where.listed);
  job.listed_at = at<int32_t>(workspace, where.listed_at);
  job.furthest = at<A>(workspace, where.furthest);
  job.splits = plan.splits;
  job.list = plan.list;
  job.nearest = at<double>(workspace, where.nearest);
  job.nearest_at = at<int32_t>(workspace, where.nearest_at);
  job.near = plan.near;
  job.proven = at<int32_t>(workspace, where.proven);
  job.peaks = at<int32_t>(workspace, where.peaks);
  job.peak_count = at<int32_t>(workspace, where.peak_count);
  job.m = at<double>(workspace, where.m);
  job.key = at<double>(workspace, where.key);
  job.squared = at<double>(workspace, where.squared);
  job.parent = at<int32_t>(workspace, where.parent);
  job.largest = at<unsigned long long>(workspace, where.largest);
  job.arrived = at<int32_t>(workspace, where.arrived);
  job.keys = at<uint64_t>(workspace, where.keys);
  job.flag = at<uint8_t>(workspace, where.flag);
  job.density = offset_by(in.density, first * in.x.N);
  job.distance = offset_by(in.distance, first * in.x.N);
  job.score = offset_by(in.score, first * in.x.N);
  job.parent_out = offset_by(in.parent, first * in.x.N);
  job.K = args.K;
  job.keep_stride = args.keep_rows > 1 ? args.M : 0;
  job.keep = offset_by(args.keep, first * job.keep_stride);
  job.M = args.keep ? args.M : 0;
  job.index = offset_by(args.index, first * args.K);
  return job;
}

// Issues kernels one after the other until one fails.
template <class A>
struct Issue {
  Job<A> job;
  const Plan& plan;
  int64_t samples;
  void* stream;
  int32_t error = 0;
  bool has_operands = false;

  void run(void (*kernel)(Job<A>), int64_t blocks, int32_t threads, int64_t shared_bytes, bool follows = false) {
    if (error == 0) {
      error = launch(kernel, blocks, samples, threads, shared_bytes, stream, job, follows && plan.overlaps);
    }
  }
  // A kernel that begins with follow_previous().
  void follow(void (*kernel)(Job<A>), int64_t blocks, int32_t threads, int64_t shared_bytes) {
    run(kernel, blocks, threads, shared_bytes, true);
  }
  // A warp per token.
  void per_token(void (*kernel)(Job<A>), int64_t shared_bytes = 0) {
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
    if (!has_operands) {  // with long lists the first search is left out
      follow(operand_kernel<Operand>, job.groups, kWarps * kLanes, kWarps * sizeof(int32_t));
      has_operands = true;
    }
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
  void search();

  void stored() {
    search();
    const int32_t threads = kWarps * kLanes;
    follow(nearest_stored_kernel<A>, job.groups, threads, sizeof(NearestShared<A>));
    if (job.wants_largest) follow(largest_stored_kernel<A>, job.groups, threads, 0);
    follow(parent_stored_kernel<A>, job.groups, threads, sizeof(ParentShared));
  }

  void streamed() {
    if (plan.list > 0) search();
    per_token(nearest_streamed_kernel<A>);
    per_token(parent_streamed_kernel<A>);
    run(peaks_kernel<A>, 1, kFinishThreads, sizeof(SelectShared));
    job.for_peaks = true;
    job.list = kPeakList;
    search();
    per_token(peak_parent_kernel<A>);
    run(scores_kernel<A>, ceil_div(job.x.N, kFinishThreads), kFinishThreads, 0);
    if (job.index) run(index_kernel<A>, 1, kMostWarps * kLanes, sizeof(SelectShared));
  }
};

template <>
void Issue<float>::search() {
  if (plan.distance == Distance::direct) {
    search_directly();
  } else if (plan.distance == Distance::products) {
    multiply<Pairs>();
  } else if (job.x.dtype == Dtype::bf16) {
    multiply<BFloat16>();
  } else {
    multiply<Float16>();
  }
}
template <>
void Issue<double>::search() {
  search_directly();
}

static_assert(sizeof(StoredShared<SmallTile<double>>) <= kSharedUnasked);
static_assert(sizeof(StoredShared<LargeTile<double>>) <= kSharedUnasked);
static_assert(sizeof(StreamShared<DirectTile<double>>) <= kSharedUnasked);
static_assert(sizeof(StreamProductsShared<StreamedTile<Pairs>>) <= kSharedMost);
static_assert(sizeof(ProductShared<ProductTile<Pairs, 128>>) <= kSharedMost);

template <class T>
int32_t launch_passes(const CudaScoreArgs& args, const Plan& plan, void* workspace, void* stream) {
  for (int64_t first = 0; first < args.score.x.B; first += plan.samples) {
    const int64_t left = args.score.x.B - first;
    Issue<Accumulator<T>> issue = {make_job<T>(args, plan, workspace, first), plan,
                                   left < plan.samples ? left : plan.samples, stream};
    issue.follow(pool_kernel<T>, issue.job.groups, plan.pool_warps * kTokensPerBlock * kLanes,
                 sizeof(PoolShared<Accumulator<T>>));
    if (plan.search == Search::stored) {
      issue.stored();
    } else {
      issue.streamed();
    }
    if (issue.error) return issue.error;
  }
  return 0;
}

}  // namespace

int32_t launch_score(const CudaScoreArgs& args, const Plan& plan, void* workspace, void* stream) {
  switch (args.score.x.dtype) {
    case Dtype::f64:
      return launch_passes<double>(args, plan, workspace, stream);
    case Dtype::bf16:
      return launch_passes<BFloat16>(args, plan, workspace, stream);
    case Dtype::f16:
      return launch_passes<Float16>(args, plan, workspace, stream);
    default:
      return launch_passes<float>(args, plan, workspace, stream);
  }
}

}  // namespace cuda
}  // namespace h2ot
