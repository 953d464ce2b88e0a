// The kernel of the weighted step (MATH §3.4): the weighted mean of per-sample gradients, and one step of momentum SGD
// with it. For each part of a tensor it takes kMeanBytes of columns at a time:
//     1. It adds up factor_r row_r of these columns over all rows, kRows rows at a time, in the first-level cache.
//     2. It steps the parameters of these columns with that mean. The mean itself is never written to memory.
// This file is compiled once for each instruction set.
#include "update.h"

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {
namespace {

// The mean is made for kMeanBytes of columns at a time, from kRows rows at once. Measured on one core at 64 x 10^6 fp32
// (256 MB), in units of the bandwidth of torch's copy_: 8 rows 1.02, 4 rows 0.90, 2 rows 0.71, 1 row 0.51; 16 KB 0.99,
// 8 KB 0.86, 64 KB as 32 KB. Accumulators in registers (16 x 64 bytes of a row before the next row) reach 0.57, because
// every visit of a row then touches another page. Software prefetch costs 5 to 15 %.
constexpr int kMeanBytes = 32768, kRows = 8;

// mean += sum of factor_k row_k over K rows, for columns [i, end) as far as whole registers of L go. Returns the column
// where it stopped.
template <class L, int K, class S>
int64_t add_columns(typename L::Scalar* mean, const S* const* rows, const typename L::Scalar* factors, int64_t i,
                    int64_t end) {
  typename L::V factor[K];
  for (int k = 0; k < K; ++k) factor[k] = L::set(factors[k]);
  for (; i + L::N <= end; i += L::N) {
    typename L::V sum = L::load(mean + i);
    for (int k = 0; k < K; ++k) sum += factor[k] * L::load(rows[k] + i);
    L::store(mean + i, sum);
  }
  return i;
}
template <int K, class S, class T>
void add_rows(T* mean, const S* const* rows, const T* factors, int64_t count) {
  int64_t i = add_columns<Lanes<T>, K>(mean, rows, factors, 0, count);
  i = add_columns<Lanes<T, 16>, K>(mean, rows, factors, i, count);
  add_columns<Lanes<T, sizeof(T)>, K>(mean, rows, factors, i, count);
}

// mean = sum of factor_r row_r over all rows, for `count` columns from `column` on. Rows are added in their order, so
// the bits do not depend on the number of threads.
template <class S, class T>
void weighted_mean(const WeightedTable& a, const StepTensor& t, int64_t stride, int64_t column, T* mean,
                   int64_t count) {
  const S* const block = static_cast<const S*>(t.grad) + column;
  const T* const factors = static_cast<const T*>(a.factors);
  __builtin_memset(mean, 0, size_t(count) * sizeof(T));
  const S* rows[kRows];
  for (int64_t r = 0; r < a.rows;) {
    const int together = a.rows - r >= kRows ? kRows : a.rows - r >= 4 ? 4 : 1;
    for (int k = 0; k < together; ++k) rows[k] = block + a.row[r + k] * stride;
    if (together == kRows)
      add_rows<kRows>(mean, rows, factors + r, count);
    else if (together == 4)
      add_rows<4>(mean, rows, factors + r, count);
    else
      add_rows<1>(mean, rows, factors + r, count);
    r += together;
  }
}

}  // namespace

void weighted_step(const WeightedTable& table, int64_t begin, int64_t end) {
  for_parts(table, begin, end, [&](const StepTensor& t, int64_t j, int64_t from, int64_t to) {
    const StepGroup& group = table.groups[t.group];
    const auto choose = [&](auto lanes, const auto& f) {
      using L = typename decltype(lanes)::type;
      for_sgd<L, typename L::Scalar>(group, group.lr, {1, 1}, f);
    };
    for_storage(t.dtype, [&](auto stored, auto real) {
      using S = typename decltype(stored)::type;
      using T = typename decltype(real)::type;
      constexpr int64_t kColumns = kMeanBytes / sizeof(T);
      alignas(64) T mean[kColumns];
      for (int64_t i = from; i < to; i += kColumns) {
        const int64_t stop = to - i < kColumns ? to : i + kColumns;
        weighted_mean<S>(table, t, table.row_stride[j], i, mean, stop - i);
        update_tensor<S, T>(choose, t, Gradients<T>{mean, i}, i, stop);
      }
    });
  });
}

}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
