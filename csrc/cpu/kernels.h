// The entry points that every instruction set defines; their contracts stand in launch.h and launch_linear.h.
#pragma once

#include "../launch_cpu.h"

namespace h2ot {
namespace H2OT_ISA {

Status score(const ScoreArgs&, const Parallel&);
ScorePlan plan_score(const ScoreArgs&);
Status cluster(const ClusterArgs&, const Parallel&);
Status select(const SelectArgs&, const Parallel&);
Status motion(const MotionArgs&, const Parallel&);
Status attention_score(const AttentionScoreArgs&, const Parallel&);
Status gather(const GatherArgs&, const Parallel&);
Status scatter(const ScatterArgs&, const Parallel&);
Status assign(const AssignArgs&, const Parallel&);
Status merge(const MergeArgs&, const Parallel&);
Status recover_attention(const RecoverAttentionArgs&, const Parallel&);
Status recover_attention_backward(const RecoverAttentionBackwardArgs&, const Parallel&);
Status recover_tail(const RecoverTailArgs&, const Parallel&);
Status recover_rotated(const RecoverRotatedArgs&, const Parallel&);
Status add_norm(const AddNormArgs&, const Parallel&);
Status graph_update(const GraphArgs&, const Parallel&);
Status linear_floats(const LinearFloatsArgs&, const Parallel&);
Status mlp_floats(const MlpFloatsArgs&, const Parallel&);
Status interpolate(const InterpolateArgs&, const Parallel&);
Status interpolate_backward(const InterpolateBackwardArgs&, const Parallel&);

}  // namespace H2OT_ISA
}  // namespace h2ot
