// csrc/cpu/linear_floats.cpp in memory of the caller's.
#include "cpu/linear_floats.cpp"

using namespace h2ot;

extern "C" int linear_floats(const float* x, const float* packed, int64_t rows, int64_t chunks, int64_t M, int64_t C,
                             const float* bias, const float* residual, int gelu, float* out, const float* norm_weight,
                             const float* norm_bias, double eps, int64_t x_apart, int64_t out_apart) {
  const LinearFloatsArgs args = {x,         packed,   rows,
                                 chunks,    M,        C,
                                 bias,      residual, gelu ? Activation::gelu : Activation::none,
                                 out,       eps >= 0, norm_weight,
                                 norm_bias, eps,      {x_apart, out_apart}};
  return int(H2OT_ISA::linear_floats(args, {run_in_two, 2}));
}

extern "C" int mlp_floats(const float* x, const float* packed, const float* second_packed, int64_t rows, int64_t C,
                          int64_t H, int64_t M, const float* bias, const float* second_bias, const float* residual,
                          float* out, const float* norm_weight, const float* norm_bias, double eps) {
  const LinearFloatsArgs first = {x,       packed,           rows,    1,        H,           C,         bias,
                                  nullptr, Activation::gelu, nullptr, eps >= 0, norm_weight, norm_bias, eps};
  const LinearFloatsArgs second = {nullptr,  second_packed,    rows, 1,     M,       H,       second_bias,
                                   residual, Activation::none, out,  false, nullptr, nullptr, 0};
  return int(H2OT_ISA::mlp_floats({first, second}, {run_in_two, 2}));
}
