// What g++ calls before every access of the kernels under -fsanitize=thread, as one function of the file that includes
// this (watch.cpp or traffic.cpp). Never sanitized itself.
#pragma once

#define __SANITIZE_THREAD__ 1  // watch.h then declares what is defined there
#include "simt.h"

extern "C" const char __executable_start;

namespace simt {

void announced(Access access, const void* at, size_t bytes, const void* from);

// In the program, as addr2line takes it, of an address that a call returns to.
inline size_t place_of(const void* from) { return size_t(static_cast<const char*>(from) - &__executable_start) - 1; }

}  // namespace simt

#define SIMT_CALLED(name, access, bytes) \
  extern "C" void name(void* at) { simt::announced(access, at, bytes, __builtin_return_address(0)); }
#define SIMT_CALLED_OF(bytes)                                          \
  SIMT_CALLED(__tsan_read##bytes, simt::Access::read, bytes)           \
  SIMT_CALLED(__tsan_write##bytes, simt::Access::write, bytes)         \
  SIMT_CALLED(__tsan_unaligned_read##bytes, simt::Access::read, bytes) \
  SIMT_CALLED(__tsan_unaligned_write##bytes, simt::Access::write, bytes)
SIMT_CALLED_OF(1)
SIMT_CALLED_OF(2)
SIMT_CALLED_OF(4)
SIMT_CALLED_OF(8)
SIMT_CALLED_OF(16)
extern "C" void __tsan_read_range(void* at, size_t bytes) {
  simt::announced(simt::Access::read, at, bytes, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* at, size_t bytes) {
  simt::announced(simt::Access::write, at, bytes, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_read(void*) {}
extern "C" void __tsan_vptr_update(void*, void*) {}
