// The host side of gathering and scattering on a GPU: axes merged, the width of a load chosen. Plain C++, no CUDA.
#pragma once

#include <cstdint>

#include "../launch.h"

namespace h2ot {
namespace cuda {

// What n is divided by. For n < 2^31 a product and a shift give the quotient (Granlund & Montgomery 1994):
// (n * factor / 2^32 + n) / 2^shift with factor = 2^32 (2^shift - value) / value + 1.
struct Divisor {
  int64_t value;
  uint32_t factor, shift;
};
Divisor divisor_of(int64_t value);

// One kernel's argument. The output is rows of `columns` units, contiguous; a unit is what one load reads, `unit` bytes
// of the innermost axis. Steps are in bytes, and of the input.
struct Move {
  const unsigned char* x;
  unsigned char* out;
  const int64_t* index;  // [index rows, K]
  const void* embed;     // [K, columns units], or null
  int64_t units;         // of the output
  int64_t K, frames;     // frames: those of the input when gathering
  int64_t frame_step, column_step;
  uint64_t nan;  // one, in the dtype, as often as it fits
  Divisor columns, rows_per_index;
  int32_t axes, frame_axis;  // of the rows, outermost (the batch) first
  int32_t unit, item;        // bytes
  Divisor size[kMaxDims];
  int64_t step[kMaxDims];
};

// From how many units on numbers have 64 bits. The simulator's tests lower it.
inline int64_t least_wide = int64_t(1) << 31;

Move plan_gather(const GatherArgs& args);
Move plan_scatter(const ScatterArgs& args);

constexpr int32_t kUnitsPerThread = 4;  // loads in flight
// Small blocks while there is less than one large one for every multiprocessor of a large device.
inline int32_t threads_for(int64_t units) { return units < 256 * 1024 ? 64 : 256; }

}  // namespace cuda
}  // namespace h2ot
