// Linear layers in float32 on the tile unit of recent x86 processors (AMX).
//
// A tile instruction does 16 x 16 x 64 multiply-adds of bytes in 16 cycles, in which the vector units do 16 x 2 x 16
// of floats: six of them (tiles.h) take 3 / 16 of the vector units' time. Counted per 32 x 16 outputs and 64 channels:
// 12 instructions of 16 cycles, beside them 14 loads of 1 KB, of which six are rows from the second-level cache: the
// weights of kSide outputs stay in the first while the rows of a block pass by. A product is finished (digits joined,
// scales, bias, activation) while the next one is made. Results stay in the second-level cache until a block has a
// stretch of them: lines of memory that are written one here, one there, between products, cost three times as much.
#include "../cpu/gelu.h"
#include "digit_rows.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kStretch = 512;  // results of a row that are stored at once
constexpr int64_t kFewRows = 64;   // up to these the threads share the weights, which take longer to read, not the rows

// Results of a block: row r of the block stands at `at` + r `stride`, in whole panels.
struct Results {
  float* at;
  int64_t stride;

  Results(Carver& memory, int64_t M, int64_t halves) : stride(rounded_up(M, kSide) + kSide) {  // not a power of two
    at = memory.take<float>(halves * kSide * stride);
  }
};

// A product that is to be finished: `height` rows from `row` on, outputs of the results from `column` on.
struct Pending {
  const int32_t* sums = nullptr;
  int64_t row = 0, height = 0, column = 0;
  Floats scale = {}, bias = {};
  bool has_low = false;
};

// Rows [begin, end) of it.
template <bool kGelu>
H2OT_INLINE void finish(const DigitRows& rows, const Pending& of, const Results& to, int64_t begin, int64_t end) {
  float* out = to.at + (of.row + begin) * to.stride + of.column;
  for (int64_t r = begin; r < end; r++, out += to.stride) {
    const Floats v = joined(rows, of.row + r, of.sums + r * kSide, of.has_low, of.scale) + of.bias;
    store(out, kGelu ? gelu(v) : v);
  }
}

H2OT_INLINE Floats bias_of(const LinearTilesArgs& a, int64_t chunk, int64_t column) {
  return a.bias ? load_some(a.bias + chunk * a.M + column, a.M - column) : Floats{};
}

// Rows without digits: `width` results from `column` on.
template <bool kGelu>
void plain_rows(const LinearTilesArgs& a, const Packed& p, const DigitRows& rows, float* normed, int64_t chunk,
                int64_t column, int64_t width, const Results& to) {
  for (int64_t r = 0; rows.has_plain && r < rows.count; r++) {
    const float* x = rows.x + r * rows.stride;
    if (a.has_norm) norm_row(x, a.C, a.norm_weight, a.norm_bias, a.eps, normed);
    if (a.has_norm) x = normed;
    if (extent_of(x, p.channel_scales(), a.C).has_digits()) continue;
    for (int64_t at = 0; at < width; at += kSide) {
      const int64_t panel = chunk * p.panels + (column + at) / kSide;
      const Floats sum = plain_product(p, x, a.C, panel) + bias_of(a, chunk, column + at);
      store(to.at + r * to.stride + at, kGelu ? gelu(sum) : sum);
    }
  }
}

// activation(product + bias) of a block's rows: `width` outputs of a chunk from `column` on.
template <bool kGelu>
void multiply_block(const LinearTilesArgs& a, const Packed& p, const DigitRows& rows, float* normed, int64_t chunk,
                    int64_t column, int64_t width, const Results& to, int32_t* sums) {
  constexpr int64_t kStepLines = kWeightStep / 64, kCalls = 4;  // of beside() in a step
  const int64_t share = groups_of(kGroup, kCalls * p.steps), lines = groups_of(kStepLines, kCalls * rows.groups());
  Pending before;
  for (int64_t at = 0; at < width; at += kSide) {
    const int64_t panel = chunk * p.panels + (column + at) / kSide;
    const int8_t* next = p.panel(panel + 1);
    Pending now;
    now.column = at;
    now.scale = load(p.scales + panel * kSide);
    now.bias = bias_of(a, chunk, column + at);
    for (int64_t g = 0; g < rows.groups(); g++) {
      int32_t* const made = before.sums == sums ? sums + kSums : sums;
      now.row = g * kGroup;
      now.height = rows.height(g);
      now.has_low = rows.has_low[g];
      int64_t done = 0;
      const auto beside = [&] {
        for (int64_t i = 0; i < lines; i++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
        if constexpr (kGelu) {  // there is much to do: beside a product, not behind it
          const int64_t end = done + share < before.height ? done + share : before.height;
          finish<kGelu>(rows, before, to, done, end);
          done = end;
        }
      };
      multiply_group(rows, g, p.panel(panel), 0, p.steps, made, beside);
      finish<kGelu>(rows, before, to, done, before.height);
      now.sums = made;
      before = now;
    }
  }
  finish<kGelu>(rows, before, to, 0, before.height);
  plain_rows<kGelu>(a, p, rows, normed, chunk, column, width, to);
}

// Results, and what is added to them, go to memory: `width` outputs of rows [first, first + count). The lines of the
// row after are asked for: stores that have to wait for theirs take 1.5 times as long.
void put_out(const LinearTilesArgs& a, const Results& from, int64_t first, int64_t count, int64_t chunk, int64_t column,
             int64_t width) {
  for (int64_t r = 0; r < count; r++) {
    const float* const results = from.at + r * from.stride;
    const int64_t at = chunk * a.rows * a.M + (first + r) * out_row(a) + column, next = at + out_row(a);
    const float* const residual = a.residual ? a.residual + at : nullptr;
    int64_t i = 0;
    for (; i + kFloats <= width; i += kFloats) {
      __builtin_prefetch(a.out + next + i, 1);
      if (residual) __builtin_prefetch(a.residual + next + i);
      const Floats v = load(results + i);
      store(a.out + at + i, residual ? v + load(residual + i) : v);
    }
    if (i < width) {
      const Floats v = load(results + i);
      store_part(a.out + at + i, residual ? v + load_part(residual + i, width - i) : v, width - i);
    }
  }
}

// What panels [panel, end) of a layer make of a block's rows [first, ...), stretch by stretch.
void run_block(const LinearTilesArgs& a, const Packed& p, const DigitRows& rows, float* normed, int64_t first,
               int64_t panel, int64_t end, const Results& to, int32_t* sums) {
  const auto multiply_rows = a.activation == Activation::gelu ? multiply_block<true> : multiply_block<false>;
  while (panel < end) {
    const int64_t chunk = panel / p.panels, column = panel % p.panels * kSide, left = (end - panel) * kSide;
    const int64_t most = left < kStretch ? left : kStretch, width = a.M - column < most ? a.M - column : most;
    multiply_rows(a, p, rows, normed, chunk, column, width, to, sums);
    put_out(a, to, first, rows.count, chunk, column, width);
    panel += groups_of(width, kSide);
  }
}

// What a thread works in. Of a layer alone hidden_channels is 0.
struct Arrays {
  int32_t* sums;
  float* normed;  // [kGroup][channels], where there is a norm
  DigitRows rows, hidden_rows;
  Results hidden, results;

  Arrays(Carver& memory, const LinearTilesArgs& a, int64_t hidden_channels, int64_t outputs, int64_t halves)
      : sums(memory.take<int32_t>(2 * kSums)),
        normed(memory.take<float>(a.has_norm ? kGroup * a.C : 0)),
        rows(memory, a.C, halves),
        hidden_rows(memory, hidden_channels, halves),
        hidden(memory, hidden_channels, halves),
        results(memory, outputs < kStretch ? outputs : kStretch, halves) {}
};

bool share_weights(const Parallel& pool, const LinearTilesArgs& a) { return pool.threads > 1 && a.rows <= kFewRows; }

// Calls part(a thread's arrays, for rows of that many halves of groups).
template <class Part>
void with_arrays(const LinearTilesArgs& a, int64_t hidden_channels, int64_t outputs, int64_t halves, Outcome& outcome,
                 const Part& part) {
  Carver sizes(nullptr);
  Arrays(sizes, a, hidden_channels, outputs, halves);
  void* const memory = scratch(Slot::own, sizes.bytes());
  if (!memory) return outcome.fail(Status::out_of_memory);
  Carver carver(memory);
  Arrays at(carver, a, hidden_channels, outputs, halves);
  const TileRegisters registers;
  part(at);
}

// Calls part(first row, rows, a thread's arrays) on the threads, for all blocks.
template <class Part>
Status by_blocks(const Parallel& pool, const LinearTilesArgs& a, int64_t hidden_channels, int64_t outputs,
                 const Part& part) {
  const int64_t most = most_groups(a.C > hidden_channels ? a.C : hidden_channels);
  Outcome outcome;
  parallel_for(pool, groups_of(a.rows, kSide), 1, [&](int64_t begin, int64_t end) {
    // Blocks of equal size, of whole groups but for the last.
    const int64_t size = 2 * groups_of(end - begin, 2 * groups_of(end - begin, 2 * most));
    with_arrays(a, hidden_channels, outputs, size, outcome, [&](Arrays& at) {
      for (int64_t half = begin; half < end; half += size) {
        const int64_t first = half * kSide, past = half + size < end ? (half + size) * kSide : end * kSide;
        part(first, (past < a.rows ? past : a.rows) - first, at);
      }
    });
  });
  return outcome.result();
}

// Calls part(first panel, end of the panels, a thread's arrays, for all rows) on the threads.
template <class Part>
Status by_panels(const Parallel& pool, const LinearTilesArgs& a, int64_t panels, const Part& part) {
  Outcome outcome;
  parallel_for(pool, panels, 1, [&](int64_t begin, int64_t end) {
    with_arrays(a, 0, a.M, groups_of(a.rows, kSide), outcome, [&](Arrays& at) { part(begin, end, at); });
  });
  return outcome.result();
}

Packed packed_of(const LinearTilesArgs& a) { return Packed(a.packed, a.chunks, a.M, a.C); }

}  // namespace

int64_t packed_tiles_size(const PackTilesArgs& a) { return Packed(nullptr, a.chunks, a.M, a.C).bytes(); }

namespace {

// Packs the weights, times `channels` where there are some; returns their spread.
float pack_weights(const PackTilesArgs& a, const Packed& p, const float* channels, float* scales) {
  double spreads = 0;
  int64_t counted = 0;
  for (int64_t row = 0; row < a.chunks * a.M; row++) {
    const int64_t panel = row / a.M * p.panels + row % a.M / kSide, m = row % a.M % kSide;
    const float* const w = a.weight + row * a.C;
    const Extent extent = extent_of(w, channels, a.C);
    if (extent.largest == 0) continue;
    const float to_whole = kWhole / extent.largest;
    for (int64_t c = 0; c < a.C; c += kDepth) {
      alignas(64) int8_t step[kWeightDigits * kTile];
      put_digits(w, channels, a.C, c, to_whole, false, step, kTile);
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
  return counted ? float(spreads / double(counted) * double(a.C * a.C)) : 0;
}

}  // namespace

void pack_tiles(const PackTilesArgs& a) {
  const Packed p(a.packed, a.chunks, a.M, a.C);
  memset(a.packed, 0, size_t(p.bytes()));
  float* const scales = reinterpret_cast<float*>(a.packed + p.digit_bytes());
  float* const channels = scales + (p.channels - p.scales);
  for (int64_t c = 0; a.channels && c < a.C; c++) channels[c] = a.channels[c] != 0 ? 1 / a.channels[c] : 0;
  scales[a.chunks * p.panels * kSide] = pack_weights(a, p, a.channels ? channels : nullptr, scales);
  channels[0] = -1;
  if (a.channels) memcpy(channels, a.channels, size_t(a.C) * sizeof(float));
}

Status linear_tiles(const LinearTilesArgs& a, const Parallel& pool) {
  const Packed p = packed_of(a);
  const auto run = [&](int64_t first, int64_t count, int64_t panel, int64_t end, Arrays& at) {
    split(a, p, a.x + first * x_row(a), x_row(a), count, at.rows, at.normed);
    run_block(a, p, at.rows, at.normed, first, panel, end, at.results, at.sums);
  };
  const int64_t panels = a.chunks * p.panels;
  if (share_weights(pool, a)) {
    return by_panels(pool, a, panels, [&](int64_t panel, int64_t end, Arrays& at) { run(0, a.rows, panel, end, at); });
  }
  return by_blocks(pool, a, 0, a.M,
                   [&](int64_t first, int64_t count, Arrays& at) { run(first, count, 0, panels, at); });
}

Status mlp_tiles(const MlpTilesArgs& a, const Parallel& pool) {
  const Packed p = packed_of(a.first), q = packed_of(a.second);
  const int64_t H = a.first.M;
  if (share_weights(pool, a.first)) {
    MlpTilesArgs layers = a;
    layers.first.out = static_cast<float*>(scratch(Slot::shared, a.first.rows * H * int64_t(sizeof(float))));
    if (!layers.first.out) return Status::out_of_memory;
    layers.second.x = layers.first.out;
    const Status status = linear_tiles(layers.first, pool);
    return status == Status::ok ? linear_tiles(layers.second, pool) : status;
  }
  return by_blocks(pool, a.first, H, a.second.M, [&](int64_t first, int64_t count, Arrays& at) {
    split(a.first, p, a.first.x + first * x_row(a.first), x_row(a.first), count, at.rows, at.normed);
    multiply_block<true>(a.first, p, at.rows, at.normed, 0, 0, H, at.hidden, at.sums);
    split(a.second, q, at.hidden.at, at.hidden.stride, count, at.hidden_rows, nullptr);
    run_block(a.second, q, at.hidden_rows, nullptr, first, 0, q.panels, at.results, at.sums);
  });
}

}  // namespace H2OT_ISA
}  // namespace h2ot
