// Runs launch_select in the simulator for every record of a file: select_driver IN OUT. tests/simt/select.py writes IN
// and reads OUT.
//
// A record: kHeader int64 (below), then score (float64), mask, keep (int64). Its result: one int64 error, then index.
#include <fstream>
#include <iostream>

#include "buffer.h"
#include "cuda/launch_cuda.h"

namespace {

enum Field { kSeed, kB, kN, kKept, kMasked, kKeepRows, kM, kHeader };

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "select_driver IN OUT\n";
    return 2;
  }
  std::ifstream in(argv[1], std::ios::binary);
  std::ofstream out(argv[2], std::ios::binary);
  int64_t h[kHeader];
  while (in.read(reinterpret_cast<char*>(h), sizeof h)) {
    const int64_t tokens = h[kB] * h[kN];
    Buffer score(tokens * 8), mask(h[kMasked] ? tokens : 0), keep(h[kKeepRows] * h[kM] * 8);
    for (Buffer* buffer : {&score, &mask, &keep}) buffer->read(in);
    if (!in) {
      std::cerr << "select_driver: " << argv[1] << " ends within a record\n";
      return 2;
    }
    Buffer index(h[kB] * h[kKept] * 8), keys(tokens * 8);
    const h2ot::SelectArgs args = {score.as<double>(), h[kB],        h[kN], h[kKept],           mask.as<bool>(),
                                   keep.as<int64_t>(), h[kKeepRows], h[kM], index.as<int64_t>()};
    simt::machine.random = uint64_t(h[kSeed]) * 0x9e3779b97f4a7c15u + 1;
    const int64_t error = h2ot::cuda::launch_select(args, keys.as<uint64_t>(), nullptr);
    out.write(reinterpret_cast<const char*>(&error), sizeof error);
    index.write(out);
  }
  return 0;
}
