// csrc/amx/attention.cpp on the emulated unit, which the compiler is told to read first (emulated.h), or for vectors.
#include "amx/attention.cpp"

// Rows of query, key and value are `apart` elements from one to the next, their batches `batches_apart`.
extern "C" int attention(const void* query, const void* key, const void* value, int64_t B, int64_t F, int64_t K,
                         int64_t C, int64_t H, int64_t query_rows, int64_t apart, int64_t batches_apart, double scale,
                         void* out) {
  const h2ot::Rows rows = {batches_apart, apart};
  const h2ot::RecoverAttentionArgs args = {
      query, key, value, h2ot::Dtype::bf16, B, F, K, C, H, query_rows, rows, rows, rows, scale, out};
  return int(h2ot::H2OT_ISA::attend(args, {run_in_two, 2}));
}
