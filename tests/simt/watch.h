// The memory of tensors and blocks, watched for races and for bytes that nobody wrote. In builds with -fsanitize=thread
// only: there the compiler calls a function before every access of the kernels, and watch.cpp has these functions, not
// the compiler's library. Or traffic.cpp has them, and counts what the accesses take. Elsewhere these are nothing. What
// a function returns straight into watched memory g++ does not announce: kernels put it into a variable first.
#pragma once

#include <cstddef>

namespace simt {

enum class Access { read, write, atomic, copy, arrive };  // an asynchronous copy is started, and has come

#if defined(__SANITIZE_THREAD__)
#define SIMT_UNWATCHED __attribute__((no_sanitize("thread")))
void watch(const void* begin, size_t bytes);
void unwatch(const void* begin);
void write_from_outside(const void* begin, size_t bytes);  // as the host does
void watch_shared(const void* begin, size_t bytes);        // of a block that begins
void watch_launch(const void* kernel, bool overlaps);
void touch(Access access, const void* at, size_t bytes);
void touch_by_warp(const void* at, size_t bytes);  // reads
void fence();
void follow();  // the launch before has ended
#else
#define SIMT_UNWATCHED
inline void watch(const void*, size_t) {}
inline void unwatch(const void*) {}
inline void write_from_outside(const void*, size_t) {}
inline void watch_shared(const void*, size_t) {}
inline void watch_launch(const void*, bool) {}
inline void touch(Access, const void*, size_t) {}
inline void touch_by_warp(const void*, size_t) {}
inline void fence() {}
inline void follow() {}
#endif

}  // namespace simt
