// The end of a recovery module at half its projection (launch.h: RecoverRotatedArgs): LayerNorm and a linear head need
// a row's squares and its products with M vectors, which no rotation of the channels changes. In the channels of a QR
// decomposition the projection is a triangle, and the projected rows are never written.
// Count: C (C + 1) / 2 + C (M + 1) multiply-adds a row, by the register tiles of attention.
#include "kernels.h"
#include "rotated.h"
#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kBlock = 4 * kTileRows;  // rows that meet a panel one after the other

// products [kBlock][kRotatedPanel], sums [kBlock][sums_width].
void run_block(const RecoverRotatedArgs& a, int64_t first, int64_t rows, float* products, float* sums) {
  const float* const attended = static_cast<const float*>(a.attended) + first * a.C;
  const float* triangle = static_cast<const float*>(a.triangle);
  const int64_t width = sums_width(a.M);
  memset(sums, 0, size_t(rows * width) * sizeof(float));
  for (int64_t c = 0; c < a.C; c += kRotatedPanel) {
    const int64_t depth = a.C - c;
    product(rows, kRotatedVectors, depth, attended + c, a.C, 1, triangle, kRotatedPanel,
            WriteTo<float>{products, kRotatedPanel});
    triangle += depth * kRotatedPanel;
    for (int64_t r = 0; r < rows; r++) add_channels(a, first + r, c, products + r * kRotatedPanel, sums + r * width);
  }
  for (int64_t r = 0; r < rows; r++) finish_row<float>(a, first + r, sums + r * width);
}

}  // namespace

Status recover_rotated(const RecoverRotatedArgs& a, const Parallel& pool) {
  const int64_t rows = a.R * a.F, floats = kBlock * (kRotatedPanel + sums_width(a.M));
  Outcome outcome;
  parallel_for(pool, (rows + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    float* const products = static_cast<float*>(scratch(Slot::own, floats * int64_t(sizeof(float))));
    if (!products) return outcome.fail(Status::out_of_memory);
    for (int64_t first = begin * kBlock; first < end * kBlock && first < rows; first += kBlock) {
      const int64_t count = rows - first < kBlock ? rows - first : kBlock;
      run_block(a, first, count, products, products + kBlock * kRotatedPanel);
    }
  });
  return outcome.result();
}

}  // namespace H2OT_ISA
}  // namespace h2ot
