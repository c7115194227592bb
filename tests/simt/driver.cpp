// Runs launch_score in the simulator for every record of a file: driver IN OUT. tests/simt/__init__.py writes IN and
// reads OUT. `driver shared` lists the shared memory of each kernel.
//
// A record: kHeader int64 (below), then the bytes of x (a whole buffer, strided as the header says), mask, noise, keep.
// Its result: one int64 error, then density, distance, score (float64), parent (int64), index (int64).
#include <fstream>
#include <iostream>
#include <string>
#include <utility>

#include "cuda/cluster_search.cuh"
#include "cuda/score_finish.cuh"
#include "cuda/score_launch.cuh"
#include "cuda/score_pairs.cuh"
#include "cuda/score_pool.cuh"
#include "cuda/score_products.cuh"
#include "cuda/score_stored.cuh"
#include "cuda/score_stream.cuh"
#include "cuda/score_stream_products.cuh"
#include "cuda/score_tiles.cuh"
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
  kOffset,
  kNeighbours,
  kMasked,
  kNoisy,
  kKept,
  kKeepRows,
  kM,
  kSearch,
  kDistance,
  kMultiprocessors,
  kSamples,
  kOnlyIndex,
  kSide,
  kHeader
};

// Kernels and the shared memory that they are launched with.
void print_shared() {
  using namespace h2ot::cuda;
  const std::pair<const char*, size_t> sizes[] = {
      {"pool_kernel<float>", sizeof(PoolShared<float>)},
      {"pool_kernel<double>", sizeof(PoolShared<double>)},
      {"stored_kernel<h2ot::cuda::DirectTile<float, 16", sizeof(StoredShared<SmallTile<float>>)},
      {"stored_kernel<h2ot::cuda::DirectTile<float, 32", sizeof(StoredShared<LargeTile<float>>)},
      {"stored_kernel<h2ot::cuda::DirectTile<double, 16", sizeof(StoredShared<SmallTile<double>>)},
      {"stored_kernel<h2ot::cuda::DirectTile<double, 32", sizeof(StoredShared<LargeTile<double>>)},
      {"operand_kernel", kWarps * sizeof(int32_t)},
      {"pair_kernel", sizeof(PairShared)},
      {"stored_products_kernel<h2ot::cuda::ProductTile<h2ot::cuda::Pairs, 64",
       sizeof(ProductShared<ProductTile<Pairs, 64>>)},
      {"stored_products_kernel", sizeof(ProductShared<ProductTile<Pairs, 128>>)},
      {"stream_kernel<h2ot::cuda::DirectTile<float", sizeof(StreamShared<DirectTile<float>>)},
      {"stream_kernel<h2ot::cuda::DirectTile<double", sizeof(StreamShared<DirectTile<double>>)},
      {"stream_products_kernel", sizeof(StreamProductsShared<StreamedTile<Pairs>>)},
      {"nearest_stored_kernel<double>", sizeof(NearestShared<double>)},
      {"nearest_stored_kernel", sizeof(NearestShared<float>)},
      {"parent_stored_kernel", sizeof(ParentShared)},
      {"nearest_streamed_kernel", sizeof(CompleteShared)},
      {"peak_parent_kernel", sizeof(CompleteShared)},
      {"peaks_kernel", sizeof(SelectShared)},
      {"centre_kernel<h2ot::cuda::DirectTile<float, 16", sizeof(CentreShared<SmallTile<float>>)},
      {"centre_kernel<h2ot::cuda::DirectTile<float, 32", sizeof(CentreShared<LargeTile<float>>)},
      {"centre_kernel<h2ot::cuda::DirectTile<double, 16", sizeof(CentreShared<SmallTile<double>>)},
      {"centre_kernel<h2ot::cuda::DirectTile<double, 32", sizeof(CentreShared<LargeTile<double>>)},
      {"centre_kernel<h2ot::cuda::ProductTile<h2ot::cuda::Pairs, 64", sizeof(CentreShared<ProductTile<Pairs, 64>>)},
      {"centre_kernel<h2ot::cuda::ProductTile<h2ot::cuda::BFloat16, 64",
       sizeof(CentreShared<ProductTile<BFloat16, 64>>)},
      {"centre_kernel<h2ot::cuda::ProductTile<h2ot::cuda::Float16, 64", sizeof(CentreShared<ProductTile<Float16, 64>>)},
      {"centre_kernel", sizeof(CentreShared<StreamedTile<Pairs>>)},
      {"index_kernel", sizeof(SelectShared)},
  };
  for (const auto& [name, bytes] : sizes) std::cout << name << " " << bytes << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && argv[1] == std::string("shared")) {
    print_shared();
    return 0;
  }
  if (argc != 3) {
    std::cerr << "driver IN OUT | driver shared\n";
    return 2;
  }
  std::ifstream in(argv[1], std::ios::binary);
  std::ofstream out(argv[2], std::ios::binary);
  int64_t h[kHeader];
  while (in.read(reinterpret_cast<char*>(h), sizeof h)) {
    const int64_t B = h[kB], N = h[kN], tokens = B * N;
    Buffer x(h[kBytes]), mask(h[kMasked] ? tokens : 0), noise(h[kNoisy] ? tokens * 8 : 0),
        keep(h[kKeepRows] * h[kM] * 8);
    for (Buffer* buffer : {&x, &mask, &noise, &keep}) buffer->read(in);
    if (!in) {
      std::cerr << "driver: " << argv[1] << " ends within a record\n";
      return 2;
    }
    const bool scores = !h[kOnlyIndex];
    Buffer density(scores ? tokens * 8 : 0), distance(scores ? tokens * 8 : 0), score(scores ? tokens * 8 : 0);
    Buffer parent(scores ? tokens * 8 : 0), index(B * h[kKept] * 8);

    h2ot::cuda::CudaScoreArgs args = {};
    args.score.x = {
        x.data + h[kOffset], h2ot::Dtype(h[kDtype]), B, N, h[kJ], h[kC], h[kStrideB], h[kStrideN], h[kStrideJ],
        h[kStrideC]};
    args.score.k = h[kNeighbours];
    args.score.mask = mask.as<bool>();
    args.score.noise = noise.as<double>();
    args.score.density = density.as<double>();
    args.score.distance = distance.as<double>();
    args.score.score = score.as<double>();
    args.score.parent = parent.as<int64_t>();
    args.K = h[kKept];
    args.keep = keep.as<int64_t>();
    args.keep_rows = h[kKeepRows];
    args.M = h[kM];
    args.index = index.as<int64_t>();

    const h2ot::cuda::Problem problem = {
        B, N, h[kJ], h[kC], h[kNeighbours], h2ot::Dtype(h[kDtype]), h2ot::cuda::readable_in_place(args.score.x)};
    const h2ot::cuda::Machine device = {9, 0, int32_t(h[kMultiprocessors])};
    const Plan plan = h[kSearch] < 0
                          ? plan_score(problem, device)
                          : plan_score_as(problem, device, h2ot::cuda::Search(h[kSearch]),
                                          h2ot::cuda::Distance(h[kDistance]), h[kSamples], int32_t(h[kSide]));
    const Room workspace(plan, h[kSeed]);
    const int64_t error = launch_score(args, plan, workspace.data, nullptr);
    out.write(reinterpret_cast<const char*>(&error), sizeof error);
    for (const Buffer* buffer : {&density, &distance, &score, &parent, &index}) buffer->write(out);
  }
  return 0;
}
