// Small helpers over PyTorch's stable ABI, for the registration files: dtypes, dense views, outputs, the thread pool,
// errors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

namespace h2ot {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline const Parallel& pool() {
  static thread_local Parallel p = {
      [](int64_t tasks, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
        torch::stable::parallel_for(0, tasks, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
      },
      1};
  p.threads = static_cast<int32_t>(torch::stable::get_num_threads());
  return p;
}

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      throw std::invalid_argument("h2ot_kernels: dtype is not float32, float64, bfloat16 or float16");
  }
}

inline Tokens tokens_of(const Tensor& x) {
  const bool pooled = x.dim() == 4;
  return {x.const_data_ptr(),
          dtype_of(x),
          x.size(0),
          x.size(1),
          pooled ? x.size(2) : 1,
          x.size(pooled ? 3 : 2),
          x.stride(0),
          x.stride(1),
          pooled ? x.stride(2) : 0,
          x.stride(pooled ? 3 : 2)};
}

// float32, or float64 for float64: the dtype of weights and sums beside x.
inline ScalarType precision_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// x, new; a large one on the CPU in huge pages where the system has them for the asking, as NumPy's arrays are: faults
// of 4 KB each take longer than the kernels that write there. Smaller ones malloc often has from the call before.
inline Tensor in_huge_pages(Tensor x) {
#if defined(__linux__)
  constexpr size_t kLarge = 10 << 20, kPage = 2 << 20;
  const size_t bytes = size_t(x.numel()) * x.element_size();
  if (bytes >= kLarge && x.is_cpu()) {
    char* const data = static_cast<char*>(x.mutable_data_ptr());
    const size_t before = (kPage - reinterpret_cast<uintptr_t>(data) % kPage) % kPage;  // a page begins
    madvise(data + before, (bytes - before) / kPage * kPage, MADV_HUGEPAGE);            // a wish only
  }
#endif
  return x;
}
// A new contiguous tensor beside `like`, its dtype a code of the shim. aten::new_empty passes the dispatcher twice: 1
// us.
inline Tensor make_coded(const Tensor& like, const std::vector<int64_t>& size, int32_t dtype) {
  constexpr size_t kMost = 64;
  if (size.size() > kMost) throw std::invalid_argument("h2ot_kernels: wanted a result of at most 64 axes");
  int64_t stride[kMost];
  int64_t step = 1;
  for (size_t axis = size.size(); axis-- > 0; step *= std::max<int64_t>(size[axis], 1)) stride[axis] = step;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), stride, dtype, device,
                                                  like.get_device_index(), &made));
  return in_huge_pages(Tensor(made));
}
inline Tensor make(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  return make_coded(like, size, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)));
}
inline Tensor make(const Tensor& like, const std::vector<int64_t>& size) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return make_coded(like, size, dtype);
}

// Sizes and strides of x, of at most kMaxDims axes, with axis `from` moved to `to`, neither of them the batch.
struct Moved {
  int64_t size[kMaxDims], stride[kMaxDims];

  Moved(const Tensor& x, int64_t from, int64_t to) {
    const int64_t dims = x.dim();  // a call into torch
    if (dims > kMaxDims || std::min(from, to) < 1 || std::max(from, to) >= dims) {
      throw std::invalid_argument("h2ot_kernels: wanted at most 8 axes, and frames on one behind the batch");
    }
    for (int64_t axis = 0, source = 0; axis < dims; axis++) {
      if (source == from) source++;
      const int64_t taken = axis == to ? from : source++;
      size[axis] = x.size(taken);
      stride[axis] = x.stride(taken);
    }
  }
};

// A new tensor like x, its axis `from` moved to `to` and `length` long.
inline Tensor make_moved(const Tensor& x, int64_t from, int64_t to, int64_t length) {
  const Moved moved(x, from, to);
  std::vector<int64_t> size(moved.size, moved.size + x.dim());
  size[size_t(to)] = length;
  return make(x, size);
}
inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }
inline Tensor dense(const Tensor& x, ScalarType dtype) {
  return dense(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}
inline MaybeTensor dense(const MaybeTensor& x, ScalarType dtype) {
  return x ? MaybeTensor(dense(*x, dtype)) : std::nullopt;
}

template <class T>
const T* read(const MaybeTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}
template <class T>
T* write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// index: what the operator calls the argument that holds indices.
inline void check(Status status, const char* op, const char* index = "index") {
  const std::string name = std::string(op) + ": ";
  switch (status) {
    case Status::ok:
      return;
    case Status::index_out_of_range:
      throw std::out_of_range(name + index + " holds a value outside its range");
    case Status::index_not_ascending:
      throw std::out_of_range(name + index + " is not strictly ascending in every row");
    case Status::too_many_kept:
      throw std::out_of_range(name + index + " names more tokens than num_tokens");
    case Status::out_of_memory:
      throw std::runtime_error(name + "no memory for the kernel's scratch");
    case Status::parent_out_of_range:
      throw std::out_of_range(name + "parent holds a value outside its range");
  }
}

}  // namespace
}  // namespace h2ot
