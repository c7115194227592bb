// The mean weight that each frame receives in an attention in bfloat16, logits by the tile unit of recent x86
// processors (AMX, half_products.h). Weights in float32, as for all other dtypes.
//
// Counted per panel of kQueries and key: D / 32 tile instructions of 16 cycles for two vectors of weights, which take
// about 14 instructions each; F ceil(F / kQueries) of them a head.
#include "../cpu/received.h"
#include "attention_logits.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

static_assert(kQueries == kPanel<float>);

// What a thread works in.
struct Received {
  typedef ProductRegisters Registers;
  const AttentionScoreArgs& a;
  int64_t depth, steps;  // of kStepChannels, of kStepKeys
  float rate;
  uint16_t* keys;     // as in multiply_keys
  uint16_t* queries;  // as in pack_queries
  float* all;         // [steps kStepKeys][kQueries] logits

  Received(Carver& memory, const AttentionScoreArgs& args)
      : a(args), depth(groups_of(a.D, kStepChannels)), steps(groups_of(a.F, kStepKeys)), rate(float(a.scale * kLog2E)) {
    keys = memory.take<uint16_t>(2 * steps * depth * kTileHalves);
    queries = memory.take<uint16_t>(2 * depth * kTileHalves);
    all = memory.take<float>(steps * kStepKeys * kQueries);
  }
  void take_key(const BFloat16* key) const {
    pack_rows(reinterpret_cast<const uint16_t*>(key), a.key_stride[3], a.F, a.D, 2 * steps, depth, keys);
  }
  float* logits(const BFloat16* query, int64_t first, int64_t count) const {
    const uint16_t* const from = reinterpret_cast<const uint16_t*>(query) + first * a.query_stride[3];
    pack_queries(from, a.query_stride[3], count, a.D, queries);
    multiply_keys(keys, steps, queries, a.D, all);
    return all;
  }
};

}  // namespace

Status attention_score(const AttentionScoreArgs& a, const Parallel& pool) {
  return receive_heads<BFloat16, Received>(a, pool);
}

}  // namespace H2OT_ISA
}  // namespace h2ot
