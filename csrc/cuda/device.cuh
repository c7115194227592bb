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
  extern __shared__ __align__(1024) unsigned char memory[];
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

// Products by a warpgroup (four warps in a row): c += a b^T of 64 x 16 and 64 x 16 values in shared memory, whose rows
// are lines of 128 bytes, vector v of row r at place v ^ (r % 8), the first row at a multiple of 1024 bytes. Warp w
// gets rows 16 w to 16 w + 15, as eight fragments of mma side by side. They run on their own: c is there, and what they
// read may be written again, after wait_for_products. Needs the target sm_90a.
constexpr int kGroupSide = 64, kGroupThreads = 4 * 32;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasGroups = true;
#else
constexpr bool kHasGroups = false;
#endif

// A matrix by its first value: address, rows that lie 128 bytes apart in groups of eight, that order of vectors.
H2OT_DEVICE uint64_t shared_matrix(const void* first) {
  constexpr uint64_t kUnused = uint64_t(1) << 16, kGroupOfRows = uint64_t(1024 / 16) << 32, kOrder = uint64_t(1) << 62;
  return (shared_address(first) >> 4 & 0x3fff) | kUnused | kGroupOfRows | kOrder;
}
// The same of its rows from value c on, a multiple of 16.
H2OT_DEVICE uint64_t moved_matrix(uint64_t matrix, int c) { return matrix + uint64_t(c * 2 / 16); }

#define H2OT_ROW(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define H2OT_ROWS(c)                                                                                              \
  H2OT_ROW(c, 0), H2OT_ROW(c, 1), H2OT_ROW(c, 2), H2OT_ROW(c, 3), H2OT_ROW(c, 4), H2OT_ROW(c, 5), H2OT_ROW(c, 6), \
      H2OT_ROW(c, 7)
#define H2OT_GROUP_PRODUCTS(name, type)                                                               \
  H2OT_DEVICE void name(float (&c)[8][4], uint64_t a, uint64_t b, bool adds) {                        \
    asm volatile(                                                                                     \
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %34, 0;\n"                                            \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                   \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "     \
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, adds, 1, 1, 0, " \
        "0;\n}\n"                                                                                     \
        : H2OT_ROWS(c)                                                                                \
        : "l"(a), "l"(b), "r"(int(adds)));                                                            \
  }
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
H2OT_GROUP_PRODUCTS(start_float16_products, "f16")
H2OT_GROUP_PRODUCTS(start_bfloat16_products, "bf16")
// Before the first of a group: registers that it adds to are written.
H2OT_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
H2OT_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
H2OT_DEVICE void wait_for_products(float (&c)[8][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : H2OT_ROWS(c)::"memory");
}
// Lets products read what this thread's copies brought, after a barrier.
H2OT_DEVICE void publish_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
void start_float16_products(float (&)[8][4], uint64_t, uint64_t, bool);
void start_bfloat16_products(float (&)[8][4], uint64_t, uint64_t, bool);
void begin_products();
void commit_products();
void wait_for_products(float (&)[8][4]);
void publish_copies();
#endif

// Shared memory of a block that every device grants without being asked for more; what all of them (8.0 on) grant.
constexpr int64_t kSharedUnasked = 48 << 10, kSharedMost = 99 << 10;

// First in every kernel that is launched with `overlaps`: waits until the kernel before has ended and all that it wrote
// is visible, and lets the next one's blocks come as soon as all of this one's have. Nothing may be read or written
// before. Code for older devices does not wait: see can_overlap.
H2OT_DEVICE void follow_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launches kernel(job) and returns the cudaError_t: 0 for success. overlaps: its blocks may be brought to the
// multiprocessors while the kernel before still runs (can_overlap).
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
