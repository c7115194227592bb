// Asynchronous copies and matrices of tensor cores in the simulator; part of simt.h.
#pragma once

namespace simt {

// Nothing may be read of the destination from the start of a copy on (it holds numbers that nobody wrote, for NaN could
// end as a distance of zero, which is only slow), and its bytes only come with the wait.
inline void start_copy(void* to, const void* from, bool there) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) stop("an address", "cp.async");
  Copies& copies = machine.copies[machine.running];
  for (int at = 0; at < 16; at += 2) {
    const uint16_t stray = uint16_t(machine.draw(0x10000) & 0xcfff);  // float16 up to 32
    std::memcpy(static_cast<unsigned char*>(to) + at, &stray, 2);
  }
  copies.under_way.push_back({static_cast<unsigned char*>(to), from, there, copies.committed});
}
inline void wait_for_groups(uint64_t newest) {
  Copies& copies = machine.copies[machine.running];
  const auto lands = [&](const Copy& copy) {
    if (copy.group + newest >= copies.committed) return false;
    if (copy.there) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
    copies.unpublished = true;
    return true;
  };
  std::erase_if(copies.under_way, lands);
}

// ldmatrix.sync.aligned.m8n8.x4: lane l names row l % 8 of matrix l / 8, and takes of each matrix the pair l % 4 of row
// l / 4.
inline void load(Exchange* const (&lanes)[kLanes]) {
  for (int lane = 0; lane < kLanes; lane++) {
    if (lanes[lane]->value % 16) stop("an address", "ldmatrix");
    for (int matrix = 0; matrix < 4; matrix++) {
      const uint64_t row = lanes[matrix * 8 + lane / 4]->value;
      std::memcpy(&lanes[lane]->loaded[matrix], reinterpret_cast<const unsigned char*>(row) + lane % 4 * 4, 4);
    }
  }
}

// wgmma m64n64k16 of two matrices of 64 rows in shared memory: rows of 128 bytes, their 16-byte vectors in the order of
// the 128-byte swizzle, which is one of the addresses: bits 7 to 9 are added to bits 4 to 6 without carry. Read when
// the thread waits, as late as may be.
inline void check_published() {
  for (uint32_t t = 0; t < block_size.x; t++) {
    if (machine.copies[t].unpublished) stop("products read copies that are not published", "wgmma");
  }
}
inline void start_product(const GroupProduct& product) {
  if (product.a % 32 || product.b % 32) stop("an address", "wgmma");
  machine.copies[machine.running].products.push_back(product);
}
inline void read_line(uint64_t matrix, int row, bool is_brain, double (&values)[16]) {
  for (int k = 0; k < 16; k++) {
    uint64_t at = matrix + row * 128 + k * 2;
    at ^= (at >> 7 & 7) << 4;
    uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<const void*>(at), 2);
    values[k] = half_value(bits, is_brain);
  }
}
inline void finish_products() {
  const int lane = machine.running % kLanes, first = machine.running / kLanes % 4 * 16 + lane / 4;
  for (const GroupProduct& product : machine.copies[machine.running].products) {
    double rows[2][16];
    for (int r = 0; r < 2; r++) read_line(product.a, first + r * 8, product.is_brain, rows[r]);
    for (int c = 0; c < 16; c++) {
      double column[16];
      read_line(product.b, c / 2 * 8 + lane % 4 * 2 + c % 2, product.is_brain, column);
      for (int r = 0; r < 2; r++) {
        double products[16];
        for (int k = 0; k < 16; k++) products[k] = rows[r][k] * column[k];
        float& sum = product.c[c / 2][r * 2 + c % 2];
        sum = add_products(product.adds ? sum : 0, products);
      }
    }
  }
  machine.copies[machine.running].products.clear();
}

}  // namespace simt
