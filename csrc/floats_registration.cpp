// The torch-facing file of linear layers in float32 by vectors. Only h2ot_kernels/linear_floats.py calls it.
#include <torch/csrc/stable/library.h>

#include "layers.h"

namespace h2ot {
namespace {

constexpr Require require = {"linear_floats"};

bool is_packed(const Tensor& packed, int64_t chunks, int64_t M, int64_t C) {
  const int64_t panel = kernels().floats_panel;
  return is_float(packed) && packed.is_contiguous() && packed.dim() == 4 && packed.size(0) == chunks &&
         packed.size(1) == (M + panel - 1) / panel && packed.size(2) == C && packed.size(3) == panel;
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
    require(M > 0 && M * chunks == out_features && is_packed(packed, chunks, M, C),
            "what `pack` makes of a weight of these sizes, for the instruction set in use");
    return chunks;
  }
};

struct ByVectors {
  typedef h2ot::Layer Layer;
  static constexpr const char *kLinear = "linear_floats", *kMlp = "mlp_floats";

  static Tensor rows_of(const Tensor& x, double eps) {
    require(is_float(x) && x.dim() > 0 && x.numel() > 0 && (eps < 0 || x.size(-1) >= kFewestChannels),
            "tokens of float32, some, with a norm of 16 channels or more");
    return readable_rows(x);
  }
  static Status linear(const LinearFloatsArgs& args) { return kernels().linear_floats(args, pool()); }
  static Status mlp(const MlpFloatsArgs& args) { return kernels().mlp_floats(args, pool()); }
};

typedef OperatorsOf<ByVectors> Layers;
typedef LayerOperators<&Layers::linear> Operators;

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) {
  m.impl("linear_floats", TORCH_BOX(&h2ot::Operators::linear));
  m.impl("mlp_floats", TORCH_BOX(&h2ot::Layers::mlp));
  m.impl("attend_floats", TORCH_BOX(&h2ot::Operators::attend));
  m.impl("linear_floats_out", TORCH_BOX(&h2ot::Operators::linear_out));
  m.impl("attend_floats_out", TORCH_BOX(&h2ot::Operators::attend_out));
}
