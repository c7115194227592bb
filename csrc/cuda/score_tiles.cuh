// Tiles of approximate squared distances, and the stored search that writes them for a whole sample.
//
// Count for one sample of HoT (N 243, C 512), direct: 20 tiles of 32 x 64, each 2 instructions per pair and channel on
// 128 lanes: 16 thousand clocks. Reads from L2: (32 + 64) x 2 KiB a tile.
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

// Reads slabs of kTokens tokens, four quads of eight tokens per warp at a time: held in registers while the slab before
// is worked on. `put(token, channel, quad)` stores one quad.
template <class A, int kTokens>
struct SlabReader {
  static constexpr int kFetches = kTokens * (kSlab / 4) / kTileThreads;
  Quad<A> held[kFetches];

  static H2OT_DEVICE int token_of(int fetch) {
    const int unit = threadIdx.x / kLanes + fetch * (kTileThreads / kLanes);
    return unit / 2 * 8 + threadIdx.x % kLanes / 4;
  }
  static H2OT_DEVICE int channel_of(int fetch) {
    const int unit = threadIdx.x / kLanes + fetch * (kTileThreads / kLanes);
    return 4 * (unit % 2 * 4 + threadIdx.x % 4);
  }
  H2OT_DEVICE void fetch(const Job<A>& job, int64_t b, const int32_t* token, int64_t slab, const A* origin, A scale) {
#pragma unroll
    for (int f = 0; f < kFetches; f++) {
      const int64_t c = slab + channel_of(f);
      const int32_t i = token[token_of(f)];
      if (i >= 0 && c < job.channels) {
        held[f] = entering(job.row(b, i), origin, c, scale);
      } else {
        for (int u = 0; u < 4; u++) held[f].v[u] = 0;
      }
    }
  }
  template <class Put>
  H2OT_DEVICE void store(const Put& put) const {
#pragma unroll
    for (int f = 0; f < kFetches; f++) put(token_of(f), channel_of(f), held[f]);
  }
};

// Sums of squared differences on the FFMA pipes: each thread 4 x 4 pairs.
template <class T>
struct DirectTile {
  typedef T A;
  static constexpr int kRows = kDirectRows, kColumns = kDirectColumns;
  struct Slab {
    alignas(16) A row[kSlab][kRows + 4];
    alignas(16) A column[kSlab][kColumns + 4];
  };
  A total[4][4];

  H2OT_DEVICE void compute(const Job<A>& job, int64_t b, const TileTokens<kRows, kColumns>& tokens, Slab& slab) {
    const int lane = threadIdx.x % kLanes, r = threadIdx.x / 16 * 4, c = threadIdx.x % 16 * 4;
    const A scale = sample_scale(job, b, lane);
    SlabReader<A, kRows> rows;
    SlabReader<A, kColumns> columns;
    rows.fetch(job, b, tokens.row, 0, nullptr, scale);
    columns.fetch(job, b, tokens.column, 0, nullptr, scale);
    for (int u = 0; u < 4; u++) {
      for (int w = 0; w < 4; w++) total[u][w] = 0;
    }
    for (int64_t from = 0; from < job.channels; from += kSlab) {
      __syncthreads();
      rows.store([&](int token, int channel, const Quad<A>& quad) {
        for (int u = 0; u < 4; u++) slab.row[channel + u][token] = quad.v[u];
      });
      columns.store([&](int token, int channel, const Quad<A>& quad) {
        for (int u = 0; u < 4; u++) slab.column[channel + u][token] = quad.v[u];
      });
      __syncthreads();
      if (from + kSlab < job.channels) {
        rows.fetch(job, b, tokens.row, from + kSlab, nullptr, scale);
        columns.fetch(job, b, tokens.column, from + kSlab, nullptr, scale);
      }
      A part[4][4] = {};
#pragma unroll 8
      for (int channel = 0; channel < kSlab; channel++) {
        const Quad<A> p = *reinterpret_cast<const Quad<A>*>(&slab.row[channel][r]);
        const Quad<A> q = *reinterpret_cast<const Quad<A>*>(&slab.column[channel][c]);
        for (int u = 0; u < 4; u++) {
          for (int w = 0; w < 4; w++) {
            const A d = p.v[u] - q.v[w];
            part[u][w] = fma(d, d, part[u][w]);
          }
        }
      }
      for (int u = 0; u < 4; u++) {
        for (int w = 0; w < 4; w++) total[u][w] += part[u][w];
      }
    }
  }

  H2OT_DEVICE void put(const Job<A>&, int64_t, const TileTokens<kRows, kColumns>& tokens,
                       TileValues<A, kRows, kColumns>& tile) const {
    const int r = threadIdx.x / 16 * 4, c = threadIdx.x % 16 * 4;
    for (int u = 0; u < 4; u++) {
      for (int w = 0; w < 4; w++) {
        const int32_t i = tokens.row[r + u], j = tokens.column[c + w];
        tile.value[r + u][c + w] = i >= 0 && j >= 0 && i != j ? total[u][w] : infinity_of(A());
      }
    }
  }
};

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
__global__ void __launch_bounds__(kTileThreads, 2) stored_kernel(Job<typename Tiles::A> job) {
  typedef typename Tiles::A A;
  StoredShared<Tiles>& shared = *reinterpret_cast<StoredShared<Tiles>*>(shared_memory());
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t b = blockIdx.y, N = job.x.N;
  const Tile at = tile_of(blockIdx.x, job.tile_ratio);
  const int64_t row = at.row * Tiles::kRows, column = at.column * Tiles::kColumns;
  for (int r = threadIdx.x; r < Tiles::kRows + Tiles::kColumns; r += kTileThreads) {
    const int64_t i = r < Tiles::kRows ? row + r : column + r - Tiles::kRows;
    const int32_t token = i < N && job.valid[b * N + i] ? int32_t(i) : -1;
    if (r < Tiles::kRows) {
      shared.tokens.row[r] = token;
    } else {
      shared.tokens.column[r - Tiles::kRows] = token;
    }
  }
  __syncthreads();
  Tiles tiles;
  tiles.compute(job, b, shared.tokens, shared.slab);
  __syncthreads();
  tiles.put(job, b, shared.tokens, shared.tile);
  __syncthreads();
  A* matrix = job.matrix + b * N * job.matrix_pitch;
  for (int r = warp; r < Tiles::kRows; r += kTileThreads / kLanes) {
    for (int c = lane; c < Tiles::kColumns; c += kLanes) {
      const int64_t i = row + r, j = column + c;
      if (i < N && j >= i) matrix[i * job.matrix_pitch + j] = shared.tile.value[r][c];
    }
  }
  for (int c = warp; c < Tiles::kColumns; c += kTileThreads / kLanes) {
    for (int r = lane; r < Tiles::kRows; r += kLanes) {
      const int64_t i = row + r, j = column + c;
      if (j < N && j > i) matrix[j * job.matrix_pitch + i] = shared.tile.value[r][c];
    }
  }
}

}  // namespace cuda
}  // namespace h2ot
