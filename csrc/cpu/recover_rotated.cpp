// The end of a recovery module at half its projection (launch.h: RecoverRotatedArgs): LayerNorm and a linear head need
// a row's squares and its products with M vectors, which no rotation of the channels changes. In the channels of a QR
// decomposition the projection is a triangle, and the projected rows are never written.
// Count: C (C + 1) / 2 + C (M + 1) multiply-adds a row, by the register tiles of attention.
#include "kernels.h"
#include "product.h"
#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kBlock = 4 * kTileRows;  // rows that meet a panel one after the other
constexpr int kVectors = kRotatedPanel / kLanes<float>;

// What one thread keeps for a block: the products of a panel, and of each row the lanes of its squares and of its
// products with the head.
struct Block {
  float *product, *sums;
  int64_t width;  // of a row's sums

  static int64_t width_of(int64_t M) { return (1 + M) * kLanes<float>; }
  static int64_t bytes(int64_t M) { return kBlock * (kRotatedPanel + width_of(M)) * int64_t(sizeof(float)); }
  Block(void* memory, int64_t M)
      : product(static_cast<float*>(memory)), sums(product + kBlock * kRotatedPanel), width(width_of(M)) {}
};

// Adds a panel's channels of one row, token included, to the row's sums.
H2OT_INLINE void add_channels(const float* product, const float* token, const float* head, int64_t head_step, int64_t M,
                              float* sums) {
  constexpr int L = kLanes<float>;
  Floats z[kVectors], square = load(sums);
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; v++) {
    z[v] = load(product + v * L) + load(token + v * L);
    square += z[v] * z[v];
  }
  store(sums, square);
  for (int64_t m = 0; m < M; m++) {
    Floats dot = load(sums + (1 + m) * L);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) dot += z[v] * load(head + m * head_step + v * L);
    store(sums + (1 + m) * L, dot);
  }
}

void run_block(const RecoverRotatedArgs& a, int64_t first, int64_t rows, int64_t width, const Block& block) {
  constexpr int L = kLanes<float>;
  memset(block.sums, 0, size_t(rows * block.width) * sizeof(float));
  const float* triangle = a.triangle;
  for (int64_t c = 0; c < a.C; c += kRotatedPanel) {
    const int64_t depth = a.C - c;
    product(rows, kVectors, depth, a.attended + first * a.C + c, a.C, 1, triangle, kRotatedPanel,
            WriteTo<float>{block.product, kRotatedPanel});
    triangle += depth * kRotatedPanel;
    for (int64_t r = 0; r < rows; r++) {
      add_channels(block.product + r * kRotatedPanel, a.token + (first + r) % a.F * width + c, a.head + c, width, a.M,
                   block.sums + r * block.width);
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    const float* const sums = block.sums + r * block.width;
    const float scale = 1 / float(__builtin_sqrt(double(sum_lanes<float>(load(sums))) / double(a.C) + a.eps));
    float* const out = a.out + (first + r) * a.M;
    for (int64_t m = 0; m < a.M; m++) out[m] = sum_lanes<float>(load(sums + (1 + m) * L)) * scale + a.bias[m];
  }
}

}  // namespace

Status recover_rotated(const RecoverRotatedArgs& a, const Parallel& pool) {
  const int64_t rows = a.R * a.F, width = (a.C + kRotatedPanel - 1) / kRotatedPanel * kRotatedPanel;
  Outcome outcome;
  parallel_for(pool, (rows + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    void* const memory = scratch(Slot::own, Block::bytes(a.M));
    if (!memory) return outcome.fail(Status::out_of_memory);
    for (int64_t b = begin; b < end; b++) {
      const int64_t first = b * kBlock;
      run_block(a, first, rows - first < kBlock ? rows - first : kBlock, width, Block(memory, a.M));
    }
  });
  return outcome.result();
}

}  // namespace H2OT_ISA
}  // namespace h2ot
