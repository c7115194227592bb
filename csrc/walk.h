// How gathering and scattering walk a tensor, on a CPU and on a GPU: its axes, merged where one stride walks both. No
// torch, no CUDA.
#pragma once

#include "launch.h"

namespace h2ot {
namespace {  // every instruction set compiles its own

struct Axes {
  int dims = 0, frame = 0;
  int64_t size[kMaxDims + 1], stride[kMaxDims + 1];

  void add(int64_t length, int64_t step) {
    size[dims] = length;
    stride[dims] = step;
    dims++;
  }
};

// The axes of the output, of Gather- or ScatterArgs. Merges neighbours that one stride walks, but never the frame axis,
// nor the batch where its rows have indices of their own, nor the last axis where an embedding lies along it. Frames
// that are innermost make rows of one element.
template <class Args>
Axes merge_axes(const Args& a, bool keep_last) {
  Axes axes;
  bool open = false;  // whether the axis before may take this one in
  for (int axis = 0; axis < a.dims; axis++) {
    const bool frame = axis == a.frame_axis, apart = frame || (keep_last && axis == a.dims - 1);
    const int before = axes.dims - 1;
    if (open && !apart && (a.size[axis] == 1 || axes.stride[before] == a.stride[axis] * a.size[axis])) {
      if (a.size[axis] > 1) axes.stride[before] = a.stride[axis];
      axes.size[before] *= a.size[axis];
    } else {
      if (frame) axes.frame = axes.dims;
      axes.add(a.size[axis], a.stride[axis]);
    }
    open = !frame && (axis > 0 || a.index_rows == 1);
  }
  if (axes.frame == axes.dims - 1) axes.add(1, 1);
  return axes;
}

inline int32_t item_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

}  // namespace
}  // namespace h2ot
