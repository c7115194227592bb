// Contracts between the torch-facing files (*registration.cpp) and the kernels: shapes, units, sizes. No torch here.
//
// Every kernel reads its arguments through one struct, trusts it (the operator has asked for sizes and dtypes that fit,
// require.h), allocates nothing but per-thread scratch, and returns a Status. A kernel that meets a wrong index value
// writes nothing out of bounds and says so in its Status. Strides are in elements. Sizes are 64-bit.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace h2ot {

enum class Status : int32_t {
  ok,
  index_out_of_range,   // an index, label or keep value outside its range: IndexError
  index_not_ascending,  // an index row that is not strictly ascending: IndexError
  too_many_kept,        // more distinct keep values than tokens to select: IndexError
  out_of_memory,        // no memory for scratch: RuntimeError
  parent_out_of_range   // where there is an index, too: a parent outside its range: IndexError
};

// Runs body(context, begin, end) over [0, tasks) on the caller's thread pool, chunks of at least `grain` tasks.
// `threads` is the size of that pool. The driver without torch passes a serial one.
struct Parallel {
  void (*run)(int64_t tasks, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);
  int32_t threads;
};

// Tokens [B, N, C], each the mean of J joints added in ascending order and divided once
// (J = 1: the token itself), in float32, or float64 for f64.
struct Tokens {
  const void* data;
  Dtype dtype;
  int64_t B, N, J, C;
  int64_t stride_b, stride_n, stride_j, stride_c;
};

// Density-peak scores (python_ref/score.py). A token is valid when mask (if given) says so and all its channels are
// finite. Deterministic mode (noise null): j is denser than i when (m_j, j) < (m_i, i). Gaussian density (cutoff > 0):
// rho_i = sum over j of exp(-d_ij^2 / cutoff^2), each term rounded to a multiple of 2^-40, in place of exp(-m); -rho
// then orders like m does.
struct ScoreArgs {
  Tokens x;
  int64_t k;            // 1 .. N (N - 1 with exclude_self); not used with cutoff
  const bool* mask;     // [B, N] contiguous, or null
  const double* noise;  // [B, N] contiguous, or null
  double* density;      // outputs, each [B, N] contiguous; density, distance and parent may be null, and then
  double* distance;     // the work that only they need (the largest distance of a sample) is left out
  double* score;
  int64_t* parent;
  bool* valid;                // [B, N] out, or null: which tokens were valid (selection needs it)
  double area = 0;            // squared distances are divided by it; 0: by C
  bool exclude_self = false;  // the density of a token does not count the token itself
  double cutoff = 0;
};

// How the CPU scores a sample, chosen from sizes alone.
enum class Search : int32_t {
  stored,    // all tile distances kept: O(N^2) memory, for few tokens
  streamed,  // the nearest of each token kept: O(N (C + k)) memory
  exact      // streamed, every row searched in float64: k too long for lists
};
struct ScorePlan {
  Search search;
  int64_t scratch;  // bytes for one sample, beside a list of N neighbours (16 bytes each) per thread
};

// The K first by (kept, valid, score descending, index ascending), ascending. NaN scores are not valid.
struct SelectArgs {
  const double* score;  // [B, N] contiguous
  int64_t B, N, K;
  const bool* mask;      // [B, N] contiguous, or null: all valid
  const int64_t* keep;   // [keep_rows, M] contiguous, or null; values checked against N
  int64_t keep_rows, M;  // keep_rows 1 or B
  int64_t* index;        // [B, K] out
};

// Scoring, selection on the scores, and the labels of all tokens as AssignArgs defines them, in one pass over a sample:
// where all its distances are at hand, labels cost no product.
struct ClusterArgs {
  ScoreArgs score;    // with score and valid
  SelectArgs select;  // its score and mask are those of `score`
  int64_t* labels;    // [B, N] out
};

// score[b, 0] = 0; score[b, t] = sum of |pose[b, t] - pose[b, t - 1]| in float64, innermost axis last.
struct MotionArgs {
  const void* pose;  // [B, F, J, D], any strides
  Dtype dtype;
  int64_t B, F, J, D;
  int64_t stride_b, stride_f, stride_j, stride_d;
  double* score;  // [B, F] out
};

// score[b, t] = mean over P, H and queries of softmax_t(scale q k^T): [B, P, H, F, D] -> [B, F], float32 (float64 for
// f64).
struct AttentionScoreArgs {
  const void *query, *key;
  Dtype dtype;
  int64_t B, P, H, F, D;
  int64_t query_stride[5], key_stride[5];
  double scale;
  void* score;  // [B, F] contiguous, float, or double for f64
};

// out[b, ...] = x with its frame axis indexed, written contiguous in the order of `size`:
// the axes of the output, axis 0 the batch, axis `frame_axis` the K kept frames. stride[frame_axis] is that of x's
// frames. Each index row serves B / index_rows consecutive rows of the batch.
constexpr int kMaxDims = 8;
struct GatherArgs {
  const void* x;
  Dtype dtype;
  int32_t dims, frame_axis;
  int64_t size[kMaxDims], stride[kMaxDims];
  int64_t F;
  const int64_t* index;  // [index_rows, K] contiguous; -1 is padding, whose frames are zeros (without pos_embed only)
  int64_t index_rows;
  const void* pos_embed;  // [K, C] contiguous in dtype, or null; C is the last axis, added in float32 (float64 for f64)
  void* out;
};

// The reverse: out (contiguous, axes in the order of `size`, F frames on frame_axis) is zero but at the kept frames,
// which hold grad. stride is that of grad, its frame axis holding K.
struct ScatterArgs {
  const void* grad;
  Dtype dtype;
  int32_t dims, frame_axis;
  int64_t size[kMaxDims], stride[kMaxDims];
  int64_t K;
  const int64_t* index;  // [index_rows, K] contiguous, strictly ascending, then perhaps -1 (padding)
  int64_t index_rows;
  void* out;
};

// labels[b, i] = position in index of the nearest valid selected token, the lowest on a tie; a selected token's own
// position; -1 for tokens that are not valid or have no valid selected token. With parent: instead of the nearest, the
// first valid selected token up the chain of parents; -1 where it ends (parent -1, or a token that is not valid).
struct AssignArgs {
  Tokens x;
  const int64_t* index;  // [index_rows, K] contiguous, -1 .. N - 1; -1 is padding
  int64_t index_rows, K;
  const bool* mask;                 // [B, N] contiguous, or null
  int64_t* labels;                  // [B, N] out
  const int64_t* parent = nullptr;  // [B, N] contiguous, -1 .. N - 1, or null
};

// out[b, c] = sum_i w_i x_i / sum_i w_i over the tokens labelled c, added in ascending order of i; 0 where sum w is 0.
struct MergeArgs {
  const void* x;  // [B, N, C]
  Dtype dtype;
  int64_t B, N, C, K;
  int64_t stride_b, stride_n, stride_c;
  const int64_t* labels;  // [B, N] contiguous, -1 .. K - 1
  const void* weight;     // [B, N] contiguous, float (double for f64), or null
  void* out;              // [B, K, C] contiguous, dtype
  void* total;            // [B, K] out, float (double for f64): the sums of weights
};

// Where the rows of a [B, N, C] tensor are: strides, in elements, of the batch and of the rows.
struct Rows {
  int64_t stride_b, stride_n;
};

// Takes attended rows in place of memory as soon as they are made, on the thread that made them: [count, C] contiguous,
// of queries first .. first + count - 1 of sample b.
struct RowsTaker {
  Status (*take)(const void* context, int64_t b, int64_t first, int64_t count, const void* rows);
  const void* context;
};

// out[b, f] = softmax(scale q_f k^T) v per head, heads side by side on C. Accumulated in float32 (float64 for f64).
struct RecoverAttentionArgs {
  const void *query, *key, *value;  // [query_rows, F, C], [B, K, C], [B, K, C]; query_rows 1 or B
  Dtype dtype;
  int64_t B, F, K, C, H, query_rows;
  Rows query_at, key_at, value_at;  // channels are adjacent; the backward pass wants all three contiguous
  double scale;
  void* out;  // [B, F, C] contiguous, dtype; unused where there is a taker, which wants K at least 1
  const RowsTaker* taker = nullptr;
};

// Gradients of the same. grad_query is summed over B where query_rows is 1 (b ascending).
struct RecoverAttentionBackwardArgs {
  RecoverAttentionArgs forward;  // out unused
  const void* grad;              // [B, F, C] contiguous, dtype
  void *grad_query, *grad_key, *grad_value;
};

// out[r, f] = head(norm(token[f] + projected[r, f])): LayerNorm over C, then a linear layer with M outputs. All
// contiguous and of one dtype; sums in float32 (float64 for f64). Gradients: none.
struct RecoverTailArgs {
  const void *token, *projected;        // [F, C], [R, F, C]
  const void *norm_weight, *norm_bias;  // [C] each, or null: 1, 0
  const void *head_weight, *head_bias;  // [M, C]; [M], or null: 0
  Dtype dtype;
  int64_t R, F, C, M;
  double eps;
  void* out;  // [R, F, M]
};

// Attention and the same tail in one, in the channels of a rotation that leaves the projection a triangle:
// z = token[f] + triangle * attended[b, f], out[b, f] = head z / sqrt(z z / C + eps) + bias. All contiguous but what is
// attended. W: C rounded up to whole panels; zeros stand beyond C. kernels(): f32; run_rotated_halves(): bf16;
// amx::rotated_tiles(): f32, by bytes.
constexpr int64_t kRotatedPanel = 32, kRotatedTile = 1024;
struct RecoverRotatedArgs {
  RecoverAttentionArgs attention;  // out and taker unused; K at least 1; the dtype of out, too
  const float* token;              // [F, W]
  // For each panel of rotated channels c .. c + kRotatedPanel - 1: the weights of channels c .. C - 1 of attended,
  // which are all that it depends on, [C - c][kRotatedPanel]. bf16: in tiles of kRotatedTile, [channels / 32][2][16
  // pairs of channels][16][2]. Bytes: what is above the diagonal, as pack_tiles() packs it, with a spread of its own
  // (recover_rotated.py), then the diagonal in float32 [W].
  const void* triangle;
  const float *head, *bias;  // [M, W]; [M]
  int64_t M;
  double eps;
  void* out;  // [B, F, M]
};

// sum[r] = x[r] + y[r], rounded as it is stored; out[r] = LayerNorm(sum[r]) over C, in float32 (float64 for f64).
struct AddNormArgs {
  const void *x, *y;                // [rows, C], channels adjacent; y null: out = LayerNorm(x), and sum is not written
  Dtype dtype, y_dtype, out_dtype;  // of x and sum, of y, of out: f32 with y and out of f32, bf16 or f16, else the same
  int64_t rows, C;
  int64_t x_stride, y_stride;  // of the rows
  const void *weight, *bias;   // [C] each, or null: 1, 0
  Dtype weight_dtype;          // of both: f32, or x's
  double eps;
  void *sum, *out;  // [rows, C] contiguous
};

// A layer of a graph over the T nodes of each line (python_ref/graph.py). s[n]: the degree of node n to the power -1/2;
// y[n] = s[n] (sum over the neighbours m of n of s[m] v[m]) + u[n];
// out[n] = residual[n] + scale relu(x[n] + (y[n] - mean[n]) norm_weight[n] / sqrt(variance[n] + eps) + norm_bias[n]).
// In float32 (float64 for f64). A node without neighbours makes its line NaN.
constexpr int kMostNeighbours = 16;
struct GraphArgs {
  const void *x, *u, *v, *residual;  // [lines, T, inner, C] contiguous
  Dtype dtype;                       // of these, the norm, the scale and out
  int64_t lines, T, inner, C;        // T at least 1
  // Row n says who n's neighbours are. Null: m is one of n's where x[n] x[m] reaches the `neighbours`-th largest of n's
  // products (NaN is the largest, and reaches nothing).
  const bool* adjacency;                // [T, T] of all lines (stride 0), or [lines, inner, T, T], contiguous
  int64_t adjacency_stride;             // from one line to the next: 0 or T T
  int64_t neighbours;                   // 1 .. min(T, kMostNeighbours)
  const void *norm_weight, *norm_bias;  // [T] each, or null: 1, 0
  const void *mean, *variance;          // [T]
  double eps;
  const void* scale;  // [C]
  void* out;          // [lines, T, inner, C] contiguous
};

enum class Interpolation : int32_t { linear, nearest };

// out[b, t] = (1 - w) x[b, i] + w x[b, i + 1]; index null: uniform (position t (K - 1) / (F - 1)).
struct InterpolateArgs {
  const void* x;  // [B, K, S] contiguous
  Dtype dtype;
  int64_t B, K, F, S;
  const int64_t* index;  // [index_rows, K] contiguous strictly ascending in [0, F), or null
  int64_t index_rows;
  Interpolation mode;
  void* out;  // [B, F, S] contiguous
};

// grad_x[b, i] = sum over the frames t that read x[b, i] of their weight times grad[b, t], t ascending.
struct InterpolateBackwardArgs {
  InterpolateArgs forward;  // x and out unused
  const void* grad;         // [B, F, S] contiguous
  void* grad_x;             // [B, K, S] contiguous
};

}  // namespace h2ot
