// Linear layers in float32 on the tile unit of recent x86 processors (AMX).
//
// A tile instruction does 16 x 16 x 32 multiply-adds in 16 cycles, in which the vector units do 16 x 2 x 16: six of
// them (tiles.h) take 3 / 8 of the vector units' time. Counted per 32 x 32 outputs and 32 channels: 24 instructions of
// 16 cycles, beside them 14 loads of 1 KB, from the second-level cache at worst (36 bytes a cycle). A product is
// finished (bias, activation, residual) beside the next one.
#include "../cpu/worker.h"
#include "gelu.h"
#include "tiles.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kBlockBytes = 768 << 10;  // the rows of a block, in the second-level cache

int64_t groups_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Activation and residual of a vector of sums with their bias.
H2OT_INLINE Floats finished(const LinearArgs& a, Floats v, const float* residual, int64_t count) {
  if (a.activation == Activation::gelu) v = gelu(v);
  return residual ? v + load_some(residual, count) : v;
}
// The same with bias, into a row; nothing beyond its last output.
H2OT_INLINE void put_out(const LinearArgs& a, int64_t row, int64_t chunk, int64_t column, Floats v) {
  const int64_t count = a.M - column < kFloats ? a.M - column : kFloats, at = (chunk * a.rows + row) * a.M + column;
  if (count <= 0) return;
  if (a.bias) v += load_some(a.bias + chunk * a.M + column, count);
  v = finished(a, v, a.residual ? a.residual + at : nullptr, count);
  if (count == kFloats) {
    store(a.out + at, v);
  } else {
    store_part(a.out + at, v, count);
  }
}

// A product of kGroup rows and outputs, that is to be finished.
struct Pending {
  float* sums = nullptr;
  int64_t row = 0, rows = 0, chunk = 0, column = 0;
};

// Rows [begin, end) of it. Few instructions: they take the place of tile instructions that wait for their turn.
H2OT_INLINE void finish(const LinearArgs& a, const Pending& of, int64_t begin, int64_t end) {
  if (end > of.rows) end = of.rows;
  if (of.column + kGroup > a.M) {
    for (int64_t r = begin; r < end; r++) {
      const float* const at = of.sums + (r / kSide * 2 * kSide + r % kSide) * kSide;
      put_out(a, of.row + r, of.chunk, of.column, load(at));
      put_out(a, of.row + r, of.chunk, of.column + kSide, load(at + kSide * kSide));
    }
    return;
  }
  const float* const bias = a.bias ? a.bias + of.chunk * a.M + of.column : nullptr;
  const Floats first = bias ? load(bias) : Floats{}, second = bias ? load(bias + kFloats) : Floats{};
  int64_t at = (of.chunk * a.rows + of.row + begin) * a.M + of.column;
  for (int64_t r = begin; r < end; r++, at += a.M) {
    const float* const sums = of.sums + (r / kSide * 2 * kSide + r % kSide) * kSide;
    const float* const residual = a.residual ? a.residual + at : nullptr;
    const Floats left = finished(a, load(sums) + first, residual, kFloats);
    const Floats right =
        finished(a, load(sums + kSide * kSide) + second, residual ? residual + kFloats : nullptr, kFloats);
    store(a.out + at, left);
    store(a.out + at + kFloats, right);
  }
}

// The lines that finish() reads and writes: they come while the product is made.
H2OT_INLINE void ask_for_out(const LinearArgs& a, const Pending& of) {
  for (int64_t r = 0; r < of.rows; r++) {
    const int64_t at = (of.chunk * a.rows + of.row + r) * a.M + of.column;
    for (int64_t c = 0; c < kGroup && of.column + c < a.M; c += kFloats) {
      __builtin_prefetch(a.out + at + c, 1);
      if (a.residual) __builtin_prefetch(a.residual + at + c);
    }
  }
}

// Rows [row, row + kGroup) of x as tiles [steps][kStep], zeros for rows that are not there or cannot be split. Tile by
// tile, so that memory is written in order. Returns whether a row could not be split.
bool put_group(const LinearArgs& a, int64_t row, uint16_t* tiles) {
  const float* const x = a.x + row * a.C;
  bool fits[kGroup], all = true;
  for (int64_t r = 0; r < kGroup; r++) {
    fits[r] = row + r < a.rows && can_split(x + r * a.C, a.C);
    all = all && (fits[r] || row + r >= a.rows);
  }
  for (int64_t c = 0; c < a.C; c += kDepth, tiles += kStep) {
    for (int64_t r = 0; r < kGroup; r++) {
      uint16_t* const to = tiles + r * kDepth;
      if (fits[r]) {
        put_step(x + r * a.C, a.C, c, to);
      } else {
        for (int p = 0; p < kPieces; p++) memset(to + p * 2 * kTile, 0, kDepth * sizeof *to);
      }
    }
  }
  return !all;
}

// The place of weight (m, c) in its panel's tiles: its pieces are 2 kTile apart.
H2OT_INLINE int64_t place(int64_t m, int64_t c) {
  return c / kDepth * kStep + m / kSide * kTile + c % kDepth / 2 * kDepth + m % kSide * 2 + c % 2;
}

// A row that cannot be split, by multiply-adds in the order of the channels.
void plain_row(const LinearArgs& a, int64_t row, int64_t steps, int64_t panels) {
  const float* const x = a.x + row * a.C;
  for (int64_t panel = 0; panel < a.chunks * panels; panel++) {
    const uint16_t* const b = a.packed + panel * steps * kStep;
    for (int64_t first = 0; first < kGroup; first += kFloats) {
      Floats sum = {};
      for (int64_t c = 0; c < a.C; c++) {
        Floats weight = {};
        for (int p = kPieces - 1; p >= 0; p--) {
          for (int lane = 0; lane < kFloats; lane++) {
            weight[lane] += widen(BFloat16{b[place(first + lane, c) + p * 2 * kTile]});
          }
        }
        sum += x[c] * weight;
      }
      put_out(a, row, panel / panels, panel % panels * kGroup + first, sum);
    }
  }
}

// The groups [begin, end) of kGroup rows each, which fit a block.
void run_block(const LinearArgs& a, int64_t begin, int64_t end, uint16_t* tiles, float* sums) {
  const int64_t steps = groups_of(a.C, kDepth), panels = groups_of(a.M, kGroup), per_group = steps * kStep;
  const int64_t share = groups_of(kGroup, steps);
  bool plain = false;
  for (int64_t group = begin; group < end; group++) {
    plain |= put_group(a, group * kGroup, tiles + (group - begin) * per_group);
  }
  Pending before;
  for (int64_t panel = 0; panel < a.chunks * panels; panel++) {
    for (int64_t group = begin; group < end; group++) {
      const int64_t row = group * kGroup, left = a.rows - row;
      const Pending now = {before.sums == sums ? sums + kSums : sums, row, left < kGroup ? left : kGroup,
                           panel / panels, panel % panels * kGroup};
      ask_for_out(a, now);
      multiply(tiles + (group - begin) * per_group, a.packed + panel * per_group, steps, now.sums,
               [&](int64_t s) { finish(a, before, s * share, (s + 1) * share); });
      before = now;
    }
  }
  finish(a, before, 0, kGroup);
  for (int64_t row = begin * kGroup; plain && row < end * kGroup && row < a.rows; row++) {
    if (!can_split(a.x + row * a.C, a.C)) plain_row(a, row, steps, panels);
  }
}

}  // namespace

int64_t packed_size(const PackArgs& a) { return a.chunks * groups_of(a.M, kGroup) * groups_of(a.C, kDepth) * kStep; }

void pack(const PackArgs& a) {
  const int64_t steps = groups_of(a.C, kDepth), panels = groups_of(a.M, kGroup);
  memset(a.packed, 0, size_t(packed_size(a)) * sizeof *a.packed);
  for (int64_t row = 0; row < a.chunks * a.M; row++) {
    const int64_t m = row % a.M;
    uint16_t* const panel = a.packed + (row / a.M * panels + m / kGroup) * steps * kStep;
    for (int64_t c = 0; c < a.C; c++) {
      float rest = a.weight[row * a.C + c];
      for (int p = 0; p < kPieces; p++) {
        BFloat16 piece;
        narrow(rest, piece);
        rest -= widen(piece);
        panel[place(m % kGroup, c) + p * 2 * kTile] = piece.bits;
      }
    }
  }
}

Status linear(const LinearArgs& a, const Parallel& pool) {
  const int64_t group_bytes = groups_of(a.C, kDepth) * kStep * int64_t(sizeof(uint16_t));
  const int64_t most = kBlockBytes / group_bytes ? kBlockBytes / group_bytes : 1;
  Outcome outcome;
  parallel_for(pool, groups_of(a.rows, kGroup), 1, [&](int64_t begin, int64_t end) {
    const int64_t size = groups_of(end - begin, groups_of(end - begin, most));
    constexpr int64_t kSumsBytes = 2 * kSums * int64_t(sizeof(float));
    char* const memory = static_cast<char*>(scratch(Slot::own, kSumsBytes + size * group_bytes));
    if (!memory) return outcome.fail(Status::out_of_memory);
    const TileRegisters registers;
    for (int64_t first = begin; first < end; first += size) {
      run_block(a, first, first + size < end ? first + size : end, reinterpret_cast<uint16_t*>(memory + kSumsBytes),
                reinterpret_cast<float*>(memory));
    }
  });
  return outcome.result();
}

}  // namespace H2OT_ISA
}  // namespace h2ot
