// Runs of tokens that lie near each other: what is far from such a ball as a whole need not be compared with its
// tokens.
//
// Tokens are put in an order by place: halved again and again, each time along the line between two that are far apart.
// A run of it is a ball around the mean of its tokens.
#pragma once

#include "pack.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

struct Placed {
  float key;
  int32_t slot;
};
H2OT_INLINE bool before(const Placed& a, const Placed& b) {
  return a.key < b.key || (a.key == b.key && a.slot < b.slot);
}

// Moves the `count` first of list[0 .. n) to its front (quickselect).
inline void split_at(Placed* list, int64_t n, int64_t count) {
  for (int64_t begin = 0, end = n; end - begin > 1;) {
    const Placed pivot = list[begin + (end - begin) / 2];
    int64_t low = begin, high = end - 1;
    while (low <= high) {
      while (before(list[low], pivot)) low++;
      while (before(pivot, list[high])) high--;
      if (low > high) break;
      const Placed moved = list[low];
      list[low++] = list[high];
      list[high--] = moved;
    }
    if (count <= high) {
      end = high + 1;
    } else if (count >= low) {
      begin = low;
    } else {
      return;
    }
  }
}

// The places of a sample's tokens, to choose an order, never to decide: sketches of kPanel numbers, sums of scaled
// channels with signs as good as random, whose distances are about those of the tokens.
template <class A>
struct Places {
  static constexpr int64_t kFewest = 512;  // tokens to put in order

  const Sample<A>* sample;
  float* sketch;  // [n][kPanel]

  void draw(const Parallel& pool) const {
    const Packing<A>& packing = sample->fine.packing;
    const A scale = A(packing.scale);
    parallel_for(pool, sample->n, larger(1, 65536 / sample->C), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const A* row = sample->row(i);
        float sum[kPanel] = {};
        for (int64_t c = 0; c < sample->C; c += kPanel) {
          for (int64_t u = 0; u < smaller(kPanel, sample->C - c); u++) {
            const float v = float((sizeof(A) == 8 ? row[c + u] - packing.origin[c + u] : row[c + u]) * scale);
            sum[u] += uint32_t(c + u) * 0x9e3779b9u >> 31 ? -v : v;
          }
        }
        memcpy(sketch + i * kPanel, sum, sizeof sum);
      }
    });
  }
  float distance(int64_t i, int64_t j) const {
    const float *a = sketch + i * kPanel, *b = sketch + j * kPanel;
    Floats sum = {};
    for (int64_t c = 0; c < kPanel; c += kFloats) {
      const Floats d = load(a + c) - load(b + c);
      sum += d * d;
    }
    return sum_lanes<float>(sum);
  }
  // Of the slots list[0 .. count), about 64 of them: the farthest from slot i.
  int32_t far_from(int64_t i, const Placed* list, int64_t count) const {
    const int64_t step = larger(1, count / 64);
    int32_t farthest = list[0].slot;
    float most = -1;
    for (int64_t at = 0; at < count; at += step) {
      const float d = distance(i, list[at].slot);
      if (d > most) {
        most = d;
        farthest = list[at].slot;
      }
    }
    return farthest;
  }
  // Halves list[0 .. n), n > count, so that the first `count` lie on one side.
  void halve(Placed* list, int64_t n, int64_t count) const {
    const int64_t a = far_from(list[0].slot, list, n), b = far_from(a, list, n);
    Floats line[kPanel / kFloats];
    for (int v = 0; v < kPanel / kFloats; v++) {
      line[v] = load(sketch + b * kPanel + v * kFloats) - load(sketch + a * kPanel + v * kFloats);
    }
    for (int64_t at = 0; at < n; at++) {
      Floats sum = {};
      for (int v = 0; v < kPanel / kFloats; v++) {
        sum += line[v] * load(sketch + list[at].slot * int64_t(kPanel) + v * kFloats);
      }
      list[at].key = sum_lanes<float>(sum);
    }
    split_at(list, n, count);
  }

  // Whether most tokens have kPanel others near them, measured by the mean distance, so that balls are small: of four
  // tokens, three. Motion and video have, noise has not. Fewer tokens must be nearer for the order to pay.
  bool gathered(Placed* list, const Parallel& pool) const {
    constexpr int64_t kAsked = 4;
    constexpr double kNear = 1.0 / 32, kMany = 8192;  // kNear of the mean squared distance, from kMany tokens on
    const double share = smaller_of(1, double(sample->n) / kMany), wanted = kNear * share * share;
    // The tile unit compares all pairs of so many tokens as fast.
    const int64_t few = sample->form.in_digits() ? smaller(64 * sample->C, 2 * int64_t(kMany)) : kFewest;
    if (sample->n < larger(few, kFewest) || !sample->fine.packing.origin) return false;
    draw(pool);
    int64_t near = 0;
    for (int64_t asked = 0; asked < kAsked; asked++) {
      const int64_t from = sample->n * (2 * asked + 1) / (2 * kAsked);
      parallel_for(pool, sample->n, 65536 / kPanel, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) list[i] = {distance(from, i), int32_t(i)};
      });
      double total = 0;
      for (int64_t i = 0; i < sample->n; i++) total += list[i].key;
      split_at(list, sample->n, kPanel);
      float last = 0;
      for (int64_t at = 0; at < kPanel; at++) last = list[at].key > last ? list[at].key : last;
      near += last <= wanted * total / double(sample->n);
    }
    return near >= kAsked - 1;
  }

  // The slots 0 .. n - 1 in an order by place: halves of whole panels, then of each panel, down to kRows tokens.
  void order(Placed* list, int32_t* slots, const Parallel& pool) const {
    const int64_t n = sample->n, panels = groups_of(n, kPanel);
    int64_t top = 1;  // parts of at most a panel
    while (top < panels) top *= 2;
    const auto from = [&](int64_t part, int64_t parts) {
      const int64_t whole = smaller(parts, top), inside = parts / whole;
      const auto first = [&](int64_t p) { return p * panels / whole * kPanel; };
      const int64_t at = first(part / inside) + part % inside * (kPanel / inside);
      return smaller(smaller(at, first(part / inside + 1)), n);
    };
    for (int64_t i = 0; i < n; i++) list[i] = {0, int32_t(i)};
    for (int64_t parts = 1; parts < top * (kPanel / kRows); parts *= 2) {
      parallel_for(pool, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; part++) {
          const int64_t first = from(part, parts), middle = from(2 * part + 1, 2 * parts);
          const int64_t last = from(part + 1, parts);
          if (first < middle && middle < last) halve(list + first, last - first, middle - first);
        }
      });
    }
    for (int64_t i = 0; i < n; i++) slots[i] = list[i].slot;
  }
};

// Runs of `width` tokens of an order by place: the mean of each, and how far from it they lie at most, scaled. Means
// are kept as panels of their own.
template <class A>
struct Balls {
  const Form<A>* form;  // floats
  const int32_t* slot;  // [tokens] in an order by place
  int64_t tokens, width, count;
  float* packed;   // [ceil(tokens / kPanel)][C][kPanel]
  float* mean;     // [ceil(count / kPanel)][C][kPanel]
  double* radius;  // [count, rounded up to panels]
  int32_t* first;  // [count] the lowest slot of each

  void carve(Carver& memory, int64_t most, int64_t C) {
    mean = memory.take<float>(rounded_up(most, kPanel) * C);
    radius = memory.take<double>(rounded_up(most, kPanel));
    first = memory.take<int32_t>(most);
  }
  int64_t size() const { return form->rows.C * kPanel; }
  int64_t begin(int64_t ball) const { return ball * width; }
  int64_t end(int64_t ball) const { return smaller((ball + 1) * width, tokens); }
  // The tokens of a ball, as rows or columns of a tile.
  const float* at(int64_t ball) const { return packed + begin(ball) / kPanel * size() + begin(ball) % kPanel; }

  // Of `n` slots, `run` in a ball (kRows or kPanel), packed into `to`.
  void build(const Sample<A>& sample, const int32_t* slots, int64_t n, int64_t run, float* to, const Parallel& pool) {
    form = &sample.fine;
    slot = slots;
    tokens = n;
    width = run;
    count = groups_of(n, run);
    packed = to;
    const int64_t grain = larger(1, 65536 / size()), places = rounded_up(count, kPanel);
    parallel_for(pool, groups_of(n, kPanel), grain, [&](int64_t from, int64_t past) {
      for (int64_t panel = from; panel < past; panel++) {
        int32_t token[kPanel];
        const int64_t in_panel = smaller(kPanel, n - panel * kPanel);
        for (int64_t t = 0; t < in_panel; t++) token[t] = sample.token[slot[panel * kPanel + t]];
        form->pack(token, in_panel, packed + panel * size());
      }
    });
    parallel_for(pool, places, grain, [&](int64_t from, int64_t past) {
      for (int64_t ball = from; ball < past; ball++) set_mean(ball);
    });
    parallel_for(pool, count, grain, [&](int64_t from, int64_t past) {
      for (int64_t ball = from; ball < past; ball++) set_radius(ball);
    });
    for (int64_t ball = count; ball < places; ball++) radius[ball] = 0;
  }

  // f(q, the squared distance of means p and q), for all balls q.
  template <class F>
  void for_each_ball(int64_t p, const F& f) const {
    float tile[kRows * kPanel] __attribute__((aligned(64)));
    for (int64_t q = 0; q < count; q++) {
      if (q % kPanel == 0) form->template tile<2>(means_of(p), mean + q * form->rows.C, tile);
      f(q, tile[p % kRows * kPanel + q % kPanel]);
    }
  }
  // least[r][q]: no token of ball r of `rows`, which are at most kRows, is nearer to one of ball q than this; infinity
  // behind the last ball.
  void separate(const Balls& rows, float* least) const {
    const int64_t stride = rounded_up(count, kPanel);
    float tile[kRows * kPanel] __attribute__((aligned(64)));
    for (int64_t q = 0; q < stride; q += kPanel) {
      form->template tile<2>(rows.mean, mean + q * form->rows.C, tile);
      for (int64_t r = 0; r < rows.count; r++) {
        float* const to = least + r * stride + q;
        const double less = form->bound.eta + rows.radius[r];
        for (int64_t p = 0; p < kPanel; p++) {
          to[p] = float((sqrt(double(tile[r * kPanel + p])) * (1 - form->bound.beta) - less - radius[q + p]) *
                        (1 - 0x1p-22));
        }
        for (int64_t p = count - q; p < kPanel; p++) to[p] = __builtin_inff();
      }
    }
  }

 private:
  // The means of the kRows balls that p is among, as rows of a tile.
  const float* means_of(int64_t p) const { return mean + p / kPanel * size() + p % kPanel / kRows * kRows; }

  void set_mean(int64_t ball) {
    float* const of_ball = mean + ball / kPanel * size() + ball % kPanel;
    for (int64_t c = 0; c < form->rows.C; c++) {
      float total = 0;
      for (int64_t t = 0; ball < count && t < end(ball) - begin(ball); t++) total += at(ball)[c * kPanel + t];
      of_ball[c * kPanel] = ball < count ? total / float(end(ball) - begin(ball)) : __builtin_inff();
    }
  }
  void set_radius(int64_t ball) {
    float tile[kRows * kPanel] __attribute__((aligned(64)));
    form->template tile<2>(means_of(ball), packed + begin(ball) / kPanel * size(), tile);
    const float* v = tile + ball % kRows * kPanel + begin(ball) % kPanel;
    float most = 0;
    first[ball] = slot[begin(ball)];
    for (int64_t t = 0; t < end(ball) - begin(ball); t++) {
      const int32_t of = slot[begin(ball) + t];
      first[ball] = of < first[ball] ? of : first[ball];
      most = v[t] > most ? v[t] : most;
    }
    radius[ball] = sqrt(form->bound.most(most));
  }
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
