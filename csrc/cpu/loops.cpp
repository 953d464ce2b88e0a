// The loops of the CPU backend: how rows, blocks and tensors are walked. The formulas are in math.h, the lanes in
// lanes.h. This file is compiled once per instruction set, each time into its own namespace (ABSGD_ISA_NAMESPACE).
#include "../launch.h"
#include "lanes.h"

#define ABSGD_STRING(x) #x
#define ABSGD_NAME(x) ABSGD_STRING(x)

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {

void sgd_step(const StepTable&, int64_t begin, int64_t end);  // step.cpp

namespace {

// ---- calling a template for the storage type at hand ---------------------------------------------------------------

template <class T>
struct Type {
  using type = T;
};

template <class F>
ABSGD_FN auto for_storage(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f64:
      return f(Type<double>{}, Type<double>{});
    case Dtype::bf16:
      return f(Type<bf16>{}, Type<float>{});
    case Dtype::f16:
      return f(Type<f16>{}, Type<float>{});
    default:
      return f(Type<float>{}, Type<float>{});
  }
}

template <class F>
ABSGD_FN auto for_real(Dtype dtype, F f) {
  return dtype == Dtype::f64 ? f(Type<double>{}) : f(Type<float>{});
}

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
  T max[kTileRows], own_logit[kTileRows], rest[kTileRows], others[kTileRows];
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

// One row, classes along the lanes (classes >= N). The last register overlaps its neighbour; `fresh` marks its new
// lanes.
template <class L, class S>
struct RowOfClasses {
  using T = typename L::Scalar;
  using V = typename L::V;
  using I = typename L::I;
  const S* x;
  int64_t classes;
  int64_t whole() const { return classes / L::N; }
  int64_t tail() const { return classes - L::N; }
  bool has_tail() const { return classes % L::N != 0; }
  I index(int64_t first) const { return L::iota() + L::set_int(typename L::Int(first)); }
  I fresh() const { return index(tail()) >= L::set_int(typename L::Int(whole() * L::N)); }

  T max() const {
    V m0 = L::load(x), m1 = m0, m2 = m0, m3 = m0;
    int64_t k = 1;
    for (; k + 4 <= whole(); k += 4) {
      m0 = L::max(m0, L::load(x + k * L::N));
      m1 = L::max(m1, L::load(x + (k + 1) * L::N));
      m2 = L::max(m2, L::load(x + (k + 2) * L::N));
      m3 = L::max(m3, L::load(x + (k + 3) * L::N));
    }
    for (; k < whole(); ++k) m0 = L::max(m0, L::load(x + k * L::N));
    if (has_tail()) m1 = L::max(m1, L::load(x + tail()));
    return L::highest(L::max(L::max(m0, m1), L::max(m2, m3)));
  }

  // sum over k != label of exp(x_k - max). Only the chunk that holds the label compares indices; no branch depends on
  // where in the chunk it is, because it would be mispredicted. The exponentials go to `kept`.
  template <bool Keep>
  T rest(T max, int64_t label, T* kept) const {
    const V m = L::set(max);
    const I own = L::set_int(typename L::Int(label));
    V sum[4] = {};
    auto exponential = [&](int64_t first) {
      const V e = L::exp_below(L::load(x + first) - m);
      if constexpr (Keep) L::store(kept + first, e);
      return e;
    };
    auto add = [&](V& into, int64_t k, bool compare) {
      const V e = exponential(k * L::N);
      into += compare ? L::select(index(k * L::N) == own, L::set(0), e) : e;
    };
    for (int64_t begin = 0; begin < whole(); begin += kChunk) {
      const int64_t end = smaller(begin + kChunk, whole());
      const bool here = label >= begin * L::N && label < end * L::N;
      int64_t k = begin;
      if (here) {
        for (; k + 2 <= end; k += 2) add(sum[0], k, true), add(sum[1], k + 1, true);
      } else {
        for (; k + 4 <= end; k += 4)
          for (int u = 0; u < 4; ++u) add(sum[u], k + u, false);
      }
      for (; k < end; ++k) add(sum[2], k, true);
    }
    if (has_tail()) {
      const V e = exponential(tail());
      sum[3] += L::select(fresh() & (index(tail()) != own), e, L::set(0));
    }
    return L::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  static constexpr int64_t kChunk = 32;  // registers

  // sum_k v_k (x_k - max), v = null: 1
  T weighted_gaps(T max, const T* v) const {
    V sum = L::set(0);
    auto term = [&](int64_t first) {
      const V gap = L::load(x + first) - L::set(max);
      return v == nullptr ? gap : L::load(v + first) * gap;
    };
    for (int64_t k = 0; k < whole(); ++k) sum += term(k * L::N);
    if (has_tail()) sum += L::select(fresh(), term(tail()), L::set(0));
    return L::sum(sum);
  }

  // grad_k = exp(x_k - max) * scale - spread v_k, except at the label. Kept: the exponentials already stand in grad.
  template <bool Kept, class G>
  void gradient(G* grad, T max, T scale, T spread, const T* v, int64_t label, T at_label) const {
    const V m = L::set(max), s = L::set(scale);
    auto value = [&](int64_t first) {
      const V g = (Kept ? L::load(grad + first) : L::exp_below(L::load(x + first) - m)) * s;
      if (spread == 0) return g;
      return g - (v == nullptr ? L::set(spread) : L::load(v + first) * L::set(spread));
    };
    const V last = value(tail());  // read before its neighbour is overwritten
    for (int64_t k = 0; k < whole(); ++k) L::store(grad + k * L::N, value(k * L::N));
    L::store(grad + tail(), last);
    G out[L::N];
    L::store(out, L::set(at_label - (v == nullptr ? spread : spread * v[label])));
    grad[label] = out[0];
  }
};

template <class T>
T total_class_weight(const LogitArgs& a) {
  if (a.class_weight == nullptr) return T(a.classes);
  double sum = 0;
  for (int64_t c = 0; c < a.classes; ++c) sum += double(static_cast<const T*>(a.class_weight)[c]);
  return T(sum);
}

// The tile's numbers -> losses, statistics and coefficients in the per-row arrays.
template <class L>
void finish_tile(const LogitArgs& a, int64_t first, const Tile<L>& t, typename L::Scalar total_v) {
  using T = typename L::Scalar;
  using V = typename L::V;
  const T* v = static_cast<const T*>(a.class_weight);
  const CrossEntropy<L> loss{L::set(T(1 - a.label_smoothing)), L::set(T(a.label_smoothing / double(a.classes)))};
  for (int j = 0; j < kTileRows; j += L::N) {
    T v_label[L::N];
    uint8_t valid[L::N];
    for (int i = 0; i < L::N; ++i) {
      v_label[i] = v == nullptr || a.classes == 0 ? T(1) : v[t.label[j + i]];
      valid[i] = t.valid[j + i];
      a.valid[first + j + i] = valid[i];
    }
    const typename L::I keep = L::load_flags(valid);
    const V max = L::load(t.max + j), gap = max - L::load(t.own_logit + j), v_y = L::load(v_label);
    const Row<L> row{gap, L::load(t.rest + j), L::exp(-gap)};
    // sum_k v_k (-log p_k) = log_total * sum v - sum_k v_k (a_k - max)
    const V others = a.label_smoothing == 0 ? L::set(0) : row.log_total() * L::set(total_v) - L::load(t.others + j);
    auto out = [&](void* array, V x) { L::store(static_cast<T*>(array) + first + j, x); };
    out(a.losses, L::select(keep, loss.loss(row, v_y, others), L::set(0)));
    out(a.row_max, max);
    out(a.row_rest, row.rest);
    out(a.row_own, row.own);
    out(a.coefficient, L::select(keep, loss.coefficient(row, v_y), L::set(0)));
  }
}

template <class T>
ABSGD_FN T* kept_tile(const LogitArgs& a, int64_t tile) {
  return a.kept == nullptr ? nullptr : static_cast<T*>(a.kept) + tile * a.classes * kTileRows;
}

template <class S, class T>
int64_t logit_stats_typed(const LogitArgs& a, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  using V = typename L::V;
  const T* v = static_cast<const T*>(a.class_weight);
  const bool smooth = a.label_smoothing != 0, many = a.along_classes();
  const T total_v = smooth ? total_class_weight<T>(a) : T(0);
  int64_t bad = kAllLabelsGood;
  Tile<L> t;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTileRows;
    const int count = int(smaller(kTileRows, a.rows() - first));
    bad = smaller(bad, read_labels<L>(a, first, count, t));
    const auto rows =
        row_pointers(static_cast<const S*>(a.logits), a, a.stride_batch, a.stride_class, a.stride_inner, first);
    for (int j = 0; j < kTileRows; ++j) {
      t.own_logit[j] = a.classes > 0 ? to_real<L>(*rows.at(j, t.label[j])) : T(0);
      t.max[j] = t.rest[j] = t.others[j] = 0;
    }
    if (a.classes == 0) {
      // nothing to read: every row is ignored, or its label is out of range
    } else if (many) {
      // All maxima of a tile first, then all sums: no sum waits for its own maximum (128 x 100: 4.4 -> 3.7 us). Rows
      // that together leave the cache are finished one by one.
      const int step = a.classes <= kCachedClasses ? int(kTileRows) : 1;
      for (int j = 0; j < count; j += step) {
        const int stop = int(smaller(j + step, count));
        for (int i = j; i < stop; ++i)
          if (t.valid[i]) t.max[i] = RowOfClasses<L, S>{rows.row[i], a.classes}.max();
        for (int i = j; i < stop; ++i) {
          if (!t.valid[i]) continue;
          const RowOfClasses<L, S> row{rows.row[i], a.classes};
          T* kept = a.keep ? static_cast<T*>(a.grad) + (first + i) * a.classes : nullptr;
          t.rest[i] = kept ? row.template rest<true>(t.max[i], t.label[i], kept)
                           : row.template rest<false>(t.max[i], t.label[i], kept);
          if (smooth) t.others[i] = row.weighted_gaps(t.max[i], v);
        }
      }
    } else {
      for (int j = 0; j < count; j += L::N) {
        V max = load_rows<L>(rows, j, 0);
        for (int64_t c = 1; c < a.classes; ++c) max = L::max(max, load_rows<L>(rows, j, c));
        typename L::I label;
        __builtin_memcpy(&label, t.label + j, sizeof(label));
        V rest = L::set(0), others = L::set(0);
        T* kept = kept_tile<T>(a, tile);
        for (int64_t c = 0; c < a.classes; ++c) {
          const V gap = load_rows<L>(rows, j, c) - max, e = L::exp_below(gap);
          rest += L::select(label == L::set_int(typename L::Int(c)), L::set(0), e);
          if (kept != nullptr) L::store(kept + c * kTileRows + j, e);
          if (smooth) others += v == nullptr ? gap : gap * L::set(v[c]);
        }
        L::store(t.max + j, max);
        L::store(t.rest + j, rest);
        L::store(t.others + j, others);
      }
    }
    finish_tile<L>(a, first, t, total_v);
  }
  return bad;
}

// G: how the gradient is stored, S except for f16 (LogitArgs::grad)
template <class S, class T, class G>
void logit_grads_typed(const LogitArgs& a, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  using V = typename L::V;
  const T* v = static_cast<const T*>(a.class_weight);
  const bool smooth = a.label_smoothing != 0, many = a.along_classes();
  const T total_v = smooth ? total_class_weight<T>(a) : T(0), spread = T(a.label_smoothing / double(a.classes));
  const T* factor = static_cast<const T*>(a.factor);
  Tile<L> t;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTileRows;
    const int count = int(smaller(kTileRows, a.rows() - first));
    read_labels<L>(a, first, count, t);
    const auto rows =
        row_pointers(static_cast<const S*>(a.logits), a, a.stride_batch, a.stride_class, a.stride_inner, first);
    const auto grads = row_pointers(static_cast<G*>(a.grad), a, a.classes * a.inner, a.inner, 1, first);
    // per row: exp(x - max) * scale - s v_k off the label, at_label - s v_y on it
    T scale[kTileRows], s[kTileRows], at_label[kTileRows], max[kTileRows];
    for (int j = 0; j < kTileRows; j += L::N) {
      auto in = [&](const void* array) { return L::load(static_cast<const T*>(array) + first + j); };
      T u[L::N];
      for (int i = 0; i < L::N; ++i) u[i] = j + i >= count ? T(0) : factor == nullptr ? T(1) : factor[first + j + i];
      const Row<L> row{L::set(0), in(a.row_rest), in(a.row_own)};
      const V c = in(a.coefficient) * L::load(u), spread_v = L::load(u) * L::set(spread);
      L::store(max + j, in(a.row_max));
      L::store(s + j, spread_v);
      L::store(scale + j, (c + spread_v * L::set(total_v)) * row.inverse_total());
      L::store(at_label + j, spread_v * L::set(total_v) * row.own * row.inverse_total() - c * row.one_minus_p());
    }
    if (many) {
      for (int j = 0; j < count; ++j) {
        if (!t.valid[j]) {
          __builtin_memset(grads.row[j], 0, size_t(a.classes) * sizeof(G));
          continue;
        }
        const RowOfClasses<L, S> row{rows.row[j], a.classes};
        const auto write =
            a.keep ? &RowOfClasses<L, S>::template gradient<true, G> : &RowOfClasses<L, S>::template gradient<false, G>;
        (row.*write)(grads.row[j], max[j], scale[j], s[j], v, t.label[j], at_label[j]);
      }
    } else {
      for (int j = 0; j < count; j += L::N) {
        uint8_t valid[L::N];
        for (int i = 0; i < L::N; ++i) valid[i] = t.valid[j + i];
        const typename L::I keep = L::load_flags(valid);
        typename L::I label;
        __builtin_memcpy(&label, t.label + j, sizeof(label));
        const V m = L::load(max + j), k = L::load(scale + j), y = L::load(at_label + j), spread_v = L::load(s + j);
        const T* kept = kept_tile<T>(a, tile);
        for (int64_t c = 0; c < a.classes; ++c) {
          const V e = kept != nullptr ? L::load(kept + c * kTileRows + j) : L::exp_below(load_rows<L>(rows, j, c) - m);
          V g = L::select(label == L::set_int(typename L::Int(c)), y, e * k);
          if (smooth) g -= v == nullptr ? spread_v : spread_v * L::set(v[c]);
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
    // a NaN makes every comparison false; the score itself must be finite also where |lam| = inf makes z = 0
    good = valid & (z <= limit) & (z >= -limit) & (score - score == L::set(0)) & (loss - loss == L::set(0));
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

Outcome robust_finish(const RobustArgs& a, const Partial* partials, double log_s) {
  using L = StateLane;
  Outcome out{0, log_s, 0, 0, 0, 0, 0};
  double max = -__builtin_inf(), sum = 0;
  for (int64_t b = 0; b < a.blocks(); ++b) {
    out.good += partials[b].good;
    out.bad += partials[b].bad;
    if (partials[b].good > 0 && partials[b].max > max) max = partials[b].max;
  }
  if (out.good == 0) return out;
  out.inverse_n = 1.0 / double(out.good);
  if (__builtin_isinf(a.lam)) return out;  // the plain mean: z = 0, W = exp(0 - 0)
  for (int64_t b = 0; b < a.blocks(); ++b)
    if (partials[b].good > 0) sum += partials[b].sum * L::exp(partials[b].max - max);
  if (a.normalizer != Normalizer::none) {
    const double log_g = log_mean_exp<L>(max, sum, double(out.good));
    const bool alone = a.normalizer == Normalizer::batch || (a.init_first && log_s == -__builtin_inf());
    out.log_s = next_log_s<L>(log_s, log_g, a.gamma, a.alpha, alone);
    out.share = (alone ? a.alpha : a.gamma * a.alpha) * out.inverse_n;
  }
  if (out.bad == 0) {  // one bad batch never poisons the state
    out.new_log_s = out.log_s;
    out.share_state = out.share;
  }
  return out;
}

template <class T>
void robust_apply_typed(const RobustArgs& a, const Outcome& o, double* loss_partials, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  using V = typename L::V;
  const T* sample_weight = static_cast<const T*>(a.sample_weight);
  const V nan = L::set(T(__builtin_nan(""))), zero = L::set(0);
  const bool plain = __builtin_isinf(a.lam);  // the plain mean: W = 1 as it is
  const V mix = L::set(plain ? T(0) : T(a.mix)), inverse_n = L::set(T(o.inverse_n));
  const V max_weight = L::set(plain ? T(1) : T(a.max_weight)), log_s_low = L::set(T(o.log_s - double(T(o.log_s))));
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * kBlock, last = smaller(first + kBlock, a.count);
    V sum = zero;
    for (int64_t i = first; i < last; i += L::N) {
      const Scores<L> s(a, i, last);
      auto settle = [&](V x) { return L::select(s.good, x, L::select(s.valid, nan, zero)); };
      const V w = settle(robust_weight<L>(s.z, L::set(T(o.log_s)), log_s_low, max_weight));
      const V t = sample_weight == nullptr ? L::set(1) : load_some<L>(sample_weight, i, last, 0);
      const V factor = settle(sample_factor<L>(w, mix, t, inverse_n));
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

int64_t logit_stats(const LogitArgs& a, int64_t begin, int64_t end) {
  return for_storage(a.dtype, [&](auto s, auto t) {
    return logit_stats_typed<typename decltype(s)::type, typename decltype(t)::type>(a, begin, end);
  });
}
void logit_grads(const LogitArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == Dtype::f16) return logit_grads_typed<f16, float, float>(a, begin, end);
  for_storage(a.dtype, [&](auto s, auto t) {
    using S = typename decltype(s)::type;
    logit_grads_typed<S, typename decltype(t)::type, S>(a, begin, end);
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
                            robust_apply,
                            robust_dot,
                            robust_vjp,
                            scale,
                            sgd_step};

}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
