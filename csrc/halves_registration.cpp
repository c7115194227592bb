// The torch-facing file of linear layers in bfloat16. Only h2ot_kernels/linear_halves.py calls it, where dots_run().
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "stable.h"

namespace h2ot {
namespace {

void require(bool condition, const char* wanted) {
  if (!condition) throw std::invalid_argument(std::string("linear_halves: wanted ") + wanted);
}
bool is_half(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }
bool is_mixed(const Tensor& x) { return is_half(x) || x.scalar_type() == ScalarType::Float; }
bool fits(const MaybeTensor& x, int64_t count) { return !x || (x->numel() == count && is_mixed(*x)); }

int64_t packed_size(int64_t chunks, int64_t M, int64_t C) {
  return chunks * ((M + kLinearPanel - 1) / kLinearPanel) * kLinearPanel * ((C + 31) / 32 * 32);
}

Tensor linear_halves(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, const MaybeTensor& residual,
                     int64_t out_features, int64_t chunks, bool gelu, const MaybeTensor& norm_weight,
                     const MaybeTensor& norm_bias, double eps) {
  require(dots_run(), "a CPU with products of pairs of bfloat16 numbers");
  require(is_mixed(x) && x.dim() > 0 && x.numel() > 0 && x.size(-1) >= kFewestChannels,
          "tokens of bfloat16 or float32, some, of 16 channels or more");
  const int64_t C = x.size(-1), M = chunks > 0 ? out_features / chunks : 0, rows = x.numel() / C;
  require(M > 0 && M * chunks == out_features && is_half(packed) && packed.is_contiguous() &&
              packed.numel() == packed_size(chunks, M, C),
          "what `pack` makes of a weight of these sizes");
  require(fits(bias, out_features), "a bias [out_features]");
  require(fits(residual, rows * out_features), "a residual of the result's shape, of bfloat16 or float32");
  require(fits(norm_weight, C) && fits(norm_bias, C), "a norm's weight and bias [in_features]");
  const ScalarType vectors = norm_weight ? norm_weight->scalar_type()
                             : norm_bias ? norm_bias->scalar_type()
                                         : ScalarType::Float;
  require(!norm_bias || norm_bias->scalar_type() == vectors, "a norm's weight and bias of one dtype");
  const ScalarType results = residual ? residual->scalar_type() : ScalarType::BFloat16;
  const Tensor tokens = dense(x);
  const MaybeTensor biases = dense(bias, ScalarType::Float), added = dense(residual, results);
  const MaybeTensor scale = dense(norm_weight, vectors), shift = dense(norm_bias, vectors);
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = M;
  if (chunks > 1) size.insert(size.begin(), chunks);
  const Tensor out = make(x, size, results);
  const LinearHalvesArgs args = {tokens.const_data_ptr(),
                                 dtype_of(tokens),
                                 static_cast<const uint16_t*>(packed.const_data_ptr()),
                                 rows,
                                 chunks,
                                 M,
                                 C,
                                 read<float>(biases),
                                 read<void>(added),
                                 gelu ? Activation::gelu : Activation::none,
                                 out.mutable_data_ptr(),
                                 dtype_of(out),
                                 eps >= 0,
                                 read<void>(scale),
                                 read<void>(shift),
                                 vectors == ScalarType::Float ? Dtype::f32 : Dtype::bf16,
                                 eps};
  check(bf16_dots::linear_halves(args, pool()), "linear_halves");
  return out;
}

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) { m.impl("linear_halves", TORCH_BOX(&h2ot::linear_halves)); }
