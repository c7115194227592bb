// What tensor cores compute in the simulator. Always optimised and without sanitizers: it touches registers only.
#include <cmath>

#include "simt.h"

namespace simt {

namespace {

// Where the processor has AVX2, the same with it.
#define SIMT_VECTORS __attribute__((target_clones("arch=haswell", "default"), optimize("O3")))

constexpr int64_t kInfinite = 0x7ff;
int64_t exponent_bits(double v) { return int64_t(to_bits(v) >> 52 & 0x7ff); }
double two_to(int64_t exponent_bits) { return from_bits<double>(uint64_t(exponent_bits) << 52); }

inline double read_float16(uint64_t bits) {
  const bool is_finite = (bits & 0x7c00) != 0x7c00;
  const double magnitude = from_bits<double>((bits & 0x7fff) << 42) * two_to(1008 + 1023);
  return from_bits<double>(to_bits(magnitude) | (is_finite ? 0 : uint64_t(kInfinite) << 52) | (bits & 0x8000) << 48);
}
inline double read_bfloat16(uint64_t bits) { return double(from_bits<float>(bits << 16)); }

// Of two floats of 16 bits: not 0 where one of them is infinite or NaN.
template <bool is_brain>
uint32_t infinite_halves(uint32_t bits) {
  const uint32_t exponents = is_brain ? 0x7f807f80 : 0x7c007c00, lowest = is_brain ? 0x00800080 : 0x04000400;
  return ((bits & exponents) + lowest) & 0x80008000;
}

float add_any(float c, const double (&products)[16]) {
  double sum = c;
  for (const double p : products) sum += p;
  return float(sum);
}

// c + row columns as a tensor core adds the products at worst: all are cut off at 24 bits below the largest, and so is
// their sum.
template <int kColumns>
inline __attribute__((always_inline)) void add_products(const double (&row)[16], const double (&columns)[16][kColumns],
                                                        float* c) {
  double products[16][kColumns];
  int64_t most[kColumns];
  uint32_t sum[kColumns];
  double to_units[kColumns];
  for (int n = 0; n < kColumns; n++) most[n] = exponent_bits(c[n]);
  for (int k = 0; k < 16; k++) {
    for (int n = 0; n < kColumns; n++) {
      products[k][n] = row[k] * columns[k][n];
      const int64_t own = exponent_bits(products[k][n]);
      most[n] = own > most[n] ? own : most[n];
    }
  }
  int64_t most_of_all = 0;
  for (int n = 0; n < kColumns; n++) {
    most_of_all = most[n] > most_of_all ? most[n] : most_of_all;
    to_units[n] = two_to(2 * 1023 + 23 - most[n]);
    sum[n] = uint32_t(int32_t(c[n] * to_units[n]));
  }
  if (most_of_all == kInfinite) {
    for (int n = 0; n < kColumns; n++) {
      if (most[n] < kInfinite) continue;
      double own[16];
      for (int k = 0; k < 16; k++) own[k] = products[k][n];
      c[n] = add_any(c[n], own);
    }
  }
  for (int k = 0; k < 16; k++) {
    for (int n = 0; n < kColumns; n++) sum[n] += uint32_t(int32_t(products[k][n] * to_units[n]));
  }
  for (int n = 0; n < kColumns; n++) {
    const float total = bits::cut(double(int32_t(sum[n])) * two_to(most[n] - 23));
    c[n] = most[n] == 0 || most[n] == kInfinite ? c[n] : total;
  }
}

// mma.sync.aligned.m16n8k16.row.col.f32.*.*.f32 with the fragments of the PTX manual, groupID = lane / 4, threadID =
// lane % 4, two values to a register. A (16 x 16): register e at row groupID + (e % 2) 8, columns 2 threadID + (e / 2)
// 8 and the next. B (16 x 8): register e at rows 2 threadID + 8 e and the next, column groupID. C (16 x 8): c0, c1 at
// (groupID, 2 threadID + {0, 1}), c2, c3 at (groupID + 8, ...).
template <double (*kRead)(uint64_t)>
inline __attribute__((always_inline)) void multiply(Lanes& lanes) {
  // Most tiles are larger than a sample: rows of zeros add nothing to finite numbers.
  uint32_t row_bits[16] = {}, column_bits[8] = {}, infinite = 0, any_column = 0;
  for (int lane = 0; lane < kLanes; lane++) {
    const uint32_t *own = lanes.a[lane], *other = lanes.b[lane];
    row_bits[lane / 4] |= own[0] | own[2];
    row_bits[lane / 4 + 8] |= own[1] | own[3];
    column_bits[lane / 4] |= other[0] | other[1];
    for (int e = 0; e < 4; e++) infinite |= infinite_halves<kRead == read_bfloat16>(own[e]);
    for (int e = 0; e < 2; e++) infinite |= infinite_halves<kRead == read_bfloat16>(other[e]);
  }
  uint32_t any_row = infinite;
  for (const uint32_t bits : row_bits) any_row |= bits;
  for (const uint32_t bits : column_bits) any_column |= bits;
  if (any_row == 0 || (any_column | infinite) == 0) return;
  double a[16][16], b[16][8];
  float c[16][8];
  for (int lane = 0; lane < kLanes; lane++) {
    const int group = lane / 4, thread = lane % 4;
    for (int half = 0; half < 2; half++) {
      for (int e = 0; e < 4; e++) {
        a[group + e % 2 * 8][2 * thread + e / 2 * 8 + half] = kRead(lanes.a[lane][e] >> 16 * half & 0xffff);
        c[group + e / 2 * 8][2 * thread + e % 2] = lanes.c[lane][e];
      }
      for (int e = 0; e < 2; e++) {
        b[2 * thread + e * 8 + half][group] = kRead(lanes.b[lane][e] >> 16 * half & 0xffff);
      }
    }
  }
  for (int row = 0; row < 16; row++) {
    if (row_bits[row] | infinite) add_products(a[row], b, c[row]);
  }
  for (int lane = 0; lane < kLanes; lane++) {
    for (int e = 0; e < 4; e++) lanes.c[lane][e] = c[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
  }
}

template <double (*kRead)(uint64_t)>
inline __attribute__((always_inline)) void multiply_row(const uint16_t (&row)[16], const uint16_t (&columns)[16][16],
                                                        float (&c)[16]) {
  uint32_t row_bits = 0, infinite = 0;
  for (int k = 0; k < 16; k++) {
    row_bits |= row[k];
    infinite |= infinite_halves<kRead == read_bfloat16>(row[k]);
    for (int n = 0; n < 16; n++) infinite |= infinite_halves<kRead == read_bfloat16>(columns[n][k]);
  }
  if ((row_bits | infinite) == 0) return;
  double a[16], b[16][16];
  for (int k = 0; k < 16; k++) {
    a[k] = kRead(row[k]);
    for (int n = 0; n < 16; n++) b[k][n] = kRead(columns[n][k]);
  }
  add_products(a, b, c);
}

}  // namespace

SIMT_VECTORS void multiply_float16(Lanes& lanes) { multiply<read_float16>(lanes); }
SIMT_VECTORS void multiply_bfloat16(Lanes& lanes) { multiply<read_bfloat16>(lanes); }

SIMT_VECTORS void multiply_line(const uint16_t (&row)[16], const uint16_t (&columns)[16][16], bool is_brain,
                                float (&c)[16]) {
  is_brain ? multiply_row<read_bfloat16>(row, columns, c) : multiply_row<read_float16>(row, columns, c);
}

}  // namespace simt
