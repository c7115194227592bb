// What the operators of recovery by attention read.
#pragma once

#include "stable.h"

namespace h2ot {
namespace {

inline Rows rows_of(const Tensor& x) { return {x.dim() == 3 ? x.stride(0) : 0, x.stride(-2)}; }

// Query, key and value with adjacent channels (such as parts of one projection), or dense, and the arguments.
struct RecoverInputs {
  Tensor query, key, value;
  RecoverAttentionArgs args;

  RecoverInputs(const Tensor& q, const Tensor& k, const Tensor& v, int64_t num_heads, double scale, bool as_dense)
      : query(readable(q, as_dense)), key(readable(k, as_dense)), value(readable(v, as_dense)) {
    args = {query.const_data_ptr(),
            key.const_data_ptr(),
            value.const_data_ptr(),
            dtype_of(v),
            key.size(0),
            query.size(-2),
            key.size(1),
            key.size(2),
            num_heads,
            query.dim() == 3 ? query.size(0) : 1,
            rows_of(query),
            rows_of(key),
            rows_of(value),
            scale,
            nullptr};
  }

  static Tensor readable(const Tensor& x, bool as_dense) { return !as_dense && x.stride(-1) == 1 ? x : dense(x); }
};

}  // namespace
}  // namespace h2ot
