// See watch.h. Who touched each byte last, and what has ordered two threads since: a barrier of their block, __syncwarp
// where they are of one warp, the end of a launch, or between blocks a fence and an atomic on either side. A shuffle or
// a ballot orders nothing, as on a GPU. Never sanitized itself.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "announced.h"

namespace simt {

namespace {

// Threads, and what stands for several.
constexpr int kOfWarp = 1024, kOfBlock = 2000, kOfGrid = 2001, kOnItsWay = 2002;

struct Mark {
  uint32_t era = 0, meetings = 0;  // barriers of blocks passed in the program, and of the warp; era 0: never
  int16_t thread = 0;
  bool is_atomic = false;
};
struct Cell {  // of a byte
  Mark written, read;
};
struct Range {
  uintptr_t begin = 0;
  size_t bytes = 0;
  bool is_shared = false;
  std::unique_ptr<Cell[], decltype(&std::free)> cells{nullptr, &std::free};

  void hold(const void* first, size_t count) {
    begin = reinterpret_cast<uintptr_t>(first);
    bytes = count;
    cells.reset(static_cast<Cell*>(std::calloc(count + 1, sizeof(Cell))));  // pages come when they are touched
  }
};
struct Release {
  uint32_t first, end;  // eras of a block
};

std::vector<Range> tensors;
Range shared;
size_t shared_room = 0;
bool overlaps = false, follows[1024];
std::vector<Release> releases;       // of this launch
uint32_t fenced[1024], asked[1024];  // the era of a thread's last fence, and of its last atomic
uint32_t acquired = 0;               // the era of the block's last atomic before a fence

std::string name_of(int thread) {
  if (thread == kOnItsWay) return "a copy on its way";
  if (thread == kOfGrid) return "several blocks";
  if (thread == kOfBlock) return "several warps";
  return thread >= kOfWarp ? "several lanes of warp " + std::to_string(thread - kOfWarp)
                           : "thread " + std::to_string(thread);
}

bool is_released(const Mark& mark) {
  if (acquired < machine.first_of_block || acquired >= machine.era) return false;
  for (const Release& release : releases) {
    if (mark.era >= release.first && mark.era < release.end) return true;
  }
  return false;
}

// Whether what the mark says was before what `thread` does now.
bool ordered(const Mark& mark, int thread) {
  if (mark.era < machine.first_of_launch) return true;
  if (mark.thread == kOnItsWay) return false;
  if (mark.thread == kOfGrid || mark.era < machine.first_of_block) return is_released(mark);
  if (mark.era < machine.era || mark.thread == thread) return true;
  const int warp = thread >= kOfWarp ? thread - kOfWarp : thread / kLanes;
  return (mark.thread == kOfWarp + warp || (mark.thread < kOfWarp && mark.thread / kLanes == warp)) &&
         mark.meetings < machine.own_lanes().meetings;
}

// What stands for both, neither before the other.
int both(int a, int b) {
  if (a == b) return a;
  const auto warp = [](int t) { return t < kOfWarp ? t / kLanes : t < kOfBlock ? t - kOfWarp : -1; };
  return warp(a) >= 0 && warp(a) == warp(b) ? kOfWarp + warp(a) : kOfBlock;
}

struct Event {
  Access access;
  uintptr_t at;
  size_t bytes;
  int thread;
  const void* from;  // in the program

  [[noreturn]] void fail(const Range& range, const std::string& what) const {
    static const char* const verbs[] = {"reads", "writes", "updates", "copies to", "gets a copy to"};
    const std::string text = name_of(thread) + " of block " + std::to_string(block_index.x) + ", " +
                             std::to_string(block_index.y) + " " + verbs[int(access)] + " " + std::to_string(bytes) +
                             " bytes at byte " + std::to_string(at - range.begin) + " of " +
                             (range.is_shared ? "shared memory, " : "a tensor, ") + what;
    char place[32];
    std::snprintf(place, sizeof place, "at 0x%zx", place_of(from));
    stop(text.c_str(), place);
  }

  void race(const Range& range, const Mark& mark, const char* verb) const {
    const bool elsewhere = mark.era < machine.first_of_block;
    fail(range, "which " + name_of(mark.thread) + (elsewhere ? " of another block" : "") + verb + ", in no order");
  }

  void pass(Range& range) const {
    if (!range.is_shared && overlaps && !follows[machine.running])
      fail(range, "and does not wait for the launch before");
    const Mark now = {machine.era, machine.own_lanes().meetings, int16_t(thread), access == Access::atomic};
    const uint32_t since = range.is_shared ? machine.first_of_block : 1;
    for (size_t n = at - range.begin, end = n + bytes; n < end && n < range.bytes; n++) {
      Cell& cell = range.cells[n];
      const bool there = cell.written.era >= since, both_atomic = now.is_atomic && cell.written.is_atomic;
      const bool arrives = access == Access::arrive && cell.written.thread == kOnItsWay;
      if ((access == Access::read || access == Access::atomic) && !there) fail(range, "which nobody has written");
      const bool after = !there || ordered(cell.written, thread);
      if (!after && !both_atomic && !arrives) race(range, cell.written, " wrote");
      if (access == Access::read) {
        const bool joins = cell.read.era == now.era && !ordered(cell.read, thread);
        const int who = joins ? both(cell.read.thread, thread) : thread;
        // Where another block has read, it is enough to remember that one: nothing orders the two.
        if (cell.read.era < machine.first_of_launch || cell.read.era >= machine.first_of_block) cell.read = now;
        if (joins) cell.read.thread = int16_t(who);
        continue;
      }
      if (cell.read.era >= since && !ordered(cell.read, thread)) race(range, cell.read, " read");
      const Mark before = cell.written;
      cell.written = now;
      if (access == Access::copy) cell.written.thread = kOnItsWay;
      if (both_atomic && !after) {
        const bool same = before.era >= machine.first_of_block && before.thread != kOfGrid;
        cell.written.thread = int16_t(same ? both(before.thread, thread) : kOfGrid);
      }
    }
  }
};

Range* range_of(uintptr_t at) {
  if (at - shared.begin < shared.bytes) return &shared;
  for (Range& range : tensors) {
    if (at - range.begin < range.bytes) return &range;
  }
  return nullptr;
}

void pass(Access access, const void* address, size_t bytes, int thread, const void* from) {
  if (!machine.is_inside) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (Range* range = range_of(at)) Event{access, at, bytes, thread, from}.pass(*range);
}

}  // namespace

void announced(Access access, const void* at, size_t bytes, const void* from) {
  pass(access, at, bytes, machine.running, from);
}

void watch(const void* begin, size_t bytes) {
  tensors.emplace_back();
  tensors.back().hold(begin, bytes);
}
void unwatch(const void* begin) {
  std::erase_if(tensors, [&](const Range& range) { return range.begin == reinterpret_cast<uintptr_t>(begin); });
}
void write_from_outside(const void* begin, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
  if (Range* range = range_of(at)) {
    for (size_t n = 0; n < bytes; n++) range->cells[at - range->begin + n].written.era = 1;
  }
}
void watch_shared(const void* begin, size_t bytes) {
  if (bytes > shared_room) {
    shared.hold(begin, bytes);
    shared_room = bytes;
  }
  shared.is_shared = true;
  shared.begin = reinterpret_cast<uintptr_t>(begin);
  shared.bytes = bytes;
  std::fill(follows, follows + 1024, false);
}
void watch_launch(const void*, bool may_overlap) {
  overlaps = may_overlap;
  releases.clear();
  machine.first_of_launch = ++machine.era;
}
void fence() {
  const int t = machine.running;
  fenced[t] = machine.era;
  if (asked[t] == machine.era) acquired = machine.era;
}
void follow() { follows[machine.running] = true; }

void touch(Access access, const void* at, size_t bytes) {
  const int t = machine.running;
  pass(access, at, bytes, t, __builtin_return_address(0));
  if (access != Access::atomic) return;
  asked[t] = machine.era;
  if (fenced[t] == machine.era) releases.push_back({machine.first_of_block, machine.era});
}
void touch_by_warp(const void* at, size_t bytes) {
  pass(Access::read, at, bytes, kOfWarp + machine.running / kLanes, __builtin_return_address(0));
}

}  // namespace simt
