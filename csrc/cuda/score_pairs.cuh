// float32 tokens (pooled ones, too) as they enter products, by one read of them: which are valid, how large they are;
// and of each its difference to an origin, scaled by a power of two of its own, as sums of two float16, and its norm.
//
// Bytes: a token once and as much written, 8 C; the origin is in L1, and so is what a longer token is read again from.
// Floor: those at the copy bandwidth. A warp asks for up to 6 KiB before it waits, 16 warps a multiprocessor.
#pragma once

#include "score_device.cuh"

namespace h2ot {
namespace cuda {

constexpr int kPairQuads = 12;                          // of a token, held by a lane
constexpr int kOriginQuads = 4;                         // of the origin, read before the first is subtracted
constexpr int32_t kPairPart = 4 * kLanes * kPairQuads;  // channels that a warp holds
constexpr int32_t kPairTop = 15;                        // scaled differences: the largest in [2^14, 2^15)
constexpr float kLargePair = 0x1p126f, kTinyPair = 0x1p-60f;
constexpr float kNoPower = 1024;  // of what is no token: it counts nothing
constexpr int kScaleThreads = 256;

H2OT_DEVICE float power_of_two(int32_t power) { return value_of(uint32_t(power + 127) << 23); }

// Any token of a sample will do, each block's the same; a masked one may be far from the others.
H2OT_DEVICE int64_t origin_of(const Job<float>& job, int64_t b, int lane) {
  if (job.mask == nullptr) return 0;
  for (int64_t from = 0; from < job.x.N; from += kLanes) {
    const int64_t i = from + lane;
    const uint32_t found = __ballot_sync(kAllLanes, i < job.x.N && job.mask[b * job.x.N + i]);
    if (found) return from + __ffs(int(found)) - 1;
  }
  return 0;
}

// A lane's quads of kPairPart channels, the first at c; zeros past the last.
typedef Quad<float> PairPart[kPairQuads];
H2OT_DEVICE void read_part(const float* row, int32_t c, int32_t channels, PairPart& part) {
#pragma unroll
  for (int n = 0; n < kPairQuads; n++) {
    const int32_t at = c + n * 4 * kLanes;
    part[n] = Quad<float>{};
    if (at < channels) part[n] = *reinterpret_cast<const Quad<float>*>(row + at);
  }
}
H2OT_DEVICE uint32_t largest_of(const PairPart& part, uint32_t most) {
#pragma unroll
  for (int n = 0; n < kPairQuads; n++) {
    for (int u = 0; u < 4; u++) most = pattern(part[n].v[u]) > most ? pattern(part[n].v[u]) : most;
  }
  return most;
}
// Less the origin, both scaled; where it is so large that a difference may not be a number, or there is none, it is 0.
H2OT_DEVICE void subtract_origin(const float* origin, int32_t c, int32_t channels, float scale, PairPart& part) {
#pragma unroll
  for (int first = 0; first < kPairQuads; first += kOriginQuads) {
    Quad<float> less[kOriginQuads];
#pragma unroll
    for (int n = 0; n < kOriginQuads; n++) {
      const int32_t at = c + (first + n) * 4 * kLanes;
      less[n] = Quad<float>{};
      if (origin != nullptr && at < channels) less[n] = *reinterpret_cast<const Quad<float>*>(origin + at);
    }
#pragma unroll
    for (int n = 0; n < kOriginQuads; n++) {
      for (int u = 0; u < 4; u++) {
        const float o = pattern(less[n].v[u]) < pattern(kLargePair) ? less[n].v[u] : 0;
        float& v = part[first + n].v[u];
        v = fma(v, scale, -(o * scale));
      }
    }
  }
}

// The origin of a sample's tokens; null where that token is none: its numbers may be far above those that the sample's
// scale is made for. For a warp.
H2OT_DEVICE const float* find_origin(const Job<float>& job, int64_t b, int lane) {
  const float* const row = job.row(b, origin_of(job, b, lane));
  uint32_t most = 0;
#pragma unroll 4
  for (int32_t c = 4 * lane; c < job.channels; c += 4 * kLanes) {
    const Quad<float> read = *reinterpret_cast<const Quad<float>*>(row + c);
    for (int u = 0; u < 4; u++) most = pattern(read.v[u]) > most ? pattern(read.v[u]) : most;
  }
  return warp_max(most) < pattern(infinity_of(0.0f)) ? row : nullptr;
}

// Writes token i as pairs, its norm, its power of two; returns its exponent, kNoExponent where it is not valid. For a
// warp.
H2OT_DEVICE int32_t enter_pairs(const Job<float>& job, int64_t b, int64_t i, int lane) {
  const Operands& to = job.operands;
  const int64_t token = b * job.x.N + i;
  const float* row = job.row(b, i);
  const int32_t length = int32_t(to.pitch / 2), channels = job.channels;
  const bool held = length <= kPairPart;
  PairPart part;
  uint32_t most = 0;
#pragma unroll 1
  for (int32_t from = 0; from < length; from += kPairPart) {
    read_part(row, from + 4 * lane, channels, part);
    most = largest_of(part, most);
  }
  most = warp_max(most);
  const bool valid = (job.mask == nullptr || job.mask[token]) && most < pattern(infinity_of(0.0f));
  if (lane == 0) job.valid[token] = valid;
  if (!valid) {
    if (lane == 0) {  // rows of norms are read whole
      job.norm[token] = 0;
      to.scale[token] = kNoPower;
    }
    to.clear_if_first(i, token, lane);
    return kNoExponent;
  }

  const float scale = most < pattern(kLargePair) ? 1.0f : 0.25f;
  const float* const origin = find_origin(job, b, lane);
  uint32_t furthest = 0;
#pragma unroll 1
  for (int32_t from = 0; from < length; from += kPairPart) {
    if (!held) read_part(row, from + 4 * lane, channels, part);
    subtract_origin(origin, from + 4 * lane, channels, scale, part);
    furthest = largest_of(part, furthest);
  }
  furthest = warp_max(furthest);
  // Two steps where one power of two may not be a number, or differences are below 2^-126.
  const float lift = furthest < pattern(kTinyPair) ? 0x1p64f : 1.0f;
  const int32_t power = furthest == 0 ? 0 : kPairTop - exponent_of(pattern(value_of(furthest) * lift));
  const float rest = power_of_two(power);
  uint16_t* const copy = to.copy + token * to.pitch;
  float sum[4] = {};
#pragma unroll 1
  for (int32_t from = 0; from < length; from += kPairPart) {
    if (!held) {
      read_part(row, from + 4 * lane, channels, part);
      subtract_origin(origin, from + 4 * lane, channels, scale, part);
    }
#pragma unroll
    for (int n = 0; n < kPairQuads; n++) {
      const int32_t c = from + 4 * (n * kLanes + lane);
      if (c >= length) continue;
      Quad<uint16_t> upper, lower;
      for (int u = 0; u < 4; u++) {
        const float large = part[n].v[u] * lift * rest;
        sum[u] = fma(large, large, sum[u]);
        upper.v[u] = narrow_half(large);
        lower.v[u] = narrow_half(large - widen_half(upper.v[u]));
      }
      uint16_t* at = copy + c / int32_t(kPairChannels) * int32_t(kLine) + c % int32_t(kPairChannels);
      *reinterpret_cast<Quad<uint16_t>*>(at) = upper;
      *reinterpret_cast<Quad<uint16_t>*>(at + kPairChannels) = lower;
    }
  }
  const float norm = warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if (lane == 0) {
    const int32_t all = power + (lift > 1 ? 64 : 0) - (scale < 1 ? 2 : 0);
    job.norm[token] = norm;
    to.scale[token] = float(all);
  }
  return exponent_of(most);
}

struct PairShared {
  int32_t exponent[kWarps];
};

// What pool_kernel does for tokens that need no pooling, and their operands. A warp per token; grid: groups, samples.
template <class A>
__global__ void __launch_bounds__(kWarps* kLanes, 2) pair_kernel(Job<A> job) {
  follow_previous();
  PairShared& shared = *reinterpret_cast<PairShared*>(shared_memory());
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t b = blockIdx.y, i = int64_t(blockIdx.x) * kTokensPerBlock + warp;
  if (blockIdx.x == 0 && threadIdx.x < 2) job.largest[2 * b + threadIdx.x] = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) job.arrived[b] = 0;
  const int32_t own = i < job.x.N ? enter_pairs(job, b, i, lane) : kNoExponent;
  if (lane == 0) shared.exponent[warp] = own;
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t exponent = kNoExponent;
    for (const int32_t each : shared.exponent) exponent = each > exponent ? each : exponent;
    job.exponent[b * job.groups + blockIdx.x] = exponent;
  }
}

// Brings norms to the scale of their sample, and powers of two to the factors that do so with what products add up. A
// thread per token; grid: blocks of tokens, samples.
template <class A>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(Job<A> job) {
  follow_previous();
  const int64_t b = blockIdx.y, i = int64_t(blockIdx.x) * kScaleThreads + threadIdx.x, token = b * job.x.N + i;
  const float scale = sample_scale(job, b, threadIdx.x % kLanes);
  if (i >= job.x.N) return;
  const int32_t power = int32_t(pattern(scale) >> 23) - 127 - int32_t(job.operands.scale[token]);
  // Below it a token is the origin by all that the bound leaves.
  const float factor = power < -126 ? 0 : power_of_two(power);
  job.norm[token] = job.norm[token] * factor * factor;
  job.operands.scale[token] = factor;
}

}  // namespace cuda
}  // namespace h2ot
