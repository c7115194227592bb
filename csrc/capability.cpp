// Run-time choice among the kernel tables that were compiled in.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "launch_cpu.h"

#ifdef H2OT_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace h2ot {

#ifdef __aarch64__
namespace neon {
extern const Kernels table;
}
#else
namespace portable {
extern const Kernels table;
}
#endif
#ifdef H2OT_HAS_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
#ifdef H2OT_HAS_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

// The tables that this machine can run, best first.
struct Runnable {
  const Kernels* tables[3];
  int count = 0;
  char names[64] = "";

  Runnable() {
#if defined(H2OT_HAS_AVX2) || defined(H2OT_HAS_AVX512)
    // Both are compiled with these, too.
    const bool has_fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#ifdef H2OT_HAS_AVX512
    if (has_fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      add(&avx512::table);
    }
#endif
#ifdef H2OT_HAS_AVX2
    if (has_fma && __builtin_cpu_supports("avx2")) add(&avx2::table);
#endif
#ifdef __aarch64__
    add(&neon::table);  // every 64-bit ARM processor has NEON with fused multiply-adds
#else
    add(&portable::table);
#endif
  }

  void add(const Kernels* table) {
    if (count) strcat(names, ",");
    strcat(names, table->name);
    tables[count++] = table;
  }

  const Kernels* find(const char* name) const {
    for (int i = 0; i < count; i++) {
      if (strcmp(tables[i]->name, name) == 0) return tables[i];
    }
    return nullptr;
  }
};

const Runnable& runnable() {
  static const Runnable found;
  return found;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> table(runnable().tables[0]);
  return table;
}

#ifdef H2OT_AMX
// Linux saves the tile registers only of processes that asked for them. H2OT_KERNELS_TILES=0: the unit is left alone.
bool has_tiles() {
  const char* wanted = getenv("H2OT_KERNELS_TILES");
  if (wanted && strcmp(wanted, "0") == 0) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

}  // namespace

bool tiles_run() {
#ifdef H2OT_AMX
  static const bool found = has_tiles();
  return found && &kernels() == &avx512::table;
#else
  return false;
#endif
}

bool dots_run() {
#ifdef H2OT_BF16_DOTS
  return __builtin_cpu_supports("avx512bf16") && &kernels() == &avx512::table;
#else
  return false;
#endif
}

Status attend(const RecoverAttentionArgs& a, const Parallel& pool) {
  constexpr int64_t kFewQueries = 16;  // below, and below so many keys, the kernels of float32 are as fast
  [[maybe_unused]] constexpr int64_t kFewKeys = 64, kFewKeysOfUnit = 16, kFewKeysOfShortHeads = 48, kLongHead = 32;
  [[maybe_unused]] const bool fits = a.dtype == Dtype::bf16 && a.scale > 0 && a.C > 0 && a.F >= kFewQueries;
#ifdef H2OT_AMX
  const int64_t fewest = a.C >= kLongHead * a.H ? kFewKeysOfUnit : kFewKeysOfShortHeads;
  if (fits && a.K >= fewest && tiles_run()) return amx::attend(a, pool);
#endif
#ifdef H2OT_BF16_DOTS
  if (fits && a.K >= kFewKeys && dots_run()) return bf16_dots::attend(a, pool);
#endif
  return kernels().recover_attention(a, pool);
}

Status score_attention(const AttentionScoreArgs& a, const Parallel& pool) {
#ifdef H2OT_AMX
  constexpr int64_t kFewFrames = 24, kFewChannels = 8;  // below, the kernels of float32 are as fast
  const bool fits = a.dtype == Dtype::bf16 && a.scale >= 0 && a.D >= kFewChannels && a.F >= kFewFrames &&
                    a.query_stride[4] == 1 && a.key_stride[4] == 1;
  if (fits && tiles_run()) return amx::attention_score(a, pool);
#endif
  return kernels().attention_score(a, pool);
}

#ifdef H2OT_BF16_DOTS
Status run_rotated_halves(const RecoverRotatedArgs& a, const Parallel& pool) {
#ifdef H2OT_AMX
  if (tiles_run()) return amx::rotated_halves(a, pool);
#endif
  return bf16_dots::rotated_halves(a, pool);
}
Status run_linear_halves(const LinearHalvesArgs& a, const Parallel& pool) {
#ifdef H2OT_AMX
  if (tiles_run()) return amx::linear_halves(a, pool);
#endif
  return bf16_dots::linear_halves(a, pool);
}
Status run_mlp_halves(const MlpHalvesArgs& a, const Parallel& pool) {
#ifdef H2OT_AMX
  if (tiles_run()) return amx::mlp_halves(a, pool);
#endif
  return bf16_dots::mlp_halves(a, pool);
}
#endif

const Kernels& kernels() { return *active().load(std::memory_order_relaxed); }

bool set_capability(const char* name) {
  const Kernels* wanted = runnable().find(name);
  if (wanted) active().store(wanted);
  return wanted != nullptr;
}

const char* runnable_capabilities() { return runnable().names; }

}  // namespace h2ot
