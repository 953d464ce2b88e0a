// The walks along rows: a SIMD register holds one class of N rows, and the loop goes over the classes. This needs no
// reduction across lanes. It serves few classes, and classes that are not adjacent in memory.
//     stats_along_rows       forward: 1. the maximum of each row. 2. The sums of its exponentials and class weights.
//     gradient_along_rows    backward: the gradient of each row.
#pragma once

#include "tile.h"

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {
namespace {

// Rows [j, j + N) of a tile, one class at a time.
template <class L, class S, int kForm>
struct ClassOfRows {
  using T = typename L::Scalar;
  using V = typename L::V;
  using I = typename L::I;
  const TileInput<L, S, kForm>& in;
  int j;
  I label;

  ABSGD_FN ClassOfRows(const TileInput<L, S, kForm>& input, const Tile<L>& t, int first) : in(input), j(first) {
    __builtin_memcpy(&label, t.label + j, sizeof(label));
  }
  ABSGD_FN I is_label(int64_t c) const { return label == L::set_int(typename L::Int(c)); }
  ABSGD_FN V adjusted(V x, int64_t c) const {
    return in.kAdjusted ? L::set(in.adjust.s[c]) * x + L::set(in.adjust.d[c]) : x;
  }
  ABSGD_FN V logit(int64_t c) const { return adjusted(load_rows<L>(in.rows, j, c), c); }
  // The logit of class c. In an adjusted row -inf takes the place of the label, whose margin makes its logit another.
  ABSGD_FN V logit_but_label(int64_t c) const {
    return in.kAdjusted ? L::select(is_label(c), L::set(T(-__builtin_inf())), logit(c)) : logit(c);
  }
  // The weight of class c in each of the rows (launch.h ClassWeights).
  ABSGD_FN V weight(const RowPointers<const T>& soft, int64_t c) const {
    const T v = in.weights.v == nullptr ? T(1) : in.weights.v[c];
    if (soft.row[0] == nullptr) return L::set(v);
    return (load_rows<L>(soft, j, c) * L::set(in.weights.keep) + L::set(in.weights.uniform)) * L::set(v);
  }
};

// The soft targets of a tile's rows.
template <class L, class S, int kForm>
ABSGD_FN RowPointers<const typename L::Scalar> soft_rows(const TileInput<L, S, kForm>& in) {
  const LogitArgs& a = in.a;
  if (a.soft == nullptr) return {};
  return row_pointers(static_cast<const typename L::Scalar*>(a.soft), a, a.classes * a.inner, a.inner, 1, in.first);
}
// The memory where the exponentials of a tile are kept, or null.
template <class L, class S, int kForm>
ABSGD_FN typename L::Scalar* kept_tile(const TileInput<L, S, kForm>& in) {
  if (in.a.kept == nullptr) return nullptr;
  return static_cast<typename L::Scalar*>(in.a.kept) + in.tile * in.a.classes * kTileRows;
}

template <class L, class S, int kForm>
ABSGD_FN void max_along_rows(const ClassOfRows<L, S, kForm>& rows, Tile<L>& t) {
  const int j = rows.j;
  typename L::V max = rows.logit_but_label(0);
  for (int64_t c = 1; c < rows.in.a.classes; ++c) max = L::max(max, rows.logit_but_label(c));
  L::store(t.max + j, max);
  for (int i = j; i < j + L::N; ++i) t.max[i] = rows.in.whole_max(t.max[i], t, i);
}

template <class L, class S, int kForm>
ABSGD_FN void sums_along_rows(const ClassOfRows<L, S, kForm>& rows, const RowPointers<const typename L::Scalar>& soft,
                              bool all_weigh, Tile<L>& t) {
  using V = typename L::V;
  const auto& in = rows.in;
  const int j = rows.j;
  const V max = L::load(t.max + j);
  V sumexp_others = L::set(0), weighted_logits = sumexp_others, weight_total = sumexp_others;
  typename L::Scalar* const kept = kept_tile(in);
  for (int64_t c = 0; c < in.a.classes; ++c) {
    const V shifted = rows.logit(c) - max, e = L::exp_below(shifted);
    sumexp_others += L::select(rows.is_label(c), L::set(0), e);
    if (kept != nullptr) L::store(kept + c * kTileRows + j, e);
    if (!all_weigh) continue;
    const V w = rows.weight(soft, c);
    const V own = in.kAdjusted ? shifted - L::select(rows.is_label(c), L::load(t.margin + j), L::set(0)) : shifted;
    weighted_logits += L::select(w == L::set(0), L::set(0), w * own);
    weight_total += w;
  }
  L::store(t.sumexp_others + j, sumexp_others);
  L::store(t.weighted_logits + j, weighted_logits);
  L::store(t.weight_total + j, weight_total);
}

template <class L, class S, int kForm>
ABSGD_FN void stats_along_rows(const TileInput<L, S, kForm>& in, bool all_weigh, Tile<L>& t) {
  const auto soft = soft_rows(in);
  for (int j = 0; j < in.count; j += L::N) {
    const ClassOfRows<L, S, kForm> rows(in, t, j);
    max_along_rows(rows, t);
    sums_along_rows(rows, soft, all_weigh, t);
  }
}

template <class L, class S, int kForm, class G>
ABSGD_FN void gradient_along_rows(const TileInput<L, S, kForm>& in, bool all_weigh, const Tile<L>& t,
                                  const GradientTile<typename L::Scalar>& numbers, const RowPointers<G>& grads) {
  using V = typename L::V;
  const auto soft = soft_rows(in);
  for (int j = 0; j < in.count; j += L::N) {
    const ClassOfRows<L, S, kForm> rows(in, t, j);
    const typename L::I valid = L::load_flags(in.a.valid + in.first + j);
    const V max = L::load(numbers.max + j), scale = L::load(numbers.scale + j);
    const V at_label = L::load(numbers.at_label + j), smoothing_coef = L::load(numbers.smoothing_coef + j);
    const typename L::Scalar* const kept = kept_tile(in);
    for (int64_t c = 0; c < in.a.classes; ++c) {
      V x = kept != nullptr ? L::load(kept + c * kTileRows + j) : load_rows<L>(in.rows, j, c);
      if (in.kAdjusted && kept == nullptr) x = rows.adjusted(x, c);
      const V e = kept != nullptr ? x : L::exp_below(x - max);
      V g = L::select(rows.is_label(c), at_label, e * scale);
      if (all_weigh) g -= smoothing_coef * rows.weight(soft, c);
      if (in.kAdjusted) g *= L::set(in.adjust.s[c]);
      store_rows<L>(grads, j, c, L::select(valid, g, L::set(0)), in.count - j);
    }
  }
}

}  // namespace
}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
