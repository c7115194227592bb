// Attention in bfloat16 on the tile unit of recent x86 processors (AMX) or, compiled once more, by the vector units'
// products of pairs (AVX512-BF16: Zen 4 and later): half_products.h.
//
// A task is one head of one sample and one panel of kQueries queries, which stand in the lanes. Logits [key][query] =
// keys times the panel, whose pairs of channels stand in the rows of a tile; exact softmax down the lanes; out
// [channel][query] = values, transposed once per head, times the weights, rounded to bfloat16, of which pairs of keys
// (16 apart) stand in the rows of a tile. Counted per panel and 32 keys: D / 4 tile instructions of 16 cycles, 64
// vectors of weights of about 13 instructions. Sums in float32; a weight is off by 8e-5 of itself before it is rounded
// to 2^-9.
#include "../cpu/heads.h"
#include "../cpu/softmax.h"
#include "attention_logits.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// Sizes of a head in tiles; everything is padded with zeros to whole steps.
struct Head {
  int64_t D, depth, tiles;  // channels; steps of kStepChannels; tiles of kSide of the result
  int64_t steps, panels;    // steps of kStepKeys keys; panels of queries
  int64_t panel_size;       // of a packed panel of queries
  float rate;               // scale / ln 2

  explicit Head(const RecoverAttentionArgs& a)
      : D(a.C / a.H),
        depth(groups_of(D, kStepChannels)),
        tiles(groups_of(D, kSide)),
        steps(groups_of(a.K, kStepKeys)),
        panels(groups_of(a.F, kQueries)),
        panel_size(2 * depth * kTileHalves),
        rate(float(a.scale * kLog2E)) {}
};

// What a thread works in. Tiles are contiguous.
struct Arrays {
  uint16_t* keys;     // [2 steps][depth][kSide keys][kStepChannels]
  uint16_t* values;   // [tiles][steps][kSide channels][kSide pairs of keys][2]
  uint16_t* queries;  // [2][depth][kSide pairs of channels][kSide queries][2]
  float* logits;      // [steps kStepKeys][kQueries]
  uint16_t* weights;  // [steps][2][kSide pairs of keys][kSide queries][2]
  float* out;         // [tiles kSide, whole steps][kQueries]

  Arrays(Carver& memory, const Head& head) {
    keys = memory.take<uint16_t>(2 * head.steps * head.depth * kTileHalves);
    values = memory.take<uint16_t>(head.tiles * head.steps * kTileHalves);
    queries = memory.take<uint16_t>(head.panel_size);
    logits = memory.take<float>(head.steps * kStepKeys * kQueries);
    weights = memory.take<uint16_t>(head.steps * 2 * kTileHalves);
    out = memory.take<float>(head.depth * kStepChannels * kQueries);
  }
};

// The queries of a panel.
void pack_queries(const RecoverAttentionArgs& a, const Head& head, int64_t b, int64_t h, int64_t panel, uint16_t* to) {
  const int64_t first = panel * kQueries, apart = a.query_at.stride_n;
  const uint16_t* const x = head_of<uint16_t>(a.query, a.query_at, b, h * head.D) + first * apart;
  pack_queries(x, apart, a.F - first, head.D, to);
}

// Sixteen channels of a row of values from c on, widened; 0 behind channel D, and where there is no row.
H2OT_INLINE Words channels_of(const uint16_t* row, int64_t c, int64_t D) {
  if (!row || c >= D) return Words{};
  if (c + kSide <= D) return load_halves(row + c);
  uint16_t part[kSide] = {};
  memcpy(part, row + c, size_t(D - c) * sizeof(uint16_t));
  return load_halves(part);
}

void pack_values(const uint16_t* value, int64_t stride, int64_t K, const Head& head, uint16_t* to) {
  for (int64_t tile = 0; tile < head.tiles; tile++) {
    for (int64_t step = 0; step < head.steps; step++, to += kTileHalves) {
      Words pairs[kSide];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; i++) {
        const int64_t k = step * kStepKeys + i, other = k + kSide, c = tile * kSide;
        const Words first = channels_of(k < K ? value + k * stride : nullptr, c, head.D);
        pairs[i] = first | channels_of(other < K ? value + other * stride : nullptr, c, head.D) << 16;
      }
      transpose(pairs);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; i++) memcpy(to + i * kStepKeys, &pairs[i], sizeof pairs[i]);
    }
  }
}

void multiply_values(const Head& head, const Arrays& at) {
  const int64_t next = head.steps * kTileHalves, pairs = head.steps * kSide;
  for (int64_t tile = 0; tile < head.tiles; tile += 2) {
    const uint16_t* const values = at.values + tile * next;
    float* const out = at.out + tile * kSide * kQueries;
    if (tile + 1 < head.tiles) {
      multiply<2>(values, next, at.weights, kTileHalves, 2 * kTileHalves, pairs, out);
    } else {
      multiply<1>(values, next, at.weights, kTileHalves, 2 * kTileHalves, pairs, out);
    }
  }
}

// 2^((logit - most) rate), NaN for NaN, 0 below 2^-125 (a subnormal result takes the machine 60 ns): 2^n, n the whole
// number below, times a cubic in the rest, within 8e-5 of it. The difference comes first: of large logits a product is
// rounded by more than whole numbers.
H2OT_INLINE Floats weight_of(Floats logit, float rate, Floats most) {
  const __m512 x = reinterpret_cast<__m512>((logit - most) * rate);
  const __mmask16 counts = _mm512_cmp_ps_mask(x, reinterpret_cast<__m512>(splat<float>(-125.0f)), _CMP_NLT_UQ);
  const Floats f = reinterpret_cast<Floats>(_mm512_maskz_reduce_ps(kAll, x, _MM_FROUND_TO_NEG_INF));
  const Floats power = ((0x1.3f9662p-4f * f + 0x1.cefc5ap-3f) * f + 0x1.64444ep-1f) * f + 0x1.fff632p-1f;
  return reinterpret_cast<Floats>(_mm512_maskz_scalef_ps(counts, reinterpret_cast<__m512>(power), x));
}

// Two vectors as pairs of bfloat16 numbers, to nearest; what is just between becomes the larger.
H2OT_INLINE Words rounded_pairs(Floats first, Floats second) {
  const Words low = (as_words(first) + 0x8000u) >> 16, high = as_words(second) + 0x8000u;
  return reinterpret_cast<Words>(
      _mm512_mask_blend_epi16(0xaaaaaaaau, reinterpret_cast<__m512i>(low), reinterpret_cast<__m512i>(high)));
}

// The weights of sixteen lanes as tiles, two from one to the next, and their sums.
H2OT_INLINE Floats soften(const float* logits, int64_t K, float rate, uint16_t* weights) {
  const Floats most = largest_of<float>(logits, K);
  Floats sum = {};
  const auto put = [&](int64_t i, Floats first, Floats second) __attribute__((always_inline)) {
    sum += first + second;
    const Words pairs = rounded_pairs(first, second);
    memcpy(weights + i * kStepKeys, &pairs, sizeof pairs);
  };
  const auto weight = [&](int64_t i)
                          __attribute__((always_inline)) { return weight_of(load(logits + i * kQueries), rate, most); };
  int64_t k = 0;
  for (; k + kStepKeys <= K; k += kStepKeys, logits += kStepKeys * kQueries, weights += 2 * kTileHalves) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < kSide; i++) put(i, weight(i), weight(i + kSide));
  }
  for (int64_t i = 0; k < K && i < kSide; i++) {
    put(i, k + i < K ? weight(i) : Floats{}, k + i + kSide < K ? weight(i + kSide) : Floats{});
  }
  return sum;
}

// Two vectors as pairs of bfloat16 numbers, to nearest, to even between two; 0 for what is subnormal.
H2OT_INLINE Words nearest_pairs(Floats first, Floats second) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
  constexpr Halves kInTurn = lanes_of<Halves>([](int lane) { return lane % 2 * kFloats + lane / 2; });
  const auto rounded = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
  return reinterpret_cast<Words>(
      _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(kInTurn), reinterpret_cast<__m512i>(rounded)));
}

// Up to kStepChannels channels of up to sixteen queries, which stand in the lanes, times `share`.
H2OT_INLINE void put_channels(const float* sums, Floats share, int64_t queries, int64_t channels, uint16_t* out,
                              int64_t stride) {
  Words x[kSide];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kSide; i++) {
    x[i] = nearest_pairs(load(sums + 2 * i * kQueries) * share, load(sums + (2 * i + 1) * kQueries) * share);
  }
  transpose(x);
  const auto wanted = __mmask32((uint64_t(1) << (channels < kStepChannels ? channels : kStepChannels)) - 1);
#pragma GCC unroll 16
  for (int64_t q = 0; q < kSide; q++) {
    if (q >= queries) break;
    if (channels >= kStepChannels) {
      memcpy(out + q * stride, &x[q], sizeof x[q]);
    } else {
      _mm512_mask_storeu_epi16(out + q * stride, wanted, reinterpret_cast<__m512i>(x[q]));
    }
  }
}

// What a thread does.
struct Forward {
  typedef BFloat16 Element;
  typedef ProductRegisters Registers;
  const RecoverAttentionArgs& a;
  const Head& head;
  Arrays at;
  const uint16_t* packed_queries;  // [H][panels], where all samples share them; else null

  Forward(Carver& memory, const RecoverAttentionArgs& args, const Head& sizes, const uint16_t* packed)
      : a(args), head(sizes), at(memory, head), packed_queries(packed) {}

  void take_head(int64_t b, int64_t h) const {
    const uint16_t* const key = head_of<uint16_t>(a.key, a.key_at, b, h * head.D);
    pack_rows(key, a.key_at.stride_n, a.K, head.D, 2 * head.steps, head.depth, at.keys);
    pack_values(head_of<uint16_t>(a.value, a.value_at, b, h * head.D), a.value_at.stride_n, a.K, head, at.values);
  }
  void ask_for_head(int64_t b, int64_t h, int64_t from, int64_t to) const {
    ask_for_rows(head_of<uint16_t>(a.key, a.key_at, b, h * head.D), a.key_at.stride_n, head.D, from, to);
    ask_for_rows(head_of<uint16_t>(a.value, a.value_at, b, h * head.D), a.value_at.stride_n, head.D, from, to);
  }
  void attend(int64_t b, int64_t h, int64_t panel, BFloat16* rows) const {
    const int64_t first = panel * kQueries, count = a.F - first < kQueries ? a.F - first : kQueries;
    const uint16_t* queries = at.queries;
    if (packed_queries) {
      queries = packed_queries + (h * head.panels + panel) * head.panel_size;
    } else {
      pack_queries(a, head, a.query_rows == 1 ? 0 : b, h, panel, at.queries);
    }
    ask_for_rows<true>(rows + h * head.D, a.C, head.D, 0, count);
    multiply_keys(at.keys, head.steps, queries, head.D, at.logits);
    Floats sums[2];
    for (int64_t half = 0; half < 2; half++) {
      sums[half] = soften(at.logits + half * kSide, a.K, head.rate, at.weights + half * kTileHalves);
    }
    multiply_values(head, at);
    for (int64_t half = 0; half < 2; half++) {
      const Floats share = 1 / sums[half];
      uint16_t* const to = reinterpret_cast<uint16_t*>(rows) + half * kSide * a.C + h * head.D;
      for (int64_t c = 0; c < head.D; c += kStepChannels) {
        put_channels(at.out + c * kQueries + half * kSide, share, count - half * kSide, head.D - c, to + c, a.C);
      }
    }
  }
};

}  // namespace

Status attend(const RecoverAttentionArgs& a, const Parallel& pool) {
  const Head head(a);
  const int64_t grain = 1 + 2000000 / (a.K * head.D * kQueries + 1);
  uint16_t* packed = nullptr;
  if (a.query_rows == 1 && a.B > 1) {
    const int64_t panels = a.H * head.panels;
    packed = static_cast<uint16_t*>(scratch(Slot::shared, panels * head.panel_size * int64_t(sizeof(uint16_t))));
    if (!packed) return Status::out_of_memory;
    parallel_for(pool, panels, 1 + 65536 / head.panel_size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        pack_queries(a, head, 0, i / head.panels, i % head.panels, packed + i * head.panel_size);
      }
    });
  }
  return attend_heads<Forward>(a, pool, kQueries, grain,
                               [&](Carver& memory) { return Forward(memory, a, head, packed); });
}

}  // namespace H2OT_ISA
}  // namespace h2ot
