// Asynchronous copies, matrices and products of tensor cores in the simulator; part of simt.h.
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

inline double read_float16(uint32_t bits) { return double(from_bits<_Float16>(bits & 0xffffu)); }
inline double read_bfloat16(uint32_t bits) { return double(from_bits<float>(uint64_t(bits & 0xffffu) << 16)); }

// c + products as a tensor core adds them at worst: all are cut off at 24 bits below the largest, and so is their sum.
inline float add_truncated(float c, const double (&products)[16]) {
  double most = std::fabs(double(c));
  for (const double p : products) most = !(std::fabs(p) <= most) ? std::fabs(p) : most;
  if (most == 0) return c;
  if (!(most < HUGE_VAL)) {
    double sum = c;
    for (const double p : products) sum += p;
    return float(sum);
  }
  const int unit = std::ilogb(most) - 23;
  const double to_units = std::ldexp(1.0, -unit);
  int64_t sum = int64_t(c * to_units);
  for (const double p : products) sum += int64_t(p * to_units);
  return cut(std::ldexp(double(sum), unit));
}

// mma.sync.aligned.m16n8k16.row.col.f32.*.*.f32 with the fragments of the PTX manual, groupID = lane / 4, threadID =
// lane % 4, two values to a register. A (16 x 16): register e at row groupID + (e % 2) 8, columns 2 threadID + (e / 2)
// 8 and the next. B (16 x 8): register e at rows 2 threadID + 8 e and the next, column groupID. C (16 x 8): c0, c1 at
// (groupID, 2 threadID + {0, 1}), c2, c3 at (groupID + 8, ...).
template <double (*kRead)(uint32_t)>
void multiply(Exchange* const (&lanes)[kLanes]) {
  double a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; lane++) {
    const int group = lane / 4, thread = lane % 4;
    for (int half = 0; half < 2; half++) {
      for (int e = 0; e < 4; e++) {
        a[group + e % 2 * 8][2 * thread + e / 2 * 8 + half] = kRead(lanes[lane]->a[e] >> (16 * half));
      }
      for (int e = 0; e < 2; e++) b[2 * thread + e * 8 + half][group] = kRead(lanes[lane]->b[e] >> (16 * half));
    }
  }
  for (int lane = 0; lane < kLanes; lane++) {
    for (int e = 0; e < 4; e++) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      double products[16];
      for (int k = 0; k < 16; k++) products[k] = a[row][k] * b[k][column];
      lanes[lane]->c[e] = add_truncated(lanes[lane]->c[e], products);
    }
  }
}

}  // namespace simt
