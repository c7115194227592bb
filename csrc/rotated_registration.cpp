// The torch-facing file of recovery with its tail in rotated channels. Only h2ot_kernels/recover_rotated.py calls it.
#include <torch/csrc/stable/library.h>

#include "launch_cpu.h"
#include "recover_inputs.h"
#include "require.h"

namespace h2ot {
namespace {

constexpr Require require = {"recover_rotated"};

// What the triangle is packed for.
enum class Form { floats, halves, tiles };

Form form_of(const Tensor& triangle, const Tensor& value) {
  const bool halves = triangle.scalar_type() == ScalarType::BFloat16,
             tiles = triangle.scalar_type() == ScalarType::Char;
  require(!halves || dots_run(), "a CPU with products of pairs of bfloat16 numbers");
  require(!tiles || tiles_run(), "a CPU with a tile unit");
  require(halves || tiles || triangle.scalar_type() == ScalarType::Float, "triangle of float32, bfloat16 or bytes");
  require(value.scalar_type() == (halves ? ScalarType::BFloat16 : ScalarType::Float),
          "query, key and value of bfloat16 beside a triangle of bfloat16, else of float32");
  return halves ? Form::halves : tiles ? Form::tiles : Form::floats;
}

bool fits(const Tensor& triangle, Form form, int64_t C) {
  const int64_t panels = (C + kRotatedPanel - 1) / kRotatedPanel;
  if (form == Form::halves) return has_size(triangle, {panels * (panels + 1) / 2, kRotatedTile});
#ifdef H2OT_AMX
  if (form == Form::tiles) {
    const int64_t above = amx::packed_tiles_size({nullptr, 1, C, C, nullptr, nullptr});
    return has_size(triangle, {above + panels * kRotatedPanel * int64_t(sizeof(float))});
  }
#endif
  return has_size(triangle, {panels * C - kRotatedPanel * panels * (panels - 1) / 2, kRotatedPanel});
}

Status run(const RecoverRotatedArgs& args, [[maybe_unused]] Form form) {
#ifdef H2OT_BF16_DOTS
  if (form == Form::halves) return run_rotated_halves(args, pool());
#endif
#ifdef H2OT_AMX
  if (form == Form::tiles) return amx::rotated_tiles(args, pool());
#endif
  return kernels().recover_rotated(args, pool());
}

Tensor recover_rotated(const Tensor& query, const Tensor& key, const Tensor& value, int64_t num_heads, double scale,
                       const Tensor& token, const Tensor& triangle, const Tensor& head, const Tensor& bias,
                       double eps) {
  require(key.dim() == 3 && key.size(1) > 0 && key.size(2) > 0, "key [R, K, C], with kept frames and channels");
  const int64_t R = key.size(0), C = key.size(2), F = query.dim() > 1 ? query.size(-2) : 0, M = bias.numel();
  require(has_size(value, {R, key.size(1), C}), "value, the shape of key");
  require(has_size(query, {F, C}) || has_size(query, {1, F, C}) || has_size(query, {R, F, C}),
          "query [F, C], [1, F, C] or [R, F, C]");
  require(num_heads > 0 && C % num_heads == 0, "num_heads that divide C");
  for (const Tensor* const x : {&query, &key}) {
    require(x->scalar_type() == value.scalar_type(), "query, key and value of one dtype");
  }
  const Form form = form_of(triangle, value);
  for (const Tensor* const x : {&token, &head, &bias}) {
    require(x->scalar_type() == ScalarType::Float, "token, head and bias of float32");
  }
  const int64_t width = (C + kRotatedPanel - 1) / kRotatedPanel * kRotatedPanel;
  require(has_size(token, {F, width}), "token [F, C rounded up to whole panels]");
  require(has_size(head, {M, width}) && has_size(bias, {M}), "head [M, C rounded up to whole panels] and bias [M]");
  require(fits(triangle, form, C), "triangle, a panel's channels after the other's");
  const RecoverInputs in(query, key, value, num_heads, scale, false);
  const Tensor tokens = dense(token), weights = dense(triangle), heads = dense(head), biases = dense(bias);
  const Tensor out = make(value, {R, F, M});
  const RecoverRotatedArgs args = {
      in.args, read<float>(tokens),   weights.const_data_ptr(), read<float>(heads), read<float>(biases), M,
      eps,     out.mutable_data_ptr()};
  if (out.numel() > 0) check(run(args, form), "recover_rotated");
  return out;
}

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) { m.impl("recover_rotated", TORCH_BOX(&h2ot::recover_rotated)); }
