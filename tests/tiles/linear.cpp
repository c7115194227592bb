// csrc/amx/linear.cpp on the emulated unit, which the compiler is told to read first (emulated.h).
#include "amx/linear.cpp"

extern "C" int64_t emulated_pack(const float* weight, int64_t chunks, int64_t M, int64_t C, int8_t* packed) {
  const h2ot::PackArgs args = {weight, chunks, M, C, packed};
  if (packed) h2ot::amx::pack(args);
  return h2ot::amx::packed_size(args);
}

extern "C" int emulated_linear(const float* x, int64_t rows, int64_t chunks, int64_t M, int64_t C, const int8_t* packed,
                               const float* bias, const float* residual, int gelu, float* out, const float* norm_weight,
                               const float* norm_bias, float eps) {
  const auto activation = gelu ? h2ot::Activation::gelu : h2ot::Activation::none;
  const h2ot::LinearArgs args = {x,        rows,       chunks, M,        C,           packed,    bias,
                                 residual, activation, out,    eps >= 0, norm_weight, norm_bias, eps};
  return int(h2ot::amx::linear(args, {run_in_two, 2}));
}
