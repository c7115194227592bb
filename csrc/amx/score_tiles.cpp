// Squared distances between tokens on the tile unit (AMX), for the search of scoring and of labels: four products of
// digits, added in 32 bits, exact.
#include "../cpu/transpose.h"
#include "../score_panel.h"
#include "digits.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

static_assert(kTokens == kSide && kChannels == kDepth);
constexpr int64_t kStep = 4 * kTile;  // bytes: [high, low] of rows, [high, low] of columns
constexpr int64_t kPlane = 2 * kSide * kSide;
constexpr int64_t kAcross = 2 * kSide;

// The share of a squared distance that the lower digits take from it at most, beside a margin; kUp: more than rounding.
constexpr double kShare = 1.0 / 32, kUp = 1 + 0x1p-20;

const HalfPanel* half_at(const float* half) { return reinterpret_cast<const HalfPanel*>(half); }
const int8_t* tiles_of(const float* half) { return reinterpret_cast<const int8_t*>(half) + sizeof(HalfPanel); }

// As whole numbers; `most`: the largest magnitudes so far, as bits, in whose order NaN is above infinity.
H2OT_INLINE Words whole(const float* x, const float* centre, int64_t count, float scale, Words& most) {
  const Floats scaled = (load_some(x, count) - load_some(centre, count)) * scale;
  const Words magnitude = as_words(scaled) & 0x7fffffffu;
  most = magnitude > most ? magnitude : most;
  return reinterpret_cast<Words>(_mm512_maskz_cvtps_epi32(kAll, reinterpret_cast<__m512>(scaled)));
}

// Numbers of 16 bits, two in each word: with their high digit, rounded, in the upper byte; with the low one there; the
// upper byte as a number; sums of products.
H2OT_INLINE Words high_up(Words q) {
  const Words half = Words{} + 0x00800080u;
  return reinterpret_cast<Words>(_mm512_add_epi16(reinterpret_cast<__m512i>(q), reinterpret_cast<__m512i>(half)));
}
H2OT_INLINE Words low_up(Words q) {
  return reinterpret_cast<Words>(_mm512_slli_epi16(reinterpret_cast<__m512i>(q), 8));
}
H2OT_INLINE Words upper_byte(Words q) {
  return reinterpret_cast<Words>(_mm512_srai_epi16(reinterpret_cast<__m512i>(q), 8));
}
H2OT_INLINE Words products(Words a, Words b) {
  return reinterpret_cast<Words>(
      _mm512_maskz_madd_epi16(kAll, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
// The sum of each of sixteen vectors.
H2OT_INLINE void add_lanes(Words* v, int32_t* sums) {
  transpose(v);
  for (int64_t i = 1; i < kSide; i++) v[0] += v[i];
  memcpy(sums, v, sizeof v[0]);
}

// Of the tokens of half a panel: sums of products of their digits.
struct Norms {
  Words high[kTokens] = {}, mixed[kTokens] = {}, low[kTokens] = {};

  void write(const float* const* row, HalfPanel* half) {
    alignas(64) int32_t mixed_sums[kTokens], low_sums[kTokens];
    add_lanes(high, half->high);
    add_lanes(mixed, mixed_sums);
    add_lanes(low, low_sums);
    for (int64_t t = 0; t < kTokens; t++) {
      const double of_low = low_sums[t];
      half->norm[t] = row[t] ? 65536.0 * half->high[t] + 512.0 * mixed_sums[t] + of_low : __builtin_inf();
      half->margin[t] = row[t] ? float(of_low * (2 * (1 / kShare - 1) * kUp)) : -__builtin_inff();
    }
  }
};

// Row t of all tiles of rows. Byte 4 i + v of a row is channel 16 v + i of its step.
void put_token(const float* x, const float* centre, float scale, int64_t C, int64_t t, Norms& norms, Words& most,
               int8_t* row) {
  Words high_squares = {}, mixed = {}, low_squares = {};
  for (int64_t c = 0; c < C; c += kDepth, row += kStep) {
    Words v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const int64_t at = c + i * kFloats;
      v[i] = whole(x + at, centre + at, C - at, scale, most);
    }
    const Words even = odd_words(v[0], v[2] << 16), odd = odd_words(v[1], v[3] << 16);
    const Words high = upper_byte(high_up(even)), high_odd = upper_byte(high_up(odd));
    const Words low = upper_byte(low_up(even)), low_odd = upper_byte(low_up(odd));
    high_squares += products(high, high) + products(high_odd, high_odd);
    mixed += products(high, low) + products(high_odd, low_odd);
    low_squares += products(low, low) + products(low_odd, low_odd);
    const Words digits[2] = {odd_bytes(high, high_up(odd)), odd_bytes(low, low_up(odd))};
    memcpy(row, &digits[0], sizeof digits[0]);
    memcpy(row + kTile, &digits[1], sizeof digits[1]);
  }
  norms.high[t] = high_squares;
  norms.mixed[t] = mixed;
  norms.low[t] = low_squares;
}

// Asks for lines [begin, end) of a block: a share of them with each step, since all at once they would be waited for.
// Pays where a matrix is larger than the second-level cache (1500 tokens: 0.9 of the time); below nothing is seen.
constexpr int64_t kRowLines = kAcross / kFloats, kBlockLines = kAcross * kRowLines;
H2OT_INLINE void ask_for_lines(const LaterBlock& block, int64_t begin, int64_t end) {
  for (int64_t line = begin; line < (end < kBlockLines ? end : kBlockLines); line++) {
    __builtin_prefetch(block.data + line / kRowLines * block.stride + line % kRowLines * kFloats, 1, 2);
  }
}

// The sums of `steps` steps in registers 0 - 5, a plane of 32 bits for each power of 256, highest first: what stands
// left and right is in an even and in an odd one. Registers 6 and 7: rows and columns.
template <int kHalves>
H2OT_INLINE void multiply(const int8_t* rows, const int8_t* left, const int8_t* right, int64_t steps,
                          const LaterBlock& later, int32_t* sums) {
  const int64_t share = groups_of(kBlockLines, steps);
  zero_sums();
  left += 2 * kTile;
  right += 2 * kTile;
  for (int64_t s = 0; s < steps; s++, rows += kStep, left += kStep, right += kStep) {
    if (later.data) ask_for_lines(later, s * share, (s + 1) * share);
    _tile_loadd(6, rows, kDepth);
    _tile_loadd(7, left, kDepth);
    _tile_dpbssd(0, 6, 7);
    if constexpr (kHalves == 2) {
      _tile_loadd(7, right, kDepth);
      _tile_dpbssd(1, 6, 7);
    }
    _tile_loadd(7, left + kTile, kDepth);
    _tile_dpbssd(2, 6, 7);
    if constexpr (kHalves == 2) {
      _tile_loadd(7, right + kTile, kDepth);
      _tile_dpbssd(3, 6, 7);
    }
    _tile_loadd(6, rows + kTile, kDepth);
    if constexpr (kHalves == 2) _tile_dpbssd(5, 6, 7);
    _tile_loadd(7, left + kTile, kDepth);
    _tile_dpbssd(4, 6, 7);
    _tile_loadd(7, left, kDepth);
    _tile_dpbssd(2, 6, 7);
    if constexpr (kHalves == 2) {
      _tile_loadd(7, right, kDepth);
      _tile_dpbssd(3, 6, 7);
    }
  }
  constexpr int64_t kApart = kAcross * int64_t(sizeof(int32_t));
  _tile_stored(0, sums, kApart);
  _tile_stored(2, sums + kPlane, kApart);
  _tile_stored(4, sums + 2 * kPlane, kApart);
  if constexpr (kHalves == 2) {
    _tile_stored(1, sums + kSide, kApart);
    _tile_stored(3, sums + kPlane + kSide, kApart);
    _tile_stored(5, sums + 2 * kPlane + kSide, kApart);
  }
}

// The sums of products of high digits, those of even and of odd steps apart, so that none waits for the one before it.
H2OT_INLINE void multiply_high(const int8_t* rows, const int8_t* left, const int8_t* right, int64_t steps,
                               int32_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  left += 2 * kTile;
  right += 2 * kTile;
  for (int64_t s = 0; s < steps; s += 2, rows += 2 * kStep, left += 2 * kStep, right += 2 * kStep) {
    _tile_loadd(6, rows, kDepth);
    _tile_loadd(7, left, kDepth);
    _tile_dpbssd(0, 6, 7);
    _tile_loadd(7, right, kDepth);
    _tile_dpbssd(1, 6, 7);
    if (s + 1 == steps) break;
    _tile_loadd(4, rows + kStep, kDepth);
    _tile_loadd(5, left + kStep, kDepth);
    _tile_dpbssd(2, 4, 5);
    _tile_loadd(5, right + kStep, kDepth);
    _tile_dpbssd(3, 4, 5);
  }
  constexpr int64_t kApart = kAcross * int64_t(sizeof(int32_t));
  _tile_stored(0, sums, kApart);
  _tile_stored(1, sums + kSide, kApart);
  _tile_stored(2, sums + kPlane, kApart);
  _tile_stored(3, sums + kPlane + kSide, kApart);
}

typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
H2OT_INLINE Integers load_integers(const int32_t* p) {
  Integers v;
  memcpy(&v, p, sizeof v);
  return v;
}

H2OT_INLINE Doubles doubles(const int32_t* v) {
  const __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(v));
  return reinterpret_cast<Doubles>(_mm512_maskz_cvtepi32_pd(__mmask8(kAll), words));
}

template <int kHalves>
void distances(const float* rows, const float* columns, int64_t C, const LaterBlock& later, float* out) {
  alignas(64) int32_t sums[3 * kPlane];
  const float* const right = columns + (kHalves - 1) * half_panel_size(C);
  multiply<kHalves>(tiles_of(rows), tiles_of(columns), tiles_of(right), groups_of(C, kDepth), later, sums);
  const double* const norm = half_at(rows)->norm;
  for (int64_t h = 0; h < kHalves; h++) {
    const double* const other = half_at(h ? right : columns)->norm;
    for (int64_t r = 0; r < kSide; r++) {
      for (int64_t p = 0; p < kSide; p += kDoubles) {
        const int64_t at = r * kAcross + h * kSide + p;
        const Doubles lower = doubles(sums + kPlane + at) * 256 + doubles(sums + 2 * kPlane + at);
        const Doubles product = doubles(sums + at) * 65536 + lower;
        const Doubles s = norm[r] + load(other + p) - 2 * product;
        _mm256_storeu_ps(out + at, _mm512_maskz_cvtpd_ps(__mmask8(kAll), reinterpret_cast<__m512d>(s)));
      }
    }
  }
}

}  // namespace

float pack_digits(const float* const* row, const float* centre, float scale, int64_t C, float* panel) {
  Words most = {};
  for (int64_t h = 0; h < 2; h++, row += kTokens, panel += half_panel_size(C)) {
    auto* const half = reinterpret_cast<HalfPanel*>(panel);
    int8_t* const tiles = reinterpret_cast<int8_t*>(panel) + sizeof(HalfPanel);
    const int64_t steps = groups_of(C, kDepth);
    Norms norms;
    for (int64_t t = 0; t < kTokens; t++) {
      if (row[t]) {
        put_token(row[t], centre, scale, C, t, norms, most, tiles + t * kDepth);
        continue;
      }
      for (int64_t tile = 0; tile < 2 * steps; tile++) {
        memset(tiles + tile / 2 * kStep + tile % 2 * kTile + t * kDepth, 0, size_t(kDepth));
      }
    }
    norms.write(row, half);
    for (int64_t tile = 0; tile < 2 * steps; tile++) {
      int8_t* const rows = tiles + tile / 2 * kStep + tile % 2 * kTile;
      Words words[kSide];
      memcpy(words, rows, sizeof words);
      transpose(words);
      memcpy(rows + 2 * kTile, words, sizeof words);
    }
  }
  return fold_lanes<float>(as_floats(most), [](Floats a, Floats b) __attribute__((always_inline)) {
    return as_words(a) > as_words(b) ? a : b;
  });
}

void digit_tile(const float* rows, const float* columns, int64_t halves, int64_t C, const LaterBlock& later,
                float* out) {
  if (halves == 2) {
    distances<2>(rows, columns, C, later, out);
  } else {
    distances<1>(rows, columns, C, later, out);
  }
}

void high_digit_tile(const float* rows, const float* columns, int64_t C, float* out) {
  constexpr float kKept = float((1 - kShare) * 65536 / kUp);
  alignas(64) int32_t sums[2 * kPlane];
  const float* const right = columns + half_panel_size(C);
  multiply_high(tiles_of(rows), tiles_of(columns), tiles_of(right), groups_of(C, kDepth), sums);
  const HalfPanel* const half = half_at(rows);
  for (int64_t h = 0; h < 2; h++) {
    const HalfPanel* const other = half_at(h ? right : columns);
    const Integers norms = load_integers(other->high);
    const Floats margins = load(other->margin);
    for (int64_t r = 0; r < kSide; r++) {
      const int64_t at = r * kAcross + h * kSide;
      const Integers product = load_integers(sums + at) + load_integers(sums + kPlane + at);
      const Integers apart = (half->high[r] - product) + (norms - product);
      store(out + at, __builtin_convertvector(apart, Floats) * kKept - margins - half->margin[r]);
    }
  }
}

void hold_tiles() { hold_registers(); }
void release_tiles() { _tile_release(); }

}  // namespace H2OT_ISA
}  // namespace h2ot
