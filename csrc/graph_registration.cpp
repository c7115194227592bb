// The torch-facing file of a graph's layer. Only h2ot_kernels/graph.py calls it.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "launch_cpu.h"
#include "require.h"

namespace h2ot {
namespace {

constexpr Require require = {"graph_update"};

Tensor graph_update(const Tensor& x, const Tensor& u, const Tensor& v, const Tensor& residual, const Tensor& scale,
                    const MaybeTensor& adjacency, int64_t neighbours, const MaybeTensor& norm_weight,
                    const MaybeTensor& norm_bias, const Tensor& mean, const Tensor& variance, double eps, int64_t dim) {
  require(dim >= 0 && dim < x.dim() - 1, "dim to be an axis before the channels");
  require(same_size(x, u) && same_size(x, v) && same_size(x, residual), "u, v and residual of x's shape");
  const int64_t T = x.size(dim), C = x.size(-1);
  const auto is_vector = [&](const Tensor& vector, int64_t length) {
    return has_size(vector, {length}) && vector.scalar_type() == x.scalar_type();
  };
  require(is_vector(scale, C), "scale [C], of x's dtype");
  require(is_vector(mean, T) && is_vector(variance, T) && (!norm_weight || is_vector(*norm_weight, T)) &&
              (!norm_bias || is_vector(*norm_bias, T)),
          "the norm's vectors [T], of x's dtype");
  for (const Tensor* const other : {&u, &v, &residual}) {
    require(other->scalar_type() == x.scalar_type(), "u, v and residual of x's dtype");
  }
  int64_t lines = 1, inner = 1;
  for (int64_t axis = 0; axis < dim; axis++) lines *= x.size(axis);
  for (int64_t axis = dim + 1; axis < x.dim() - 1; axis++) inner *= x.size(axis);
  const MaybeTensor linked = adjacency ? MaybeTensor(dense(*adjacency)) : std::nullopt;
  if (linked) {
    const bool of_all = linked->dim() == 2, fits = of_all || linked->numel() == lines * inner * T * T;
    require(linked->scalar_type() == ScalarType::Bool && linked->dim() >= 2 && linked->size(-1) == T &&
                linked->size(-2) == T && fits,
            "adjacency bool [T, T], or one for each line");
  } else {
    require(neighbours >= 1 && neighbours <= std::min<int64_t>(T, kMostNeighbours),
            "neighbours from 1 to T, at most 16");
  }
  const Tensor rows = dense(x), added = dense(u), passed = dense(v), before = dense(residual);
  const Tensor scales = dense(scale), means = dense(mean), variances = dense(variance);
  const MaybeTensor weights = dense(norm_weight, x.scalar_type()), biases = dense(norm_bias, x.scalar_type());
  const Tensor out = make(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));
  const GraphArgs args = {rows.const_data_ptr(),
                          added.const_data_ptr(),
                          passed.const_data_ptr(),
                          before.const_data_ptr(),
                          dtype_of(x),
                          lines,
                          T,
                          inner,
                          C,
                          read<bool>(linked),
                          linked && linked->dim() > 2 ? T * T : 0,
                          neighbours,
                          read<void>(weights),
                          read<void>(biases),
                          means.const_data_ptr(),
                          variances.const_data_ptr(),
                          eps,
                          scales.const_data_ptr(),
                          out.mutable_data_ptr()};
  if (x.numel() > 0) check(kernels().graph_update(args, pool()), "graph_update");
  return out;
}

}  // namespace
}  // namespace h2ot

STABLE_TORCH_LIBRARY_IMPL(h2ot_kernels, CPU, m) { m.impl("graph_update", TORCH_BOX(&h2ot::graph_update)); }
