// Recovery's operators on the CPU: attention, the tail behind it, interpolation, their gradients (registration.cpp has
// the others, and says what stands where).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "launch_cpu.h"
#include "recover_inputs.h"
#include "require.h"

namespace h2ot {
namespace {

void require_attention(Require require, const Tensor& query, const Tensor& key, const Tensor& value,
                       int64_t num_heads) {
  const auto size = query.sizes(), kept = key.sizes(), values = value.sizes();
  require(kept.size() == 3 && std::equal(kept.begin(), kept.end(), values.begin(), values.end()),
          "key and value [B, K, C]");
  const int64_t B = kept[0], C = kept[2], rows = size.size() == 3 ? size[0] : 1;
  require((size.size() == 2 || size.size() == 3) && size[size.size() - 1] == C && (rows == 1 || rows == B),
          "query [F, C], [1, F, C] or [B, F, C]");
  require(num_heads >= 1 && C % num_heads == 0, "num_heads that divide C");
  const ScalarType dtype = value.scalar_type();
  require(query.scalar_type() == dtype && key.scalar_type() == dtype, "query, key and value of one dtype");
}

void attend_into(const Tensor& out, const Tensor& query, const Tensor& key, const Tensor& value, int64_t num_heads,
                 double scale) {
  require_attention({"recover_attention"}, query, key, value, num_heads);
  RecoverInputs in(query, key, value, num_heads, scale, false);
  in.args.out = out.mutable_data_ptr();
  check(attend(in.args, pool()), "recover_attention");
}

Tensor recover_attention(const Tensor& query, const Tensor& key, const Tensor& value, int64_t num_heads, double scale) {
  const Tensor out = make(value, {value.size(0), query.size(-2), value.size(2)});
  attend_into(out, query, key, value, num_heads, scale);
  return out;
}

void recover_attention_out(const Tensor& query, const Tensor& key, const Tensor& value, int64_t num_heads, double scale,
                           const Tensor& out) {
  require_out({"recover_attention"}, out, value, 1, 1, query.size(-2));
  attend_into(out, query, key, value, num_heads, scale);
}

std::tuple<Tensor, Tensor, Tensor> recover_attention_backward(const Tensor& grad, const Tensor& query,
                                                              const Tensor& key, const Tensor& value, int64_t num_heads,
                                                              double scale) {
  constexpr Require require = {"recover_attention"};
  require_attention(require, query, key, value, num_heads);
  require(has_size(grad, {value.size(0), query.size(-2), value.size(2)}) && grad.scalar_type() == value.scalar_type(),
          "grad [B, F, C] of value's dtype");
  const RecoverInputs in(query, key, value, num_heads, scale, true);
  const Tensor dense_grad = dense(grad);
  const Tensor grad_query = in_huge_pages(torch::stable::empty_like(in.query));
  const Tensor grad_key = in_huge_pages(torch::stable::empty_like(in.key));
  const Tensor grad_value = in_huge_pages(torch::stable::empty_like(in.value));
  const RecoverAttentionBackwardArgs args = {in.args, dense_grad.const_data_ptr(), grad_query.mutable_data_ptr(),
                                             grad_key.mutable_data_ptr(), grad_value.mutable_data_ptr()};
  check(kernels().recover_attention_backward(args, pool()), "recover_attention");
  return {grad_query, grad_key, grad_value};
}

Tensor recover_tail(const Tensor& token, const Tensor& projected, const MaybeTensor& norm_weight,
                    const MaybeTensor& norm_bias, const Tensor& head_weight, const MaybeTensor& head_bias, double eps) {
  constexpr Require require = {"recover_pose"};
  const ScalarType dtype = projected.scalar_type();
  require(projected.dim() == 3 && head_weight.dim() == 2, "projected [R, F, C] and head_weight [M, C]");
  const Tensor dense_token = dense(token), dense_projected = dense(projected), dense_head = dense(head_weight);
  const MaybeTensor weight = dense(norm_weight, dtype), bias = dense(norm_bias, dtype), shift = dense(head_bias, dtype);
  const int64_t R = projected.size(0), F = projected.size(1), C = projected.size(2), M = head_weight.size(0);
  require(has_size(token, {F, C}) && token.scalar_type() == dtype, "token [F, C] of projected's dtype");
  require(head_weight.size(1) == C && head_weight.scalar_type() == dtype, "head_weight [M, C] of projected's dtype");
  require((!norm_weight || has_size(*norm_weight, {C})) && (!norm_bias || has_size(*norm_bias, {C})) &&
              (!head_bias || has_size(*head_bias, {M})),
          "the norm's vectors [C], the head's bias [M]");
  const Tensor out = make(projected, {R, F, M});
  const RecoverTailArgs args = {dense_token.const_data_ptr(),
                                dense_projected.const_data_ptr(),
                                read<void>(weight),
                                read<void>(bias),
                                dense_head.const_data_ptr(),
                                read<void>(shift),
                                dtype_of(projected),
                                R,
                                F,
                                C,
                                M,
                                eps,
                                out.mutable_data_ptr()};
  check(kernels().recover_tail(args, pool()), "recover_pose");
  return out;
}

void require_kept(Require require, const MaybeTensor& index, int64_t B, int64_t K) {
  if (index) require_index(require, *index, B);
  require(K >= 1 && (!index || index->size(1) == K), "kept frames, and an index of each");
}

InterpolateArgs interpolate_args(const Tensor& x, const MaybeTensor& index, int64_t num_kept, int64_t num_frames,
                                 bool nearest) {
  int64_t S = 1;
  for (int64_t axis = 2; axis < x.dim(); axis++) S *= x.size(axis);
  return {x.const_data_ptr(),
          dtype_of(x),
          x.size(0),
          num_kept,
          num_frames,
          S,
          read<int64_t>(index),
          index ? index->size(0) : 0,
          nearest ? Interpolation::nearest : Interpolation::linear,
          nullptr};
}

void interpolate_into(const Tensor& out, const Tensor& x, const MaybeTensor& index, int64_t num_frames, bool nearest) {
  require_kept({"recover_interpolate"}, index, x.size(0), x.size(1));
  const Tensor dense_x = dense(x);
  const MaybeTensor dense_index = dense(index, ScalarType::Long);
  InterpolateArgs args = interpolate_args(dense_x, dense_index, x.size(1), num_frames, nearest);
  args.out = out.mutable_data_ptr();
  check(kernels().interpolate(args, pool()), "recover_interpolate");
}

Tensor recover_interpolate(const Tensor& x, const MaybeTensor& index, int64_t num_frames, bool nearest) {
  const Tensor out = make_moved(x, 1, 1, num_frames);
  interpolate_into(out, x, index, num_frames, nearest);
  return out;
}

void recover_interpolate_out(const Tensor& x, const MaybeTensor& index, int64_t num_frames, bool nearest,
                             const Tensor& out) {
  require_out({"recover_interpolate"}, out, x, 1, 1, num_frames);
  interpolate_into(out, x, index, num_frames, nearest);
}

Tensor recover_interpolate_backward(const Tensor& grad, const MaybeTensor& index, int64_t num_kept, bool nearest) {
  require_kept({"recover_interpolate"}, index, grad.size(0), num_kept);
  check_token_limit(num_kept, "num_kept");
  const Tensor dense_grad = dense(grad);
  const MaybeTensor dense_index = dense(index, ScalarType::Long);
  const Tensor grad_x = make_moved(grad, 1, 1, num_kept);
  if (grad_x.numel() == 0) return grad_x;
  const InterpolateBackwardArgs args = {interpolate_args(dense_grad, dense_index, num_kept, grad.size(1), nearest),
                                        dense_grad.const_data_ptr(), grad_x.mutable_data_ptr()};
  check(kernels().interpolate_backward(args, pool()), "recover_interpolate");
  return grad_x;
}

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) {
  m.impl("recover_attention", TORCH_BOX(&h2ot::recover_attention));
  m.impl("recover_attention_out", TORCH_BOX(&h2ot::recover_attention_out));
  m.impl("recover_attention_backward", TORCH_BOX(&h2ot::recover_attention_backward));
  m.impl("recover_tail", TORCH_BOX(&h2ot::recover_tail));
  m.impl("recover_interpolate", TORCH_BOX(&h2ot::recover_interpolate));
  m.impl("recover_interpolate_out", TORCH_BOX(&h2ot::recover_interpolate_out));
  m.impl("recover_interpolate_backward", TORCH_BOX(&h2ot::recover_interpolate_backward));
}
