// Scratch memory that each thread keeps between calls: without it small problems spend their time in page faults.
#pragma once

#include <cstdint>
#include <cstdlib>

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

  // `bytes` of memory aligned to 64 bytes, or null when there is none.
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      data_ = aligned_alloc(4096, size_t(size_));
      if (data_ == nullptr) size_ = 0;
    }
    return data_;
  }
  // Gives memory above `limit` bytes back.
  void trim(int64_t limit) {
    if (size_ <= limit) return;
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
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
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
