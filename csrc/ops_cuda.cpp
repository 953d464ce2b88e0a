// The CUDA operators: results, scratch memory, device and stream, in ops/cuda/. Schemas are in absgd_fast/ops/,
// kernels in cuda/, formulas in math.h. Nothing here waits for the device.
#include "ops/cuda/losses.h"
#include "ops/cuda/step.h"
#include "ops/cuda/weighted.h"
#include "ops/cuda/weights.h"

#ifndef ABSGD_DISPATCH_KEY  // a test runs these operators on tensors of the CPU
#define ABSGD_DISPATCH_KEY CUDA
#endif

namespace {

// Why torch's stream cannot be asked for, or an empty string. Needs no tensor and no GPU.
std::string cuda_unbound() {
  const char* const failed = torch_stream_unbound();
  return failed == nullptr ? "" : failed;
}

// "DRIVER RUNTIME": the newest CUDA that the driver serves (0 without a driver), and the CUDA that is linked in.
std::string cuda_versions() {
  const gpu::Versions v = gpu::versions();
  return std::to_string(v.driver) + " " + std::to_string(v.runtime);
}

std::string cuda_signatures() {
  std::string out;
  ABSGD_OPS(ABSGD_SIGNATURE_LINE)
  ABSGD_SIGNATURE_LINE(logit_loss_backward)
  ABSGD_SIGNATURE_LINE(settled_logit_loss)
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(absgd_fast, ABSGD_DISPATCH_KEY, m){
    ABSGD_OPS(ABSGD_IMPL) ABSGD_IMPL(logit_loss_backward)
        ABSGD_IMPL(settled_logit_loss)} STABLE_TORCH_LIBRARY_IMPL(absgd_fast, CompositeExplicitAutograd, m) {
  ABSGD_IMPL(cuda_signatures) ABSGD_IMPL(cuda_unbound) ABSGD_IMPL(cuda_versions)
}

// The same look-up for whoever has no torch at hand (tests/test_cuda_binding.py): null, or what is missing.
extern "C" __attribute__((visibility("default"))) const char* absgd_fast_stream(int32_t device, void** stream) {
  return torch_stream(device, stream);
}
