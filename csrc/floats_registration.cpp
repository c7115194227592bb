// The torch-facing file of linear layers in float32 by vectors. Only h2ot_kernels/linear_floats.py calls it.
#include <torch/csrc/stable/library.h>

#include "layers.h"

namespace h2ot {
namespace {

constexpr Require require = {"linear_floats"};

int64_t packed_size(int64_t chunks, int64_t M, int64_t C) {
  return chunks * ((M + kFloatsPanel - 1) / kFloatsPanel) * kFloatsPanel * C;
}

// A layer whose weights are packed.
struct Layer : FloatLayer<LinearFloatsArgs> {
  Layer(int64_t rows, int64_t C, const Tensor& packed, const MaybeTensor& any_bias, const MaybeTensor& any_residual,
        int64_t out_features, int64_t chunks, bool gelu)
      : FloatLayer(require, rows, C, any_bias, any_residual, out_features, whole(C, packed, out_features, chunks),
                   gelu) {
    args.packed = read<float>(packed);
  }
  // chunks, where the weights are those of such a layer.
  static int64_t whole(int64_t C, const Tensor& packed, int64_t out_features, int64_t chunks) {
    const int64_t M = chunks > 0 ? out_features / chunks : 0;
    require(M > 0 && M * chunks == out_features && is_float(packed) && packed.is_contiguous() &&
                packed.numel() == packed_size(chunks, M, C),
            "what `pack` makes of a weight of these sizes");
    return chunks;
  }
};

// x, whose rows are equally far apart.
Tensor rows_of(const Tensor& x, double eps) {
  require(is_float(x) && x.dim() > 0 && x.numel() > 0 && (eps < 0 || x.size(-1) >= kFewestChannels),
          "tokens of float32, some, with a norm of 16 channels or more");
  return readable_rows(x);
}

// Into `given` where there is one.
Tensor linear(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, const MaybeTensor& residual,
              int64_t out_features, int64_t chunks, bool gelu, const MaybeTensor& norm_weight,
              const MaybeTensor& norm_bias, double eps, const MaybeTensor& given) {
  const Tensor tokens = rows_of(x, eps);
  const int64_t C = x.size(-1);
  Layer layer(x.numel() / C, C, packed, bias, given ? std::nullopt : residual, out_features, chunks, gelu);
  layer.args.x = read<float>(tokens);
  layer.args.apart.x = rows_apart(tokens);
  layer.norm_first(norm_weight, norm_bias, eps);
  const Tensor out = given ? *given : results_of(x, chunks, layer.args.M, ScalarType::Float);
  if (given) {
    layer.into(out, residual);
  } else {
    layer.args.out = write<float>(out);
  }
  check(kernels().linear_floats(layer.args, pool()), "linear_floats");
  return out;
}

Tensor mlp_floats(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, int64_t hidden_features,
                  const Tensor& second_packed, const MaybeTensor& second_bias, const MaybeTensor& residual,
                  int64_t out_features, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps) {
  const Tensor tokens = rows_of(x, eps);
  const int64_t C = x.size(-1), rows = x.numel() / C;
  Layer first(rows, C, packed, bias, std::nullopt, hidden_features, 1, true);
  first.norm_first(norm_weight, norm_bias, eps);
  Layer second(rows, hidden_features, second_packed, second_bias, residual, out_features, 1, false);
  const Tensor out = results_of(x, 1, out_features, ScalarType::Float);
  first.args.x = read<float>(tokens);
  first.args.apart.x = rows_apart(tokens);
  second.args.out = write<float>(out);
  check(kernels().mlp_floats({first.args, second.args}, pool()), "mlp_floats");
  return out;
}

typedef LayerOperators<&linear> Operators;

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) {
  m.impl("linear_floats", TORCH_BOX(&h2ot::Operators::linear));
  m.impl("mlp_floats", TORCH_BOX(&h2ot::mlp_floats));
  m.impl("attend_floats", TORCH_BOX(&h2ot::Operators::attend));
  m.impl("linear_floats_out", TORCH_BOX(&h2ot::Operators::linear_out));
  m.impl("attend_floats_out", TORCH_BOX(&h2ot::Operators::attend_out));
}
