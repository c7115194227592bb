// What the scoring kernels share: their argument, warp-wide helpers, float64 distances, the bound that ties approximate
// distances to true ones. "Squared distances" are sums of squares over C, not yet divided by C.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "launch_cuda.h"
#include "warp.cuh"

namespace h2ot {
namespace cuda {

constexpr int kWarps = kTokensPerBlock;  // per block of the kernels with a warp per token
constexpr int kBatch = 2;                // candidates whose rows are read together

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The four elements that are read at once.
template <class T>
struct alignas(sizeof(T) * 4 < 16 ? sizeof(T) * 4 : 16) Quad {
  T v[4];
};

template <class T>
struct Accumulate {
  typedef float type;
};
template <>
struct Accumulate<double> {
  typedef double type;
};
template <class T>
using Accumulator = typename Accumulate<T>::type;

H2OT_DEVICE float widen(float v) { return v; }
H2OT_DEVICE double widen(double v) { return v; }
H2OT_DEVICE float widen(BFloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}
H2OT_DEVICE float widen(Float16 v) { return widen_half(v.bits); }

H2OT_DEVICE float infinity_of(float) { return __builtin_inff(); }
H2OT_DEVICE double infinity_of(double) { return __builtin_inf(); }

// The pattern of |v|, which orders as |v| does with infinity, then NaN, last.
H2OT_DEVICE uint32_t pattern(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits & 0x7fffffffu;
}
H2OT_DEVICE uint32_t pattern_with_sign(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}
H2OT_DEVICE uint64_t pattern(double v) {
  uint64_t bits;
  memcpy(&bits, &v, 8);
  return bits & 0x7fffffffffffffffu;
}
H2OT_DEVICE float value_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
H2OT_DEVICE double value_of(uint64_t bits) {
  double v;
  memcpy(&v, &bits, 8);
  return v;
}

H2OT_DEVICE float root(float v) { return sqrtf(v); }
H2OT_DEVICE double root(double v) { return sqrt(v); }

// The smallest e with |v| < 2^e, for the pattern of a finite v; kNoExponent for 0.
constexpr int32_t kNoExponent = -4096;
H2OT_DEVICE int32_t exponent_of(uint32_t bits) { return bits == 0 ? kNoExponent : int32_t(bits >> 23) - 126; }
H2OT_DEVICE int32_t exponent_of(uint64_t bits) { return bits == 0 ? kNoExponent : int32_t(bits >> 52) - 1022; }

// Tokens of 16-bit values as they enter products (score_products.cuh).
struct Operands {
  const uint16_t* in_place;  // x itself; null: copied
  int64_t stride_b, stride_n;
  uint16_t* copy;  // [samples, N, pitch]; null: read in place
  int64_t pitch;
  float* scale;  // of each sample, two values; of pairs (score_pairs.cuh) of each token, one

  // For a warp, of token i of a sample that is none. Tiles read a sample's first token in place of such ones, and use
  // nothing of it: its copy must be numbers, no more.
  H2OT_DEVICE void clear_if_first(int64_t i, int64_t token, int lane) const {
    if (i > 0 || copy == nullptr) return;
    for (int64_t c = 4 * lane; c < pitch; c += 4 * kLanes) {
      *reinterpret_cast<Quad<uint16_t>*>(copy + token * pitch + c) = Quad<uint16_t>{};
    }
  }
};

// Everything the kernels of one pass read and write: samples first .. first + samples - 1 of the call.
template <class A>
struct Job {
  Tokens x;      // data at the first sample of the pass
  bool vectors;  // it can be read four channels at a time
  const bool* mask;
  const double* noise;
  int64_t k;
  bool wants_largest;

  const A* rows;  // pooled tokens: x itself, or `copy`; null: of 16 bits in x (RowJob)
  A* copy;
  int64_t row_stride_b, row_stride_n;
  int32_t channels;  // of a row that can be read in quads: C, or C rounded up to 4 with zeros
  uint8_t* valid;
  int32_t* exponent;
  int64_t groups;
  A* norm;
  Bound bound;
  Operands operands;

  // Stored search: [N, matrix_pitch] per sample, infinity where there is no pair.
  A* matrix;
  int64_t matrix_pitch, tile_ratio;
  // Streamed search, per token and split of the columns: the `list` nearest by (lower bound, token), and the largest
  // upper bound.
  A* listed;
  int32_t* listed_at;
  A* furthest;
  int64_t splits, list;
  int32_t search_rows;  // of a block of the search
  bool for_peaks;       // the second search: rows are `peaks`, columns the tokens denser than they
  double* nearest;
  int32_t* nearest_at;
  int64_t near;
  int32_t* proven;
  int32_t* peaks;
  int32_t* peak_count;  // [samples, 2]: peaks, and over how many splits of the columns their search is spread

  double *m, *key, *squared;
  int32_t* parent;
  unsigned long long* largest;  // [samples, 2]: patterns of the largest lower bound (as scaled) and of the true one
  int32_t* arrived;             // [samples]: blocks that have found their tokens' parents
  uint64_t* keys;               // in the order of selection
  uint8_t* flag;                // tokens without a parent so far

  double *density, *distance, *score;  // density and distance may be null
  int64_t* parent_out;                 // may be null
  int64_t K;
  const int64_t* keep;
  int64_t keep_stride, M;  // keep_stride 0: one row for all samples
  int64_t* index;          // may be null

  // Labels by centres: position -> token, -1 for none.
  int64_t* labels;  // may be null
  const int64_t* centres;
  int64_t centre_stride;  // 0: one row for all samples
  int64_t label_splits;   // 0: distances are in the matrix
  // Per token and split, kCandidates entries: centres that may be the nearest, by ascending position.
  A* centre_low;
  int32_t* centre_at;
  A* centre_reach;
  int32_t* centre_count;

  H2OT_DEVICE const A* row(int64_t b, int64_t i) const { return rows + b * row_stride_b + i * row_stride_n; }
};

// The job of kernels that decide in float64, from rows of T: pooled tokens, or bfloat16 and float16 where they lie.
template <class T>
struct RowJob : Job<Accumulator<T>> {
  H2OT_DEVICE const T* row(int64_t b, int64_t i) const {
    if constexpr (std::is_same<T, Accumulator<T>>::value) {
      return Job<T>::row(b, i);
    } else {
      return static_cast<const T*>(this->x.data) + b * this->x.stride_b + i * this->x.stride_n;
    }
  }
};

// The squared distance in float64, on all lanes. The same bits for (a, b) and (b, a), for any plan.
template <class T>
H2OT_DEVICE double exact_squared(const T* a, const T* b, int channels, int lane) {
  double sum = 0;
#pragma unroll 2
  for (int c = 4 * lane; c < channels; c += 4 * kLanes) {
    const Quad<T> p = *reinterpret_cast<const Quad<T>*>(a + c), q = *reinterpret_cast<const Quad<T>*>(b + c);
    for (int u = 0; u < 4; u++) {
      const double d = double(widen(p.v[u])) - double(widen(q.v[u]));
      sum = fma(d, d, sum);
    }
  }
  return warp_sum(sum);
}

// The same of one token to several others: the same bits each.
template <class T, int kMany>
H2OT_DEVICE void exact_squares(const T* a, const T* const (&b)[kMany], int channels, int lane,
                               double (&squared)[kMany]) {
  for (double& sum : squared) sum = 0;
#pragma unroll 2
  for (int c = 4 * lane; c < channels; c += 4 * kLanes) {
    const Quad<T> p = *reinterpret_cast<const Quad<T>*>(a + c);
    Quad<T> q[kMany];
    for (int n = 0; n < kMany; n++) q[n] = *reinterpret_cast<const Quad<T>*>(b[n] + c);
    for (int u = 0; u < 4; u++) {
      for (int n = 0; n < kMany; n++) {
        const double d = double(widen(p.v[u])) - double(widen(q[n].v[u]));
        squared[n] = fma(d, d, squared[n]);
      }
    }
  }
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    for (double& sum : squared) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
}

// The power of two that brings magnitudes below 2^most into [1/2, 1).
H2OT_DEVICE float scale_of(int32_t most) {
  const int32_t power = most == kNoExponent ? 0 : most < -126 ? 126 : most > 126 ? -126 : -most;
  return value_of(uint32_t(power + 127) << 23);
}

// The power of two that brings the largest magnitude of sample b into [1/2, 1), so that neither the squares of 1e30 nor
// of 1e-30 leave float32; 1 for float64.
H2OT_DEVICE float sample_scale(const Job<float>& job, int64_t b, int lane) {
  int32_t most = kNoExponent;
  for (int64_t g = lane; g < job.groups; g += kLanes) {
    const int32_t e = job.exponent[b * job.groups + g];
    most = e > most ? e : most;
  }
  return scale_of(warp_max(most));
}
H2OT_DEVICE double sample_scale(const Job<double>&, int64_t, int) { return 1; }
H2OT_DEVICE double unscaled(float scale, double squared) { return squared / scale / scale; }
H2OT_DEVICE double unscaled(double, double squared) { return squared; }

// The first valid token of sample b, or -1.
template <class A>
H2OT_DEVICE int64_t first_valid(const Job<A>& job, int64_t b, int lane) {
  for (int64_t from = 0; from < job.x.N; from += kLanes) {
    const int64_t i = from + lane;
    const uint32_t found = __ballot_sync(kAllLanes, i < job.x.N && job.valid[b * job.x.N + i]);
    if (found) return from + __ffs(int(found)) - 1;
  }
  return -1;
}

// A sorted list in memory, ascending by (squared distance, token), owned by a warp.
struct List {
  double* squared;
  int32_t* token;
  int32_t count, room;

  H2OT_DEVICE bool full() const { return count == room; }
  H2OT_DEVICE double worst() const { return squared[count - 1]; }
  H2OT_DEVICE bool holds(int32_t at) const {
    bool found = false;
    for (int32_t r = 0; r < count; r++) found |= token[r] == at;
    return found;
  }

  H2OT_DEVICE void insert(double s, int32_t at, int lane) {
    int32_t place = 0;
#pragma unroll 1
    for (int32_t from = 0; from < count; from += kLanes) {
      const int32_t r = from + lane;
      const bool before = r < count && (squared[r] < s || (squared[r] == s && token[r] < at));
      place += __popc(__ballot_sync(kAllLanes, before));
    }
    if (place == room) return;
    const int32_t end = full() ? room - 1 : count;  // entries place .. end - 1 move up by one, from the top down
#pragma unroll 1
    for (int32_t to = end; to > place; to -= kLanes) {
      const int32_t r = to - lane;
      const bool moves = r > place;
      const double moved = moves ? squared[r - 1] : 0;
      const int32_t moved_at = moves ? token[r - 1] : 0;
      __syncwarp();
      if (moves) {
        squared[r] = moved;
        token[r] = moved_at;
      }
    }
    __syncwarp();
    if (lane == 0) {
      squared[place] = s;
      token[place] = at;
    }
    __syncwarp();
    count = end + 1;
  }
};

// Whether token j is denser than i. Keys are m, or -rho where noise is given: then only strictly smaller ones are.
H2OT_DEVICE bool is_denser(double key_j, int64_t j, double key_i, int64_t i, bool strict) {
  return key_j < key_i || (!strict && key_j == key_i && j < i);
}

}  // namespace cuda
}  // namespace h2ot
