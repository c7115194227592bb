// The torch-facing file of linear layers on the tile unit. Only h2ot_kernels/linear_tiles.py calls it, where
// tiles_run().
#include <torch/csrc/stable/library.h>

#include "layers.h"

namespace h2ot {
namespace {

constexpr Require require = {"linear_tiles"};
constexpr int64_t kFewest = 32, kMost = 32768;  // channels: a tile has 64; sums of more do not fit

Tensor pack_tiles(const Tensor& weight, int64_t chunks, const MaybeTensor& channels) {
  require(tiles_run(), "a CPU with a tile unit");
  require(
      is_float(weight) && weight.dim() == 2 && chunks > 0 && weight.size(0) > 0 && weight.size(0) % chunks == 0 &&
          weight.size(1) >= kFewest && weight.size(1) <= kMost,
      "a float32 weight [out_features, in_features], out_features a multiple of chunks, in_features from 32 to 32768");
  const int64_t C = weight.size(1);
  require(!channels || (is_float(*channels) && channels->dim() == 1 && channels->size(0) == C),
          "scales of the channels of float32 [in_features]");
  const Tensor dense_weight = dense(weight), scales = channels ? dense(*channels) : dense_weight;
  PackTilesArgs args = {
      read<float>(dense_weight), chunks, weight.size(0) / chunks, C, channels ? read<float>(scales) : nullptr, nullptr};
  const Tensor packed = make(weight, {amx::packed_tiles_size(args)}, ScalarType::Char);
  args.packed = write<int8_t>(packed);
  amx::pack_tiles(args);
  return packed;
}

// A layer whose weights are packed.
struct Layer : FloatLayer<LinearTilesArgs> {
  Layer(int64_t rows, int64_t C, const Tensor& packed, const MaybeTensor& any_bias, const MaybeTensor& any_residual,
        int64_t out_features, int64_t chunks, bool gelu)
      : FloatLayer(require, rows, C, any_bias, any_residual, out_features, whole(C, packed, out_features, chunks),
                   gelu) {
    args.packed = read<int8_t>(packed);
  }
  // chunks, where the weights are those of such a layer.
  static int64_t whole(int64_t C, const Tensor& packed, int64_t out_features, int64_t chunks) {
    const int64_t M = chunks > 0 ? out_features / chunks : 0;
    require(M > 0 && M * chunks == out_features && C >= kFewest && C <= kMost &&
                packed.scalar_type() == ScalarType::Char && packed.is_contiguous() &&
                packed.numel() == amx::packed_tiles_size({nullptr, chunks, M, C, nullptr, nullptr}),
            "what pack_tiles made of a weight of these sizes");
    return chunks;
  }
};

struct ByTiles {
  typedef h2ot::Layer Layer;
  static constexpr const char *kLinear = "linear_tiles", *kMlp = "mlp_tiles";

  static Tensor rows_of(const Tensor& x, double) {
    require(tiles_run(), "a CPU with a tile unit");
    require(is_float(x) && x.dim() > 0 && x.numel() > 0, "float32 tokens, some");
    return readable_rows(x);
  }
  static Status linear(const LinearTilesArgs& args) { return amx::linear_tiles(args, pool()); }
  static Status mlp(const MlpTilesArgs& args) { return amx::mlp_tiles(args, pool()); }
};

typedef OperatorsOf<ByTiles> Layers;
typedef LayerOperators<&Layers::linear> Operators;

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) {
  m.impl("pack_tiles", TORCH_BOX(&h2ot::pack_tiles));
  m.impl("linear_tiles", TORCH_BOX(&h2ot::Operators::linear));
  m.impl("mlp_tiles", TORCH_BOX(&h2ot::Layers::mlp));
  m.impl("attend_tiles", TORCH_BOX(&h2ot::Operators::attend));
  m.impl("linear_tiles_out", TORCH_BOX(&h2ot::Operators::linear_out));
  m.impl("attend_tiles_out", TORCH_BOX(&h2ot::Operators::attend_out));
}
