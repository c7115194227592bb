// The recovery tail in rotated channels (csrc/cpu/recover_rotated.cpp) in bfloat16, by products of pairs: kRows rows
// meet a panel of the triangle.
#include "../cpu/rotated.h"
#include "../cpu/worker.h"
#include "half_products.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kRows = 2 * kSide;
static_assert(kRotatedPanel == kSumsStep && kRotatedPanel == kStepHalves && kRotatedTile == 2 * kTileHalves);

// What a thread works in.
struct Arrays {
  uint16_t* rows;   // [2][steps][kSide][kStepHalves]
  float* products;  // [kRows][kRotatedPanel]
  float* sums;      // [kRows][sums_width]

  Arrays(Carver& memory, int64_t steps, int64_t M) {
    rows = memory.take<uint16_t>(2 * steps * kTileHalves);
    products = memory.take<float>(kRows * kRotatedPanel);
    sums = memory.take<float>(kRows * sums_width(M));
  }
};

void run_block(const RecoverRotatedArgs& a, int64_t first, int64_t count, int64_t steps, const Arrays& at) {
  const int64_t width = sums_width(a.M);
  const uint16_t* triangle = static_cast<const uint16_t*>(a.triangle);
  pack_rows(static_cast<const uint16_t*>(a.attended) + first * a.C, a.C, count, a.C, 2, steps, at.rows);
  memset(at.sums, 0, size_t(count * width) * sizeof(float));
  for (int64_t s = 0; s < steps; s++) {
    const int64_t c = s * kRotatedPanel;
    multiply<2>(at.rows + s * kTileHalves, steps * kTileHalves, triangle, kTileHalves, 2 * kTileHalves,
                groups_of(a.C - c, 2), at.products);
    triangle += (steps - s) * kRotatedTile;
    for (int64_t r = 0; r < count; r++) {
      add_channels(a, first + r, c, at.products + r * kRotatedPanel, at.sums + r * width);
    }
  }
  for (int64_t r = 0; r < count; r++) finish_row<BFloat16>(a, first + r, at.sums + r * width);
}

}  // namespace

Status recover_rotated(const RecoverRotatedArgs& a, const Parallel& pool) {
  const int64_t rows = a.R * a.F, steps = groups_of(a.C, kStepHalves);
  Outcome outcome;
  parallel_for(pool, groups_of(rows, kRows), 1, [&](int64_t begin, int64_t end) {
    Carver sizes(nullptr);
    Arrays(sizes, steps, a.M);
    void* const memory = scratch(Slot::own, sizes.bytes());
    if (!memory) return outcome.fail(Status::out_of_memory);
    Carver carver(memory);
    const Arrays at(carver, steps, a.M);
    [[maybe_unused]] const ProductRegisters registers = {};
    for (int64_t first = begin * kRows; first < end * kRows && first < rows; first += kRows) {
      run_block(a, first, rows - first < kRows ? rows - first : kRows, steps, at);
    }
  });
  return outcome.result();
}

}  // namespace H2OT_ISA
}  // namespace h2ot
