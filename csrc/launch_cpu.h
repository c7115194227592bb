// Which kernels a CPU runs: those of one instruction set, and those of the units that only some machines have.
#pragma once

#include "launch.h"
#include "launch_linear.h"

namespace h2ot {

// Whether the machine has the tile unit, the compiler knew it, the kernels in use are not those of a lesser machine,
// and the environment variable H2OT_KERNELS_TILES is not 0.
bool tiles_run();
namespace amx {
int64_t packed_tiles_size(const PackTilesArgs&);
void pack_tiles(const PackTilesArgs&);
Status linear_tiles(const LinearTilesArgs&, const Parallel&);
Status mlp_tiles(const MlpTilesArgs&, const Parallel&);
Status attend(const RecoverAttentionArgs&, const Parallel&);  // bf16, scale above 0, K and C at least 1
// bf16, scale 0 or above, D at least 1, channels adjacent.
Status attention_score(const AttentionScoreArgs&, const Parallel&);
Status rotated_halves(const RecoverRotatedArgs&, const Parallel&);
Status rotated_tiles(const RecoverRotatedArgs&, const Parallel&);
Status linear_halves(const LinearHalvesArgs&, const Parallel&);
Status mlp_halves(const MlpHalvesArgs&, const Parallel&);
}  // namespace amx
// Whether the machine has products of pairs of bfloat16 numbers (AVX512-BF16; it has where tiles_run()), the compiler
// knew them, and the kernels in use are not those of a lesser machine.
bool dots_run();
namespace bf16_dots {
Status attend(const RecoverAttentionArgs&, const Parallel&);  // the same, by products of pairs in vectors
Status rotated_halves(const RecoverRotatedArgs&, const Parallel&);
Status linear_halves(const LinearHalvesArgs&, const Parallel&);
Status mlp_halves(const MlpHalvesArgs&, const Parallel&);
}  // namespace bf16_dots
// recover_attention in bfloat16 by the tile unit or by products of pairs where that pays, else by kernels().
Status attend(const RecoverAttentionArgs&, const Parallel&);
// attention_score in bfloat16 by the tile unit, else by kernels().
Status score_attention(const AttentionScoreArgs&, const Parallel&);
// By the tile unit, else by products of pairs: where dots_run().
Status run_rotated_halves(const RecoverRotatedArgs&, const Parallel&);
Status run_linear_halves(const LinearHalvesArgs&, const Parallel&);
Status run_mlp_halves(const MlpHalvesArgs&, const Parallel&);

// One table per instruction set; capability.cpp picks one at run time.
struct Kernels {
  const char* name;  // "portable", "avx2", "avx512"; "neon"
  Status (*score)(const ScoreArgs&, const Parallel&);
  ScorePlan (*plan_score)(const ScoreArgs&);  // reads sizes, strides and which pointers are null
  Status (*cluster)(const ClusterArgs&, const Parallel&);
  Status (*select)(const SelectArgs&, const Parallel&);
  Status (*motion)(const MotionArgs&, const Parallel&);
  Status (*attention_score)(const AttentionScoreArgs&, const Parallel&);
  Status (*gather)(const GatherArgs&, const Parallel&);
  Status (*scatter)(const ScatterArgs&, const Parallel&);
  Status (*assign)(const AssignArgs&, const Parallel&);
  Status (*merge)(const MergeArgs&, const Parallel&);
  Status (*recover_attention)(const RecoverAttentionArgs&, const Parallel&);
  Status (*recover_attention_backward)(const RecoverAttentionBackwardArgs&, const Parallel&);
  Status (*recover_tail)(const RecoverTailArgs&, const Parallel&);
  Status (*recover_rotated)(const RecoverRotatedArgs&, const Parallel&);
  Status (*add_norm)(const AddNormArgs&, const Parallel&);
  Status (*graph_update)(const GraphArgs&, const Parallel&);
  Status (*linear_floats)(const LinearFloatsArgs&, const Parallel&);
  Status (*mlp_floats)(const MlpFloatsArgs&, const Parallel&);
  int64_t floats_panel;
  Status (*interpolate)(const InterpolateArgs&, const Parallel&);
  Status (*interpolate_backward)(const InterpolateBackwardArgs&, const Parallel&);
};

// The table in use: the best that this machine can run, unless set_capability chose another (portable, avx2, avx512,
// neon); it returns false for a name that this machine cannot run.
const Kernels& kernels();
bool set_capability(const char* name);
// The names that this machine can run, best first, comma-separated; "" ends the choice.
const char* runnable_capabilities();

}  // namespace h2ot
