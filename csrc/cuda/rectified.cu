// Rectified weights (MATH §4.5), of one number for each sample of a batch. math/weights.h RectifiedNumbers has the
// formula.
#include "weights.cuh"

namespace absgd {
namespace gpu {
namespace {

// Rectified weights by one block, however many numbers there are.
//     1. Every thread adds up its positive finite numbers, in double.
//     2. The block adds up the sums of its threads.
//     3. Every thread reads its numbers again and divides them by the sum.
template <class T>
__global__ void __launch_bounds__(kOneBlockThreads, 1) rectified_kernel(const T* products, int64_t count, T* weights) {
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

}  // namespace

const char* rectified(Dtype dtype, const void* products, int64_t count, void* weights, void* stream) {
  if (count == 0) return nullptr;
  for_real(dtype, [&](auto real) {
    using T = typename decltype(real)::type;
    LAUNCH((rectified_kernel<T>), 1, one_block_threads(count), 0, static_cast<cudaStream_t>(stream),
           static_cast<const T*>(products), count, static_cast<T*>(weights));
  });
  return failure();
}

}  // namespace gpu
}  // namespace absgd
