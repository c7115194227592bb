#include "plan.h"

#include <algorithm>
#include <cmath>

namespace h2ot {
namespace cuda {
namespace {

bool is_half(Dtype dtype) { return dtype == Dtype::bf16 || dtype == Dtype::f16; }

// Multiply-adds of 16-bit tensor products with float32 sums per clock and multiprocessor, as NVIDIA's peak figures
// count for mma.sync.
int64_t tensor_rate(const Machine& machine) {
  if (machine.major == 8) return machine.minor == 0 ? 1024 : 256;
  return machine.major == 9 || machine.major == 10 ? 1024 : 256;
}

// Clocks of the busiest multiprocessor: tiles of rows x columns, `work` operations per pair and channel at `rate`.
double clocks(int64_t tiles, int64_t pairs, int64_t C, double work, int64_t rate, const Machine& machine) {
  return double(ceil_div(tiles, machine.multiprocessors)) * double(pairs * C) * work / double(rate);
}

int64_t upper_tiles(int64_t N, int64_t rows, int64_t columns) {
  const int64_t ratio = columns / rows, last = ceil_div(N, columns) - 1;
  return tiles_before(last, ratio) + std::min(ceil_div(N, rows), ratio * (last + 1));
}

// Which pairs of a sample are searched.
enum class Cover {
  triangle,  // of tokens, each once
  square,    // of tokens
  centres    // tokens and centres
};
Cover cover_of(Search search) { return search == Search::stored ? Cover::triangle : Cover::square; }

int64_t all_tiles(const Problem& p, Cover cover, int64_t rows, int64_t columns) {
  if (cover == Cover::triangle) return p.B * upper_tiles(p.N, rows, columns);
  return p.B * ceil_div(p.N, rows) * ceil_div(cover == Cover::square ? p.N : p.centres, columns);
}

// Clocks of the busiest multiprocessor by differences, as their instructions count.
double difference_clocks(const Problem& p, const Machine& machine, Cover cover, int64_t rows, int64_t columns) {
  constexpr int64_t kLanes = 128;
  return clocks(all_tiles(p, cover, rows, columns), rows * columns, p.C, 2, kLanes, machine);
}

// Whether the smaller tiles of differences take fewer clocks.
bool prefers_small_tiles(const Problem& p, const Machine& machine, Cover cover) {
  // Large tiles read half as much: where they take as long, they win.
  return 8 * difference_clocks(p, machine, cover, kSmallRows, kSmallColumns) <
         7 * difference_clocks(p, machine, cover, kDirectRows, kDirectColumns);
}

// Products of tiles with `side` rows and columns: what they take of the rate. The warps of a small tile load more from
// shared memory per product. By warpgroups (9.0) as measured on an H100.
double product_clocks(const Problem& p, const Machine& machine, Cover cover, Distance distance, int64_t side) {
  const bool large = side == kProductSides[0];
  const double products = distance == Distance::products ? 3 : 1;
  const double loads = machine.major == 9 ? (large ? 1.0 : 1.8) : large ? 1.6 : 2.4;
  return clocks(all_tiles(p, cover, side, side), side * side, p.C, products * loads, tensor_rate(machine), machine);
}

int32_t product_side(const Problem& p, const Machine& machine, Cover cover, Distance distance) {
  int32_t best = kProductSides[0];
  for (const int32_t side : kProductSides) {
    const auto cost = [&](int32_t s) { return product_clocks(p, machine, cover, distance, s); };
    if (cost(side) < cost(best)) best = side;
  }
  return best;
}

Distance cheapest(const Problem& p, const Machine& machine, Cover cover) {
  if (p.dtype == Dtype::f64) return Distance::direct;
  const Distance products = is_half(p.dtype) && p.J == 1 ? Distance::exact_products : Distance::products;
  // On an H100 differences take twice what their instructions count (16 x 32: 2.1 to 2.6, 32 x 64: 2). kOperands is a
  // guess: clocks of the kernels before products, and until the first lines are there.
  constexpr double kDifferences = 2, kOperands = 7000;
  const bool small = cover != Cover::square && prefers_small_tiles(p, machine, cover);
  const double direct = kDifferences * difference_clocks(p, machine, cover, small ? kSmallRows : kDirectRows,
                                                         small ? kSmallColumns : kDirectColumns);
  const int32_t side = product_side(p, machine, cover, products);
  // Products must win clearly. In smooth clips many float32 tokens are then decided by several candidates in float64,
  // by differences a few: 460 us more for B 64, N 351, C 1536 on an H100.
  constexpr double kDecided = 2.9;
  const double decided =
      products == Distance::products ? kDecided * double(p.B * p.N * p.C) / machine.multiprocessors : 0;
  const double multiplied = 1.5 * product_clocks(p, machine, cover, products, side) + kOperands + decided;
  return multiplied < direct ? products : Distance::direct;
}

Distance allowed(const Problem& p, Distance distance) {
  if (p.dtype == Dtype::f64) return Distance::direct;
  if (distance == Distance::exact_products && !(is_half(p.dtype) && p.J == 1)) return Distance::direct;
  return distance;
}

// Lays out the workspace; every part starts at a multiple of 256 bytes.
Workspace lay_out(const Problem& p, const Plan& plan, int64_t samples) {
  constexpr int64_t kAlignment = 256;
  Workspace at;
  int64_t used = 0;
  const auto take = [&](bool needed, int64_t bytes) {
    if (!needed) return int64_t(-1);
    const int64_t offset = used;
    used += ceil_div(bytes, kAlignment) * kAlignment + kGuardBytes;
    return offset;
  };
  const int64_t tokens = samples * p.N, wide = p.dtype == Dtype::f64 ? 8 : 4;
  const bool scores = p.k > 0, stored = scores && plan.search == Search::stored, streamed = scores && !stored;
  at.rows = take(plan.pitch > 0, tokens * plan.pitch * wide);
  at.valid = take(true, tokens);
  at.exponent = take(true, samples * ceil_div(p.N, kTokensPerBlock) * 4);
  at.operands = take(plan.line_pitch > 0, tokens * plan.line_pitch * 2);
  at.scale = take(plan.distance != Distance::direct, plan.distance == Distance::products ? tokens * 4 : samples * 8);
  at.norm = take(plan.distance != Distance::direct, tokens * wide);
  at.matrix = take(stored, tokens * plan.matrix_pitch * wide);
  const int64_t list = std::max(plan.list, kPeakList);
  at.listed = take(streamed, tokens * plan.splits * list * wide);
  at.listed_at = take(streamed, tokens * plan.splits * list * 4);
  at.furthest = take(streamed, tokens * plan.splits * wide);
  at.nearest = take(scores, tokens * plan.near * 8);
  at.nearest_at = take(scores, tokens * plan.near * 4);
  at.proven = take(streamed, tokens * 4);
  at.peaks = take(streamed, tokens * 4);
  at.peak_count = take(streamed, samples * 8);
  at.m = take(scores, tokens * 8);
  at.key = take(scores, tokens * 8);
  at.squared = take(scores, tokens * 8);
  at.parent = take(scores, tokens * 4);
  at.largest = take(true, samples * 16);
  at.arrived = take(true, samples * 4);
  at.keys = take(scores, tokens * 8);
  at.flag = take(streamed, tokens);
  const int64_t lists = tokens * plan.labels.splits;
  at.centre_low = take(lists > 0, lists * kCandidates * wide);
  at.centre_at = take(lists > 0, lists * kCandidates * 4);
  at.centre_reach = take(lists > 0, lists * wide);
  at.centre_count = take(lists > 0, lists * 4);
  at.bytes = used;
  return at;
}

// Tokens, as they are read and as they enter products.
void set_tokens(const Problem& p, const Machine& machine, Plan& plan) {
  // Where there are blocks enough, smaller ones overlap better.
  const bool few = p.B * ceil_div(p.N, kTokensPerBlock) <= 2 * machine.multiprocessors;
  plan.pool_warps = few && p.C >= 256 ? 2 : 1;
  plan.overlaps = can_overlap(machine);
  const bool exact = plan.distance == Distance::exact_products;
  plan.pitch = p.in_place && (exact || !is_half(p.dtype)) ? 0 : ceil_div(p.C, 4) * 4;
  if (plan.distance == Distance::products) plan.line_pitch = ceil_div(p.C, kPairChannels) * kLine;
  if (exact && !p.in_place) plan.line_pitch = ceil_div(p.C, kLine) * kLine;
}

// Parts of the columns for as many blocks as keep a device busy.
int64_t split_columns(const Problem& p, const Machine& machine, int64_t rows, int64_t columns) {
  const int64_t blocks = std::max<int64_t>(p.B, 1) * ceil_div(p.N, rows);
  return std::max<int64_t>(1, std::min({int64_t(8), columns, 2 * machine.multiprocessors / blocks}));
}

LabelPlan plan_labels(const Problem& p, const Machine& machine, Distance distance, int32_t side) {
  LabelPlan labels = {};
  const bool direct = distance == Distance::direct;
  const bool small = direct && prefers_small_tiles(p, machine, Cover::centres);
  if (side == 0) side = product_side(p, machine, Cover::centres, distance);
  labels.tile_rows = small ? kSmallRows : direct ? kDirectRows : side;
  labels.tile_columns = small ? kSmallColumns : direct ? kDirectColumns : side;
  labels.splits = split_columns(p, machine, labels.tile_rows, ceil_div(p.centres, labels.tile_columns));
  return labels;
}

// The samples of a pass, and where its parts lie.
void set_workspace(const Problem& p, int64_t most, Plan& plan) {
  const int64_t each = lay_out(p, plan, 1).bytes;
  plan.samples = std::max<int64_t>(1, std::min({p.B, kGridLimit, most, kWorkspaceBytes / each}));
  plan.at = lay_out(p, plan, plan.samples);
}

}  // namespace

Bound search_bound(const Problem& p, Distance distance) {
  constexpr double kUnit = 0x1p-24;  // of float32 rounding
  const double C = double(p.C), slabs = double(ceil_div(p.C, kSlabChannels));
  // Direct: a rounding of each difference and square, the additions of a slab and of the slabs, or (small tiles) of a
  // group's channels and of the groups; sqrt halves it all.
  constexpr int32_t kFewestGroups = kSmallGroups / 2;  // float64 has half as many
  const double in_groups = 8.0 * double(ceil_div(p.C, 8 * kFewestGroups)) + kSmallGroups;
  const double roundings = std::max(std::min(C, double(kSlabChannels)) + slabs, std::min(C, in_groups)) + 8;
  if (p.dtype == Dtype::f64) return {0.6 * 0x1p-53 * (roundings + 16), std::sqrt(C) * 0x1p-510, 0};
  Bound bound = {0.6 * kUnit * (roundings + 1), std::sqrt(C) * 0x1p-50, 0};
  if (distance == Distance::direct) return bound;
  // Products. An mma adds 16 products to a sum and cuts off 20 units of 2^-23 of what it adds at worst (once, or twice
  // for eight each). Summed from zero are lines, with two such mma for Pairs (those of the lower parts, below 2^-10 of
  // them, come before) and four else, or, by warps, half lines: twice the sums then. They are rounded, as are the norms
  // and what is made of them.
  const bool pairs = distance == Distance::products;
  const double mma = pairs ? 82 : 160, sums = double(ceil_div(p.C, pairs ? 16 : 32));
  const double norms = double(ceil_div(p.C, 128)) + 8;
  // Pairs: tokens less the origin are rounded (4), split into 22 bits (4), the lower parts' product is left out (4),
  // and float16 has no more than 2^-25, where a token's largest difference is 2^14 or more: 2^-39 sqrt(C) of its
  // length. Powers of two round nothing. What they bring below float32's range is 2^-149 of the sample's scale per
  // channel at worst, or 2^-126 where a token counts as the origin; of norms and products, 2^-120 C: eta.
  const double split = pairs ? 12 + std::sqrt(C) * 0x1p-14 : 0;
  bound.spread = float((mma + sums + norms + split + 4) * kUnit);
  // Of tokens as they are, float32 loses products below 2^-126, which is 2^-66 of the largest or less.
  if (!pairs) bound.eta = std::sqrt(C) * 0x1p-30;
  const double vanishing = bound.eta / (1 - bound.beta);
  bound.vanishing = float(vanishing * vanishing * (1 + 0x1p-20));
  return bound;
}

bool readable_in_place(const Tokens& x) {
  const int64_t vector = 16 / element_bytes(x.dtype);
  return x.J == 1 && x.stride_c == 1 && x.C % (is_half(x.dtype) ? 8 : 4) == 0 && x.stride_n % vector == 0 &&
         x.stride_b % vector == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

Plan plan_score_as(const Problem& p, const Machine& machine, Search search, Distance distance, int64_t most,
                   int32_t side) {
  Plan plan = {};
  plan.search = search;
  plan.distance = allowed(p, distance);
  const bool direct = plan.distance == Distance::direct, streamed = search == Search::streamed;
  const bool small = direct && !streamed && prefers_small_tiles(p, machine, Cover::triangle);
  if (p.centres > 0 && streamed) plan.labels = plan_labels(p, machine, plan.distance, side);
  if (streamed) side = kStreamedSide;
  if (side == 0) side = product_side(p, machine, cover_of(search), plan.distance);
  plan.tile_rows = small ? kSmallRows : direct ? kDirectRows : side;
  plan.tile_columns = small ? kSmallColumns : direct ? kDirectColumns : side;
  set_tokens(p, machine, plan);
  plan.splits = 1;
  if (streamed) {
    plan.splits = split_columns(p, machine, plan.tile_rows, ceil_div(p.N, plan.tile_columns));
    plan.list = p.k - 1 + kSpare <= kLongestList ? p.k - 1 + kSpare : 0;
    plan.near = p.k - 1 + kSpare;
  } else {
    plan.matrix_pitch = ceil_div(p.N, plan.tile_columns) * plan.tile_columns;
    plan.tiles = upper_tiles(p.N, plan.tile_rows, plan.tile_columns);
    plan.near = p.k - 1;
  }
  set_workspace(p, most, plan);
  return plan;
}

Plan plan_score(const Problem& p, const Machine& machine) {
  const Search search = p.N <= kStoredTokens ? Search::stored : Search::streamed;
  return plan_score_as(p, machine, search, cheapest(p, machine, cover_of(search)));
}

Plan plan_assign_as(const Problem& p, const Machine& machine, Distance distance, int64_t most, int32_t side) {
  Plan plan = {};
  plan.search = Search::streamed;
  plan.distance = allowed(p, distance);
  plan.labels = plan_labels(p, machine, plan.distance, side);
  plan.tile_rows = plan.labels.tile_rows;
  plan.tile_columns = plan.labels.tile_columns;
  set_tokens(p, machine, plan);
  set_workspace(p, most, plan);
  return plan;
}

Plan plan_assign(const Problem& p, const Machine& machine) {
  return plan_assign_as(p, machine, cheapest(p, machine, Cover::centres));
}

}  // namespace cuda
}  // namespace h2ot
