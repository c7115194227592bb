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
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// blockIdx.y and threadIdx.x, read where they stand: what is computed from them in a loop is not kept in registers all
// through it.
H2OT_DEVICE int32_t block_y_here() {
  int32_t v;
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(v));
  return v;
}
H2OT_DEVICE int32_t thread_here() {
  int32_t v;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
  return v;
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

H2OT_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of 16 bytes from global to shared memory, zeros where `there` is false (from is an address all the
// same). It may land at any time until this thread has waited for the group that commit_copies put it into; other
// threads see it after a barrier.
H2OT_DEVICE void copy_async(void* shared, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
H2OT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups but the newest kNewest.
template <int kNewest>
H2OT_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// Four 8 x 8 matrices of 16-bit values. Lane l holds the address of row l % 8 of matrix l / 8 (16 bytes, aligned), and
// gets into r[m] the values 2 (l % 4) and the next one of row l / 4 of matrix m.
H2OT_DEVICE void load_matrices(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

// c += a b: a 16 x 16 by rows, b 16 x 8 by columns, c 16 x 8, two values of a and b to a register. With lane = 4 g + t:
// a[0..3] = (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8); b[0..1] = (2 t, g), (2 t + 8, g);
// c[0..3] = (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), ...
#define H2OT_MMA(name, type)                                                             \
  H2OT_DEVICE void name(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                           \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));             \
  }
H2OT_MMA(mma_float16, "f16")
H2OT_MMA(mma_bfloat16, "bf16")

// Shared memory of a block that every device grants without being asked for more; what all of them (8.0 on) grant.
constexpr int64_t kSharedUnasked = 48 << 10, kSharedMost = 99 << 10;

// First in every kernel that is launched with `overlaps`: waits until the kernel before has ended and all that it wrote
// is visible, and lets the next one's blocks come as soon as all of this one's have. Nothing may be read or written
// before.
H2OT_DEVICE void follow_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launches kernel(job) and returns the cudaError_t: 0 for success. overlaps: its blocks may be brought to the
// multiprocessors while the kernel before still runs (compute capability 9.0 on).
template <class Job>
int32_t launch(void (*kernel)(Job), int64_t grid_x, int64_t grid_y, int32_t threads, int64_t shared_bytes, void* stream,
               const Job& job, bool overlaps = false) {
  if (shared_bytes > kSharedUnasked) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error) return static_cast<int32_t>(error);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<uint32_t>(grid_x), static_cast<uint32_t>(grid_y));
  config.blockDim = dim3(static_cast<uint32_t>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, job);
  return static_cast<int32_t>(error ? cudaGetLastError() : error);  // which forgets it
}

}  // namespace cuda
}  // namespace h2ot
#else
#include "simt.h"
#endif
