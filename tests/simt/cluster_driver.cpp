// Runs launch_assign, or launch_score with labels, in the simulator for every record of a file: cluster_driver IN OUT.
// tests/simt/cluster.py writes IN and reads OUT.
//
// A record: kHeader int64 (below), then the bytes of x (a whole buffer, strided as the header says), mask, keep,
// index. Its result: one int64 error, then index and labels (int64).
#include <fstream>
#include <iostream>

#include "cuda/launch_cuda.h"
#include "cuda/score_device.cuh"
#include "workspace.h"

namespace {

using h2ot::cuda::Plan;

enum Field {
  kSeed,
  kDtype,
  kB,
  kN,
  kJ,
  kC,
  kStrideB,
  kStrideN,
  kStrideJ,
  kStrideC,
  kBytes,
  kOffset,  // bytes before the first token
  kMasked,
  kIndexRows,
  kKept,
  kNeighbours,  // 0: the index is given, else found
  kSearch,
  kDistance,  // -1: the counted plan
  kSamples,
  kSide,
  kMultiprocessors,
  kKeepRows,
  kM,
  kHeader
};

Plan plan_of(const int64_t* h, const h2ot::cuda::Problem& problem) {
  using namespace h2ot::cuda;
  const Machine device = {9, 0, int32_t(h[kMultiprocessors])};
  const int32_t side = int32_t(h[kSide]);
  if (h[kNeighbours] == 0) {
    return h[kDistance] < 0 ? plan_assign(problem, device)
                            : plan_assign_as(problem, device, Distance(h[kDistance]), h[kSamples], side);
  }
  return h[kDistance] < 0
             ? plan_score(problem, device)
             : plan_score_as(problem, device, Search(h[kSearch]), Distance(h[kDistance]), h[kSamples], side);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "cluster_driver IN OUT\n";
    return 2;
  }
  std::ifstream in(argv[1], std::ios::binary);
  std::ofstream out(argv[2], std::ios::binary);
  int64_t h[kHeader];
  while (in.read(reinterpret_cast<char*>(h), sizeof h)) {
    const int64_t B = h[kB], N = h[kN], K = h[kKept];
    const bool given = h[kNeighbours] == 0;
    Buffer x(h[kBytes]), mask(h[kMasked] ? B * N : 0), index(h[kIndexRows] * K * 8), labels(B * N * 8),
        keep(h[kKeepRows] * h[kM] * 8);
    for (Buffer* buffer : {&x, &mask, &keep}) buffer->read(in);
    if (given) index.read(in);
    if (!in) {
      std::cerr << "cluster_driver: " << argv[1] << " ends within a record\n";
      return 2;
    }
    const h2ot::Tokens tokens = {
        x.data + h[kOffset], h2ot::Dtype(h[kDtype]), B, N, h[kJ], h[kC], h[kStrideB], h[kStrideN], h[kStrideJ],
        h[kStrideC]};
    const Plan plan =
        plan_of(h, {B, N, h[kJ], h[kC], h[kNeighbours], tokens.dtype, h2ot::cuda::readable_in_place(tokens), K});
    const Room workspace(plan, h[kSeed]);
    int64_t error = 0;
    if (given) {
      const h2ot::AssignArgs args = {tokens, index.as<int64_t>(), h[kIndexRows],
                                     K,      mask.as<bool>(),     labels.as<int64_t>()};
      error = launch_assign(args, plan, workspace.data, nullptr);
    } else {
      h2ot::cuda::CudaScoreArgs args = {};
      args.score.x = tokens;
      args.score.k = h[kNeighbours];
      args.score.mask = mask.as<bool>();
      args.K = K;
      args.keep = keep.as<int64_t>();
      args.keep_rows = h[kKeepRows];
      args.M = h[kM];
      args.index = index.as<int64_t>();
      args.labels = labels.as<int64_t>();
      error = launch_score(args, plan, workspace.data, nullptr);
    }
    out.write(reinterpret_cast<const char*>(&error), sizeof error);
    index.write(out);
    labels.write(out);
  }
  return 0;
}
