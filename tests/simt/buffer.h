// Memory of a driver's tensors.
#pragma once

#include <cstdlib>
#include <cstring>
#include <istream>
#include <ostream>

#include "simt.h"

// A heap block of exactly `bytes`, so that the sanitizer sees every access outside of it.
struct Buffer {
  unsigned char* data;
  size_t bytes;
  explicit Buffer(int64_t n) : data(nullptr), bytes(size_t(n)) {
    if (bytes == 0) return;
    data = static_cast<unsigned char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    std::memset(data, simt::kPoison, (bytes + 255) / 256 * 256);
    ASAN_POISON_MEMORY_REGION(data + bytes, (bytes + 255) / 256 * 256 - bytes);
    simt::watch(data, bytes);
  }
  ~Buffer() {
    simt::unwatch(data);
    if (data) ASAN_UNPOISON_MEMORY_REGION(data, (bytes + 255) / 256 * 256);
    std::free(data);
  }
  Buffer(const Buffer&) = delete;
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data);
  }
  void read(std::istream& in) {
    in.read(reinterpret_cast<char*>(data), std::streamsize(bytes));
    simt::write_from_outside(data, bytes);
  }
  void write(std::ostream& out) const { out.write(reinterpret_cast<const char*>(data), std::streamsize(bytes)); }
};
