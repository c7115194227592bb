// The kernels of one instruction set as a table. Compiled once per instruction set, like the kernels themselves.
#include "kernels.h"
#include "linear_blocks.h"

#define H2OT_TEXT(name) #name
#define H2OT_NAME(name) H2OT_TEXT(name)

namespace h2ot {
namespace H2OT_ISA {

extern const Kernels table;
const Kernels table = {
    H2OT_NAME(H2OT_ISA),
    score,
    plan_score,
    cluster,
    select,
    motion,
    attention_score,
    gather,
    scatter,
    assign,
    merge,
    recover_attention,
    recover_attention_backward,
    recover_tail,
    recover_rotated,
    add_norm,
    graph_update,
    linear_floats,
    mlp_floats,
    kFloatsPanel,
    interpolate,
    interpolate_backward,
};

}  // namespace H2OT_ISA
}  // namespace h2ot
