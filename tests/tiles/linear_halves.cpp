// csrc/amx/linear_halves.cpp for vectors, or on the emulated unit, in memory of the caller's.
#include "amx/linear_halves.cpp"

namespace {
h2ot::Dtype dtype(int is_float) { return is_float ? h2ot::Dtype::f32 : h2ot::Dtype::bf16; }
}  // namespace

extern "C" int linear_halves(const void* x, int x_is_float, const uint16_t* packed, int64_t rows, int64_t chunks,
                             int64_t M, int64_t C, const float* bias, const void* residual, int out_is_float, int gelu,
                             void* out, const void* norm_weight, const void* norm_bias, double eps, int64_t x_apart,
                             int64_t out_apart) {
  const h2ot::LinearHalvesArgs args = {x,         dtype(x_is_float),
                                       packed,    rows,
                                       chunks,    M,
                                       C,         bias,
                                       residual,  gelu ? h2ot::Activation::gelu : h2ot::Activation::none,
                                       out,       dtype(out_is_float),
                                       eps >= 0,  norm_weight,
                                       norm_bias, h2ot::Dtype::f32,
                                       eps,       {x_apart, out_apart}};
  return int(h2ot::H2OT_ISA::linear_halves(args, {run_in_two, 2}));
}

extern "C" int mlp_halves(const void* x, int x_is_float, const uint16_t* packed, const uint16_t* second_packed,
                          int64_t rows, int64_t C, int64_t H, int64_t M, const float* bias, const float* second_bias,
                          const void* residual, int out_is_float, void* out, const void* norm_weight,
                          const void* norm_bias, double eps) {
  using namespace h2ot;
  const LinearHalvesArgs first = {
      x,       dtype(x_is_float), packed,   rows,        1,         H,          C,  bias, nullptr, Activation::gelu,
      nullptr, Dtype::bf16,       eps >= 0, norm_weight, norm_bias, Dtype::f32, eps};
  const LinearHalvesArgs second = {nullptr,
                                   Dtype::bf16,
                                   second_packed,
                                   rows,
                                   1,
                                   M,
                                   H,
                                   second_bias,
                                   residual,
                                   Activation::none,
                                   out,
                                   dtype(out_is_float),
                                   false,
                                   nullptr,
                                   nullptr,
                                   Dtype::f32,
                                   0};
  return int(H2OT_ISA::mlp_halves({first, second}, {run_in_two, 2}));
}
