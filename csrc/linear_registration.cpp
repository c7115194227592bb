// The torch-facing file of linear layers on the tile unit. Only h2ot_kernels/linear.py calls them, where tiles_run().
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <vector>

#include "stable.h"

namespace h2ot {
namespace {

void require(bool condition, const char* wanted) {
  if (!condition) throw std::invalid_argument(std::string("h2ot_kernels.linear: wanted ") + wanted);
}
bool is_float(const Tensor& x) { return x.scalar_type() == ScalarType::Float; }

Tensor pack_linear(const Tensor& weight, int64_t chunks) {
  require(tiles_run(), "a CPU with a tile unit");
  require(
      is_float(weight) && weight.dim() == 2 && chunks > 0 && weight.size(0) % chunks == 0 && weight.size(1) >= 32 &&
          weight.size(1) <= 32768,
      "a float32 weight [out_features, in_features], out_features a multiple of chunks, in_features from 32 to 32768");
  const Tensor dense_weight = dense(weight);
  PackArgs args = {read<float>(dense_weight), chunks, weight.size(0) / chunks, weight.size(1), nullptr};
  const Tensor packed = make(weight, {amx::packed_size(args)}, ScalarType::Char);
  args.packed = write<int8_t>(packed);
  amx::pack(args);
  return packed;
}

Tensor linear(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, const MaybeTensor& residual,
              int64_t out_features, int64_t chunks, bool gelu, const MaybeTensor& norm_weight,
              const MaybeTensor& norm_bias, double eps) {
  require(tiles_run(), "a CPU with a tile unit");
  require(is_float(x) && x.numel() > 0, "float32 tokens, some");
  const int64_t C = x.size(-1), M = chunks > 0 ? out_features / chunks : 0, rows = x.numel() / C;
  require(M > 0 && M * chunks == out_features && packed.scalar_type() == ScalarType::Char && packed.is_contiguous() &&
              packed.numel() == amx::packed_size({nullptr, chunks, M, C, nullptr}),
          "what pack_linear made of a weight of these sizes");
  require(!bias || bias->numel() == out_features, "a bias [out_features]");
  require(!residual || residual->numel() == rows * out_features, "a residual of the result's shape");
  require(!norm_weight || norm_weight->numel() == C, "a norm's weight [in_features]");
  require(!norm_bias || norm_bias->numel() == C, "a norm's bias [in_features]");
  const Tensor dense_x = dense(x);
  const MaybeTensor weight = dense(norm_weight, ScalarType::Float), shift = dense(norm_bias, ScalarType::Float);
  const MaybeTensor dense_bias = dense(bias, ScalarType::Float), added = dense(residual, ScalarType::Float);
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = M;
  if (chunks > 1) size.insert(size.begin(), chunks);
  const Tensor out = make(x, size);
  const LinearArgs args = {read<float>(dense_x),
                           rows,
                           chunks,
                           M,
                           C,
                           read<int8_t>(packed),
                           read<float>(dense_bias),
                           read<float>(added),
                           gelu ? Activation::gelu : Activation::none,
                           write<float>(out),
                           eps >= 0,
                           read<float>(weight),
                           read<float>(shift),
                           float(eps)};
  check(amx::linear(args, pool()), "linear");
  return out;
}

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&h2ot::pack_linear));
  m.impl("linear", TORCH_BOX(&h2ot::linear));
}
