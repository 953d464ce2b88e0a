// Reads and writes one class of N rows at once: lane j of a register holds row j.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {
namespace {

template <int... J>
struct Indices {};
template <int N, int... J>
struct MakeIndices : MakeIndices<N - 1, N - 1, J...> {};
template <int... J>
struct MakeIndices<0, J...> {
  using type = Indices<J...>;
};

template <class L>
ABSGD_FN typename L::Scalar to_real(typename L::Scalar x) {
  return x;
}
template <class L>
ABSGD_FN float to_real(bf16 x) {
  return bits_as<float>(uint32_t(x.bits) << 16);
}
template <class L>
ABSGD_FN float to_real(f16 x) {
  f16 many[L::N] = {x};
  return L::load(many)[0];
}

// The first class of each row of a tile, and the distance between classes.
template <class S>
struct RowPointers {
  S* row[kTileRows];
  int64_t stride_class;
  bool adjacent;  // row[j] == row[0] + j, so one vector load takes the place of a gather

  ABSGD_FN S* at(int j, int64_t c) const { return row[j] + c * stride_class; }
};

template <class S>
RowPointers<S> row_pointers(S* base, const LogitArgs& a, int64_t stride_batch, int64_t stride_class,
                            int64_t stride_inner, int64_t first) {
  RowPointers<S> out;
  out.stride_class = stride_class;
  const int64_t last = a.rows() - 1;
  // The place of row `first`. One division serves the tile, because a division takes as long as four exponentials.
  const int64_t batch = a.inner == 1 ? first : first / a.inner;
  int64_t i = first - batch * a.inner;
  S* row = base + batch * stride_batch + i * stride_inner;
  out.adjacent = true;
  for (int j = 0; j < kTileRows; ++j) {
    out.row[j] = row;
    if (row != out.row[0] + j) out.adjacent = false;
    if (first + j >= last) continue;  // Rows past the end repeat the last row.
    row += stride_inner;
    if (++i == a.inner) row += stride_batch - a.inner * stride_inner, i = 0;
  }
  return out;
}

template <class L, class S, int... J>
ABSGD_FN typename L::V gather(const RowPointers<const S>& rows, int first, int64_t c, Indices<J...>) {
  return typename L::V{to_real<L>(*rows.at(first + J, c))...};
}
template <class L, class S>
ABSGD_FN typename L::V load_rows(const RowPointers<const S>& rows, int first, int64_t c) {
  if (rows.adjacent) return L::load(rows.at(first, c));
  return gather<L>(rows, first, c, typename MakeIndices<L::N>::type{});
}
template <class L, class S>
ABSGD_FN void store_rows(const RowPointers<S>& rows, int first, int64_t c, typename L::V x, int count) {
  if (rows.adjacent && count >= L::N) return L::store(rows.at(first, c), x);
  S out[L::N];
  L::store(out, x);
  for (int j = 0; j < smaller(count, L::N); ++j) *rows.at(first + j, c) = out[j];
}

}  // namespace
}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
