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

}  // namespace simt
