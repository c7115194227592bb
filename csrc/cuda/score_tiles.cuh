// Tiles of approximate squared distances, and the stored search that writes them for a whole sample.
//
// Count for one sample of HoT (N 243, C 512), direct: 2 instructions per pair and channel on 128 lanes: 72 tiles of
// 16 x 32 take 4 thousand clocks each, 20 of 32 x 64 16 thousand. Reads from L2: (16 + 32) x 2 KiB a tile.
#pragma once

#include "score_device.cuh"

namespace h2ot {
namespace cuda {

constexpr int kTileThreads = 128;

// Blocks of small tiles that registers are left for: three need more shared memory than some multiprocessors have.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kSmallBlocks = 2;
#else
constexpr int kSmallBlocks = 3;
#endif

// One tile: value[r][c] is infinity where either token is not valid or both are the same. The pad decides which lanes
// meet different banks: an odd one those along a column (with 5, fragments of products are written two for one: no odd
// one does better), 8 and 16 those that write parts of four rows and of two.
template <class A, int kRows, int kColumns, int kPad = 5>
struct TileValues {
  static constexpr bool kInPairs = kPad % 2 == 0;  // two neighbours can be written at once
  A value[kRows][kColumns + kPad];
};
struct alignas(8) Two {
  float v[2];
};

// Which tokens make a tile; -1: none.
template <int kRows, int kColumns>
struct TileTokens {
  int32_t row[kRows], column[kColumns];
};

// Sums of squared differences on the FFMA pipes: each thread 4 x 4 pairs, kGroups groups of threads each every
// kGroups-th slab of the channels. A line of shared memory holds some channels of a token; eight threads that read the
// same channels of neighbours, or copy neighbours' lines, meet different banks: hence the order of a line's vectors.
template <class T, int kDown = kDirectRows, int kAcross = kDirectColumns, int kGroups = 1>
struct DirectTile {
  typedef T A;
  typedef TileTokens<kDown, kAcross> Tokens;
  static constexpr bool kProducts = false;
  static constexpr int kRows = kDown, kColumns = kAcross;
  static constexpr int kOwnThreads = kRows * kColumns / 16, kThreads = kGroups * kOwnThreads;
  static constexpr bool kWarpAlone = kOwnThreads == kLanes;                           // a group waits for nobody
  static constexpr int kBlocks = sizeof(A) == 8 ? 1 : kWarpAlone ? kSmallBlocks : 2;  // resident
  static constexpr int kVector = 16 / int(sizeof(A));                                 // copied at once
  static constexpr int kVectors = kWarpAlone ? 2 : 4;                                 // of a line
  static constexpr int kChannels = kVectors * kVector;
  static constexpr int kCopies = (kRows + kColumns) * kVectors / kOwnThreads;
  static_assert(kCopies * kOwnThreads == (kRows + kColumns) * kVectors);
  static constexpr int kAcrossThreads = kColumns / 4, kDownThreads = kRows / 4;
  struct alignas(16) Line {
    A v[kChannels];
  };
  union Slab {
    Line line[kGroups][2][kRows + kColumns];
    TileValues<A, kRows, kColumns, kAcrossThreads> sums[kGroups];  // written without bank conflicts, too
  };
  A total[4][4];
  A factor;  // of the sums

  static H2OT_DEVICE void meet() {
    if (kWarpAlone) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
  static H2OT_DEVICE int own_thread() { return threadIdx.x % kOwnThreads; }
  static H2OT_DEVICE int row_of(int u) { return own_thread() / kAcrossThreads + u * kDownThreads; }
  static H2OT_DEVICE int column_of(int w) { return own_thread() % kAcrossThreads + w * kAcrossThreads; }
  // Where vector v of the line of a tile's token lies in it.
  static H2OT_DEVICE int place_of(int token, int v) {
    return (v ^ (token / (8 / kVectors) & (kVectors - 1))) * kVector;
  }

  // Adds what one slab gives. kScaled: both tokens are scaled first, for their difference may be more than the largest
  // number; else the sums will be.
  template <bool kScaled>
  H2OT_DEVICE void add(const Line (&line)[kRows + kColumns], A scale) {
    A of_slab[4][4] = {};
    A(&sums)[4][4] = kWarpAlone ? total : of_slab;
#pragma unroll 2
    for (int v = 0; v < kVectors; v++) {
      struct alignas(16) Vector {
        A v[kVector];
      } p[4];
#pragma unroll
      for (int u = 0; u < 4; u++) {
        p[u] = *reinterpret_cast<const Vector*>(&line[row_of(u)].v[place_of(row_of(u), v)]);
        for (A& value : p[u].v) value = kScaled ? value * scale : value;
      }
#pragma unroll
      for (int w = 0; w < 4; w++) {
        const int column = kRows + column_of(w);
        Vector q = *reinterpret_cast<const Vector*>(&line[column].v[place_of(column, v)]);
        for (A& value : q.v) value = kScaled ? value * scale : value;
#pragma unroll
        for (int e = 0; e < kVector; e++) {
#pragma unroll
          for (int u = 0; u < 4; u++) {
            const A d = p[u].v[e] - q.v[e];
            sums[u][w] = fma(d, d, sums[u][w]);
          }
        }
      }
    }
    if constexpr (!kWarpAlone) {
      for (int u = 0; u < 4; u++) {
        for (int w = 0; w < 4; w++) total[u][w] += of_slab[u][w];
      }
    }
  }

  H2OT_DEVICE void compute(const Job<A>& job, int64_t b, const TileTokens<kRows, kColumns>& tokens, Slab& slab) {
    const int group = threadIdx.x / kOwnThreads, channels = job.channels;
    Line(&lines)[2][kRows + kColumns] = slab.line[group];
    const A* from[kCopies];
    int next = group * kChannels;  // of the channels to copy
#pragma unroll
    for (int f = 0; f < kCopies; f++) {
      const int unit = own_thread() + f * kOwnThreads, token = unit / kVectors;
      const int32_t i = token < kRows ? tokens.row[token] : tokens.column[token - kRows];
      from[f] = i >= 0 ? job.row(b, i) + unit % kVectors * kVector : nullptr;
    }
    const auto copy = [&](Line(&to)[kRows + kColumns]) {
#pragma unroll
      for (int f = 0; f < kCopies; f++) {
        const int unit = own_thread() + f * kOwnThreads, token = unit / kVectors, v = unit % kVectors;
        const bool there = from[f] != nullptr && next + v * kVector < channels;
        copy_async(&to[token].v[place_of(token, v)], there ? from[f] + next : job.rows, there);
      }
      next += kGroups * kChannels;
    };
    copy(lines[0]);
    commit_copies();
    const A scale = sample_scale(job, b, threadIdx.x % kLanes);
    // Sums of squares of what is not scaled stay in range (to 2^27 channels), and what they lose is within the bound.
    const bool plain = scale <= A(0x1p12) && scale >= A(0x1p-48);
    factor = plain ? scale * scale : A(1);
    for (int u = 0; u < 4; u++) {
      for (int w = 0; w < 4; w++) total[u][w] = 0;
    }
    int stage = 0;
    for (int done = 0; done < channels; done += kGroups * kChannels, stage ^= 1) {
      copy(lines[stage ^ 1]);  // past the end: zeros, which nobody reads
      commit_copies();
      wait_for_copies<1>();
      meet();
      if (plain) {
        add<false>(lines[stage], scale);
      } else {
        add<true>(lines[stage], scale);
      }
      meet();
    }
    wait_for_copies<0>();
    if constexpr (kGroups > 1) {
      __syncthreads();
      for (int u = 0; u < 4; u++) {
        for (int w = 0; w < 4; w++) slab.sums[group].value[row_of(u)][column_of(w)] = total[u][w];
      }
    }
  }

  // After a barrier; has one itself where there are groups. tile may be where the slab was.
  template <class Values>
  H2OT_DEVICE void put(const Job<A>&, int64_t, const TileTokens<kRows, kColumns>& tokens, const Slab& slab,
                       Values& tile) const {
    const auto value = [&](int r, int c, A sum) {
      const int32_t i = tokens.row[r], j = tokens.column[c];
      return i >= 0 && j >= 0 && i != j ? sum * factor : infinity_of(A());
    };
    if constexpr (kGroups == 1) {
      for (int u = 0; u < 4; u++) {
        for (int w = 0; w < 4; w++) {
          tile.value[row_of(u)][column_of(w)] = value(row_of(u), column_of(w), total[u][w]);
        }
      }
    } else {
      constexpr int kOwn = kRows * kColumns / kThreads;
      A own[kOwn];
#pragma unroll
      for (int n = 0; n < kOwn; n++) {
        const int e = threadIdx.x + n * kThreads, r = e / kColumns, c = e % kColumns;
        A sum = slab.sums[0].value[r][c];
#pragma unroll
        for (int group = 1; group < kGroups; group++) sum += slab.sums[group].value[r][c];
        own[n] = value(r, c, sum);
      }
      __syncthreads();
#pragma unroll
      for (int n = 0; n < kOwn; n++) {
        const int e = threadIdx.x + n * kThreads;
        tile.value[e / kColumns][e % kColumns] = own[n];
      }
    }
  }
};

// Few tiles for many multiprocessors: a warp per group.
template <class T>
using SmallTile = DirectTile<T, kSmallRows, kSmallColumns, kSmallGroups / int(sizeof(T) / 4)>;
// Many: fewer reads per pair.
template <class T>
using LargeTile = DirectTile<T, kDirectRows, kDirectColumns, 2>;

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
  follow_previous();
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
