// csrc/amx/attention_score.cpp on the emulated unit, which the compiler is told to read first (emulated.h).
#include "amx/attention_score.cpp"

// query and key [B, P, H, F, D]: rows `apart` elements from one to the next, heads F of them.
extern "C" int attention_score(const void* query, const void* key, int64_t B, int64_t P, int64_t H, int64_t F,
                               int64_t D, int64_t apart, double scale, void* score) {
  const int64_t head = F * apart, joint = H * head;
  const h2ot::AttentionScoreArgs args = {query,
                                         key,
                                         h2ot::Dtype::bf16,
                                         B,
                                         P,
                                         H,
                                         F,
                                         D,
                                         {P * joint, joint, head, apart, 1},
                                         {P * joint, joint, head, apart, 1},
                                         scale,
                                         score};
  return int(h2ot::H2OT_ISA::attention_score(args, {run_in_two, 2}));
}
