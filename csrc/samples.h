// Elements of arrays that are looked at again, to see whether the arrays have changed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace h2ot {

// `count` runs of `size` bytes, from one to the next `step` bytes.
struct Sampled {
  const std::byte* first;
  int64_t count, step, size;
};

// Copies of them. The arrays live as long as this is asked, which is their owner's business.
class Samples {
 public:
  explicit Samples(std::vector<Sampled> arrays) : arrays_(std::move(arrays)) {
    each([&](const std::byte* run, size_t size) { copies_.insert(copies_.end(), run, run + size); });
  }
  // Whether all have the bits that they had. Runs stand in a page each, most in no cache: all are asked for before the
  // first is needed.
  bool same() const {
    each([](const std::byte* run, size_t) { __builtin_prefetch(run); });
    const std::byte* copy = copies_.data();
    bool same = true;
    each([&](const std::byte* run, size_t size) {
      same &= memcmp(run, copy, size) == 0;
      copy += size;
    });
    return same;
  }

 private:
  template <class F>
  void each(const F& f) const {
    for (const Sampled& array : arrays_) {
      for (int64_t i = 0; i < array.count; i++) f(array.first + i * array.step, size_t(array.size));
    }
  }

  std::vector<Sampled> arrays_;
  std::vector<std::byte> copies_;
};

}  // namespace h2ot
