// Tiles of approximate squared distances, and the stored search that writes them for a whole sample.
//
// Count for one sample of HoT (N 243, C 512), direct: 2 instructions per pair and channel on 128 lanes: 72 tiles of
// 16 x 32 take 4 thousand clocks each, 20 of 32 x 64 16 thousand. Reads from L2: (16 + 32) x 2 KiB a tile.
#pragma once

#include "score_device.cuh"

namespace h2ot {
namespace cuda {

constexpr int kTileThreads = 128;
constexpr int kSlab = kSlabChannels;

// One tile: value[r][c] is infinity where either token is not valid or both are the same.
template <class A, int kRows, int kColumns>
struct TileValues {
  A value[kRows][kColumns + 1];
};

// Which tokens make a tile; -1: none.
template <int kRows, int kColumns>
struct TileTokens {
  int32_t row[kRows], column[kColumns];
};

// A quad of channels as it enters the search.
template <class A>
H2OT_DEVICE Quad<A> entering(const A* token, const A* origin, int64_t c, A scale) {
  Quad<A> quad = *reinterpret_cast<const Quad<A>*>(token + c);
  for (int u = 0; u < 4; u++) quad.v[u] *= scale;
  if (origin) {
    const Quad<A> less = *reinterpret_cast<const Quad<A>*>(origin + c);
    for (int u = 0; u < 4; u++) quad.v[u] -= less.v[u] * scale;
  }
  return quad;
}

// Reads slabs of kTokens tokens x kChannels, held in registers while the slab before is worked on; by kThreads threads,
// of which this is `thread`. `put(token, channel, quad)` stores one quad.
template <class A, int kTokens, int kChannels = kSlab, int kThreads = kTileThreads>
struct SlabReader {
  static constexpr int kAcross = kChannels / 16;  // runs of four quads, which four lanes read for each of eight tokens
  static constexpr int kFetches = kTokens * (kChannels / 4) / kThreads;
  static_assert(kFetches * kThreads * 4 == kTokens * kChannels);
  Quad<A> held[kFetches];
  int thread = threadIdx.x;

  H2OT_DEVICE int token_of(int fetch) const {
    const int unit = thread / kLanes + fetch * (kThreads / kLanes);
    return unit / kAcross * 8 + thread % kLanes / 4;
  }
  H2OT_DEVICE int channel_of(int fetch) const {
    const int unit = thread / kLanes + fetch * (kThreads / kLanes);
    return 4 * (unit % kAcross * 4 + thread % 4);
  }
  H2OT_DEVICE void fetch(const Job<A>& job, int64_t b, const int32_t* token, int slab, const A* origin, A scale) {
#pragma unroll
    for (int f = 0; f < kFetches; f++) {
      const int c = slab + channel_of(f);
      const int32_t i = token[token_of(f)];
      if (i >= 0 && c < job.channels) {
        held[f] = entering(job.row(b, i), origin, c, scale);
      } else {
        for (int u = 0; u < 4; u++) held[f].v[u] = 0;
      }
    }
  }
  H2OT_DEVICE void fetch(const Job<A>& job, int64_t b, const int32_t* token, int slab) {
#pragma unroll
    for (int f = 0; f < kFetches; f++) {
      const int c = slab + channel_of(f);
      const int32_t i = token[token_of(f)];
      for (int u = 0; u < 4; u++) held[f].v[u] = 0;
      if (i >= 0 && c < job.channels) held[f] = *reinterpret_cast<const Quad<A>*>(job.row(b, i) + c);
    }
  }
  template <class Put>
  H2OT_DEVICE void store(const Put& put) const {
#pragma unroll
    for (int f = 0; f < kFetches; f++) put(token_of(f), channel_of(f), held[f]);
  }
};

// Sums of squared differences on the FFMA pipes: each thread 4 x 4 pairs, kGroups groups of threads each every
// kGroups-th slab of the channels.
template <class T, int kDown = kDirectRows, int kAcross = kDirectColumns, int kGroups = 1>
struct DirectTile {
  typedef T A;
  static constexpr int kRows = kDown, kColumns = kAcross;
  static constexpr int kOwnThreads = kRows * kColumns / 16, kThreads = kGroups * kOwnThreads;
  static constexpr int kChannels = kGroups == 1 ? kSlab : 16;  // of a slab
  static constexpr bool kBySlab = kOwnThreads > kLanes;  // sums of slabs are added; else a group's channels in a row
  static constexpr int kBlocks = sizeof(A) == 8 ? 1 : kGroups == 1 ? 2 : kOwnThreads == kLanes ? 3 : 2;  // resident
  struct Part {
    alignas(16) A row[kChannels][kRows + 4];
    alignas(16) A column[kChannels][kColumns + 4];
  };
  union Slab {
    Part part[kGroups];
    TileValues<A, kRows, kColumns> sums[kGroups];
  };
  A total[4][4];

  // The threads of a group. With several groups all go through the same number of slabs.
  static H2OT_DEVICE void meet() {
    if (kOwnThreads == kLanes) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  H2OT_DEVICE void compute(const Job<A>& job, int64_t b, const TileTokens<kRows, kColumns>& tokens, Slab& slab) {
    const int lane = threadIdx.x % kLanes, group = threadIdx.x / kOwnThreads, own = threadIdx.x % kOwnThreads;
    const int r = own / (kColumns / 4) * 4, c = own % (kColumns / 4) * 4;
    Part& part = slab.part[group];
    SlabReader<A, kRows, kChannels, kOwnThreads> rows;
    SlabReader<A, kColumns, kChannels, kOwnThreads> columns;
    rows.thread = columns.thread = own;
    const int channels = int(job.channels);
    int slab_at = group * kChannels;
    rows.fetch(job, b, tokens.row, slab_at);
    columns.fetch(job, b, tokens.column, slab_at);
    const A scale = sample_scale(job, b, lane);
    for (int u = 0; u < 4; u++) {
      for (int w = 0; w < 4; w++) total[u][w] = 0;
    }
    for (int from = 0; from < channels; from += kGroups * kChannels) {
      meet();
      rows.store([&](int token, int channel, const Quad<A>& quad) {
        for (int u = 0; u < 4; u++) part.row[channel + u][token] = quad.v[u] * scale;
      });
      columns.store([&](int token, int channel, const Quad<A>& quad) {
        for (int u = 0; u < 4; u++) part.column[channel + u][token] = quad.v[u] * scale;
      });
      meet();
      slab_at += kGroups * kChannels;
      if (from + kGroups * kChannels < channels) {
        rows.fetch(job, b, tokens.row, slab_at);
        columns.fetch(job, b, tokens.column, slab_at);
      }
      A of_slab[4][4] = {};
      A(&sums)[4][4] = kBySlab ? of_slab : total;
#pragma unroll(kBySlab ? 8 : 2)
      for (int channel = 0; channel < kChannels; channel++) {
        const Quad<A> p = *reinterpret_cast<const Quad<A>*>(&part.row[channel][r]);
        const Quad<A> q = *reinterpret_cast<const Quad<A>*>(&part.column[channel][c]);
        for (int u = 0; u < 4; u++) {
          for (int w = 0; w < 4; w++) {
            const A d = p.v[u] - q.v[w];
            sums[u][w] = fma(d, d, sums[u][w]);
          }
        }
      }
      for (int u = 0; kBySlab && u < 4; u++) {
        for (int w = 0; w < 4; w++) total[u][w] += of_slab[u][w];
      }
    }
    if constexpr (kGroups > 1) {
      __syncthreads();
      for (int u = 0; u < 4; u++) {
        for (int w = 0; w < 4; w++) slab.sums[group].value[r + u][c + w] = total[u][w];
      }
      __syncthreads();
    }
  }

  // tile may be where the slab was: its first sums.
  H2OT_DEVICE void put(const Job<A>&, int64_t, const TileTokens<kRows, kColumns>& tokens, const Slab& slab,
                       TileValues<A, kRows, kColumns>& tile) const {
    const auto value = [&](int r, int c, A squared) {
      const int32_t i = tokens.row[r], j = tokens.column[c];
      return i >= 0 && j >= 0 && i != j ? squared : infinity_of(A());
    };
    if constexpr (kGroups == 1) {
      const int r = threadIdx.x / (kColumns / 4) * 4, c = threadIdx.x % (kColumns / 4) * 4;
      for (int u = 0; u < 4; u++) {
        for (int w = 0; w < 4; w++) tile.value[r + u][c + w] = value(r + u, c + w, total[u][w]);
      }
    } else {
      for (int e = threadIdx.x; e < kRows * kColumns; e += kThreads) {
        const int r = e / kColumns, c = e % kColumns;
        A squared = slab.sums[0].value[r][c];
#pragma unroll
        for (int group = 1; group < kGroups; group++) squared += slab.sums[group].value[r][c];
        tile.value[r][c] = value(r, c, squared);
      }
    }
  }
};

// Few tiles for many multiprocessors: a warp per group, so that groups wait for nobody.
template <class T>
using SmallTile = DirectTile<T, kSmallRows, kSmallColumns, kSmallGroups / int(sizeof(T) / 4)>;
// Many: fewer reads per pair.
template <class T>
using LargeTile = DirectTile<T, kDirectRows, kDirectColumns, 2>;

// Products on the tensor cores: each warp 32 x 32 pairs. kProducts 3: float32 tokens less the first valid one, each in
// two TF32 parts; 1: tokens that TF32 holds exactly.
template <int kProducts>
struct ProductTile {
  typedef float A;
  static constexpr int kRows = kProductRows, kColumns = kProductColumns, kThreads = kTileThreads, kBlocks = 2;
  struct Slab {
    alignas(16) float row[kRows][kSlab + 4];
    alignas(16) float column[kColumns][kSlab + 4];
  };
  static constexpr int kDown = 2, kAcross = 4;  // 16 x 8 fragments of a warp
  float total[kDown][kAcross][4];

  static H2OT_DEVICE int row_of(int down) {
    return threadIdx.x / kLanes / 2 * 32 + down * 16 + threadIdx.x % kLanes / 4;
  }
  static H2OT_DEVICE int column_of(int across) { return threadIdx.x / kLanes % 2 * 32 + across * 8; }

  template <int kCount>
  static H2OT_DEVICE void split(const float (&v)[kCount], uint32_t (&high)[kCount], uint32_t (&low)[kCount]) {
    for (int e = 0; e < kCount; e++) {
      high[e] = to_tf32(v[e]);
      if (kProducts == 3) low[e] = to_tf32(v[e] - value_of(high[e]));
    }
  }

  H2OT_DEVICE void compute(const Job<float>& job, int64_t b, const TileTokens<kRows, kColumns>& tokens, Slab& slab) {
    const int lane = threadIdx.x % kLanes, t = lane % 4, g = lane / 4;
    const float scale = sample_scale(job, b, lane);
    const int64_t first = job.from_first ? first_valid(job, b, lane) : -1;
    const float* origin = first >= 0 ? job.row(b, first) : nullptr;
    SlabReader<float, kRows> rows;
    SlabReader<float, kColumns> columns;
    rows.fetch(job, b, tokens.row, 0, origin, scale);
    columns.fetch(job, b, tokens.column, 0, origin, scale);
    for (auto& fragments : total) {
      for (auto& fragment : fragments) {
        for (float& v : fragment) v = 0;
      }
    }
    for (int from = 0; from < int(job.channels); from += kSlab) {
      __syncthreads();
      rows.store([&](int token, int channel, const Quad<float>& quad) {
        *reinterpret_cast<Quad<float>*>(&slab.row[token][channel]) = quad;
      });
      columns.store([&](int token, int channel, const Quad<float>& quad) {
        *reinterpret_cast<Quad<float>*>(&slab.column[token][channel]) = quad;
      });
      __syncthreads();
      if (from + kSlab < job.channels) {
        rows.fetch(job, b, tokens.row, from + kSlab, origin, scale);
        columns.fetch(job, b, tokens.column, from + kSlab, origin, scale);
      }
      float part[kDown][kAcross][4] = {};
#pragma unroll
      for (int k = 0; k < kSlab; k += 8) {
        uint32_t high[kDown][4], low[kDown][4];
        for (int down = 0; down < kDown; down++) {
          const int r = row_of(down);
          const float v[4] = {slab.row[r][k + t], slab.row[r + 8][k + t], slab.row[r][k + t + 4],
                              slab.row[r + 8][k + t + 4]};
          split(v, high[down], low[down]);
        }
        for (int across = 0; across < kAcross; across++) {
          const int c = column_of(across) + g;
          const float v[2] = {slab.column[c][k + t], slab.column[c][k + t + 4]};
          uint32_t column_high[2], column_low[2];
          split(v, column_high, column_low);
          for (int down = 0; down < kDown; down++) {
            if (kProducts == 3) {
              mma_tf32(part[down][across], low[down], column_high);
              mma_tf32(part[down][across], high[down], column_low);
            }
            mma_tf32(part[down][across], high[down], column_high);
          }
        }
      }
      for (int down = 0; down < kDown; down++) {
        for (int across = 0; across < kAcross; across++) {
          for (int e = 0; e < 4; e++) total[down][across][e] += part[down][across][e];
        }
      }
    }
  }

  H2OT_DEVICE void put(const Job<float>& job, int64_t b, const TileTokens<kRows, kColumns>& tokens, const Slab&,
                       TileValues<float, kRows, kColumns>& tile) const {
    const float* norm = job.norm + b * job.x.N;
    for (int down = 0; down < kDown; down++) {
      for (int across = 0; across < kAcross; across++) {
        for (int e = 0; e < 4; e++) {
          const int r = row_of(down) + e / 2 * 8, c = column_of(across) + threadIdx.x % 4 * 2 + e % 2;
          const int32_t i = tokens.row[r], j = tokens.column[c];
          float v = infinity_of(0.0f);
          if (i >= 0 && j >= 0 && i != j) {
            v = fma(-2.0f, total[down][across][e], norm[i] + norm[j]);
            v = v > 0 ? v : 0;
          }
          tile.value[r][c] = v;
        }
      }
    }
  }
};

// Squared norms of the tokens as they enter products. A warp per token; grid: groups, samples.
__global__ void __launch_bounds__(kWarps* kLanes, 2) norm_kernel(Job<float> job) {
  const int lane = threadIdx.x % kLanes;
  const int64_t b = blockIdx.y, i = int64_t(blockIdx.x) * kTokensPerBlock + threadIdx.x / kLanes;
  if (i >= job.x.N || !job.valid[b * job.x.N + i]) return;
  const float scale = sample_scale(job, b, lane);
  const float* origin = job.from_first ? job.row(b, first_valid(job, b, lane)) : nullptr;
  float sum = 0;
  for (int64_t c = 4 * lane; c < job.channels; c += 4 * kLanes) {
    const Quad<float> quad = entering(job.row(b, i), origin, c, scale);
    for (int u = 0; u < 4; u++) sum = fma(quad.v[u], quad.v[u], sum);
  }
  sum = warp_sum(sum);
  if (lane == 0) job.norm[b * job.x.N + i] = sum;
}

template <class Tiles>
struct StoredShared {
  TileTokens<Tiles::kRows, Tiles::kColumns> tokens;
  union {
    typename Tiles::Slab slab;
    TileValues<typename Tiles::A, Tiles::kRows, Tiles::kColumns> tile;
  };
};

// The stored search: a block per tile of the upper triangle, written on both sides of the diagonal. Grid: tiles,
// samples.
template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, Tiles::kBlocks) stored_kernel(Job<typename Tiles::A> job) {
  typedef typename Tiles::A A;
  StoredShared<Tiles>& shared = *reinterpret_cast<StoredShared<Tiles>*>(shared_memory());
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t b = blockIdx.y, N = job.x.N;
  constexpr int kOwnTokens = (Tiles::kRows + Tiles::kColumns + Tiles::kThreads - 1) / Tiles::kThreads;
  const Tile at = tile_of(blockIdx.x, job.tile_ratio);
  const int64_t row = at.row * Tiles::kRows, column = at.column * Tiles::kColumns;
  // Which tokens are valid is not known before the first slab is asked for.
  int32_t* const tokens = shared.tokens.row;
  static_assert(sizeof(shared.tokens) == sizeof(int32_t) * (Tiles::kRows + Tiles::kColumns));
  bool invalid[kOwnTokens];
#pragma unroll
  for (int n = 0; n < kOwnTokens; n++) {
    const int r = threadIdx.x + n * Tiles::kThreads;
    const int64_t i = r < Tiles::kRows ? row + r : column + r - Tiles::kRows;
    const bool inside = r < Tiles::kRows + Tiles::kColumns;
    if (inside) tokens[r] = i < N ? int32_t(i) : -1;
    invalid[n] = inside && i < N && !job.valid[b * N + i];
  }
  __syncthreads();
  Tiles tiles;
  tiles.compute(job, b, shared.tokens, shared.slab);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kOwnTokens; n++) {
    if (invalid[n]) tokens[threadIdx.x + n * Tiles::kThreads] = -1;
  }
  __syncthreads();
  tiles.put(job, b, shared.tokens, shared.slab, shared.tile);
  __syncthreads();
  A* matrix = job.matrix + b * N * job.matrix_pitch;
  for (int r = warp; r < Tiles::kRows; r += Tiles::kThreads / kLanes) {
    for (int c = lane; c < Tiles::kColumns; c += kLanes) {
      const int64_t i = row + r, j = column + c;
      if (i < N && j >= i) matrix[i * job.matrix_pitch + j] = shared.tile.value[r][c];
    }
  }
  for (int c = warp; c < Tiles::kColumns; c += Tiles::kThreads / kLanes) {
    for (int r = lane; r < Tiles::kRows; r += kLanes) {
      const int64_t i = row + r, j = column + c;
      if (j < N && j > i) matrix[j * job.matrix_pitch + i] = shared.tile.value[r][c];
    }
  }
}

}  // namespace cuda
}  // namespace h2ot
