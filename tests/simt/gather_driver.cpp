// Runs launch_gather and launch_scatter in the simulator for every record of a file: gather_driver IN OUT.
// tests/simt/gather.py writes IN and reads OUT. `gather_driver divide` compares division by a product with `/`.
//
// A record: kHeader int64 (below), then the bytes of x (a whole buffer, strided as the header says), index, embedding.
// Its result: one int64 error, then the output.
#include <fstream>
#include <iostream>
#include <string>

#include "buffer.h"
#include "cuda/gather.cu"

namespace {

enum Field {
  kScatter,
  kSeed,
  kDtype,
  kDims,
  kFrameAxis,
  kFrames,  // of x; scattering: kept frames in it
  kIndexRows,
  kKept,
  kEmbedded,
  kBytes,
  kOutBytes,
  kOutOffset,  // bytes: where the output begins in its buffer
  kWide,       // numbers of 64 bits, as for 2^31 units and more
  kSize,
  kStride = kSize + h2ot::kMaxDims,
  kHeader = kStride + h2ot::kMaxDims
};

template <class Args>
void shape(Args& args, const int64_t* h) {
  args.dtype = h2ot::Dtype(h[kDtype]);
  args.dims = int32_t(h[kDims]);
  args.frame_axis = int32_t(h[kFrameAxis]);
  args.index_rows = h[kIndexRows];
  for (int axis = 0; axis < args.dims; axis++) {
    args.size[axis] = h[kSize + axis];
    args.stride[axis] = h[kStride + axis];
  }
}

int check_division() {
  using namespace h2ot::cuda;
  const int64_t limit = int64_t(1) << 31;
  for (int64_t by = 1; by < limit; by += 1 + by / 64 * (by % 7 + 1)) {
    const Divisor divisor = divisor_of(by);
    for (const int64_t around : {int64_t(0), by, 2 * by, limit / by * by, limit / 2 / by * by, limit - 1}) {
      for (int64_t n = around - 2; n <= around + 2; n++) {
        if (n < 0 || n >= limit || divide(uint32_t(n), divisor) == uint32_t(n / by)) continue;
        std::cerr << n << " / " << by << "\n";
        return 1;
      }
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && argv[1] == std::string("divide")) return check_division();
  if (argc != 3) {
    std::cerr << "gather_driver IN OUT | gather_driver divide\n";
    return 2;
  }
  std::ifstream in(argv[1], std::ios::binary);
  std::ofstream out(argv[2], std::ios::binary);
  int64_t h[kHeader];
  while (in.read(reinterpret_cast<char*>(h), sizeof h)) {
    const int64_t last = h[kSize + h[kDims] - 1], item = h[kDtype] == 1 ? 8 : h[kDtype] == 0 ? 4 : 2;
    Buffer x(h[kBytes]), index(h[kIndexRows] * h[kKept] * 8), embed(h[kEmbedded] ? h[kKept] * last * item : 0);
    for (Buffer* buffer : {&x, &index, &embed}) buffer->read(in);
    if (!in) {
      std::cerr << "gather_driver: " << argv[1] << " ends within a record\n";
      return 2;
    }
    Buffer result(h[kOutBytes] + h[kOutOffset]);
    simt::machine.random = uint64_t(h[kSeed]) * 0x9e3779b97f4a7c15u + 1;
    h2ot::cuda::least_wide = h[kWide] ? 0 : int64_t(1) << 31;
    int64_t error = 0;
    if (h[kScatter]) {
      h2ot::ScatterArgs args = {};
      shape(args, h);
      args.grad = x.data;
      args.K = h[kKept];
      args.index = index.as<int64_t>();
      args.out = result.data + h[kOutOffset];
      error = h2ot::cuda::launch_scatter(args, nullptr, true);
    } else {
      h2ot::GatherArgs args = {};
      shape(args, h);
      args.x = x.data;
      args.F = h[kFrames];
      args.index = index.as<int64_t>();
      args.pos_embed = embed.data;
      args.out = result.data + h[kOutOffset];
      error = h2ot::cuda::launch_gather(args, nullptr, true);
    }
    out.write(reinterpret_cast<const char*>(&error), sizeof error);
    out.write(reinterpret_cast<const char*>(result.data) + h[kOutOffset], h[kOutBytes]);
  }
  return 0;
}
