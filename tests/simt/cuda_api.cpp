// The part of CUDA's runtime that launchers use. Device memory is host memory, and every call has finished on return.
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "runtime.h"

namespace simt {

int last_error;

namespace {

std::mutex guard;
std::unordered_map<const void*, size_t> asked_for;  // cudaFuncAttributeMaxDynamicSharedMemorySize of a kernel

cudaError_t refuse(cudaError_t error) {
  last_error = error;
  return error;
}

}  // namespace

size_t allowed_shared(const void* kernel) {
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = asked_for.find(kernel);
  return found == asked_for.end() ? kDefaultShared : std::max(found->second, kDefaultShared);
}

}  // namespace simt

using namespace simt;

extern "C" {

cudaError_t cudaGetLastError() { return static_cast<cudaError_t>(std::exchange(last_error, 0)); }
cudaError_t cudaPeekAtLastError() { return static_cast<cudaError_t>(last_error); }
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidValue) return "invalid argument";
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  if (error == cudaErrorLaunchFailure) return "unspecified launch failure";
  return error == cudaSuccess ? "no error" : "another error";
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kMaxShared) return refuse(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(guard);
  asked_for[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::pair<cudaDeviceAttr, int> known[] = {
      {cudaDevAttrMultiProcessorCount, 8},
      {cudaDevAttrMaxThreadsPerBlock, kMaxThreads},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrWarpSize, kWarp},
      {cudaDevAttrMaxSharedMemoryPerBlock, kDefaultShared},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, kMaxShared},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, kMaxShared + 1024},
      {cudaDevAttrL2CacheSize, 50 << 20},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
  };
  for (const auto& [name, its_value] : known)
    if (name == attribute) return *value = its_value, cudaSuccess;
  return refuse(cudaErrorInvalidValue);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t) {
  return *blocks = std::max(1, 2048 / std::max(threads, 1)), cudaSuccess;
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  return posix_memalign(p, 256, bytes) ? refuse(cudaErrorMemoryAllocation) : cudaSuccess;
}
cudaError_t cudaFree(void* p) { return free(p), cudaSuccess; }
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
cudaError_t cudaHostGetDevicePointer(void** device, void* p, unsigned) { return *device = p, cudaSuccess; }
cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) { return *p = const_cast<void*>(symbol), cudaSuccess; }
cudaError_t cudaMemset(void* p, int value, size_t n) { return memset(p, value, n), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t) { return cudaMemset(p, value, n); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  return memmove(to, from, n), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, n, kind);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  return std::swap(*mode, current), cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
}
