// The torch-facing file of linear layers on the tile unit. Only h2ot_kernels/linear.py calls them, where tiles_run().
#include <torch/csrc/stable/library.h>

#include <vector>

#include "stable.h"

namespace h2ot {
namespace {

Tensor pack_linear(const Tensor& weight, int64_t chunks) {
  const Tensor dense_weight = dense(weight);
  PackArgs args = {read<float>(dense_weight), chunks, weight.size(0) / chunks, weight.size(1), nullptr};
  const Tensor packed = make(weight, {amx::packed_size(args)}, ScalarType::BFloat16);
  args.packed = write<uint16_t>(packed);
  amx::pack(args);
  return packed;
}

Tensor linear(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, const MaybeTensor& residual,
              int64_t out_features, int64_t chunks, bool gelu) {
  const Tensor dense_x = dense(x);
  const MaybeTensor dense_bias = dense(bias, ScalarType::Float), added = dense(residual, ScalarType::Float);
  const int64_t C = x.size(-1), M = out_features / chunks;
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = M;
  if (chunks > 1) size.insert(size.begin(), chunks);
  const Tensor out = make(x, size);
  const LinearArgs args = {read<float>(dense_x),
                           x.numel() / C,
                           chunks,
                           M,
                           C,
                           read<uint16_t>(packed),
                           read<float>(dense_bias),
                           read<float>(added),
                           gelu ? Activation::gelu : Activation::none,
                           write<float>(out)};
  check(amx::linear(args, pool()), "linear");
  return out;
}

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&h2ot::pack_linear));
  m.impl("linear", TORCH_BOX(&h2ot::linear));
}
