// Robust weights of any vector of losses, their vjp, rectified weights, and scaling a gradient. One launch up to
// kOneBlock losses; beyond, one for the sums, the last block of which settles log s', and one for the weights.
#include "weights.cuh"

namespace absgd {
namespace gpu {
namespace {

constexpr int kThreads = 256;  // of a block of kLossBlock losses
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 2 : 4;  // such blocks in a multiprocessor: more of double would spill
constexpr int kAlone = 512;  // where one block does it all (1024 would leave 32 registers a thread, and spill)

// All of it by one block, or one of the stages.
template <class T>
__global__ void __launch_bounds__(kAlone, 1) robust_fwd_kernel(const Robust __grid_constant__ a) {
  SHARED(Outcome[1], outcome);
  const double lam = lam_of(a);
  if (a.settled == nullptr || a.totals != nullptr) {
    const BatchSums sums = vector_sums<T>(a, lam, 0, a.count);
    if (threadIdx.x == 0) outcome[0] = settle(a, lam, sums);
    if (a.totals != nullptr) {
      if (threadIdx.x == 0 && a.loss != nullptr) *static_cast<T*>(a.loss) = 0;  // of no rows of logits
      return;
    }
  } else if (threadIdx.x == 0) {
    outcome[0] = known(*a.settled);
  }
  __syncthreads();
  const double loss = apply<T>(a, lam, outcome[0], 0, a.count);
  if (threadIdx.x == 0 && a.loss != nullptr) *static_cast<T*>(a.loss) = T(loss);
}

// The losses of one block.
struct Range {
  int64_t begin, end;
  explicit __device__ __forceinline__ Range(int64_t count)
      : begin(int64_t(blockIdx.x) * kLossBlock), end(begin + kLossBlock) {
    if (end > count) end = count;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    robust_sums_kernel(const Robust __grid_constant__ a, unsigned* ticket) {
  const Range own(a.count);
  const double lam = lam_of(a);
  const BatchSums sums = vector_sums<T>(a, lam, own.begin, own.end);
  LossSums<T>* const parts = static_cast<LossSums<T>*>(a.sums);
  if (threadIdx.x == 0) parts[blockIdx.x] = narrow<T>(sums);
  if (!is_last_block(ticket)) return;
  const BatchSums total = launch_sums(parts, int(gridDim.x));
  if (threadIdx.x != 0) return;
  const Outcome o = settle(a, lam, total);
  if (a.totals == nullptr) *a.outcome = o;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    robust_apply_kernel(const Robust __grid_constant__ a, unsigned* ticket) {
  const Range range(a.count);
  const Outcome outcome = a.settled != nullptr ? known(*a.settled) : *a.outcome;
  const double own = apply<T>(a, lam_of(a), outcome, range.begin, range.end);
  if (threadIdx.x == 0) a.loss_partials[blockIdx.x] = own;
  if (!is_last_block(ticket)) return;
  const double sum = sum_of_blocks(a.loss_partials);
  if (threadIdx.x == 0 && a.loss != nullptr) *static_cast<T*>(a.loss) = T(sum);
}

// One thread: there are as many rows as processes or micro-batches.
__global__ void __launch_bounds__(32, 1) robust_settle_kernel(const Settle __grid_constant__ a) {
  using L = Lane<double>;
  if (threadIdx.x != 0) return;
  const Totals t = add_totals<L>(a.rows, a.rows_count, a.rows_stride);
  const Outcome o = settle(a, read(a.lam_on_device), {t.log_sum, 1, 0, 0, (long long)t.good, (long long)t.bad});
  *a.out = settled_of<L>(o, t, a.share, a.reference);
}

// ---- vjp (math.h robust_weight_vjp) --------------------------------------------------------------------------------

struct Vjp {
  const void *weights, *upstream;  // (count) real
  int64_t count;
  DeviceNumber lam, upstream_log_s;
  const double* shares;
  double* dot_partials;  // one per block, then their sum
  void* out;             // (count) real
};

// f(index, weight, upstream) for [begin, end) by the lanes of a block, kAtOnce of each under way together.
template <class T, class F>
__device__ __forceinline__ void for_pairs(const Vjp& a, int64_t begin, int64_t end, F f) {
  const T *weights = static_cast<const T*>(a.weights), *upstream = static_cast<const T*>(a.upstream);
  const int width = blockDim.x;
  for (int64_t i = begin + threadIdx.x; i < end; i += kAtOnce * width) {
    T w[kAtOnce], d[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (i + u * width >= end) continue;
      w[u] = weights[i + u * width];
      d[u] = upstream[i + u * width];
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (i + u * width < end) f(i + u * width, w[u], d[u]);
  }
}

template <class T>
__device__ void vjp(const Vjp& a, double dot, int64_t begin, int64_t end) {
  const T u = T(read(a.upstream_log_s)), share = T(a.shares[0]), share_state = T(a.shares[1]);
  const T inverse_lam = T(1 / read(a.lam));
  for_pairs<T>(a, begin, end, [&](int64_t i, T w, T d) {
    static_cast<T*>(a.out)[i] = robust_weight_vjp<Lane<T>>(w, d, T(dot), u, share, share_state, inverse_lam);
  });
}

// sum of W_i d_i; a row without a usable loss has weight NaN, and keeps that to itself. One block goes on to the vjp.
template <class T>
__global__ void __launch_bounds__(kAlone, 1)
    robust_weights_dot_kernel(const Vjp __grid_constant__ a, unsigned* ticket) {
  const BlockTeam team = BlockTeam::here();
  const bool alone = gridDim.x == 1;
  Range own(a.count);
  if (alone) own.end = a.count;
  T sum = 0;
  for_pairs<T>(a, own.begin, own.end, [&](int64_t, T w, T d) {
    if (w == w) sum += w * d;
  });
  const double dot = double(team.sum(sum));
  if (alone) return vjp<T>(a, dot, own.begin, own.end);
  if (threadIdx.x == 0) a.dot_partials[blockIdx.x] = dot;
  if (!is_last_block(ticket)) return;
  const double total = sum_of_blocks(a.dot_partials);
  if (threadIdx.x == 0) a.dot_partials[gridDim.x] = total;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>) robust_weights_bwd_kernel(const Vjp __grid_constant__ a) {
  const Range own(a.count);
  vjp<T>(a, a.dot_partials[gridDim.x], own.begin, own.end);
}

// ---- rectified weights (math.h RectifiedNumbers) --------------------------------------------------------------------

// One block, however many there are: what it is given is one number for each sample of a batch.
template <class T>
__global__ void __launch_bounds__(kAlone, 1) rectified_kernel(const T* products, int64_t count, T* weights) {
  const BlockTeam team = BlockTeam::here();
  RectifiedSum<Lane<double>> own{0, 0};
  for (int64_t i = team.lane; i < count; i += kAtOnce * team.width) {
    T in[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) in[u] = i + u * team.width < count ? products[i + u * team.width] : T(0);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) own.add(double(in[u]));
  }
  const double plain = team.sum(own.plain), scaled = team.sum(own.scaled);
  const auto numbers = RectifiedNumbers<Lane<T>>::template of<T>(plain, scaled);
  for (int64_t i = team.lane; i < count; i += team.width) weights[i] = numbers.weight(products[i]);
}

// ---- gradient scaling ----------------------------------------------------------------------------------------------

constexpr int kScaleBlock = 4096;        // elements of a block at a time
constexpr unsigned kScaleBlocks = 4096;  // at most: 128000 blocks that have nothing to do are not free

template <class S, class T, class G>
__global__ void __launch_bounds__(kThreads, 4) scale_kernel(const ScaleArgs __grid_constant__ a, bool constant) {
  const T* upstream = static_cast<const T*>(a.upstream);
  const S* in = static_cast<const S*>(a.source);
  G* out = static_cast<G*>(a.grad);
  const T one = *upstream;
  if (constant && one == T(1) && a.source == a.grad) return;  // loss.backward(): the gradient is already there
  const int64_t count = a.batch * a.classes * a.inner;
  for (int64_t begin = int64_t(blockIdx.x) * kScaleBlock; begin < count; begin += int64_t(gridDim.x) * kScaleBlock) {
    const int64_t end = begin + kScaleBlock < count ? begin + kScaleBlock : count;
    for (int64_t i = begin + threadIdx.x; i < end; i += kAtOnce * kThreads) {
      S given[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (i + u * kThreads < end) given[u] = in[i + u * kThreads];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t k = i + u * kThreads;
        if (k >= end) continue;
        const T factor = constant ? one : upstream[k / (a.classes * a.inner) * a.inner + k % a.inner];
        out[k] = to_storage<G>(to_real(given[u]) * factor);
      }
    }
  }
}

}  // namespace

Versions versions() {
  Versions out{0, 0};
  cudaDriverGetVersion(&out.driver);
  cudaRuntimeGetVersion(&out.runtime);
  cudaGetLastError();  // without a driver
  return out;
}

const char* robust_fwd(const Robust& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  auto go = [&](auto t) {
    using T = typename decltype(t)::type;
    if (a.count <= kOneBlock) {
      const int threads = a.count <= kThreads ? kThreads : kAlone;
      LAUNCH((robust_fwd_kernel<T>), 1, threads, 0, s, a);
      return;
    }
    unsigned* const ticket = ticket_for(s);
    if (ticket == nullptr) return;  // failure() has the reason
    const unsigned blocks = unsigned(a.loss_blocks());
    if (a.settled == nullptr || a.totals != nullptr) LAUNCH((robust_sums_kernel<T>), blocks, kThreads, 0, s, a, ticket);
    if (a.totals == nullptr) LAUNCH((robust_apply_kernel<T>), blocks, kThreads, 0, s, a, ticket);
  };
  a.dtype == Dtype::f64 ? go(Tag<double>{}) : go(Tag<float>{});
  return failure();
}

const char* robust_settle(const Settle& a, void* stream) {
  LAUNCH((robust_settle_kernel), 1, 32, 0, static_cast<cudaStream_t>(stream), a);
  return failure();
}

const char* robust_weights_bwd(const Robust& a, DeviceNumber lam, const void* upstream, DeviceNumber upstream_log_s,
                               const double* shares, double* dot_partials, void* out, void* stream) {
  if (a.count == 0) return nullptr;
  const Vjp v{a.weights, upstream, a.count, lam, upstream_log_s, shares, dot_partials, out};
  const auto s = static_cast<cudaStream_t>(stream);
  auto go = [&](auto t) {
    using T = typename decltype(t)::type;
    if (a.count <= kOneBlock) {
      const int threads = a.count <= kThreads ? kThreads : kAlone;
      LAUNCH((robust_weights_dot_kernel<T>), 1, threads, 0, s, v, nullptr);
      return;
    }
    unsigned* const ticket = ticket_for(s);
    if (ticket == nullptr) return;
    LAUNCH((robust_weights_dot_kernel<T>), unsigned(a.loss_blocks()), kThreads, 0, s, v, ticket);
    LAUNCH((robust_weights_bwd_kernel<T>), unsigned(a.loss_blocks()), kThreads, 0, s, v);
  };
  a.dtype == Dtype::f64 ? go(Tag<double>{}) : go(Tag<float>{});
  return failure();
}

const char* rectified(Dtype dtype, const void* products, int64_t count, void* weights, void* stream) {
  if (count == 0) return nullptr;
  auto go = [&](auto t) {
    using T = typename decltype(t)::type;
    const int threads = count <= kThreads ? kThreads : kAlone;
    LAUNCH((rectified_kernel<T>), 1, threads, 0, static_cast<cudaStream_t>(stream), static_cast<const T*>(products),
           count, static_cast<T*>(weights));
  };
  dtype == Dtype::f64 ? go(Tag<double>{}) : go(Tag<float>{});
  return failure();
}

const char* scale(const ScaleArgs& a, bool constant, void* stream) {
  const int64_t count = a.batch * a.classes * a.inner;
  if (count == 0) return nullptr;
  const int64_t needed = (count + kScaleBlock - 1) / kScaleBlock;
  const unsigned blocks = needed < kScaleBlocks ? unsigned(needed) : kScaleBlocks;
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.dtype == Dtype::f16) {
    LAUNCH((scale_kernel<float, float, __half>), blocks, kThreads, 0, s, a, constant);
    return failure();
  }
  for_storage(a.dtype, [&](auto storage, auto real) {
    using S = typename decltype(storage)::type;
    LAUNCH((scale_kernel<S, typename decltype(real)::type, S>), blocks, kThreads, 0, s, a, constant);
  });
  return failure();
}

}  // namespace gpu
}  // namespace absgd
