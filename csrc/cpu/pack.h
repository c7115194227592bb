// Tokens as rows of floats (doubles for float64), which of them are valid, and the forms they are searched in.
#pragma once

#include "form.h"
#include "scratch.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

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

// One sample: its valid tokens in ascending order, as slots 0 .. n - 1 of `token`, and the forms they are searched in.
template <class A>
struct Sample {
  static constexpr int64_t kSome = 16;  // tokens that the centre, and in pack_as_read the scale, are taken from
  int64_t N, C, n;
  TokenRows<A> rows;
  Form<A> form, fine;  // for all pairs: integers where they pay, else floats; for near-duplicates: floats
  bool* valid;         // [N]
  int32_t* token;      // [n]
  A* copy;             // [N][C], or null where the rows are the caller's
  A* size;             // [N] the largest magnitude of each token; in fit_integers, of each slot, how far the centre is
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
    const double scale = unit_scale<A>(most);
    fine = {rows, {n ? row(0) : nullptr, scale}, tile_bound(C, sizeof(A) == 8 ? 1 : 0), Values::floats};
    if (sizeof(A) == 8 && !(most * scale < 1)) {  // squares overflow: nothing is packed, so nothing is proven
      fine.packing.origin = nullptr;
      fine.bound = {0, __builtin_inf()};
    }
    form = fine;
  }
  bool takes_digits() const { return kHasDigits<A> && fits_digits(C) && tiles_run(); }
  // f(slot) for some slots spread over all.
  template <class F>
  void for_some(const F& f) const {
    const int64_t count = smaller(n, kSome);
    for (int64_t t = 0; t < count; t++) f(t * n / count);
  }
  // The mean of some tokens: any centre is right, one in the middle makes the steps small.
  void set_centre() {
    const A share = A(1) / A(smaller(n, kSome));
    for (int64_t c = 0; c < C; c++) centre[c] = 0;
    for_some([&](int64_t slot) {
      const A* from = row(slot);
      for (int64_t c = 0; c < C; c++) centre[c] += from[c] * share;
    });
  }
  // Integers (row - centre) * scale; false where that is no scale for floats.
  bool use_integers(double scale, Values values) {
    if (!(scale > 0x1p-100 && scale < 0x1p100)) return false;
    form = {rows, {centre, double(A(scale))}, quantised_bound(C), values};
    return true;
  }
  // The same, with a scale and values that all tokens fit.
  void fit_integers(const Parallel& pool, int64_t grain) {
    set_centre();
    const bool digits = takes_digits();
    const A scale = A(fine.packing.scale);
    parallel_for(pool, n, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        size[i] = digits ? largest_difference(row(i), centre, C) : scaled_distance(row(i), centre, scale, C);
      }
    });
    double radius = 0;
    for (int64_t i = 0; i < n; i++) radius = double(size[i]) > radius ? double(size[i]) : radius;
    if (!(radius > 0x1p-80)) return;
    if (digits) {
      use_integers(amx::kLargestDigits / radius, Values::digits);
    } else {
      use_integers(fine.packing.scale * ((kRadius - sqrt(double(C))) / sqrt(radius)),
                   has_vnni() ? Values::vnni_words : Values::words);
    }
  }
};

// Packs `count` tokens into ceil(count / kPanel) panels, those that `wanted`, asked before a look at their tokens,
// names. False, and no panel is to be used: a token does not fit the digits.
template <class A, class F>
bool pack_panels(const Form<A>& form, const int32_t* token, int64_t count, const Parallel& pool, float* panels,
                 const F& wanted) {
  const int64_t size = form.panel_size();
  bool fit = true;
  parallel_for(pool, groups_of(count, kPanel), larger(1, 65536 / size), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      if (!wanted(p)) continue;
      const bool fits = form.pack(token + p * kPanel, smaller(kPanel, count - p * kPanel), panels + p * size);
      if (!fits) __atomic_store_n(&fit, false, __ATOMIC_RELAXED);
    }
  });
  return fit;
}
template <class A>
void pack_panels(const Form<A>& form, const int32_t* token, int64_t count, const Parallel& pool, float* panels) {
  pack_panels(form, token, count, pool, panels, [](int64_t) { return true; });
}

// Packs all tokens of `sample` in digits whose scale some of them suggest, as they are read: false, and no panel is to
// be used, where not all are valid and fit. read(t) is to come before a look at token t.
template <class A, class Read>
bool pack_as_read(const Parallel& pool, const Read& read, Sample<A>& sample, float* panels) {
  constexpr A kMargin = 1.5;  // how much farther from the centre others may be; with 2 the larger steps prove less
  sample.n = sample.N;
  for (int64_t t = 0; t < sample.N; t++) sample.token[t] = int32_t(t);
  sample.for_some(read);
  sample.set_centre();
  A most = 0;
  sample.for_some([&](int64_t t) {
    const A apart = largest_difference(sample.row(t), sample.centre, sample.C);
    most = apart > most ? apart : most;
  });
  most *= kMargin;
  sample.most = double(magnitude(sample.centre, sample.C)) + double(most);  // at least that
  sample.use_floats();
  if (!(most > A(0x1p-80) && sample.use_integers(amx::kLargestDigits / double(most), Values::digits))) return false;
  return pack_panels(sample.form, sample.token, sample.N, pool, panels, [&](int64_t p) {
    for (int64_t t = p * kPanel; t < smaller(sample.N, (p + 1) * kPanel); t++) read(t);
    return true;
  });
}

// Fills `sample` (carved) with sample b of x. Where `panels` has room for them, tokens without a mask may also be
// packed, in digits: whether they are.
template <class T>
bool read_sample(const Tokens& x, int64_t b, const bool* mask, const Parallel& pool, Sample<Accumulator<T>>& sample,
                 float* panels = nullptr) {
  typedef Accumulator<T> A;
  const T* base = static_cast<const T*>(x.data) + b * x.stride_b;
  if (sample.copy) {
    sample.rows = {sample.copy, x.C, x.C};
  } else {
    sample.rows = {reinterpret_cast<const A*>(base), x.stride_n, x.C};
  }
  for (int64_t t = 0; t < x.N; t++) sample.valid[t] = false;  // not read yet
  const auto read = [&](int64_t t) {
    if (sample.copy && !sample.valid[t]) pool_token(x, base + t * x.stride_n, sample.copy + t * x.C);
    sample.valid[t] = true;
  };
  const int64_t grain = larger(1, 65536 / larger(1, x.C * x.J));
  if constexpr (kHasDigits<A>) {
    if (panels && !mask && x.N > kPanel && sample.takes_digits()) {
      if (x.J > 1) {  // whose memory is best read in one go
        parallel_for(pool, x.N, grain, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; t++) read(t);
        });
      }
      if (pack_as_read(pool, read, sample, panels)) return true;
    }
  }
  parallel_for(pool, x.N, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      if (mask && !mask[b * x.N + t]) continue;
      read(t);
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
  if (kQuantises && sample.n > kPanel && x.C >= kQuantisedChannels) sample.fit_integers(pool, grain);
  return false;
}

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
