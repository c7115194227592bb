// Asynchronous copies and matrices of tensor cores in the simulator; part of simt.h.
#pragma once

namespace simt {

// 16 bytes that no thread moves.
SIMT_UNWATCHED inline __attribute__((noinline)) void move_16(void* to, const void* from) { std::memcpy(to, from, 16); }

// Nothing may be read of the destination from the start of a copy on (it holds numbers that nobody wrote, for NaN could
// end as a distance of zero, which is only slow), and its bytes only come with the wait. Inlined: the watcher is told
// of the kernel's line.
inline __attribute__((always_inline)) void start_copy(void* to, const void* from, bool there) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) stop("an address", "cp.async");
  Copies& copies = machine.copies[machine.running];
  uint64_t stray[2];
  for (uint64_t& four : stray) four = machine.draw() & 0xcfffcfffcfffcfff;  // float16 up to 32
  if (there) touch(Access::read, from, 16);
  move_16(to, stray);
  touch(Access::copy, to, 16);
  copies.under_way.push_back({static_cast<unsigned char*>(to), from, there, copies.committed});
}
inline void set_unpublished(bool value) {
  bool& own = machine.copies[machine.running].unpublished;
  machine.unpublished += int(value) - int(own);
  own = value;
}
inline void wait_for_groups(uint64_t newest) {
  Copies& copies = machine.copies[machine.running];
  const auto lands = [&](const Copy& copy) {
    if (copy.group + newest >= copies.committed) return false;
    touch(Access::arrive, copy.to, 16);
    static const uint64_t zeros[2] = {};
    move_16(copy.to, copy.there ? copy.from : zeros);
    set_unpublished(true);
    return true;
  };
  std::erase_if(copies.under_way, lands);
}

inline void multiply_in_warp(float* c, const uint32_t* a, const uint32_t* b, WarpOperation operation,
                             const char* place) {
  Lanes& lanes = machine.own_lanes();
  const int lane = machine.lane();
  lanes.c[lane] = c;
  lanes.a[lane] = a;
  lanes.b[lane] = b;
  warp_operation(operation, place);
}

// ldmatrix.sync.aligned.m8n8.x4: lane l names row l % 8 of matrix l / 8, and takes of each matrix the pair l % 4 of row
// l / 4.
inline void load(Lanes& lanes) {
  for (int from = 0; from < kLanes; from++) {
    if (lanes.value[from] % 16) stop("an address", "ldmatrix");
    touch_by_warp(reinterpret_cast<const void*>(lanes.value[from]), 16);
    uint32_t row[4];
    move_16(row, reinterpret_cast<const void*>(lanes.value[from]));
    for (int pair = 0; pair < 4; pair++) lanes.loaded[from % 8 * 4 + pair][from / 8] = row[pair];
  }
}

// wgmma m64n64k16 of two matrices of 64 rows in shared memory: rows of 128 bytes, their 16-byte vectors in the order of
// the 128-byte swizzle, which is one of the addresses: bits 7 to 9 are added to bits 4 to 6 without carry. Read when
// the thread waits, as late as may be.
inline void check_published() {
  if (machine.unpublished > 0) stop("products read copies that are not published", "wgmma");
}
inline const void* vector_at(uint64_t matrix, int row, int vector) {
  const uint64_t at = matrix + row * 128 + vector * 16;
  return reinterpret_cast<const void*>(at ^ (at >> 7 & 7) << 4);
}
inline void start_product(const GroupProduct& product) {
  if (product.a % 32 || product.b % 32) stop("an address", "wgmma");
  for (int row = 0; machine.lane() == 0 && row < 64; row++) {  // it may be read at once, too
    for (const uint64_t matrix : {product.a, product.b}) {
      for (int vector = 0; vector < 2; vector++) touch_by_warp(vector_at(matrix, row, vector), 16);
    }
  }
  machine.copies[machine.running].products.push_back(product);
}
inline void read_line(uint64_t matrix, int row, uint16_t (&bits)[16]) {
  for (int vector = 0; vector < 2; vector++) move_16(bits + vector * 8, vector_at(matrix, row, vector));
}
inline void finish_products() {
  const int lane = machine.lane(), first = machine.running / kLanes % 4 * 16 + lane / 4;
  for (const GroupProduct& product : machine.copies[machine.running].products) {
    uint16_t columns[16][16];
    for (int c = 0; c < 16; c++) read_line(product.b, c / 2 * 8 + lane % 4 * 2 + c % 2, columns[c]);
    for (int r = 0; r < 2; r++) {
      uint16_t row[16];
      read_line(product.a, first + r * 8, row);
      float sums[16];
      for (int c = 0; c < 16; c++) sums[c] = product.adds ? product.c[c / 2][r * 2 + c % 2] : 0;
      multiply_line(row, columns, product.is_brain, sums);
      for (int c = 0; c < 16; c++) product.c[c / 2][r * 2 + c % 2] = sums[c];
    }
  }
  machine.copies[machine.running].products.clear();
}

}  // namespace simt
