// Frames taken out of a tensor, with an embedding, in any layout, and put back into zeros: one kernel, one pass.
//
// A thread moves four units (up to 16 bytes each) that lie a block's width apart, so that a warp reads and writes whole
// lines and four loads are in flight. Bytes: rows x inner elements read and written once, + the index (8 K a row), +
// the embedding (from L2). Floor: those bytes at the copy bandwidth.
#include <cstring>

#include "device.cuh"
#include "gather_plan.h"
#include "launch_cuda.h"

namespace h2ot {
namespace cuda {

// What one load reads.
template <int kBytes>
struct Unit;
template <>
struct alignas(16) Unit<16> {
  uint64_t words[2];
};
template <>
struct Unit<8> {
  uint64_t word;
};
template <>
struct Unit<4> {
  uint32_t word;
};
template <>
struct Unit<2> {
  uint16_t word;
};

// kCount elements of a dtype that are read at once, and their sums.
struct Single {
  typedef float stored;
  H2OT_DEVICE static float add(float a, float b) { return a + b; }
};
struct Double {
  typedef double stored;
  H2OT_DEVICE static double add(double a, double b) { return a + b; }
};
struct Brain {
  typedef uint16_t stored;
  H2OT_DEVICE static float wide(uint16_t bits) {
    const uint32_t shifted = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &shifted, 4);
    return value;
  }
  H2OT_DEVICE static uint16_t add(uint16_t a, uint16_t b) { return narrow_brain(wide(a) + wide(b)); }
};
struct Half {
  typedef uint16_t stored;
  H2OT_DEVICE static uint16_t add(uint16_t a, uint16_t b) { return narrow_half(widen_half(a) + widen_half(b)); }
};
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Elements {
  T v[kCount];
};

H2OT_DEVICE uint32_t divide(uint32_t n, const Divisor& by) {
  return (uint32_t(uint64_t(n) * by.factor >> 32) + n) >> by.shift;
}
H2OT_DEVICE uint64_t divide(uint64_t n, const Divisor& by) { return n / uint64_t(by.value); }

// Where a unit of the output comes from: a byte offset into x without its frame, its index row, its position on the
// frame axis and in its row.
template <class Count>
struct Place {
  int64_t offset;
  const int64_t* index;
  Count position, column;
};
template <class Count>
H2OT_DEVICE Place<Count> place_of(const Move& move, Count n) {
  Count rest = divide(n, move.columns);
  Place<Count> place = {0, nullptr, 0, n - rest * Count(move.columns.value)};
  place.offset = int64_t(place.column) * move.column_step;
  for (int axis = move.axes - 1; axis > 0; axis--) {
    const Count above = divide(rest, move.size[axis]);
    const Count at = rest - above * Count(move.size[axis].value);
    if (axis == move.frame_axis) place.position = at;
    place.offset += int64_t(at) * move.step[axis];
    rest = above;
  }
  place.offset += int64_t(rest) * move.step[0];
  place.index = move.index + int64_t(divide(rest, move.rows_per_index)) * move.K;
  return place;
}

// The position of frame in an ascending index row, which may end in -1 (padding); -1 where it is not there.
H2OT_DEVICE int64_t position_in(const int64_t* index, int64_t K, int64_t frame) {
  int64_t low = 0, high = K;
  while (low < high) {
    const int64_t middle = (low + high) / 2, value = index[middle];
    if (value < frame && value != -1) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < K && index[low] == frame ? low : -1;
}

template <class Unit>
H2OT_DEVICE Unit repeated(uint64_t pattern) {
  Unit unit;
  unsigned char bytes[16];
  memcpy(bytes, &pattern, 8);
  memcpy(bytes + 8, &pattern, 8);
  memcpy(&unit, bytes, sizeof unit);
  return unit;
}

// The units of this thread: first, first + blockDim.x, ...; those behind the last are the last again, and not stored.
template <class Count>
H2OT_DEVICE Count unit_of(int u) {
  return Count(blockIdx.x) * Count(blockDim.x * kUnitsPerThread) + Count(threadIdx.x) + Count(u) * Count(blockDim.x);
}

// Reads the units of this thread and gives each with its number and place to store(unit, n, place).
template <class Unit, class Count, bool kScatter, class Store>
H2OT_DEVICE void move_units(const Move& move, const Store& store) {
  Place<Count> place[kUnitsPerThread];
  int64_t frame[kUnitsPerThread];
  Unit value[kUnitsPerThread];
  const Count last = Count(move.units) - 1;
#pragma unroll
  for (int u = 0; u < kUnitsPerThread; u++) {
    const Count n = unit_of<Count>(u);
    place[u] = place_of<Count>(move, n < last ? n : last);
  }
#pragma unroll
  for (int u = 0; u < kUnitsPerThread; u++) {
    const int64_t position = int64_t(place[u].position);
    frame[u] = kScatter ? position_in(place[u].index, move.K, position) : place[u].index[position];
  }
#pragma unroll
  for (int u = 0; u < kUnitsPerThread; u++) {
    const bool zero = kScatter || (frame[u] == -1 && move.embed == nullptr);
    value[u] = repeated<Unit>(zero ? 0 : move.nan);
    if (frame[u] >= 0 && frame[u] < move.frames) {
      value[u] = *reinterpret_cast<const Unit*>(move.x + place[u].offset + frame[u] * move.frame_step);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnitsPerThread; u++) {
    const Count n = unit_of<Count>(u);
    if (n <= last) store(value[u], int64_t(n), place[u]);
  }
}

template <class Unit, class Count, bool kScatter>
__global__ void __launch_bounds__(256) move_kernel(const Move move) {
  follow_previous();
  move_units<Unit, Count, kScatter>(
      move, [&](const Unit& value, int64_t n, const Place<Count>&) { reinterpret_cast<Unit*>(move.out)[n] = value; });
}

template <class Element, int kCount, class Count>
__global__ void __launch_bounds__(256) embed_kernel(const Move move) {
  follow_previous();
  typedef Elements<typename Element::stored, kCount> Vector;
  move_units<Vector, Count, false>(move, [&](const Vector& value, int64_t n, const Place<Count>& place) {
    const Vector* const embed = static_cast<const Vector*>(move.embed) + int64_t(place.position) * move.columns.value;
    const Vector added = embed[place.column];
    Vector sum;
#pragma unroll
    for (int c = 0; c < kCount; c++) sum.v[c] = Element::add(value.v[c], added.v[c]);
    reinterpret_cast<Vector*>(move.out)[n] = sum;
  });
}

namespace {

typedef void (*MoveKernel)(const Move);

template <class Count, bool kScatter>
MoveKernel copy_kernel(int32_t unit) {
  switch (unit) {
    case 16:
      return move_kernel<Unit<16>, Count, kScatter>;
    case 8:
      return move_kernel<Unit<8>, Count, kScatter>;
    case 4:
      return move_kernel<Unit<4>, Count, kScatter>;
    default:
      return move_kernel<Unit<2>, Count, kScatter>;
  }
}

template <class Element, class Count>
MoveKernel add_kernel(int32_t unit) {
  constexpr int kItem = sizeof(typename Element::stored);
  return unit == 16 ? embed_kernel<Element, 16 / kItem, Count> : embed_kernel<Element, 1, Count>;
}
template <class Count>
MoveKernel add_kernel(Dtype dtype, int32_t unit) {
  switch (dtype) {
    case Dtype::f64:
      return add_kernel<Double, Count>(unit);
    case Dtype::bf16:
      return add_kernel<Brain, Count>(unit);
    case Dtype::f16:
      return add_kernel<Half, Count>(unit);
    default:
      return add_kernel<Single, Count>(unit);
  }
}

int32_t launch_move(MoveKernel narrow, MoveKernel wide, const Move& move, void* stream, bool overlaps) {
  const int32_t threads = threads_for(move.units);
  const int64_t per_block = int64_t(threads) * kUnitsPerThread;
  const MoveKernel kernel = move.units < least_wide ? narrow : wide;
  return launch<Move>(kernel, (move.units + per_block - 1) / per_block, 1, threads, 0, stream, move, overlaps);
}

}  // namespace

int32_t launch_gather(const GatherArgs& args, void* stream, bool overlaps) {
  const Move move = plan_gather(args);
  if (move.units == 0) return 0;
  if (move.embed) {
    return launch_move(add_kernel<uint32_t>(args.dtype, move.unit), add_kernel<uint64_t>(args.dtype, move.unit), move,
                       stream, overlaps);
  }
  return launch_move(copy_kernel<uint32_t, false>(move.unit), copy_kernel<uint64_t, false>(move.unit), move, stream,
                     overlaps);
}

int32_t launch_scatter(const ScatterArgs& args, void* stream, bool overlaps) {
  const Move move = plan_scatter(args);
  if (move.units == 0) return 0;
  return launch_move(copy_kernel<uint32_t, true>(move.unit), copy_kernel<uint64_t, true>(move.unit), move, stream,
                     overlaps);
}

}  // namespace cuda
}  // namespace h2ot
