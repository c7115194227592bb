#include "gather_plan.h"

#include "../walk.h"

namespace h2ot {
namespace cuda {
namespace {

uint64_t nan_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return 0x7ff8000000000000u;
    case Dtype::bf16:
      return 0x7fc07fc07fc07fc0u;
    case Dtype::f16:
      return 0x7e007e007e007e00u;
    default:
      return 0x7fc000007fc00000u;
  }
}

// The widest load that every row, and everything in it, is aligned to.
int32_t unit_bytes(const Axes& axes, int32_t item, const void* x, const void* out, const void* embed) {
  const int last = axes.dims - 1;
  if (axes.stride[last] != 1 || axes.size[last] == 1) return item;
  const uint64_t places = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(out) |
                          reinterpret_cast<uintptr_t>(embed) | uint64_t(axes.size[last] * item);
  uint64_t all = places;
  for (int axis = 0; axis < last; axis++) all |= uint64_t(axes.stride[axis] * item);
  if (embed) return all % 16 == 0 ? 16 : item;
  int32_t unit = 16;
  while (unit > item && all % uint64_t(unit) != 0) unit /= 2;
  return unit;
}

template <class Args>
Move plan_move(const Args& a, const void* x, const void* embed, int64_t frames, int64_t K) {
  const Axes axes = merge_axes(a, embed != nullptr);
  const int last = axes.dims - 1;
  Move move = {};
  move.x = static_cast<const unsigned char*>(x);
  move.out = static_cast<unsigned char*>(a.out);
  move.index = a.index;
  move.embed = embed;
  move.units = 1;
  for (int axis = 0; axis < axes.dims; axis++) move.units *= axes.size[axis];
  if (move.units == 0) return move;
  move.K = K;
  move.frames = frames;
  move.item = item_bytes(a.dtype);
  move.unit = unit_bytes(axes, move.item, x, a.out, embed);
  const int64_t per_unit = move.unit / move.item;
  move.units /= per_unit;
  move.frame_step = axes.stride[axes.frame] * move.item;
  move.column_step = axes.stride[last] * move.unit;
  move.nan = nan_of(a.dtype);
  move.columns = divisor_of(axes.size[last] / per_unit);
  move.rows_per_index = divisor_of(a.index_rows > 1 ? a.size[0] / a.index_rows : axes.size[0]);
  move.axes = last;
  move.frame_axis = axes.frame;
  for (int axis = 0; axis < last; axis++) {
    move.size[axis] = divisor_of(axes.size[axis]);
    move.step[axis] = axis == axes.frame ? 0 : axes.stride[axis] * move.item;
  }
  return move;
}

}  // namespace

Divisor divisor_of(int64_t value) {
  Divisor divisor = {value, 0, 0};
  if (value >= int64_t(1) << 31) return divisor;  // divides 64-bit numbers only
  while (int64_t(1) << divisor.shift < value) divisor.shift++;
  const uint64_t above = (uint64_t(1) << divisor.shift) - uint64_t(value);
  divisor.factor = uint32_t((above << 32) / uint64_t(value) + 1);
  return divisor;
}

Move plan_gather(const GatherArgs& args) {
  return plan_move(args, args.x, args.pos_embed, args.F, args.size[args.frame_axis]);
}
Move plan_scatter(const ScatterArgs& args) { return plan_move(args, args.grad, nullptr, args.K, args.K); }

}  // namespace cuda
}  // namespace h2ot
