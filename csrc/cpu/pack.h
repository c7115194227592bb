// Tokens as rows of floats (doubles for float64), which of them are valid, and their packing into panels.
#pragma once

#include "quantise.h"
#include "scratch.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// The tokens of one sample as rows of floats (doubles for float64): those of the caller where they already are that,
// else pooled and widened into a copy.
template <class A>
struct Rows {
  const A* data;
  int64_t stride;
  int64_t C;

  const A* operator[](int64_t token) const { return data + token * stride; }
};

// Whether the tokens can be read in place.
template <class T>
H2OT_INLINE bool readable_in_place(const Tokens& x) {
  return sizeof(T) == sizeof(Accumulator<T>) && x.J == 1 && x.stride_c == 1;
}

// One token: the mean over its joints, added in ascending order and divided once. The sums of a few vectors of channels
// stay in registers over the joints, whose reads do not depend on each other. A later token is asked for into the
// second-level cache: the machine foresees only the next lines of each joint (Zen 4, from memory: 13 -> 20 GB/s a
// core).
template <class T>
void pool_token(const Tokens& x, const T* at, Accumulator<T>* out) {
  typedef Accumulator<T> A;
  constexpr int kVectors = 8;
  constexpr int64_t kWidth = kVectors * kLanes<T>;
  const int64_t later = 4 * x.stride_n;
  int64_t c = 0;
  for (; x.stride_c == 1 && c + kWidth <= x.C; c += kWidth) {
    Vector<T> sum[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) sum[v] = load_wide(at + c + v * kLanes<T>);
    for (int64_t j = 1; j < x.J; j++) {
      const T* const joint = at + j * x.stride_j + c;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) {
        sum[v] += load_wide(joint + v * kLanes<T>);
        __builtin_prefetch(joint + v * kLanes<T> + later, 0, 2);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) store(out + c + v * kLanes<T>, x.J > 1 ? sum[v] / A(x.J) : sum[v]);
  }
  for (; c < x.C; c++) {
    A sum = widen(at[c * x.stride_c]);
    for (int64_t j = 1; j < x.J; j++) sum += widen(at[j * x.stride_j + c * x.stride_c]);
    out[c] = x.J > 1 ? sum / A(x.J) : sum;
  }
}

// The largest magnitude of a token; infinity or NaN compare as more than any finite one.
H2OT_INLINE float magnitude(const float* row, int64_t C) {
  int32_t most = 0;
  for (int64_t c = 0; c < C; c++) {
    int32_t bits;
    memcpy(&bits, row + c, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float v;
  memcpy(&v, &most, 4);
  return v;
}
H2OT_INLINE double magnitude(const double* row, int64_t C) {
  int64_t most = 0;
  for (int64_t c = 0; c < C; c++) {
    int64_t bits;
    memcpy(&bits, row + c, 8);
    bits &= 0x7fffffffffffffff;
    most = bits > most ? bits : most;
  }
  double v;
  memcpy(&v, &most, 8);
  return v;
}

// How rows become packed values, (row - origin) * scale: floats, or 16-bit integers. Float rows packed as floats keep
// their values (origin null).
template <class A>
struct Packing {
  const A* origin;
  double scale;
  bool quantised;
};

// Four words of four rows, turned.
typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadIndex __attribute__((vector_size(16)));

H2OT_INLINE void store_turned(const Quad (&in)[4], float* out) {
  const Quad ab_low = __builtin_shuffle(in[0], in[1], QuadIndex{0, 4, 1, 5});
  const Quad ab_high = __builtin_shuffle(in[0], in[1], QuadIndex{2, 6, 3, 7});
  const Quad cd_low = __builtin_shuffle(in[2], in[3], QuadIndex{0, 4, 1, 5});
  const Quad cd_high = __builtin_shuffle(in[2], in[3], QuadIndex{2, 6, 3, 7});
  const Quad turned[4] = {__builtin_shuffle(ab_low, cd_low, QuadIndex{0, 1, 4, 5}),
                          __builtin_shuffle(ab_low, cd_low, QuadIndex{2, 3, 6, 7}),
                          __builtin_shuffle(ab_high, cd_high, QuadIndex{0, 1, 4, 5}),
                          __builtin_shuffle(ab_high, cd_high, QuadIndex{2, 3, 6, 7})};
  for (int u = 0; u < 4; u++) memcpy(out + u * kPanel, &turned[u], 16);
}

// panel[c][p] = packed channel c of token[p]; infinity for p >= count, which no comparison takes for a neighbour.
H2OT_INLINE void pack_floats(const Rows<float>& rows, const Packing<float>& packing, const int32_t* token,
                             int64_t count, float* panel) {
  const int64_t C = rows.C;
  const float scale = float(packing.scale);
  for (int64_t p = 0; p < kPanel; p += 4) {
    const float* row[4];
    for (int t = 0; t < 4; t++) row[t] = p + t < count ? rows[token[p + t]] : nullptr;
    int64_t c = 0;
    for (; row[3] != nullptr && c + 4 <= C; c += 4) {
      Quad in[4];
      for (int t = 0; t < 4; t++) {
        memcpy(&in[t], row[t] + c, 16);
        in[t] *= scale;
      }
      store_turned(in, panel + c * kPanel + p);
    }
    for (; c < C; c++) {
      for (int t = 0; t < 4; t++) panel[c * kPanel + p + t] = row[t] ? row[t][c] * scale : __builtin_inff();
    }
  }
}
H2OT_INLINE void pack_floats(const Rows<double>& rows, const Packing<double>& packing, const int32_t* token,
                             int64_t count, float* panel) {
  for (int64_t p = 0; p < kPanel; p++) {
    const double* row = p < count ? rows[token[p]] : nullptr;
    for (int64_t c = 0; c < rows.C; c++) {
      panel[c * kPanel + p] = row ? float((row[c] - packing.origin[c]) * packing.scale) : __builtin_inff();
    }
  }
}

template <class A>
void pack_integers(const Rows<A>& rows, const Packing<A>& packing, const int32_t* token, int64_t count, float* panel) {
  constexpr int64_t kStep = 256;  // channels at a time
  const int64_t prefix = prefix_of(rows.C);
  int16_t q[4][kStep] __attribute__((aligned(64)));
  for (int64_t p = 0; p < kPanel; p += 4) {
    int32_t norm[4] = {}, of_prefix[4] = {};
    for (int64_t begin = 0, width; begin < rows.C; begin += width) {
      width = smaller(kStep, (begin < prefix ? prefix : rows.C) - begin);
      const int64_t pairs = pairs_of(width);
      for (int t = 0; t < 4; t++) {
        if (p + t < count) {
          norm[t] += quantise(rows[token[p + t]] + begin, packing.origin + begin, A(packing.scale), width, q[t]);
        } else {
          memset(q[t], 0, sizeof q[t]);
        }
        if (begin + width == prefix) of_prefix[t] = norm[t];
      }
      float* out = panel + (kHeader + begin / 2) * kPanel + p;
      int64_t c = 0;
      for (; c + 4 <= pairs; c += 4) {
        Quad in[4];
        for (int t = 0; t < 4; t++) memcpy(&in[t], q[t] + 2 * c, 16);
        store_turned(in, out + c * kPanel);
      }
      for (; c < pairs; c++) {
        for (int t = 0; t < 4; t++) memcpy(out + c * kPanel + t, q[t] + 2 * c, 4);
      }
    }
    memcpy(panel + p, norm, sizeof norm);
    memcpy(panel + kPanel + p, of_prefix, sizeof of_prefix);
    for (int t = 0; t < 4; t++) panel[(kHeader - 1) * kPanel + p + t] = p + t < count ? 0 : __builtin_inff();
  }
}

// The power of two that brings `most` into [1/2, 1), as far as A can hold it: what is left of extreme magnitudes after
// 2^100 (float) stays inside the range of squares, or inside `eta`.
template <class A>
H2OT_INLINE double unit_scale(double most) {
  constexpr int kLargest = sizeof(A) == 4 ? 100 : 400;
  if (!(most > 0)) return 1;
  int exponent;
  frexp(most, &exponent);
  return ldexp(1.0, int(larger(-kLargest, smaller(kLargest, -exponent))));
}

// Tokens as a search packs them, and what its tile distances are worth.
template <class A>
struct Form {
  Rows<A> rows;
  Packing<A> packing;
  Bound bound;
  bool vnni;

  int64_t panel_size() const { return (packing.quantised ? kHeader + pairs_of(rows.C) : rows.C) * kPanel; }
  // Squared distances of packed tokens are this much larger.
  double unit() const { return packing.scale * packing.scale; }
  // Packs `count` tokens, at most kPanel.
  void pack(const int32_t* tokens, int64_t count, float* panel) const {
    if (packing.quantised) {
      pack_integers(rows, packing, tokens, count, panel);
    } else {
      pack_floats(rows, packing, tokens, count, panel);
    }
  }
  // Squared distances of kRows tokens from `a` on to kVectors vectors of tokens from `b` on.
  template <int kVectors>
  void tile(const float* a, const float* b, float* out) const {
    if (kQuantises && packing.quantised) {
      quantised<kVectors>(a, b, pairs_of(rows.C), 0, out);
    } else {
      distance_tile<kVectors>(a, b, rows.C, out);
    }
  }
  // The same over the first channels only: never more than `tile` gives, rounding included.
  void prefix_tile(const float* a, const float* b, float* out) const {
    if (kQuantises && packing.quantised) {
      quantised<2>(a, b, prefix_of(rows.C) / 2, 1, out);
    } else {
      distance_tile<2>(a, b, prefix_of(rows.C), out);
    }
  }
  template <int kVectors>
  void quantised(const float* a, const float* b, int64_t pairs, int64_t norms, float* out) const {
    if (vnni) {
      quantised_tile<kVectors, true>(a, b, pairs, norms, out);
    } else {
      quantised_tile<kVectors, false>(a, b, pairs, norms, out);
    }
  }
  // The bound of this form's distances once they are multiplied to the unit of `other`.
  Bound bound_in(const Form& other) const { return {bound.beta + 0x1p-22, bound.eta * sqrt(other.unit() / unit())}; }
};

// Whether to look at the first channels of a tile before the others: in a clip most tiles are far from all that is
// sought, and the first channels show it. Where few are, the next ones are not tried.
struct EarlyStop {
  static constexpr int64_t kTried = 64, kUntried = 1024;
  bool enabled;
  int64_t credit = kTried;

  template <class A>
  explicit EarlyStop(const Form<A>& form)
      : enabled(prefix_of(form.rows.C) > 0 && prefix_of(form.rows.C) * 4 <= form.rows.C) {}

  // far(): computes the tile of first channels and says whether nothing in it can be near.
  template <class F>
  bool operator()(const F& far) {
    if (!enabled) return false;
    if (credit <= 0) {
      if (++credit > 0) credit = kTried;
      return false;
    }
    const bool is_far = far();
    credit = is_far ? smaller(credit + 1, kTried) : credit - 1;
    if (credit == 0) credit = -kUntried;
    return is_far;
  }
};

// One sample: its valid tokens in ascending order, as slots 0 .. n - 1 of `token`, and the forms they are searched in.
template <class A>
struct Sample {
  int64_t N, C, n;
  Rows<A> rows;
  Form<A> form, fine;  // for all pairs: integers where they pay, else floats; for near-duplicates: floats
  bool* valid;         // [N]
  int32_t* token;      // [n]
  A* copy;             // [N][C], or null where the rows are the caller's
  A* size;             // [N] the largest magnitude, later the distance from the centre, of each token
  A* centre;           // [C]
  double most;         // the largest magnitude of a valid token (float64: of its difference from the first)

  void carve(Carver& memory, int64_t tokens, int64_t channels, bool in_place) {
    N = tokens;
    C = channels;
    copy = in_place ? nullptr : memory.take<A>(N * C);
    size = memory.take<A>(N);
    centre = memory.take<A>(C);
    valid = memory.take<bool>(N);
    token = memory.take<int32_t>(N);
  }
  const A* row(int64_t slot) const { return rows[token[slot]]; }
  double distance(int64_t a, int64_t b) const { return exact_distance(row(a), row(b), C); }
  // 0 and -0 are equal.
  bool equal(int64_t a, int64_t b) const {
    const A *one = row(a), *other = row(b);
    int64_t c = memcmp(one, other, size_t(C) * sizeof(A)) == 0 ? C : 0;
    while (c < C && one[c] == other[c]) c++;
    return c == C;
  }

  void use_floats() {
    fine = {rows, {n ? row(0) : nullptr, unit_scale<A>(most), false}, tile_bound(C, sizeof(A) == 8 ? 1 : 0), false};
    form = fine;
  }
  // Quantises around a centre of some tokens: any centre is right, one in the middle makes the steps small.
  void use_integers(const Parallel& pool, int64_t grain) {
    constexpr int64_t kCentred = 16;
    const int64_t count = smaller(n, kCentred);
    for (int64_t c = 0; c < C; c++) centre[c] = 0;
    for (int64_t t = 0; t < count; t++) {
      const A* from = row(t * n / count);
      for (int64_t c = 0; c < C; c++) centre[c] += from[c] / A(count);
    }
    const A scale = A(fine.packing.scale);
    parallel_for(pool, n, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) size[i] = scaled_distance(row(i), centre, scale, C);
    });
    double radius = 0;
    for (int64_t i = 0; i < n; i++) radius = double(size[i]) > radius ? double(size[i]) : radius;
    const double wanted = fine.packing.scale * ((kRadius - sqrt(double(C))) / sqrt(radius));
    if (!(radius > 0x1p-80 && wanted > 0x1p-100 && wanted < 0x1p100)) return;
    form = {rows, {centre, double(A(wanted)), true}, quantised_bound(C), has_vnni()};
  }
};

// Fills `sample` (carved) with sample b of x.
template <class T>
void read_sample(const Tokens& x, int64_t b, const bool* mask, const Parallel& pool, Sample<Accumulator<T>>& sample) {
  typedef Accumulator<T> A;
  const T* base = static_cast<const T*>(x.data) + b * x.stride_b;
  if (sample.copy) {
    sample.rows = {sample.copy, x.C, x.C};
  } else {
    sample.rows = {reinterpret_cast<const A*>(base), x.stride_n, x.C};
  }
  const int64_t grain = larger(1, 65536 / larger(1, x.C * x.J));
  parallel_for(pool, x.N, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      sample.valid[t] = mask == nullptr || mask[b * x.N + t];
      if (!sample.valid[t]) continue;
      if (sample.copy) pool_token(x, base + t * x.stride_n, sample.copy + t * x.C);
      sample.size[t] = magnitude(sample.rows[t], x.C);
      sample.valid[t] = sample.size[t] < A(__builtin_inf());
    }
  });
  sample.n = 0;
  for (int64_t t = 0; t < x.N; t++) {
    if (sample.valid[t]) sample.token[sample.n++] = int32_t(t);
  }
  const A* first = sample.n ? sample.row(0) : nullptr;
  if (sizeof(A) == 8) {  // packed as differences from the first, rounded to float
    parallel_for(pool, sample.n, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        A most = 0;
        for (int64_t c = 0; c < x.C; c++) {
          const A d = sample.row(i)[c] - first[c], size = d < 0 ? -d : d;
          most = size > most ? size : most;
        }
        sample.size[sample.token[i]] = most;
      }
    });
  }
  sample.most = 0;
  for (int64_t i = 0; i < sample.n; i++) {
    const double v = double(sample.size[sample.token[i]]);
    sample.most = v > sample.most ? v : sample.most;
  }
  sample.use_floats();
  if (kQuantises && sample.n > kPanel && x.C >= kQuantisedChannels) sample.use_integers(pool, grain);
}

// Packs `count` tokens into ceil(count / kPanel) panels, those that `wanted` names.
template <class A, class F>
void pack_panels(const Form<A>& form, const int32_t* token, int64_t count, const Parallel& pool, float* panels,
                 const F& wanted) {
  const int64_t size = form.panel_size();
  parallel_for(pool, ceil_div(count, kPanel), larger(1, 65536 / size), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      if (wanted(p)) form.pack(token + p * kPanel, smaller(kPanel, count - p * kPanel), panels + p * size);
    }
  });
}
template <class A>
void pack_panels(const Form<A>& form, const int32_t* token, int64_t count, const Parallel& pool, float* panels) {
  pack_panels(form, token, count, pool, panels, [](int64_t) { return true; });
}

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
