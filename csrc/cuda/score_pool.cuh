// One read of x: tokens pooled over the joints and widened, which of them are valid, how large they are.
#pragma once

#include "score_device.cuh"

namespace h2ot {
namespace cuda {

// Channels c .. c + 3 of a token, joints added in ascending order and divided once; zero past C.
template <class T>
H2OT_DEVICE Quad<Accumulator<T>> pooled(const Tokens& x, bool vectors, const T* token, int64_t c) {
  typedef Accumulator<T> A;
  Quad<A> sum;
#pragma unroll 4
  for (int64_t j = 0; j < x.J; j++) {
    const T* at = token + j * x.stride_j;
    Quad<A> next;
    if (vectors) {
      const Quad<T> read = *reinterpret_cast<const Quad<T>*>(at + c);
      for (int u = 0; u < 4; u++) next.v[u] = widen(read.v[u]);
    } else {
      for (int u = 0; u < 4; u++) next.v[u] = c + u < x.C ? widen(at[(c + u) * x.stride_c]) : A(0);
    }
    for (int u = 0; u < 4; u++) sum.v[u] = j == 0 ? next.v[u] : sum.v[u] + next.v[u];
  }
  if (x.J > 1) {
    for (int u = 0; u < 4; u++) sum.v[u] /= A(x.J);
  }
  return sum;
}

// A warp per token, a block per group of kTokensPerBlock tokens. Grid: groups, samples.
template <class T>
__global__ void __launch_bounds__(kWarps* kLanes, 2) pool_kernel(Job<Accumulator<T>> job) {
  typedef Accumulator<T> A;
  int32_t* exponents = reinterpret_cast<int32_t*>(shared_memory());
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t b = blockIdx.y, N = job.x.N, i = int64_t(blockIdx.x) * kTokensPerBlock + warp;
  int32_t exponent = kNoExponent;
  if (blockIdx.x == 0 && threadIdx.x < 2) job.largest[2 * b + threadIdx.x] = 0;
  if (i < N) {
    const T* token = static_cast<const T*>(job.x.data) + b * job.x.stride_b + i * job.x.stride_n;
    auto most = pattern(A(0));
    for (int64_t c = 4 * lane; c < job.channels; c += 4 * kLanes) {
      const Quad<A> quad = pooled<T>(job.x, job.vectors, token, c);
      for (int u = 0; u < 4; u++) most = pattern(quad.v[u]) > most ? pattern(quad.v[u]) : most;
      if (job.copy) *reinterpret_cast<Quad<A>*>(job.copy + (b * N + i) * job.row_stride_n + c) = quad;
    }
    most = warp_max(most);
    const bool valid = (job.mask == nullptr || job.mask[b * N + i]) && most < pattern(infinity_of(A()));
    if (valid) exponent = exponent_of(most);
    if (lane == 0) job.valid[b * N + i] = valid;
  }
  if (lane == 0) exponents[warp] = exponent;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int other = 1; other < kWarps; other++) exponent = exponents[other] > exponent ? exponents[other] : exponent;
    job.exponent[b * job.groups + blockIdx.x] = exponent;
  }
}

}  // namespace cuda
}  // namespace h2ot
