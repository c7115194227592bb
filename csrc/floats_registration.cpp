// The torch-facing file of linear layers in float32 by vectors. Only h2ot_kernels/linear_floats.py calls it.
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "stable.h"

namespace h2ot {
namespace {

void require(bool condition, const char* wanted) {
  if (!condition) throw std::invalid_argument(std::string("h2ot_kernels.linear_floats: wanted ") + wanted);
}
bool is_float(const Tensor& x) { return x.scalar_type() == ScalarType::Float; }
bool fits(const MaybeTensor& x, int64_t count) { return !x || (x->numel() == count && is_float(*x)); }

int64_t packed_size(int64_t chunks, int64_t M, int64_t C) {
  return chunks * ((M + kFloatsPanel - 1) / kFloatsPanel) * kFloatsPanel * C;
}

// A layer of out_features outputs for `rows` rows of C channels; what it reads is kept, dense, as long as it.
struct Layer {
  MaybeTensor bias, residual, norm_weight, norm_bias;
  LinearFloatsArgs args;

  Layer(int64_t rows, int64_t C, const Tensor& packed, const MaybeTensor& any_bias, const MaybeTensor& any_residual,
        int64_t out_features, int64_t chunks, bool gelu) {
    const int64_t M = chunks > 0 ? out_features / chunks : 0;
    require(M > 0 && M * chunks == out_features && is_float(packed) && packed.is_contiguous() &&
                packed.numel() == packed_size(chunks, M, C),
            "what `pack` makes of a weight of these sizes");
    require(fits(any_bias, out_features), "a bias [out_features] of float32");
    require(fits(any_residual, rows * out_features), "a residual of the result's shape, of float32");
    bias = dense(any_bias, ScalarType::Float);
    residual = dense(any_residual, ScalarType::Float);
    args = {nullptr,
            read<float>(packed),
            rows,
            chunks,
            M,
            C,
            read<float>(bias),
            read<float>(residual),
            gelu ? Activation::gelu : Activation::none,
            nullptr,
            false,
            nullptr,
            nullptr,
            0};
  }
  void norm_first(const MaybeTensor& weight, const MaybeTensor& any_bias, double eps) {
    require(fits(weight, args.C) && fits(any_bias, args.C), "a norm's weight and bias [in_features] of float32");
    norm_weight = dense(weight, ScalarType::Float);
    norm_bias = dense(any_bias, ScalarType::Float);
    args.has_norm = eps >= 0;
    args.norm_weight = read<float>(norm_weight);
    args.norm_bias = read<float>(norm_bias);
    args.eps = eps;
  }
};

// x's rows, and room for results of M channels, of each chunk.
Tensor tokens_of_rows(const Tensor& x, double eps) {
  require(is_float(x) && x.dim() > 0 && x.numel() > 0 && (eps < 0 || x.size(-1) >= kFewestChannels),
          "tokens of float32, some, with a norm of 16 channels or more");
  return dense(x);
}
Tensor results(const Tensor& x, int64_t chunks, int64_t M) {
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = M;
  if (chunks > 1) size.insert(size.begin(), chunks);
  return make(x, size);
}

Tensor linear_floats(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, const MaybeTensor& residual,
                     int64_t out_features, int64_t chunks, bool gelu, const MaybeTensor& norm_weight,
                     const MaybeTensor& norm_bias, double eps) {
  const Tensor tokens = tokens_of_rows(x, eps);
  const int64_t C = x.size(-1);
  Layer layer(x.numel() / C, C, packed, bias, residual, out_features, chunks, gelu);
  layer.norm_first(norm_weight, norm_bias, eps);
  const Tensor out = results(x, chunks, layer.args.M);
  layer.args.x = read<float>(tokens);
  layer.args.out = static_cast<float*>(out.mutable_data_ptr());
  check(kernels().linear_floats(layer.args, pool()), "linear_floats");
  return out;
}

Tensor mlp_floats(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, int64_t hidden_features,
                  const Tensor& second_packed, const MaybeTensor& second_bias, const MaybeTensor& residual,
                  int64_t out_features, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps) {
  const Tensor tokens = tokens_of_rows(x, eps);
  const int64_t C = x.size(-1), rows = x.numel() / C;
  Layer first(rows, C, packed, bias, std::nullopt, hidden_features, 1, true);
  first.norm_first(norm_weight, norm_bias, eps);
  Layer second(rows, hidden_features, second_packed, second_bias, residual, out_features, 1, false);
  const Tensor out = results(x, 1, out_features);
  first.args.x = read<float>(tokens);
  second.args.out = static_cast<float*>(out.mutable_data_ptr());
  check(kernels().mlp_floats({first.args, second.args}, pool()), "mlp_floats");
  return out;
}

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) {
  m.impl("linear_floats", TORCH_BOX(&h2ot::linear_floats));
  m.impl("mlp_floats", TORCH_BOX(&h2ot::mlp_floats));
}
