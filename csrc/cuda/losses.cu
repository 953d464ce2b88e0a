// Losses on logits and their gradients. The formulas are in math.h; `finish_row` is the only function that knows the
// loss, and its gradient is a walk over the row with the four numbers of RowGradient.
//
// Three ways to walk over rows: with adjacent classes a row is shared by some lanes of a warp (`WarpTeam`) or by a
// whole block (`BlockTeam`), each thread reading 16 bytes at a time; with classes that lie apart (a class stride other
// than 1: transposed logits, (B, C, d1, ...)) neighbouring threads take neighbouring rows (`kColumns`).
#include "weights.cuh"

namespace absgd {
namespace gpu {
namespace {

enum class Walk : int { lanes = 0, block = 1, columns = 2 };

constexpr int kThreads = 128;       // of a block whose warps or lanes share rows
constexpr int kRowThreads = 256;    // of a block that shares one row
constexpr int kInFlight = 4;        // 16-byte loads of a thread before the first is used (see walk_adjacent)
constexpr int kBlockThreads = 512;  // of the one block that does it all

struct Label {
  int64_t y;
  bool valid;
};

// By one thread of a row (`first`) the label is also checked for the report.
__device__ __forceinline__ Label read_label(const LogitInput& a, LabelReport* report, int64_t i, bool first) {
  if (a.soft != nullptr) return {-1, a.mask == nullptr || a.mask[i] != 0};
  const int64_t y = a.target_int64 ? static_cast<const long long*>(a.target)[i] : static_cast<const int*>(a.target)[i];
  if (y == a.ignore_index) return {0, false};
  if (y < 0 || y >= a.classes) {
    if (first && report != nullptr) {  // two stores of 16 bytes: rows that report at once do not mix
      *reinterpret_cast<longlong2*>(&report->label) = longlong2{(long long)y, (long long)i};
      *reinterpret_cast<longlong2*>(&report->classes) = longlong2{(long long)a.classes, 1};
    }
    return {0, false};
  }
  return {y, a.mask == nullptr || a.mask[i] != 0};
}

// ---- walking over a row --------------------------------------------------------------------------------------------

// f.pack(values, first class) for N adjacent classes at a time, f.one(value, class) for those before the first multiple
// of 16 bytes and after the last.
template <class S, class Team, class F>
__device__ __forceinline__ void walk_adjacent(const S* x, int classes, const Team& team, F& f) {
  constexpr int N = Pack<S>::N, kAtOnce = F::kGeneral ? 1 : kInFlight;  // class vectors take the registers
  const int boundary = to_boundary(x), head = boundary < classes ? boundary : classes;
  const int packs = (classes - head) / N;
  for (int k = team.lane; k < head; k += team.width) f.one(to_real(x[k]), k);
  int p = team.lane;
  for (; p + (kAtOnce - 1) * team.width < packs; p += kAtOnce * team.width) {
    Pack<S> in[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) in[u] = load_pack(x + head + (p + u * team.width) * N);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) f.pack(in[u], head + (p + u * team.width) * N);
  }
  for (; p < packs; p += team.width) f.pack(load_pack(x + head + p * N), head + p * N);
  for (int k = head + packs * N + team.lane; k < classes; k += team.width) f.one(to_real(x[k]), k);
}

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
    soft =
        a.soft == nullptr ? nullptr : static_cast<const T*>(a.soft) + i / a.inner * a.classes * a.inner + i % a.inner;
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

// Running sums over the classes a thread has seen (online log-sum-exp), the label apart: max, rest = sum exp(a_k -
// max); where every class has a share, others = sum weight_k (a_k - reference) and total = sum weight_k, label and all.
template <class T, bool kGeneral_>
struct RowSums {
  static constexpr bool kGeneral = kGeneral_;
  RowView<T, kGeneral> view;
  T reference;
  T max, rest, others, total;

  __device__ __forceinline__ RowSums(const RowView<T, kGeneral>& view, T reference)
      : view(view), reference(reference), max(lowest(T())), rest(0), others(0), total(0) {}

  __device__ __forceinline__ void raise(T top) {
    if (top > max) {
      rest *= exp_below(max - top);
      max = top;
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
    rest += exp_below(other - max);
  }
  template <class S>
  __device__ __forceinline__ void pack(const Pack<S>& in, int first) {
    constexpr int N = Pack<S>::N;
    T a[N];
#pragma unroll
    for (int j = 0; j < N; ++j) a[j] = view.logit(to_real(in.value[j]), first + j);
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
    for (int j = 0; j < N; ++j) sum += exp_below(a[j] - max);
    rest += sum;
  }
  // What all threads of the team have seen together.
  template <class Team>
  __device__ __forceinline__ void combine(const Team& team) {
    const T top = team.max(max);
    rest = team.sum(rest * exp_below(max - top));
    max = top;
    if (!view.has_shares()) return;
    others = team.sum(others);
    total = team.sum(total);
  }
};

// By one thread: the row's sums -> its loss, and the gradient's four numbers.
template <class T, bool kGeneral>
__device__ __forceinline__ void finish_row(const LogitForward& a, int64_t i, Label label, T own_logit,
                                           const RowSums<T, kGeneral>& sums) {
  using L = Lane<T>;
  const int64_t rows = a.rows();
  const bool soft = sums.view.is_soft();
  const T max = soft ? sums.max : greater(sums.max, own_logit);
  const T gap = soft ? T(0) : max - own_logit;
  const Row<L> row{gap, sums.rest * exp_below(sums.max - max), soft ? T(0) : L::exp(-gap)};
  const bool prunes = a.loss.least < kLargest;
  const bool counts = label.valid && !(prunes && row.nll() >= T(a.loss.least));  // pruned rows do not
  T loss = 0;
  RowGradient<L> g{0, 0, 0};
  if (counts) {
    T c = 0;
    if (!soft) {
      const T w = a.class_weight == nullptr ? T(1) : static_cast<const T*>(a.class_weight)[label.y];
      for_loss<L, T>(a.loss, [&](const auto& functor) {
        loss = functor.loss(row, w);
        c = functor.coefficient(row, w);
      });
    }
    const T spread = sums.view.has_shares() ? sums.view.shares.spread(soft) : T(0);
    // sum_k weight_k (-log p_k) = (log_total + max - reference) sum weight - sum_k weight_k (a_k - reference)
    if (sums.view.has_shares())
      loss += spread * ((row.log_total() + (max - sums.reference)) * sums.total - sums.others);
    g = RowGradient<L>::of(row, c, spread, sums.total);
  }
  static_cast<T*>(a.losses)[i] = loss;
  if (a.valid != nullptr) static_cast<T*>(a.valid)[i] = T(counts);
  if (a.stats == nullptr) return;
  T* stats = static_cast<T*>(a.stats) + i;
  stats[0] = max;
  stats[rows] = g.scale;
  stats[2 * rows] = g.at_label;
  stats[3 * rows] = g.spread;
}

// The reference point of the sums over all classes: near the row's logits, and finite.
template <class T>
__device__ __forceinline__ T reference_for(T own_logit) {
  return own_logit - own_logit == 0 ? own_logit : T(0);
}

template <class S>
__device__ __forceinline__ const S* row_of(const LogitInput& a, int64_t i) {
  return static_cast<const S*>(a.logits) + i / a.inner * a.stride_batch + i % a.inner * a.stride_inner;
}

// Rows of a block, and which of them this thread works on. `width`: lanes that share a row (Walk::lanes).
template <Walk walk>
struct Place {
  int64_t row;
  bool inside;

  __device__ __forceinline__ Place(int64_t rows, int width) {
    const int64_t block = blockIdx.x;
    if (walk == Walk::block)
      row = block;
    else if (walk == Walk::columns)
      row = block * blockDim.x + threadIdx.x;
    else
      row = block * (blockDim.x / width) + threadIdx.x / width;
    inside = row < rows;
    if (!inside) row = rows - 1;  // goes along with the shuffles, writes nothing
  }
};

// The logit of the label, adjusted and less its margin.
template <class S, class T, bool kGeneral>
__device__ __forceinline__ T own_logit_of(const LogitInput& a, const S* x, Label label,
                                          const RowView<T, kGeneral>& view) {
  if (!label.valid || label.y < 0) return T(0);
  return view.logit(to_real(x[label.y * a.stride_class]), int(label.y)) - view.own_margin();
}

template <class S, class T, Walk walk, bool kGeneral>
__device__ __forceinline__ void forward_rows(const LogitForward& a, int width) {
  const Place<walk> place(a.rows(), width);
  const int lane = walk == Walk::columns ? 0 : walk == Walk::block ? threadIdx.x : threadIdx.x % width;
  const int64_t i = place.row;
  const Label label = read_label(a, a.report, i, place.inside && lane == 0);
  const S* x = row_of<S>(a, i);
  const RowView<T, kGeneral> view(a, i, label.y);
  const T own_logit = own_logit_of<S, T, kGeneral>(a, x, label, view);
  RowSums<T, kGeneral> sums(view,
                            reference_for(view.is_soft() && a.classes > 0 ? view.logit(to_real(x[0]), 0) : own_logit));
  const int classes = label.valid ? int(a.classes) : 0;
  if constexpr (walk == Walk::columns) {
    walk_apart(x, classes, a.stride_class, sums);
  } else if constexpr (walk == Walk::block) {
    const BlockTeam team = BlockTeam::here();
    walk_adjacent(x, classes, team, sums);
    sums.combine(team);
  } else {
    const WarpTeam team{lane, width};
    walk_adjacent(x, classes, team, sums);
    sums.combine(team);
  }
  if (place.inside && lane == 0) finish_row(a, i, label, own_logit, sums);
}

constexpr int threads_of(Walk walk) { return walk == Walk::block ? kRowThreads : kThreads; }
// Blocks per multiprocessor that the registers must allow: 128 registers a thread (with 80 some spill; most take 50 to
// 70, so more blocks fit).
constexpr int blocks_of(Walk walk) { return 512 / threads_of(walk); }

template <class S, class T, Walk walk, bool kGeneral>
__global__ void __launch_bounds__(threads_of(walk), blocks_of(walk))
    logit_loss_fwd_kernel(const LogitForward __grid_constant__ a, int width) {
  forward_rows<S, T, walk, kGeneral>(a, width);
}

// The same, and the last block turns the losses into weights, in the same launch.
template <class S, class T, Walk walk, bool kGeneral>
__global__ void __launch_bounds__(threads_of(walk), blocks_of(walk))
    robust_logit_loss_fwd_kernel(const LogitForward __grid_constant__ a, const Robust __grid_constant__ r, int width,
                                 unsigned* ticket) {
  forward_rows<S, T, walk, kGeneral>(a, width);
  if (is_last_block(ticket)) robust_in_block<T>(r);
}

// ---- backward ------------------------------------------------------------------------------------------------------

// One row's gradient from its statistics.
template <class T, bool kGeneral>
struct RowGradients {
  RowView<T, kGeneral> view;
  T max, scale, at_label, spread;

  __device__ __forceinline__ T value(T x, int k) const { return finish(exp_below(view.logit(x, k) - max) * scale, k); }
  // from exp(a_k - max) * scale
  __device__ __forceinline__ T finish(T e, int k) const {
    if (k == view.label) e = at_label;
    if (!kGeneral) return e;
    if (spread != 0) e -= spread * view.share(k);
    return e * view.slope(k);
  }
};

template <class S, class T, bool kGeneral_>
struct WriteGradient {
  static constexpr bool kGeneral = kGeneral_;
  RowGradients<T, kGeneral> row;
  S* grad;
  bool wide;  // grad has the alignment of the logits

  __device__ __forceinline__ void one(T x, int k) const { grad[k] = to_storage<S>(row.value(x, k)); }
  __device__ __forceinline__ void pack(const Pack<S>& in, int first) const {
    Pack<S> out;
#pragma unroll
    for (int j = 0; j < Pack<S>::N; ++j) out.value[j] = to_storage<S>(row.value(to_real(in.value[j]), first + j));
    if (wide) {
      store_pack(grad + first, out);
    } else {
#pragma unroll
      for (int j = 0; j < Pack<S>::N; ++j) grad[first + j] = out.value[j];
    }
  }
};

template <class S, class T, bool kGeneral_>
struct WriteApart {
  static constexpr bool kGeneral = kGeneral_;
  RowGradients<T, kGeneral> row;
  S* grad;
  int64_t stride;
  __device__ __forceinline__ void one(T x, int k) const { grad[k * stride] = to_storage<S>(row.value(x, k)); }
};

template <class S, class T, Walk walk, bool kGeneral>
__global__ void __launch_bounds__(threads_of(walk), blocks_of(walk))
    logit_loss_bwd_kernel(const LogitBackward __grid_constant__ a, int width) {
  const int64_t rows = a.rows();
  const Place<walk> place(rows, width);
  if (!place.inside) return;
  const int64_t i = place.row;
  const int classes = int(a.classes);
  const T* stats = static_cast<const T*>(a.stats) + i;
  const T u = static_cast<const T*>(a.upstream)[a.upstream_per_row ? i : 0];
  const bool counts = stats[rows] != 0 || stats[2 * rows] != 0;
  const Label label = read_label(a, nullptr, i, false);
  const RowGradients<T, kGeneral> row{RowView<T, kGeneral>(a, i, counts && label.valid ? label.y : -1), stats[0],
                                      stats[rows] * u, stats[2 * rows] * u, stats[3 * rows] * u};
  S* grad = static_cast<S*>(a.grad) + i / a.inner * a.classes * a.inner + i % a.inner;
  const int first = walk == Walk::columns ? 0 : walk == Walk::block ? threadIdx.x : threadIdx.x % width;
  const int step = walk == Walk::columns ? 1 : walk == Walk::block ? blockDim.x : width;
  const int64_t stride = walk == Walk::columns ? a.inner : 1;
  if (row.scale == 0) {  // ignored, or of weight 0: whatever stands in the logits
    for (int k = first; k < classes; k += step) grad[k * stride] = to_storage<S>(row.finish(T(0), k));
    return;
  }
  const S* x = row_of<S>(a, i);
  if constexpr (walk == Walk::columns) {
    const WriteApart<S, T, kGeneral> write{row, grad, stride};
    walk_apart(x, classes, a.stride_class, write);
  } else {
    const WriteGradient<S, T, kGeneral> write{row, grad, to_boundary(grad) == to_boundary(x)};
    const WarpTeam team{first, step};  // here only who takes which classes
    walk_adjacent(x, classes, team, write);
  }
}

// ---- small batches: everything by one block ------------------------------------------------------------------------

// Reads the logits once, keeps exp(x - max) in shared memory while the weights are made, and writes the gradient. A row
// is shared by `width` lanes; a thread meets the same elements in every pass.
template <class S, class T, class G, bool kGeneral>
__global__ void __launch_bounds__(kBlockThreads, 1)
    robust_logit_loss_block_kernel(const LogitForward __grid_constant__ a, const Robust __grid_constant__ r, G* grad,
                                   int width) {
  DYN_SHARED(T, kept);  // (rows, classes)
  const int64_t rows = a.rows();
  const int classes = int(a.classes), lane = threadIdx.x % width, at_once = kBlockThreads / width;
  const WarpTeam team{lane, width};
  for (int64_t base = 0; base < rows; base += at_once) {
    const int64_t mine = base + threadIdx.x / width;
    const bool inside = mine < rows;
    const int64_t i = inside ? mine : rows - 1;
    const Label label = read_label(a, a.report, i, inside && lane == 0);
    const S* x = row_of<S>(a, i);
    T* e = kept + i * classes;
    const RowView<T, kGeneral> view(a, i, label.y);
    const T own_logit = own_logit_of<S, T, kGeneral>(a, x, label, view);
    RowSums<T, kGeneral> sums(
        view, reference_for(view.is_soft() && a.classes > 0 ? view.logit(to_real(x[0]), 0) : own_logit));
    const int count = label.valid && inside ? classes : 0;
    for (int k = lane; k < count; k += width) {
      const T logit = view.logit(to_real(x[k * a.stride_class]), k);
      e[k] = logit;
      if (k != label.y) sums.max = greater(sums.max, logit);
      if (sums.view.has_shares()) sums.spread(logit, k);
    }
    sums.max = team.max(sums.max);
    const T max = view.is_soft() ? sums.max : greater(sums.max, own_logit);  // as finish_row takes it
    for (int k = lane; k < count; k += width) {
      const T power = exp_below(e[k] - max);
      e[k] = power;
      if (k != label.y) sums.rest += power;
    }
    if (label.valid) sums.max = max;
    sums.combine(team);
    if (inside && lane == 0) finish_row(a, i, label, own_logit, sums);
  }
  __syncthreads();
  robust_in_block<T>(r);
  __syncthreads();
  const T* stats = static_cast<const T*>(a.stats);
  for (int64_t i = threadIdx.x / width; i < rows; i += at_once) {
    const Label label = read_label(a, nullptr, i, false);
    const bool counts = stats[rows + i] != 0 || stats[2 * rows + i] != 0;
    const RowGradients<T, kGeneral> row{RowView<T, kGeneral>(a, i, counts && label.valid ? label.y : -1), 0,
                                        stats[rows + i], stats[2 * rows + i], stats[3 * rows + i]};
    G* out = grad + i / a.inner * a.classes * a.inner + i % a.inner;
    for (int k = lane; k < classes; k += width)
      out[k * a.inner] = to_storage<G>(row.finish(row.scale == 0 ? T(0) : kept[i * classes + k] * row.scale, k));
  }
}

// ---- launching -----------------------------------------------------------------------------------------------------

struct Shape {
  Walk walk;
  int width;
  unsigned blocks;
};

// Lanes for a row: each reads at least 16 bytes, if the row has them.
int lanes_for(int64_t classes, int per_lane) {
  int width = 1;
  while (width < kWarp && width * per_lane < classes) width *= 2;
  return width;
}

// How many rows the chip must have in flight before a warp a row fills it: 132 multiprocessors of 16 warps (H100).
constexpr int64_t kManyRows = 2048;

Shape shape_of(const LogitInput& a) {
  const int64_t rows = a.rows();
  const int per_pack = a.dtype == Dtype::f64 ? 2 : a.dtype == Dtype::f32 ? 4 : 8;
  auto blocks = [&](int64_t each) { return unsigned((rows + each - 1) / each); };
  if (a.stride_class != 1 || a.inner != 1) return {Walk::columns, 1, blocks(kThreads)};
  const int64_t packs = a.classes / per_pack;
  if (packs >= 4 * kRowThreads || (packs >= kRowThreads / 2 && rows < kManyRows))
    return {Walk::block, kRowThreads, blocks(1)};
  const int width = lanes_for(a.classes, per_pack);
  return {Walk::lanes, width, blocks(kThreads / width)};
}

template <bool B>
struct Flag {
  static constexpr bool value = B;
};

bool is_general(const LogitInput& a) { return a.adjust != nullptr || a.spreads(); }

// f(storage type, real type, walk, general) for the shape at hand
template <class F>
const char* launch(const LogitInput& a, const Shape& shape, F f) {
  for_storage(a.dtype, [&](auto storage, auto real) {
    auto walk_by = [&](auto walk) {
      !is_general(a) ? f(storage, real, walk, Flag<false>{}) : f(storage, real, walk, Flag<true>{});
    };
    switch (shape.walk) {
      case Walk::lanes:
        return walk_by(std::integral_constant<Walk, Walk::lanes>{});
      case Walk::block:
        return walk_by(std::integral_constant<Walk, Walk::block>{});
      default:
        return walk_by(std::integral_constant<Walk, Walk::columns>{});
    }
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

const char* logit_loss_fwd(const LogitForward& a, void* stream) {
  if (a.rows() == 0) return nullptr;
  const Shape shape = shape_of(a);
  return launch(a, shape, [&](auto storage, auto real, auto walk, auto general) {
    using S = typename decltype(storage)::type;
    using T = typename decltype(real)::type;
    constexpr Walk w = decltype(walk)::value;
    constexpr bool g = decltype(general)::value;
    LAUNCH((logit_loss_fwd_kernel<S, T, w, g>), shape.blocks, threads_of(w), 0, static_cast<cudaStream_t>(stream), a,
           shape.width);
  });
}

const char* logit_loss_bwd(const LogitBackward& a, void* stream) {
  if (a.rows() == 0 || a.classes == 0) return nullptr;
  const Shape shape = shape_of(a);
  return launch(a, shape, [&](auto storage, auto real, auto walk, auto general) {
    using S = typename decltype(storage)::type;
    using T = typename decltype(real)::type;
    constexpr Walk w = decltype(walk)::value;
    constexpr bool g = decltype(general)::value;
    LAUNCH((logit_loss_bwd_kernel<S, T, w, g>), shape.blocks, threads_of(w), 0, static_cast<cudaStream_t>(stream), a,
           shape.width);
  });
}

const char* robust_logit_loss_fwd(const LogitForward& a, const Robust& r, void* stream) {
  if (a.rows() == 0) return robust_fwd(r, stream);
  if (a.rows() > kOneLaunch) {
    const char* failed = logit_loss_fwd(a, stream);
    return failed != nullptr ? failed : robust_fwd(r, stream);
  }
  const Shape shape = shape_of(a);
  const auto s = static_cast<cudaStream_t>(stream);
  unsigned* const ticket = ticket_for(s);
  if (ticket == nullptr) return failure();
  return launch(a, shape, [&](auto storage, auto real, auto walk, auto general) {
    using S = typename decltype(storage)::type;
    using T = typename decltype(real)::type;
    constexpr Walk w = decltype(walk)::value;
    constexpr bool g = decltype(general)::value;
    LAUNCH((robust_logit_loss_fwd_kernel<S, T, w, g>), shape.blocks, threads_of(w), 0, s, a, r, shape.width, ticket);
  });
}

const char* robust_logit_loss_block(const LogitForward& a, const Robust& r, void* grad, void* stream) {
  if (a.rows() == 0) return robust_fwd(r, stream);
  const size_t bytes = size_t(a.rows() * a.classes) * sizeof(float);
  auto go = [&](auto plain, auto general, auto* out) {
    const auto kernel = is_general(a) ? general : plain;
    constexpr size_t kWithoutAsking = 48 << 10;  // of shared memory
    if (bytes > kWithoutAsking)
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                           int(bytes));
    LAUNCH(kernel, 1, kBlockThreads, bytes, static_cast<cudaStream_t>(stream), a, r, out, lanes_for(a.classes, 4));
    return failure();
  };
#define ABSGD_BOTH(S, G)                                                                                 \
  robust_logit_loss_block_kernel<S, float, G, false>, robust_logit_loss_block_kernel<S, float, G, true>, \
      static_cast<G*>(grad)
  if (a.dtype == Dtype::f32) return go(ABSGD_BOTH(float, float));
  if (a.dtype == Dtype::f16) return go(ABSGD_BOTH(__half, float));
  return go(ABSGD_BOTH(__nv_bfloat16, __nv_bfloat16));
#undef ABSGD_BOTH
}

}  // namespace gpu
}  // namespace absgd
