// Recovery with its tail in rotated channels (csrc/cpu/recover_rotated.cpp) in float32 on the tile unit, by bytes
// (tiles.h). What is above the diagonal of the triangle is packed as the weights of a layer, whose outputs c and later
// begin at channel c. The numbers of the diagonal are far larger, up to sqrt(C) times: beside them the others would
// have few digits, so they are multiplied in float32.
#include "../cpu/rotated.h"
#include "digit_rows.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

struct Triangle {
  Packed above;
  const float* diagonal;

  Triangle(const void* packed, int64_t C) : above(static_cast<const int8_t*>(packed), 1, C, C) {
    diagonal = reinterpret_cast<const float*>(above.digits + above.bytes());
  }
};

// What a thread works in, for `halves` times kSide rows.
struct Arrays {
  int32_t* products;  // [2][kSums]: one is finished while the next is made
  float* sums;        // [halves kSide][sums_width]
  DigitRows rows;

  Arrays(Carver& memory, int64_t C, int64_t M, int64_t halves)
      : products(memory.take<int32_t>(2 * kSums)),
        sums(memory.take<float>(halves * kSide * sums_width(M))),
        rows(memory, C, halves) {}
};

// A product that is to be finished: group `group` with the outputs of panel `panel`.
struct Pending {
  const int32_t* products = nullptr;
  int64_t group = 0, panel = 0;
};

// What a block of rows is of: those of sample b from query `first` on.
struct Block {
  const RecoverRotatedArgs& a;
  const Triangle& triangle;
  const Arrays& at;
  int64_t b, first;

  float* sums_of(int64_t row) const { return at.sums + row * sums_width(a.M); }
  // The product of row `row` with the outputs of a panel, but for the diagonal's share.
  void add(int64_t row, int64_t panel, Floats above) const {
    const int64_t C = a.attention.C, c = panel * kSide;
    const Floats x = load_some(at.rows.x + row * at.rows.stride + c, C - c);
    const Floats product[] = {above + x * load(triangle.diagonal + c)};
    const int64_t width = rotated_width(C);
    const float *const token = a.token + (first + row) * width + c, *const head = a.head + c;
    if (a.M == 3) return add_row<3>(product, token, head, width, a.M, sums_of(row));
    add_row<0>(product, token, head, width, a.M, sums_of(row));
  }
  void finish(const Pending& of) const {
    if (!of.products) return;
    const DigitRows& rows = at.rows;
    const int64_t begin = of.group * kGroup, left = rows.count - begin, height = rows.height(of.group);
    const Floats scale = load(triangle.above.scales + of.panel * kSide);
    for (int64_t r = 0; r < (left < height ? left : height); r++) {
      const Floats above = joined(rows, begin + r, of.products + r * kSide, rows.has_low[of.group], scale);
      add(begin + r, of.panel, above);
    }
  }
  // Rows without digits, all of whose sums are made anew.
  void add_plain_rows() const {
    const int64_t C = a.attention.C;
    for (int64_t r = 0; at.rows.has_plain && r < at.rows.count; r++) {
      const float* const x = at.rows.x + r * at.rows.stride;
      if (extent_of(x, triangle.above.channel_scales(), C).has_digits()) continue;
      memset(sums_of(r), 0, size_t(sums_width(a.M)) * sizeof(float));
      for (int64_t panel = 0; panel < triangle.above.panels; panel++) {
        add(r, panel, plain_product(triangle.above, x, C, panel));
      }
    }
  }
  void run() const {
    const DigitRows& rows = at.rows;
    const Packed& p = triangle.above;
    memset(at.sums, 0, size_t(rows.count * sums_width(a.M)) * sizeof(float));
    Pending before;
    for (int64_t panel = 0; panel < p.panels; panel++) {
      for (int64_t group = 0; group < rows.groups(); group++) {
        int32_t* const made = before.products == at.products ? at.products + kSums : at.products;
        multiply_group(rows, group, p.panel(panel), panel * kSide / kDepth, p.steps, made, [] {});
        finish(before);
        before = {made, group, panel};
      }
    }
    finish(before);
    add_plain_rows();
    for (int64_t r = 0; r < rows.count; r++) finish_row<float>(a, b, first + r, sums_of(r));
  }
};

Status rotate(const RecoverRotatedArgs& a, int64_t b, int64_t first, int64_t count, const void* attended) {
  const int64_t C = a.attention.C;
  const Triangle triangle(a.triangle, C);
  LinearTilesArgs layer = {};  // as which rows are split
  layer.C = C;
  const int64_t halves = groups_of(count, kSide);  // in blocks of equal size, of whole groups but for the last
  const int64_t size = 2 * groups_of(halves, 2 * groups_of(halves, 2 * most_groups(C)));
  Carver sizes(nullptr);
  Arrays(sizes, C, a.M, size);
  void* const memory = scratch(Slot::taker, sizes.bytes());
  if (!memory) return Status::out_of_memory;
  Carver carver(memory);
  Arrays at(carver, C, a.M, size);
  const TileRegisters registers;
  for (int64_t r = 0; r < count; r += size * kSide) {
    const int64_t here = count - r < size * kSide ? count - r : size * kSide;
    split(layer, triangle.above, static_cast<const float*>(attended) + r * C, C, here, at.rows, nullptr);
    Block{a, triangle, at, b, first + r}.run();
  }
  return Status::ok;
}

}  // namespace

Status rotated_tiles(const RecoverRotatedArgs& a, const Parallel& pool) {
  return rotate_attended<rotate>(a, pool, h2ot::attend);
}

}  // namespace H2OT_ISA
}  // namespace h2ot
