// The torch-facing file of residual and LayerNorm in one pass. Only h2ot_kernels/add_norm.py calls it.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "launch_cpu.h"
#include "require.h"

namespace h2ot {
namespace {

constexpr Require require = {"add_norm"};

// [rows, C] whose channels are adjacent.
Tensor rows_of(const Tensor& x) {
  const bool adjacent = x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1) && x.stride(0) >= 0;
  return adjacent ? x : dense(x);
}
int64_t stride_of(const Tensor& rows) { return rows.dim() == 2 ? rows.stride(0) : rows.size(-1); }

std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const MaybeTensor& y, const MaybeTensor& weight,
                                    const MaybeTensor& bias, double eps, ScalarType dtype) {
  const ScalarType own = x.scalar_type();
  const bool is_float = own == ScalarType::Float;
  const auto is_mixed = [&](ScalarType other) {
    return other == own || (is_float && (other == ScalarType::BFloat16 || other == ScalarType::Half));
  };
  require(x.dim() > 0 && x.size(-1) > 0, "tokens with channels");
  require(is_mixed(dtype) && (!y || is_mixed(y->scalar_type())),
          "y and dtype of x's dtype, or of 16 bits beside float32");
  require(!y || same_size(x, *y), "y of x's shape");
  const int64_t C = x.size(-1);
  const ScalarType weights = weight ? weight->scalar_type() : bias ? bias->scalar_type() : own;
  for (const MaybeTensor* const vector : {&weight, &bias}) {
    if (!*vector) continue;
    const ScalarType given = (*vector)->scalar_type();
    require(has_size(**vector, {C}), "weight and bias [C]");
    require(given == weights && (given == own || (given == ScalarType::Float && own != ScalarType::Double)),
            "weight and bias of one dtype: x's, or float32");
  }
  const MaybeTensor dense_weight = dense(weight, weights), dense_bias = dense(bias, weights);
  const Tensor rows = rows_of(x);
  const MaybeTensor added = y ? MaybeTensor(rows_of(*y)) : std::nullopt;
  const std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  const Tensor sum = y ? make(x, size) : make(x, {0}), out = make(x, size, dtype);
  const AddNormArgs args = {rows.const_data_ptr(),
                            read<void>(added),
                            dtype_of(x),
                            y ? dtype_of(*y) : dtype_of(x),
                            dtype_of(out),
                            x.numel() / C,
                            C,
                            stride_of(rows),
                            added ? stride_of(*added) : 0,
                            read<void>(dense_weight),
                            read<void>(dense_bias),
                            dense_weight ? dtype_of(*dense_weight)
                            : dense_bias ? dtype_of(*dense_bias)
                                         : dtype_of(x),
                            eps,
                            sum.mutable_data_ptr(),
                            out.mutable_data_ptr()};
  if (x.numel() > 0) check(kernels().add_norm(args, pool()), "add_norm");
  return {sum, out};
}

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) { m.impl("add_norm", TORCH_BOX(&h2ot::add_norm)); }
