// What tests/test_tickets.py calls: the tickets, and the calls of CUDA's runtime that hand out their memory.
#include <cuda_runtime_api.h>
#include <stdint.h>

#define TEST extern "C" __attribute__((visibility("default")))

namespace absgd {
namespace gpu {
unsigned* ticket_for(cudaStream_t stream);
}  // namespace gpu
}  // namespace absgd

TEST unsigned* ticket_for(void* stream) { return absgd::gpu::ticket_for(static_cast<cudaStream_t>(stream)); }
TEST int set_device(int device) { return cudaSetDevice(device); }
TEST int last_error() { return cudaGetLastError(); }

// Memory asked for and written in one of the ways that go wrong while a stream is captured, or in the right one: 1
// where all calls succeed and the memory is zero, 0 where it is not, -1 where a call refuses. Not relaxed: as the
// thread is.
TEST int zeros(int relaxed, int on, int waits) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  if (relaxed) cudaThreadExchangeStreamCaptureMode(&mode);
  void* memory = nullptr;
  cudaStream_t own = nullptr;
  cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking);
  const cudaStream_t stream = on < 0 ? own : reinterpret_cast<cudaStream_t>(uintptr_t(on));
  const bool done = cudaMalloc(&memory, 4) == cudaSuccess && cudaMemsetAsync(memory, 0, 4, stream) == cudaSuccess &&
                    (!waits || cudaStreamSynchronize(stream) == cudaSuccess);
  cudaStreamDestroy(own);
  if (relaxed) cudaThreadExchangeStreamCaptureMode(&mode);
  return done ? *static_cast<unsigned*>(memory) == 0 : -1;
}
