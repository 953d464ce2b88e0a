// The backward pass of a gradient that the forward pass has already made: it is multiplied by the upstream gradient.
#include "weights.cuh"

namespace absgd {
namespace gpu {
namespace {

constexpr int kScaleBlock = 4096;        // elements that a block takes at a time
constexpr unsigned kScaleBlocks = 4096;  // most blocks of a launch: 128000 blocks with nothing to do are not free

// The gradient times the upstream gradient. With `constant`, the upstream gradient is one number; otherwise each row
// has its own.
//     1. If the one number is 1 and the gradient stays in place, as after loss.backward(), the kernel ends at once.
//     2. Every block walks along the elements with the stride of the launch, kScaleBlock at a time.
//     3. A thread reads kAtOnce elements, then multiplies each by the factor of its row and stores it.
template <class S, class T, class G>
__global__ void __launch_bounds__(kThreads, 4) scale_kernel(const ScaleArgs __grid_constant__ a, bool constant) {
  const T* upstream = static_cast<const T*>(a.upstream);
  const S* in = static_cast<const S*>(a.source);
  G* out = static_cast<G*>(a.grad);
  const T one = *upstream;
  if (constant && one == T(1) && a.source == a.grad) return;
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

const char* scale(const ScaleArgs& a, bool constant, void* stream) {
  const int64_t count = a.batch * a.classes * a.inner;
  if (count == 0) return nullptr;
  const int64_t needed = (count + kScaleBlock - 1) / kScaleBlock;
  const unsigned blocks = needed < kScaleBlocks ? unsigned(needed) : kScaleBlocks;
  for_types(a.dtype, [&](auto types) {
    using K = decltype(types);
    const auto kernel = scale_kernel<typename K::G, typename K::T, typename K::S>;
    LAUNCH(kernel, blocks, kThreads, 0, static_cast<cudaStream_t>(stream), a, constant);
  });
  return failure();
}

}  // namespace gpu
}  // namespace absgd
