// A residual addition and the LayerNorm of its result, row by row: one pass over memory, three over a row in cache.
// About 25 operations for each vector of a row, and three sums over lanes that wait for each other.
#include "kernels.h"
#include "layer_norm.h"
#include "worker.h"

namespace h2ot {
namespace H2OT_ISA {
namespace {

// The arrays of one call. T: of x and sum; Y: of y; N: of out.
template <class T, class Y, class N>
struct Arrays {
  typedef Accumulator<T> E;
  const AddNormArgs& a;
  const E *weight, *bias;  // whole vectors

  const T* x(int64_t row) const { return static_cast<const T*>(a.x) + row * a.x_stride; }
  const Y* y(int64_t row) const { return a.y ? static_cast<const Y*>(a.y) + row * a.y_stride : nullptr; }
  T* sum(int64_t row) const { return a.y ? static_cast<T*>(a.sum) + row * a.C : nullptr; }
  N* out(int64_t row) const { return static_cast<N*>(a.out) + row * a.C; }

  template <int R>
  __attribute__((always_inline)) void run(int64_t first) const {
    const T* rows[R];
    E mean[R];
    for (int r = 0; r < R; r++) {
      mean[r] = add_row(x(first + r), y(first + r), a.C, sum(first + r)) / E(a.C);
      rows[r] = a.y ? sum(first + r) : x(first + r);
    }
    norm_rows<R>(rows, mean, a.C, a.eps, weight, bias, out(first));
  }

  // A row of less than a vector.
  __attribute__((always_inline)) void run_short(int64_t row) const {
    const int C = int(a.C);
    Vector<T> value = load_part(x(row), C);
    if (a.y) {
      store_part(sum(row), value + load_part(y(row), C), C);
      value = load_part(sum(row), C);
    }
    const E mean = sum_lanes<T>(value) / E(C);
    const Vector<T> deviation = between<T>(value - mean, 0, C);
    const Moments<E> m = moments_of(mean, sum_lanes<T>(deviation), sum_lanes<T>(deviation * deviation), C, a.eps);
    const Vector<T> normed = (value - m.mean) * m.scale + m.shift;
    store_part(out(row), normed * load(weight) + load(bias), C);
  }
};

template <class T, class Y, class N>
Status run(const AddNormArgs& a, const Parallel& pool) {
  typedef Accumulator<T> E;
  const int64_t C = a.C, width = rounded_up(C, kLanes<T>);
  E* const weight = static_cast<E*>(scratch(Slot::shared, 2 * width * int64_t(sizeof(E))));
  if (!weight) return Status::out_of_memory;
  widen_all(a.weight, a.weight_dtype, E(1), C, width, weight);
  widen_all(a.bias, a.weight_dtype, E(0), C, width, weight + width);
  const Arrays<T, Y, N> arrays = {a, weight, weight + width};
  parallel_for(pool, a.rows, 1 + 65536 / (C + 1), [&](int64_t begin, int64_t end) {
    int64_t row = begin;
    if (C < kLanes<T>) {
      for (; row < end; row++) arrays.run_short(row);
    }
    for (; row + kNormRows <= end; row += kNormRows) arrays.template run<kNormRows>(row);
    for (; row < end; row++) arrays.template run<1>(row);
  });
  return Status::ok;
}

template <class Y>
Status run_float(const AddNormArgs& a, const Parallel& pool) {
  if (a.out_dtype == Dtype::bf16) return run<float, Y, BFloat16>(a, pool);
  if (a.out_dtype == Dtype::f16) return run<float, Y, Half>(a, pool);
  return run<float, Y, float>(a, pool);
}

}  // namespace

Status add_norm(const AddNormArgs& a, const Parallel& pool) {
  if (a.dtype == Dtype::f64) return run<double, double, double>(a, pool);
  if (a.dtype == Dtype::bf16) return run<BFloat16, BFloat16, BFloat16>(a, pool);
  if (a.dtype == Dtype::f16) return run<Half, Half, Half>(a, pool);
  if (a.y && a.y_dtype == Dtype::bf16) return run_float<BFloat16>(a, pool);
  if (a.y && a.y_dtype == Dtype::f16) return run_float<Half>(a, pool);
  return run_float<float>(a, pool);
}

}  // namespace H2OT_ISA
}  // namespace h2ot
