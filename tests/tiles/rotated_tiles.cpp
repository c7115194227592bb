// csrc/amx/rotated_tiles.cpp on the emulated unit, which the compiler is told to read first (emulated.h). In place of
// attention attended rows are given, a sample in two parts.
#include "amx/rotated_tiles.cpp"

namespace h2ot {
Status attend(const RecoverAttentionArgs& a, const Parallel&) {
  const int64_t half = (a.F + 1) / 2;
  for (int64_t b = 0; b < a.B; b++) {
    for (int64_t first = 0; first < a.F; first += half) {
      const int64_t count = a.F - first < half ? a.F - first : half;
      const float* const rows = static_cast<const float*>(a.query) + (b * a.F + first) * a.C;
      const Status status = a.taker->take(a.taker->context, b, first, count, rows);
      if (status != Status::ok) return status;
    }
  }
  return Status::ok;
}
}  // namespace h2ot

extern "C" int rotated(const float* attended, int64_t R, int64_t F, int64_t C, const float* token,
                       const int8_t* triangle, const float* head, const float* bias, int64_t M, double eps,
                       float* out) {
  h2ot::RecoverAttentionArgs attention = {};
  attention.query = attended;
  attention.B = R;
  attention.F = F;
  attention.C = C;
  return int(h2ot::amx::rotated_tiles({attention, token, triangle, head, bias, M, eps, out}, {nullptr, 1}));
}
