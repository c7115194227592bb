// The host side of the CUDA kernels: which search, which tiles, how much memory. Plain C++, no CUDA and no torch, so
// that it is tested where neither is. Sizes and offsets are 64-bit; what fits a launch is checked here.
#pragma once

#include <cmath>
#include <cstdint>

#include "../launch.h"

#if defined(__CUDACC__)
#define H2OT_HOST_DEVICE __host__ __device__
#else
#define H2OT_HOST_DEVICE
#endif

namespace h2ot {
namespace cuda {

// What a plan depends on, of a device: compute capability and the number of multiprocessors; and the capability (90 for
// 9.0) that the code it runs was compiled for: an older one, where the driver makes it from PTX.
struct Machine {
  int32_t major, minor, multiprocessors;
  int32_t code = 10 * major + minor;
};

constexpr int32_t kWaitingCode = 90;  // from here on follow_previous() waits

// Whether a kernel's blocks may come before the kernel before it has ended.
constexpr bool can_overlap(const Machine& machine) { return machine.code >= kWaitingCode; }

// How approximate distances come about (float64 always decides in the end).
enum class Distance : int32_t {
  direct,          // sum of (a - b)^2 on the FFMA pipes: relative error only
  products,        // |a|^2 + |b|^2 - 2 a b on tensor cores, from tokens less one of them as sums of two float16
  exact_products,  // the same from tokens that are bfloat16 or float16, as they are
};

// Where they go.
enum class Search : int32_t {
  stored,    // all of a sample, [N, N], in the workspace
  streamed,  // the few nearest of each token, O(N k)
};

constexpr int32_t kDirectRows = 32, kDirectColumns = 64;
constexpr int32_t kSmallRows = 16, kSmallColumns = 32, kSmallGroups = 8;  // for few tiles; a warp per group of channels
constexpr int32_t kProductSides[] = {128, 64};                            // of tiles of products
constexpr int32_t kStreamedSide = 128;
constexpr int64_t kLine = 64;                   // 16-bit values of a token that are copied at once: channels, or
constexpr int64_t kPairChannels = kLine / 2;    // both parts of these
constexpr int32_t kSlabChannels = 32;           // summed before they are added to a total
constexpr int32_t kTokensPerBlock = 8;          // of the kernels with a warp per token
constexpr int64_t kStoredTokens = 2048;         // more tokens than this are streamed
constexpr int64_t kLongestList = 32;            // a streamed list; for larger k rows are searched in float64
constexpr int64_t kSpare = 4;                   // listed neighbours beyond those that m averages: they prove the others
constexpr int64_t kPeakList = 4;                // listed denser tokens of one that has none among its neighbours
constexpr int32_t kCandidates = 32;             // listed centres of a token: a lane each
constexpr int64_t kWorkspaceBytes = 256 << 20;  // passes over parts of the batch keep the workspace below it
constexpr int64_t kGuardBytes = 256;            // after each part of the workspace: nothing may touch them
constexpr int64_t kGridLimit = 65535;           // of a grid's second axis
constexpr int64_t kMostTokens = int64_t(1) << 30;

// Byte offsets into the workspace, for `samples` samples; -1: not there.
struct Workspace {
  int64_t rows;                 // [samples, N, pitch] pooled tokens
  int64_t valid;                // [samples, N] uint8
  int64_t exponent;             // [samples, groups] int32: the largest of kTokensPerBlock tokens
  int64_t operands;             // [samples, N, line pitch] uint16: the tokens as they enter products
  int64_t scale;                // [samples, 2] float32: of the tokens, and what a product counts; of pairs [samples, N]
  int64_t norm;                 // [samples, N] squared norms of the tokens as they enter products
  int64_t matrix;               // [samples, N, matrix_pitch] stored search
  int64_t listed;               // [samples, N, splits, list] streamed: lower bounds of the nearest
  int64_t listed_at;            // the same shape, int32: which tokens
  int64_t furthest;             // [samples, N, splits] upper bounds of the largest distance
  int64_t nearest, nearest_at;  // [samples, N, near] float64 and int32: the nearest in order
  int64_t proven;               // [samples, N] int32: how many of them are proven to be the nearest
  int64_t peaks;                // [samples, N] int32: tokens whose parent is not among them
  int64_t peak_count;           // [samples, 2] int32
  int64_t m, key;               // [samples, N] float64
  int64_t squared;              // [samples, N] float64: to the parent
  int64_t parent;               // [samples, N] int32
  int64_t largest;              // [samples, 2] patterns of float64: over all pairs, a lower bound and the value
  int64_t arrived;              // [samples] int32: blocks that are done
  int64_t keys;                 // [samples, N] uint64: in the order of selection
  int64_t flag;                 // [samples, N] uint8: without a parent so far
  int64_t centre_low;           // [samples, N, label splits, kCandidates]: lower bounds of centres that may be nearest
  int64_t centre_at;            // the same shape, int32: their positions
  int64_t centre_reach;         // [samples, N, label splits]: no centre above it is nearest
  int64_t centre_count;         // the same shape, int32: how many are listed; -1: more than there is room for
  int64_t bytes;
};

// How the centres near each token are found where no stored matrix holds their distances.
struct LabelPlan {
  int32_t tile_rows, tile_columns;  // tokens and centres
  int64_t splits;                   // of the centres; 0: no search
};

struct Plan {
  Distance distance;
  Search search;
  int32_t tile_rows, tile_columns;
  int64_t pitch;         // of copied tokens, 0: read in place
  int64_t line_pitch;    // of copied operands of products, 0: all read in place
  int64_t matrix_pitch;  // of the stored matrix
  int64_t tiles;         // grid of the stored search, per sample
  int64_t splits;        // of the columns, streamed search
  int64_t list;          // neighbours listed per token and split, streamed search; 0: rows are searched in float64
  int64_t near;          // neighbours kept per token in float64
  int64_t samples;       // per pass
  int32_t pool_warps;    // per token where tokens are pooled
  bool overlaps;         // can_overlap
  LabelPlan labels;
  Workspace at;
};

// |sqrt(s) - sqrt(v)| <= beta sqrt(v) + eta + what `spread` allows: v is the approximate squared distance of tokens
// i and j, s the true one, scaled alike. Products add an error of spread (norm_i + norm_j) to v.
struct Bound {
  double beta, eta;
  float spread;
  float vanishing = 0;  // what v can be of equal tokens, its spread taken off, where products underflow

  // The least that s can be for v, v's spread taken off.
  H2OT_HOST_DEVICE double least(double v) const {
    const double r = sqrt(v) * (1 - beta) - eta;
    return r > 0 ? r * r : 0;
  }
  // The most, v's spread added.
  H2OT_HOST_DEVICE double most(double v) const {
    const double r = sqrt(v) * (1 + beta) + eta;
    return r * r * (1 + 0x1p-22);
  }
  // Of two pairs, one with v (its spread added): the other is farther apart if its v (its spread taken off) is above
  // reach(v).
  H2OT_HOST_DEVICE double reach(double v) const {
    const double r = (sqrt(v) * (1 + beta) + 2 * eta) * (1 + 2 * beta);
    return r * r * (1 + 0x1p-22);
  }
  // One with v (its spread taken off): the other is nearer if its v (its spread added) is below below(v).
  H2OT_HOST_DEVICE double below(double v) const {
    const double r = (sqrt(v) * (1 - beta) - 2 * eta) * (1 - beta);
    return r > 0 ? r * r * (1 - 0x1p-22) : 0;
  }
};

// What a plan is made for. in_place: tokens are rows of whole 16-byte vectors already, float32 or float64 ones to
// search among, or bfloat16 or float16 ones to multiply. k: 0 where nothing is scored. centres: by which all tokens are
// labelled, 0: no labels.
struct Problem {
  int64_t B, N, J, C, k;
  Dtype dtype;
  bool in_place;
  int64_t centres = 0;
};

// The plan for a problem by counted costs: until a device has been measured, arithmetic per multiprocessor and clock.
Plan plan_score(const Problem& problem, const Machine& machine);
// The same with the choice made by the caller (tests); a distance that the tokens do not allow becomes direct.
// most: of the samples per pass. side: of kProductSides, 0: the counted one.
Plan plan_score_as(const Problem& problem, const Machine& machine, Search search, Distance distance,
                   int64_t most = kGridLimit, int32_t side = 0);
// The plan of labels by given centres (k is 0), the same with the choice made by the caller.
Plan plan_assign(const Problem& problem, const Machine& machine);
Plan plan_assign_as(const Problem& problem, const Machine& machine, Distance distance, int64_t most = kGridLimit,
                    int32_t side = 0);
// What the search's arithmetic can be off by.
Bound search_bound(const Problem& problem, Distance distance);
// Whether the tokens of x are such rows.
bool readable_in_place(const Tokens& x);

constexpr int64_t element_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

H2OT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles over the upper triangle, `ratio` row tiles per column tile, numbered column by column from the diagonal up.
struct Tile {
  int64_t row, column;
};

H2OT_HOST_DEVICE constexpr int64_t tiles_before(int64_t column, int64_t ratio) {
  return ratio * (column * (column + 1) / 2);
}

H2OT_HOST_DEVICE inline Tile tile_of(int64_t number, int64_t ratio) {
  const int64_t group = number / ratio;
  int64_t column = int64_t(sqrt(2.0 * double(group) + 0.25) - 0.5);  // off by one at most
  while (tiles_before(column, ratio) > number) column--;
  while (tiles_before(column + 1, ratio) <= number) column++;
  return {number - tiles_before(column, ratio), column};
}

}  // namespace cuda
}  // namespace h2ot
