// An allocator for torch (CUDAPluggableAllocator) that puts a band of known bytes on both sides of every buffer, fills
// the buffer with NaN, and looks at the bands when it is freed: for GPUs where compute-sanitizer cannot run. What reads
// uninitialised memory gives NaN; what writes beside its buffer is counted by guard_damaged().
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

constexpr size_t kBand = 4096;
constexpr int kBandByte = 0xa5, kFill = 0xff;  // 0xffff.. is a NaN in every floating type, -1 in the integers

std::mutex mutex;
std::unordered_map<void*, size_t> sizes;
int64_t allocated = 0, damaged = 0;

bool is_whole(const char* band) {
  std::vector<unsigned char> bytes(kBand);
  if (cudaMemcpy(bytes.data(), band, kBand, cudaMemcpyDeviceToHost) != cudaSuccess) {
    return false;
  }
  for (unsigned char byte : bytes) {
    if (byte != kBandByte) {
      return false;
    }
  }
  return true;
}

}  // namespace

extern "C" {

void* guard_malloc(ptrdiff_t size, int device, cudaStream_t) {
  char* base = nullptr;
  cudaSetDevice(device);
  if (cudaMalloc(reinterpret_cast<void**>(&base), static_cast<size_t>(size) + 2 * kBand) != cudaSuccess) {
    return nullptr;
  }
  cudaMemset(base, kBandByte, static_cast<size_t>(size) + 2 * kBand);
  cudaMemset(base + kBand, kFill, static_cast<size_t>(size));
  cudaDeviceSynchronize();
  std::lock_guard<std::mutex> lock(mutex);
  sizes[base + kBand] = static_cast<size_t>(size);
  ++allocated;
  return base + kBand;
}

void guard_free(void* pointer, ptrdiff_t, int device, cudaStream_t) {
  if (pointer == nullptr) {
    return;
  }
  cudaSetDevice(device);
  cudaDeviceSynchronize();
  std::lock_guard<std::mutex> lock(mutex);
  char* start = static_cast<char*>(pointer);
  damaged += !is_whole(start - kBand) || !is_whole(start + sizes[pointer]);
  sizes.erase(pointer);
  cudaFree(start - kBand);
}

int64_t guard_allocated() { return allocated; }
int64_t guard_damaged() { return damaged; }

}  // extern "C"
