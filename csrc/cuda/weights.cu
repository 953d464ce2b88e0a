// Robust weights of any vector of losses (MATH §1), and their vjp (MATH §1.3). Up to kOneBlock losses take one launch
// of one block. More losses take two launches: the first makes the sums, and its last block settles log s'; the second
// makes the weights. With a target for the effective sample size the first of the two has one block.
#include "target.cuh"

namespace absgd {
namespace gpu {
namespace {

template <class T>
constexpr int kResident = sizeof(T) == 8 ? 2 : 4;  // blocks that a multiprocessor must hold; more would spill in double

// Robust weights and loss of up to kOneBlock losses, by one block.
//     1. The block adds up exp(z) of the losses. It skips this if log s' was settled elsewhere.
//     2. One thread settles log s' and the next state. If only the partial statistics are asked for, it stores them,
//     and
//        the kernel ends here.
//     3. Every thread makes the weights and factors of its losses, and their parts of the robust loss.
//     4. The block adds up these parts.
template <class T>
__global__ void __launch_bounds__(kOneBlockThreads, 1) robust_fwd_kernel(const Robust __grid_constant__ a) {
  SHARED(WeightUpdate[1], update);
  const double lam = lam_of(a);
  if (a.settled == nullptr || a.partial_stats != nullptr) {
    const BatchSums sums = vector_sums<T>(a, ByLam{lam}, 0, a.count);
    if (threadIdx.x == 0) update[0] = settle(a, lam, sums);
    if (a.partial_stats != nullptr) {
      if (threadIdx.x == 0 && a.loss != nullptr) *static_cast<T*>(a.loss) = 0;  // the loss of no rows of logits
      return;
    }
  } else if (threadIdx.x == 0) {
    update[0] = known(*a.settled);
  }
  __syncthreads();
  const double loss = apply<T>(a, ByLam{lam}, update[0], 0, a.count);
  if (threadIdx.x == 0 && a.loss != nullptr) *static_cast<T*>(a.loss) = T(loss);
}

// The same with a target for the effective sample size, by one block of any number of losses, because every evaluation
// of the search needs all scores.
//     1. The block solves for lambda.
//     2. It adds up exp(z) of the losses.
//     3. One thread settles log s' and the next state.
//     4. Up to kOneBlock losses, the block makes weights, factors and loss. Otherwise robust_apply_kernel does.
template <class T>
__global__ void __launch_bounds__(kOneBlockThreads, 1) robust_target_kernel(const Robust __grid_constant__ a) {
  SHARED(WeightUpdate[1], update);
  const Tilt tilt = solve_target<T>(a, [&](auto f) {
    for_losses<T>(a, 0, a.count, [&](int64_t, const Given<T>& in) { f(in.sample(a, T(1), T(INFINITY))); });
  });
  const BatchSums sums = vector_sums<T>(a, tilt, 0, a.count);
  if (threadIdx.x == 0) update[0] = settle<true>(a, tilt.lam, sums, tilt.shift);
  if (a.count > kOneBlock) {
    if (threadIdx.x == 0) {
      *a.weight_update = update[0];
      *a.shift = tilt.shift;
    }
    return;
  }
  __syncthreads();
  const double loss = apply<T>(a, tilt, update[0], 0, a.count);
  if (threadIdx.x == 0 && a.loss != nullptr) *static_cast<T*>(a.loss) = T(loss);
}

// How the samples of robust_apply_kernel follow from what is given.
template <bool kTarget>
__device__ __forceinline__ auto solution_of(const Robust& a) {
  if constexpr (kTarget)
    return Tilt{lam_of(a), *a.shift};
  else
    return ByLam{lam_of(a)};
}

// The first of two launches: log s' of more than kOneBlock losses.
//     1. Every block adds up exp(z) of its losses, and stores its sums.
//     2. The last block adds up the sums of all blocks.
//     3. One of its threads settles log s' and the next state, or stores the partial statistics.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    robust_sums_kernel(const Robust __grid_constant__ a, unsigned* ticket) {
  const LossRange own(a.count);
  const double lam = lam_of(a);
  const BatchSums sums = vector_sums<T>(a, ByLam{lam}, own.begin, own.end);
  LossSums<T>* const parts = static_cast<LossSums<T>*>(a.sums);
  if (threadIdx.x == 0) parts[blockIdx.x] = narrow<T>(sums);
  if (!is_last_block(ticket)) return;
  const BatchSums total = launch_sums(parts, int(gridDim.x));
  if (threadIdx.x != 0) return;
  const WeightUpdate update = settle(a, lam, total);
  if (a.partial_stats == nullptr) *a.weight_update = update;
}

// The second of two launches: weights and loss of more than kOneBlock losses.
//     1. Every block makes the weights and factors of its losses, and stores the sum of their parts of the robust loss.
//     2. The last block adds up these sums.
// kTarget: lambda and the shift come from robust_target_kernel.
template <class T, bool kTarget>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    robust_apply_kernel(const Robust __grid_constant__ a, unsigned* ticket) {
  const LossRange range(a.count);
  const WeightUpdate update = a.settled != nullptr ? known(*a.settled) : *a.weight_update;
  const double own = apply<T>(a, solution_of<kTarget>(a), update, range.begin, range.end);
  if (threadIdx.x == 0) a.loss_partials[blockIdx.x] = own;
  if (!is_last_block(ticket)) return;
  const double sum = sum_of_blocks(a.loss_partials);
  if (threadIdx.x == 0 && a.loss != nullptr) *static_cast<T*>(a.loss) = T(sum);
}

// log s' of the partial statistics of several processes or micro-batches (MATH §1.6, §5). They are few, so one thread
// does everything.
//     1. It adds up the partial statistics.
//     2. It settles log s' and the next state, and stores the Normalizer that the weights are made with.
__global__ void __launch_bounds__(32, 1) robust_settle_kernel(const Settle __grid_constant__ a) {
  using L = Lane<double>;
  if (threadIdx.x != 0) return;
  const PartialStats t = add_partial_stats<L>(a.partials, a.partials_count, a.partials_stride);
  const WeightUpdate update =
      settle(a, read(a.lam_on_device), {t.log_sum, 1, 0, 0, (long long)t.count, (long long)t.nonfinite});
  *a.out = normalizer_of<L>(update, t, a.grad_multiplier, a.reference);
}

// ---- vjp (math/weights.h robust_weight_vjp) ------------------------------------------------------------------------

struct Vjp {
  const void *weights, *upstream;  // (count) real
  int64_t count;
  DeviceNumber lam, upstream_log_s;
  const double* dlog_s;  // WeightUpdate::dlog_s and dlog_s_state
  double* dot_partials;  // one sum per block, then the sum of all
  void* out;             // (count) real
};

// Calls f(index, weight, upstream) for [begin, end), by all threads of a block. Each thread has kAtOnce samples under
// way.
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

// Writes the vjp of samples [begin, end). dot: the sum of W_i d_i over all samples.
template <class T>
__device__ void vjp(const Vjp& a, double dot, int64_t begin, int64_t end) {
  const T u = T(read(a.upstream_log_s)), dlog_s = T(a.dlog_s[0]), dlog_s_state = T(a.dlog_s[1]);
  const T inverse_lam = T(1 / read(a.lam));
  for_pairs<T>(a, begin, end, [&](int64_t i, T w, T d) {
    static_cast<T*>(a.out)[i] = robust_weight_vjp<Lane<T>>(w, d, T(dot), u, dlog_s, dlog_s_state, inverse_lam);
  });
}

// The sum of W_i d_i over all samples. A sample with a nonfinite loss has weight NaN, and takes no part.
//     1. Every block adds up W_i d_i of its samples. A single block then writes the vjp, and the kernel ends here.
//     2. Every block stores its sum. The last block adds up the sums of all blocks.
template <class T>
__global__ void __launch_bounds__(kOneBlockThreads, 1)
    robust_weights_dot_kernel(const Vjp __grid_constant__ a, unsigned* ticket) {
  const BlockTeam team = BlockTeam::here();
  const bool alone = gridDim.x == 1;
  LossRange own(a.count);
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

// The vjp of every sample, with the sum that the launch before has stored.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>) robust_weights_bwd_kernel(const Vjp __grid_constant__ a) {
  const LossRange own(a.count);
  vjp<T>(a, a.dot_partials[gridDim.x], own.begin, own.end);
}

}  // namespace

const char* robust_fwd(const Robust& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  for_real(a.dtype, [&](auto real) {
    using T = typename decltype(real)::type;
    const bool target = is_target(a);
    if (target) LAUNCH((robust_target_kernel<T>), 1, one_block_threads(a.count), 0, s, a);
    if (a.count <= kOneBlock) {
      if (!target) LAUNCH((robust_fwd_kernel<T>), 1, one_block_threads(a.count), 0, s, a);
      return;
    }
    unsigned* const ticket = ticket_for(s);
    if (ticket == nullptr) return;  // failure() has the reason
    const unsigned blocks = unsigned(a.loss_blocks());
    if (!target && (a.settled == nullptr || a.partial_stats != nullptr))
      LAUNCH((robust_sums_kernel<T>), blocks, kThreads, 0, s, a, ticket);
    if (target)
      LAUNCH((robust_apply_kernel<T, true>), blocks, kThreads, 0, s, a, ticket);
    else if (a.partial_stats == nullptr)
      LAUNCH((robust_apply_kernel<T, false>), blocks, kThreads, 0, s, a, ticket);
  });
  return failure();
}

const char* robust_settle(const Settle& a, void* stream) {
  LAUNCH((robust_settle_kernel), 1, 32, 0, static_cast<cudaStream_t>(stream), a);
  return failure();
}

const char* robust_weights_bwd(const Robust& a, DeviceNumber lam, const void* upstream, DeviceNumber upstream_log_s,
                               const double* dlog_s, double* dot_partials, void* out, void* stream) {
  if (a.count == 0) return nullptr;
  const Vjp v{a.weights, upstream, a.count, lam, upstream_log_s, dlog_s, dot_partials, out};
  const auto s = static_cast<cudaStream_t>(stream);
  for_real(a.dtype, [&](auto real) {
    using T = typename decltype(real)::type;
    if (a.count <= kOneBlock) {
      LAUNCH((robust_weights_dot_kernel<T>), 1, one_block_threads(a.count), 0, s, v, nullptr);
      return;
    }
    unsigned* const ticket = ticket_for(s);
    if (ticket == nullptr) return;
    LAUNCH((robust_weights_dot_kernel<T>), unsigned(a.loss_blocks()), kThreads, 0, s, v, ticket);
    LAUNCH((robust_weights_bwd_kernel<T>), unsigned(a.loss_blocks()), kThreads, 0, s, v);
  });
  return failure();
}

}  // namespace gpu
}  // namespace absgd
