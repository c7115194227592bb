// csrc/amx/score_tiles.cpp on the emulated unit, which the compiler is told to read first (emulated.h).
#include "amx/score_tiles.cpp"

using namespace h2ot::amx;

extern "C" int64_t panel_size(int64_t C) { return 2 * half_panel_size(C); }

// `count` tokens of x [count][C] as a panel; their largest magnitude.
extern "C" float pack(const float* x, int64_t count, const float* centre, float scale, int64_t C, float* panel) {
  const float* row[2 * kTokens];
  for (int64_t t = 0; t < 2 * kTokens; t++) row[t] = t < count ? x + t * C : nullptr;
  return pack_digits(row, centre, scale, C, panel);
}

// All distances of two panels, their lower bounds, and the distances of the right halves alone, whose lines nobody asks
// for.
extern "C" void distances_of(const float* a, const float* b, int64_t C, float* out, float* lower, float* right) {
  hold_tiles();
  for (int64_t h = 0; h < 2; h++) {
    const float* const rows = a + h * half_panel_size(C);
    const int64_t at = h * 2 * kTokens * kTokens;
    digit_tile(rows, b, 2, C, {out, 2 * kTokens}, out + at);
    high_digit_tile(rows, b, C, lower + at);
    digit_tile(rows, b + half_panel_size(C), 1, C, {}, right + at + kTokens);
  }
  release_tiles();
}
