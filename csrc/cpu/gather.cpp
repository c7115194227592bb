// Frames taken out of a tensor, and put back into zeros: one walk over the rows of the output.
#include "../walk.h"
#include "kernels.h"
#include "vectors.h"
#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

constexpr int64_t kAllRows = INT64_MAX;

// The output, by its last axis, the row. Position f on the axis `frame` is read from source[f] (of the source row of
// that sample), or is zero where source[f] is negative.
struct Walk : Axes {
  const char* x;
  char* out;
  int64_t item, group;  // bytes of an element; batch rows of one source row
  const int64_t* source;

  template <class Args>
  Walk(const Args& a, const void* from, const int64_t* sources, bool keep_last)
      : Axes(merge_axes(a, keep_last)),
        x(static_cast<const char*>(from)),
        out(static_cast<char*>(a.out)),
        item(item_bytes(a.dtype)),
        group(a.index_rows > 1 ? a.size[0] / a.index_rows : kAllRows),
        source(sources) {}
};

template <int kBytes>
H2OT_INLINE void copy_strided(char* out, const char* x, int64_t count, int64_t stride) {
  for (int64_t i = 0; i < count; i++) memcpy(out + i * kBytes, x + i * stride * kBytes, kBytes);
}

// Asks for the lines that the next row is read from (rows lie apart, so the machine does not foresee them; null: none)
// and written to, which a store would wait for (a Xeon: 17 -> 28 GB/s). Long rows are memcpy's own matter.
H2OT_INLINE void ask_for_row(const char* x, char* out, int64_t bytes) {
  if (bytes < 256) return;
  for (int64_t at = 0; at < bytes && at < 2048; at += 64) {
    if (x) __builtin_prefetch(x + at);
    __builtin_prefetch(out + at, 1);
  }
}

// Calls row(out, source or null, frame position) for the rows [begin, end) of the output.
template <class Row>
H2OT_INLINE void walk_rows(const Walk& w, int64_t begin, int64_t end, const Row& row) {
  const int last = w.dims - 1;
  const int64_t frames = w.size[w.frame], out_bytes = w.size[last] * w.item;
  const int64_t ahead = w.stride[last] == 1 ? out_bytes : 0;
  int64_t at[kMaxDims + 1];
  int64_t rest = begin, offset = 0;
  for (int axis = last - 1; axis >= 0; axis--) {
    at[axis] = rest % w.size[axis];
    rest /= w.size[axis];
    if (axis != w.frame) offset += at[axis] * w.stride[axis];
  }
  const int64_t* source = w.source + at[0] / w.group * frames;
  const auto find = [&] {
    const int64_t from = source[at[w.frame]];
    return from < 0 ? nullptr : w.x + (offset + from * w.stride[w.frame]) * w.item;
  };
  char* out = w.out + begin * out_bytes;
  const char* x = find();
  for (int64_t r = begin; r < end; r++, out += out_bytes) {
    const int64_t f = at[w.frame];
    const char* const now = x;
    int axis = last - 1;
    for (; axis >= 0; axis--) {
      if (axis != w.frame) offset += w.stride[axis];
      if (++at[axis] < w.size[axis]) break;
      if (axis != w.frame) offset -= w.stride[axis] * w.size[axis];
      at[axis] = 0;
    }
    if (axis <= 0) source = w.source + at[0] / w.group * frames;
    x = find();
    ask_for_row(x, out + out_bytes, ahead);
    row(out, now, f);
  }
}

H2OT_INLINE int64_t num_rows(const Walk& w) {
  int64_t rows = w.size[w.dims - 1] > 0;
  for (int axis = 0; axis < w.dims - 1; axis++) rows *= w.size[axis];
  return rows;
}
H2OT_INLINE int64_t row_grain(const Walk& w) { return 1 + 65536 / (w.size[w.dims - 1] * w.item + 16); }

void move_rows(const Walk& w, const Parallel& pool) {
  const int64_t count = w.size[w.dims - 1], stride = w.stride[w.dims - 1], bytes = count * w.item;
  parallel_for(pool, num_rows(w), row_grain(w), [&](int64_t begin, int64_t end) {
    walk_rows(w, begin, end, [&](char* out, const char* x, int64_t) {
      if (!x) {
        memset(out, 0, size_t(bytes));
      } else if (stride == 1 || count == 1) {
        memcpy(out, x, size_t(bytes));
      } else if (w.item == 2) {
        copy_strided<2>(out, x, count, stride);
      } else if (w.item == 4) {
        copy_strided<4>(out, x, count, stride);
      } else {
        copy_strided<8>(out, x, count, stride);
      }
    });
  });
}

template <class T>
void move_rows_embedded(const Walk& w, const T* embed, const Parallel& pool) {
  const int64_t count = w.size[w.dims - 1], stride = w.stride[w.dims - 1];
  parallel_for(pool, num_rows(w), row_grain(w), [&](int64_t begin, int64_t end) {
    walk_rows(w, begin, end, [&](char* to, const char* from, int64_t f) {
      T* const out = reinterpret_cast<T*>(to);
      const T* const x = reinterpret_cast<const T*>(from);
      const T* const e = embed + f * count;
      int64_t c = 0;
      if (stride == 1) {
        for (; c + kLanes<T> <= count; c += kLanes<T>) store_narrow(out + c, load_wide(x + c) + load_wide(e + c));
      }
      for (; c < count; c++) narrow(widen(x[c * stride]) + widen(e[c]), out[c]);
    });
  });
}

}  // namespace

Status gather(const GatherArgs& a, const Parallel& pool) {
  const int64_t from = a.pos_embed ? 0 : -1;  // padding has no embedding
  if (!in_range(a.index, a.index_rows * a.size[a.frame_axis], from, a.F)) return Status::index_out_of_range;
  const Walk w(a, a.x, a.index, a.pos_embed != nullptr);
  if (a.pos_embed) {
    for_dtype(a.dtype,
              [&](auto element) { move_rows_embedded(w, static_cast<const decltype(element)*>(a.pos_embed), pool); });
  } else {
    move_rows(w, pool);
  }
  return Status::ok;
}

Status scatter(const ScatterArgs& a, const Parallel& pool) {
  const int64_t F = a.size[a.frame_axis];
  if (!in_range(a.index, a.index_rows * a.K, -1, F)) return Status::index_out_of_range;
  int64_t* const source = static_cast<int64_t*>(scratch(Slot::shared, a.index_rows * F * 8));
  if (!source) return Status::out_of_memory;
  memset(source, 0xff, size_t(a.index_rows * F * 8));  // -1 everywhere
  for (int64_t row = 0; row < a.index_rows; row++) {
    const int64_t* const index = a.index + row * a.K;
    for (int64_t k = 0; k < a.K; k++) {
      if (index[k] < 0) continue;
      if (k > 0 && index[k] <= (index[k - 1] < 0 ? F : index[k - 1])) return Status::index_not_ascending;
      source[row * F + index[k]] = k;
    }
  }
  move_rows(Walk(a, a.grad, source, false), pool);
  return Status::ok;
}

}  // namespace H2OT_ISA
}  // namespace h2ot
