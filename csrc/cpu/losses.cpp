// The kernels of the losses on logits (MATH §2). Each works on tiles of kTileRows rows.
//
// logit_stats, the forward pass:
//     1. It reads the labels of the tile, and the adjusted logit of each label.
//     2. It walks along the classes of each row and finds max, sum of exp(a_k - max) and the sums of class weights. The
//        walk is along_classes.h for many adjacent classes, and along_rows.h otherwise. Both give the same numbers.
//     3. finish_tile makes losses, gradient coefficients and validity of these numbers, N rows at a time.
// logit_grads, the backward pass:
//     1. gradient_numbers makes the RowGradient of each row, with its factor.
//     2. It walks along the classes once more and writes the gradient.
//
// adjust_in_pairs comes before both, for bf16 logits with class vectors.
//
// gradient_stats stores the RowGradient of each row, for a backward pass that comes after the operator has returned.
// This file is compiled once for each instruction set, each time into its own namespace (ABSGD_ISA_NAMESPACE).
#include "along_classes.h"
#include "along_rows.h"

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {
namespace {

// Makes losses, statistics and coefficients of a tile's numbers, and stores them in the arrays of LogitArgs.
template <class L>
void finish_tile(const LogitArgs& a, int64_t first, Tile<L>& t) {
  using T = typename L::Scalar;
  using V = typename L::V;
  const T* v = static_cast<const T*>(a.class_weight);
  const bool soft = a.soft != nullptr, all_weigh = a.all_classes_weigh();
  const T smoothing_coef = ClassWeights<T>::of(a).smoothing_coef(soft);
  for (int j = 0; j < kTileRows; j += L::N) {
    T v_label[L::N];
    uint8_t valid[L::N];
    for (int i = 0; i < L::N; ++i) {
      v_label[i] = v == nullptr || a.classes == 0 || soft ? T(1) : v[t.label[j + i]];
      valid[i] = t.valid[j + i];
    }
    typename L::I counts = L::load_flags(valid);
    const V max = L::load(t.max + j), w = L::load(v_label);
    const V max_minus_target = soft ? L::set(0) : max - L::load(t.target_logit + j);
    const Row<L> row{max_minus_target, L::load(t.sumexp_others + j), soft ? L::set(0) : L::exp(-max_minus_target)};
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
    if (all_weigh)
      loss += L::set(smoothing_coef) * (row.log_total() * L::load(t.weight_total + j) - L::load(t.weighted_logits + j));
    if (a.loss.least < __builtin_inf()) {  // A pruned row does not count.
      counts = counts & ~(row.nll() >= L::set(T(a.loss.least)));
      for (int i = 0; i < L::N; ++i) valid[i] = counts[i] != 0;
    }
    for (int i = 0; i < L::N; ++i) a.valid[first + j + i] = valid[i];
    auto out = [&](void* array, V x) { L::store(static_cast<T*>(array) + first + j, x); };
    out(a.losses, L::select(counts, loss, L::set(0)));
    out(a.row_max, max);
    out(a.row_sumexp_others, row.sumexp_others);
    out(a.row_exp_target, row.exp_target);
    out(a.row_weight_total, L::load(t.weight_total + j));
    out(a.coefficient, L::select(counts, coefficient, L::set(0)));
  }
}

template <class S, class T, int kForm>
int64_t logit_stats_typed(const LogitArgs& a, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  const bool all_weigh = a.all_classes_weigh(), along_classes = a.along_classes();
  int64_t out_of_range = kAllLabelsInRange;
  TileInput<L, S, kForm> in(a);
  Tile<L> t;
  for (int64_t tile = begin; tile < end; ++tile) {
    out_of_range = smaller(out_of_range, in.move_to(tile, t));
    in.read_targets(t);
    if (a.classes == 0) {
      // There is nothing to read: every row is ignored, or its label is out of range.
    } else if (along_classes) {
      stats_along_classes(in, t);
    } else {
      stats_along_rows(in, all_weigh, t);
    }
    finish_tile<L>(a, in.first, t);
  }
  return out_of_range;
}

// The numbers of each row of a tile that its gradient needs (math/losses.h RowGradient):
//     grad_k = exp(a_k - max) scale - smoothing_coef weight_k    for k != y
//     grad_y = at_label - smoothing_coef v_y
template <class L>
ABSGD_FN void gradient_numbers(const LogitArgs& a, int64_t first, int count, GradientTile<typename L::Scalar>& out) {
  using T = typename L::Scalar;
  const T* const factor = static_cast<const T*>(a.factor);
  const T smoothing_coef = a.all_classes_weigh() ? ClassWeights<T>::of(a).smoothing_coef(a.soft != nullptr) : T(0);
  for (int j = 0; j < kTileRows; j += L::N) {
    auto read = [&](const void* array) { return L::load(static_cast<const T*>(array) + first + j); };
    T u[L::N];
    for (int i = 0; i < L::N; ++i) u[i] = j + i >= count ? T(0) : factor == nullptr ? T(1) : factor[first + j + i];
    const Row<L> row{L::set(0), read(a.row_sumexp_others), read(a.row_exp_target)};
    const typename L::V upstream = L::load(u);
    const auto g = RowGradient<L>::of(row, read(a.coefficient) * upstream, upstream * L::set(smoothing_coef),
                                      read(a.row_weight_total));
    L::store(out.max + j, read(a.row_max));
    L::store(out.smoothing_coef + j, g.smoothing_coef);
    L::store(out.scale + j, g.scale);
    L::store(out.at_label + j, g.at_label);
  }
}

// Calls f(array of `out`, array of LogitArgs::stats) for each of the four numbers.
template <class T, class F>
ABSGD_FN void for_stats(const LogitArgs& a, GradientTile<T>& out, F f) {
  T* const stats = static_cast<T*>(a.stats);
  T* const of_tile[4] = {out.max, out.scale, out.at_label, out.smoothing_coef};
  for (int n = 0; n < 4; ++n) f(of_tile[n], stats + n * a.rows());
}

template <class T>
void gradient_stats_typed(const LogitArgs& a, int64_t begin, int64_t end) {
  GradientTile<T> numbers;
  for (int64_t first = begin * kTileRows; first < smaller(end * kTileRows, a.rows()); first += kTileRows) {
    const int count = int(smaller(kTileRows, a.rows() - first));
    gradient_numbers<Lanes<T>>(a, first, count, numbers);
    for_stats(a, numbers, [&](const T* from, T* to) {
      for (int j = 0; j < count; ++j) to[first + j] = a.valid[first + j] ? from[j] : T(0);
    });
  }
}

// The numbers of a tile from LogitArgs::stats, times the factors of its rows. A row whose numbers are 0 does not count.
template <class T>
ABSGD_FN void numbers_of_stats(const LogitArgs& a, int64_t first, int count, GradientTile<T>& out) {
  const T* const factor = static_cast<const T*>(a.factor);
  for_stats(a, out, [&](T* to, const T* from) {
    for (int j = 0; j < kTileRows; ++j) {
      to[j] = j < count ? from[first + j] : T(0);
      if (j < count && factor != nullptr && to != out.max) to[j] *= factor[first + j];
    }
  });
  for (int j = 0; j < kTileRows; ++j)
    a.valid[first + j] = out.scale[j] != 0 || out.at_label[j] != 0 || out.smoothing_coef[j] != 0;
}

// S, T, G: the types that logits are stored in, that rows are computed in, and that the gradient is stored in. G is S,
// except for f16 (LogitArgs::grad).
template <class S, class T, class G, int kForm>
void logit_grads_typed(const LogitArgs& a, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  const bool all_weigh = a.all_classes_weigh(), along_classes = a.along_classes();
  TileInput<L, S, kForm> in(a);
  Tile<L> t;
  GradientTile<T> numbers;
  // The last tile comes first: its logits are the last that the forward walk has read, and may still be in the cache.
  for (int64_t tile = end - 1; tile >= begin; --tile) {
    in.move_to(tile, t);
    const auto grads = row_pointers(static_cast<G*>(a.grad), a, a.classes * a.inner, a.inner, 1, in.first);
    if (a.stats == nullptr)
      gradient_numbers<L>(a, in.first, in.count, numbers);
    else
      numbers_of_stats(a, in.first, in.count, numbers);
    if (along_classes)
      gradient_along_classes(in, t, numbers, grads);
    else
      gradient_along_rows(in, all_weigh, t, numbers, grads);
  }
}

// Calls f with LogitArgs::adjust_form as a constant of the compiler, for logits stored in S. Each form takes time to
// compile, so the rarer types f64 and f16 have the most general one for all class vectors.
template <class S, class F>
ABSGD_FN auto for_form(int form, F f) {
  constexpr int kAll = kAdjusts | kScales | kShifts;
  if (form == 0) return f(Constant<int, 0>{});
  if constexpr (kSame<S, float> || kSame<S, bf16>) {
    switch (form) {
      case kAdjusts:
        return f(Constant<int, kAdjusts>{});
      case kAdjusts | kScales:
        return f(Constant<int, (kAdjusts | kScales)>{});
      case kAdjusts | kShifts:
        return f(Constant<int, (kAdjusts | kShifts)>{});
    }
  }
  return f(Constant<int, kAll>{});
}

}  // namespace

int64_t paired_bytes(const LogitArgs& a) { return PairedVectors<Lanes<float>>::bytes(a.classes); }
void adjust_in_pairs(const LogitArgs& a) { PairedVectors<Lanes<float>>::write(a); }
int64_t logit_stats(const LogitArgs& a, int64_t begin, int64_t end) {
  return for_storage(a.dtype, [&](auto s, auto t) {
    using S = typename decltype(s)::type;
    using T = typename decltype(t)::type;
    return for_form<S>(a.adjust_form,
                       [&](auto form) { return logit_stats_typed<S, T, decltype(form)::value>(a, begin, end); });
  });
}
void gradient_stats(const LogitArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == Dtype::f64) return gradient_stats_typed<double>(a, begin, end);
  gradient_stats_typed<float>(a, begin, end);
}
void logit_grads(const LogitArgs& a, int64_t begin, int64_t end) {
  for_storage(a.dtype, [&](auto s, auto t) {
    using S = typename decltype(s)::type;
    using T = typename decltype(t)::type;
    for_form<S>(a.adjust_form, [&](auto form) {
      constexpr int kForm = decltype(form)::value;
      if constexpr (kSame<S, f16>)
        logit_grads_typed<S, T, float, kForm>(a, begin, end);
      else
        logit_grads_typed<S, T, S, kForm>(a, begin, end);
    });
  });
}

}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
