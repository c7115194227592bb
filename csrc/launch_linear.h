// What the linear layers of CPU inference are asked: see launch.h.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace h2ot {

// out[c, r] = residual[c, r] + activation(W_c norm(x[r]) + bias_c) in float32, on the tile unit of x86. The weights,
// those of `chunks` layers with M outputs each, are packed once: three bytes for each, in tiles, and a scale for each
// output.
enum class Activation : int32_t { none, gelu };
struct PackTilesArgs {
  const float* weight;  // [chunks, M, C] contiguous; the largest of each row 0, or from 2^-48 to 2^48; C 32 to 32768
  int64_t chunks, M, C;
  const float* channels;  // [C]: what rows are multiplied by and weights divided, 0 only where the weights are; or null
  int8_t* packed;         // [packed_tiles_size()] aligned to 64 bytes
};
// How far the rows of tokens, and of results, are apart: 0 for adjacent ones. Those of results may be in one chunk
// only.
struct Apart {
  int64_t x = 0, out = 0;
};
// Numbers from one row of x, or of the results, to the next, of any of the layers below. Static: every instruction set
// compiles its own.
template <class Args>
static inline int64_t x_row(const Args& a) {
  return a.apart.x ? a.apart.x : a.C;
}
template <class Args>
static inline int64_t out_row(const Args& a) {
  return a.apart.out ? a.apart.out : a.M;
}
struct LinearTilesArgs {
  const float* x;  // [rows, C], rows apart.x from each other
  int64_t rows, chunks, M, C;
  const int8_t* packed;
  const float* bias;      // [chunks, M], or null
  const float* residual;  // laid out as out, or null
  Activation activation;
  float* out;                            // [chunks, rows, M], rows apart.out from each other
  bool has_norm;                         // norm is LayerNorm over C, else nothing
  const float *norm_weight, *norm_bias;  // [C], or null
  float eps;
  Apart apart = {};
};
// Two of them, one behind the other; what is between them is never stored whole.
struct MlpTilesArgs {
  LinearTilesArgs first;   // out unused; GELU, no residual
  LinearTilesArgs second;  // x unused; no norm, no activation; C is the first one's M; of both one chunk
};

// The same in bfloat16 with sums in float32, on the unit or by products of pairs. The weights stand in panels of
// kLinearPanel outputs, [chunks, panels, steps, 2, 16, 16, 2]: of 32 channels and half a panel, for each pair of
// channels the pairs of 16 outputs; 0 behind the last channel, and behind the last output of a chunk. Each sum is one
// chain in the order of the channels, whatever stands beside it; subnormal numbers count as 0.
constexpr int64_t kLinearPanel = 32, kFewestChannels = 16;
struct LinearHalvesArgs {
  const void* x;  // [rows, C], rows apart.x from each other; C at least kFewestChannels
  Dtype x_dtype;  // bf16, or f32, which is rounded (after the norm)
  const uint16_t* packed;
  int64_t rows, chunks, M, C;
  const float* bias;     // [chunks, M], or null
  const void* residual;  // laid out as out, or null
  Activation activation;
  void* out;                            // [chunks, rows, M], rows apart.out from each other
  Dtype out_dtype;                      // of out and residual: bf16; or f32, to which the rounded product is added
  bool has_norm;                        // norm is LayerNorm over C, else nothing
  const void *norm_weight, *norm_bias;  // [C], or null
  Dtype norm_dtype;                     // of both: f32 or bf16
  double eps;
  Apart apart = {};
};

// Two of them, one behind the other; what is between them, in bfloat16, is never stored whole.
struct MlpHalvesArgs {
  LinearHalvesArgs first;   // out unused, its dtype bf16; no residual
  LinearHalvesArgs second;  // x unused; no norm; C is the first one's M; of both one chunk
};

// The same in float32, each sum one chain of multiply-adds in the order of the channels. The weights stand in panels of
// as many outputs as the instruction set's tiles have (Kernels::floats_panel), [chunks, panels, C, floats_panel], 0
// behind the last output of a chunk.
struct LinearFloatsArgs {
  const float* x;  // [rows, C], rows apart.x from each other; C at least 1, with a norm kFewestChannels
  const float* packed;
  int64_t rows, chunks, M, C;
  const float* bias;      // [chunks, M], or null
  const float* residual;  // laid out as out, or null
  Activation activation;
  float* out;                            // [chunks, rows, M], rows apart.out from each other
  bool has_norm;                         // norm is LayerNorm over C, else nothing
  const float *norm_weight, *norm_bias;  // [C], or null
  double eps;
  Apart apart = {};
};
struct MlpFloatsArgs {
  LinearFloatsArgs first;   // out unused; no residual
  LinearFloatsArgs second;  // x unused; no norm; C is the first one's M; of both one chunk
};

}  // namespace h2ot
