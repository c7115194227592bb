// Recovery with its tail in rotated channels (csrc/cpu/recover_rotated.cpp) in bfloat16, by products of pairs: kRows
// rows meet a panel of the triangle.
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

// attended [count][C] of sample b from query `first` on.
void run_block(const RecoverRotatedArgs& a, int64_t b, int64_t first, int64_t count, const uint16_t* attended,
               int64_t steps, const Arrays& at) {
  const int64_t C = a.attention.C, width = sums_width(a.M);
  const uint16_t* triangle = static_cast<const uint16_t*>(a.triangle);
  pack_rows(attended, C, count, C, 2, steps, at.rows);
  memset(at.sums, 0, size_t(count * width) * sizeof(float));
  for (int64_t s = 0; s < steps; s++) {
    const int64_t c = s * kRotatedPanel;
    multiply<2>(at.rows + s * kTileHalves, steps * kTileHalves, triangle, kTileHalves, 2 * kTileHalves,
                groups_of(C - c, 2), at.products);
    triangle += (steps - s) * kRotatedTile;
    add_panel(a, first, count, c, at.products, at.sums);
  }
  for (int64_t r = 0; r < count; r++) finish_row<BFloat16>(a, b, first + r, at.sums + r * width);
}

Status rotate(const RecoverRotatedArgs& a, int64_t b, int64_t first, int64_t count, const void* rows) {
  const int64_t C = a.attention.C, steps = groups_of(C, kStepHalves);
  Carver sizes(nullptr);
  Arrays(sizes, steps, a.M);
  void* const memory = scratch(Slot::taker, sizes.bytes());
  if (!memory) return Status::out_of_memory;
  Carver carver(memory);
  const Arrays at(carver, steps, a.M);
  [[maybe_unused]] const ProductRegisters registers = {};
  for (int64_t r = 0; r < count; r += kRows) {
    const uint16_t* const attended = static_cast<const uint16_t*>(rows) + r * C;
    run_block(a, b, first + r, count - r < kRows ? count - r : kRows, attended, steps, at);
  }
  return Status::ok;
}

}  // namespace

Status rotated_halves(const RecoverRotatedArgs& a, const Parallel& pool) {
  return rotate_attended<rotate>(a, pool, h2ot::attend);
}

}  // namespace H2OT_ISA
}  // namespace h2ot
