// The loss of one row of logits inside a kernel (MATH §2.1, §2.2):
//     1. WalkedRow walks along the classes of the row. RowSums adds up what each thread sees, then what the team sees.
//     2. finish_row makes the loss and the numbers of its gradient of these sums.
//     3. store_row stores them.
//     4. RobustRows adds the row to the sums that log s' is made of, if the loss is robust.
// The formulas are in math/losses.h. finish_row is the only function of the kernels that knows the loss.
#pragma once

#include "rows.cuh"
#include "weights.cuh"

namespace absgd {
namespace gpu {

// How the logits of a row are adjusted, and the weights of its classes (launch.h ClassWeights). Forward and backward
// share it. kGeneral: the loss has class vectors, label smoothing or soft targets. Without these it costs nothing.
template <class T, bool kGeneral_>
struct RowView {
  static constexpr bool kGeneral = kGeneral_;
  const T *s, *d;          // S and D of math/losses.h, or null
  T margin;                // M of the label
  int label;               // -1 with soft targets
  bool all_classes_weigh;  // LogitInput::all_classes_weigh
  const T* soft;           // of this row, or null
  int64_t soft_stride;
  ClassWeights<T> class_weights;

  __device__ __forceinline__ RowView(const LogitInput& a, int64_t i, int64_t y) : label(int(y)) {
    if constexpr (!kGeneral) return;
    s = static_cast<const T*>(a.adjust);
    d = s == nullptr ? nullptr : s + a.classes;
    margin = s != nullptr && y >= 0 ? s[2 * a.classes + y] : T(0);
    all_classes_weigh = a.all_classes_weigh();
    soft_stride = a.inner;
    soft = a.soft == nullptr ? nullptr : static_cast<const T*>(a.soft) + RowIndex(a, i).of_class_0(a);
    class_weights = ClassWeights<T>::of(a);
  }
  __device__ __forceinline__ bool is_soft() const { return kGeneral && soft != nullptr; }
  __device__ __forceinline__ bool weighs_all_classes() const { return kGeneral && all_classes_weigh; }
  __device__ __forceinline__ T target_margin() const { return kGeneral ? margin : T(0); }
  // a_k, without the margin of the label
  __device__ __forceinline__ T logit(T x, int k) const { return kGeneral && s != nullptr ? s[k] * x + d[k] : x; }
  __device__ __forceinline__ T slope(int k) const { return kGeneral && s != nullptr ? s[k] : T(1); }
  __device__ __forceinline__ T class_weight(int k) const {
    const T v = class_weights.v == nullptr ? T(1) : class_weights.v[k];
    return soft == nullptr ? v : (class_weights.keep * soft[k * soft_stride] + class_weights.uniform) * v;
  }
  // a_y, the adjusted logit of the label with its margin. 0 if there is no label.
  template <class S>
  __device__ __forceinline__ T target_logit(const LogitInput& a, const S* x, Label label) const {
    if (!label.valid || label.y < 0) return T(0);
    return logit(to_real(x[label.y * a.stride_class]), int(label.y)) - target_margin();
  }
  // The reference point of the weighted sums over all classes. It is finite, and near the logits of the row.
  template <class S>
  __device__ __forceinline__ T reference(const S* x, bool has_classes, T target_logit) const {
    const T near = is_soft() && has_classes ? logit(to_real(x[0]), 0) : target_logit;
    return near - near == 0 ? near : T(0);
  }
};

// The running sums over the classes that a thread has seen (an online log-sum-exp):
//     powers.max         the largest a_k, without the label
//     sumexp_others      sum of exp(a_k - powers.max), without the label
//     weighted_logits    sum of weight_k (a_k - reference), with the label; only if every class has a weight
//     weight_sum         sum of weight_k, with the label; only if every class has a weight
template <class T, bool kGeneral_>
struct RowSums {
  static constexpr bool kGeneral = kGeneral_;
  RowView<T, kGeneral> view;
  T reference;
  Powers<T> powers;
  T sumexp_others, weighted_logits, weight_sum;

  explicit __device__ __forceinline__ RowSums(const RowView<T, kGeneral>& view)
      : view(view), reference(0), powers(lowest(T())), sumexp_others(0), weighted_logits(0), weight_sum(0) {}

  __device__ __forceinline__ void raise_max(T max) {
    if (max > powers.max) {
      const Powers<T> larger(max);
      sumexp_others *= powers.to(larger);
      powers = larger;
    }
  }
  __device__ __forceinline__ void add_weighted(T a, int k) {
    const T w = view.class_weight(k);
    if (w != 0) weighted_logits += w * (a - (k == view.label ? view.target_margin() : T(0)) - reference);
    weight_sum += w;
  }
  // -inf, which stands in for the label's logit so that the label adds nothing
  static __device__ __forceinline__ T nothing() { return T(-INFINITY); }
  __device__ __forceinline__ void one(T x, int k) {
    const T a = view.logit(x, k);
    if (view.weighs_all_classes()) add_weighted(a, k);
    const T other = k == view.label ? nothing() : a;
    raise_max(other);
    sumexp_others += powers(other);
  }
  template <class S>
  __device__ __forceinline__ void pack(const uint4& in, int first, int) {
    constexpr int N = Pack<S>::N;
    T a[N];
    unpack<S>(in, a);
#pragma unroll
    for (int j = 0; j < N; ++j) a[j] = view.logit(a[j], first + j);
    if (view.weighs_all_classes())
      for (int j = 0; j < N; ++j) add_weighted(a[j], first + j);
    const unsigned target = unsigned(view.label - first);
    if (target < unsigned(N)) {  // This is the only pack of the row that holds the label.
#pragma unroll
      for (int j = 0; j < N; ++j) a[j] = target == unsigned(j) ? nothing() : a[j];
    }
    T max = a[0], sum = 0;
#pragma unroll
    for (int j = 1; j < N; ++j) max = greater(max, a[j]);
    raise_max(max);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += powers(a[j]);
    sumexp_others += sum;
  }
  // The sums of all threads of the team, in every one of them.
  template <class Team>
  __device__ __forceinline__ void combine(const Team& team) {
    const Powers<T> all(team.max(powers.max));
    sumexp_others = team.sum(sumexp_others * powers.to(all)) * all.exact();
    powers = all;
    if (!view.weighs_all_classes()) return;
    weighted_logits = team.sum(weighted_logits);
    weight_sum = team.sum(weight_sum);
  }
};

// The loss of a row, and the numbers of its gradient (math/losses.h RowGradient).
template <class T>
struct RowResult {
  T loss, max;
  bool counts;
  RowGradient<Lane<T>> gradient;
};

// Makes the loss and the gradient's numbers of the sums of a row. A row that is ignored or pruned has loss 0 and
// gradient 0.
template <class T, bool kGeneral>
__device__ __forceinline__ RowResult<T> finish_row(const LogitForward& a, Label label, T target_logit,
                                                   const RowSums<T, kGeneral>& sums) {
  using L = Lane<T>;
  const bool soft = sums.view.is_soft();
  const T max = soft ? sums.powers.max : greater(sums.powers.max, target_logit);
  const T max_minus_target = soft ? T(0) : max - target_logit;
  const Row<L> row{max_minus_target, sums.sumexp_others * exp_below(sums.powers.max - max),
                   soft ? T(0) : L::exp(-max_minus_target)};
  const bool prunes = a.loss.least < kLargest;
  RowResult<T> out{0, max, label.valid && !(prunes && row.nll() >= T(a.loss.least)) /* false if pruned */, {0, 0, 0}};
  if (!out.counts) return out;
  T c = 0;
  if (!soft) {
    const T w = a.class_weight == nullptr ? T(1) : static_cast<const T*>(a.class_weight)[label.y];
    for_loss<L, T>(a.loss, [&](const auto& functor) {
      out.loss = functor.loss(row, w);
      c = functor.coefficient(row, w);
    });
  }
  const bool weighs_all = sums.view.weighs_all_classes();
  const T smoothing_coef = weighs_all ? sums.view.class_weights.smoothing_coef(soft) : T(0);
  // sum_k weight_k (-log p_k) = (log_total + max - reference) sum weight - sum_k weight_k (a_k - reference)
  if (weighs_all)
    out.loss += smoothing_coef * ((row.log_total() + (max - sums.reference)) * sums.weight_sum - sums.weighted_logits);
  out.gradient = RowGradient<L>::of(row, c, smoothing_coef, sums.weight_sum);
  return out;
}

// Stores the result of a row, by one of its threads. The sample weight t multiplies the gradient's numbers. It may be
// anything in a row that does not count.
template <class T>
__device__ __forceinline__ void store_row(const LogitForward& a, int64_t i, const RowResult<T>& row, T t) {
  if (!row.counts) t = 0;
  static_cast<T*>(a.losses)[i] = row.loss;
  if (a.valid != nullptr) static_cast<T*>(a.valid)[i] = T(row.counts);
  if (a.stats == nullptr) return;
  const int64_t rows = a.rows();
  T* stats = static_cast<T*>(a.stats) + i;
  stats[0] = row.max;
  stats[rows] = row.gradient.scale * t;
  stats[2 * rows] = row.gradient.at_label * t;
  stats[3 * rows] = row.gradient.smoothing_coef * t;
}

// One row after the walk along its classes: its label, and its sums, which are complete in all threads of its team.
template <class S, class T, Walk walk, bool kGeneral>
struct WalkedRow {
  using Sums = RowSums<T, kGeneral>;
  int64_t i;
  const S* x;
  Label label;
  T target_logit;
  Sums sums;

  // seen(sums) returns the object that the walk calls. It passes every value on to `sums`, and may also keep it.
  template <class F>
  __device__ __forceinline__ WalkedRow(const LogitForward& a, const Place<walk>& place, int width, F seen)
      : i(place.row), x(row_of<S>(a, i)), label{0, false}, target_logit(0), sums(RowView<T, kGeneral>(a, i, -1)) {
    const RawLabel raw(a, i);
    auto begin = [&] {
      label = raw.checked(a, a.report, i, place.writes());
      label.valid &= place.inside;
      sums.view = RowView<T, kGeneral>(a, i, label.y);
      target_logit = sums.view.target_logit(a, x, label);
      sums.reference = sums.view.reference(x, label.valid && a.classes > 0, target_logit);
      return label.valid;
    };
    if constexpr (walk == Walk::columns) {
      along_strided_classes(x, begin() ? int(a.classes) : 0, a.stride_class, sums);
      sums.sumexp_others *= sums.powers.exact();
    } else {
      const auto team = team_of<walk>(place.lane, width);
      auto&& walker = seen(sums);
      along_adjacent_classes(x, place.inside ? int(a.classes) : 0, team, StartInMemory<S>(), begin, walker);
      sums.combine(team);
    }
  }
  __device__ __forceinline__ RowResult<T> finish(const LogitForward& a) const {
    return finish_row(a, label, target_logit, sums);
  }
};

// The rows of a block as the robust loss sees them: the z of each row, and the sums of all.
template <class T>
struct RobustRows {
  const Robust& a;
  T lam, z_max;
  RunningSums<T> sums;

  explicit __device__ __forceinline__ RobustRows(const Robust& a) : RobustRows(a, lam_of(a)) {}
  __device__ __forceinline__ RobustRows(const Robust& a, double lam) : a(a), lam(T(lam)), z_max(z_max_of<T>(a)) {}
  __device__ __forceinline__ T sample_weight(int64_t i) const {
    return a.sample_weight == nullptr ? T(1) : static_cast<const T*>(a.sample_weight)[i];
  }
  // The score of a row. It is loaded before the walk along the row, and used after it.
  __device__ __forceinline__ T score(int64_t i) const {
    return a.scores == nullptr ? T(0) : static_cast<const T*>(a.scores)[i];
  }
  __device__ __forceinline__ Sample<T> sample(const RowResult<T>& row, T score) const {
    return {row.loss, a.scores == nullptr ? row.loss : score, row.counts, lam, T(a.z_limit), z_max};
  }
  // Stores the sums of this block. Returns whether it is the last block of the launch; then its thread 0 gets the sums
  // of all blocks in `total`.
  __device__ __forceinline__ bool finish(unsigned* ticket, BatchSums& total) {
    LossSums<T>* const parts = static_cast<LossSums<T>*>(a.sums);
    const BatchSums own = block_sums<T>(sums);
    if (threadIdx.x == 0) parts[blockIdx.x] = narrow<T>(own);
    if (!is_last_block(ticket)) return false;
    total = launch_sums(parts, int(gridDim.x));
    return true;
  }
};

}  // namespace gpu
}  // namespace absgd
