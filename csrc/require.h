// What operators ask before a kernel reads: sizes and dtypes that fit each other. Public functions have asked in words
// of their own; this is for who calls an operator itself, a graph or a program that was exported among them.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "stable.h"

namespace h2ot {
namespace {

// Raises ValueError that names the operator and what it wants.
struct Require {
  const char* op;

  void operator()(bool condition, const char* wanted) const {
    if (!condition) throw std::invalid_argument(std::string(op) + ": wanted " + wanted);
  }
};

// A tensor's sizes are asked for once: every question is a call into torch.
inline bool has_size(const Tensor& x, std::initializer_list<int64_t> size) {
  const auto own = x.sizes();
  return std::equal(own.begin(), own.end(), size.begin(), size.end());
}
inline bool same_size(const Tensor& a, const Tensor& b) {
  const auto first = a.sizes(), second = b.sizes();
  return std::equal(first.begin(), first.end(), second.begin(), second.end());
}

// Rows that each serve so many rows of a batch of B.
inline bool shares(int64_t rows, int64_t B) { return rows == B || (rows > 0 && B % rows == 0); }

// Kernels number the tokens of a sample, x [B, N, ...], in 32 bits. Public functions have asked (checks.token_limit),
// exported programs have not: before anything is allocated.
inline void check_token_limit(int64_t count, const char* argument = "x", int64_t most = INT32_MAX) {
  if (count > most) {
    throw std::invalid_argument(std::string(argument) + ": got " + std::to_string(count) +
                                " tokens a sample, wanted at most " + std::to_string(most));
  }
}

// The sizes of tokens.
inline auto require_tokens(Require require, const Tensor& x, const MaybeTensor& mask) {
  const auto size = x.sizes();
  require((size.size() == 3 || size.size() == 4) && std::find(size.begin() + 1, size.end(), 0) == size.end(),
          "x [B, N, C] or [B, F, J, C], with tokens, joints and channels");
  require(!mask || has_size(*mask, {size[0], size[1]}), "mask [B, N]");
  check_token_limit(size[1]);
  return size;
}
inline auto require_scoring(Require require, const Tensor& x, int64_t k, const MaybeTensor& mask,
                            const MaybeTensor& noise, bool exclude_self = false, double cutoff = 0) {
  const auto size = require_tokens(require, x, mask);
  require(!noise || has_size(*noise, {size[0], size[1]}), "noise [B, N]");
  require(cutoff > 0 || (k >= 1 && k <= size[1] - exclude_self), "k from 1 to the number of tokens it averages");
  return size;
}
inline void require_selection(Require require, int64_t B, int64_t N, int64_t num_tokens, const MaybeTensor& keep) {
  require(num_tokens >= 1 && num_tokens <= N, "num_tokens from 1 to the number of tokens");
  require(!keep || (keep->dim() == 2 && (keep->size(0) == 1 || keep->size(0) == B)), "keep [1, M] or [B, M]");
}
inline void require_scores(const Tensor& score, int64_t num_tokens, const MaybeTensor& keep, const MaybeTensor& mask) {
  constexpr Require require = {"select_tokens"};
  require(score.dim() == 2, "score [B, N]");
  const int64_t B = score.size(0), N = score.size(1);
  require(!mask || has_size(*mask, {B, N}), "mask [B, N]");
  require_selection(require, B, N, num_tokens, keep);
}
inline void require_index(Require require, const Tensor& index, int64_t B) {
  const auto size = index.sizes();
  require(size.size() == 2 && index.scalar_type() == ScalarType::Long && shares(size[0], B),
          "index int64 [B, K], or rows that B is a multiple of");
}
inline void require_centres(Require require, const Tensor& index, int64_t B) {
  require_index(require, index, B);
  require(index.size(0) == 1 || index.size(0) == B, "index int64 [B, K], or [1, K] for all samples");
}

// out takes what make_moved() makes room for.
inline void require_out(Require require, const Tensor& out, const Tensor& x, int64_t from, int64_t to, int64_t length) {
  bool fits = out.dim() == x.dim() && out.scalar_type() == x.scalar_type() && out.is_contiguous();
  const Moved moved(x, from, to);
  for (int64_t axis = 0, dims = x.dim(); fits && axis < dims; axis++) {
    fits = out.size(axis) == (axis == to ? length : moved.size[axis]);
  }
  require(fits, "out, contiguous, of the result's shape and dtype");
}
inline void require_gathered(Require require, const Tensor& x, const Tensor& index, const MaybeTensor& pos_embed,
                             const Tensor& out) {
  require_index(require, index, x.size(0));
  require(!pos_embed || has_size(*pos_embed, {index.size(1), out.size(-1)}), "pos_embed [K, C]");
}
inline void require_scattered(Require require, const Tensor& grad, const Tensor& index, int64_t out_dim) {
  require_index(require, index, grad.size(0));
  require(grad.size(out_dim) == index.size(1), "as many frames in grad as in index");
}

}  // namespace
}  // namespace h2ot
