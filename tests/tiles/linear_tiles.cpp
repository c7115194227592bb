// csrc/amx/linear_tiles.cpp on the emulated unit, which the compiler is told to read first (emulated.h).
#include "amx/linear_tiles.cpp"

extern "C" int64_t pack(const float* weight, int64_t chunks, int64_t M, int64_t C, const float* channels,
                        int8_t* packed) {
  const h2ot::PackTilesArgs args = {weight, chunks, M, C, channels, packed};
  if (packed) h2ot::amx::pack_tiles(args);
  return h2ot::amx::packed_tiles_size(args);
}

extern "C" int linear(const float* x, int64_t rows, int64_t chunks, int64_t M, int64_t C, const int8_t* packed,
                      const float* bias, const float* residual, int gelu, float* out, const float* norm_weight,
                      const float* norm_bias, float eps, int64_t x_apart, int64_t out_apart) {
  const auto activation = gelu ? h2ot::Activation::gelu : h2ot::Activation::none;
  const h2ot::LinearTilesArgs args = {x,        rows,        chunks,    M,          C,
                                      packed,   bias,        residual,  activation, out,
                                      eps >= 0, norm_weight, norm_bias, eps,        {x_apart, out_apart}};
  return int(h2ot::amx::linear_tiles(args, {run_in_two, 2}));
}

extern "C" int mlp(const float* x, int64_t rows, int64_t C, int64_t H, int64_t M, const int8_t* packed,
                   const int8_t* second_packed, const float* bias, const float* second_bias, const float* residual,
                   float* out, const float* norm_weight, const float* norm_bias, float eps) {
  using namespace h2ot;
  const LinearTilesArgs first = {x,       rows,     1,           H,         C,  packed, bias, nullptr, Activation::gelu,
                                 nullptr, eps >= 0, norm_weight, norm_bias, eps};
  const LinearTilesArgs second = {
      nullptr, rows, 1, M, H, second_packed, second_bias, residual, Activation::none, out, false, nullptr, nullptr, 0};
  return int(amx::mlp_tiles({first, second}, {run_in_two, 2}));
}
