// One read of x: tokens pooled over the joints and widened, which of them are valid, how large they are.
//
// Bytes: x once, and the pooled tokens (1 / J of it) written. Floor: those at the copy bandwidth, which takes about
// 16 KiB in flight per multiprocessor: kPoolJoints quads a thread, and two warps per token where C is large.
#pragma once

#include "score_device.cuh"

namespace h2ot {
namespace cuda {

constexpr int kPoolJoints = 8;  // read before the first is added
constexpr int kPoolQuads = 3;   // the same of tokens that are not pooled
constexpr int kPoolWarps = 2;   // per token, at most

template <class T>
H2OT_DEVICE Quad<T> read_quad(const Tokens& x, bool vectors, const T* at, int64_t c) {
  if (vectors) return *reinterpret_cast<const Quad<T>*>(at + c);
  Quad<T> read;
  for (int u = 0; u < 4; u++) read.v[u] = c + u < x.C ? at[(c + u) * x.stride_c] : T{};
  return read;
}

template <class T>
H2OT_DEVICE Quad<Accumulator<T>> widened(const Quad<T>& quad) {
  Quad<Accumulator<T>> wide;
  for (int u = 0; u < 4; u++) wide.v[u] = widen(quad.v[u]);
  return wide;
}

// Channels c .. c + 3 of a token, joints added in ascending order and divided once; zero past C.
template <class T>
H2OT_DEVICE Quad<Accumulator<T>> pooled(const Tokens& x, bool vectors, const T* token, int64_t c) {
  typedef Accumulator<T> A;
  constexpr int kJoints = kPoolJoints * 4 / int(sizeof(A));
  Quad<A> sum = widened<T>(read_quad(x, vectors, token, c));
  if (x.J == 1) return sum;
  int64_t j = 1;
  for (; j + kJoints <= x.J; j += kJoints) {
    Quad<T> next[kJoints];
#pragma unroll
    for (int n = 0; n < kJoints; n++) next[n] = read_quad(x, vectors, token + (j + n) * x.stride_j, c);
#pragma unroll
    for (int n = 0; n < kJoints; n++) {
      for (int u = 0; u < 4; u++) sum.v[u] += widen(next[n].v[u]);
    }
  }
  for (; j < x.J; j++) {
    const Quad<T> next = read_quad(x, vectors, token + j * x.stride_j, c);
    for (int u = 0; u < 4; u++) sum.v[u] += widen(next.v[u]);
  }
  for (int u = 0; u < 4; u++) sum.v[u] /= A(x.J);
  return sum;
}

template <class A>
struct PoolShared {
  decltype(pattern(A())) most[kTokensPerBlock][kPoolWarps];
  int32_t exponent[kTokensPerBlock];
};

// For double, registers for one block at a time are enough (else a compiler may spill to make room for two).
template <class A>
constexpr int kPoolBlocks = sizeof(A) == 8 ? 1 : 0;

// blockDim / (32 kTokensPerBlock) warps per token, a block per group of kTokensPerBlock tokens. Grid: groups, samples.
template <class T>
__global__ void __launch_bounds__(kPoolWarps * kTokensPerBlock * kLanes, kPoolBlocks<Accumulator<T>>)
    pool_kernel(Job<Accumulator<T>> job) {
  follow_previous();
  typedef Accumulator<T> A;
  PoolShared<A>& shared = *reinterpret_cast<PoolShared<A>*>(shared_memory());
  const int warps = int(blockDim.x) / (kTokensPerBlock * kLanes);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, own = warp / warps, part = warp % warps;
  const int64_t b = blockIdx.y, N = job.x.N, i = int64_t(blockIdx.x) * kTokensPerBlock + own;
  if (blockIdx.x == 0 && threadIdx.x < 2) job.largest[2 * b + threadIdx.x] = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) job.arrived[b] = 0;
  auto most = pattern(A(0));
  if (i < N) {
    const T* token = static_cast<const T*>(job.x.data) + b * job.x.stride_b + i * job.x.stride_n;
    const int step = 4 * kLanes * warps;
    int c = 4 * (part * kLanes + lane);
    const auto take = [&](int at, const Quad<A>& quad) {
      for (int u = 0; u < 4; u++) most = pattern(quad.v[u]) > most ? pattern(quad.v[u]) : most;
      if (job.copy) *reinterpret_cast<Quad<A>*>(job.copy + (b * N + i) * job.row_stride_n + at) = quad;
    };
    if (job.x.J == 1) {  // with nothing to add, several quads of a token are asked for at a time
      for (; c + (kPoolQuads - 1) * step < job.channels; c += kPoolQuads * step) {
        Quad<T> read[kPoolQuads];
#pragma unroll
        for (int n = 0; n < kPoolQuads; n++) read[n] = read_quad(job.x, job.vectors, token, c + n * step);
#pragma unroll
        for (int n = 0; n < kPoolQuads; n++) take(c + n * step, widened<T>(read[n]));
      }
    }
    for (; c < job.channels; c += step) take(c, pooled<T>(job.x, job.vectors, token, c));
  }
  most = warp_max(most);
  if (lane == 0) shared.most[own][part] = most;
  __syncthreads();
  if (threadIdx.x < kTokensPerBlock) {
    const int64_t token = int64_t(blockIdx.x) * kTokensPerBlock + threadIdx.x;
    int32_t exponent = kNoExponent;
    if (token < N) {
      for (int other = 0; other < warps; other++) {
        const auto found = shared.most[threadIdx.x][other];
        most = other == 0 || found > most ? found : most;
      }
      const bool valid = (job.mask == nullptr || job.mask[b * N + token]) && most < pattern(infinity_of(A()));
      if (valid) exponent = exponent_of(most);
      job.valid[b * N + token] = valid;
    }
    shared.exponent[threadIdx.x] = exponent;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t exponent = kNoExponent;
    for (const int32_t each : shared.exponent) exponent = each > exponent ? each : exponent;
    job.exponent[b * job.groups + blockIdx.x] = exponent;
  }
}

}  // namespace cuda
}  // namespace h2ot
