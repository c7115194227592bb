// Selection: the K first tokens by (kept, valid, score, index), and the scores of motion.
#include "kernels.h"
#include "vectors.h"
#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// Unsigned integers in the order of the scores, -0 as +0, all above 0; NaN is 0.
H2OT_INLINE uint64_t sort_key(double score) {
  const double positive_zero = score + 0.0;
  uint64_t bits;
  memcpy(&bits, &positive_zero, 8);
  bits ^= bits >> 63 ? ~uint64_t(0) : uint64_t(1) << 63;
  return score != score ? 0 : bits;
}

struct Cut {
  uint64_t key;   // keys above it are in
  int64_t equal;  // and this many that equal it
};

// The cut that takes `count` of the n keys (0 < count <= n), by radix selection from the highest bit in which they
// differ. Overwrites keys with the candidates that are left.
Cut find_cut(uint64_t* keys, int64_t n, int64_t count) {
  uint64_t all = keys[0], any = keys[0];
  for (int64_t i = 1; i < n; i++) {
    all &= keys[i];
    any |= keys[i];
  }
  int bits = all == any ? 0 : 64 - __builtin_clzll(all ^ any);
  while (bits > 0 && n > 1) {
    const int digit_bits = bits < 8 ? bits : 8, shift = bits - digit_bits;
    const uint64_t digit_mask = (uint64_t(1) << digit_bits) - 1;
    int64_t histogram[256] = {};
    for (int64_t i = 0; i < n; i++) histogram[keys[i] >> shift & digit_mask]++;
    uint64_t digit = digit_mask;
    while (histogram[digit] < count) count -= histogram[digit--];
    int64_t left = 0;
    for (int64_t i = 0; i < n; i++) {
      const uint64_t key = keys[i];
      keys[left] = key;
      left += (key >> shift & digit_mask) == digit;
    }
    n = left;
    bits = shift;
  }
  return {keys[0], count};
}

Status select_row(const SelectArgs& a, int64_t b, uint64_t* keys, uint64_t* candidates, uint8_t* kept) {
  const double* const score = a.score + b * a.N;
  const bool* const mask = a.mask ? a.mask + b * a.N : nullptr;
  int64_t num_kept = 0;
  memset(kept, 0, size_t(a.N));
  if (a.keep) {
    const int64_t* const keep = a.keep + (a.keep_rows == 1 ? 0 : b * a.M);
    for (int64_t m = 0; m < a.M; m++) {
      if (keep[m] < 0 || keep[m] >= a.N) return Status::index_out_of_range;
      num_kept += !kept[keep[m]];
      kept[keep[m]] = 1;
    }
    if (num_kept > a.K) return Status::too_many_kept;
  }
  int64_t num_valid = 0;
  for (int64_t i = 0; i < a.N; i++) {
    keys[i] = kept[i] || (mask && !mask[i]) ? 0 : sort_key(score[i]);
    candidates[num_valid] = keys[i];
    num_valid += keys[i] != 0;
  }
  const int64_t wanted = a.K - num_kept, from_valid = wanted < num_valid ? wanted : num_valid;
  int64_t from_rest = wanted - from_valid;
  Cut cut = {0, 0};  // every valid key is above 0
  if (from_valid < num_valid) cut = from_valid ? find_cut(candidates, num_valid, from_valid) : Cut{~uint64_t(0), 0};
  int64_t* out = a.index + b * a.K;
  for (int64_t i = 0; i < a.N; i++) {
    bool in = kept[i] || keys[i] > cut.key;
    if (!in && keys[i] == cut.key && cut.equal > 0) {
      in = true;
      cut.equal--;
    } else if (!in && keys[i] == 0 && from_rest > 0) {
      in = true;
      from_rest--;
    }
    if (in) *out++ = i;
  }
  return Status::ok;
}

// The steps |p_t - p_(t-1)| of kFrames frames, each summed in the order of (joint, coordinate); the frames' chains of
// additions run side by side.
constexpr int kFrames = 8;

template <class T>
H2OT_INLINE void motion_of(const MotionArgs& a, const T* frame, int64_t frames, double* score) {
  double total[kFrames] = {};
  for (int64_t j = 0; j < a.J; j++) {
    for (int64_t d = 0; d < a.D; d++) {
      const T* const at = frame + j * a.stride_j + d * a.stride_d;
      double before = widen(at[-a.stride_f]);
#pragma GCC unroll 8
      for (int f = 0; f < kFrames; f++) {
        const double now = f < frames ? double(widen(at[f * a.stride_f])) : before;
        total[f] += __builtin_fabs(now - before);
        before = now;
      }
    }
  }
  for (int64_t f = 0; f < frames; f++) score[f] = total[f];
}

}  // namespace

Status select(const SelectArgs& a, const Parallel& pool) {
  Outcome outcome;
  parallel_for(pool, a.B, 1 + 8192 / (a.N + 1), [&](int64_t begin, int64_t end) {
    Carver sizes(nullptr);
    sizes.take<uint64_t>(2 * a.N + 1);
    sizes.take<uint8_t>(a.N);
    void* const memory = scratch(Slot::own, sizes.bytes());
    if (!memory) return outcome.fail(Status::out_of_memory);
    Carver carver(memory);
    uint64_t* const keys = carver.take<uint64_t>(2 * a.N + 1);
    uint8_t* const kept = carver.take<uint8_t>(a.N);
    for (int64_t b = begin; b < end; b++) {
      const Status status = select_row(a, b, keys, keys + a.N, kept);
      if (status != Status::ok) outcome.fail(status);
    }
  });
  return outcome.result();
}

Status motion(const MotionArgs& a, const Parallel& pool) {
  for_dtype(a.dtype, [&](auto element) {
    typedef decltype(element) T;
    const int64_t blocks = (a.F + kFrames - 2) / kFrames;  // of the frames from 1 on
    for (int64_t b = 0; b < a.B && a.F > 0; b++) a.score[b * a.F] = 0;
    parallel_for(pool, a.B * blocks, 1 + 16384 / (kFrames * a.J * a.D + 1), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) {
        const int64_t b = task / blocks, t = 1 + task % blocks * kFrames;
        const T* const frame = static_cast<const T*>(a.pose) + b * a.stride_b + t * a.stride_f;
        double* const score = a.score + b * a.F + t;
        if (t + kFrames <= a.F) {
          motion_of(a, frame, kFrames, score);
        } else {
          motion_of(a, frame, a.F - t, score);
        }
      }
    });
  });
  return Status::ok;
}

}  // namespace H2OT_ISA
}  // namespace h2ot
