// What the launchers of scoring and of labels share: the argument of their kernels, issued one after the other.
#pragma once

#include "score_device.cuh"
#include "score_multiply.cuh"

namespace h2ot {
namespace cuda {

template <class T>
T* at(void* workspace, int64_t offset) {
  return offset < 0 ? nullptr : reinterpret_cast<T*>(static_cast<unsigned char*>(workspace) + offset);
}
template <class T>
T* offset_by(T* pointer, int64_t count) {
  return pointer ? pointer + count : nullptr;
}

// f of an element of the dtype.
template <class F>
int32_t with_element(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f64:
      return f(double());
    case Dtype::bf16:
      return f(BFloat16());
    case Dtype::f16:
      return f(Float16());
    default:
      return f(float());
  }
}

// f of an element of the rows that float64 reads: of x where they lie in it, or of their copy.
template <class T, class F>
int32_t with_rows(const Plan& plan, const F& f) {
  if constexpr (!std::is_same<T, Accumulator<T>>::value) {
    if (plan.pitch == 0) return f(T());
  }
  return f(Accumulator<T>());
}

// Whether pooling can read quads of channels.
inline bool readable_in_quads(const Tokens& x) {
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
  job.rows = job.copy;
  if constexpr (std::is_same<T, A>::value) job.rows = job.copy ? job.copy : static_cast<const A*>(job.x.data);
  job.row_stride_n = job.copy ? plan.pitch : in.x.stride_n;
  job.row_stride_b = job.copy ? plan.pitch * in.x.N : in.x.stride_b;
  job.channels = int32_t(job.copy ? plan.pitch : in.x.C);
  job.valid = at<uint8_t>(workspace, where.valid);
  job.exponent = at<int32_t>(workspace, where.exponent);
  job.groups = ceil_div(in.x.N, kTokensPerBlock);
  job.norm = at<A>(workspace, where.norm);
  job.bound = search_bound({in.x.B, in.x.N, in.x.J, in.x.C, in.k, in.x.dtype, plan.pitch == 0}, plan.distance);
  job.operands.in_place = plan.distance == Distance::exact_products && plan.line_pitch == 0
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
  job.search_rows = plan.tile_rows;
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
  job.labels = offset_by(args.labels, first * in.x.N);
  job.centres = job.index;
  job.centre_stride = args.K;
  job.label_splits = plan.labels.splits;
  job.centre_low = at<A>(workspace, where.centre_low);
  job.centre_at = at<int32_t>(workspace, where.centre_at);
  job.centre_reach = at<A>(workspace, where.centre_reach);
  job.centre_count = at<int32_t>(workspace, where.centre_count);
  return job;
}

// What searches rows of T: multiply(of an operand), or directly().
template <class T, class Multiply, class Directly>
void search_by(const Plan& plan, Dtype dtype, const Multiply& multiply, const Directly& directly) {
  if constexpr (!std::is_same<T, Accumulator<T>>::value) {
    multiply(T());  // rows of 16 bits are only read in place where they are multiplied
  } else if constexpr (std::is_same<T, float>::value) {
    if (plan.distance == Distance::direct) {
      directly();
    } else if (plan.distance == Distance::products) {
      multiply(Pairs());
    } else if (dtype == Dtype::bf16) {
      multiply(BFloat16());
    } else {
      multiply(Float16());
    }
  } else {
    directly();
  }
}

// Issues kernels one after the other until one fails.
template <class A>
struct Issuer {
  Job<A> job;
  const Plan& plan;
  int64_t samples;
  void* stream;
  int32_t error = 0;

  void run(void (*kernel)(Job<A>), int64_t blocks, int32_t threads, int64_t shared_bytes, bool follows = false) {
    if (error == 0) {
      error = launch(kernel, blocks, samples, threads, shared_bytes, stream, job, follows && plan.overlaps);
    }
  }
  template <class T>
  void run(void (*kernel)(RowJob<T>), int64_t blocks, int32_t threads, int64_t shared_bytes, bool follows = false) {
    if (error == 0) {
      const RowJob<T> of_rows = {job};
      error = launch(kernel, blocks, samples, threads, shared_bytes, stream, of_rows, follows && plan.overlaps);
    }
  }
  // A kernel that begins with follow_previous().
  template <class AnyJob>
  void follow(void (*kernel)(AnyJob), int64_t blocks, int32_t threads, int64_t shared_bytes) {
    run(kernel, blocks, threads, shared_bytes, true);
  }
};

// One pass: the tokens, pooled and (for products) as they are multiplied (score.cu); labels from the stored matrix, or
// from a search among the centres (cluster.cu), with rows of T.
template <class T>
int32_t issue_tokens(const Job<Accumulator<T>>& job, const Plan& plan, int64_t samples, void* stream);
template <class T>
int32_t issue_labels(const Job<Accumulator<T>>& job, const Plan& plan, int64_t samples, void* stream);

}  // namespace cuda
}  // namespace h2ot
