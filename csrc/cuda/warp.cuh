// A warp together.
#pragma once

#include "device.cuh"

namespace h2ot {
namespace cuda {

constexpr int kLanes = 32;

template <class T>
H2OT_DEVICE T warp_sum(T v) {
  for (int lane = kLanes / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(kAllLanes, v, lane);
  return v;
}
template <class T>
H2OT_DEVICE T warp_max(T v) {
  for (int lane = kLanes / 2; lane > 0; lane /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, v, lane);
    v = other > v ? other : v;
  }
  return v;
}
template <class T>
H2OT_DEVICE T warp_min(T v) {
  for (int lane = kLanes / 2; lane > 0; lane /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, v, lane);
    v = other < v ? other : v;
  }
  return v;
}

}  // namespace cuda
}  // namespace h2ot
