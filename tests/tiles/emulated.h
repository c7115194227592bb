// A tile unit in plain C++, for the kernels of csrc/amx as they are: they run where there is none, and between guard
// bands. The compiler reads it before a kernel's source (-include): lint would sort a line that includes it.
//
// What the processor's manual says: tiles of 16 rows of 64 bytes, none before they are configured; a product of
// bytes adds four neighbours of a row times four of a column to a 32-bit sum; one of bfloat16 numbers two of each, the
// even and the odd ones summed apart.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Unit {
  bool configured = false;
  unsigned char tile[8][16][64];
};
static thread_local Unit unit;

#define EMULATED_WANT(condition)                                    \
  if (!(condition)) {                                               \
    fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    abort();                                                        \
  }

static inline void configure(const void* shapes) {
  const unsigned char* const at = static_cast<const unsigned char*>(shapes);
  EMULATED_WANT(at[0] == 1 && at[1] == 0);
  for (int i = 0; i < 8; i++) EMULATED_WANT(at[16 + 2 * i] == 64 && at[17 + 2 * i] == 0 && at[48 + i] == 16);
  memset(unit.tile, 0xff, sizeof unit.tile);  // no number is this until written
  unit.configured = true;
}
static inline void release() { unit.configured = false; }
static inline void load(int tile, const void* from, int64_t stride) {
  EMULATED_WANT(unit.configured);
  for (int r = 0; r < 16; r++) memcpy(unit.tile[tile][r], static_cast<const char*>(from) + r * stride, 64);
}
static inline void store(int tile, void* to, int64_t stride) {
  EMULATED_WANT(unit.configured);
  for (int r = 0; r < 16; r++) memcpy(static_cast<char*>(to) + r * stride, unit.tile[tile][r], 64);
}
static inline void zero(int tile) {
  EMULATED_WANT(unit.configured);
  memset(unit.tile[tile], 0, sizeof unit.tile[tile]);
}
static inline void products(int sums, int left, int right) {
  EMULATED_WANT(unit.configured);
  for (int m = 0; m < 16; m++) {
    for (int n = 0; n < 16; n++) {
      int64_t sum = 0;
      for (int k = 0; k < 64; k++) {
        const auto a = int8_t(unit.tile[left][m][k]), b = int8_t(unit.tile[right][k / 4][4 * n + k % 4]);
        sum += a * b;
      }
      int32_t to;
      memcpy(&to, unit.tile[sums][m] + 4 * n, 4);
      sum += to;
      EMULATED_WANT(sum == int32_t(sum));  // the unit would wrap around
      to = int32_t(sum);
      memcpy(unit.tile[sums][m] + 4 * n, &to, 4);
    }
  }
}

static inline float widened(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static inline void half_products(int sums, int left, int right) {
  EMULATED_WANT(unit.configured);
  for (int m = 0; m < 16; m++) {
    for (int n = 0; n < 16; n++) {
      float sum[2] = {}, to;
      for (int k = 0; k < 32; k++) {
        uint16_t a, b;
        memcpy(&a, unit.tile[left][m] + 2 * k, 2);
        memcpy(&b, unit.tile[right][k / 2] + 4 * n + k % 2 * 2, 2);
        sum[k % 2] += widened(a) * widened(b);
      }
      memcpy(&to, unit.tile[sums][m] + 4 * n, 4);
      to += sum[0] + sum[1];
      memcpy(unit.tile[sums][m] + 4 * n, &to, 4);
    }
  }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::configure
#define _tile_release emulated::release
#define _tile_loadd emulated::load
#define _tile_stream_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_zero emulated::zero
#define _tile_dpbssd emulated::products
#define _tile_dpbf16ps emulated::half_products

// Two pieces of the tasks, one after the other.
static inline void run_in_two(int64_t tasks, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
  body(context, 0, tasks / 2);
  body(context, tasks / 2, tasks);
}
