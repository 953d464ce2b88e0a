// Losses on logits and their gradients. The formulas are in math.h; `finish_row` is the only function that knows the
// loss, and its gradient is a walk over the row with the four numbers of RowGradient.
//
// Three ways to walk over rows: with adjacent classes a row is shared by some lanes of a warp (`WarpTeam`) or by a
// whole block (`BlockTeam`), each thread reading 16 bytes at a time; with classes that lie apart (a class stride other
// than 1: transposed logits, (B, C, d1, ...)) neighbouring threads take neighbouring rows (`kColumns`).
#include <atomic>

#include "weights.cuh"

namespace absgd {
namespace gpu {
namespace {

enum class Walk : int { lanes = 0, block = 1, columns = 2 };

constexpr int threads_of(Walk walk) { return walk == Walk::columns ? 128 : 256; }
// Blocks of 256 threads in a multiprocessor that the registers must allow: of 128 registers a thread, and of 80 where
// long rows are read in plain float, so that 48 KB are under way (with fewer registers some kernels spill).
template <class T>
constexpr int blocks_of(Walk walk, bool reads_only = false) {
  return (reads_only && walk == Walk::block && sizeof(T) == 4 ? 3 : 2) * 256 / threads_of(walk);
}
constexpr int kInFlight = 4;  // 16-byte loads of a thread before the first is used (see walk_adjacent)

struct Label {
  int64_t y;
  bool valid;
};

// What stands in memory of a row's label and mask, to be read long before it is looked at.
struct RawLabel {
  int64_t y;
  uint8_t on;

  __device__ __forceinline__ RawLabel(const LogitInput& a, int64_t i) {
    y = a.soft != nullptr ? -1
        : a.target_int64  ? static_cast<const long long*>(a.target)[i]
                          : static_cast<const int*>(a.target)[i];
    on = a.mask == nullptr ? 1 : a.mask[i];
  }
  // By one thread of a row (`first`) the label is also checked for the report.
  __device__ __forceinline__ Label checked(const LogitInput& a, LabelReport* report, int64_t i, bool first) const {
    if (a.soft != nullptr) return {-1, on != 0};
    if (y == a.ignore_index) return {0, false};
    if (y < 0 || y >= a.classes) {
      if (first && report != nullptr) {  // two stores of 16 bytes: rows that report at once do not mix
        *reinterpret_cast<longlong2*>(&report->label) = longlong2{(long long)y, (long long)i};
        __threadfence_system();  // `found` is seen no sooner than what it stands for
        *reinterpret_cast<longlong2*>(&report->classes) = longlong2{(long long)a.classes, 1};
      }
      return {0, false};
    }
    return {y, on != 0};
  }
};

// Row i as (batch, inner): a division of 64 bits is 60 instructions, and most logits have no inner dimensions.
struct Spot {
  int64_t batch, inner;
  __device__ __forceinline__ Spot(const LogitInput& a, int64_t i)
      : batch(a.inner == 1 ? i : i / a.inner), inner(a.inner == 1 ? 0 : i - batch * a.inner) {}
  // in (batch, classes, inner) contiguous
  __device__ __forceinline__ int64_t of_class_0(const LogitInput& a) const {
    return batch * a.classes * a.inner + inner;
  }
};

// ---- walking over a row --------------------------------------------------------------------------------------------

// Where the 16-byte packs of a row are read from.
template <class S>
struct FromMemory {
  const S* packs;
  __device__ __forceinline__ uint4 operator()(int p) const { return load_raw(packs + p * Pack<S>::N); }
};

// f.pack(values, first class, number of the pack) for N adjacent classes at a time, f.one(value, class) for those
// before the first multiple of 16 bytes and after the last. `from(first pack)` makes the source of the packs. `begin`
// is asked once, when the first loads are under way, whether the row counts, which may hang on its label; else nothing
// is called.
template <class S, class Team, class From, class Begin, class F>
__device__ __forceinline__ void walk_adjacent(const S* x, int classes, const Team& team, From from, Begin begin, F& f) {
  constexpr int N = Pack<S>::N, kAtOnce = F::kGeneral ? 2 : kInFlight;  // class vectors take the registers
  const int boundary = to_boundary(x), head = boundary < classes ? boundary : classes;
  const int packs = (classes - head) / N, width = team.width;
  const auto source = from(x + head);
  uint4 in[kAtOnce];
  int p = team.lane;
  auto load = [&] {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (p + u * width < packs) in[u] = source(p + u * width);
  };
  load();
  if (!begin()) return;
  for (int k = team.lane; k < head; k += width) f.one(to_real(x[k]), k);
  while (p + (kAtOnce - 1) * width < packs) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) f.template pack<S>(in[u], head + (p + u * width) * N, p + u * width);
    p += kAtOnce * width;
    load();
  }
  if constexpr (kAtOnce > 1) {
#pragma unroll
    for (int u = 0; u < kAtOnce - 1; ++u)  // the last of them would have been in the loop
      if (p + u * width < packs) f.template pack<S>(in[u], head + (p + u * width) * N, p + u * width);
  }
  for (int k = head + packs * N + team.lane; k < classes; k += width) f.one(to_real(x[k]), k);
}
template <class S>
struct StartInMemory {
  __device__ __forceinline__ FromMemory<S> operator()(const S* packs) const { return {packs}; }
};

template <class S, class F>
__device__ __forceinline__ void walk_apart(const S* x, int classes, int64_t stride, F& f) {
  int k = 0;
  for (; k + kInFlight <= classes; k += kInFlight) {
    S in[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) in[u] = x[(k + u) * stride];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) f.one(to_real(in[u]), k + u);
  }
  for (; k < classes; ++k) f.one(to_real(x[k * stride]), k);
}

// ---- forward -------------------------------------------------------------------------------------------------------

// What a row's logits go through, and what its classes weigh (launch.h ClassShares): the same in both directions.
// kGeneral: the loss has class vectors, label smoothing or soft targets; without, none of this costs anything.
template <class T, bool kGeneral_>
struct RowView {
  static constexpr bool kGeneral = kGeneral_;
  const T *s, *d;  // S and D of math.h, or null
  T margin;        // M of the label
  int label;       // -1 with soft targets
  bool spreads;    // LogitInput::spreads
  const T* soft;   // of this row, or null
  int64_t soft_stride;
  ClassShares<T> shares;

  __device__ __forceinline__ RowView(const LogitInput& a, int64_t i, int64_t y) : label(int(y)) {
    if constexpr (!kGeneral) return;
    s = static_cast<const T*>(a.adjust);
    d = s == nullptr ? nullptr : s + a.classes;
    margin = s != nullptr && y >= 0 ? s[2 * a.classes + y] : T(0);
    spreads = a.spreads();
    soft_stride = a.inner;
    soft = a.soft == nullptr ? nullptr : static_cast<const T*>(a.soft) + Spot(a, i).of_class_0(a);
    shares = ClassShares<T>::of(a);
  }
  __device__ __forceinline__ bool is_soft() const { return kGeneral && soft != nullptr; }
  __device__ __forceinline__ bool has_shares() const { return kGeneral && spreads; }
  __device__ __forceinline__ T own_margin() const { return kGeneral ? margin : T(0); }
  // a_k, before the label's margin
  __device__ __forceinline__ T logit(T x, int k) const { return kGeneral && s != nullptr ? s[k] * x + d[k] : x; }
  __device__ __forceinline__ T slope(int k) const { return kGeneral && s != nullptr ? s[k] : T(1); }
  __device__ __forceinline__ T share(int k) const {
    const T v = shares.v == nullptr ? T(1) : shares.v[k];
    return soft == nullptr ? v : (shares.keep * soft[k * soft_stride] + shares.uniform) * v;
  }
};

// Running sums over the classes a thread has seen (online log-sum-exp), the label apart: rest = sum exp(a_k - max) with
// the max of `powers`; where every class has a share, others = sum weight_k (a_k - reference) and total = sum weight_k,
// label and all.
template <class T, bool kGeneral_>
struct RowSums {
  static constexpr bool kGeneral = kGeneral_;
  RowView<T, kGeneral> view;
  T reference;
  Powers<T> powers;
  T rest, others, total;

  explicit __device__ __forceinline__ RowSums(const RowView<T, kGeneral>& view)
      : view(view), reference(0), powers(lowest(T())), rest(0), others(0), total(0) {}

  __device__ __forceinline__ void raise(T top) {
    if (top > powers.max) {
      const Powers<T> larger(top);
      rest *= powers.to(larger);
      powers = larger;
    }
  }
  __device__ __forceinline__ void spread(T a, int k) {
    const T w = view.share(k);
    if (w != 0) others += w * (a - (k == view.label ? view.own_margin() : T(0)) - reference);
    total += w;
  }
  // -inf in place of the label: it counts for nothing
  static __device__ __forceinline__ T nothing() { return T(-INFINITY); }
  __device__ __forceinline__ void one(T x, int k) {
    const T a = view.logit(x, k);
    if (view.has_shares()) spread(a, k);
    const T other = k == view.label ? nothing() : a;
    raise(other);
    rest += powers(other);
  }
  template <class S>
  __device__ __forceinline__ void pack(const uint4& in, int first, int) {
    constexpr int N = Pack<S>::N;
    T a[N];
    unpack<S>(in, a);
#pragma unroll
    for (int j = 0; j < N; ++j) a[j] = view.logit(a[j], first + j);
    if (view.has_shares())
      for (int j = 0; j < N; ++j) spread(a[j], first + j);
    const unsigned own = unsigned(view.label - first);
    if (own < unsigned(N)) {  // the one pack of the row that holds the label
#pragma unroll
      for (int j = 0; j < N; ++j) a[j] = own == unsigned(j) ? nothing() : a[j];
    }
    T top = a[0], sum = 0;
#pragma unroll
    for (int j = 1; j < N; ++j) top = greater(top, a[j]);
    raise(top);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += powers(a[j]);
    rest += sum;
  }
  // What all threads of the team have seen together.
  template <class Team>
  __device__ __forceinline__ void combine(const Team& team) {
    const Powers<T> all(team.max(powers.max));
    rest = team.sum(rest * powers.to(all)) * all.exact();
    powers = all;
    if (!view.has_shares()) return;
    others = team.sum(others);
    total = team.sum(total);
  }
};

// A row's loss, and the numbers of its gradient (math.h RowGradient).
template <class T>
struct RowResult {
  T loss, max;
  bool counts;
  RowGradient<Lane<T>> gradient;
};

template <class T, bool kGeneral>
__device__ __forceinline__ RowResult<T> finish_row(const LogitForward& a, Label label, T own_logit,
                                                   const RowSums<T, kGeneral>& sums) {
  using L = Lane<T>;
  const bool soft = sums.view.is_soft();
  const T max = soft ? sums.powers.max : greater(sums.powers.max, own_logit);
  const T gap = soft ? T(0) : max - own_logit;
  const Row<L> row{gap, sums.rest * exp_below(sums.powers.max - max), soft ? T(0) : L::exp(-gap)};
  const bool prunes = a.loss.least < kLargest;
  RowResult<T> out{
      0, max, label.valid && !(prunes && row.nll() >= T(a.loss.least)) /* pruned rows do not */, {0, 0, 0}};
  if (!out.counts) return out;
  T c = 0;
  if (!soft) {
    const T w = a.class_weight == nullptr ? T(1) : static_cast<const T*>(a.class_weight)[label.y];
    for_loss<L, T>(a.loss, [&](const auto& functor) {
      out.loss = functor.loss(row, w);
      c = functor.coefficient(row, w);
    });
  }
  const T spread = sums.view.has_shares() ? sums.view.shares.spread(soft) : T(0);
  // sum_k weight_k (-log p_k) = (log_total + max - reference) sum weight - sum_k weight_k (a_k - reference)
  if (sums.view.has_shares())
    out.loss += spread * ((row.log_total() + (max - sums.reference)) * sums.total - sums.others);
  out.gradient = RowGradient<L>::of(row, c, spread, sums.total);
  return out;
}

// By one thread of a row. t: its sample weight, which goes into the gradient (and may be anything where the row does
// not count).
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
  stats[3 * rows] = row.gradient.spread * t;
}

// The reference point of the sums over all classes: near the row's logits, and finite.
template <class T>
__device__ __forceinline__ T reference_for(T own_logit) {
  return own_logit - own_logit == 0 ? own_logit : T(0);
}

template <class S>
__device__ __forceinline__ const S* row_of(const LogitInput& a, int64_t i) {
  const Spot spot(a, i);
  return static_cast<const S*>(a.logits) + spot.batch * a.stride_batch + spot.inner * a.stride_inner;
}

// The rows that a block works on together, and which of them this thread has. `width`: lanes that share a row
// (Walk::lanes).
template <Walk walk>
struct Place {
  int64_t row;
  int lane;
  bool inside;

  static __device__ __forceinline__ int64_t each(int width) {
    return walk == Walk::block ? 1 : walk == Walk::columns ? blockDim.x : blockDim.x / width;
  }
  __device__ __forceinline__ Place(int64_t rows, int width, int64_t tile) {
    lane = walk == Walk::columns ? 0 : walk == Walk::block ? threadIdx.x : threadIdx.x % width;
    row = tile * each(width) + (walk == Walk::columns ? threadIdx.x : walk == Walk::block ? 0 : threadIdx.x / width);
    inside = row < rows;
    if (!inside) row = rows - 1;  // goes along with the shuffles, reads and writes nothing of the row
  }
};

// f(place) for every tile of this block, which walks over all tiles with the stride of the launch: so a launch has no
// more blocks than the chip holds, and leaves as few sums.
template <Walk walk, class F>
__device__ __forceinline__ void for_tiles(const LogitForward& a, int width, F f) {
  const int64_t rows = a.rows(), each = Place<walk>::each(width), tiles = (rows + each - 1) / each;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) f(Place<walk>(rows, width, tile));
}

// The logit of the label, adjusted and less its margin.
template <class S, class T, bool kGeneral>
__device__ __forceinline__ T own_logit_of(const LogitInput& a, const S* x, Label label,
                                          const RowView<T, kGeneral>& view) {
  if (!label.valid || label.y < 0) return T(0);
  return view.logit(to_real(x[label.y * a.stride_class]), int(label.y)) - view.own_margin();
}

// The team of a row.
template <Walk walk>
__device__ __forceinline__ auto team_of(int lane, int width) {
  if constexpr (walk == Walk::block)
    return BlockTeam::here();
  else
    return WarpTeam{lane, width};
}

// One row while it is walked over: its label, and its sums, complete in all threads of its team.
template <class S, class T, Walk walk, bool kGeneral>
struct RowAtWork {
  using Sums = RowSums<T, kGeneral>;
  int64_t i;
  const S* x;
  Label label;
  T own_logit;
  Sums sums;

  // seen(sums): what walks over the packs, to see them too.
  template <class F>
  __device__ __forceinline__ RowAtWork(const LogitForward& a, const Place<walk>& place, int width, F seen)
      : i(place.row), x(row_of<S>(a, i)), label{0, false}, own_logit(0), sums(RowView<T, kGeneral>(a, i, -1)) {
    const RawLabel raw(a, i);
    auto begin = [&] {
      label = raw.checked(a, a.report, i, place.inside && place.lane == 0);
      label.valid &= place.inside;
      sums.view = RowView<T, kGeneral>(a, i, label.y);
      own_logit = own_logit_of<S, T, kGeneral>(a, x, label, sums.view);
      const bool first = sums.view.is_soft() && label.valid && a.classes > 0;
      sums.reference = reference_for(first ? sums.view.logit(to_real(x[0]), 0) : own_logit);
      return label.valid;
    };
    if constexpr (walk == Walk::columns) {
      walk_apart(x, begin() ? int(a.classes) : 0, a.stride_class, sums);
      sums.rest *= sums.powers.exact();
    } else {
      const auto team = team_of<walk>(place.lane, width);
      auto walker = seen(sums);
      walk_adjacent(x, place.inside ? int(a.classes) : 0, team, StartInMemory<S>(), begin, walker);
      sums.combine(team);
    }
  }
  __device__ __forceinline__ RowResult<T> finish(const LogitForward& a) const {
    return finish_row(a, label, own_logit, sums);
  }
};
template <class Sums>
struct Only {  // nothing but the sums
  static constexpr bool kGeneral = Sums::kGeneral;
  Sums& sums;
  template <class T>
  __device__ __forceinline__ void one(T x, int k) {
    sums.one(x, k);
  }
  template <class S>
  __device__ __forceinline__ void pack(const uint4& in, int first, int p) {
    sums.template pack<S>(in, first, p);
  }
};

// What the robust loss makes of the rows of a block: z of each, and the sums of all.
template <class T>
struct RobustRows {
  const Robust& a;
  T lam, top;
  RunningSums<T> sums;

  __device__ __forceinline__ RobustRows(const Robust& a) : a(a), lam(lam_of(a)), top(top_of<T>(a)) {}
  __device__ __forceinline__ T sample_weight(int64_t i) const {
    return a.sample_weight == nullptr ? T(1) : static_cast<const T*>(a.sample_weight)[i];
  }
  // read before the row is walked over, used after
  __device__ __forceinline__ T score(int64_t i) const {
    return a.scores == nullptr ? T(0) : static_cast<const T*>(a.scores)[i];
  }
  __device__ __forceinline__ Sample<T> sample(const RowResult<T>& row, T score) const {
    return {row.loss, a.scores == nullptr ? row.loss : score, row.counts, lam, T(a.z_limit), top};
  }
  // Whether this is the last block of the launch, whose thread 0 then has the sums of all.
  __device__ __forceinline__ bool finish(unsigned* ticket, BatchSums& total) {
    LossSums<T>* const parts = static_cast<LossSums<T>*>(a.sums);
    const BatchSums own = block_sums<T>(sums);
    if (threadIdx.x == 0) parts[blockIdx.x] = narrow<T>(own);
    if (!is_last_block(ticket)) return false;
    total = launch_sums(parts, int(gridDim.x));
    return true;
  }
};

// Losses of all rows; with a ticket also z and the sums of every block, which the last one combines: it never looks at
// the losses themselves.
template <class S, class T, Walk walk, bool kGeneral>
__global__ void __launch_bounds__(threads_of(walk), blocks_of<T>(walk, !kGeneral))
    logit_loss_fwd_kernel(const LogitForward __grid_constant__ a, const Robust __grid_constant__ r, int width,
                          unsigned* ticket) {
  const bool robust = ticket != nullptr;
  RobustRows<T> all(r);
  for_tiles<walk>(a, width, [&](const Place<walk>& place) {
    const int64_t i = place.row;
    const bool writes = place.inside && place.lane == 0;
    const T t = robust && writes ? all.sample_weight(i) : T(1), score = robust && writes ? all.score(i) : T(0);
    using Work = RowAtWork<S, T, walk, kGeneral>;
    using Sums = typename Work::Sums;
    const Work work(a, place, width, [](Sums& sums) { return Only<Sums>{sums}; });
    if (!writes) return;
    const RowResult<T> row = work.finish(a);
    store_row(a, i, row, t);
    if (!robust) return;
    const Sample<T> sample = all.sample(row, score);
    static_cast<T*>(r.z)[i] = sample.stored();
    all.sums.add(sample, t);
  });
  BatchSums total;
  if (!robust || !all.finish(ticket, total) || threadIdx.x != 0) return;
  const double lam = lam_of(r);
  const Weighing weighing = Weighing::of(lam, r.mix, r.max_weight, settle(r, lam, total));
  *r.weighing = weighing;
  *static_cast<T*>(r.loss) = T(loss_of(total, weighing));
}

// (1/n) sum_i t_i (min(W_i, max_weight) + mix) L_i: what the sums of a launch do not hold.
template <class T>
__global__ void __launch_bounds__(256, 4) bounded_loss_kernel(const Robust __grid_constant__ r, unsigned* ticket) {
  const auto numbers = RobustNumbers<Lane<T>>::template of<T>(*r.weighing);
  const T* z = static_cast<const T*>(r.z);
  const int64_t begin = int64_t(blockIdx.x) * kLossBlock,
                end = begin + kLossBlock < r.count ? begin + kLossBlock : r.count;
  T sum = 0;
  for_losses<T>(r, begin, end, [&](int64_t i, const Given<T>& in) {
    if (z[i] != T(-INFINITY)) sum += numbers.factor(numbers.weight(z[i]), in.t) * in.loss;
  });
  const double own = double(BlockTeam::here().sum(sum));
  if (threadIdx.x == 0) r.loss_partials[blockIdx.x] = own;
  if (!is_last_block(ticket)) return;
  const double all = sum_of_blocks(r.loss_partials);
  if (threadIdx.x == 0) *static_cast<T*>(r.loss) = T(all);
}

// ---- backward ------------------------------------------------------------------------------------------------------

// One row's gradient from its statistics.
template <class T, bool kGeneral>
struct RowGradients {
  RowView<T, kGeneral> view;
  Powers<T> powers;
  T scale, at_label, spread, inner;  // inner: scale for the powers as they come

  __device__ __forceinline__ RowGradients(const RowView<T, kGeneral>& view, T max, const RowGradient<Lane<T>>& g,
                                          T factor)
      : view(view),
        powers(max),
        scale(g.scale * factor),
        at_label(g.at_label * factor),
        spread(g.spread * factor),
        inner(scale * powers.exact()) {}
  __device__ __forceinline__ T value(T x, int k) const { return finish(powers(view.logit(x, k)) * inner, k); }
  // from exp(a_k - max) * scale
  __device__ __forceinline__ T finish(T e, int k) const { return shaped(k == view.label ? at_label : e, k); }
  // what class vectors and shares make of it
  __device__ __forceinline__ T shaped(T e, int k) const {
    if (!kGeneral) return e;
    if (spread != 0) e -= spread * view.share(k);
    return e * view.slope(k);
  }
  // the same of N adjacent classes, only one pack of which holds the label
  template <int N>
  __device__ __forceinline__ void values(T (&x)[N], int first) const {
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = powers(view.logit(x[j], first + j)) * inner;
    const unsigned own = unsigned(view.label - first);
    if (own < unsigned(N)) {
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = own == unsigned(j) ? at_label : x[j];
    }
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = shaped(x[j], first + j);
  }
};

template <class S, class T, class G, bool kGeneral_>
struct WriteGradient {
  static constexpr bool kGeneral = kGeneral_;
  RowGradients<T, kGeneral> row;
  G* grad;
  bool wide;  // grad has the alignment of the logits, and their dtype

  __device__ __forceinline__ WriteGradient(const RowGradients<T, kGeneral>& row, G* grad, const S* x)
      : row(row),
        grad(grad),
        wide(sizeof(G) == sizeof(S) && to_boundary(grad) == to_boundary(reinterpret_cast<const G*>(x))) {}
  __device__ __forceinline__ void one(T x, int k) const { grad[k] = to_storage<G>(row.value(x, k)); }
  template <class>
  __device__ __forceinline__ void pack(const uint4& in, int first, int) const {
    constexpr int N = Pack<S>::N;
    T x[N];
    unpack<S>(in, x);
    row.values(x, first);
    if constexpr (sizeof(G) == sizeof(S))
      if (wide) return store_raw(grad + first, absgd::gpu::pack<G>(x));
#pragma unroll
    for (int j = 0; j < N; ++j) grad[first + j] = to_storage<G>(x[j]);
  }
};

template <class G, class T, bool kGeneral_>
struct WriteApart {
  static constexpr bool kGeneral = kGeneral_;
  RowGradients<T, kGeneral> row;
  G* grad;
  int64_t stride;
  __device__ __forceinline__ void one(T x, int k) const { grad[k * stride] = to_storage<G>(row.value(x, k)); }
};

// One row's gradient, by the threads of its team. from: where packs are read; early: before it is known whether the row
// counts (not where the gradient takes the place of the logits: others may write what is read in vain).
template <class S, class G, Walk walk, bool early, class T, bool kGeneral, class From>
__device__ __forceinline__ void write_row(const LogitInput& a, G* grads, int64_t i, int lane, int width, const S* x,
                                          const RowGradients<T, kGeneral>& row, From from) {
  const int classes = int(a.classes);
  G* grad = grads + Spot(a, i).of_class_0(a);
  const bool counts = row.scale != 0;
  if constexpr (walk == Walk::columns) {
    const WriteApart<G, T, kGeneral> write{row, grad, a.inner};
    walk_apart(x, counts ? classes : 0, a.stride_class, write);
  } else {
    const WriteGradient<S, T, G, kGeneral> write(row, grad, x);
    const WarpTeam team{lane, width};  // only who takes which classes
    walk_adjacent(x, early || counts ? classes : 0, team, from, [&] { return counts; }, write);
  }
  if (counts) return;
  const int64_t stride = walk == Walk::columns ? a.inner : 1;  // ignored, or of weight 0: whatever stands in the logits
  for (int k = lane; k < classes; k += width) grad[k * stride] = to_storage<G>(row.finish(T(0), k));
}

template <class S, class T, Walk walk, bool kGeneral>
__global__ void __launch_bounds__(threads_of(walk), sizeof(T) == 8 ? 1 : blocks_of<T>(walk, !kGeneral))
    logit_loss_bwd_kernel(const LogitBackward __grid_constant__ a, int width) {
  const int64_t rows = a.rows();
  const Place<walk> place(rows, width, blockIdx.x);
  if (!place.inside) return;
  const int64_t i = place.row;
  const RawLabel raw(a, i);
  const T* stats = static_cast<const T*>(a.stats) + i;
  const RowGradient<Lane<T>> g{stats[rows], stats[2 * rows], stats[3 * rows]};
  T factor = static_cast<const T*>(a.upstream)[a.upstream_per_row ? i : 0];
  if (a.z != nullptr) {
    const auto numbers = RobustNumbers<Lane<T>>::template of<T>(*a.weighing);
    factor *= numbers.factor(numbers.weight(static_cast<const T*>(a.z)[i]), T(1));
  }
  const bool counts = g.scale != 0 || g.at_label != 0;
  const Label label = raw.checked(a, nullptr, i, false);
  const RowGradients<T, kGeneral> row(RowView<T, kGeneral>(a, i, counts && label.valid ? label.y : -1), stats[0], g,
                                      factor);
  const int step = walk == Walk::columns ? 1 : walk == Walk::block ? blockDim.x : width;
  write_row<S, S, walk, true>(a, static_cast<S*>(a.grad), i, place.lane, step, row_of<S>(a, i), row,
                              StartInMemory<S>());
}

// ---- the gradient while the row is on the chip ----------------------------------------------------------------------

// The first packs of a row stay in shared memory between the two walks; what does not fit is read again, from the
// second-level cache. A thread reads only what it kept itself.
template <class S>
struct Kept {
  uint4* shared;
  int capacity;  // in packs

  template <class Sums>
  struct Keeping {
    static constexpr bool kGeneral = Sums::kGeneral;
    Sums& sums;
    Kept kept;
    template <class T>
    __device__ __forceinline__ void one(T x, int k) {
      sums.one(x, k);
    }
    template <class>
    __device__ __forceinline__ void pack(const uint4& in, int first, int p) {
      if (p < kept.capacity) kept.shared[p] = in;
      sums.template pack<S>(in, first, p);
    }
  };
  struct Source {
    Kept kept;
    const S* packs;
    __device__ __forceinline__ uint4 operator()(int p) const {
      return p < kept.capacity ? kept.shared[p] : load_raw(packs + p * Pack<S>::N);
    }
  };
  __device__ __forceinline__ Source operator()(const S* packs) const { return {*this, packs}; }
};

// The numbers of a row's gradient, from the thread that made them to its team.
template <Walk walk, class T>
__device__ __forceinline__ void share_row(RowResult<T>& row, T& factor) {
  if constexpr (walk == Walk::block) {
    struct Shared {
      RowResult<T> row;
      T factor;
    };
    SHARED(Shared[1], of_row);  // free again: every thread has been through the barriers of the next row's sums
    if (threadIdx.x == 0) of_row[0] = {row, factor};
    __syncthreads();
    row = of_row[0].row;
    factor = of_row[0].factor;
  } else if constexpr (walk == Walk::lanes) {
    __syncwarp();  // all lanes have read the label's logit, where one of them may now write the gradient
  }
}

// The same losses, and each row's gradient right after them, because its factor is known: one read and one write.
template <class S, class T, class G, Walk walk, bool kGeneral>
__global__ void __launch_bounds__(threads_of(walk), sizeof(T) == 8 ? 1 : blocks_of<T>(walk))
    logit_loss_made_kernel(const LogitForward __grid_constant__ a, const Robust __grid_constant__ r, int width,
                           int capacity, unsigned* ticket) {
  DYN_SHARED(uint4, shared);
  const Kept<S> kept{shared, capacity};
  const bool robust = ticket != nullptr;
  RobustRows<T> all(r);
  const auto numbers = RobustNumbers<Lane<T>>::template of<T>(
      robust ? Weighing{r.settled->log_s, r.settled->scale, 0, INFINITY} : Weighing{0, 1, 0, INFINITY});
  for_tiles<walk>(a, width, [&](const Place<walk>& place) {
    const int64_t i = place.row;
    const bool writes = place.inside && place.lane == 0;
    const T t = robust ? all.sample_weight(i) : T(1), score = robust ? all.score(i) : T(0);
    using Work = RowAtWork<S, T, walk, kGeneral>;
    using Sums = typename Work::Sums;
    using Keeping = typename Kept<S>::template Keeping<Sums>;
    const Work work(a, place, width, [&](Sums& sums) { return Keeping{sums, kept}; });
    RowResult<T> row{};
    T factor = 0;
    if (walk != Walk::block || threadIdx.x < kWarp) {  // the other warps wait for the first
      row = work.finish(a);
      factor = T(row.counts);
      if (robust) {
        const Sample<T> sample = all.sample(row, score);
        const Weighed<T> own(numbers, sample, t);
        factor = own.factor;
        if (writes) {
          static_cast<T*>(r.weights)[i] = own.weight;
          all.sums.add(sample, t);
        }
      }
      if (writes) store_row(a, i, row, T(1));
    }
    share_row<walk>(row, factor);
    if (!place.inside) return;
    const RowView<T, kGeneral> again(a, i, row.counts ? work.label.y : -1);
    const RowGradients<T, kGeneral> gradients(again, row.max, row.gradient, factor);
    const int step = walk == Walk::columns ? 1 : walk == Walk::block ? blockDim.x : width;
    write_row<S, G, walk, false>(a, static_cast<G*>(a.grad), i, place.lane, step, work.x, gradients, kept);
  });
  BatchSums total;
  if (!robust || !all.finish(ticket, total) || threadIdx.x != 0) return;
  write_totals(r, total);
  const Weighing weighing{r.settled->log_s, r.settled->scale, 0, INFINITY};
  *static_cast<T*>(r.loss) = T(loss_of(total, weighing));
}

// ---- small batches: everything by one block ------------------------------------------------------------------------

// Each row has a team of `width` lanes and stays in their registers, kTeamClasses of it in each, while the weights are
// made; then its gradient is written. One read and one write.
template <class S, class T, class G, bool kGeneral>
__global__ void __launch_bounds__(kTeamThreads, 1)
    robust_logit_loss_block_kernel(const LogitForward __grid_constant__ a, const Robust __grid_constant__ r,
                                   int width) {
  const int64_t rows = a.rows();
  const int classes = int(a.classes);
  const Place<Walk::lanes> place(rows, width, 0);
  const int64_t i = place.row;
  const int lane = place.lane;
  const bool writes = place.inside && lane == 0;
  const WarpTeam team{lane, width};
  RobustRows<T> all(r);
  const S* x = row_of<S>(a, i);
  const RawLabel raw(a, i);
  S in[kTeamClasses];
#pragma unroll
  for (int u = 0; u < kTeamClasses; ++u)
    if (lane + u * width < classes) in[u] = x[(lane + u * width) * a.stride_class];
  const T t = all.sample_weight(i), score = all.score(i);
  const Label label = raw.checked(a, a.report, i, writes);
  const RowView<T, kGeneral> view(a, i, label.y);
  const T own_logit = own_logit_of<S, T, kGeneral>(a, x, label, view);
  RowSums<T, kGeneral> sums(view);
  sums.reference = reference_for(view.is_soft() && classes > 0 ? view.logit(to_real(x[0]), 0) : own_logit);
  const int count = label.valid ? classes : 0;
#pragma unroll
  for (int u = 0; u < kTeamClasses; ++u)
    if (lane + u * width < count) sums.one(to_real(in[u]), lane + u * width);
  sums.combine(team);
  const RowResult<T> row = finish_row(a, label, own_logit, sums);
  const Sample<T> sample = all.sample(row, score);
  if (writes) {
    store_row(a, i, row, t);
    all.sums.add(sample, t);
  }
  SHARED(Weighing[1], shared);
  const BatchSums total = block_sums<T>(all.sums);
  if (threadIdx.x == 0) {
    const double lam = lam_of(r);
    shared[0] = Weighing::of(lam, r.mix, r.max_weight, settle(r, lam, total));
  }
  __syncthreads();
  const Weighed<T> own(RobustNumbers<Lane<T>>::template of<T>(shared[0]), sample, t);
  if (place.inside) {
    const RowView<T, kGeneral> again(a, i, row.counts ? label.y : -1);
    const RowGradients<T, kGeneral> gradients(again, row.max, row.gradient, own.factor);
    G* out = static_cast<G*>(a.grad) + Spot(a, i).of_class_0(a);
#pragma unroll
    for (int u = 0; u < kTeamClasses; ++u) {
      const int k = lane + u * width;
      if (k >= classes) continue;
      const T value = gradients.scale == 0 ? gradients.finish(T(0), k) : gradients.value(to_real(in[u]), k);
      out[k * a.inner] = to_storage<G>(value);
    }
  }
  if (writes) static_cast<T*>(r.weights)[i] = own.weight;
  const double loss = double(BlockTeam::here().sum(writes && sample.valid ? own.factor * sample.loss : T(0)));
  if (threadIdx.x == 0) *static_cast<T*>(r.loss) = T(loss);
}

// ---- launching -----------------------------------------------------------------------------------------------------

struct Shape {
  Walk walk;
  int width;
  int64_t tiles;
};

// How many rows the chip must have in flight before a warp a row fills it: 132 multiprocessors of 16 warps (H100).
constexpr int64_t kManyRows = 2048;

Shape shape_of(const LogitInput& a) {
  const int64_t rows = a.rows();
  const int per_pack = a.dtype == Dtype::f64 ? 2 : a.dtype == Dtype::f32 ? 4 : 8;
  auto blocks = [&](Walk walk, int64_t each) { return (rows + each - 1) / each; };
  if (a.stride_class != 1 || a.inner != 1) return {Walk::columns, 1, blocks(Walk::columns, threads_of(Walk::columns))};
  const int64_t packs = a.classes / per_pack, threads = threads_of(Walk::block);
  if (packs >= 4 * threads || (packs >= threads / 2 && rows < kManyRows))
    return {Walk::block, int(threads), blocks(Walk::block, 1)};
  const int width = lanes_for(a.classes, per_pack);
  return {Walk::lanes, width, blocks(Walk::lanes, threads_of(Walk::lanes) / width)};
}

// Blocks of one kernel that the chip holds at once, asked once for each device.
struct Resident {
  std::atomic<int> of_device[64] = {};

  template <class K>
  int64_t operator()(K kernel, int threads, int64_t shared_blocks = INT64_MAX) {
    int device = 0;
    cudaGetDevice(&device);
    std::atomic<int>& known = of_device[device % 64];
    int blocks = known.load(std::memory_order_relaxed);
    if (blocks == 0) {
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), threads, 0);
      known.store(blocks, std::memory_order_relaxed);
    }
    int processors = 1;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    const int64_t each = blocks < shared_blocks ? blocks : shared_blocks;
    return each < 1 ? processors : each * processors;
  }
};
unsigned grid_of(int64_t tiles, int64_t resident) {
  const int64_t most = resident < kMostBlocks ? resident : kMostBlocks;
  return unsigned(tiles < most ? tiles : most);
}

template <bool B>
struct Flag {
  static constexpr bool value = B;
};

bool is_general(const LogitInput& a) { return a.adjust != nullptr || a.spreads(); }

// f(walk, general) for the shape at hand
template <class F>
void for_walk(const LogitInput& a, const Shape& shape, F f) {
  auto by = [&](auto walk) { is_general(a) ? f(walk, Flag<true>{}) : f(walk, Flag<false>{}); };
  switch (shape.walk) {
    case Walk::lanes:
      return by(std::integral_constant<Walk, Walk::lanes>{});
    case Walk::block:
      return by(std::integral_constant<Walk, Walk::block>{});
    default:
      return by(std::integral_constant<Walk, Walk::columns>{});
  }
}

// f(storage type, real type, walk, general)
template <class F>
const char* launch(const LogitInput& a, const Shape& shape, F f) {
  for_storage(a.dtype, [&](auto storage, auto real) {
    for_walk(a, shape, [&](auto walk, auto general) { f(storage, real, walk, general); });
  });
  return failure();
}

}  // namespace

LabelReport* label_report() {
  static LabelReport* const report = [] {
    void* memory = nullptr;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // the first call may come while a graph is captured
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (cudaHostAlloc(&memory, sizeof(LabelReport), cudaHostAllocPortable | cudaHostAllocMapped) != cudaSuccess) {
      cudaGetLastError();
      memory = nullptr;
    } else {
      *static_cast<LabelReport*>(memory) = {};
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
    return static_cast<LabelReport*>(memory);
  }();
  return report;
}

namespace {

const char* run_fwd(const LogitForward& a, const Robust& r, unsigned* ticket, cudaStream_t stream) {
  const Shape shape = shape_of(a);
  return launch(a, shape, [&](auto storage, auto real, auto walk, auto general) {
    using S = typename decltype(storage)::type;
    using T = typename decltype(real)::type;
    constexpr Walk w = decltype(walk)::value;
    const auto kernel = logit_loss_fwd_kernel<S, T, w, decltype(general)::value>;
    static Resident resident;
    LAUNCH(kernel, grid_of(shape.tiles, resident(kernel, threads_of(w))), threads_of(w), 0, stream, a, r, shape.width,
           ticket);
  });
}

// Shared memory for the rows of a block, in bytes: two blocks of the largest in a multiprocessor of 228 KB.
constexpr int kKeptBytes = 108 << 10;

int most_shared() {
  int device = 0, most = 48 << 10;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return most - 2048 < kKeptBytes ? most - 2048 : kKeptBytes;  // the kernel's own, and what the system takes
}

// f(storage, gradient's type, real): the gradient has the logits' dtype, float32 for float16 (ops_common.h made_as).
template <class F>
void for_made(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f64:
      return f(Tag<double>{}, Tag<double>{}, Tag<double>{});
    case Dtype::bf16:
      return f(Tag<__nv_bfloat16>{}, Tag<__nv_bfloat16>{}, Tag<float>{});
    case Dtype::f16:
      return f(Tag<__half>{}, Tag<float>{}, Tag<float>{});
    default:
      return f(Tag<float>{}, Tag<float>{}, Tag<float>{});
  }
}

}  // namespace

const char* logit_loss_fwd(const LogitForward& a, void* stream) {
  if (a.rows() == 0) return nullptr;
  return run_fwd(a, Robust{}, nullptr, static_cast<cudaStream_t>(stream));
}

const char* logit_loss_made(const LogitForward& a, const Robust& r, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const bool robust = r.settled != nullptr;
  if (a.rows() == 0) return robust ? robust_fwd(r, stream) : nullptr;
  unsigned* const ticket = robust ? ticket_for(s) : nullptr;
  if (robust && ticket == nullptr) return failure();
  const Shape shape = shape_of(a);
  for_made(a.dtype, [&](auto storage, auto gradient, auto real) {
    using S = typename decltype(storage)::type;
    using G = typename decltype(gradient)::type;
    using T = typename decltype(real)::type;
    auto go = [&](auto walk, auto general) {
      constexpr Walk w = decltype(walk)::value;
      const auto kernel = logit_loss_made_kernel<S, T, G, w, decltype(general)::value>;
      static Resident resident;
      const int most = most_shared(), packs = w == Walk::block ? int(a.classes / Pack<S>::N) : 0;
      const int bytes = packs * 16 < most ? packs * 16 : most / 16 * 16;
      // Always the same number, so that two threads of the host do not take it from each other.
      if (bytes > 0)
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, most);
      const int64_t fit = bytes == 0 ? INT64_MAX : 2 * kKeptBytes / bytes;
      LAUNCH(kernel, grid_of(shape.tiles, resident(kernel, threads_of(w), fit)), threads_of(w), bytes, s, a, r,
             shape.width, bytes / 16, ticket);
    };
    for_walk(a, shape, go);
  });
  return failure();
}

const char* logit_loss_bwd(const LogitBackward& a, void* stream) {
  if (a.rows() == 0 || a.classes == 0) return nullptr;
  const Shape shape = shape_of(a);
  return launch(a, shape, [&](auto storage, auto real, auto walk, auto general) {
    using S = typename decltype(storage)::type;
    using T = typename decltype(real)::type;
    constexpr Walk w = decltype(walk)::value;
    constexpr bool g = decltype(general)::value;
    LAUNCH((logit_loss_bwd_kernel<S, T, w, g>), unsigned(shape.tiles), threads_of(w), 0,
           static_cast<cudaStream_t>(stream), a, shape.width);
  });
}

const char* robust_logit_loss_fwd(const LogitForward& a, const Robust& r, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.rows() == 0) return robust_fwd(r, stream);
  unsigned* const ticket = ticket_for(s);
  if (ticket == nullptr) return failure();
  const char* const failed = run_fwd(a, r, ticket, s);
  if (failed != nullptr || !(r.max_weight < kLargest)) return failed;
  const unsigned blocks = unsigned(r.loss_blocks());
  if (r.dtype == Dtype::f64)
    LAUNCH((bounded_loss_kernel<double>), blocks, 256, 0, s, r, ticket);
  else
    LAUNCH((bounded_loss_kernel<float>), blocks, 256, 0, s, r, ticket);
  return failure();
}

const char* robust_logit_loss_block(const LogitForward& a, const Robust& r, void* stream) {
  if (a.rows() == 0) return robust_fwd(r, stream);
  const int width = lanes_for(a.classes, kTeamClasses);
  for_made(a.dtype, [&](auto storage, auto gradient, auto real) {
    using S = typename decltype(storage)::type;
    using G = typename decltype(gradient)::type;
    using T = typename decltype(real)::type;
    if constexpr (sizeof(T) == sizeof(float)) {
      const auto kernel = is_general(a) ? robust_logit_loss_block_kernel<S, T, G, true>
                                        : robust_logit_loss_block_kernel<S, T, G, false>;
      LAUNCH(kernel, 1, kTeamThreads, 0, static_cast<cudaStream_t>(stream), a, r, width);
    }
  });
  return failure();
}

}  // namespace gpu
}  // namespace absgd
