// The torch-facing file of the recovery tail in rotated channels. Only h2ot_kernels/recover_rotated.py calls it.
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "stable.h"

namespace h2ot {
namespace {

void require(bool condition, const char* wanted) {
  if (!condition) throw std::invalid_argument(std::string("recover_rotated: wanted ") + wanted);
}
bool has_size(const Tensor& x, const std::vector<int64_t>& size) {
  return std::equal(x.sizes().begin(), x.sizes().end(), size.begin(), size.end());
}

Status run(const RecoverRotatedArgs& args, [[maybe_unused]] bool halves) {
#ifdef H2OT_BF16_DOTS
  if (halves) return bf16_dots::recover_rotated(args, pool());
#endif
  return kernels().recover_rotated(args, pool());
}

Tensor recover_rotated(const Tensor& token, const Tensor& attended, const Tensor& triangle, const Tensor& head,
                       const Tensor& bias, double eps) {
  const bool halves = attended.scalar_type() == ScalarType::BFloat16;
  require(!halves || dots_run(), "a CPU with products of pairs of bfloat16 numbers");
  for (const Tensor* const x : {&attended, &triangle}) {
    require(x->scalar_type() == (halves ? ScalarType::BFloat16 : ScalarType::Float),
            "attended and triangle both of float32 or both of bfloat16");
  }
  for (const Tensor* const x : {&token, &head, &bias}) {
    require(x->scalar_type() == ScalarType::Float, "token, head and bias of float32");
  }
  require(attended.dim() == 3 && attended.size(2) > 0, "attended [R, F, C], with channels");
  const int64_t R = attended.size(0), F = attended.size(1), C = attended.size(2), M = bias.numel();
  const int64_t panels = (C + kRotatedPanel - 1) / kRotatedPanel, width = panels * kRotatedPanel;
  require(has_size(token, {F, width}), "token [F, C rounded up to whole panels]");
  require(has_size(head, {M, width}) && has_size(bias, {M}), "head [M, C rounded up to whole panels] and bias [M]");
  const int64_t depths = panels * C - kRotatedPanel * panels * (panels - 1) / 2;
  const bool fits = halves ? has_size(triangle, {panels * (panels + 1) / 2, kRotatedTile})
                           : has_size(triangle, {depths, kRotatedPanel});
  require(fits, "triangle, a panel's channels after the other's");
  const Tensor tokens = dense(token), rows = dense(attended), weights = dense(triangle), heads = dense(head);
  const Tensor biases = dense(bias), out = make(attended, {R, F, M});
  const RecoverRotatedArgs args = {read<float>(tokens),
                                   rows.const_data_ptr(),
                                   weights.const_data_ptr(),
                                   read<float>(heads),
                                   read<float>(biases),
                                   R,
                                   F,
                                   C,
                                   M,
                                   eps,
                                   out.mutable_data_ptr()};
  if (out.numel() > 0) check(run(args, halves), "recover_rotated");
  return out;
}

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) { m.impl("recover_rotated", TORCH_BOX(&h2ot::recover_rotated)); }
