// Squared distances as |a|^2 + |b|^2 - 2 a b on the tensor cores, from 16-bit operands and with float32 sums.
//
// float32 tokens (and pooled ones) enter as pairs (score_pairs.cuh): three products (the fourth, of the lower parts, is
// below the bound). bfloat16 and float16 tokens enter as they are.
//
// Count for one sample of MHFormer (N 351, C 1536), three products: 6 tiles of 128 x 128, each 48 lines of 32 KiB from
// L2, 1.6 million multiply-adds a line: 768 clocks at the 2048 of wgmma (1536 at the 1024 of mma.sync), and some 1200
// for the line at 27 bytes a clock, which is what a multiprocessor gets of L2 where all read.
#pragma once

#include "score_multiply.cuh"
#include "score_tiles.cuh"

namespace h2ot {
namespace cuda {

constexpr int kStages = 3;  // lines of each token in shared memory, under way or being multiplied

// Most multiprocessors have less than the 227 KiB of shared memory of 9.0, and on 10.0 half of the registers does not
// do.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kShortOfShared = 2;
#else
constexpr int kShortOfShared = 1;
#endif

// Whether a sample's tokens can be multiplied as they are: what float32 loses below them is within the bound, and their
// squares are finite. Always for float16. Else a scaled copy is; of tokens that are read in place there is none: no
// line is then multiplied, all bounds are 0, and float64 decides everything.
template <class Operand>
H2OT_DEVICE bool is_raw(float scale) {
  return std::is_same<Operand, Float16>::value || (scale >= 0x1p-40f && scale <= 0x1p30f);
}

H2OT_DEVICE uint16_t narrowed(BFloat16, float v) { return uint16_t(pattern_with_sign(v) >> 16); }
H2OT_DEVICE uint16_t narrowed(Float16, float v) { return narrow_half(v); }

template <class Operand>
H2OT_DEVICE Lines lines_of(const Job<float>& job, int64_t b) {
  const Operands& from = job.operands;
  if (!Entry<Operand>::kPairs && from.in_place) {
    const bool raw = is_raw<Operand>(from.scale[2 * b]);
    return {from.in_place + b * from.stride_b, from.stride_n, raw ? int32_t(job.x.C) : 0};
  }
  return {from.copy + b * job.x.N * from.pitch, from.pitch, int32_t(from.pitch)};
}

template <int kSide>
struct ProductTokens : TileTokens<kSide, kSide> {
  Lines lines;  // here rather than in registers
};

// What a product counts: of_row of one token times of_column of the other.
template <class Operand>
H2OT_DEVICE float of_row(const Job<float>& job, int64_t b, int64_t i) {
  return Entry<Operand>::kPairs ? -2 * job.operands.scale[b * job.x.N + i] : job.operands.scale[2 * b + 1];
}
template <class Operand>
H2OT_DEVICE float of_column(const Job<float>& job, int64_t b, int32_t j) {
  return !Entry<Operand>::kPairs ? 1 : j < 0 ? 0 : job.operands.scale[b * job.x.N + j];
}

// A tile's sums of products, where its lines were, and of_column of its columns. Read by rows only.
template <int kRows, int kColumns>
struct TileSums : TileValues<float, kRows, kColumns, 8> {
  float counts[kColumns];
};

// Writes bfloat16 and float16 tokens as they enter products, where they do not lie so already, their squared norms, and
// the scale of each sample. A warp per token; grid: groups, samples.
template <class Operand>
__global__ void __launch_bounds__(kWarps* kLanes, 2) operand_kernel(Job<float> job) {
  follow_previous();
  int32_t* exponents = reinterpret_cast<int32_t*>(shared_memory());
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t b = blockIdx.y, i = int64_t(blockIdx.x) * kTokensPerBlock + warp;
  int32_t most = kNoExponent;
  for (int64_t g = threadIdx.x; g < job.groups; g += kWarps * kLanes) {
    const int32_t e = job.exponent[b * job.groups + g];
    most = e > most ? e : most;
  }
  most = warp_max(most);
  if (lane == 0) exponents[warp] = most;
  __syncthreads();
  for (int w = 0; w < kWarps; w++) most = exponents[w] > most ? exponents[w] : most;
  const float scale = scale_of(most);
  const bool raw = is_raw<Operand>(scale);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    job.operands.scale[2 * b] = scale;
    job.operands.scale[2 * b + 1] = -2 * (raw ? scale * scale : 1);
  }
  if (i >= job.x.N) return;
  if (!job.valid[b * job.x.N + i]) {
    if (lane == 0) job.norm[b * job.x.N + i] = 0;  // rows of norms are read whole
    job.operands.clear_if_first(i, b * job.x.N + i, lane);
    return;
  }

  const Operands& to = job.operands;
  const float* row = job.rows ? job.row(b, i) : nullptr;
  uint16_t* copy = to.copy ? to.copy + (b * job.x.N + i) * to.pitch : nullptr;
  float sum[4] = {};
  const bool lies = to.in_place && raw;
  const uint16_t* from = lies ? to.in_place + b * to.stride_b + i * to.stride_n : nullptr;
  for (int64_t c = 4 * lane; c < (lies ? job.x.C : to.pitch); c += 4 * kLanes) {
    Quad<float> v = {};
    if (lies) {
      const Quad<Operand> read = *reinterpret_cast<const Quad<Operand>*>(from + c);
      for (int u = 0; u < 4; u++) v.v[u] = widen(read.v[u]);
    } else if (c < job.channels) {
      v = *reinterpret_cast<const Quad<float>*>(row + c);
    }
    Quad<uint16_t> written;
    for (int u = 0; u < 4; u++) {
      const float scaled = v.v[u] * scale;
      sum[u] = fma(scaled, scaled, sum[u]);
      written.v[u] = narrowed(Operand(), raw ? v.v[u] : scaled);
    }
    if (!lies) *reinterpret_cast<Quad<uint16_t>*>(copy + c) = written;
  }
  const float norm = warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if (lane == 0) job.norm[b * job.x.N + i] = norm;
}

// kSide x kSide pairs.
template <class Operand, int kSide>
struct ProductTile {
  typedef float A;
  typedef Operand Entered;
  typedef ProductTokens<kSide> Tokens;
  typedef Products<Operand, kSide> Sums;
  static constexpr bool kProducts = true;
  static constexpr int kRows = kSide, kColumns = kSide;
  static constexpr int kThreads = Sums::kThreads;
  static constexpr int kBlocks = kSide == 128 ? 1 : 4 / kShortOfShared;  // on a multiprocessor
  struct Slab {
    LineStage<kSide> stage[kStages];
  };
  Sums sums;

  // What a thread copies of every line: vector threadIdx.x % kVector of every kTokensAtOnce-th token.
  static constexpr int kTokensAtOnce = kThreads / kVector, kCopies = (kRows + kColumns) / kTokensAtOnce;

  static H2OT_DEVICE const uint16_t* line_of(const Tokens& tokens, int copy) {
    const int token = copy * kTokensAtOnce + threadIdx.x / kVector;
    const int32_t i = token < kRows ? tokens.row[token] : tokens.column[token - kRows];
    // Values of a token that is none only reach pairs that are none.
    return tokens.lines.data + (i < 0 ? 0 : i) * tokens.lines.stride + threadIdx.x % kVector * kVector;
  }
  // Past the end of a token zeros; from is then the token's first line. By warps, for which registers are short, `from`
  // is not kept.
  static H2OT_DEVICE void copy_line(const Tokens& tokens, const uint16_t* const (&from)[kCopies], int32_t line,
                                    LineStage<kSide>& stage) {
    const int token = threadIdx.x / kVector, v = threadIdx.x % kVector;
    const int32_t c = line * int32_t(kLine);
    const bool there = c + v * kVector < tokens.lines.length;
#pragma unroll(kThreads == 512 && !Sums::kAsynchronous ? 2 : 8)
    for (int copy = 0; copy < kCopies; copy++) {
      if constexpr (Sums::kAsynchronous) {
        copy_async(stage.place(copy * kTokensAtOnce + token, v), from[copy] + (there ? c : 0), there);
      } else {
        const int at = copy * kTokensAtOnce + token;
        const int32_t i = at < kRows ? tokens.row[at] : tokens.column[at - kRows];
        const int64_t offset = (i < 0 ? 0 : i) * tokens.lines.stride + c + v * kVector;
        copy_async(stage.place(at, v), tokens.lines.data + (there ? offset : 0), there);
      }
    }
  }

  // Begins with a barrier, behind which the tokens are there. A line is multiplied while the next one arrives and the
  // one after that is asked for.
  H2OT_DEVICE void compute(const Job<float>& job, int64_t b, Tokens& tokens, Slab& slab) {
    if (threadIdx.x == 0) {
      const Lines lines = lines_of<Operand>(job, b);  // by itself: see tests/simt/watch.h
      tokens.lines = lines;
    }
    __syncthreads();
    const int32_t count = int32_t(ceil_div(tokens.lines.length, kLine));
    const uint16_t* from[kCopies] = {};
    if constexpr (Sums::kAsynchronous) {
#pragma unroll
      for (int copy = 0; copy < kCopies; copy++) from[copy] = line_of(tokens, copy);
    }
    sums.clear();
    for (int ahead = 0; ahead < kStages - 1; ahead++) {
      if (ahead < count) copy_line(tokens, from, ahead, slab.stage[ahead]);
      commit_copies();
    }
    wait_for_copies<kStages - 2>();
    if constexpr (Sums::kAsynchronous) publish_copies();
    int at = 0;
    for (int32_t line = 0; line < count; line++) {
      __syncthreads();  // the line is there, and the one before is no longer read
      const int before = at == 0 ? kStages - 1 : at - 1;
      if constexpr (Sums::kAsynchronous) sums.start_line(slab.stage[at]);
      if (line + kStages - 1 < count) copy_line(tokens, from, line + kStages - 1, slab.stage[before]);
      commit_copies();
      if constexpr (!Sums::kAsynchronous) sums.finish_line(slab.stage[at]);
      wait_for_copies<kStages - 2>();
      if constexpr (Sums::kAsynchronous) {
        publish_copies();
        sums.finish_line();
      }
      at = at == kStages - 1 ? 0 : at + 1;
    }
  }

  template <class Values>
  H2OT_DEVICE void put_sums(Values& tile) const {
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int down = 0; down < Sums::kDown; down++) {
#pragma unroll
      for (int across = 0; across < Sums::kAcross; across++) {
        for (int half = 0; half < 2; half++) {
          const int r = Sums::first_row() + down * 16 + lane / 4 + half * 8;
          const int c = Sums::first_column() + across * 8 + lane % 4 * 2;
          const float (&sum)[4] = sums.total[down][across];
          if constexpr (Values::kInPairs) {
            *reinterpret_cast<Two*>(&tile.value[r][c]) = {sum[2 * half], sum[2 * half + 1]};
          } else {
            tile.value[r][c] = sum[2 * half];
            tile.value[r][c + 1] = sum[2 * half + 1];
          }
        }
      }
    }
  }
  // The sums first, then their distances: all at once takes more registers than there are.
  H2OT_DEVICE void put(const Job<float>& job, int64_t b, const Tokens& tokens,
                       TileValues<float, kRows, kColumns>& tile) const {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    put_sums(tile);
    __syncthreads();
    const float* norm = job.norm + b * job.x.N;
    constexpr int kColumnsOfLane = kColumns / kLanes;
    int32_t j[kColumnsOfLane];
    float other[kColumnsOfLane], counts[kColumnsOfLane];
#pragma unroll
    for (int u = 0; u < kColumnsOfLane; u++) {
      j[u] = tokens.column[u * kLanes + lane];
      other[u] = j[u] >= 0 ? norm[j[u]] : 0;
      counts[u] = of_column<Operand>(job, b, j[u]);
    }
    for (int r = warp; r < kRows; r += kThreads / kLanes) {
      const int32_t i = tokens.row[r];
      const float own = i >= 0 ? norm[i] : 0, factor = i >= 0 ? of_row<Operand>(job, b, i) : 0;
#pragma unroll
      for (int u = 0; u < kColumnsOfLane; u++) {
        float& value = tile.value[r][u * kLanes + lane];
        float v = infinity_of(0.0f);
        if (i >= 0 && j[u] >= 0 && i != j[u]) {
          v = fma(factor * value, counts[u], own + other[u]);
          v = v > 0 ? v : 0;
        }
        value = v;
      }
    }
  }
};

template <class Tiles>
struct ProductShared {
  typename Tiles::Tokens tokens;
  int32_t row, column;  // the first ones
  union {
    typename Tiles::Slab slab;
    TileValues<float, Tiles::kRows, Tiles::kColumns> tile;
  };
};

// The stored search by products: a block per tile of the upper triangle, written on both sides of the diagonal. Grid:
// tiles, samples.
template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, Tiles::kBlocks) stored_products_kernel(Job<float> job) {
  follow_previous();
  constexpr int kSide = Tiles::kRows;
  ProductShared<Tiles>& shared = *reinterpret_cast<ProductShared<Tiles>*>(shared_memory());
  if (threadIdx.x == 0) {
    const Tile at = tile_of(blockIdx.x, 1);
    shared.row = int32_t(at.row) * kSide;
    shared.column = int32_t(at.column) * kSide;
  }
  __syncthreads();
  for (int r = threadIdx.x; r < 2 * kSide; r += Tiles::kThreads) {
    const int32_t i = r < kSide ? shared.row + r : shared.column + r - kSide;
    (r < kSide ? shared.tokens.row[r] : shared.tokens.column[r - kSide]) =
        i < job.x.N && job.valid[blockIdx.y * job.x.N + i] ? i : -1;
  }
  {
    Tiles tiles;
    tiles.compute(job, blockIdx.y, shared.tokens, shared.slab);
    __syncthreads();
    tiles.put(job, blockIdx.y, shared.tokens, shared.tile);
    __syncthreads();
  }
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int32_t N = int32_t(job.x.N), row = shared.row, column = shared.column;
  float* matrix = job.matrix + blockIdx.y * job.x.N * job.matrix_pitch;
  for (int r = warp; r < kSide && row + r < N; r += Tiles::kThreads / kLanes) {
    for (int c = lane; c < kSide; c += kLanes) {
      if (column + c >= row + r) matrix[(row + r) * job.matrix_pitch + column + c] = shared.tile.value[r][c];
    }
  }
  for (int c = warp; c < kSide && column + c < N; c += Tiles::kThreads / kLanes) {
    for (int r = lane; r < kSide; r += kLanes) {
      if (column + c > row + r) matrix[(column + c) * job.matrix_pitch + row + r] = shared.tile.value[r][c];
    }
  }
}

}  // namespace cuda
}  // namespace h2ot
