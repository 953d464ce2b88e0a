// The part of CUDA's runtime that launchers use. Device memory is host memory, and every call has finished on return,
// but for what a stream made here is asked to write: that comes when it is waited for.
//
// A test says which streams are captured (simt_capture). Then the rules of cudaStreamCaptureModeGlobal hold: memory can
// be had in relaxed mode only, the legacy stream cannot be used, and work on a captured stream is recorded, not done.
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "runtime.h"

namespace simt {

int last_error;

namespace {

std::mutex guard;
std::unordered_map<const void*, size_t> asked_for;  // cudaFuncAttributeMaxDynamicSharedMemorySize of a kernel

constexpr int kDevices = 2;
thread_local int current_device;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

struct Write {
  void* p;
  int value;
  size_t bytes;
};
std::unordered_map<cudaStream_t, std::vector<Write>> made;  // streams made here, and what they have still to write
std::set<cudaStream_t> captured;

bool is_legacy(cudaStream_t stream) { return stream == nullptr || stream == cudaStreamLegacy; }

cudaError_t refuse(cudaError_t error) {
  last_error = error;
  return error;
}

// What a call that may wait, or use the legacy stream, meets while a stream is captured.
cudaError_t unless_captured(cudaError_t error, bool relaxed_is_enough) {
  const std::lock_guard<std::mutex> lock(guard);
  if (captured.empty() || (relaxed_is_enough && capture_mode == cudaStreamCaptureModeRelaxed)) return cudaSuccess;
  return refuse(error);
}

void finish(std::vector<Write>& writes) {
  for (const Write& w : writes) memset(w.p, w.value, w.bytes);
  writes.clear();
}

// Nobody may count on what new memory holds.
cudaError_t allocate(void** p, size_t bytes) {
  if (const cudaError_t error = unless_captured(cudaErrorStreamCaptureUnsupported, true)) return error;
  if (posix_memalign(p, 256, bytes)) return refuse(cudaErrorMemoryAllocation);
  memset(*p, 0xa5, bytes);
  return cudaSuccess;
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

cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return refuse(cudaErrorInvalidDevice);
  return current_device = device, cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) { return *count = kDevices, cudaSuccess; }
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

cudaError_t cudaMalloc(void** p, size_t bytes) { return allocate(p, bytes); }
cudaError_t cudaFree(void* p) {
  if (const cudaError_t error = unless_captured(cudaErrorStreamCaptureUnsupported, true)) return error;
  return free(p), cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return allocate(p, bytes); }
cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
cudaError_t cudaHostGetDevicePointer(void** device, void* p, unsigned) { return *device = p, cudaSuccess; }
cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) { return *p = const_cast<void*>(symbol), cudaSuccess; }
cudaError_t cudaMemset(void* p, int value, size_t n) {
  if (const cudaError_t error = unless_captured(cudaErrorStreamCaptureImplicit, false)) return error;
  return memset(p, value, n), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t stream) {
  if (is_legacy(stream)) return cudaMemset(p, value, n);
  const std::lock_guard<std::mutex> lock(guard);
  if (captured.count(stream)) return cudaSuccess;
  const auto own = made.find(stream);
  if (own == made.end()) return memset(p, value, n), cudaSuccess;
  return own->second.push_back({p, value, n}), cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  if (const cudaError_t error = unless_captured(cudaErrorStreamCaptureImplicit, false)) return error;
  return memmove(to, from, n), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind, cudaStream_t stream) {
  if (is_legacy(stream)) return cudaMemcpy(to, from, n, kind);
  const std::lock_guard<std::mutex> lock(guard);
  return captured.count(stream) ? cudaSuccess : (memmove(to, from, n), cudaSuccess);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  static uintptr_t last = uintptr_t(1) << 40;  // far from what a test calls a stream
  const std::lock_guard<std::mutex> lock(guard);
  *stream = reinterpret_cast<cudaStream_t>(last += 8);
  made[*stream];
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {  // waits for nothing; what is not written now will be, sometime
  const std::lock_guard<std::mutex> lock(guard);
  return made.erase(stream) ? cudaSuccess : refuse(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const std::lock_guard<std::mutex> lock(guard);
  *status = captured.count(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return is_legacy(stream) && !captured.empty() ? refuse(cudaErrorStreamCaptureImplicit) : cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (is_legacy(stream))
    if (const cudaError_t error = unless_captured(cudaErrorStreamCaptureImplicit, false)) return error;
  const std::lock_guard<std::mutex> lock(guard);
  if (captured.count(stream)) return refuse(cudaErrorStreamCaptureUnsupported);
  if (const auto own = made.find(stream); own != made.end()) finish(own->second);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  if (const cudaError_t error = unless_captured(cudaErrorStreamCaptureUnsupported, false)) return error;
  const std::lock_guard<std::mutex> lock(guard);
  for (auto& [stream, writes] : made) finish(writes);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
}

void simt_capture(void* stream, int captures) {
  const std::lock_guard<std::mutex> lock(guard);
  if (captures)
    captured.insert(static_cast<cudaStream_t>(stream));
  else
    captured.erase(static_cast<cudaStream_t>(stream));
}
