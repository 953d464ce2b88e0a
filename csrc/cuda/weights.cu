// Robust weights of any vector of losses, their vjp, rectified weights, and scaling a gradient. One launch up to
// kOneLaunch losses; beyond, one for the sums, the last block of which settles log s', and one for the weights.
#include "weights.cuh"

namespace absgd {
namespace gpu {
namespace {

constexpr int kThreads = 256;   // of a block of kBlock losses
constexpr int kOneBlock = 512;  // where one block does it all (1024 would leave 32 registers a thread, and spill)

template <class T>
__global__ void __launch_bounds__(kOneBlock, 1) robust_fwd_kernel(const Robust __grid_constant__ a) {
  robust_in_block<T>(a);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) robust_sums_kernel(const Robust __grid_constant__ a, unsigned* ticket) {
  const int64_t begin = int64_t(blockIdx.x) * kBlock, end = begin + kBlock < a.count ? begin + kBlock : a.count;
  const double lam = lam_of(a);
  const Partial own = partial_sum<T>(a, T(lam), begin, end);
  if (threadIdx.x == 0) a.partials[blockIdx.x] = own;
  if (!is_last_block(ticket)) return;
  using L = Lane<double>;
  const BlockTeam team = BlockTeam::here();
  double max = lowest(double()), sum = 0;
  long long good = 0, bad = 0;
  for (int64_t b = team.lane; b < gridDim.x; b += team.width) {
    const Partial* p = a.partials + b;
    const double top = load_shared_between_blocks(&p->max), part = load_shared_between_blocks(&p->sum);
    if (top > max) {
      sum *= L::exp(max - top);
      max = top;
    }
    sum += part * L::exp(top - max);
    good += load_shared_between_blocks(&p->good);
    bad += load_shared_between_blocks(&p->bad);
  }
  const double top = team.max(max);
  const Partial total{top, team.sum(sum * L::exp(max - top)), team.sum(good), team.sum(bad)};
  if (threadIdx.x != 0) return;
  const Outcome o = settle(a, lam, total);
  if (a.totals == nullptr) *a.outcome = o;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) robust_apply_kernel(const Robust __grid_constant__ a, unsigned* ticket) {
  const int64_t begin = int64_t(blockIdx.x) * kBlock, end = begin + kBlock < a.count ? begin + kBlock : a.count;
  const Outcome outcome = a.settled != nullptr ? known(*a.settled) : *a.outcome;
  const double own = apply<T>(a, lam_of(a), outcome, begin, end);
  if (threadIdx.x == 0) a.loss_partials[blockIdx.x] = own;
  if (!is_last_block(ticket)) return;
  const BlockTeam team = BlockTeam::here();
  double sum = 0;
  for (int64_t b = team.lane; b < gridDim.x; b += team.width) sum += load_shared_between_blocks(a.loss_partials + b);
  sum = team.sum(sum);
  if (threadIdx.x == 0 && a.loss != nullptr) *static_cast<T*>(a.loss) = T(sum);
}

// One thread: there are as many rows as processes or micro-batches.
__global__ void __launch_bounds__(32, 1) robust_settle_kernel(const Settle __grid_constant__ a) {
  using L = Lane<double>;
  if (threadIdx.x != 0) return;
  const Totals t = add_totals<L>(a.rows, a.rows_count, a.rows_stride);
  const Outcome o = settle(a, read(a.lam_on_device), {t.log_sum, 1, int64_t(t.good), int64_t(t.bad)});
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

template <class T>
__device__ void vjp(const Vjp& a, double dot, int64_t begin, int64_t end) {
  const T u = T(read(a.upstream_log_s)), share = T(a.shares[0]), share_state = T(a.shares[1]);
  const T inverse_lam = T(1 / read(a.lam));
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x)
    static_cast<T*>(a.out)[i] =
        robust_weight_vjp<Lane<T>>(static_cast<const T*>(a.weights)[i], static_cast<const T*>(a.upstream)[i], T(dot), u,
                                   share, share_state, inverse_lam);
}

// sum of W_i d_i; a row without a usable loss has weight NaN, and keeps that to itself. One block goes on to the vjp.
template <class T>
__global__ void __launch_bounds__(kOneBlock, 1)
    robust_weights_dot_kernel(const Vjp __grid_constant__ a, unsigned* ticket) {
  const BlockTeam team = BlockTeam::here();
  const bool alone = gridDim.x == 1;
  const int64_t begin = int64_t(blockIdx.x) * kBlock;
  const int64_t end = alone || begin + kBlock > a.count ? a.count : begin + kBlock;
  T sum = 0;
  for (int64_t i = begin + team.lane; i < end; i += team.width) {
    const T w = static_cast<const T*>(a.weights)[i];
    if (w == w) sum += w * static_cast<const T*>(a.upstream)[i];
  }
  const double own = double(team.sum(sum));
  if (alone) return vjp<T>(a, own, begin, end);
  if (threadIdx.x == 0) a.dot_partials[blockIdx.x] = own;
  if (!is_last_block(ticket)) return;
  double total = 0;
  for (int64_t b = team.lane; b < gridDim.x; b += team.width) total += load_shared_between_blocks(a.dot_partials + b);
  total = team.sum(total);
  if (threadIdx.x == 0) a.dot_partials[gridDim.x] = total;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) robust_weights_bwd_kernel(const Vjp __grid_constant__ a) {
  const int64_t begin = int64_t(blockIdx.x) * kBlock;
  vjp<T>(a, a.dot_partials[gridDim.x], begin, begin + kBlock < a.count ? begin + kBlock : a.count);
}

// ---- rectified weights (math.h RectifiedNumbers) --------------------------------------------------------------------

// One block, however many there are: what it is given is one number for each sample of a batch.
template <class T>
__global__ void __launch_bounds__(kOneBlock, 1) rectified_kernel(const T* products, int64_t count, T* weights) {
  const BlockTeam team = BlockTeam::here();
  RectifiedSum<Lane<double>> own{0, 0};
  for (int64_t i = team.lane; i < count; i += team.width) own.add(double(products[i]));
  const double plain = team.sum(own.plain), scaled = team.sum(own.scaled);
  const auto numbers = RectifiedNumbers<Lane<T>>::template of<T>(plain, scaled);
  for (int64_t i = team.lane; i < count; i += team.width) weights[i] = numbers.weight(products[i]);
}

// ---- gradient scaling ----------------------------------------------------------------------------------------------

constexpr int kScaleBlock = 4096;  // elements of a block of kThreads

template <class S, class T, class G>
__global__ void __launch_bounds__(kThreads, 4) scale_kernel(const ScaleArgs __grid_constant__ a, bool constant) {
  const T* upstream = static_cast<const T*>(a.upstream);
  const S* in = static_cast<const S*>(a.source);
  G* out = static_cast<G*>(a.grad);
  const T one = *upstream;
  if (constant && one == T(1) && a.source == a.grad) return;  // loss.backward(): the gradient is already there
  const int64_t count = a.batch * a.classes * a.inner;
  const int64_t begin = int64_t(blockIdx.x) * kScaleBlock,
                end = begin + kScaleBlock < count ? begin + kScaleBlock : count;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const T u = constant ? one : upstream[i / (a.classes * a.inner) * a.inner + i % a.inner];
    out[i] = to_storage<G>(to_real(in[i]) * u);
  }
}

}  // namespace

const char* robust_fwd(const Robust& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  auto go = [&](auto t) {
    using T = typename decltype(t)::type;
    if (a.count <= kOneLaunch) {
      const int threads = a.count <= kThreads ? kThreads : kOneBlock;
      LAUNCH((robust_fwd_kernel<T>), 1, threads, 0, s, a);
      return;
    }
    unsigned* const ticket = ticket_for(s);
    if (ticket == nullptr) return;  // failure() has the reason
    if (a.settled == nullptr || a.totals != nullptr)
      LAUNCH((robust_sums_kernel<T>), unsigned(a.blocks()), kThreads, 0, s, a, ticket);
    if (a.totals == nullptr) LAUNCH((robust_apply_kernel<T>), unsigned(a.blocks()), kThreads, 0, s, a, ticket);
  };
  a.dtype == Dtype::f64 ? go(Tag<double>{}) : go(Tag<float>{});
  return failure();
}

const char* robust_settle(const Settle& a, void* stream) {
  LAUNCH((robust_settle_kernel), 1, 32, 0, static_cast<cudaStream_t>(stream), a);
  return failure();
}

const char* robust_weights_bwd(const RobustArgs& a, DeviceNumber lam, const void* upstream, DeviceNumber upstream_log_s,
                               const double* shares, double* dot_partials, void* out, void* stream) {
  if (a.count == 0) return nullptr;
  const Vjp v{a.weights, upstream, a.count, lam, upstream_log_s, shares, dot_partials, out};
  const auto s = static_cast<cudaStream_t>(stream);
  auto go = [&](auto t) {
    using T = typename decltype(t)::type;
    if (a.count <= kOneLaunch) {
      const int threads = a.count <= kThreads ? kThreads : kOneBlock;
      LAUNCH((robust_weights_dot_kernel<T>), 1, threads, 0, s, v, nullptr);
      return;
    }
    unsigned* const ticket = ticket_for(s);
    if (ticket == nullptr) return;
    LAUNCH((robust_weights_dot_kernel<T>), unsigned(a.blocks()), kThreads, 0, s, v, ticket);
    LAUNCH((robust_weights_bwd_kernel<T>), unsigned(a.blocks()), kThreads, 0, s, v);
  };
  a.dtype == Dtype::f64 ? go(Tag<double>{}) : go(Tag<float>{});
  return failure();
}

const char* rectified(Dtype dtype, const void* products, int64_t count, void* weights, void* stream) {
  if (count == 0) return nullptr;
  auto go = [&](auto t) {
    using T = typename decltype(t)::type;
    const int threads = count <= kThreads ? kThreads : kOneBlock;
    LAUNCH((rectified_kernel<T>), 1, threads, 0, static_cast<cudaStream_t>(stream), static_cast<const T*>(products),
           count, static_cast<T*>(weights));
  };
  dtype == Dtype::f64 ? go(Tag<double>{}) : go(Tag<float>{});
  return failure();
}

const char* scale(const ScaleArgs& a, bool constant, void* stream) {
  const int64_t count = a.batch * a.classes * a.inner;
  if (count == 0) return nullptr;
  const unsigned blocks = unsigned((count + kScaleBlock - 1) / kScaleBlock);
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
