// The torch-facing file of linear layers on the tile unit. Only h2ot_kernels/linear_tiles.py calls it, where
// tiles_run().
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <vector>

#include "stable.h"

namespace h2ot {
namespace {

constexpr int64_t kFewest = 32, kMost = 32768;  // channels: a tile has 64; sums of more do not fit

void require(bool condition, const char* wanted) {
  if (!condition) throw std::invalid_argument(std::string("h2ot_kernels.linear_tiles: wanted ") + wanted);
}
bool is_float(const Tensor& x) { return x.scalar_type() == ScalarType::Float; }
bool fits(const MaybeTensor& x, int64_t count) { return !x || (x->numel() == count && is_float(*x)); }

Tensor pack_tiles(const Tensor& weight, int64_t chunks) {
  require(tiles_run(), "a CPU with a tile unit");
  require(
      is_float(weight) && weight.dim() == 2 && chunks > 0 && weight.size(0) > 0 && weight.size(0) % chunks == 0 &&
          weight.size(1) >= kFewest && weight.size(1) <= kMost,
      "a float32 weight [out_features, in_features], out_features a multiple of chunks, in_features from 32 to 32768");
  const Tensor dense_weight = dense(weight);
  PackTilesArgs args = {read<float>(dense_weight), chunks, weight.size(0) / chunks, weight.size(1), nullptr};
  const Tensor packed = make(weight, {amx::packed_tiles_size(args)}, ScalarType::Char);
  args.packed = write<int8_t>(packed);
  amx::pack_tiles(args);
  return packed;
}

// A layer of out_features outputs for `rows` rows of C channels; what it reads is kept, dense, as long as it.
struct Layer {
  MaybeTensor bias, residual, norm_weight, norm_bias;
  LinearTilesArgs args;

  Layer(int64_t rows, int64_t C, const Tensor& packed, const MaybeTensor& any_bias, const MaybeTensor& any_residual,
        int64_t out_features, int64_t chunks, bool gelu) {
    const int64_t M = chunks > 0 ? out_features / chunks : 0;
    require(M > 0 && M * chunks == out_features && C >= kFewest && C <= kMost &&
                packed.scalar_type() == ScalarType::Char && packed.is_contiguous() &&
                packed.numel() == amx::packed_tiles_size({nullptr, chunks, M, C, nullptr}),
            "what pack_tiles made of a weight of these sizes");
    require(fits(any_bias, out_features), "a bias [out_features] of float32");
    require(fits(any_residual, rows * out_features), "a residual of the result's shape, of float32");
    bias = dense(any_bias, ScalarType::Float);
    residual = dense(any_residual, ScalarType::Float);
    args = {nullptr,
            rows,
            chunks,
            M,
            C,
            read<int8_t>(packed),
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
    args.eps = float(eps);
  }
};

// x's rows, and room for results of M channels, of each chunk.
Tensor rows_of(const Tensor& x) {
  require(tiles_run(), "a CPU with a tile unit");
  require(is_float(x) && x.dim() > 0 && x.numel() > 0, "float32 tokens, some");
  return dense(x);
}
Tensor results_of(const Tensor& x, int64_t chunks, int64_t M) {
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = M;
  if (chunks > 1) size.insert(size.begin(), chunks);
  return make(x, size);
}

Tensor linear_tiles(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, const MaybeTensor& residual,
                    int64_t out_features, int64_t chunks, bool gelu, const MaybeTensor& norm_weight,
                    const MaybeTensor& norm_bias, double eps) {
  const Tensor tokens = rows_of(x);
  const int64_t C = x.size(-1);
  Layer layer(x.numel() / C, C, packed, bias, residual, out_features, chunks, gelu);
  layer.norm_first(norm_weight, norm_bias, eps);
  const Tensor out = results_of(x, chunks, layer.args.M);
  layer.args.x = read<float>(tokens);
  layer.args.out = write<float>(out);
  check(amx::linear_tiles(layer.args, pool()), "linear_tiles");
  return out;
}

Tensor mlp_tiles(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, int64_t hidden_features,
                 const Tensor& second_packed, const MaybeTensor& second_bias, const MaybeTensor& residual,
                 int64_t out_features, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps) {
  const Tensor tokens = rows_of(x);
  const int64_t C = x.size(-1), rows = x.numel() / C;
  Layer first(rows, C, packed, bias, std::nullopt, hidden_features, 1, true);
  first.norm_first(norm_weight, norm_bias, eps);
  Layer second(rows, hidden_features, second_packed, second_bias, residual, out_features, 1, false);
  const Tensor out = results_of(x, 1, out_features);
  first.args.x = read<float>(tokens);
  second.args.out = write<float>(out);
  check(amx::mlp_tiles({first.args, second.args}, pool()), "mlp_tiles");
  return out;
}

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) {
  m.impl("pack_tiles", TORCH_BOX(&h2ot::pack_tiles));
  m.impl("linear_tiles", TORCH_BOX(&h2ot::linear_tiles));
  m.impl("mlp_tiles", TORCH_BOX(&h2ot::mlp_tiles));
}
