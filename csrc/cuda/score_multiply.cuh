// Sums of products of a tile's rows and columns on the tensor cores, a line of 128 bytes of each token at a time.
//
// A line is summed from zero, then added to the total: what tensor cores cut off is then small against the total. By
// warpgroups (wgmma, 9.0 as sm_90a), which read shared memory themselves and leave the warps free meanwhile; elsewhere
// by warps (mma.sync).
#pragma once

#include "score_device.cuh"

namespace h2ot {
namespace cuda {

struct Pairs {};

template <class Operand>
struct Entry {
  static constexpr bool kPairs = false;
};
template <>
struct Entry<Pairs> {
  static constexpr bool kPairs = true;
};

// One sample's operands. Of Pairs a line holds the upper parts of 32 channels, then their lower parts.
struct Lines {
  const uint16_t* data;
  int64_t stride;  // between tokens
  int32_t length;  // of a token
};

constexpr int kVector = 8;  // 16-bit values copied by a thread

// A line of each of a tile's tokens, rows first. Lies at a multiple of eight of its own lines.
template <int kSide>
struct LineStage {
  alignas(8 * kLine * 2) uint16_t token[2 * kSide][kLine];

  // Where vector `v` of a line stands: no two of eight tokens' vectors in the same banks.
  H2OT_DEVICE uint16_t* place(int t, int v) { return &token[t][(v ^ (t & 7)) * kVector]; }
};

// By warps of 32 x 32 pairs.
template <class Operand, int kSide>
struct WarpProducts {
  static constexpr bool kAsynchronous = false;
  static constexpr int kDown = 2, kAcross = 4;  // 16 x 8 fragments of a warp
  static constexpr int kWarpsAcross = kSide / (8 * kAcross);
  static constexpr int kThreads = kSide / (16 * kDown) * kWarpsAcross * kLanes;
  float total[kDown][kAcross][4];

  static H2OT_DEVICE int first_row() { return threadIdx.x / kLanes / kWarpsAcross * kDown * 16; }
  static H2OT_DEVICE int first_column() { return threadIdx.x / kLanes % kWarpsAcross * kAcross * 8; }

  H2OT_DEVICE void clear() {
    for (auto& fragments : total) {
      for (auto& fragment : fragments) {
        for (float& v : fragment) v = 0;
      }
    }
  }

  // The fragments of 16 values (vectors v, v + 1) of 16 rows, or of two times 8 columns.
  static H2OT_DEVICE void load_rows(uint32_t (&a)[4], LineStage<kSide>& stage, int row, int v) {
    const int lane = threadIdx.x % kLanes;
    load_matrices(a, stage.place(row + lane % 16, v + lane / 16));
  }
  static H2OT_DEVICE void load_columns(uint32_t (&b)[kAcross][2], LineStage<kSide>& stage, int v) {
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int across = 0; across < kAcross; across += 2) {
      const int column = kSide + first_column() + across * 8 + lane / 16 * 8 + lane % 8;
      uint32_t read[4];
      load_matrices(read, stage.place(column, v + lane / 8 % 2));
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

  // Two halves, each summed from zero: 16 channels of Pairs, the small products first, or 32 channels.
  H2OT_DEVICE void finish_line(LineStage<kSide>& stage) {
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
};

// By warpgroups of 64 x 64 pairs, of which each warp holds 16 rows.
template <class Operand, int kSide>
struct GroupProducts {
  static constexpr bool kAsynchronous = true;
  static constexpr int kDown = 1, kAcross = kGroupSide / 8;  // 16 x 8 fragments of a warp
  static constexpr int kGroupsAcross = kSide / kGroupSide, kThreads = kGroupsAcross * kGroupsAcross * kGroupThreads;
  float total[kDown][kAcross][4];
  float part[kAcross][4];  // of a line

  static H2OT_DEVICE int group_row() { return threadIdx.x / kGroupThreads / kGroupsAcross * kGroupSide; }
  static H2OT_DEVICE int first_row() { return group_row() + threadIdx.x / kLanes % 4 * 16; }
  static H2OT_DEVICE int first_column() { return threadIdx.x / kGroupThreads % kGroupsAcross * kGroupSide; }

  H2OT_DEVICE void clear() {
    for (int across = 0; across < kAcross; across++) {
      for (int e = 0; e < 4; e++) total[0][across][e] = part[across][e] = 0;
    }
  }

  // Starts the products of a line: of Pairs the small ones first.
  H2OT_DEVICE void start_line(LineStage<kSide>& stage) {
    const uint64_t rows = shared_matrix(stage.token[group_row()]);
    const uint64_t columns = shared_matrix(stage.token[kSide + first_column()]);
    const auto multiply = [&](int a, int b, bool adds) {
      const uint64_t of_rows = moved_matrix(rows, a), of_columns = moved_matrix(columns, b);
      if constexpr (std::is_same<Operand, BFloat16>::value) {
        start_bfloat16_products(part, of_rows, of_columns, adds);
      } else {
        start_float16_products(part, of_rows, of_columns, adds);
      }
    };
    constexpr int kStep = 16, kLower = int(kPairChannels);
    begin_products();
    if constexpr (Entry<Operand>::kPairs) {
      for (int c = 0; c < kLower; c += kStep) multiply(kLower + c, c, c > 0);
      for (int c = 0; c < kLower; c += kStep) multiply(c, kLower + c, true);
      for (int c = 0; c < kLower; c += kStep) multiply(c, c, true);
    } else {
      for (int c = 0; c < int(kLine); c += kStep) multiply(c, c, c > 0);
    }
    commit_products();
  }
  H2OT_DEVICE void finish_line() {
    wait_for_products(part);
#pragma unroll
    for (int across = 0; across < kAcross; across++) {
      for (int e = 0; e < 4; e++) total[0][across][e] += part[across][e];
    }
  }
};

template <class Operand, int kSide>
using Products =
    typename std::conditional<kHasGroups, GroupProducts<Operand, kSide>, WarpProducts<Operand, kSide>>::type;

}  // namespace cuda
}  // namespace h2ot
