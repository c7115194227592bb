// Linear layers in float32 on the tile unit of recent x86 processors (AMX).
//
// A tile instruction does 16 x 16 x 64 multiply-adds of bytes in 16 cycles, in which the vector units do 16 x 2 x 16
// of floats: six of them (tiles.h) take 3 / 16 of the vector units' time. Counted per 32 x 16 outputs and 64 channels:
// 12 instructions of 16 cycles, beside them 18 loads of 1 KB, of which six are rows from the second-level cache: the
// weights of kSide outputs stay in the first while the rows of a block pass by. A product is finished (digits joined,
// scales, bias, activation, residual) while the next one is made.
#include "../cpu/gelu.h"
#include "../cpu/worker.h"
#include "digits.h"
#include "norm.h"
#include "tiles.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kBlockBytes = 384 << 10;  // the rows of a block, in the second-level cache
constexpr float kScale = 0x1p16f;           // of a row: a sum of order 2 counts its square
constexpr int64_t kSpread = 16;             // floats behind the scales: the weights' spread, and room

// What pack() makes: digits [chunks][panels][steps][kWeightStep], scales [chunks][panels][kSide], the spread.
struct Packed {
  int64_t steps, panels;

  Packed(int64_t M, int64_t C) : steps(groups_of(C, kDepth)), panels(groups_of(M, kSide)) {}
  int64_t digits(int64_t chunks) const { return chunks * panels * steps * kWeightStep; }
  int64_t bytes(int64_t chunks) const {
    return digits(chunks) + (chunks * panels * kSide + kSpread) * int64_t(sizeof(float));
  }
  // Of output m of a panel at channel c; the digits are kTile apart.
  static int64_t place(int64_t m, int64_t c) {
    const int64_t i = c % kSide, v = c % kDepth / kSide;
    return c / kDepth * kWeightStep + i * kDepth + m * 4 + v;
  }
};

// A thread's block of rows.
struct Rows {
  int64_t first, count, groups;
  int8_t* digits;  // [groups][steps][kRowStep]
  float* scale;    // [groups][kGroup]: of sums of order 2
  float* low;      // [groups][kGroup]: what a sum of order 3 counts, 1 / 256 or 0
  bool* has_low;   // [groups]: whether one of it is not 0
  float* normed;   // [kGroup][C], where there is a norm
};

// A product that is to be finished.
struct Pending {
  const int32_t* sums = nullptr;
  int64_t row = 0, rows = 0;  // of the block
  int64_t chunk = 0, column = 0;
  Floats scale = {}, bias = {};
  bool has_low = false;
};

// Activation and residual of a vector of sums with their bias.
H2OT_INLINE Floats finished(const LinearArgs& a, Floats v, const float* residual, int64_t count) {
  if (a.activation == Activation::gelu) v = gelu(v);
  return residual ? v + load_some(residual, count) : v;
}
H2OT_INLINE int64_t place_of(const LinearArgs& a, int64_t row, int64_t chunk, int64_t column) {
  return (chunk * a.rows + row) * a.M + column;
}
// The same into a row; nothing beyond its last output.
H2OT_INLINE void put_out(const LinearArgs& a, int64_t at, int64_t count, Floats v) {
  v = finished(a, v, a.residual ? a.residual + at : nullptr, count);
  if (count >= kFloats) {
    store(a.out + at, v);
  } else {
    store_part(a.out + at, v, count);
  }
}

H2OT_INLINE Floats numbers(const int32_t* sums, int64_t order) {
  Words whole;
  memcpy(&whole, sums + order * kGroup * kSide, sizeof whole);
  return reinterpret_cast<Floats>(_mm512_maskz_cvtepi32_ps(kAll, reinterpret_cast<__m512i>(whole)));
}

// Rows [begin, end) of it. Few instructions: they take the place of tile instructions that wait for their turn.
H2OT_INLINE void finish(const LinearArgs& a, const Rows& rows, const Pending& of, int64_t begin, int64_t end) {
  if (end > of.rows) end = of.rows;
  const int64_t count = a.M - of.column;
  int64_t at = place_of(a, rows.first + of.row + begin, of.chunk, of.column);
  for (int64_t r = begin; r < end; r++, at += a.M) {
    const int32_t* const sums = of.sums + r * kSide;
    Floats v = numbers(sums, 0);
    v = v * 256.0f + numbers(sums, 1);
    v = v * 256.0f + numbers(sums, 2);
    if (of.has_low) v += rows.low[of.row + r] * numbers(sums, 3);
    put_out(a, at, count, v * rows.scale[of.row + r] * of.scale + of.bias);
  }
}

// The lines that finish() writes and reads: they come while the product is made.
H2OT_INLINE void ask_for_out(const LinearArgs& a, const Rows& rows, const Pending& of) {
  int64_t at = place_of(a, rows.first + of.row, of.chunk, of.column);
  for (int64_t r = 0; r < of.rows; r++, at += a.M) {
    __builtin_prefetch(a.out + at, 1);
    if (a.residual) __builtin_prefetch(a.residual + at);
  }
}

struct Row {
  const float* x = nullptr;
  Extent extent = {};
};
// Row `row` of x, normed into `to` where there is a norm.
H2OT_INLINE Row row_of(const LinearArgs& a, int64_t row, float* to) {
  const float* const x = a.x + row * a.C;
  if (!a.has_norm) return {x, extent_of(x, a.C)};
  return {to, norm_row(x, a.C, a.norm_weight, a.norm_bias, a.eps, to)};
}

// Group g as tiles; zeros for rows that are not there or have no digits. Returns whether a row has none.
bool put_group(const LinearArgs& a, const Packed& p, float spread, const Rows& rows, int64_t g) {
  const float* x[kGroup];
  float to_whole[kGroup];
  bool all = true;
  rows.has_low[g] = false;
  for (int64_t r = 0; r < kGroup; r++) {
    const int64_t row = g * kGroup + r;
    const Row of = row < rows.count ? row_of(a, rows.first + row, rows.normed + r * a.C) : Row{};
    const Extent extent = of.extent;
    x[r] = of.x;
    const bool has_digits = extent.has_digits();
    all = all && has_digits;
    to_whole[r] = has_digits && extent.largest != 0 ? kWhole / extent.largest : 0;
    rows.scale[row] = to_whole[r] != 0 ? kScale / to_whole[r] : 0;
    const bool has_low = to_whole[r] != 0 && extent.spread() * spread > kMostSpread * kMostSpread;
    rows.low[row] = has_low ? 1.0f / 256 : 0;
    rows.has_low[g] |= has_low;
  }
  int8_t* tiles = rows.digits + g * p.steps * kRowStep;
  for (int64_t c = 0; c < a.C; c += kDepth, tiles += kRowStep) {
    for (int64_t r = 0; r < kGroup; r++) {
      int8_t* const to = tiles + r * kDepth;
      if (to_whole[r] != 0) {
        put_digits(x[r], a.C, c, to_whole[r], rows.has_low[g], to, 2 * kTile);
      } else {
        for (int d = 0; d < kRowDigits; d++) memset(to + d * 2 * kTile, 0, kDepth);
      }
    }
  }
  return !all;
}

H2OT_INLINE Floats bias_of(const LinearArgs& a, int64_t chunk, int64_t column) {
  return a.bias ? load_some(a.bias + chunk * a.M + column, a.M - column) : Floats{};
}

// A row without digits, by multiply-adds in the order of the channels.
void plain_row(const LinearArgs& a, const Packed& p, const float* scales, const float* x, int64_t row) {
  for (int64_t panel = 0; panel < a.chunks * p.panels; panel++) {
    const int8_t* const b = a.packed + panel * p.steps * kWeightStep;
    const Floats scale = load(scales + panel * kSide) * (256 / kScale);
    const int64_t chunk = panel / p.panels, column = panel % p.panels * kSide;
    Floats sum = {};
    for (int64_t c = 0; c < a.C; c++) {
      Floats weight = {};
      for (int lane = 0; lane < kFloats; lane++) {
        const int8_t* const digits = b + Packed::place(lane, c);
        weight[lane] = float((digits[0] * 256 + digits[kTile]) * 256 + digits[2 * kTile]);
      }
      sum += x[c] * (weight * scale);
    }
    put_out(a, place_of(a, row, chunk, column), a.M - column, sum + bias_of(a, chunk, column));
  }
}

void run_block(const LinearArgs& a, const Packed& p, const Rows& rows, int32_t* sums) {
  const float* const scales = reinterpret_cast<const float*>(a.packed + p.digits(a.chunks));
  const float spread = scales[a.chunks * p.panels * kSide];
  // Beside a product where there is much to do, else after it.
  const int64_t share = a.activation == Activation::none ? 0 : groups_of(kGroup, 4 * p.steps);
  bool plain = false;
  for (int64_t g = 0; g < rows.groups; g++) plain |= put_group(a, p, spread, rows, g);
  Pending before;
  for (int64_t panel = 0; panel < a.chunks * p.panels; panel++) {
    Pending now;
    now.chunk = panel / p.panels;
    now.column = panel % p.panels * kSide;
    now.scale = load(scales + panel * kSide);
    now.bias = bias_of(a, now.chunk, now.column);
    const int8_t* const weights = a.packed + panel * p.steps * kWeightStep;
    for (int64_t g = 0; g < rows.groups; g++) {
      const int8_t* const digits = rows.digits + g * p.steps * kRowStep;
      int32_t* const to = before.sums == sums ? sums + kSums : sums;
      now.sums = to;
      now.row = g * kGroup;
      now.rows = rows.count - now.row < kGroup ? rows.count - now.row : kGroup;
      now.has_low = rows.has_low[g];
      ask_for_out(a, rows, now);
      int64_t done = 0;
      multiply(digits, weights, p.steps, to, [&] {
        if (share) finish(a, rows, before, done, done + share);
        done += share;
      });
      finish(a, rows, before, done, kGroup);
      if (now.has_low) multiply_low(digits, weights, p.steps, to);
      before = now;
    }
  }
  finish(a, rows, before, 0, kGroup);
  for (int64_t row = rows.first; plain && row < rows.first + rows.count; row++) {
    const Row of = row_of(a, row, rows.normed);
    if (!of.extent.has_digits()) plain_row(a, p, scales, of.x, row);
  }
}

}  // namespace

int64_t packed_size(const PackArgs& a) { return Packed(a.M, a.C).bytes(a.chunks); }

void pack(const PackArgs& a) {
  const Packed p(a.M, a.C);
  memset(a.packed, 0, size_t(p.bytes(a.chunks)));
  float* const scales = reinterpret_cast<float*>(a.packed + p.digits(a.chunks));
  double spreads = 0;
  int64_t counted = 0;
  for (int64_t row = 0; row < a.chunks * a.M; row++) {
    const int64_t panel = row / a.M * p.panels + row % a.M / kSide, m = row % a.M % kSide;
    const float* const w = a.weight + row * a.C;
    const Extent extent = extent_of(w, a.C);
    if (extent.largest == 0) continue;
    const float to_whole = kWhole / extent.largest;
    for (int64_t c = 0; c < a.C; c += kDepth) {
      alignas(64) int8_t step[kWeightDigits * kTile];
      put_digits(w, a.C, c, to_whole, false, step, kTile);
      for (int64_t d = 0; d < kWeightDigits; d++) {
        for (int64_t i = 0; i < kSide; i++) {
          memcpy(a.packed + panel * p.steps * kWeightStep + d * kTile + Packed::place(m, c + i),
                 step + d * kTile + i * 4, 4);
        }
      }
    }
    scales[panel * kSide + m] = kScale / to_whole;
    spreads += double(extent.spread());
    counted++;
  }
  // r^2 s^2 of a token is its own spread() times this.
  scales[a.chunks * p.panels * kSide] = counted ? float(spreads / double(counted) * double(a.C * a.C)) : 0;
}

Status linear(const LinearArgs& a, const Parallel& pool) {
  const Packed p(a.M, a.C);
  constexpr int64_t kSumsBytes = 2 * kSums * int64_t(sizeof(int32_t));
  const int64_t normed_bytes = a.has_norm ? kGroup * a.C * int64_t(sizeof(float)) : 0;
  const int64_t digits = p.steps * kRowStep, group_bytes = digits + 2 * kGroup * int64_t(sizeof(float)) + 1;
  const int64_t most = kBlockBytes / group_bytes ? kBlockBytes / group_bytes : 1;
  Outcome outcome;
  parallel_for(pool, groups_of(a.rows, kGroup), 1, [&](int64_t begin, int64_t end) {
    const int64_t size = groups_of(end - begin, groups_of(end - begin, most));
    char* const memory = static_cast<char*>(scratch(Slot::own, kSumsBytes + size * group_bytes + normed_bytes));
    if (!memory) return outcome.fail(Status::out_of_memory);
    Rows rows;
    rows.digits = reinterpret_cast<int8_t*>(memory + kSumsBytes);
    rows.normed = reinterpret_cast<float*>(rows.digits + size * digits);
    rows.scale = rows.normed + normed_bytes / int64_t(sizeof(float));
    rows.low = rows.scale + size * kGroup;
    rows.has_low = reinterpret_cast<bool*>(rows.low + size * kGroup);
    const TileRegisters registers;
    for (int64_t first = begin; first < end; first += size) {
      const int64_t past = first + size < end ? first + size : end;
      rows.first = first * kGroup;
      rows.groups = past - first;
      rows.count = (past * kGroup < a.rows ? past * kGroup : a.rows) - rows.first;
      run_block(a, p, rows, reinterpret_cast<int32_t*>(memory));
    }
  });
  return outcome.result();
}

}  // namespace H2OT_ISA
}  // namespace h2ot
