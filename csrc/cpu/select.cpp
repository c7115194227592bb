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

// The cut that takes `count` of the n keys (0 < count <= n, keys above 0), by radix selection from the highest bit in
// which they differ. Overwrites keys with the candidates that are left.
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
  return count == n ? Cut{keys[0] - 1, 0} : Cut{keys[0], count};
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
  const bool by_key = cut.equal == 0 && from_rest == 0;
  int64_t place = 0;  // candidates becomes what is taken, and one more: no branch that follows the scores
  for (int64_t i = 0; by_key && i < a.N; i++) {
    candidates[place] = uint64_t(i);
    place += (kept[i] != 0) | (keys[i] > cut.key);
  }
  for (int64_t i = 0; !by_key && i < a.N; i++) {
    const bool above = (kept[i] != 0) | (keys[i] > cut.key);
    const bool equal = !above & (keys[i] == cut.key) & (cut.equal > 0);
    const bool rest = !above & !equal & (keys[i] == 0) & (from_rest > 0);
    candidates[place] = uint64_t(i);
    place += above | equal | rest;
    cut.equal -= equal;
    from_rest -= rest;
  }
  memcpy(a.index + b * a.K, candidates, size_t(place) * 8);
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

typedef double Four __attribute__((vector_size(32)));
typedef int64_t FourWords __attribute__((vector_size(32)));

template <class T>
H2OT_INLINE Four load_four(const T* p) {
  return Four{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}

// Four frames' steps in four coordinates, from columns to lanes, and added in the order of the coordinates.
H2OT_INLINE Four add_turned(Four total, const Four (&step)[4]) {
  const Four ab_even = shuffle<0, 4, 2, 6>(step[0], step[1]);
  const Four ab_odd = shuffle<1, 5, 3, 7>(step[0], step[1]);
  const Four cd_even = shuffle<0, 4, 2, 6>(step[2], step[3]);
  const Four cd_odd = shuffle<1, 5, 3, 7>(step[2], step[3]);
  total += shuffle<0, 1, 4, 5>(ab_even, cd_even);
  total += shuffle<0, 1, 4, 5>(ab_odd, cd_odd);
  total += shuffle<2, 3, 6, 7>(ab_even, cd_even);
  return total + shuffle<2, 3, 6, 7>(ab_odd, cd_odd);
}

// The same of frames whose coordinates lie side by side (at least four), four at a time. The last four may overlap
// those before: what was added already is 0.
template <class T>
H2OT_INLINE void motion_of_rows(const MotionArgs& a, const T* frame, int64_t frames, double* score) {
  const int64_t L = a.J * a.D;
  const T* row[kFrames + 1];
  for (int64_t f = 0; f <= kFrames; f++) row[f] = frame + ((f <= frames ? f : frames) - 1) * a.stride_f;
  const auto steps = [&](int64_t c, FourWords counted, Four(&total)[kFrames / 4]) __attribute__((always_inline)) {
    Four before = load_four(row[0] + c);
#pragma GCC unroll 2
    for (int group = 0; group < kFrames / 4; group++) {
      Four step[4];
#pragma GCC unroll 4
      for (int f = 0; f < 4; f++) {
        const Four now = load_four(row[4 * group + f + 1] + c);
        step[f] = reinterpret_cast<Four>(reinterpret_cast<FourWords>(now - before) & counted);
        before = now;
      }
      total[group] = add_turned(total[group], step);
    }
  };
  constexpr int64_t kMagnitude = 0x7fffffffffffffff;
  Four total[kFrames / 4] = {};
  int64_t c = 0;
  for (; c + 4 <= L; c += 4) steps(c, FourWords{} + kMagnitude, total);
  if (c < L) {
    const FourWords lane = {0, 1, 2, 3};
    steps(L - 4, (lane >= c - (L - 4)) & kMagnitude, total);
  }
  double sums[kFrames];
  memcpy(sums, total, sizeof sums);
  for (int64_t f = 0; f < frames; f++) score[f] = sums[f];
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
    const bool rows = a.stride_d == 1 && a.stride_j == a.D && a.J * a.D >= 4;
    for (int64_t b = 0; b < a.B && a.F > 0; b++) a.score[b * a.F] = 0;
    parallel_for(pool, a.B * blocks, 1 + 16384 / (kFrames * a.J * a.D + 1), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) {
        const int64_t b = task / blocks, t = 1 + task % blocks * kFrames;
        const T* const frame = static_cast<const T*>(a.pose) + b * a.stride_b + t * a.stride_f;
        double* const score = a.score + b * a.F + t;
        if (rows) {
          motion_of_rows(a, frame, t + kFrames <= a.F ? kFrames : a.F - t, score);
        } else if (t + kFrames <= a.F) {
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
