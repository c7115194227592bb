// The CPU implementations of the operators that choose, gather and cluster tokens, through PyTorch's stable ABI only.
// Recovery stands in recover_registration.cpp, what only hosts use in the others: products, norms, graph layers,
// recovery in rotated channels.
//
// Schemas, fakes, gradients and the public functions' checks stand in the Python stems (h2ot_kernels/<stem>.py); what
// every caller is asked is in require.h. What only the data can tell (an index out of range) is found by the kernels
// and raised here as std::out_of_range: the one standard exception that every torch makes more of in Python than a
// RuntimeError, an IndexError, in eager mode and under torch.compile alike.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "launch_cpu.h"
#include "require.h"

namespace h2ot {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> score_variant(const Tensor& x, int64_t k, const MaybeTensor& mask,
                                                         const MaybeTensor& noise, double scale, bool exclude_self,
                                                         double cutoff) {
  require_scoring({"score_tokens"}, x, k, mask, noise, exclude_self, cutoff);
  const std::vector<int64_t> size = {x.size(0), x.size(1)};
  const Tensor density = make(x, size, ScalarType::Double), distance = make(x, size, ScalarType::Double);
  const Tensor score = make(x, size, ScalarType::Double), parent = make(x, size, ScalarType::Long);
  const MaybeTensor dense_mask = dense(mask, ScalarType::Bool), dense_noise = dense(noise, ScalarType::Double);
  const ScoreArgs args = {tokens_of(x),
                          k,
                          read<bool>(dense_mask),
                          read<double>(dense_noise),
                          write<double>(density),
                          write<double>(distance),
                          write<double>(score),
                          write<int64_t>(parent),
                          nullptr,
                          scale * scale,
                          exclude_self,
                          cutoff};
  check(kernels().score(args, pool()), "score_tokens");
  return {density, distance, score, parent};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> score_tokens(const Tensor& x, int64_t k, const MaybeTensor& mask,
                                                        const MaybeTensor& noise) {
  return score_variant(x, k, mask, noise, 0, false, 0);
}

// keep: [keep_rows, M] and contiguous, or null.
SelectArgs select_args(const Tensor& score, int64_t K, const MaybeTensor& keep, const bool* mask, const Tensor& index) {
  return {static_cast<const double*>(score.const_data_ptr()),
          score.size(0),
          score.size(1),
          K,
          mask,
          read<int64_t>(keep),
          keep ? keep->size(0) : 0,
          keep ? keep->size(1) : 0,
          write<int64_t>(index)};
}

// What is wrong with keep is wrong for select_tokens, whoever calls it: backends that take its steps say so, too.
void check_selected(Status status, const char* op) {
  check(status, status == Status::out_of_memory ? op : "select_tokens", "keep");
}

Tensor select(const Tensor& score, int64_t K, const MaybeTensor& keep, const bool* mask, const char* op) {
  const MaybeTensor dense_keep = dense(keep, ScalarType::Long);
  const Tensor index = make(score, {score.size(0), K}, ScalarType::Long);
  check_selected(kernels().select(select_args(score, K, dense_keep, mask, index), pool()), op);
  return index;
}

Tensor select_tokens(const Tensor& score, int64_t num_tokens, const MaybeTensor& keep, const MaybeTensor& mask) {
  require_scores(score, num_tokens, keep, mask);
  const MaybeTensor dense_mask = dense(mask, ScalarType::Bool);
  return select(dense(score, ScalarType::Double), num_tokens, keep, read<bool>(dense_mask), "select_tokens");
}

// Scores for selection only, and which tokens they may select.
struct Selectable {
  Tensor score, valid;
  MaybeTensor mask, noise;
  ScoreArgs args;

  Selectable(const Tensor& x, int64_t k, const MaybeTensor& given_mask, const MaybeTensor& given_noise)
      : score(make(x, {x.size(0), x.size(1)}, ScalarType::Double)),
        valid(make(x, {x.size(0), x.size(1)}, ScalarType::Bool)),
        mask(dense(given_mask, ScalarType::Bool)),
        noise(dense(given_noise, ScalarType::Double)),
        args{tokens_of(x),         k,       read<bool>(mask),  read<double>(noise), nullptr, nullptr,
             write<double>(score), nullptr, write<bool>(valid)} {}
};

Tensor prune_cluster(const Tensor& x, int64_t num_tokens, int64_t k, const MaybeTensor& keep, const MaybeTensor& mask,
                     const MaybeTensor& noise) {
  constexpr Require require = {"prune_cluster"};
  const auto size = require_scoring(require, x, k, mask, noise);
  require_selection(require, size[0], size[1], num_tokens, keep);
  const Selectable tokens(x, k, mask, noise);
  check(kernels().score(tokens.args, pool()), "prune_cluster");
  return select(tokens.score, num_tokens, keep, tokens.args.valid, "prune_cluster");
}

std::tuple<Tensor, Tensor, Tensor> cluster_tokens(const Tensor& x, int64_t num_tokens, int64_t k,
                                                  const MaybeTensor& keep, const MaybeTensor& mask,
                                                  const MaybeTensor& noise) {
  constexpr Require require = {"cluster_tokens"};
  const auto size = require_scoring(require, x, k, mask, noise);
  require_selection(require, size[0], size[1], num_tokens, keep);
  const Selectable tokens(x, k, mask, noise);
  const MaybeTensor dense_keep = dense(keep, ScalarType::Long);
  const Tensor index = make(x, {x.size(0), num_tokens}, ScalarType::Long);
  const Tensor labels = make(x, {x.size(0), x.size(1)}, ScalarType::Long);
  const ClusterArgs args = {tokens.args, select_args(tokens.score, num_tokens, dense_keep, tokens.args.valid, index),
                            write<int64_t>(labels)};
  check_selected(kernels().cluster(args, pool()), "cluster_tokens");
  return {index, labels, tokens.score};
}

Tensor prune_motion(const Tensor& pose, int64_t num_tokens, const MaybeTensor& keep) {
  constexpr Require require = {"prune_motion"};
  require(pose.dim() == 4, "pose [B, F, J, D]");
  require_selection(require, pose.size(0), pose.size(1), num_tokens, keep);
  const Tensor score = make(pose, {pose.size(0), pose.size(1)}, ScalarType::Double);
  const MotionArgs args = {pose.const_data_ptr(), dtype_of(pose), pose.size(0),        pose.size(1),
                           pose.size(2),          pose.size(3),   pose.stride(0),      pose.stride(1),
                           pose.stride(2),        pose.stride(3), write<double>(score)};
  check(kernels().motion(args, pool()), "prune_motion");
  return select(score, num_tokens, keep, nullptr, "prune_motion");
}

Tensor attention_scores(const Tensor& query, const Tensor& key, double scale) {
  Require{"attention_scores"}(
      (query.dim() == 4 || query.dim() == 5) && same_size(query, key) && query.scalar_type() == key.scalar_type(),
      "query and key [B, H, F, D] or [B, J, H, F, D] of one dtype");
  const bool joints = query.dim() == 5;
  const int64_t B = query.size(0), F = query.size(-2);
  const Tensor score = make(query, {B, F}, precision_of(query));
  AttentionScoreArgs args = {query.const_data_ptr(),
                             key.const_data_ptr(),
                             dtype_of(query),
                             B,
                             joints ? query.size(1) : 1,
                             query.size(-3),
                             F,
                             query.size(-1),
                             {},
                             {},
                             scale,
                             score.mutable_data_ptr()};
  for (int axis = 0; axis < 5; axis++) {
    const int from = joints ? axis : axis - (axis > 0);
    args.query_stride[axis] = !joints && axis == 1 ? 0 : query.stride(from);
    args.key_stride[axis] = !joints && axis == 1 ? 0 : key.stride(from);
  }
  check(score_attention(args, pool()), "prune_attention");
  return score;
}

Tensor prune_attention(const Tensor& query, const Tensor& key, int64_t num_tokens, const MaybeTensor& keep,
                       double scale) {
  const Tensor score = dense(attention_scores(query, key, scale), ScalarType::Double);
  require_selection({"prune_attention"}, score.size(0), score.size(1), num_tokens, keep);
  return select(score, num_tokens, keep, nullptr, "prune_attention");
}

void gather_into(const Tensor& out, const Tensor& x, const Tensor& index, const MaybeTensor& pos_embed, int64_t dim,
                 int64_t out_dim) {
  require_gathered({"gather_tokens"}, x, index, pos_embed, out);
  const Tensor dense_index = dense(index);
  const MaybeTensor embed = dense(pos_embed, x.scalar_type());
  const Moved moved(x, dim, out_dim);
  GatherArgs args = {x.const_data_ptr(),
                     dtype_of(x),
                     static_cast<int32_t>(x.dim()),
                     static_cast<int32_t>(out_dim),
                     {},
                     {},
                     x.size(dim),
                     static_cast<const int64_t*>(dense_index.const_data_ptr()),
                     index.size(0),
                     read<void>(embed),
                     out.mutable_data_ptr()};
  for (int64_t axis = 0; axis < x.dim(); axis++) {
    args.size[axis] = out.size(axis);
    args.stride[axis] = moved.stride[axis];
  }
  check(kernels().gather(args, pool()), "gather_tokens");
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
  check_token_limit(num_frames, "num_frames");
  const Tensor dense_index = dense(index);
  const Moved moved(grad, out_dim, dim);
  const Tensor out = make_moved(grad, out_dim, dim, num_frames);
  if (out.numel() == 0) return out;  // no room for frames that hold nothing, however many they are
  ScatterArgs args = {grad.const_data_ptr(),
                      dtype_of(grad),
                      static_cast<int32_t>(grad.dim()),
                      static_cast<int32_t>(dim),
                      {},
                      {},
                      index.size(1),
                      static_cast<const int64_t*>(dense_index.const_data_ptr()),
                      index.size(0),
                      out.mutable_data_ptr()};
  for (int64_t axis = 0; axis < grad.dim(); axis++) {
    args.size[axis] = out.size(axis);
    args.stride[axis] = moved.stride[axis];
  }
  check(kernels().scatter(args, pool()), "gather_tokens");
  return out;
}

Tensor assign(const Tensor& x, const Tensor& index, const MaybeTensor& parent, const MaybeTensor& mask) {
  constexpr Require require = {"assign_clusters"};
  require_tokens(require, x, mask);
  require(!parent || has_size(*parent, {x.size(0), x.size(1)}), "parent [B, N]");
  require_centres(require, index, x.size(0));
  const Tensor dense_index = dense(index);
  const MaybeTensor dense_mask = dense(mask, ScalarType::Bool), dense_parent = dense(parent, ScalarType::Long);
  const Tensor labels = make(x, {x.size(0), x.size(1)}, ScalarType::Long);
  const AssignArgs args = {tokens_of(x),
                           static_cast<const int64_t*>(dense_index.const_data_ptr()),
                           index.size(0),
                           index.size(1),
                           read<bool>(dense_mask),
                           write<int64_t>(labels),
                           read<int64_t>(dense_parent)};
  check(kernels().assign(args, pool()), "assign_clusters");
  return labels;
}

Tensor assign_clusters(const Tensor& x, const Tensor& index, const MaybeTensor& mask) {
  return assign(x, index, std::nullopt, mask);
}

Tensor assign_by_parent(const Tensor& x, const Tensor& index, const Tensor& parent, const MaybeTensor& mask) {
  return assign(x, index, parent, mask);
}

std::tuple<Tensor, Tensor> merge_tokens(const Tensor& x, const Tensor& labels, int64_t num_clusters,
                                        const MaybeTensor& weight) {
  constexpr Require require = {"merge_tokens"};
  require(x.dim() == 3, "x [B, N, C]");
  check_token_limit(x.size(1));
  require(has_size(labels, {x.size(0), x.size(1)}) && labels.scalar_type() == ScalarType::Long, "labels int64 [B, N]");
  require(!weight || has_size(*weight, {x.size(0), x.size(1)}), "weight [B, N]");
  require(num_clusters >= 1, "num_clusters of 1 or more");
  const Tensor dense_labels = dense(labels);
  const MaybeTensor dense_weight = dense(weight, precision_of(x));
  const Tensor merged = make(x, {x.size(0), num_clusters, x.size(2)});
  const Tensor total = make(x, {x.size(0), num_clusters}, precision_of(x));
  const MergeArgs args = {x.const_data_ptr(),
                          dtype_of(x),
                          x.size(0),
                          x.size(1),
                          x.size(2),
                          num_clusters,
                          x.stride(0),
                          x.stride(1),
                          x.stride(2),
                          static_cast<const int64_t*>(dense_labels.const_data_ptr()),
                          read<void>(dense_weight),
                          merged.mutable_data_ptr(),
                          total.mutable_data_ptr()};
  check(kernels().merge(args, pool()), "merge_tokens", "labels");
  return {merged, total};
}

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) {
  m.impl("score_tokens", TORCH_BOX(&h2ot::score_tokens));
  m.impl("score_variant", TORCH_BOX(&h2ot::score_variant));
  m.impl("prune_cluster", TORCH_BOX(&h2ot::prune_cluster));
  m.impl("cluster_tokens", TORCH_BOX(&h2ot::cluster_tokens));
  m.impl("select_tokens", TORCH_BOX(&h2ot::select_tokens));
  m.impl("prune_motion", TORCH_BOX(&h2ot::prune_motion));
  m.impl("prune_attention", TORCH_BOX(&h2ot::prune_attention));
  m.impl("attention_scores", TORCH_BOX(&h2ot::attention_scores));
  m.impl("gather_tokens", TORCH_BOX(&h2ot::gather_tokens));
  m.impl("gather_tokens_out", TORCH_BOX(&h2ot::gather_tokens_out));
  m.impl("scatter_tokens", TORCH_BOX(&h2ot::scatter_tokens));
  m.impl("assign_clusters", TORCH_BOX(&h2ot::assign_clusters));
  m.impl("assign_by_parent", TORCH_BOX(&h2ot::assign_by_parent));
  m.impl("merge_tokens", TORCH_BOX(&h2ot::merge_tokens));
}
