// The CUDA implementations of the operators, through PyTorch's stable ABI only: a library of its own, loaded where
// torch has CUDA. Schemas and fakes stand in the Python stems; kernels issue on torch's current stream and never wait.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cuda/launch_cuda.h"
#include "require.h"

namespace h2ot {
namespace {

using torch::stable::accelerator::DeviceGuard;

void check_cuda(int32_t error, const char* op) {
  if (error) throw std::runtime_error(std::string(op) + ": CUDA error: " + cuda::error_name(error));
}

void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Facts of each device, asked once (a driver call each; the same answer from every thread).
const cuda::Machine& machine_of(int32_t device, const char* op) {
  static thread_local std::vector<cuda::Machine> known;
  if (static_cast<size_t>(device) >= known.size()) known.resize(static_cast<size_t>(device) + 1);
  cuda::Machine& machine = known[static_cast<size_t>(device)];
  if (machine.multiprocessors == 0) check_cuda(cuda::read_machine(device, &machine), op);
  return machine;
}

cuda::Problem problem_of(const Tokens& tokens, int64_t k, int64_t centres) {
  check_token_limit(tokens.N, "x", cuda::kMostTokens - 1);
  check_token_limit(centres, "index", cuda::kMostTokens - 1);
  return {tokens.B, tokens.N, tokens.J, tokens.C, k, tokens.dtype, cuda::readable_in_place(tokens), centres};
}

// Plans, allocates the workspace and launches; args.score.x and the pointers are set.
void run(const Tensor& x, const cuda::CudaScoreArgs& args, const char* op) {
  if (args.score.x.B == 0) return;
  const cuda::Problem problem = problem_of(args.score.x, args.score.k, args.labels ? args.K : 0);
  const int32_t device = x.get_device_index();
  const cuda::Plan plan = cuda::plan_score(problem, machine_of(device, op));
  const Tensor workspace = make(x, {plan.at.bytes}, ScalarType::Byte);
  check_cuda(cuda::launch_score(args, plan, workspace.mutable_data_ptr(), current_stream(device)), op);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> score_tokens(const Tensor& x, int64_t k, const MaybeTensor& mask,
                                                        const MaybeTensor& noise) {
  require_scoring({"score_tokens"}, x, k, mask, noise);
  const DeviceGuard guard(x.get_device_index());
  const std::vector<int64_t> size = {x.size(0), x.size(1)};
  const Tensor density = make(x, size, ScalarType::Double), distance = make(x, size, ScalarType::Double);
  const Tensor score = make(x, size, ScalarType::Double), parent = make(x, size, ScalarType::Long);
  const MaybeTensor dense_mask = dense(mask, ScalarType::Bool), dense_noise = dense(noise, ScalarType::Double);
  cuda::CudaScoreArgs args = {};
  args.score = {tokens_of(x),
                k,
                read<bool>(dense_mask),
                read<double>(dense_noise),
                write<double>(density),
                write<double>(distance),
                write<double>(score),
                write<int64_t>(parent),
                nullptr};
  run(x, args, "score_tokens");
  return {density, distance, score, parent};
}

// Scoring and selection with these arguments, kept tokens to index.
cuda::CudaScoreArgs selection_args(const Tensor& x, int64_t k, const MaybeTensor& dense_keep,
                                   const MaybeTensor& dense_mask, const MaybeTensor& dense_noise, const Tensor& index) {
  cuda::CudaScoreArgs args = {};
  args.score.x = tokens_of(x);
  args.score.k = k;
  args.score.mask = read<bool>(dense_mask);
  args.score.noise = read<double>(dense_noise);
  args.K = index.size(1);
  args.keep = read<int64_t>(dense_keep);
  args.keep_rows = dense_keep ? dense_keep->size(0) : 0;
  args.M = dense_keep ? dense_keep->size(1) : 0;
  args.index = write<int64_t>(index);
  return args;
}

Tensor prune_cluster(const Tensor& x, int64_t num_tokens, int64_t k, const MaybeTensor& keep, const MaybeTensor& mask,
                     const MaybeTensor& noise) {
  constexpr Require require = {"prune_cluster"};
  const auto size = require_scoring(require, x, k, mask, noise);
  require_selection(require, size[0], size[1], num_tokens, keep);
  const DeviceGuard guard(x.get_device_index());
  const MaybeTensor dense_mask = dense(mask, ScalarType::Bool), dense_noise = dense(noise, ScalarType::Double);
  const MaybeTensor dense_keep = dense(keep, ScalarType::Long);
  const Tensor index = make(x, {x.size(0), num_tokens}, ScalarType::Long);
  run(x, selection_args(x, k, dense_keep, dense_mask, dense_noise, index), "prune_cluster");
  return index;
}

std::tuple<Tensor, Tensor, Tensor> cluster_tokens(const Tensor& x, int64_t num_tokens, int64_t k,
                                                  const MaybeTensor& keep, const MaybeTensor& mask,
                                                  const MaybeTensor& noise) {
  constexpr Require require = {"cluster_tokens"};
  const auto size = require_scoring(require, x, k, mask, noise);
  require_selection(require, size[0], size[1], num_tokens, keep);
  const DeviceGuard guard(x.get_device_index());
  const MaybeTensor dense_mask = dense(mask, ScalarType::Bool), dense_noise = dense(noise, ScalarType::Double);
  const MaybeTensor dense_keep = dense(keep, ScalarType::Long);
  const Tensor index = make(x, {x.size(0), num_tokens}, ScalarType::Long);
  const Tensor labels = make(x, {size[0], size[1]}, ScalarType::Long);
  const Tensor score = make(x, {size[0], size[1]}, ScalarType::Double);
  cuda::CudaScoreArgs args = selection_args(x, k, dense_keep, dense_mask, dense_noise, index);
  args.score.score = write<double>(score);
  args.labels = write<int64_t>(labels);
  run(x, args, "cluster_tokens");
  return {index, labels, score};
}

Tensor assign_clusters(const Tensor& x, const Tensor& index, const MaybeTensor& mask) {
  constexpr Require require = {"assign_clusters"};
  require_tokens(require, x, mask);
  require_centres(require, index, x.size(0));
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  const Tensor dense_index = dense(index), labels = make(x, {x.size(0), x.size(1)}, ScalarType::Long);
  if (x.size(0) == 0) return labels;
  const MaybeTensor dense_mask = dense(mask, ScalarType::Bool);
  const AssignArgs args = {tokens_of(x),           static_cast<const int64_t*>(dense_index.const_data_ptr()),
                           index.size(0),          index.size(1),
                           read<bool>(dense_mask), write<int64_t>(labels)};
  const cuda::Plan plan = cuda::plan_assign(problem_of(args.x, 0, args.K), machine_of(device, "assign_clusters"));
  const Tensor workspace = make(x, {plan.at.bytes}, ScalarType::Byte);
  check_cuda(cuda::launch_assign(args, plan, workspace.mutable_data_ptr(), current_stream(device)), "assign_clusters");
  return labels;
}

Tensor select_tokens(const Tensor& score, int64_t num_tokens, const MaybeTensor& keep, const MaybeTensor& mask) {
  require_scores(score, num_tokens, keep, mask);
  const DeviceGuard guard(score.get_device_index());
  const int64_t B = score.size(0), N = score.size(1);
  const Tensor dense_score = dense(score, ScalarType::Double);
  const MaybeTensor dense_mask = dense(mask, ScalarType::Bool), dense_keep = dense(keep, ScalarType::Long);
  const Tensor index = make(score, {B, num_tokens}, ScalarType::Long), keys = make(score, {B, N}, ScalarType::Long);
  const SelectArgs args = {read<double>(dense_score),
                           B,
                           N,
                           num_tokens,
                           read<bool>(dense_mask),
                           read<int64_t>(dense_keep),
                           keep ? keep->size(0) : 0,
                           keep ? keep->size(1) : 0,
                           write<int64_t>(index)};
  void* stream = current_stream(score.get_device_index());
  check_cuda(cuda::launch_select(args, reinterpret_cast<uint64_t*>(write<int64_t>(keys)), stream), "select_tokens");
  return index;
}

// What gathering and scattering share: x with its frame axis `from` moved to `to` gives out.
template <class Args>
void set_layout(Args& args, const Tensor& x, int64_t from, int64_t to, const Tensor& index, const Tensor& out) {
  const Moved moved(x, from, to);
  args.dtype = dtype_of(x);
  args.dims = static_cast<int32_t>(x.dim());
  args.frame_axis = static_cast<int32_t>(to);
  for (int64_t axis = 0; axis < args.dims; axis++) {
    args.size[axis] = out.size(axis);
    args.stride[axis] = moved.stride[axis];
  }
  args.index = static_cast<const int64_t*>(index.const_data_ptr());
  args.index_rows = index.size(0);
  args.out = out.mutable_data_ptr();
}

void gather_into(const Tensor& out, const Tensor& x, const Tensor& index, const MaybeTensor& pos_embed, int64_t dim,
                 int64_t out_dim) {
  require_gathered({"gather_tokens"}, x, index, pos_embed, out);
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  const Tensor dense_index = dense(index);
  const MaybeTensor embed = dense(pos_embed, x.scalar_type());
  GatherArgs args = {};
  args.x = x.const_data_ptr();
  args.F = x.size(dim);
  args.pos_embed = read<void>(embed);
  set_layout(args, x, dim, out_dim, dense_index, out);
  const bool overlap = cuda::can_overlap(machine_of(device, "gather_tokens"));
  check_cuda(cuda::launch_gather(args, current_stream(device), overlap), "gather_tokens");
}

Tensor gather_tokens(const Tensor& x, const Tensor& index, const MaybeTensor& pos_embed, int64_t dim, int64_t out_dim) {
  const Tensor out = make_moved(x, dim, out_dim, index.size(1));
  gather_into(out, x, index, pos_embed, dim, out_dim);
  return out;
}

void gather_tokens_out(const Tensor& x, const Tensor& index, const MaybeTensor& pos_embed, int64_t dim, int64_t out_dim,
                       const Tensor& out) {
  require_out({"gather_tokens"}, out, x, dim, out_dim, index.size(1));
  gather_into(out, x, index, pos_embed, dim, out_dim);
}

Tensor scatter_tokens(const Tensor& grad, const Tensor& index, int64_t num_frames, int64_t dim, int64_t out_dim) {
  require_scattered({"scatter_tokens"}, grad, index, out_dim);
  const int32_t device = grad.get_device_index();
  const DeviceGuard guard(device);
  const Tensor dense_index = dense(index);
  const Tensor out = make_moved(grad, out_dim, dim, num_frames);
  ScatterArgs args = {};
  args.grad = grad.const_data_ptr();
  args.K = index.size(1);
  set_layout(args, grad, out_dim, dim, dense_index, out);
  const bool overlap = cuda::can_overlap(machine_of(device, "scatter_tokens"));
  check_cuda(cuda::launch_scatter(args, current_stream(device), overlap), "scatter_tokens");
  return out;
}

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CUDA, m) {
  m.impl("score_tokens", TORCH_BOX(&h2ot::score_tokens));
  m.impl("prune_cluster", TORCH_BOX(&h2ot::prune_cluster));
  m.impl("cluster_tokens", TORCH_BOX(&h2ot::cluster_tokens));
  m.impl("assign_clusters", TORCH_BOX(&h2ot::assign_clusters));
  m.impl("select_tokens", TORCH_BOX(&h2ot::select_tokens));
  m.impl("gather_tokens", TORCH_BOX(&h2ot::gather_tokens));
  m.impl("gather_tokens_out", TORCH_BOX(&h2ot::gather_tokens_out));
  m.impl("scatter_tokens", TORCH_BOX(&h2ot::scatter_tokens));
}
