// The kernels over a vector of losses: robust weights, rectified weights, and the scaling of gradients.
//
// Robust weights (MATH §1) take three kernels, because log s' must be known before the first weight:
//     1. robust_block_stats reads the losses and finds max z and sum of exp(z - max) of each block of kBlock losses.
//     2. robust_finish adds up the blocks in their order, and settles log s' and the next state.
//     3. robust_apply reads the losses again, writes weights and factors, and sums the loss of each block.
// With NormalizerKind::target, lambda comes before them: target_range and target_distances read the losses, and
// target_sums the distances as often as the search needs.
// robust_partial_stats and robust_settle take the place of robust_finish where several parts share a normaliser. The
// vjp of the weights takes two kernels: robust_dot sums W_i d_i of each block, and robust_vjp writes the gradient. This
// file is compiled once for each instruction set.
#include "kernels.h"
#include "lanes.h"

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {
namespace {

// ---- robust weights ------------------------------------------------------------------------------------------------

// Loads N values from index i on. Lanes past `end` are `fill`.
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

// The losses [first, last) of one block.
struct Block {
  int64_t first, last;

  ABSGD_FN Block(const RobustArgs& a, int64_t index)
      : first(index * kBlock), last(smaller(index * kBlock + kBlock, a.count)) {}
};

// One register of losses, their z, and which of them are valid and finite.
template <class L>
struct Scores {
  typename L::V loss, z;
  typename L::I valid, finite;

  ABSGD_FN Scores(const RobustArgs& a, int64_t i, int64_t end) {
    using T = typename L::Scalar;
    const T* losses = static_cast<const T*>(a.losses);
    loss = load_some<L>(losses, i, end, 0);
    const typename L::V score = a.scores == nullptr ? loss : load_some<L>(static_cast<const T*>(a.scores), i, end, 0);
    z = (score - L::set(T(a.shift))) / L::set(T(a.lam));
    valid = load_valid<L>(a.valid, i, end);
    const typename L::V limit = L::set(T(a.z_limit));
    finite = valid & is_usable<L>(loss, score, z, limit) & (z <= L::set(T(a.z_max)));
  }
};

template <class T>
void block_stats_typed(const RobustArgs& a, BlockStats* out, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  using V = typename L::V;
  const V lowest = L::set(T(-__builtin_inf()));
  for (int64_t b = begin; b < end; ++b) {
    const Block block(a, b);
    V max = lowest;
    typename L::I finite = L::set_int(0), valid = L::set_int(0);
    for (int64_t i = block.first; i < block.last; i += L::N) {
      const Scores<L> s(a, i, block.last);
      max = L::max(max, L::select(s.finite, s.z, lowest));
      finite -= s.finite;  // A true comparison is -1.
      valid -= s.valid;
    }
    BlockStats stats{double(L::highest(max)), 0.0, 0, 0};
    for (int j = 0; j < L::N; ++j) {
      stats.finite += finite[j];
      stats.nonfinite += valid[j] - finite[j];
    }
    if (stats.finite > 0) {
      V sum = L::set(0);
      for (int64_t i = block.first; i < block.last; i += L::N) {
        const Scores<L> s(a, i, block.last);
        sum += L::select(s.finite, L::exp(s.z - L::set(T(stats.max))), L::set(0));
      }
      stats.sum = double(L::sum(sum));
    }
    out[b] = stats;
  }
}

// The stats of all blocks together: log sum exp(z) = max + log(sum).
BlockStats all_of(const RobustArgs& a, const BlockStats* blocks) {
  using L = StateLane;
  BlockStats out{-__builtin_inf(), 0, 0, 0};
  for (int64_t b = 0; b < blocks_of(a); ++b) {
    out.finite += blocks[b].finite;
    out.nonfinite += blocks[b].nonfinite;
    if (blocks[b].finite > 0 && blocks[b].max > out.max) out.max = blocks[b].max;
  }
  for (int64_t b = 0; b < blocks_of(a); ++b)
    if (blocks[b].finite > 0) out.sum += blocks[b].sum * L::exp(blocks[b].max - out.max);
  return out;
}

template <class T>
void robust_apply_typed(const RobustArgs& a, const WeightUpdate& o, double* loss_sums, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  using V = typename L::V;
  const T* sample_weight = static_cast<const T*>(a.sample_weight);
  const V nan = L::set(T(__builtin_nan(""))), zero = L::set(0);
  const auto numbers = RobustNumbers<L>::template of<T>(Weighing::of(a.lam, a.mix, a.max_weight, o));
  for (int64_t b = begin; b < end; ++b) {
    const Block block(a, b);
    V sum = zero;
    for (int64_t i = block.first; i < block.last; i += L::N) {
      const Scores<L> s(a, i, block.last);
      auto where_finite = [&](V x) { return L::select(s.finite, x, L::select(s.valid, nan, zero)); };
      const V w = where_finite(numbers.weight(s.z));
      const V t = sample_weight == nullptr ? L::set(1) : load_some<L>(sample_weight, i, block.last, 0);
      const V factor = where_finite(numbers.factor(w, t));
      sum += L::select(s.valid, factor * s.loss, zero);
      store_some<L>(static_cast<T*>(a.weights), i, block.last, w);
      if (a.factor != nullptr) store_some<L>(static_cast<T*>(a.factor), i, block.last, factor);
    }
    loss_sums[b] = double(L::sum(sum));
  }
}

// ---- the lambda of TargetESS (math/target.h) -----------------------------------------------------------------------

// The scores of one register; they are finite if the loss is, too.
template <class L>
struct TargetScores {
  typename L::V score;
  typename L::I valid, finite;

  ABSGD_FN TargetScores(const RobustArgs& a, int64_t i, int64_t end) {
    using T = typename L::Scalar;
    const typename L::V loss = load_some<L>(static_cast<const T*>(a.losses), i, end, 0);
    score = a.scores == nullptr ? loss : load_some<L>(static_cast<const T*>(a.scores), i, end, 0);
    valid = load_valid<L>(a.valid, i, end);
    finite = valid & (score - score == L::set(0)) & (loss - loss == L::set(0));
  }
};

template <class T>
void target_range_typed(const RobustArgs& a, TargetRange* out, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  const typename L::V inf = L::set(T(__builtin_inf()));
  for (int64_t b = begin; b < end; ++b) {
    const Block block(a, b);
    typename L::V lowest = inf, highest = -inf;
    typename L::I finite = L::set_int(0), valid = L::set_int(0);
    for (int64_t i = block.first; i < block.last; i += L::N) {
      const TargetScores<L> s(a, i, block.last);
      lowest = L::min(lowest, L::select(s.finite, s.score, inf));
      highest = L::max(highest, L::select(s.finite, s.score, -inf));
      finite -= s.finite;  // A true comparison is -1.
      valid -= s.valid;
    }
    TargetRange range{-double(L::highest(-lowest)), double(L::highest(highest)), 0, 0};
    for (int j = 0; j < L::N; ++j) {
      range.finite += finite[j];
      range.nonfinite += valid[j] - finite[j];
    }
    out[b] = range;
  }
}

template <class T>
void target_distances_typed(const RobustArgs& a, const TargetDistances& to, TargetMoments* out, int64_t begin,
                            int64_t end) {
  using L = Lanes<T>;
  using V = typename L::V;
  const V extreme = L::set(T(to.extreme)), unit = L::set(T(to.unit)), inf = L::set(T(__builtin_inf()));
  for (int64_t b = begin; b < end; ++b) {
    const Block block(a, b);
    V first = L::set(0), second = L::set(0);
    for (int64_t i = block.first; i < block.last; i += L::N) {
      const TargetScores<L> s(a, i, block.last);
      const V d = to.share > 0 ? extreme - s.score : s.score - extreme;
      const V scaled = L::select(s.finite, d * unit, L::set(0));
      first += scaled;
      second += scaled * scaled;
      store_some<L>(static_cast<T*>(to.distances), i, block.last, L::select(s.finite, d, inf));
    }
    out[b] = {double(L::sum(first)), double(L::sum(second))};
  }
}

template <class T>
void target_sums_typed(const RobustArgs& a, const T* distances, double u, TargetSums<double>* out, int64_t begin,
                       int64_t end) {
  using L = Lanes<T>;
  const typename L::V by = L::set(T(u)), zero = L::set(0);
  for (int64_t b = begin; b < end; ++b) {
    const Block block(a, b);
    TargetSums<typename L::V> sums{zero, zero, zero, zero};
    for (int64_t i = block.first; i < block.last; i += L::N)
      sums.template add<L>(load_some<L>(distances, i, block.last, T(__builtin_inf())), by);
    out[b] = {double(L::sum(sums.s1)), double(L::sum(sums.s2)), double(L::sum(sums.d1)), double(L::sum(sums.d2))};
  }
}

// Sums W_i d_i of each block. A loss that is not finite has weight NaN, and takes no part.
template <class T>
void robust_dot_typed(const RobustArgs& a, const void* upstream, double* dot_sums, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  using V = typename L::V;
  for (int64_t b = begin; b < end; ++b) {
    const Block block(a, b);
    V sum = L::set(0);
    for (int64_t i = block.first; i < block.last; i += L::N) {
      const V w = load_some<L>(static_cast<const T*>(a.weights), i, block.last, 0);
      sum += L::select(w == w, w * load_some<L>(static_cast<const T*>(upstream), i, block.last, 0), L::set(0));
    }
    dot_sums[b] = double(L::sum(sum));
  }
}

template <class T>
void robust_vjp_typed(const RobustArgs& a, const VjpArgs& g, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  for (int64_t b = begin; b < end; ++b) {
    const Block block(a, b);
    for (int64_t i = block.first; i < block.last; i += L::N)
      store_some<L>(static_cast<T*>(g.out), i, block.last,
                    robust_weight_vjp<L>(load_some<L>(static_cast<const T*>(a.weights), i, block.last, 0),
                                         load_some<L>(static_cast<const T*>(g.upstream), i, block.last, 0),
                                         L::set(T(g.dot)), L::set(T(g.upstream_log_s)), L::set(T(g.dlog_s)),
                                         L::set(T(g.dlog_s_state)), L::set(T(1 / a.lam))));
  }
}

// ---- rectified weights ---------------------------------------------------------------------------------------------

template <class T>
void rectified_typed(const T* products, int64_t count, T* weights) {
  using L = Lanes<T>;
  using Wide = Lanes<double>;
  using Narrow = Lanes<T, int(sizeof(T)) * Wide::N>;  // It has as many values as Wide.
  RectifiedSum<Wide> sum{Wide::set(0), Wide::set(0)};
  for (int64_t i = 0; i < count; i += Wide::N)
    sum.add(__builtin_convertvector(load_some<Narrow>(products, i, count, 0), typename Wide::V));
  const auto numbers = RectifiedNumbers<L>::template of<T>(Wide::sum(sum.plain), Wide::sum(sum.scaled));
  for (int64_t i = 0; i < count; i += L::N)
    store_some<L>(weights, i, count, numbers.weight(load_some<L>(products, i, count, 0)));
}

// ---- gradient scaling ----------------------------------------------------------------------------------------------

// out_i = in_i * factor(i) for `count` elements. factor(i) gives the factors of the register from i on.
template <class L, class S, class G, class F>
ABSGD_FN void scale_slice(const S* in, G* out, int64_t count, const F& factor) {
  int64_t i = 0;
  for (; i + L::N <= count; i += L::N) L::store(out + i, L::load(in + i) * factor(i));
  if (i == count) return;
  S part[L::N] = {};
  G done[L::N];
  __builtin_memcpy(part, in + i, size_t(count - i) * sizeof(S));
  L::store(done, L::load(part) * factor(i));
  __builtin_memcpy(out + i, done, size_t(count - i) * sizeof(G));
}

template <class S, class T, class G>
void scale_typed(const ScaleArgs& a, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  const T* upstream = static_cast<const T*>(a.upstream);
  G* out = static_cast<G*>(a.grad);
  const S* in = static_cast<const S*>(a.source);
  // With inner = 1 a row of classes has one factor. Otherwise every element of a slice has its own factor.
  if (upstream == nullptr) {
    const int64_t at = begin * a.inner;
    return scale_slice<L>(in + at, out + at, (end - begin) * a.inner, [&](int64_t) { return L::set(T(a.scalar)); });
  }
  for (int64_t slice = begin; slice < end;) {
    const int64_t b = slice / a.classes;
    if (a.inner == 1) {
      const int64_t stop = smaller((b + 1) * a.classes, end);
      scale_slice<L>(in + slice, out + slice, stop - slice, [&](int64_t) { return L::set(upstream[b]); });
      slice = stop;
    } else {
      const int64_t at = slice * a.inner;
      const T* u = upstream + b * a.inner;
      scale_slice<L>(in + at, out + at, a.inner, [&](int64_t i) { return load_some<L>(u, i, a.inner, 0); });
      ++slice;
    }
  }
}

}  // namespace

void robust_block_stats(const RobustArgs& a, BlockStats* out, int64_t begin, int64_t end) {
  for_real(a.dtype, [&](auto t) { block_stats_typed<typename decltype(t)::type>(a, out, begin, end); });
}
void target_range(const RobustArgs& a, TargetRange* out, int64_t begin, int64_t end) {
  for_real(a.dtype, [&](auto t) { target_range_typed<typename decltype(t)::type>(a, out, begin, end); });
}
void target_distances(const RobustArgs& a, const TargetDistances& to, TargetMoments* out, int64_t begin, int64_t end) {
  for_real(a.dtype, [&](auto t) { target_distances_typed<typename decltype(t)::type>(a, to, out, begin, end); });
}
TargetSolver target_solver(Dtype dtype, const TargetDistances& to, const TargetRange& range, const TargetMoments& m) {
  const double n = double(range.finite);
  return for_real(dtype, [&](auto t) {
    return TargetSolver::of<StateLane, typename decltype(t)::type>(to.share, range, m.first / n, m.second / n);
  });
}
void target_sums(const RobustArgs& a, const void* distances, double u, TargetSums<double>* out, int64_t begin,
                 int64_t end) {
  for_real(a.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    target_sums_typed(a, static_cast<const T*>(distances), u, out, begin, end);
  });
}
bool target_next(TargetSolver& solver, const TargetSums<double>& sums) { return solver.next<StateLane>(sums); }
WeightUpdate robust_finish(const RobustArgs& a, const BlockStats* blocks, double log_s) {
  const BlockStats all = all_of(a, blocks);
  if (a.normalizer_kind == NormalizerKind::target)
    return target_weight_update<StateLane>(a, log_s, all.max, all.sum, all.finite, all.nonfinite);
  return next_weight_update<StateLane>(a, log_s, all.max, all.sum, all.finite, all.nonfinite);
}
PartialStats robust_partial_stats(const RobustArgs& a, const BlockStats* blocks) {
  const BlockStats all = all_of(a, blocks);
  return {all.finite > 0 ? all.max + StateLane::log(all.sum) : all.max, double(all.finite), double(all.nonfinite)};
}
SettleResult robust_settle(const SettleArgs& a) {
  using L = StateLane;
  const PartialStats t = add_partial_stats<L>(a.partials, a.count, a.stride);
  const WeightUpdate o = next_weight_update<L>(a.config, a.log_s, t.log_sum, 1, int64_t(t.count), int64_t(t.nonfinite));
  return {normalizer_of<L>(o, t, a.grad_multiplier, a.reference), o.new_log_s};
}
void robust_apply(const RobustArgs& a, const WeightUpdate& o, double* loss_sums, int64_t begin, int64_t end) {
  for_real(a.dtype, [&](auto t) { robust_apply_typed<typename decltype(t)::type>(a, o, loss_sums, begin, end); });
}
void robust_dot(const RobustArgs& a, const void* upstream, double* dot_sums, int64_t begin, int64_t end) {
  for_real(a.dtype, [&](auto t) { robust_dot_typed<typename decltype(t)::type>(a, upstream, dot_sums, begin, end); });
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

}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
