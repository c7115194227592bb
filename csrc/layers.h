// What the torch-facing files of linear layers share.
#pragma once

#include <stdexcept>
#include <vector>

#include "stable.h"

namespace h2ot {

// Raises ValueError that names the operators and what they want.
struct Require {
  const char* name;

  void operator()(bool condition, const char* wanted) const {
    if (!condition) throw std::invalid_argument(std::string("h2ot_kernels.") + name + ": wanted " + wanted);
  }
};

inline bool is_float(const Tensor& x) { return x.scalar_type() == ScalarType::Float; }

// Room for results of M channels, of each chunk.
inline Tensor results_of(const Tensor& x, int64_t chunks, int64_t M, ScalarType dtype) {
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = M;
  if (chunks > 1) size.insert(size.begin(), chunks);
  return make(x, size, dtype);
}

// A layer in float32 of out_features outputs for `rows` rows of C channels; what it reads is kept, dense, as long as
// it. Args: LinearFloatsArgs or LinearTilesArgs, whose packed weights are the caller's business.
template <class Args>
struct FloatLayer {
  Require wants;
  MaybeTensor bias, residual, norm_weight, norm_bias;
  Args args = {};

  FloatLayer(Require require, int64_t rows, int64_t C, const MaybeTensor& any_bias, const MaybeTensor& any_residual,
             int64_t out_features, int64_t chunks, bool gelu)
      : wants(require) {
    wants(fits(any_bias, out_features), "a bias [out_features] of float32");
    wants(fits(any_residual, rows * out_features), "a residual of the result's shape, of float32");
    bias = dense(any_bias, ScalarType::Float);
    residual = dense(any_residual, ScalarType::Float);
    args.rows = rows;
    args.chunks = chunks;
    args.M = out_features / chunks;
    args.C = C;
    args.bias = read<float>(bias);
    args.residual = read<float>(residual);
    args.activation = gelu ? Activation::gelu : Activation::none;
  }
  void norm_first(const MaybeTensor& weight, const MaybeTensor& any_bias, double eps) {
    wants(fits(weight, args.C) && fits(any_bias, args.C), "a norm's weight and bias [in_features] of float32");
    norm_weight = dense(weight, ScalarType::Float);
    norm_bias = dense(any_bias, ScalarType::Float);
    args.has_norm = eps >= 0;
    args.norm_weight = read<float>(norm_weight);
    args.norm_bias = read<float>(norm_bias);
    args.eps = decltype(args.eps)(eps);
  }
  static bool fits(const MaybeTensor& x, int64_t count) { return !x || (x->numel() == count && is_float(*x)); }
};

}  // namespace h2ot
