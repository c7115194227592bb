// The torch-facing file of linear layers in bfloat16. Only h2ot_kernels/linear_halves.py calls it, where dots_run().
#include <torch/csrc/stable/library.h>

#include "layers.h"

namespace h2ot {
namespace {

constexpr Require require = {"linear_halves"};
bool is_half(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }
bool is_mixed(const Tensor& x) { return is_half(x) || is_float(x); }
bool fits(const MaybeTensor& x, int64_t count) { return !x || (x->numel() == count && is_mixed(*x)); }

constexpr int64_t kMostFeatures = int64_t(1) << 28;  // on either side: the size below stays in 64 bits
int64_t packed_size(int64_t chunks, int64_t M, int64_t C) {
  return chunks * ((M + kLinearPanel - 1) / kLinearPanel) * kLinearPanel * ((C + 31) / 32 * 32);
}

// A layer of out_features outputs for `rows` rows of C channels; what it reads is kept, dense, as long as it.
struct Layer {
  MaybeTensor bias, residual, norm_weight, norm_bias;
  LinearHalvesArgs args;
  ScalarType results;

  Layer(int64_t rows, int64_t C, const Tensor& packed, const MaybeTensor& any_bias, const MaybeTensor& any_residual,
        int64_t out_features, int64_t chunks, bool gelu) {
    const int64_t M = chunks > 0 ? out_features / chunks : 0;
    require(M > 0 && M * chunks == out_features && out_features <= kMostFeatures && C <= kMostFeatures &&
                is_half(packed) && packed.is_contiguous() && packed.numel() == packed_size(chunks, M, C),
            "what `pack` makes of a weight of these sizes");
    require(fits(any_bias, out_features), "a bias [out_features]");
    require(fits(any_residual, rows * out_features), "a residual of the result's shape, of bfloat16 or float32");
    results = any_residual ? any_residual->scalar_type() : ScalarType::BFloat16;
    bias = dense(any_bias, ScalarType::Float);
    residual = dense(any_residual, results);
    args = {};
    args.packed = static_cast<const uint16_t*>(packed.const_data_ptr());
    args.rows = rows;
    args.chunks = chunks;
    args.M = M;
    args.C = C;
    args.bias = read<float>(bias);
    args.residual = read<void>(residual);
    args.activation = gelu ? Activation::gelu : Activation::none;
    args.x_dtype = Dtype::bf16;
    args.out_dtype = results == ScalarType::Float ? Dtype::f32 : Dtype::bf16;
  }
  // The results of one chunk, and what is added to them, in rows that may stand apart.
  void into(const Tensor& out, const MaybeTensor& any_residual) {
    results = any_residual ? any_residual->scalar_type() : ScalarType::BFloat16;
    require(fits(any_residual, args.rows * args.M) && args.chunks == 1 &&
                takes_results(out, any_residual, args.rows, args.M, results),
            kOutWanted);
    residual = any_residual;
    args.residual = read<void>(residual);
    args.out = out.mutable_data_ptr();
    args.out_dtype = results == ScalarType::Float ? Dtype::f32 : Dtype::bf16;
    args.apart.out = rows_apart(out);
  }
  void take(const Tensor& tokens) {
    args.x = tokens.const_data_ptr();
    args.x_dtype = dtype_of(tokens);
  }
  void norm_first(const MaybeTensor& weight, const MaybeTensor& any_bias, double eps) {
    require(fits(weight, args.C) && fits(any_bias, args.C), "a norm's weight and bias [in_features]");
    const ScalarType dtype = weight ? weight->scalar_type() : any_bias ? any_bias->scalar_type() : ScalarType::Float;
    require(!any_bias || any_bias->scalar_type() == dtype, "a norm's weight and bias of one dtype");
    norm_weight = dense(weight, dtype);
    norm_bias = dense(any_bias, dtype);
    args.has_norm = eps >= 0;
    args.norm_weight = read<void>(norm_weight);
    args.norm_bias = read<void>(norm_bias);
    args.norm_dtype = dtype == ScalarType::Float ? Dtype::f32 : Dtype::bf16;
    args.eps = eps;
  }
};

struct ByDots {
  typedef h2ot::Layer Layer;
  static constexpr const char *kLinear = "linear_halves", *kMlp = "mlp_halves";

  static Tensor rows_of(const Tensor& x, double) {
    require(dots_run(), "a CPU with products of pairs of bfloat16 numbers");
    require(is_mixed(x) && x.dim() > 0 && x.numel() > 0 && x.size(-1) >= kFewestChannels,
            "tokens of bfloat16 or float32, some, of 16 channels or more");
    return readable_rows(x);
  }
  static Status linear(const LinearHalvesArgs& args) { return run_linear_halves(args, pool()); }
  static Status mlp(const MlpHalvesArgs& args) { return run_mlp_halves(args, pool()); }
};

typedef OperatorsOf<ByDots> Layers;
typedef LayerOperators<&Layers::linear> Operators;

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) {
  m.impl("linear_halves", TORCH_BOX(&h2ot::Operators::linear));
  m.impl("mlp_halves", TORCH_BOX(&h2ot::Layers::mlp));
  m.impl("attend_halves", TORCH_BOX(&h2ot::Operators::attend));
  m.impl("linear_halves_out", TORCH_BOX(&h2ot::Operators::linear_out));
  m.impl("attend_halves_out", TORCH_BOX(&h2ot::Operators::attend_out));
}
