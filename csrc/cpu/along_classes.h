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

// One row of classes (classes >= 2 N). kForm (AdjustForm) says how the class vectors of Adjust act on the logits. An S
// that is the same for all classes (S_0) and D = 0 cost no loads. Three passes read S and D, and two attempts to read
// them less often gained nothing: to keep the a_k of a row for the second pass, and to make the third pass over 1024
// classes of 16 rows at a time (VS at 2048 x 32000 in times of cross-entropy: 1.35 before, 1.38 and 1.42).
//
// The loops go over groups of four registers, so that four exponentials are under way together. The rest of a row is
// another group or a pair of registers, which overlaps its neighbour. A row without a group is two pairs. Only the
// group that holds the label and the rest look for the label. So no loop has a length that depends on the label, and no
// branch is mispredicted for it.
template <class L, class S, int kForm>
struct RowOfClasses {
  using T = typename L::Scalar;
  using V = typename L::V;
  using I = typename L::I;
  static constexpr int kPair = 2 * L::N, kGroup = 4 * L::N;  // classes
  // Whether the registers of a pair hold even and odd classes (Lanes::load_even_odd). Class weights and soft targets
  // lie in their natural order.
  template <OtherClasses kOthers>
  static constexpr bool kEvenOdd = kSame<S, bf16> && kOthers != OtherClasses::weighted;

  const S* x;
  int64_t classes;
  Adjust<T> adjust, paired;  // the class vectors in their natural order, and in that of PairedVectors
  const T* soft;             // of this row; or null

  // The class vectors of the registers from class `first` on, where there are any.
  template <bool kMixed>
  ABSGD_FN Adjust<T> vectors(int64_t first) const {
    if constexpr ((kForm & (kScales | kShifts)) == 0) return adjust;
    if constexpr (!kMixed) return {adjust.s + first, adjust.d + first, nullptr};
    const int64_t at = PairedVectors<L>::place(first, classes);
    return {paired.s + at, paired.d + at, nullptr};
  }
  // The class of each lane of register u of a pair or group that begins at `first`.
  template <bool kMixed>
  static ABSGD_FN I index(int64_t first, int u) {
    if constexpr (kMixed)
      return L::iota() * 2 + L::set_int(typename L::Int(first + u / 2 * kPair + u % 2));
    else
      return L::iota() + L::set_int(typename L::Int(first + u * L::N));
  }
  // The adjusted logits of kCount registers (2 or 4).
  template <bool kMixed, int kCount>
  ABSGD_FN void logits(int64_t first, V* a) const {
    for (int u = 0; u < kCount; u += 2) {
      const S* const p = x + first + u * L::N;
      if constexpr (kMixed)
        L::load_even_odd(p, a + u);
      else
        a[u] = L::load(p), a[u + 1] = L::load(p + L::N);
    }
    [[maybe_unused]] const Adjust<T> of = vectors<kMixed>(first);
    for (int u = 0; u < kCount; ++u) {
      if constexpr (kForm != 0) a[u] *= kForm & kScales ? L::load(of.s + u * L::N) : L::set(adjust.s[0]);
      if constexpr ((kForm & kShifts) != 0) a[u] += L::load(of.d + u * L::N);
    }
  }
  // The weights of the classes of a register (launch.h ClassWeights).
  ABSGD_FN V weight(const ClassWeights<T>& weights, int64_t first) const {
    const V v = weights.v == nullptr ? L::set(1) : L::load(weights.v + first);
    return soft == nullptr ? v : (L::load(soft + first) * L::set(weights.keep) + L::set(weights.uniform)) * v;
  }

  // Calls group(first) for every group except that of the label, and then careful(first, Constant<int, registers>,
  // from) for the others. Lanes below class `from` have been seen before.
  template <class Group, class Careful>
  ABSGD_FN void walk(int64_t label, const Group& group, const Careful& careful) const {
    const int64_t groups = classes / kGroup, own = label < 0 ? groups : smaller(label / kGroup, groups);
    const int64_t others = own < groups ? groups - 1 : groups;
    for (int64_t g = 0; g < others; ++g) group((g + (g >= own)) * kGroup);
    if (own < groups) careful(own * kGroup, Constant<int, 4>{}, int64_t(0));
    int64_t first = groups * kGroup;
    if (groups > 0 && first + kPair < classes) return careful(classes - kGroup, Constant<int, 4>{}, first);
    if (first + kPair <= classes) careful(first, Constant<int, 2>{}, first), first += kPair;
    if (first < classes) careful(classes - kPair, Constant<int, 2>{}, first);
  }

  // The largest logits of the row, in each lane. In an adjusted row the label is left out, because its margin makes its
  // logit another.
  V max(int64_t label) const {
    constexpr bool kMixed = kEvenOdd<OtherClasses::none>;
    V m[4];
    for (V& each : m) each = L::set(T(-__builtin_inf()));
    const I own = L::set_int(typename L::Int(label));
    const RowOfClasses row = *this;
    row.walk(
        kForm == 0 ? -1 : label,
        [&](int64_t first) {
          V a[4];
          row.template logits<kMixed, 4>(first, a);
          for (int u = 0; u < 4; ++u) m[u] = L::max(m[u], a[u]);
        },
        [&](int64_t first, auto count, int64_t) {
          V a[decltype(count)::value];
          row.template logits<kMixed, decltype(count)::value>(first, a);
          for (int u = 0; u < decltype(count)::value; ++u) {
            if constexpr (kForm != 0)
              a[u] = L::select(index<kMixed>(first, u) == own, L::set(T(-__builtin_inf())), a[u]);
            m[u] = L::max(m[u], a[u]);
          }
        });
    return L::max(L::max(m[0], m[1]), L::max(m[2], m[3]));
  }

  // The sums of a row in each lane. A class of weight 0 takes no part in `weighted`, even if its logit is infinite.
  struct Sums {
    V sumexp_others, weighted, total;
  };
  // With Keep, the exponentials are stored in `kept`.
  template <bool Keep, OtherClasses kOthers>
  Sums sums(T max, int64_t label, const ClassWeights<T>& weights, T* kept) const {
    constexpr bool kMixed = kEvenOdd<kOthers>;
    const V m = L::set(max);
    const I own = L::set_int(typename L::Int(label));
    V sum[4] = {}, weighted[4] = {}, total[2] = {};
    const RowOfClasses row = *this;
    const ClassWeights<T> w = weights;
    // Adds the terms of the classes beside the label, where `shifted` are a_k - max.
    auto add_others = [&](int64_t first, int u, V shifted, auto among) {
      if constexpr (kOthers == OtherClasses::equal) weighted[u] += among(shifted);
      if constexpr (kOthers == OtherClasses::weighted) {
        const V each = among(row.weight(w, first + u * L::N));
        weighted[u] += L::select(each == L::set(0), L::set(0), each * shifted);
        total[u & 1] += each;
      }
    };
    row.walk(
        label,
        [&](int64_t first) {
          V a[4];
          row.template logits<kMixed, 4>(first, a);
          for (int u = 0; u < 4; ++u) a[u] -= m;
          for (int u = 0; u < 4; ++u) add_others(first, u, a[u], [](V term) { return term; });
          L::template exp_below_each<4>(a);
          for (int u = 0; u < 4; ++u) {
            if constexpr (Keep) L::store(kept + first + u * L::N, a[u]);
            sum[u] += a[u];
          }
        },
        [&](int64_t first, auto count, int64_t from) {
          constexpr int kCount = decltype(count)::value;
          V a[kCount];
          I fresh[kCount];
          row.template logits<kMixed, kCount>(first, a);
          for (int u = 0; u < kCount; ++u) {
            a[u] -= m;
            fresh[u] = index<kMixed>(first, u) >= L::set_int(typename L::Int(from));
            add_others(first, u, a[u], [&](V term) { return L::select(fresh[u], term, L::set(0)); });
          }
          L::template exp_below_each<kCount>(a);
          for (int u = 0; u < kCount; ++u) {
            if constexpr (Keep) L::store(kept + first + u * L::N, a[u]);
            sum[u] += L::select(fresh[u] & (index<kMixed>(first, u) != own), a[u], L::set(0));
          }
        });
    auto all = [](V* v) { return (v[0] + v[1]) + (v[2] + v[3]); };
    return {all(sum), all(weighted), total[0] + total[1]};
  }

  // Writes grad_k = S_k (exp(a_k - max) scale - smoothing_coef weight_k), and at the label
  // S_y (at_label - smoothing_coef weight_y). With Kept, the exponentials already stand in grad.
  template <bool Kept, OtherClasses kOthers, class G>
  void gradient(G* grad, GradientNumbers<T> n, const ClassWeights<T>& weights, int64_t label) const {
    constexpr bool kMixed = kEvenOdd<kOthers> && kSame<G, bf16>;
    if constexpr (kForm != 0 && (kForm & kScales) == 0) {  // All classes have the same S, S_0.
      n.scale *= adjust.s[0];
      n.smoothing_coef *= adjust.s[0];
      n.at_label *= adjust.s[0];
    }
    const V m = L::set(n.max), s = L::set(n.scale), c = L::set(n.smoothing_coef);
    const RowOfClasses row = *this;
    const ClassWeights<T> w = weights;
    auto values = [&](int64_t first, auto count, V* g) {
      constexpr int kCount = decltype(count)::value;
      if constexpr (Kept) {
        for (int u = 0; u < kCount; ++u) g[u] = L::load(grad + first + u * L::N);
      } else {
        row.template logits<kMixed, kCount>(first, g);
        for (int u = 0; u < kCount; ++u) g[u] -= m;
        L::template exp_below_each<kCount>(g);
      }
      for (int u = 0; u < kCount; ++u) {
        g[u] *= s;
        if constexpr (kOthers == OtherClasses::equal) g[u] -= c;
        if constexpr (kOthers == OtherClasses::weighted) g[u] -= row.weight(w, first + u * L::N) * c;
        if constexpr ((kForm & kScales) != 0) g[u] *= L::load(row.template vectors<kMixed>(first).s + u * L::N);
      }
    };
    auto store = [&](int64_t first, auto count, const V* g) {
      for (int u = 0; u < decltype(count)::value; u += 2) {
        G* const p = grad + first + u * L::N;
        if constexpr (kMixed)
          L::store_even_odd(p, g + u);
        else
          L::store(p, g[u]), L::store(p + L::N, g[u + 1]);
      }
    };
    const Constant<int, 4> four;
    const Constant<int, 2> two;
    G one[L::N];
    if (kMixed && !(n.scale == n.scale && n.smoothing_coef == n.smoothing_coef)) {
      // Every number of the row is NaN. It may be any NaN, and Lanes::store_even_odd does not take any.
      L::store(one, L::set(T(__builtin_nan(""))));
      for (int64_t k = 0; k < classes; ++k) grad[k] = one[0];
    } else {
      V last[2], g[4];
      values(classes - kPair, two, last);  // It is read before its neighbour is overwritten.
      int64_t first = 0;
      for (; first + kGroup <= classes; first += kGroup) values(first, four, g), store(first, four, g);
      if (first + kPair <= classes) values(first, two, g), store(first, two, g);
      store(classes - kPair, two, last);
    }
    if (label < 0) return;
    T own = n.at_label;
    if constexpr (kOthers != OtherClasses::none)
      own = n.at_label - n.smoothing_coef * (weights.v == nullptr ? T(1) : weights.v[label]);
    if constexpr ((kForm & kScales) != 0) own *= adjust.s[label];
    L::store(one, L::set(own));
    grad[label] = one[0];
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
  return {in.rows.row[j], a.classes, in.adjust, in.paired, soft};
}

// Calls f with LogitArgs::keep as a constant of the compiler. Only logits of the real type keep their exponentials.
template <class L, class S, int kForm, class F>
ABSGD_FN void for_keep(const TileInput<L, S, kForm>& in, F f) {
  if constexpr (kSame<S, typename L::Scalar>)
    if (in.a.keep) return f(Constant<bool, true>{});
  f(Constant<bool, false>{});
}

// The sums of rows [begin, end) of the tile.
template <class L, class S, int kForm>
ABSGD_FN void sums_of_rows(const TileInput<L, S, kForm>& in, Tile<L>& t, int begin, int end) {
  using T = typename L::Scalar;
  for_other_classes(in.a, [&](auto others) {
    constexpr OtherClasses kOthers = decltype(others)::value;
    typename RowOfClasses<L, S, kForm>::Sums found[kTileRows];
    for (int j = begin; j < end; ++j) {
      if (!t.valid[j]) continue;
      const auto row = row_of_classes(in, j);
      for_keep(in, [&](auto keep) {
        constexpr bool kKeep = decltype(keep)::value;
        T* const kept = kKeep ? static_cast<T*>(in.a.grad) + (in.first + j) * in.a.classes : nullptr;
        found[j] = row.template sums<kKeep, kOthers>(t.max[j], t.label[j], in.weights, kept);
      });
    }
    for (int j = begin; j < end; ++j) {
      if (!t.valid[j]) continue;
      t.sumexp_others[j] = L::sum(found[j].sumexp_others);
      if constexpr (kOthers == OtherClasses::none) continue;
      t.weighted_logits[j] = L::sum(found[j].weighted);
      t.weight_total[j] = kOthers == OtherClasses::equal ? T(in.a.classes) : L::sum(found[j].total);
      if (kForm == 0 || t.label[j] < 0) continue;
      const T w_label = in.weights.v == nullptr ? T(1) : in.weights.v[t.label[j]];
      if (w_label != 0) t.weighted_logits[j] -= w_label * t.margin[j];
    }
  });
}

// All maxima of a tile come first, then all sums (128 x 100: 4.4 -> 3.7 us), and each time the lanes of all rows are
// reduced in a loop of their own. So no row waits for its own chain of additions. If the rows of a tile do not fit the
// cache together, each row is finished before the next.
template <class L, class S, int kForm>
ABSGD_FN void stats_along_classes(const TileInput<L, S, kForm>& in, Tile<L>& t) {
  const int step = in.a.classes <= kCachedClasses ? int(kTileRows) : 1;
  typename L::V max[kTileRows];
  for (int begin = 0; begin < in.count; begin += step) {
    const int end = int(smaller(begin + step, in.count));
    for (int j = begin; j < end; ++j)
      if (t.valid[j]) max[j] = row_of_classes(in, j).max(t.label[j]);
    for (int j = begin; j < end; ++j)
      if (t.valid[j]) t.max[j] = in.whole_max(L::highest(max[j]), t, j);
    sums_of_rows(in, t, begin, end);
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
      for_keep(in, [&](auto keep) {
        row.template gradient<decltype(keep)::value, decltype(others)::value>(grads.row[j], numbers.row(j), in.weights,
                                                                              t.label[j]);
      });
    });
  }
}

}  // namespace
}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
