// The versions of CUDA, and the place where kernels report labels out of range.
#include "tile.cuh"

namespace absgd {
namespace gpu {

Versions versions() {
  Versions out{0, 0};
  cudaDriverGetVersion(&out.driver);
  cudaRuntimeGetVersion(&out.runtime);
  cudaGetLastError();  // Without a driver the calls have left an error, which is cleared here.
  return out;
}

LabelReport* label_report() {
  static LabelReport* const report = [] {
    const Relaxed now;  // The first call may come while a graph is captured.
    void* memory = nullptr;
    if (cudaHostAlloc(&memory, sizeof(LabelReport), cudaHostAllocPortable | cudaHostAllocMapped) != cudaSuccess) {
      cudaGetLastError();
      return static_cast<LabelReport*>(nullptr);
    }
    auto* const out = static_cast<LabelReport*>(memory);
    *out = {};
    return out;
  }();
  return report;
}

}  // namespace gpu
}  // namespace absgd
