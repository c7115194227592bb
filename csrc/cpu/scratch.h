// Scratch memory that each thread keeps between calls: without it small problems spend their time in page faults.
#pragma once

#include <cstdint>
#include <cstdlib>

// Under AddressSanitizer the rest of a reservation, and a gap behind each array in it, are out of bounds.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define H2OT_GAP 64
#else
#define H2OT_GAP 0
#define ASAN_POISON_MEMORY_REGION(at, bytes) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes) ((void)0)
#endif

namespace h2ot {
namespace H2OT_ISA {
namespace {

// One growing buffer. A larger request drops the old contents.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(data_); }

  // `bytes` of memory (0, too) aligned to 64 bytes, or null when there is none.
  void* reserve(int64_t bytes) {
    if (bytes > size_ || data_ == nullptr) {
      free(data_);
      size_ = (bytes + bytes / 4 + 4096) / 4096 * 4096;
      data_ = aligned_alloc(4096, size_t(size_));
      if (data_ == nullptr) size_ = 0;
    }
    if (data_ != nullptr) {
      ASAN_POISON_MEMORY_REGION(data_, size_);
      ASAN_UNPOISON_MEMORY_REGION(data_, bytes);
    }
    return data_;
  }
  bool exceeds(int64_t limit) const { return size_ > limit; }
  // Gives memory above `limit` bytes back.
  void trim(int64_t limit) {
    if (!exceeds(limit)) return;
    free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// Cuts one reservation into arrays. First pass without memory: `bytes()` is what is needed; second pass with it.
class Carver {
 public:
  explicit Carver(void* memory) : base_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* at = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    const int64_t bytes = count * int64_t(sizeof(T)), room = (bytes + 63) / 64 * 64 + H2OT_GAP;
    if (at != nullptr) ASAN_POISON_MEMORY_REGION(base_ + used_ + bytes, room - bytes);
    used_ += room;
    return at;
  }
  int64_t bytes() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace H2OT_ISA
}  // namespace h2ot
