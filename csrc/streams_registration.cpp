// The torch-facing file of two streams that are weighted. Only h2ot_kernels/streams.py calls it.
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <vector>

#include "stable.h"

namespace h2ot {
namespace {

void require(bool condition, const char* wanted) {
  if (!condition) throw std::invalid_argument(std::string("mix_streams: wanted ") + wanted);
}

Tensor mix_streams(const Tensor& first, const Tensor& second, const Tensor& weight, const MaybeTensor& bias) {
  const ScalarType dtype = first.scalar_type();
  require(first.dim() > 0 && first.dim() == second.dim() && second.scalar_type() == dtype &&
              std::equal(first.sizes().begin(), first.sizes().end(), second.sizes().begin()),
          "two streams of one shape and dtype");
  const int64_t C = first.size(-1);
  require(weight.dim() == 2 && weight.size(0) == 2 && weight.size(1) == 2 * C && weight.scalar_type() == dtype,
          "weight [2, 2 C] of the streams' dtype");
  require(!bias || (bias->dim() == 1 && bias->size(0) == 2 && bias->scalar_type() == dtype),
          "bias [2] of the streams' dtype");
  const Tensor dense_first = dense(first), dense_second = dense(second), dense_weight = dense(weight);
  const MaybeTensor dense_bias = dense(bias, dtype);
  const Tensor out = make(first, std::vector<int64_t>(first.sizes().begin(), first.sizes().end()));
  if (first.numel() == 0) return out;
  const StreamsArgs args = {
      dense_first.const_data_ptr(),  dense_second.const_data_ptr(), dtype_of(first),       first.numel() / C, C,
      dense_weight.const_data_ptr(), read<void>(dense_bias),        out.mutable_data_ptr()};
  check(kernels().mix_streams(args, pool()), "mix_streams");
  return out;
}

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) { m.impl("mix_streams", TORCH_BOX(&h2ot::mix_streams)); }
