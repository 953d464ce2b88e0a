// The walks along classes: a SIMD register holds N adjacent classes of one row. They serve rows of many adjacent
// classes (LogitArgs::along_classes).
//     stats_along_classes       forward: 1. the maximum of each row. 2. The sums of its exponentials and class weights.
//     gradient_along_classes    backward: the gradient of each row.
#pragma once

#include "tile.h"

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {
namespace {

constexpr int64_t kCachedClasses = 2048;  // a tile of so many classes stays in the second-level cache

// One row of classes (classes >= N). The last register overlaps its neighbour; fresh() marks its new lanes. kForm
// (AdjustForm) says how the class vectors of Adjust act on the logits. An S that is the same for all classes (S_0) and
// D = 0 cost no loads. At 2048 x 32000, forward and backward, in times of cross-entropy: LDAM 1.44 -> 1.02,
// LogitAdjusted 1.46 -> 1.18, CDT 1.44 -> 1.16, VS 1.44 -> 1.35. The remaining cost is that three passes read S and D
// from the second-level cache. Two attempts gained nothing: to keep the a_k of a row for the second pass (1.38), and to
// make the third pass over 1024 classes of 16 rows at a time (1.42).
template <class L, class S, int kForm>
struct RowOfClasses {
  using T = typename L::Scalar;
  using V = typename L::V;
  using I = typename L::I;
  const S* x;
  int64_t classes;
  Adjust<T> adjust;
  const T* soft;  // of this row; or null
  int64_t whole() const { return classes / L::N; }
  int64_t tail() const { return classes - L::N; }
  bool has_tail() const { return classes % L::N != 0; }
  I index(int64_t first) const { return L::iota() + L::set_int(typename L::Int(first)); }
  I fresh() const { return index(tail()) >= L::set_int(typename L::Int(whole() * L::N)); }
  ABSGD_FN V logit(int64_t first) const {
    V a = L::load(x + first);
    if constexpr (kForm != 0) a *= kForm & kScales ? L::load(adjust.s + first) : L::set(adjust.s[0]);
    if constexpr ((kForm & kShifts) != 0) a += L::load(adjust.d + first);
    return a;
  }
  // The weights of the classes of a register (launch.h ClassWeights).
  ABSGD_FN V weight(const ClassWeights<T>& weights, int64_t first) const {
    const V v = weights.v == nullptr ? L::set(1) : L::load(weights.v + first);
    return soft == nullptr ? v : (L::load(soft + first) * L::set(weights.keep) + L::set(weights.uniform)) * v;
  }

  // The largest logit of the row. In an adjusted row the label is left out, because its margin makes its logit another.
  // Only the registers that hold the label compare indices.
  T max(int64_t label) const {
    V m[4];
    for (V& each : m) each = L::set(T(-__builtin_inf()));
    auto among = [&](int64_t k, int64_t end) {
      for (; k + 4 <= end; k += 4)
        for (int u = 0; u < 4; ++u) m[u] = L::max(m[u], logit((k + u) * L::N));
      for (; k < end; ++k) m[0] = L::max(m[0], logit(k * L::N));
    };
    if constexpr (kForm == 0) {
      among(0, whole());
      if (has_tail()) m[1] = L::max(m[1], logit(tail()));
    } else {
      const int64_t own = label < 0 ? whole() : label / L::N;
      auto but_label = [&](int64_t first) {
        const V a = logit(first);
        m[1] =
            L::max(m[1], L::select(index(first) == L::set_int(typename L::Int(label)), L::set(T(-__builtin_inf())), a));
      };
      among(0, smaller(own, whole()));
      among(own + 1, whole());
      if (own < whole()) but_label(own * L::N);
      if (has_tail()) but_label(tail());
    }
    return L::highest(L::max(L::max(m[0], m[1]), L::max(m[2], m[3])));
  }

  struct Sums {
    T sumexp_others;
    T weighted_logits, weight_total;  // a class of weight 0 takes no part, even if its logit is infinite
  };
  // The sums of a row. Only the chunk of registers that holds the label compares indices. No branch depends on the
  // label's place within the chunk, because it would be mispredicted. With Keep, the exponentials are stored in `kept`.
  template <bool Keep, OtherClasses kOthers>
  Sums sums(T max, int64_t label, T margin, const ClassWeights<T>& weights, T* kept) const {
    const V m = L::set(max);
    const I own = L::set_int(typename L::Int(label));
    V sum[4] = {}, weighted[2] = {}, total = {};
    auto exponential = [&](int64_t first, int u, I which) {
      const V shifted = logit(first) - m, e = L::exp_below(shifted);
      if constexpr (Keep) L::store(kept + first, e);
      if constexpr (kOthers == OtherClasses::equal) weighted[u & 1] += L::select(which, shifted, L::set(0));
      if constexpr (kOthers == OtherClasses::weighted) {
        const V w = L::select(which, weight(weights, first), L::set(0));
        weighted[u & 1] += L::select(w == L::set(0), L::set(0), w * shifted);
        total += w;
      }
      return e;
    };
    auto add = [&](int u, int64_t k, bool compare) {
      const V e = exponential(k * L::N, u, L::set_int(-1));
      sum[u] += compare ? L::select(index(k * L::N) == own, L::set(0), e) : e;
    };
    for (int64_t begin = 0; begin < whole(); begin += kChunk) {
      const int64_t end = smaller(begin + kChunk, whole());
      const bool here = label >= begin * L::N && label < end * L::N;
      int64_t k = begin;
      if (here) {
        for (; k + 2 <= end; k += 2) add(0, k, true), add(1, k + 1, true);
      } else {
        for (; k + 4 <= end; k += 4)
          for (int u = 0; u < 4; ++u) add(u, k + u, false);
      }
      for (; k < end; ++k) add(2, k, true);
    }
    if (has_tail()) {
      const V e = exponential(tail(), 1, fresh());
      sum[3] += L::select(fresh() & (index(tail()) != own), e, L::set(0));
    }
    Sums out{L::sum((sum[0] + sum[1]) + (sum[2] + sum[3])), L::sum(weighted[0] + weighted[1]), L::sum(total)};
    if constexpr (kOthers == OtherClasses::equal) out.weight_total = T(classes);
    if constexpr (kOthers != OtherClasses::none && kForm != 0) {
      const T w = label < 0 ? T(0) : weights.v == nullptr ? T(1) : weights.v[label];
      if (w != 0) out.weighted_logits -= w * margin;
    }
    return out;
  }
  static constexpr int64_t kChunk = 32;  // registers

  // Writes grad_k = S_k (exp(a_k - max) scale - smoothing_coef weight_k), and at the label
  // S_y (at_label - smoothing_coef weight_y). With Kept, the exponentials already stand in grad.
  template <bool Kept, OtherClasses kOthers, class G>
  void gradient(G* grad, GradientNumbers<T> n, const ClassWeights<T>& weights, int64_t label) const {
    if constexpr (kForm != 0 && (kForm & kScales) == 0) {  // All classes have the same S, S_0.
      n.scale *= adjust.s[0];
      n.smoothing_coef *= adjust.s[0];
      n.at_label *= adjust.s[0];
    }
    const V m = L::set(n.max), s = L::set(n.scale);
    auto value = [&](int64_t first) {
      V g = (Kept ? L::load(grad + first) : L::exp_below(logit(first) - m)) * s;
      if constexpr (kOthers == OtherClasses::equal) g -= L::set(n.smoothing_coef);
      if constexpr (kOthers == OtherClasses::weighted) g -= weight(weights, first) * L::set(n.smoothing_coef);
      if constexpr ((kForm & kScales) != 0) g *= L::load(adjust.s + first);
      return g;
    };
    const V last = value(tail());  // It is read before its neighbour is overwritten.
    for (int64_t k = 0; k < whole(); ++k) L::store(grad + k * L::N, value(k * L::N));
    L::store(grad + tail(), last);
    if (label < 0) return;
    T own = n.at_label;
    if constexpr (kOthers != OtherClasses::none)
      own = n.at_label - n.smoothing_coef * (weights.v == nullptr ? T(1) : weights.v[label]);
    if constexpr ((kForm & kScales) != 0) own *= adjust.s[label];
    G out[L::N];
    L::store(out, L::set(own));
    grad[label] = out[0];
  }
};

// Row j of the tile.
template <class L, class S, int kForm>
ABSGD_FN RowOfClasses<L, S, kForm> row_of_classes(const TileInput<L, S, kForm>& in, int j) {
  using T = typename L::Scalar;
  const LogitArgs& a = in.a;
  const int64_t i = in.first + j;
  const T* const soft =
      a.soft == nullptr ? nullptr : static_cast<const T*>(a.soft) + i / a.inner * a.classes * a.inner + i % a.inner;
  return {in.rows.row[j], a.classes, in.adjust, soft};
}

template <class L, class S, int kForm>
ABSGD_FN void sums_of_row(const TileInput<L, S, kForm>& in, Tile<L>& t, int j) {
  using T = typename L::Scalar;
  T* const kept = in.a.keep ? static_cast<T*>(in.a.grad) + (in.first + j) * in.a.classes : nullptr;
  for_other_classes(in.a, [&](auto others) {
    constexpr OtherClasses kOthers = decltype(others)::value;
    const auto row = row_of_classes(in, j);
    const auto sums = kept ? row.template sums<true, kOthers>(t.max[j], t.label[j], t.margin[j], in.weights, kept)
                           : row.template sums<false, kOthers>(t.max[j], t.label[j], t.margin[j], in.weights, kept);
    t.sumexp_others[j] = sums.sumexp_others;
    t.weighted_logits[j] = sums.weighted_logits;
    t.weight_total[j] = sums.weight_total;
  });
}

// All maxima of a tile come first, then all sums. So no sum waits for its own maximum (128 x 100: 4.4 -> 3.7 us). If
// the rows of a tile do not fit the cache together, each row is finished before the next.
template <class L, class S, int kForm>
ABSGD_FN void stats_along_classes(const TileInput<L, S, kForm>& in, Tile<L>& t) {
  const int step = in.a.classes <= kCachedClasses ? int(kTileRows) : 1;
  for (int begin = 0; begin < in.count; begin += step) {
    const int end = int(smaller(begin + step, in.count));
    for (int j = begin; j < end; ++j)
      if (t.valid[j]) t.max[j] = in.whole_max(row_of_classes(in, j).max(t.label[j]), t, j);
    for (int j = begin; j < end; ++j)
      if (t.valid[j]) sums_of_row(in, t, j);
  }
}

template <class L, class S, int kForm, class G>
ABSGD_FN void gradient_along_classes(const TileInput<L, S, kForm>& in, const Tile<L>& t,
                                     const GradientTile<typename L::Scalar>& numbers, const RowPointers<G>& grads) {
  for (int j = 0; j < in.count; ++j) {
    if (!in.a.valid[in.first + j]) {
      __builtin_memset(grads.row[j], 0, size_t(in.a.classes) * sizeof(G));
      continue;
    }
    const auto row = row_of_classes(in, j);
    for_other_classes(in.a, [&](auto others) {
      constexpr OtherClasses kOthers = decltype(others)::value;
      if (in.a.keep)
        row.template gradient<true, kOthers>(grads.row[j], numbers.row(j), in.weights, t.label[j]);
      else
        row.template gradient<false, kOthers>(grads.row[j], numbers.row(j), in.weights, t.label[j]);
    });
  }
}

}  // namespace
}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
