// The five calls that guard.cpp makes, on the heap, so that its bookkeeping is tested without a GPU.
#pragma once
#include <cstdlib>
#include <cstring>

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** pointer, size_t size) {
  *pointer = std::malloc(size);
  return *pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* pointer, int value, size_t size) {
  std::memset(pointer, value, size);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* target, const void* source, size_t size, cudaMemcpyKind) {
  std::memcpy(target, source, size);
  return cudaSuccess;
}
