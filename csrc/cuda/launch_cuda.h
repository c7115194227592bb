// Contract of the CUDA launchers, in the manner of launch.h. No torch here.
//
// All pointers in the arguments are device pointers; nothing is read on the host, nothing is allocated, and the host
// never waits: a call only issues kernels on `stream`, so it can be captured in a CUDA graph. The same call gives the
// same bits on every architecture, for every plan.
#pragma once

#include "../launch.h"
#include "plan.h"

namespace h2ot {
namespace cuda {

// Scoring as launch.h's ScoreArgs says (score may be null too), and in the same call, where index is given, the K first
// by (kept, valid, score descending, index ascending). `valid` of the score arguments is not written.
// A row of `keep` with a value outside [0, N), or with more than K different ones, makes that sample's index -1.
struct CudaScoreArgs {
  ScoreArgs score;
  int64_t K;
  const int64_t* keep;  // [keep_rows, M] contiguous, or null
  int64_t keep_rows, M;
  int64_t* index;   // [B, K] out, or null
  int64_t* labels;  // [B, N] out, or null: of all tokens by the index, as AssignArgs defines them
};

// workspace: plan.at.bytes bytes, aligned to 16. Returns 0, or the cudaError_t of the launch that failed.
int32_t launch_score(const CudaScoreArgs& args, const Plan& plan, void* workspace, void* stream);

// Labels as launch.h's AssignArgs says, without parents; a value of the index outside [0, N) selects nothing. Of a
// token that the index names twice its own label is the last. workspace: as above, of plan_assign.
int32_t launch_assign(const AssignArgs& args, const Plan& plan, void* workspace, void* stream);

// Selection as launch.h's SelectArgs says, with a wrong or overfull row of `keep` as above. keys: room for [B, N].
int32_t launch_select(const SelectArgs& args, uint64_t* keys, void* stream);

// Gathering and scattering as launch.h's structs say, each one kernel; but the index is not checked: a value outside
// [0, F) that is no padding makes its frame NaN, and scattering passes over it, as it does over rows that do not
// ascend. overlaps: as in a Plan. Returns 0, or the cudaError_t of the launch.
int32_t launch_gather(const GatherArgs& args, void* stream, bool overlaps = false);
int32_t launch_scatter(const ScatterArgs& args, void* stream, bool overlaps = false);

// Facts of a device that plans need, which must be the current one. Returns 0, or a cudaError_t: what is missing where
// the library holds no code for it.
int32_t read_machine(int32_t device, Machine* machine);
int32_t read_code(int32_t* code);  // of the current device, as in a Machine
const char* error_name(int32_t error);

}  // namespace cuda
}  // namespace h2ot
