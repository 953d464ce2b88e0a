// Lambda from a target for the effective sample size (math/target.h, MATH §1.7), by all threads of one block.
//     1. solve_target makes the range of the scores and their moments, which start the search.
//     2. It makes the sums of the search, once for each 1 / |lambda| that is tried, and stores lambda.
//     3. The kernel makes z of the scores (Tilt), adds up exp(z), and settles log s' as for any other lambda.
#pragma once

#include "weights.cuh"

namespace absgd {
namespace gpu {

inline bool is_target(const Robust& a) { return a.normalizer_kind == NormalizerKind::target; }

// How a sample follows from what is given, with the solution: z = (score - shift) / lambda.
struct Tilt {
  double lam, shift;

  template <class T>
  __device__ __forceinline__ Sample<T> operator()(Sample<T> s) const {
    if (s.finite) s.z = (s.z - T(shift)) / T(lam);
    return s;
  }
  template <class T, class In>
  __device__ __forceinline__ Sample<T> operator()(const Robust& a, const In& in, T z_max) const {
    return (*this)(in.sample(a, T(1), z_max));
  }
};

// The numbers of a row of logits after its launch, which stored the score as z.
template <class T>
struct StoredRow {
  T loss, z, t;

  __device__ __forceinline__ void load(const Robust& a, int64_t i) {
    loss = static_cast<const T*>(a.losses)[i];
    z = static_cast<const T*>(a.z)[i];
    t = a.sample_weight == nullptr ? T(1) : static_cast<const T*>(a.sample_weight)[i];
  }
  __device__ __forceinline__ Sample<T> sample(const Robust&, T, T) const {
    return {loss, z, z != T(-INFINITY), z - z == T(0)};
  }
};

// d of a score: its distance to the extreme score.
template <class T>
__device__ __forceinline__ T distance(T score, T shift) {
  const T x = score - shift;
  return x < 0 ? -x : x;
}

// The search, as the threads of a block share it.
struct Search {
  TargetRange range;
  TargetSolver solver;
  bool continues;
  Tilt found;
};

// The sums of four numbers of each thread, in double. Only thread 0 gets them. A barrier must come before the next
// call.
template <class T>
__device__ __forceinline__ TargetSums<double> block_sums(TargetSums<T> own) {
  SHARED(TargetSums<T>[kWarp], of_warps);
  const WarpTeam team{int(threadIdx.x) % kWarp, kWarp};
  own = {team.sum(own.s1), team.sum(own.s2), team.sum(own.d1), team.sum(own.d2)};
  if (team.lane == 0) of_warps[threadIdx.x / kWarp] = own;
  __syncthreads();
  TargetSums<double> total{0, 0, 0, 0};
  if (threadIdx.x != 0) return total;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w) total.merge(of_warps[w]);
  return total;
}

// The range of the scores of a block. Only thread 0 gets it. each: as for solve_target.
template <class T, class Each>
__device__ __forceinline__ TargetRange range_of(Each each) {
  SHARED(TargetRange[kWarp], of_warps);
  T negative_low = T(-INFINITY), high = T(-INFINITY);
  int finite = 0, nonfinite = 0;
  each([&](const Sample<T>& s) {
    nonfinite += s.valid && !s.finite;
    if (!s.finite) return;
    ++finite;
    negative_low = greater(negative_low, -s.z);
    high = greater(high, s.z);
  });
  const WarpTeam team{int(threadIdx.x) % kWarp, kWarp};
  const TargetRange own{-double(team.max(negative_low)), double(team.max(high)), team.sum(finite), team.sum(nonfinite)};
  if (team.lane == 0) of_warps[threadIdx.x / kWarp] = own;
  __syncthreads();
  TargetRange total = of_warps[0];
  if (threadIdx.x == 0)
    for (int w = 1; w < int(blockDim.x) / kWarp; ++w) total.add(of_warps[w]);
  return total;
}

// Solves for lambda and stores it. All threads get the result, with lambda as it is stored, in the precision of the
// state. each(f) calls f(Sample) for the samples of this thread, whose z is the score. Barriers follow the order below.
//     1. The block makes the range of the scores.
//     2. It makes the moments of the distances to the extreme score. One thread starts the search with these.
//     3. It makes the sums at the current u = 1 / |lambda|. One thread makes the next u of them. This repeats until the
//        share is met.
template <class T, class Each>
__device__ Tilt solve_target(const Robust& a, Each each) {
  using Wide = Lane<double>;
  SHARED(Search[1], shared);
  Search& search = shared[0];
  const double share = a.target_share;
  const TargetRange range = range_of<T>(each);
  if (threadIdx.x == 0) {
    search.range = range;
    search.found.shift = range.extreme(share);
  }
  __syncthreads();
  const T shift = T(search.found.shift), unit = T(1 / search.range.spread());
  TargetSums<T> moments{0, 0, 0, 0};
  each([&](const Sample<T>& s) {
    if (!s.finite) return;
    const T d = distance(s.z, shift) * unit;
    moments.s1 += d;
    moments.s2 += d * d;
  });
  const TargetSums<double> moment = block_sums(moments);
  if (threadIdx.x == 0) {
    const double n = double(search.range.finite);
    search.solver = TargetSolver::of<Wide, T>(share, search.range, moment.s1 / n, moment.s2 / n);
    search.continues = search.solver.begins();
  }
  __syncthreads();
  while (search.continues) {
    const T u = T(search.solver.u);
    TargetSums<T> own{0, 0, 0, 0};
    each([&](const Sample<T>& s) {
      if (s.finite) own.template add<Lane<T>>(distance(s.z, shift), u);
    });
    const TargetSums<double> sums = block_sums(own);
    if (threadIdx.x == 0) search.continues = search.solver.next<Wide>(sums);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    write(a.lam_on_device, search.solver.lam(share, a.z_limit));
    search.found.lam = read(a.lam_on_device);
  }
  __syncthreads();
  return search.found;
}

}  // namespace gpu
}  // namespace absgd
