// How tokens are packed into panels for a search, and what the tile distances of packed tokens are worth.
#pragma once

#include "../score_panel.h"
#include "quantise.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// Integers of two digits need the tile unit, and panels of 32 floats; float64 tokens would need conversions of their
// own.
#if defined(H2OT_AMX) && defined(__AVX512F__)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif
template <class A>
constexpr bool kHasDigits = kTiles && sizeof(A) == 4;
constexpr int64_t kMostRows = kTiles ? amx::kTokens : kRows;
constexpr int64_t kDigitsChannels = 192;  // fewer are as fast in words, which take half the memory

H2OT_INLINE bool fits_digits(int64_t C) { return C >= kDigitsChannels && C <= amx::kMostChannels; }

// Floats that a panel of any form takes.
H2OT_INLINE int64_t panel_room(int64_t C) {
  return kTiles && fits_digits(C) ? larger(C * kPanel, 2 * amx::half_panel_size(C)) : C * kPanel;
}

// The tokens of one sample as rows of floats (doubles for float64): those of the caller where they already are that,
// else pooled and widened into a copy.
template <class A>
struct TokenRows {
  const A* data;
  int64_t stride;
  int64_t C;

  const A* operator[](int64_t token) const { return data + token * stride; }
};

// How rows become packed values, (row - origin) * scale: floats, or integers. Float32 rows packed as floats take no
// origin off: row * scale. Without an origin float64 rows are packed as zeros.
template <class A>
struct Packing {
  const A* origin;
  double scale;
};

// Four words of a row.
typedef float Quad __attribute__((vector_size(16)));

// panel[c][p] = packed channel c of token[p]; infinity for p >= count, which no comparison takes for a neighbour.
H2OT_INLINE void pack_floats(const TokenRows<float>& rows, const Packing<float>& packing, const int32_t* token,
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
      store_columns(in, panel + c * kPanel + p, kPanel);
    }
    for (; c < C; c++) {
      for (int t = 0; t < 4; t++) panel[c * kPanel + p + t] = row[t] ? row[t][c] * scale : __builtin_inff();
    }
  }
}
H2OT_INLINE void pack_floats(const TokenRows<double>& rows, const Packing<double>& packing, const int32_t* token,
                             int64_t count, float* panel) {
  for (int64_t p = 0; p < kPanel; p++) {
    const double* row = p < count ? rows[token[p]] : nullptr;
    for (int64_t c = 0; c < rows.C; c++) {
      const bool has_value = row && packing.origin;
      panel[c * kPanel + p] = has_value ? float((row[c] - packing.origin[c]) * packing.scale)
                              : row     ? 0
                                        : __builtin_inff();
    }
  }
}

template <class A>
void pack_integers(const TokenRows<A>& rows, const Packing<A>& packing, const int32_t* token, int64_t count,
                   float* panel) {
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
        store_columns(in, out + c * kPanel, kPanel);
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

// Returns whether all numbers fit their digits.
template <class A>
bool pack_into_digits([[maybe_unused]] const TokenRows<A>& rows, [[maybe_unused]] const Packing<A>& packing,
                      [[maybe_unused]] const int32_t* token, [[maybe_unused]] int64_t count,
                      [[maybe_unused]] float* panel) {
  if constexpr (kHasDigits<A>) {
    const float* row[kPanel];
    for (int64_t p = 0; p < kPanel; p++) row[p] = p < count ? rows[token[p]] : nullptr;
    return amx::pack_digits(row, packing.origin, float(packing.scale), rows.C, panel) <= amx::kLargestDigits;
  }
  return false;
}

// The power of two that brings `most` into [1/2, 1), as far as A can hold it: what is left of extreme magnitudes after
// 2^100 (float) stays inside the range of squares, or inside `eta`; 2^511 (double) is where squares end.
template <class A>
H2OT_INLINE double unit_scale(double most) {
  constexpr int kLargest = sizeof(A) == 4 ? 100 : 511;
  if (!(most > 0)) return 1;
  int exponent;
  frexp(most, &exponent);
  return ldexp(1.0, int(larger(-kLargest, smaller(kLargest, -exponent))));
}

// What the packed values of a form are: floats; 16-bit integers multiplied by vpmaddwd, or by vpdpwssd; integers of two
// digits multiplied by the tile unit.
enum class Values { floats, words, vnni_words, digits };

// Tokens as a search packs them, and what its tile distances are worth.
template <class A>
struct Form {
  TokenRows<A> rows;
  Packing<A> packing;
  Bound bound;
  Values values;

  bool quantised() const { return values != Values::floats; }
  bool in_digits() const { return kHasDigits<A> && values == Values::digits; }
  int64_t panel_size() const {
    if (in_digits()) return 2 * amx::half_panel_size(rows.C);
    return (quantised() ? kHeader + pairs_of(rows.C) : rows.C) * kPanel;
  }
  // Rows of a tile.
  int64_t height() const { return in_digits() ? amx::kTokens : kRows; }
  // Where token t of a panel stands, as the first row or column of a tile: whole heights, or whole vectors.
  const float* at(const float* panel, int64_t t) const {
    return panel + (in_digits() ? t / amx::kTokens * amx::half_panel_size(rows.C) : t);
  }
  // Squared distances of packed tokens are this much larger.
  double unit() const { return packing.scale * packing.scale; }
  // Packs `count` tokens, at most kPanel. False where one does not fit the digits, the panel then being of no use: not
  // to be asked where the scale was taken from all of them.
  bool pack(const int32_t* tokens, int64_t count, float* panel) const {
    if (in_digits()) return pack_into_digits(rows, packing, tokens, count, panel);
    if (quantised()) {
      pack_integers(rows, packing, tokens, count, panel);
    } else {
      pack_floats(rows, packing, tokens, count, panel);
    }
    return true;
  }
  // Squared distances of height() tokens from `a` on to kVectors vectors of tokens from `b` on; of digits, the lines of
  // `later` are asked for beside the products.
  template <int kVectors>
  void tile(const float* a, const float* b, float* out, const amx::LaterBlock& later = {}) const {
    if constexpr (kHasDigits<A>) {
      if (in_digits()) return amx::digit_tile(a, b, kVectors, rows.C, later, out);
    }
    if (kQuantises && quantised()) {
      quantised_tile_of<kVectors>(a, b, pairs_of(rows.C), 0, out);
    } else {
      distance_tile<kVectors>(a, b, rows.C, out);
    }
  }
  // Lower bounds of the same, over the first channels or the high digits: never more than `tile` gives, rounding
  // included.
  void lower_tile(const float* a, const float* b, float* out) const {
    if constexpr (kHasDigits<A>) {
      if (in_digits()) return amx::high_digit_tile(a, b, rows.C, out);
    }
    if (kQuantises && quantised()) {
      quantised_tile_of<2>(a, b, prefix_of(rows.C) / 2, 1, out);
    } else {
      distance_tile<2>(a, b, prefix_of(rows.C), out);
    }
  }
  template <int kVectors>
  void quantised_tile_of(const float* a, const float* b, int64_t pairs, int64_t norms, float* out) const {
    if (values == Values::vnni_words) {
      quantised_tile<kVectors, true>(a, b, pairs, norms, out);
    } else {
      quantised_tile<kVectors, false>(a, b, pairs, norms, out);
    }
  }
  // The bound of this form's distances once they are multiplied to the unit of `other`.
  Bound bound_in(const Form& other) const { return {bound.beta + 0x1p-22, bound.eta * sqrt(other.unit() / unit())}; }
};

// The registers of the tile unit, for a thread that computes tiles of a form, while this lives.
class TileHold {
 public:
  template <class A>
  explicit TileHold(const Form<A>& form) : held_(form.in_digits()) {
    if constexpr (kTiles) {
      if (held_) amx::hold_tiles();
    }
  }
  TileHold(const TileHold&) = delete;
  TileHold& operator=(const TileHold&) = delete;
  ~TileHold() {
    if constexpr (kTiles) {
      if (held_) amx::release_tiles();
    }
  }

 private:
  bool held_;
};

// Whether to look at the lower bounds of a tile first: in a clip most tiles are far from all that is sought, and the
// first channels, or the high digits, show it. Where few are, the next ones are not tried.
struct EarlyStop {
  static constexpr int64_t kTried = 64, kUntried = 1024;
  bool enabled;
  int64_t credit;

  template <class A>
  explicit EarlyStop(const Form<A>& form, int64_t tried = kTried)
      : enabled(form.in_digits() || (prefix_of(form.rows.C) > 0 && prefix_of(form.rows.C) * 4 <= form.rows.C)),
        credit(tried) {}

  // far(): computes the tile of lower bounds and says whether nothing in it can be near.
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

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
