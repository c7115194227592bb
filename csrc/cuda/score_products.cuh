// Squared distances as |a|^2 + |b|^2 - 2 a b on the tensor cores, from 16-bit operands and with float32 sums.
//
// float32 tokens (and pooled ones) enter as pairs (score_pairs.cuh): three products (the fourth, of the lower parts, is
// below the bound). bfloat16 and float16 tokens enter as they are.
//
// Count for one sample of MHFormer (N 351, C 1536), three products: 6 tiles of 128 x 128, each 96 steps of 16 channels
// with 3 x 128 mma.sync of 2048 multiply-adds: 37 thousand clocks at 1024 multiply-adds a clock, 48 stages of 32 KiB
// from L2.
#pragma once

#include "score_tiles.cuh"

namespace h2ot {
namespace cuda {

// Operands are copied in lines of 128 bytes. Of Pairs: the upper parts of 32 channels, then their lower parts.
constexpr int kVector = 8;  // 16-bit values copied by a thread
constexpr int kStages = 3;  // lines of each token in shared memory, under way or being multiplied

// Two large blocks fit a multiprocessor's 227 KiB of shared memory on 9.0; most have 99 KiB, and on 10.0 half of the
// registers does not do.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kShortOfShared = 2;
#else
constexpr int kShortOfShared = 1;
#endif

struct Pairs {};

template <class Operand>
struct Entry {
  static constexpr bool kPairs = false;
};
template <>
struct Entry<Pairs> {
  static constexpr bool kPairs = true;
};

// Whether a sample's tokens can be multiplied as they are: what float32 loses below them is within the bound, and their
// squares are finite. Always for float16.
template <class Operand>
H2OT_DEVICE bool is_raw(float scale) {
  return std::is_same<Operand, Float16>::value || (scale >= 0x1p-40f && scale <= 0x1p30f);
}

H2OT_DEVICE uint16_t narrowed(BFloat16, float v) { return uint16_t(pattern_with_sign(v) >> 16); }
H2OT_DEVICE uint16_t narrowed(Float16, float v) { return narrow_half(v); }

// One sample's operands.
struct Lines {
  const uint16_t* data;
  int64_t stride;  // between tokens
  int32_t length;  // of a token
};
template <class Operand>
H2OT_DEVICE Lines lines_of(const Job<float>& job, int64_t b) {
  const Operands& from = job.operands;
  if (!Entry<Operand>::kPairs && from.in_place && is_raw<Operand>(from.scale[2 * b])) {
    return {from.in_place + b * from.stride_b, from.stride_n, int32_t(job.x.C)};
  }
  return {from.copy + b * job.x.N * from.pitch, from.pitch, int32_t(from.pitch)};
}

// What a product counts: of_row of one token times of_column of the other.
template <class Operand>
H2OT_DEVICE float of_row(const Job<float>& job, int64_t b, int64_t i) {
  return Entry<Operand>::kPairs ? -2 * job.operands.scale[b * job.x.N + i] : job.operands.scale[2 * b + 1];
}
template <class Operand>
H2OT_DEVICE float of_column(const Job<float>& job, int64_t b, int32_t j) {
  return !Entry<Operand>::kPairs ? 1 : j < 0 ? 0 : job.operands.scale[b * job.x.N + j];
}

// A tile's sums of products, where its lines were, and of_column of its columns.
template <int kRows, int kColumns>
struct TileSums : TileValues<float, kRows, kColumns> {
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
    return;
  }

  const Operands& to = job.operands;
  const float* row = job.row(b, i);
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

// kSide x kSide pairs by warps of 16 kFragmentsDown x 32.
template <class Operand, int kSide, int kFragmentsDown = kSide / 32>
struct ProductTile {
  typedef float A;
  typedef Operand Entered;
  static constexpr bool kProducts = true;
  static constexpr int kRows = kSide, kColumns = kSide;
  static constexpr int kDown = kFragmentsDown, kAcross = 4;  // 16 x 8 fragments of a warp
  static constexpr int kWarpsDown = kSide / (16 * kDown), kWarpsAcross = kSide / 32;
  static constexpr int kThreads = kWarpsDown * kWarpsAcross * kLanes;
  static constexpr int kBlocks = kThreads == 512 ? 1 : (kSide == 128 ? 2 : 4) / kShortOfShared;  // on a multiprocessor
  struct Stage {
    alignas(128) uint16_t token[kRows + kColumns][kLine];
  };
  struct Slab {
    Stage stage[kStages];
    Lines lines;  // here rather than in registers
  };
  float total[kDown][kAcross][4];

  static H2OT_DEVICE int first_row() { return threadIdx.x / kLanes / kWarpsAcross * kDown * 16; }
  static H2OT_DEVICE int first_column() { return threadIdx.x / kLanes % kWarpsAcross * kAcross * 8; }

  // Where vector `v` of a line stands: no two of eight tokens' vectors in the same banks.
  static H2OT_DEVICE uint16_t* place(Stage& stage, int token, int v) {
    return &stage.token[token][(v ^ (token & 7)) * kVector];
  }

  static H2OT_DEVICE void copy_line(const Lines& lines, const TileTokens<kRows, kColumns>& tokens, int32_t line,
                                    Stage& stage) {
    constexpr int kTokensAtOnce = kThreads / kVector;
    const int v = threadIdx.x % kVector;
    const int32_t c = line * int32_t(kLine) + v * kVector;
#pragma unroll(kThreads == 512 && !Entry<Operand>::kPairs ? 2 : 8)
    for (int from = 0; from < kRows + kColumns; from += kTokensAtOnce) {
      const int token = from + threadIdx.x / kVector;
      const int32_t i = from < kRows ? tokens.row[token] : tokens.column[token - kRows];
      // Values of a token that is none only reach pairs that are none.
      const bool there = c < lines.length;
      copy_async(place(stage, token, v), lines.data + (there ? (i < 0 ? 0 : i) * lines.stride + c : 0), there);
    }
  }

  // The fragments of 16 channels (vectors v, v + 1) of 16 rows, or of two times 8 columns.
  static H2OT_DEVICE void load_rows(uint32_t (&a)[4], Stage& stage, int row, int v) {
    const int lane = threadIdx.x % kLanes;
    load_matrices(a, place(stage, row + lane % 16, v + lane / 16));
  }
  static H2OT_DEVICE void load_columns(uint32_t (&b)[kAcross][2], Stage& stage, int v) {
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int across = 0; across < kAcross; across += 2) {
      const int column = kRows + first_column() + across * 8 + lane / 16 * 8 + lane % 8;
      uint32_t read[4];
      load_matrices(read, place(stage, column, v + lane / 8 % 2));
      b[across][0] = read[0];
      b[across][1] = read[1];
      b[across + 1][0] = read[2];
      b[across + 1][1] = read[3];
    }
  }
  static H2OT_DEVICE void multiply(float (&c)[kAcross][4], const uint32_t (&a)[4], const uint32_t (&b)[kAcross][2]) {
#pragma unroll
    for (int across = 0; across < kAcross; across++) {
      if constexpr (std::is_same<Operand, BFloat16>::value) {
        mma_bfloat16(c[across], a, b[across]);
      } else {
        mma_float16(c[across], a, b[across]);
      }
    }
  }

  // A line: two slabs, each summed from zero and then added. A slab is 16 channels of Pairs, the small products first,
  // or 32 channels.
  H2OT_DEVICE void multiply_line(Stage& stage) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      constexpr int kFirst = Entry<Operand>::kPairs ? 2 : 4, kSecond = Entry<Operand>::kPairs ? 4 : 2;
      uint32_t b[2][kAcross][2];
      load_columns(b[0], stage, half * kFirst);
      load_columns(b[1], stage, half * kFirst + kSecond);
#pragma unroll
      for (int down = 0; down < kDown; down++) {
        uint32_t a[2][4];
        load_rows(a[0], stage, first_row() + down * 16, half * kFirst);
        load_rows(a[1], stage, first_row() + down * 16, half * kFirst + kSecond);
        float part[kAcross][4] = {};
        if constexpr (Entry<Operand>::kPairs) {
          multiply(part, a[1], b[0]);
          multiply(part, a[0], b[1]);
          multiply(part, a[0], b[0]);
        } else {
          multiply(part, a[0], b[0]);
          multiply(part, a[1], b[1]);
        }
#pragma unroll
        for (int across = 0; across < kAcross; across++) {
          for (int e = 0; e < 4; e++) total[down][across][e] += part[across][e];
        }
      }
    }
  }

  H2OT_DEVICE void compute(const Job<float>& job, int64_t b, const TileTokens<kRows, kColumns>& tokens, Slab& slab) {
    if (threadIdx.x == 0) slab.lines = lines_of<Operand>(job, b);
    __syncthreads();
    const Lines& lines = slab.lines;
    const int32_t count = int32_t(ceil_div(lines.length, kLine));
    for (auto& fragments : total) {
      for (auto& fragment : fragments) {
        for (float& v : fragment) v = 0;
      }
    }
    for (int ahead = 0; ahead < kStages - 1; ahead++) {
      if (ahead < count) copy_line(lines, tokens, ahead, slab.stage[ahead]);
      commit_copies();
    }
    int at = 0;
    for (int32_t line = 0; line < count; line++) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // the line is there, and the one before is no longer read
      const int before = at == 0 ? kStages - 1 : at - 1;
      if (line + kStages - 1 < count) copy_line(lines, tokens, line + kStages - 1, slab.stage[before]);
      commit_copies();
      multiply_line(slab.stage[at]);
      at = at == kStages - 1 ? 0 : at + 1;
    }
    wait_for_copies<0>();
  }

  H2OT_DEVICE void put_sums(TileValues<float, kRows, kColumns>& tile) const {
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int down = 0; down < kDown; down++) {
#pragma unroll
      for (int across = 0; across < kAcross; across++) {
        for (int e = 0; e < 4; e++) {
          const int r = first_row() + down * 16 + lane / 4 + e / 2 * 8;
          tile.value[r][first_column() + across * 8 + lane % 4 * 2 + e % 2] = total[down][across][e];
        }
      }
    }
  }
  // The sums first, then their distances: all at once takes more registers than there are.
  H2OT_DEVICE void put(const Job<float>& job, int64_t b, const TileTokens<kRows, kColumns>& tokens,
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
  TileTokens<Tiles::kRows, Tiles::kColumns> tokens;
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
  __syncthreads();
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
