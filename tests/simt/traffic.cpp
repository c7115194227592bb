// Counts what the kernels' accesses take of shared memory and of tensors, in the place of watch.cpp (see watch.h).
//
// The n-th access of a lane at a place of the program is taken to go with the n-th of its warp's other lanes: so it is
// where they pass it equally often. Shared memory: wavefronts, in which each of 32 banks gives one word of four bytes;
// 8 bytes go by 16 lanes at a time, 16 bytes by eight. Tensors: sectors of 32 bytes. Beside it the least that so many
// words take wherever they lie. Asynchronous copies count where they start; products of warpgroups, whose order of
// vectors is the machine's, are left out. The rows are printed when the program ends.
#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "announced.h"

namespace simt {

namespace {

struct Range {
  uintptr_t begin = 0;
  size_t bytes = 0;

  bool has(uintptr_t at) const { return at - begin < bytes; }
};
std::vector<Range> tensors;
Range shared;

// A place in the program, in one launch.
struct Place {
  size_t kernel, from;
  bool is_shared;
  Access access;
  size_t bytes;

  auto key() const { return std::tie(kernel, from, is_shared, access, bytes); }
  bool operator<(const Place& other) const { return key() < other.key(); }
};
struct Sum {
  uint64_t cost = 0, least = 0;
};
typedef std::array<uintptr_t, kLanes> Addresses;  // 0: none
struct Pending {
  std::vector<Addresses> requests;
  size_t passed[kLanes] = {};
};

size_t kernel = 0;
std::map<Place, Sum> sums;
std::map<std::pair<int, Place>, Pending> pending;  // of the block's warps
Addresses matrix_rows;
int rows_named = 0;

std::set<uintptr_t> words_of(const uintptr_t* first, const uintptr_t* end, size_t bytes) {
  std::set<uintptr_t> words;
  for (; first != end; first++) {
    for (uintptr_t word = *first / 4; *first && word <= (*first + bytes - 1) / 4; word++) words.insert(word);
  }
  return words;
}

void count_wavefronts(const Addresses& lanes, size_t bytes, Sum& sum) {
  const int together = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
  for (int first = 0; first < kLanes; first += together) {
    const std::set<uintptr_t> words = words_of(&lanes[first], &lanes[first] + together, bytes);
    uint64_t of_bank[32] = {};
    for (const uintptr_t word : words) of_bank[word % 32]++;
    sum.cost += *std::max_element(of_bank, of_bank + 32);
    sum.least += (words.size() + 31) / 32;
  }
}

void count_sectors(const Addresses& lanes, size_t bytes, Sum& sum) {
  const std::set<uintptr_t> words = words_of(lanes.data(), lanes.data() + kLanes, bytes);
  std::set<uintptr_t> sectors;
  for (const uintptr_t word : words) sectors.insert(word / 8);
  sum.cost += sectors.size();
  sum.least += (words.size() + 7) / 8;
}

void count(const Place& place, const Addresses& lanes) {
  Sum& sum = sums[place];
  if (place.is_shared) {
    count_wavefronts(lanes, place.bytes, sum);
  } else {
    count_sectors(lanes, place.bytes, sum);
  }
}

void end_block() {
  for (const auto& [of_warp, accesses] : pending) {
    for (const Addresses& lanes : accesses.requests) count(of_warp.second, lanes);
  }
  pending.clear();
}

struct Printer {
  ~Printer() {
    for (const auto& [place, sum] : sums) {
      std::printf("%zx %zx %d %d %zu %zu %zu\n", place.kernel, place.from, place.is_shared, int(place.access),
                  place.bytes, size_t(sum.cost), size_t(sum.least));
    }
  }
} printer;

}  // namespace

void announced(Access access, const void* address, size_t bytes, const void* from) {
  if (!machine.is_inside || access == Access::arrive) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const auto has = [at](const Range& range) { return range.has(at); };
  if (!shared.has(at) && std::none_of(tensors.begin(), tensors.end(), has)) return;
  const Place place = {kernel, place_of(from), shared.has(at), access, bytes};
  const int lane = machine.lane();
  Pending& accesses = pending[{machine.running / kLanes, place}];
  const size_t n = accesses.passed[lane]++;
  if (accesses.requests.size() <= n) accesses.requests.push_back({});
  accesses.requests[n][lane] = at;
}

void watch(const void* begin, size_t bytes) { tensors.push_back({reinterpret_cast<uintptr_t>(begin), bytes}); }
void unwatch(const void* begin) {
  std::erase_if(tensors, [&](const Range& range) { return range.begin == reinterpret_cast<uintptr_t>(begin); });
}
void write_from_outside(const void*, size_t) {}
void watch_shared(const void* begin, size_t bytes) {
  end_block();
  shared = {reinterpret_cast<uintptr_t>(begin), bytes};
}
void watch_launch(const void* function, bool) { kernel = place_of(function) + 1; }
void fence() {}
void follow() {}
void touch(Access access, const void* at, size_t bytes) { announced(access, at, bytes, __builtin_return_address(0)); }
void touch_by_warp(const void* at, size_t bytes) {  // a row of each lane, in their order
  matrix_rows[rows_named++] = reinterpret_cast<uintptr_t>(at);
  if (rows_named < kLanes) return;
  rows_named = 0;
  count({kernel, 0, true, Access::read, bytes}, matrix_rows);
}

}  // namespace simt
