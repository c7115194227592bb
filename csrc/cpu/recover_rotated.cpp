// Recovery by attention with the end of its module at half the projection (launch.h: RecoverRotatedArgs): LayerNorm and
// a linear head need a row's squares and its products with M vectors, which no rotation of the channels changes. In the
// channels of a QR decomposition the projection is a triangle. Neither attended nor projected rows are ever stored.
// Count: C (C + 1) / 2 + C (M + 1) multiply-adds a row beside the attention, by the register tiles of that.
#include "kernels.h"
#include "product.h"
#include "rotated.h"
#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kBlock = 48;  // rows that meet a panel one after the other
static_assert(kBlock % kTileRows == 0);

// attended [rows][C] of sample b from query `first` on; products [kBlock][kRotatedPanel], sums [kBlock][sums_width].
void run_block(const RecoverRotatedArgs& a, int64_t b, int64_t first, int64_t rows, const float* attended,
               float* products, float* sums) {
  const float* triangle = static_cast<const float*>(a.triangle);
  const int64_t C = a.attention.C, width = sums_width(a.M);
  memset(sums, 0, size_t(rows * width) * sizeof(float));
  for (int64_t c = 0; c < C; c += kRotatedPanel) {
    const int64_t depth = C - c;
    product(rows, kRotatedVectors, depth, attended + c, C, Fixed<1>(), triangle, Fixed<kRotatedPanel>(),
            WriteTo<float>{products, kRotatedPanel});
    triangle += depth * kRotatedPanel;
    add_panel(a, first, rows, c, products, sums);
  }
  for (int64_t r = 0; r < rows; r++) finish_row<float>(a, b, first + r, sums + r * width);
}

Status rotate(const RecoverRotatedArgs& a, int64_t b, int64_t first, int64_t count, const void* rows) {
  const int64_t floats = kBlock * (kRotatedPanel + sums_width(a.M));
  float* const products = static_cast<float*>(scratch(Slot::taker, floats * int64_t(sizeof(float))));
  if (!products) return Status::out_of_memory;
  const float* const attended = static_cast<const float*>(rows);
  for (int64_t r = 0; r < count; r += kBlock) {
    const int64_t here = count - r < kBlock ? count - r : kBlock;
    run_block(a, b, first + r, here, attended + r * a.attention.C, products, products + kBlock * kRotatedPanel);
  }
  return Status::ok;
}

}  // namespace

Status recover_rotated(const RecoverRotatedArgs& a, const Parallel& pool) {
  return rotate_attended<rotate>(a, pool, recover_attention);
}

}  // namespace H2OT_ISA
}  // namespace h2ot
