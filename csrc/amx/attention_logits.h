// Logits of an attention in bfloat16, of a panel of queries by all keys of a head (half_products.h).
//
// Logits [key][query] = keys times the panel: queries stand in the lanes, and their pairs of channels in the rows of a
// tile.
#pragma once

#include "../cpu/transpose.h"
#include "half_products.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kQueries = 2 * kSide, kStepKeys = 2 * kSide, kStepChannels = 2 * kSide;  // of a panel, of a step
static_assert(kSumsStep == kQueries);

// `count` queries of D channels, `apart` from each other, as two columns of tiles; zeros behind the last one.
// to: [2][depth][kSide pairs of channels][kSide queries][2], depth being steps of kStepChannels.
inline void pack_queries(const uint16_t* x, int64_t apart, int64_t count, int64_t D, uint16_t* to) {
  for (int64_t tile = 0; tile < 2; tile++) {
    for (int64_t c = 0; c < D; c += kStepChannels, to += kTileHalves) {
      Words rows[kSide];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; i++) {
        const int64_t row = tile * kSide + i;
        rows[i] = row < count ? load_step(x + row * apart + c, D - c) : Words{};
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; i++) memcpy(to + i * kStepChannels, &rows[i], sizeof rows[i]);
    }
  }
}

// keys: [2 steps][depth][kSide keys][kStepChannels], steps being of kStepKeys. logits: [steps kStepKeys][kQueries].
inline void multiply_keys(const uint16_t* keys, int64_t steps, const uint16_t* queries, int64_t D, float* logits) {
  const int64_t next = groups_of(D, kStepChannels) * kTileHalves;
  for (int64_t step = 0; step < steps; step++) {
    multiply<2>(keys + 2 * step * next, next, queries, next, kTileHalves, groups_of(D, 2),
                logits + step * kStepKeys * kQueries);
  }
}

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
