// What the kernels need of the language: CUDA's own under nvcc, else the simulator's (tests/simt/simt.h).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

namespace h2ot {
namespace cuda {

#define H2OT_DEVICE __device__ __forceinline__

constexpr uint32_t kAllLanes = 0xffffffff;

// The block's dynamic shared memory.
H2OT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

H2OT_DEVICE float widen_half(uint16_t bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}

// To float16 and bfloat16: round to nearest even.
H2OT_DEVICE uint16_t narrow_half(float v) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}
H2OT_DEVICE uint16_t narrow_brain(float v) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}

// To TF32: round to nearest, 10 mantissa bits.
H2OT_DEVICE uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

// c += a b: a 16 x 8 by rows, b 8 x 8 by columns, c 16 x 8. With lane = 4 g + t: a[0..3] = (g, t), (g + 8, t),
// (g, t + 4), (g + 8, t + 4); b[0..1] = (t, g), (t + 4, g); c[0..3] = (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), ...
H2OT_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Launches kernel(job) and returns cudaGetLastError: 0 for success.
template <class Job>
int32_t launch(void (*kernel)(Job), int64_t grid_x, int64_t grid_y, int32_t threads, int64_t shared_bytes, void* stream,
               const Job& job) {
  kernel<<<dim3(static_cast<uint32_t>(grid_x), static_cast<uint32_t>(grid_y)), threads, shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(job);
  return static_cast<int32_t>(cudaGetLastError());
}

}  // namespace cuda
}  // namespace h2ot
#else
#include "simt.h"
#endif
