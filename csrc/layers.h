// What the torch-facing files of linear layers share.
#pragma once

#include <cmath>
#include <vector>

#include "launch_cpu.h"
#include "require.h"

namespace h2ot {

inline bool is_float(const Tensor& x) { return x.scalar_type() == ScalarType::Float; }

// Numbers from one row of x to the next; 0 where they are not all equally far apart.
inline int64_t rows_apart(const Tensor& x) {
  if (x.dim() == 0) return 0;
  if (x.stride(-1) != 1 && x.size(-1) > 1) return 0;
  int64_t apart = 0, next = 0;  // what the next axis' stride has to be
  for (int64_t axis = x.dim() - 2; axis >= 0; axis--) {
    if (x.size(axis) == 1) continue;
    if (next == 0) apart = x.stride(axis);
    if (apart == 0 || (next != 0 && x.stride(axis) != next)) return 0;
    next = x.stride(axis) * x.size(axis);
  }
  return next == 0 ? x.size(-1) : apart;  // one row
}
// x, or a copy whose rows are equally far apart.
inline Tensor readable_rows(const Tensor& x) { return rows_apart(x) > 0 ? x : dense(x); }

// Where results go: `out` where it is given, with what is added to them laid out as it is; else room for them.
inline bool takes_results(const Tensor& out, const MaybeTensor& residual, int64_t rows, int64_t M, ScalarType dtype) {
  const int64_t apart = rows_apart(out);
  return apart >= M && out.scalar_type() == dtype && out.size(-1) == M && out.numel() == rows * M &&
         (!residual || (residual->numel() == rows * M && rows_apart(*residual) == apart && residual->size(-1) == M));
}
constexpr const char* kOutWanted =
    "an out of the result's shape and dtype, of one chunk, and a residual whose rows are as far apart";

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
  static constexpr ScalarType results = ScalarType::Float;
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
  void take(const Tensor& tokens) { args.x = read<float>(tokens); }
  void norm_first(const MaybeTensor& weight, const MaybeTensor& any_bias, double eps) {
    wants(fits(weight, args.C) && fits(any_bias, args.C), "a norm's weight and bias [in_features] of float32");
    norm_weight = dense(weight, ScalarType::Float);
    norm_bias = dense(any_bias, ScalarType::Float);
    args.has_norm = eps >= 0;
    args.norm_weight = read<float>(norm_weight);
    args.norm_bias = read<float>(norm_bias);
    args.eps = decltype(args.eps)(eps);
  }
  // The results of one chunk, and what is added to them, in rows that may stand apart.
  void into(const Tensor& out, const MaybeTensor& any_residual) {
    wants(fits(any_residual, args.rows * args.M) && args.chunks == 1 &&
              takes_results(out, any_residual, args.rows, args.M, results),
          kOutWanted);
    residual = any_residual;
    args.residual = read<float>(residual);
    args.out = write<float>(out);
    args.apart.out = rows_apart(out);
  }
  static bool fits(const MaybeTensor& x, int64_t count) { return !x || (x->numel() == count && is_float(*x)); }
};

// Layers and MLPs by weights of one kind. Kind: Layer, of packed weights, which takes tokens, a norm before it, and
// where its results go, of dtype `results`; rows_of(x, eps), x, whose rows are equally far apart, where the kind takes
// it; linear(args) and mlp(args), and what errors call them.
template <class Kind>
struct OperatorsOf {
  typedef typename Kind::Layer Layer;

  // Into `given` where there is one.
  static Tensor linear(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, const MaybeTensor& residual,
                       int64_t out_features, int64_t chunks, bool gelu, const MaybeTensor& norm_weight,
                       const MaybeTensor& norm_bias, double eps, const MaybeTensor& given) {
    const Tensor tokens = Kind::rows_of(x, eps);
    const int64_t C = x.size(-1);
    Layer layer(x.numel() / C, C, packed, bias, given ? std::nullopt : residual, out_features, chunks, gelu);
    layer.take(tokens);
    layer.args.apart.x = rows_apart(tokens);
    layer.norm_first(norm_weight, norm_bias, eps);
    const Tensor out = given ? *given : results_of(x, chunks, layer.args.M, layer.results);
    if (given) {
      layer.into(out, residual);
    } else {
      layer.args.out = static_cast<decltype(layer.args.out)>(out.mutable_data_ptr());
    }
    check(Kind::linear(layer.args), Kind::kLinear);
    return out;
  }
  static Tensor mlp(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, int64_t hidden_features,
                    const Tensor& second_packed, const MaybeTensor& second_bias, const MaybeTensor& residual,
                    int64_t out_features, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps) {
    const Tensor tokens = Kind::rows_of(x, eps);
    const int64_t C = x.size(-1), rows = x.numel() / C;
    Layer first(rows, C, packed, bias, std::nullopt, hidden_features, 1, true);
    first.take(tokens);
    first.args.apart.x = rows_apart(tokens);
    first.norm_first(norm_weight, norm_bias, eps);
    Layer second(rows, hidden_features, second_packed, second_bias, residual, out_features, 1, false);
    const Tensor out = results_of(x, 1, out_features, second.results);
    second.args.out = static_cast<decltype(second.args.out)>(out.mutable_data_ptr());
    check(Kind::mlp({first.args, second.args}), Kind::kMlp);
    return out;
  }
};

// Self-attention along axis `dim` of tokens like x by heads of D channels: of qkv [3, sizes of x], contiguous.
inline Tensor attended(const Tensor& x, const Tensor& qkv, int64_t dim, int64_t D) {
  int64_t B = 1, width = 1;
  for (int64_t axis = 0; axis < dim; axis++) B *= x.size(axis);
  for (int64_t axis = dim + 1; axis < x.dim(); axis++) width *= x.size(axis);
  const int64_t T = x.size(dim), part = B * T * width * int64_t(qkv.element_size());
  const char* const query = static_cast<const char*>(qkv.const_data_ptr());
  const Tensor out = make(qkv, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));
  const Rows rows = {T * width, width};
  check(attend({query, query + part, query + 2 * part, dtype_of(qkv), B, T, T, width, width / D, B, rows, rows, rows,
                std::pow(double(D), -0.5), out.mutable_data_ptr()},
               pool()),
        "recover_attention");
  return out;
}

// The operators of weights of one kind (packed.Operators), all from kLinear(x, packed, bias, residual, out_features,
// chunks, gelu, norm_weight, norm_bias, eps, out): the results, in `out` where that is given.
template <auto kLinear>
struct LayerOperators {
  static Tensor linear(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, const MaybeTensor& residual,
                       int64_t out_features, int64_t chunks, bool gelu, const MaybeTensor& norm_weight,
                       const MaybeTensor& norm_bias, double eps) {
    return kLinear(x, packed, bias, residual, out_features, chunks, gelu, norm_weight, norm_bias, eps, std::nullopt);
  }
  static void linear_out(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, const MaybeTensor& residual,
                         int64_t out_features, int64_t chunks, bool gelu, const MaybeTensor& norm_weight,
                         const MaybeTensor& norm_bias, double eps, const Tensor& out) {
    kLinear(x, packed, bias, residual, out_features, chunks, gelu, norm_weight, norm_bias, eps, out);
  }
  static Tensor attend(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, int64_t dim, int64_t num_heads,
                       const Tensor& proj_packed, const MaybeTensor& proj_bias, const MaybeTensor& residual,
                       const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps) {
    return all_parts(x, packed, bias, dim, num_heads, proj_packed, proj_bias, residual, norm_weight, norm_bias, eps,
                     std::nullopt);
  }
  static void attend_out(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, int64_t dim, int64_t num_heads,
                         const Tensor& proj_packed, const MaybeTensor& proj_bias, const MaybeTensor& residual,
                         const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps, const Tensor& out) {
    all_parts(x, packed, bias, dim, num_heads, proj_packed, proj_bias, residual, norm_weight, norm_bias, eps, out);
  }

 private:
  static Tensor all_parts(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, int64_t dim,
                          int64_t num_heads, const Tensor& proj_packed, const MaybeTensor& proj_bias,
                          const MaybeTensor& residual, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                          double eps, const MaybeTensor& out) {
    const Require require = {"attend"};
    require(
        x.dim() > 1 && dim >= 0 && dim < x.dim() - 1 && num_heads > 0 && x.numel() > 0 && x.size(-1) % num_heads == 0,
        "an axis of tokens before the channels, and heads that divide those");
    const int64_t C = x.size(-1);
    const Tensor qkv =
        kLinear(x, packed, bias, std::nullopt, 3 * C, 3, false, norm_weight, norm_bias, eps, std::nullopt);
    return kLinear(attended(x, qkv, dim, C / num_heads), proj_packed, proj_bias, residual, C, 1, false, std::nullopt,
                   std::nullopt, -1.0, out);
  }
};

}  // namespace h2ot
