// The loops of the CPU backend: how rows, blocks and tensors are walked. The formulas are in math.h, the lanes in
// lanes.h. This file is compiled once per instruction set, each time into its own namespace (ABSGD_ISA_NAMESPACE).
#include "../launch.h"
#include "lanes.h"

#define ABSGD_STRING(x) #x
#define ABSGD_NAME(x) ABSGD_STRING(x)

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {

void step(const StepTable&, int64_t begin, int64_t end);                    // step.cpp
void weighted_step(const WeightedTable&, int64_t begin, int64_t end);       // weighted.cpp
void rule_weights(const RuleArgs&, LossRule, double first, double second);  // rules.cpp
bool group_weights(const GroupArgs&);                                       // rules.cpp

namespace {

template <class T, T v>
struct Constant {
  static constexpr T value = v;
};

ABSGD_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- reading and writing N rows at once: lane j holds row j --------------------------------------------------------

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

template <class S>
struct RowPointers {
  S* row[kTileRows];
  int64_t stride_class;
  bool adjacent;  // row[j] == row[0] + j: one vector load instead of a gather

  ABSGD_FN S* at(int j, int64_t c) const { return row[j] + c * stride_class; }
};

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

// ---- losses on logits ----------------------------------------------------------------------------------------------
//
// Two walks over a tile of rows give the same numbers per row. With many adjacent classes (LogitArgs::along_classes) a
// SIMD register holds classes of one row; with few classes, or classes that are not adjacent, it holds one class of N
// rows, which needs no reduction across lanes.
constexpr int64_t kCachedClasses = 2048;  // a tile of so many classes stays in the second-level cache

template <class L>
struct Tile {
  using T = typename L::Scalar;
  T max[kTileRows], own_logit[kTileRows], rest[kTileRows], others[kTileRows], total[kTileRows];
  typename L::Int label[kTileRows];
  bool valid[kTileRows];
};

template <class S>
RowPointers<S> row_pointers(S* base, const LogitArgs& a, int64_t stride_batch, int64_t stride_class,
                            int64_t stride_inner, int64_t first) {
  RowPointers<S> out;
  out.stride_class = stride_class;
  const int64_t last = a.rows() - 1;
  out.adjacent = true;
  for (int j = 0; j < kTileRows; ++j) {  // rows past the end repeat the last one
    const int64_t i = smaller(first + j, last);
    out.row[j] = base + (i / a.inner) * stride_batch + (i % a.inner) * stride_inner;
    if (out.row[j] != out.row[0] + j) out.adjacent = false;
  }
  return out;
}

// Rows [first, first + count) -> labels; returns the first bad one.
template <class L>
int64_t read_labels(const LogitArgs& a, int64_t first, int count, Tile<L>& t) {
  int64_t bad = kAllLabelsGood;
  for (int j = 0; j < kTileRows; ++j) {
    t.label[j] = 0;
    t.valid[j] = false;
    if (j >= count) continue;
    const int64_t i = first + j;
    if (a.soft != nullptr) {
      t.label[j] = -1;
      t.valid[j] = a.mask == nullptr || a.mask[i] != 0;
      continue;
    }
    const int64_t y =
        a.target_int64 ? static_cast<const int64_t*>(a.target)[i] : static_cast<const int32_t*>(a.target)[i];
    if (y == a.ignore_index) continue;
    if (y < 0 || y >= a.classes) {
      bad = smaller(bad, i);
      continue;
    }
    t.label[j] = typename L::Int(y);
    t.valid[j] = a.mask == nullptr || a.mask[i] != 0;
  }
  return bad;
}

// The class vectors of an adjusted row (math.h): a_k = S_k x_k + D_k, the label's less M_y.
template <class T>
struct Adjust {
  const T *s, *d, *m;

  static Adjust of(const LogitInput& a) {
    const T* s = static_cast<const T*>(a.adjust);
    return {s, s + a.classes, s + 2 * a.classes};
  }
};

// What the classes of a row weigh (ClassShares), as the loops are compiled for it.
enum class Shares { none, even /* label smoothing without class weights */, any };

// One row, classes along the lanes (classes >= N). The last register overlaps its neighbour; `fresh` marks its new
// lanes. kForm: the logits go through Adjust, of which one S (S_0) and D = 0 cost no loads (2048 x 32000, forward and
// backward over cross-entropy: LDAM 1.44 -> 1.02, LogitAdjusted 1.46 -> 1.18, CDT 1.44 -> 1.16, VS 1.44 -> 1.35. What
// is left is reading S and D from the second-level cache in three passes. Tried without gain: the a_k of a row kept for
// the second pass, 1.38; the third pass over 1024 classes of 16 rows at a time, 1.42.)
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

  // The largest logit; of an adjusted row the largest but the label's, whose own is another. Only the registers that
  // hold the label compare indices.
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
    T rest;         // sum over k != label of exp(a_k - max)
    T gaps, total;  // sum_k weight_k (a_k - max) and sum_k weight_k; a class without weight takes no part
  };
  // Only the chunk that holds the label compares indices; no branch depends on where in the chunk it is, because it
  // would be mispredicted. The exponentials go to `kept`.
  template <bool Keep, Shares kShares>
  Sums sums(T max, int64_t label, T margin, const ClassShares<T>& shares, T* kept) const {
    const V m = L::set(max);
    const I own = L::set_int(typename L::Int(label));
    V sum[4] = {}, gaps[2] = {}, total = {};
    auto exponential = [&](int64_t first, int u, I which) {
      const V gap = logit(first) - m, e = L::exp_below(gap);
      if constexpr (Keep) L::store(kept + first, e);
      if constexpr (kShares == Shares::even) gaps[u & 1] += L::select(which, gap, L::set(0));
      if constexpr (kShares == Shares::any) {
        const V w = L::select(which, share(shares, first), L::set(0));
        gaps[u & 1] += L::select(w == L::set(0), L::set(0), w * gap);
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
    Sums out{L::sum((sum[0] + sum[1]) + (sum[2] + sum[3])), L::sum(gaps[0] + gaps[1]), L::sum(total)};
    if constexpr (kShares == Shares::even) out.total = T(classes);
    if constexpr (kShares != Shares::none && kForm != 0) {
      const T weight = label < 0 ? T(0) : shares.v == nullptr ? T(1) : shares.v[label];
      if (weight != 0) out.gaps -= weight * margin;
    }
    return out;
  }
  static constexpr int64_t kChunk = 32;  // registers

  ABSGD_FN V share(const ClassShares<T>& shares, int64_t first) const {
    const V v = shares.v == nullptr ? L::set(1) : L::load(shares.v + first);
    return soft == nullptr ? v : (L::load(soft + first) * L::set(shares.keep) + L::set(shares.uniform)) * v;
  }

  // grad_k = S_k (exp(a_k - max) scale - spread weight_k), except at the label. Kept: the exponentials already stand in
  // grad.
  template <bool Kept, Shares kShares, class G>
  void gradient(G* grad, T max, T scale, T spread, const ClassShares<T>& shares, int64_t label, T at_label) const {
    if constexpr (kForm != 0 && (kForm & kScales) == 0) {  // S_0 is the row's
      scale *= adjust.s[0];
      spread *= adjust.s[0];
      at_label *= adjust.s[0];
    }
    const V m = L::set(max), s = L::set(scale);
    auto value = [&](int64_t first) {
      V g = (Kept ? L::load(grad + first) : L::exp_below(logit(first) - m)) * s;
      if constexpr (kShares == Shares::even) g -= L::set(spread);
      if constexpr (kShares == Shares::any) g -= share(shares, first) * L::set(spread);
      if constexpr ((kForm & kScales) != 0) g *= L::load(adjust.s + first);
      return g;
    };
    const V last = value(tail());  // read before its neighbour is overwritten
    for (int64_t k = 0; k < whole(); ++k) L::store(grad + k * L::N, value(k * L::N));
    L::store(grad + tail(), last);
    if (label < 0) return;
    T own = kShares == Shares::none ? at_label : at_label - spread * (shares.v == nullptr ? T(1) : shares.v[label]);
    if constexpr ((kForm & kScales) != 0) own *= adjust.s[label];
    G out[L::N];
    L::store(out, L::set(own));
    grad[label] = out[0];
  }
};

// f(a constant of type Shares): what the classes of these rows weigh
template <class F>
ABSGD_FN void for_shares(const LogitArgs& a, F f) {
  if (!a.spreads()) return f(Constant<Shares, Shares::none>{});
  if (a.soft == nullptr && a.class_weight == nullptr) return f(Constant<Shares, Shares::even>{});
  f(Constant<Shares, Shares::any>{});
}

// The soft targets of a tile's rows; share(): what class c weighs in each of N rows.
template <class T>
RowPointers<const T> soft_rows(const LogitArgs& a, int64_t first) {
  if (a.soft == nullptr) return {};
  return row_pointers(static_cast<const T*>(a.soft), a, a.classes * a.inner, a.inner, 1, first);
}
template <class L, class T>
ABSGD_FN typename L::V share(const ClassShares<T>& shares, const RowPointers<const T>& soft, int j, int64_t c) {
  const T v = shares.v == nullptr ? T(1) : shares.v[c];
  if (soft.row[0] == nullptr) return L::set(v);
  return (load_rows<L>(soft, j, c) * L::set(shares.keep) + L::set(shares.uniform)) * L::set(v);
}

// The tile's numbers -> losses, statistics and coefficients in the per-row arrays.
template <class L>
void finish_tile(const LogitArgs& a, int64_t first, Tile<L>& t) {
  using T = typename L::Scalar;
  using V = typename L::V;
  const T* v = static_cast<const T*>(a.class_weight);
  const bool soft = a.soft != nullptr, spreads = a.spreads();
  const T spread = ClassShares<T>::of(a).spread(soft);
  for (int j = 0; j < kTileRows; j += L::N) {
    T v_label[L::N];
    uint8_t valid[L::N];
    for (int i = 0; i < L::N; ++i) {
      v_label[i] = v == nullptr || a.classes == 0 || soft ? T(1) : v[t.label[j + i]];
      valid[i] = t.valid[j + i];
    }
    typename L::I keep = L::load_flags(valid);
    const V max = L::load(t.max + j), gap = soft ? L::set(0) : max - L::load(t.own_logit + j), w = L::load(v_label);
    const Row<L> row{gap, L::load(t.rest + j), soft ? L::set(0) : L::exp(-gap)};
    V loss, coefficient;
    if (soft) {
      loss = coefficient = L::set(0);
    } else {
      for_loss<L, T>(a.loss, [&](const auto& functor) {
        loss = functor.loss(row, w);
        coefficient = functor.coefficient(row, w);
      });
    }
    // sum_k weight_k (-log p_k) = log_total sum weight - sum_k weight_k (a_k - max)
    if (spreads) loss += L::set(spread) * (row.log_total() * L::load(t.total + j) - L::load(t.others + j));
    if (a.loss.least < __builtin_inf()) {  // pruned rows do not count
      keep = keep & ~(row.nll() >= L::set(T(a.loss.least)));
      for (int i = 0; i < L::N; ++i) valid[i] = keep[i] != 0;
    }
    for (int i = 0; i < L::N; ++i) a.valid[first + j + i] = valid[i];
    auto out = [&](void* array, V x) { L::store(static_cast<T*>(array) + first + j, x); };
    out(a.losses, L::select(keep, loss, L::set(0)));
    out(a.row_max, max);
    out(a.row_rest, row.rest);
    out(a.row_own, row.own);
    out(a.row_total, L::load(t.total + j));
    out(a.coefficient, L::select(keep, coefficient, L::set(0)));
  }
}

template <class T>
ABSGD_FN T* kept_tile(const LogitArgs& a, int64_t tile) {
  return a.kept == nullptr ? nullptr : static_cast<T*>(a.kept) + tile * a.classes * kTileRows;
}

// Where the logits of row i, and its soft targets, begin.
template <class T>
const T* soft_row(const LogitArgs& a, int64_t i) {
  return a.soft == nullptr ? nullptr : static_cast<const T*>(a.soft) + i / a.inner * a.classes * a.inner + i % a.inner;
}

template <class S, class T, int kForm>
int64_t logit_stats_typed(const LogitArgs& a, int64_t begin, int64_t end) {
  constexpr bool Adjusted = kForm != 0;
  using L = Lanes<T>;
  using V = typename L::V;
  const auto shares = ClassShares<T>::of(a);
  const auto adjust = Adjust<T>::of(a);
  const bool spreads = a.spreads(), many = a.along_classes();
  int64_t bad = kAllLabelsGood;
  Tile<L> t;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTileRows;
    const int count = int(smaller(kTileRows, a.rows() - first));
    bad = smaller(bad, read_labels<L>(a, first, count, t));
    const auto rows =
        row_pointers(static_cast<const S*>(a.logits), a, a.stride_batch, a.stride_class, a.stride_inner, first);
    T margin[kTileRows];
    for (int j = 0; j < kTileRows; ++j) {
      const int64_t y = t.label[j];
      margin[j] = Adjusted && y >= 0 && a.classes > 0 ? adjust.m[y] : T(0);
      t.own_logit[j] = a.classes > 0 && y >= 0 ? to_real<L>(*rows.at(j, y)) : T(0);
      if (Adjusted && y >= 0 && a.classes > 0) t.own_logit[j] = adjust.s[y] * t.own_logit[j] + adjust.d[y] - margin[j];
      t.max[j] = t.rest[j] = t.others[j] = t.total[j] = 0;
    }
    // of an adjusted row the maximum was taken without the label
    auto whole_max = [&](T max, int j) {
      return Adjusted && t.label[j] >= 0 && t.own_logit[j] > max ? t.own_logit[j] : max;
    };
    if (a.classes == 0) {
      // nothing to read: every row is ignored, or its label is out of range
    } else if (many) {
      // All maxima of a tile first, then all sums: no sum waits for its own maximum (128 x 100: 4.4 -> 3.7 us). Rows
      // that together leave the cache are finished one by one.
      auto row = [&](int j) {
        return RowOfClasses<L, S, kForm>{rows.row[j], a.classes, adjust, soft_row<T>(a, first + j)};
      };
      const int step = a.classes <= kCachedClasses ? int(kTileRows) : 1;
      for (int j = 0; j < count; j += step) {
        const int stop = int(smaller(j + step, count));
        for (int i = j; i < stop; ++i)
          if (t.valid[i]) t.max[i] = whole_max(row(i).max(t.label[i]), i);
        for (int i = j; i < stop; ++i) {
          if (!t.valid[i]) continue;
          T* kept = a.keep ? static_cast<T*>(a.grad) + (first + i) * a.classes : nullptr;
          for_shares(a, [&](auto kind) {
            constexpr Shares k = decltype(kind)::value;
            const auto r = row(i);
            const auto sums = kept ? r.template sums<true, k>(t.max[i], t.label[i], margin[i], shares, kept)
                                   : r.template sums<false, k>(t.max[i], t.label[i], margin[i], shares, kept);
            t.rest[i] = sums.rest;
            t.others[i] = sums.gaps;
            t.total[i] = sums.total;
          });
        }
      }
    } else {
      const auto soft = soft_rows<T>(a, first);
      for (int j = 0; j < count; j += L::N) {
        typename L::I label;
        __builtin_memcpy(&label, t.label + j, sizeof(label));
        auto is_label = [&](int64_t c) { return label == L::set_int(typename L::Int(c)); };
        auto logit = [&](int64_t c) {
          const V x = load_rows<L>(rows, j, c);
          return Adjusted ? L::set(adjust.s[c]) * x + L::set(adjust.d[c]) : x;
        };
        auto others = [&](int64_t c) {
          return Adjusted ? L::select(is_label(c), L::set(T(-__builtin_inf())), logit(c)) : logit(c);
        };
        V max = others(0);
        for (int64_t c = 1; c < a.classes; ++c) max = L::max(max, others(c));
        L::store(t.max + j, max);
        for (int i = j; i < j + L::N; ++i) t.max[i] = whole_max(t.max[i], i);
        max = L::load(t.max + j);
        V rest = L::set(0), gaps = rest, total = rest;
        T* kept = kept_tile<T>(a, tile);
        for (int64_t c = 0; c < a.classes; ++c) {
          const V gap = logit(c) - max, e = L::exp_below(gap);
          rest += L::select(is_label(c), L::set(0), e);
          if (kept != nullptr) L::store(kept + c * kTileRows + j, e);
          if (!spreads) continue;
          const V w = share<L>(shares, soft, j, c);
          const V own = Adjusted ? gap - L::select(is_label(c), L::load(margin + j), L::set(0)) : gap;
          gaps += L::select(w == L::set(0), L::set(0), w * own);
          total += w;
        }
        L::store(t.rest + j, rest);
        L::store(t.others + j, gaps);
        L::store(t.total + j, total);
      }
    }
    finish_tile<L>(a, first, t);
  }
  return bad;
}

// G: how the gradient is stored, S except for f16 (LogitArgs::grad)
template <class S, class T, class G, int kForm>
void logit_grads_typed(const LogitArgs& a, int64_t begin, int64_t end) {
  constexpr bool Adjusted = kForm != 0;
  using L = Lanes<T>;
  using V = typename L::V;
  const auto shares = ClassShares<T>::of(a);
  const auto adjust = Adjust<T>::of(a);
  const bool spreads = a.spreads(), many = a.along_classes();
  const T spread = spreads ? shares.spread(a.soft != nullptr) : T(0);
  const T* factor = static_cast<const T*>(a.factor);
  Tile<L> t;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTileRows;
    const int count = int(smaller(kTileRows, a.rows() - first));
    read_labels<L>(a, first, count, t);
    const auto rows =
        row_pointers(static_cast<const S*>(a.logits), a, a.stride_batch, a.stride_class, a.stride_inner, first);
    const auto grads = row_pointers(static_cast<G*>(a.grad), a, a.classes * a.inner, a.inner, 1, first);
    // per row: exp(a - max) * scale - s weight_k off the label, at_label - s v_y on it
    T scale[kTileRows], s[kTileRows], at_label[kTileRows], max[kTileRows];
    for (int j = 0; j < kTileRows; j += L::N) {
      auto in = [&](const void* array) { return L::load(static_cast<const T*>(array) + first + j); };
      T u[L::N];
      for (int i = 0; i < L::N; ++i) u[i] = j + i >= count ? T(0) : factor == nullptr ? T(1) : factor[first + j + i];
      const Row<L> row{L::set(0), in(a.row_rest), in(a.row_own)};
      const V u_v = L::load(u);
      const auto g = RowGradient<L>::of(row, in(a.coefficient) * u_v, u_v * L::set(spread), in(a.row_total));
      L::store(max + j, in(a.row_max));
      L::store(s + j, g.spread);
      L::store(scale + j, g.scale);
      L::store(at_label + j, g.at_label);
    }
    if (many) {
      for (int j = 0; j < count; ++j) {
        if (!a.valid[first + j]) {
          __builtin_memset(grads.row[j], 0, size_t(a.classes) * sizeof(G));
          continue;
        }
        const RowOfClasses<L, S, kForm> row{rows.row[j], a.classes, adjust, soft_row<T>(a, first + j)};
        for_shares(a, [&](auto kind) {
          constexpr Shares k = decltype(kind)::value;
          if (a.keep)
            row.template gradient<true, k>(grads.row[j], max[j], scale[j], s[j], shares, t.label[j], at_label[j]);
          else
            row.template gradient<false, k>(grads.row[j], max[j], scale[j], s[j], shares, t.label[j], at_label[j]);
        });
      }
    } else {
      const auto soft = soft_rows<T>(a, first);
      for (int j = 0; j < count; j += L::N) {
        const typename L::I keep = L::load_flags(a.valid + first + j);
        typename L::I label;
        __builtin_memcpy(&label, t.label + j, sizeof(label));
        const V m = L::load(max + j), k = L::load(scale + j), y = L::load(at_label + j), spread_v = L::load(s + j);
        const T* kept = kept_tile<T>(a, tile);
        for (int64_t c = 0; c < a.classes; ++c) {
          V x = kept != nullptr ? L::load(kept + c * kTileRows + j) : load_rows<L>(rows, j, c);
          if (Adjusted && kept == nullptr) x = L::set(adjust.s[c]) * x + L::set(adjust.d[c]);
          const V e = kept != nullptr ? x : L::exp_below(x - m);
          V g = L::select(label == L::set_int(typename L::Int(c)), y, e * k);
          if (spreads) g -= spread_v * share<L>(shares, soft, j, c);
          if (Adjusted) g *= L::set(adjust.s[c]);
          store_rows<L>(grads, j, c, L::select(keep, g, L::set(0)), count - j);
        }
      }
    }
  }
}

// ---- robust weights on a vector ------------------------------------------------------------------------------------

// N values from index i on; past `end` it repeats the fill.
template <class L>
ABSGD_FN typename L::V load_some(const typename L::Scalar* p, int64_t i, int64_t end, typename L::Scalar fill) {
  if (i + L::N <= end) return L::load(p + i);
  typename L::Scalar part[L::N];
  for (int j = 0; j < L::N; ++j) part[j] = i + j < end ? p[i + j] : fill;
  return L::load(part);
}
template <class L>
ABSGD_FN void store_some(typename L::Scalar* p, int64_t i, int64_t end, typename L::V x) {
  if (i + L::N <= end) return L::store(p + i, x);
  typename L::Scalar part[L::N];
  L::store(part, x);
  for (int j = 0; i + j < end; ++j) p[i + j] = part[j];
}
template <class L>
ABSGD_FN typename L::I load_valid(const uint8_t* valid, int64_t i, int64_t end) {
  uint8_t part[L::N];
  for (int j = 0; j < L::N; ++j) part[j] = i + j < end && (valid == nullptr || valid[i + j] != 0);
  return L::load_flags(part);
}

// One register of losses: z, and which rows count.
template <class L>
struct Scores {
  typename L::V loss, z;
  typename L::I valid, good;

  ABSGD_FN Scores(const RobustArgs& a, int64_t i, int64_t end) {
    using T = typename L::Scalar;
    const T* losses = static_cast<const T*>(a.losses);
    loss = load_some<L>(losses, i, end, 0);
    const typename L::V score = a.scores == nullptr ? loss : load_some<L>(static_cast<const T*>(a.scores), i, end, 0);
    z = score / L::set(T(a.lam));
    valid = load_valid<L>(a.valid, i, end);
    const typename L::V limit = L::set(T(a.z_limit));
    good = valid & is_usable<L>(loss, score, z, limit) & (z <= L::set(T(a.z_top)));
  }
};

template <class T>
void robust_partials_typed(const RobustArgs& a, Partial* partials, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  using V = typename L::V;
  const V lowest = L::set(T(-__builtin_inf()));
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * kBlock, last = smaller(first + kBlock, a.count);
    V max = lowest;
    typename L::I good = L::set_int(0), valid = L::set_int(0);
    for (int64_t i = first; i < last; i += L::N) {
      const Scores<L> s(a, i, last);
      max = L::max(max, L::select(s.good, s.z, lowest));
      good -= s.good;  // a true comparison is -1
      valid -= s.valid;
    }
    Partial p{double(L::highest(max)), 0.0, 0, 0};
    for (int j = 0; j < L::N; ++j) {
      p.good += good[j];
      p.bad += valid[j] - good[j];
    }
    if (p.good > 0) {
      V sum = L::set(0);
      for (int64_t i = first; i < last; i += L::N) {
        const Scores<L> s(a, i, last);
        sum += L::select(s.good, L::exp(s.z - L::set(T(p.max))), L::set(0));
      }
      p.sum = double(L::sum(sum));
    }
    partials[b] = p;
  }
}

// max and sum of all blocks: log sum exp(z) = max + log(sum)
Partial all_of(const RobustArgs& a, const Partial* partials) {
  using L = StateLane;
  Partial out{-__builtin_inf(), 0, 0, 0};
  for (int64_t b = 0; b < a.blocks(); ++b) {
    out.good += partials[b].good;
    out.bad += partials[b].bad;
    if (partials[b].good > 0 && partials[b].max > out.max) out.max = partials[b].max;
  }
  for (int64_t b = 0; b < a.blocks(); ++b)
    if (partials[b].good > 0) out.sum += partials[b].sum * L::exp(partials[b].max - out.max);
  return out;
}

Outcome robust_finish(const RobustArgs& a, const Partial* partials, double log_s) {
  const Partial p = all_of(a, partials);
  return next_outcome<StateLane>(a, log_s, p.max, p.sum, p.good, p.bad);
}

Totals robust_totals(const RobustArgs& a, const Partial* partials) {
  const Partial p = all_of(a, partials);
  return {p.good > 0 ? p.max + StateLane::log(p.sum) : p.max, double(p.good), double(p.bad)};
}

Settled robust_settle(const RobustArgs& a, const double* rows, int64_t count, int64_t stride, double log_s,
                      double share, const double* reference, double* new_log_s) {
  using L = StateLane;
  const Totals t = add_totals<L>(rows, count, stride);
  const Outcome o = next_outcome<L>(a, log_s, t.log_sum, 1, int64_t(t.good), int64_t(t.bad));
  *new_log_s = o.new_log_s;
  return settled_of<L>(o, t, share, reference);
}

template <class T>
void robust_apply_typed(const RobustArgs& a, const Outcome& o, double* loss_partials, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  using V = typename L::V;
  const T* sample_weight = static_cast<const T*>(a.sample_weight);
  const V nan = L::set(T(__builtin_nan(""))), zero = L::set(0);
  const auto numbers = RobustNumbers<L>::template of<T>(Weighing::of(a.lam, a.mix, a.max_weight, o));
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * kBlock, last = smaller(first + kBlock, a.count);
    V sum = zero;
    for (int64_t i = first; i < last; i += L::N) {
      const Scores<L> s(a, i, last);
      auto settle = [&](V x) { return L::select(s.good, x, L::select(s.valid, nan, zero)); };
      const V w = settle(numbers.weight(s.z));
      const V t = sample_weight == nullptr ? L::set(1) : load_some<L>(sample_weight, i, last, 0);
      const V factor = settle(numbers.factor(w, t));
      sum += L::select(s.valid, factor * s.loss, zero);
      store_some<L>(static_cast<T*>(a.weights), i, last, w);
      if (a.factor != nullptr) store_some<L>(static_cast<T*>(a.factor), i, last, factor);
    }
    loss_partials[b] = double(L::sum(sum));
  }
}

// A row without a usable loss has weight NaN: it keeps that to itself.
template <class T>
void robust_dot_typed(const RobustArgs& a, const void* upstream, double* dots, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  using V = typename L::V;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * kBlock, last = smaller(first + kBlock, a.count);
    V sum = L::set(0);
    for (int64_t i = first; i < last; i += L::N) {
      const V w = load_some<L>(static_cast<const T*>(a.weights), i, last, 0);
      sum += L::select(w == w, w * load_some<L>(static_cast<const T*>(upstream), i, last, 0), L::set(0));
    }
    dots[b] = double(L::sum(sum));
  }
}

template <class T>
void robust_vjp_typed(const RobustArgs& a, const VjpArgs& g, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * kBlock, last = smaller(first + kBlock, a.count);
    for (int64_t i = first; i < last; i += L::N)
      store_some<L>(static_cast<T*>(g.out), i, last,
                    robust_weight_vjp<L>(load_some<L>(static_cast<const T*>(a.weights), i, last, 0),
                                         load_some<L>(static_cast<const T*>(g.upstream), i, last, 0), L::set(T(g.dot)),
                                         L::set(T(g.upstream_log_s)), L::set(T(g.share)), L::set(T(g.share_state)),
                                         L::set(T(1 / a.lam))));
  }
}

// ---- rectified weights ---------------------------------------------------------------------------------------------

template <class T>
void rectified_typed(const T* products, int64_t count, T* weights) {
  using L = Lanes<T>;
  using Wide = Lanes<double>;
  using Narrow = Lanes<T, int(sizeof(T)) * Wide::N>;  // as many values as Wide has
  RectifiedSum<Wide> sum{Wide::set(0), Wide::set(0)};
  for (int64_t i = 0; i < count; i += Wide::N)
    sum.add(__builtin_convertvector(load_some<Narrow>(products, i, count, 0), typename Wide::V));
  const auto numbers = RectifiedNumbers<L>::template of<T>(Wide::sum(sum.plain), Wide::sum(sum.scaled));
  for (int64_t i = 0; i < count; i += L::N)
    store_some<L>(weights, i, count, numbers.weight(load_some<L>(products, i, count, 0)));
}

// ---- gradient scaling ----------------------------------------------------------------------------------------------

template <class S, class T, class G>
void scale_typed(const ScaleArgs& a, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  const T* upstream = static_cast<const T*>(a.upstream);
  G* out = static_cast<G*>(a.grad);
  const S* in = static_cast<const S*>(a.source);
  // slices of equal factors: a row of classes (inner = 1); else the factors lie along the slice
  auto walk = [&](int64_t first, int64_t count, auto factor) {
    int64_t i = 0;
    for (; i + L::N <= count; i += L::N) L::store(out + first + i, L::load(in + first + i) * factor(i));
    if (i == count) return;
    S part[L::N] = {};
    G done[L::N];
    __builtin_memcpy(part, in + first + i, size_t(count - i) * sizeof(S));
    L::store(done, L::load(part) * factor(i));
    __builtin_memcpy(out + first + i, done, size_t(count - i) * sizeof(G));
  };
  if (upstream == nullptr) {
    walk(begin * a.inner, (end - begin) * a.inner, [&](int64_t) { return L::set(T(a.scalar)); });
    return;
  }
  for (int64_t slice = begin; slice < end;) {
    const int64_t b = slice / a.classes;
    if (a.inner == 1) {
      const int64_t stop = smaller((b + 1) * a.classes, end);
      walk(slice, stop - slice, [&](int64_t) { return L::set(upstream[b]); });
      slice = stop;
    } else {
      const T* u = upstream + b * a.inner;
      walk(slice * a.inner, a.inner, [&](int64_t i) { return load_some<L>(u, i, a.inner, 0); });
      ++slice;
    }
  }
}

// ---- the table -----------------------------------------------------------------------------------------------------

// f(a constant of LogitArgs::adjust_form)
template <class F>
ABSGD_FN auto for_form(int form, F f) {
  switch (form) {
    case 0:
      return f(Constant<int, 0>{});
    case kAdjusts:
      return f(Constant<int, kAdjusts>{});
    case kAdjusts | kScales:
      return f(Constant<int, kAdjusts | kScales>{});
    case kAdjusts | kShifts:
      return f(Constant<int, kAdjusts | kShifts>{});
    default:
      return f(Constant<int, kAdjusts | kScales | kShifts>{});
  }
}
int64_t logit_stats(const LogitArgs& a, int64_t begin, int64_t end) {
  return for_storage(a.dtype, [&](auto s, auto t) {
    return for_form(a.adjust_form, [&](auto form) {
      return logit_stats_typed<typename decltype(s)::type, typename decltype(t)::type, decltype(form)::value>(a, begin,
                                                                                                              end);
    });
  });
}
void logit_grads(const LogitArgs& a, int64_t begin, int64_t end) {
  for_form(a.adjust_form, [&](auto form) {
    constexpr int kForm = decltype(form)::value;
    if (a.dtype == Dtype::f16) return logit_grads_typed<f16, float, float, kForm>(a, begin, end);
    for_storage(a.dtype, [&](auto s, auto t) {
      using S = typename decltype(s)::type;
      logit_grads_typed<S, typename decltype(t)::type, S, kForm>(a, begin, end);
    });
  });
}
void robust_partials(const RobustArgs& a, Partial* partials, int64_t begin, int64_t end) {
  for_real(a.dtype, [&](auto t) { robust_partials_typed<typename decltype(t)::type>(a, partials, begin, end); });
}
void robust_apply(const RobustArgs& a, const Outcome& o, double* loss_partials, int64_t begin, int64_t end) {
  for_real(a.dtype, [&](auto t) { robust_apply_typed<typename decltype(t)::type>(a, o, loss_partials, begin, end); });
}
void robust_dot(const RobustArgs& a, const void* upstream, double* dots, int64_t begin, int64_t end) {
  for_real(a.dtype, [&](auto t) { robust_dot_typed<typename decltype(t)::type>(a, upstream, dots, begin, end); });
}
void robust_vjp(const RobustArgs& a, const VjpArgs& g, int64_t begin, int64_t end) {
  for_real(a.dtype, [&](auto t) { robust_vjp_typed<typename decltype(t)::type>(a, g, begin, end); });
}
void rectified(Dtype dtype, const void* products, int64_t count, void* weights) {
  for_real(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    rectified_typed(static_cast<const T*>(products), count, static_cast<T*>(weights));
  });
}
void scale(const ScaleArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == Dtype::f16) return scale_typed<float, float, f16>(a, begin, end);
  for_storage(a.dtype, [&](auto s, auto t) {
    using S = typename decltype(s)::type;
    scale_typed<S, typename decltype(t)::type, S>(a, begin, end);
  });
}

}  // namespace

extern const CpuKernels kernels;
const CpuKernels kernels = {&ABSGD_NAME(ABSGD_ISA_NAMESPACE)[4],  // the name without "isa_"
                            logit_stats,
                            logit_grads,
                            robust_partials,
                            robust_finish,
                            robust_totals,
                            robust_settle,
                            robust_apply,
                            robust_dot,
                            robust_vjp,
                            rule_weights,
                            group_weights,
                            rectified,
                            scale,
                            step,
                            weighted_step};

}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
