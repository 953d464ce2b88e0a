// Robust weights inside a kernel (MATH §1). The parts, in the order in which a kernel uses them:
//     1. Given, Sample       one loss with its z, and whether it is finite
//     2. RunningSums         the sums of the losses that one thread has seen: max z, sum of exp(z - max), ...
//     3. block_sums          the sums of a block; launch_sums: those of all blocks, by the last block
//     4. settle              log s' and the next state, by one thread
//     5. Weighed, apply      weights and factors of the losses
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace absgd {
namespace gpu {

constexpr int kAtOnce = 4;  // losses that a thread loads before it uses the first, in every loop over losses

// Threads of a block that does the whole work alone. 1024 would leave 32 registers a thread, which would spill.
constexpr int kOneBlockThreads = 512;
inline int one_block_threads(int64_t count) { return count <= kThreads ? kThreads : kOneBlockThreads; }

// The losses of one block, in a launch of loss_blocks() blocks.
struct LossRange {
  int64_t begin, end;
  explicit __device__ __forceinline__ LossRange(int64_t count)
      : begin(int64_t(blockIdx.x) * kLossBlock), end(begin + kLossBlock) {
    if (end > count) end = count;
  }
};

// One loss with its z; whether it is valid (not ignored); and whether it is also finite.
template <class T>
struct Sample {
  T loss, z;
  bool valid, finite;

  // limit: the largest |z| that counts as finite. z_max: the largest z that does.
  __device__ __forceinline__ Sample(T loss, T z, bool valid, bool finite)
      : loss(loss), z(z), valid(valid), finite(finite) {}
  __device__ __forceinline__ Sample(T loss, T score, bool valid, T lam, T limit, T z_max)
      : loss(loss), z(score / lam), valid(valid) {
    finite = valid & is_usable<Lane<T>>(loss, score, z, limit) & (z <= z_max);
  }
  // The z that backward and `ABLoss.last` make the weight from. It is -inf in an ignored row, whose exp(z - log s') is
  // then 0, and NaN in a nonfinite row.
  __device__ __forceinline__ T stored() const { return finite ? z : valid ? T(NAN) : T(-INFINITY); }
};

template <class T>
__device__ __forceinline__ T z_max_of(const Robust& a) {
  return a.bounded ? T(a.settled->z_max) : T(INFINITY);
}
__device__ __forceinline__ double lam_of(const Robust& a) {
  return a.lam_on_device.data != nullptr ? read(a.lam_on_device) : a.lam;
}

// The numbers of one loss of a vector. All of them are read before any is used; the compiler leaves out what is not.
template <class T>
struct Given {
  T loss, score, t;
  bool valid;

  __device__ __forceinline__ void load(const Robust& a, int64_t i) {
    loss = static_cast<const T*>(a.losses)[i];
    score = a.scores == nullptr ? loss : static_cast<const T*>(a.scores)[i];
    t = a.sample_weight == nullptr ? T(1) : static_cast<const T*>(a.sample_weight)[i];
    valid = a.valid == nullptr || a.valid[i] != 0;
  }
  __device__ __forceinline__ Sample<T> sample(const Robust& a, T lam, T z_max) const {
    return {loss, score, valid, lam, T(a.z_limit), z_max};
  }
};

// How a sample follows from what is given, with a known lambda: z = score / lambda.
struct ByLam {
  double lam;

  template <class T>
  __device__ __forceinline__ Sample<T> operator()(const Robust& a, const Given<T>& in, T z_max) const {
    return in.sample(a, T(lam), z_max);
  }
};

// Calls f(index, In) for losses [begin, end), by all threads of a block. Each thread has kAtOnce losses under way. In:
// the numbers of a loss, such as Given.
template <class T, class In = Given<T>, class F>
__device__ __forceinline__ void for_losses(const Robust& a, int64_t begin, int64_t end, F f) {
  const int width = blockDim.x;
  for (int64_t i = begin + threadIdx.x; i < end; i += kAtOnce * width) {
    In in[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (i + u * width < end) in[u].load(a, i + u * width);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (i + u * width < end) f(i + u * width, in[u]);
  }
}

// The sums of a block or of a launch (launch.h LossSums), in double because many parts are added.
struct BatchSums {
  double max, sum, weighted, plain;
  long long finite, nonfinite;
};

// Adds `part` to `total`, which may be relative to another maximum: both are first made relative to the larger one.
// Total: LossSums<T> or BatchSums. T: the precision of the parts.
template <class T, class Total>
__device__ __forceinline__ void add_sums(Total& total, const LossSums<T>& part) {
  auto& [max, sum, weighted, plain, finite, nonfinite] = total;
  using Wide = std::decay_t<decltype(max)>;
  const Wide larger = greater(max, Wide(part.max));
  const Wide before = Lane<T>::exp(T(max - larger)), scale = Lane<T>::exp(T(Wide(part.max) - larger));
  max = larger;
  sum = sum * before + Wide(part.sum) * scale;
  weighted = weighted * before + Wide(part.weighted) * scale;
  plain += Wide(part.plain);
  finite += part.finite;
  nonfinite += part.nonfinite;
}

// The sums of the losses that one thread has seen.
template <class T>
struct RunningSums : LossSums<T> {
  __device__ __forceinline__ RunningSums() : LossSums<T>{lowest(T()), 0, 0, 0, 0, 0} {}
  __device__ __forceinline__ void add(const Sample<T>& s, T t) {
    this->nonfinite += s.valid && !s.finite;
    if (!s.finite) return;
    const T weighted = t * s.loss;
    add_sums<T>(static_cast<LossSums<T>&>(*this), {s.z, 1, weighted, weighted, 1, 0});
  }
};

// Calls f(sums of a warp) in thread 0, for one warp after the other, so the order is the same on every run. The other
// threads of the block go on meanwhile. A barrier must come before the next call, which writes `of_warps` again.
template <class T, class F>
__device__ __forceinline__ void each_warp(const LossSums<T>& own, F f) {
  SHARED(LossSums<T>[kWarp], of_warps);
  const WarpTeam team{int(threadIdx.x) % kWarp, kWarp};
  const T max = team.max(own.max), scale = Lane<T>::exp(own.max - max);
  const LossSums<T> sums{max,
                         team.sum(own.sum * scale),
                         team.sum(own.weighted * scale),
                         team.sum(own.plain),
                         team.sum(own.finite),
                         team.sum(own.nonfinite)};
  if (team.lane == 0) of_warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w) f(of_warps[w]);
}

// The sums of a block. Only thread 0 gets them.
template <class T>
__device__ __forceinline__ BatchSums block_sums(const LossSums<T>& own) {
  BatchSums total{lowest(double()), 0, 0, 0, 0, 0};
  each_warp(own, [&](const LossSums<T>& s) { add_sums<T>(total, s); });
  return total;
}

template <class T>
__device__ __forceinline__ LossSums<T> narrow(const BatchSums& s) {
  return {T(s.max), T(s.sum), T(s.weighted), T(s.plain), int(s.finite), int(s.nonfinite)};
}

// The sums of all blocks of a launch, by its last block. Only thread 0 gets them. Each block stored one LossSums, so a
// thread adds only a few.
template <class T>
__device__ __forceinline__ BatchSums launch_sums(const LossSums<T>* parts, int blocks) {
  LossSums<T> own{lowest(T()), 0, 0, 0, 0, 0};
  for (int b = threadIdx.x; b < blocks; b += kAtOnce * blockDim.x) {
    LossSums<T> in[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (b + u * int(blockDim.x) < blocks) in[u] = parts[b + u * int(blockDim.x)];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (b + u * int(blockDim.x) < blocks) add_sums<T>(own, in[u]);
  }
  return block_sums(own);
}

// The sum of the numbers that every block stored, by the last block.
__device__ __forceinline__ double sum_of_blocks(const double* parts) {
  const int width = blockDim.x, blocks = gridDim.x;
  double sum = 0;
  for (int b = threadIdx.x; b < blocks; b += kAtOnce * width) {
    double in[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) in[u] = b + u * width < blocks ? parts[b + u * width] : 0;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) sum += in[u];
  }
  return BlockTeam::here().sum(sum);
}

// Weight and factor of a loss (math/weights.h RobustNumbers): 0 if it is ignored, NaN if it is nonfinite.
template <class T>
struct Weighed {
  T weight, factor;

  __device__ __forceinline__ Weighed(const RobustNumbers<Lane<T>>& numbers, const Sample<T>& s, T t) {
    const T otherwise = s.valid ? T(NAN) : T(0);
    weight = s.finite ? numbers.weight(s.z) : otherwise;
    factor = s.finite ? numbers.factor(weight, t) : otherwise;
  }
};

// log s' and the next state, from the sums of a batch, by one thread. Nothing is written. shift: NormalizerConfig's.
template <bool kTarget = false>
__device__ inline WeightUpdate weight_update_of(const Robust& a, double lam, const BatchSums& p, double shift = 0) {
  using L = Lane<double>;
  NormalizerConfig rule = a;
  rule.lam = lam;
  rule.shift = shift;
  if constexpr (kTarget)
    return target_weight_update<L>(rule, read(a.log_s), p.max, p.sum, p.finite, p.nonfinite);
  else
    return next_weight_update<L>(rule, read(a.log_s), p.max, p.sum, p.finite, p.nonfinite);
}

__device__ inline void write_partial_stats(const Robust& a, const BatchSums& p) {
  a.partial_stats[0] = p.finite > 0 ? p.max + Lane<double>::log(p.sum) : -INFINITY;
  a.partial_stats[1] = double(p.finite);
  a.partial_stats[2] = double(p.nonfinite);
}

// By one thread of the launch: settles log s', writes the next state and returns the update. If the partial statistics
// are asked for, it writes those and nothing else.
template <bool kTarget = false>
__device__ inline WeightUpdate settle(const Robust& a, double lam, const BatchSums& p, double shift = 0) {
  if (a.partial_stats != nullptr) {
    write_partial_stats(a, p);
    return {};
  }
  const WeightUpdate o = weight_update_of<kTarget>(a, lam, p, shift);
  if (a.new_log_s.data != nullptr) write(a.new_log_s, o.new_log_s);
  if (a.dlog_s != nullptr) {
    a.dlog_s[0] = o.dlog_s;
    a.dlog_s[1] = o.dlog_s_state;
  }
  if (a.update) {
    if (o.nonfinite > 0)
      ++*a.nonfinite;
    else
      write(a.log_s, o.new_log_s);
  }
  return o;
}

// The part of an already settled normaliser that weights need.
__device__ inline WeightUpdate known(const Normalizer& s) { return {s.log_s, 0, 0, 0, s.scale, 0, 0}; }

// (1/n) sum_i t_i (W_i + mix) L_i from the sums, whose weighted sum lacks the factor exp(max - log s'). Valid only when
// max_weight clips nothing.
__device__ inline double loss_of(const BatchSums& p, const Weighing& w) {
  if (p.nonfinite > 0) return NAN;
  if (p.finite == 0) return 0;
  return w.inverse_n * (Lane<double>::exp(p.max - w.log_s) * p.weighted + w.mix * p.plain);
}

// Writes weight, factor, loss and validity of losses [begin, end), by a whole block. Returns their part of the robust
// loss, the sum of factor_i * loss_i. by: ByLam or Tilt.
template <class T, class By>
__device__ double apply(const Robust& a, const By& by, const WeightUpdate& o, int64_t begin, int64_t end) {
  const auto numbers = RobustNumbers<Lane<T>>::template of<T>(Weighing::of(by.lam, a.mix, a.max_weight, o));
  const T z_max = z_max_of<T>(a);
  T sum = 0;
  for_losses<T>(a, begin, end, [&](int64_t i, const Given<T>& in) {
    const Sample<T> s = by(a, in, z_max);
    const Weighed<T> own(numbers, s, in.t);
    if (s.valid) sum += own.factor * s.loss;
    static_cast<T*>(a.weights)[i] = own.weight;
    if (a.factor != nullptr) static_cast<T*>(a.factor)[i] = own.factor;
    if (a.losses_out != nullptr) static_cast<T*>(a.losses_out)[i] = s.valid ? s.loss : T(0);
    if (a.valid_out != nullptr) static_cast<T*>(a.valid_out)[i] = T(s.valid);
  });
  return double(BlockTeam::here().sum(sum));
}

// The sums of losses [begin, end) of a vector, by a whole block. Only thread 0 gets them. by: ByLam or Tilt.
template <class T, class By>
__device__ BatchSums vector_sums(const Robust& a, const By& by, int64_t begin, int64_t end) {
  const T z_max = z_max_of<T>(a);
  RunningSums<T> own;
  for_losses<T>(a, begin, end, [&](int64_t, const Given<T>& in) { own.add(by(a, in, z_max), in.t); });
  return block_sums<T>(own);
}

}  // namespace gpu
}  // namespace absgd
