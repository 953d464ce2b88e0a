// Robust weights of losses inside a kernel: what each loss adds to the sums of its batch, what the sums of all blocks
// come to, and the weights of a batch that one block holds.
#pragma once

#include "tile.cuh"

namespace absgd {
namespace gpu {

constexpr int kAtOnce = 4;  // losses of a thread that are under way together, in every loop over losses

// One loss, and whether it counts.
template <class T>
struct Sample {
  T loss, z;
  bool valid, good;

  // top: the largest z that counts
  __device__ __forceinline__ Sample(T loss, T score, bool valid, T lam, T limit, T top)
      : loss(loss), z(score / lam), valid(valid) {
    good = valid & is_usable<Lane<T>>(loss, score, z, limit) & (z <= top);
  }
  // What backward and `ABLoss.last` make the weight from: exp(z - log s') is 0 where the row is ignored, NaN where bad.
  __device__ __forceinline__ T stored() const { return good ? z : valid ? T(NAN) : T(-INFINITY); }
};

template <class T>
__device__ __forceinline__ T top_of(const Robust& a) {
  return a.bounded ? T(a.settled->top) : T(INFINITY);
}
__device__ __forceinline__ double lam_of(const Robust& a) {
  return a.lam_on_device.data != nullptr ? read(a.lam_on_device) : a.lam;
}

// The numbers of one loss in a vector, read before any of them is used.
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
  __device__ __forceinline__ Sample<T> sample(const Robust& a, T lam, T top) const {
    return {loss, score, valid, lam, T(a.z_limit), top};
  }
};

// f(index, Given) for losses [begin, end) by the lanes of a block, kAtOnce loads of each under way together.
template <class T, class F>
__device__ __forceinline__ void for_losses(const Robust& a, int64_t begin, int64_t end, F f) {
  const int width = blockDim.x;
  for (int64_t i = begin + threadIdx.x; i < end; i += kAtOnce * width) {
    Given<T> in[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (i + u * width < end) in[u].load(a, i + u * width);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (i + u * width < end) f(i + u * width, in[u]);
  }
}

// The sums of the losses that one thread has seen.
template <class T>
struct RunningSums : LossSums<T> {
  using LossSums<T>::max;
  using LossSums<T>::sum;
  using LossSums<T>::weighted;

  __device__ __forceinline__ RunningSums() : LossSums<T>{lowest(T()), 0, 0, 0, 0, 0} {}
  __device__ __forceinline__ void add(const Sample<T>& s, T t) {
    using L = Lane<T>;
    this->good += s.good;
    this->bad += s.valid && !s.good;
    if (!s.good) return;
    const T top = greater(max, s.z), scale = L::exp(max - top), power = L::exp(s.z - top), own = t * s.loss;
    max = top;
    sum = sum * scale + power;
    weighted = weighted * scale + power * own;
    this->plain += own;
  }
};

// Sums of a launch, in double where numbers of many blocks meet.
struct BatchSums {
  double max, sum, weighted, plain;
  long long good, bad;
};

// f(sums of a warp), by thread 0 for one warp after the other: the same order on every run. The block's other threads
// go on, so a barrier has to come before the next call, which writes `of_warps` again.
template <class T, class F>
__device__ __forceinline__ void each_warp(const LossSums<T>& own, F f) {
  SHARED(LossSums<T>[kWarp], of_warps);
  const WarpTeam team{int(threadIdx.x) % kWarp, kWarp};
  const T top = team.max(own.max), scale = Lane<T>::exp(own.max - top);
  const LossSums<T> sums{top,
                         team.sum(own.sum * scale),
                         team.sum(own.weighted * scale),
                         team.sum(own.plain),
                         team.sum(own.good),
                         team.sum(own.bad)};
  if (team.lane == 0) of_warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w) f(of_warps[w]);
}

// Adds sums that are relative to another maximum.
struct AddSums {
  BatchSums total{lowest(double()), 0, 0, 0, 0, 0};

  template <class T>
  __device__ __forceinline__ void operator()(const LossSums<T>& s) {
    using L = Lane<T>;  // what the parts themselves are exact to
    const double top = greater(total.max, double(s.max));
    const double before = L::exp(T(total.max - top)), scale = L::exp(T(double(s.max) - top));
    total = {top,
             total.sum * before + double(s.sum) * scale,
             total.weighted * before + double(s.weighted) * scale,
             total.plain + double(s.plain),
             total.good + s.good,
             total.bad + s.bad};
  }
};

// The sums of a block: in thread 0.
template <class T>
__device__ __forceinline__ BatchSums block_sums(const LossSums<T>& own) {
  AddSums all;
  each_warp(own, [&](const LossSums<T>& s) { all(s); });
  return all.total;
}

template <class T>
__device__ __forceinline__ LossSums<T> narrow(const BatchSums& s) {
  return {T(s.max), T(s.sum), T(s.weighted), T(s.plain), int(s.good), int(s.bad)};
}

// The sums of all blocks of a launch, by its last one: in thread 0. Each block left one LossSums, so a thread adds a
// few.
template <class T>
__device__ __forceinline__ BatchSums launch_sums(const LossSums<T>* parts, int blocks) {
  LossSums<T> own{lowest(T()), 0, 0, 0, 0, 0};
  for (int b = threadIdx.x; b < blocks; b += kAtOnce * blockDim.x) {
    LossSums<T> in[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (b + u * int(blockDim.x) < blocks) in[u] = parts[b + u * int(blockDim.x)];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (b + u * int(blockDim.x) >= blocks) continue;
      const T top = greater(own.max, in[u].max), before = Lane<T>::exp(own.max - top),
              scale = Lane<T>::exp(in[u].max - top);
      own = {top,
             own.sum * before + in[u].sum * scale,
             own.weighted * before + in[u].weighted * scale,
             own.plain + in[u].plain,
             own.good + in[u].good,
             own.bad + in[u].bad};
    }
  }
  return block_sums(own);
}

// The sum of one number of every block, by the last block.
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

// Weight and factor of a loss: 0 where it is ignored, NaN where it is bad.
template <class T>
struct Weighed {
  T weight, factor;

  __device__ __forceinline__ Weighed(const RobustNumbers<Lane<T>>& numbers, const Sample<T>& s, T t) {
    const T otherwise = s.valid ? T(NAN) : T(0);
    weight = s.good ? numbers.weight(s.z) : otherwise;
    factor = s.good ? numbers.factor(weight, t) : otherwise;
  }
};

// By one thread: the outcome of the sums.
__device__ inline Outcome outcome_of(const Robust& a, double lam, const BatchSums& p) {
  RobustRule rule = a;
  rule.lam = lam;
  return next_outcome<Lane<double>>(rule, read(a.log_s), p.max, p.sum, p.good, p.bad);
}

__device__ inline void write_totals(const Robust& a, const BatchSums& p) {
  a.totals[0] = p.good > 0 ? p.max + Lane<double>::log(p.sum) : -INFINITY;
  a.totals[1] = double(p.good);
  a.totals[2] = double(p.bad);
}

// By one thread of the launch: the same, and the state after it. Or the sums alone, where those are asked for.
__device__ inline Outcome settle(const Robust& a, double lam, const BatchSums& p) {
  if (a.totals != nullptr) {
    write_totals(a, p);
    return {};
  }
  const Outcome o = outcome_of(a, lam, p);
  if (a.new_log_s.data != nullptr) write(a.new_log_s, o.new_log_s);
  if (a.shares != nullptr) {
    a.shares[0] = o.share;
    a.shares[1] = o.share_state;
  }
  if (a.update) {
    if (o.bad > 0)
      ++*a.nonfinite;
    else
      write(a.log_s, o.new_log_s);
  }
  return o;
}

// What was settled elsewhere, as far as weights need it.
__device__ inline Outcome known(const Settled& s) { return {s.log_s, 0, 0, 0, s.scale, 0, 0}; }

// (1/n) sum_i t_i (W_i + mix) L_i, without a bound on W: the sums have it up to exp(max - log s').
__device__ inline double loss_of(const BatchSums& p, const Weighing& w) {
  if (p.bad > 0) return NAN;
  if (p.good == 0) return 0;
  return w.inverse_n * (Lane<double>::exp(p.max - w.log_s) * p.weighted + w.mix * p.plain);
}

// The loss of one block's batch or of a part of it: the sum of factor_i * loss_i, and the rows of results.
template <class T>
__device__ double apply(const Robust& a, double lam, const Outcome& o, int64_t begin, int64_t end) {
  const auto numbers = RobustNumbers<Lane<T>>::template of<T>(Weighing::of(lam, a.mix, a.max_weight, o));
  const T top = top_of<T>(a);
  T sum = 0;
  for_losses<T>(a, begin, end, [&](int64_t i, const Given<T>& in) {
    const Sample<T> s = in.sample(a, T(lam), top);
    const Weighed<T> own(numbers, s, in.t);
    if (s.valid) sum += own.factor * s.loss;
    static_cast<T*>(a.weights)[i] = own.weight;
    if (a.factor != nullptr) static_cast<T*>(a.factor)[i] = own.factor;
    if (a.losses_out != nullptr) static_cast<T*>(a.losses_out)[i] = s.valid ? s.loss : T(0);
    if (a.valid_out != nullptr) static_cast<T*>(a.valid_out)[i] = T(s.valid);
  });
  return double(BlockTeam::here().sum(sum));
}

// The sums of losses [begin, end) of a vector, by a whole block: in thread 0.
template <class T>
__device__ BatchSums vector_sums(const Robust& a, double lam, int64_t begin, int64_t end) {
  const T top = top_of<T>(a);
  RunningSums<T> own;
  for_losses<T>(a, begin, end, [&](int64_t, const Given<T>& in) { own.add(in.sample(a, T(lam), top), in.t); });
  return block_sums<T>(own);
}

}  // namespace gpu
}  // namespace absgd
