// The current stream of torch, asked of the libtorch_cuda that this process has loaded.
//
// The one symbol of torch's CUDA library is looked up at the first use instead of being linked, so one `_ops_cuda.so`
// serves every torch: it loads beside a torch without CUDA, and a library that was built there serves one with CUDA. A
// weak reference does not do: linkers drop the library that only weak references need (--as-needed, the default of
// Debian and Ubuntu), torch loads libtorch_cuda with local visibility, and the call would go to address 0.
#pragma once

#include <dlfcn.h>
#include <stdint.h>

#include <atomic>

namespace {

using TorchStream = int32_t (*)(int32_t device, void** stream);  // AOTITorchError: 0 is success

// Null while there is no libtorch_cuda; a later call looks again, so the order of loading does not matter.
inline TorchStream find_torch_stream() {
  static std::atomic<TorchStream> found{nullptr};
  TorchStream function = found.load(std::memory_order_acquire);
  if (function != nullptr) return function;
  void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  // A torch that is linked into one library has it among the global symbols.
  void* const symbol = dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
  function = reinterpret_cast<TorchStream>(symbol);
  found.store(function, std::memory_order_release);
  return function;
}

// Null, or why the stream cannot be asked for.
inline const char* torch_stream_unbound() {
  if (find_torch_stream() != nullptr) return nullptr;
  void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library == nullptr
             ? "no libtorch_cuda.so is loaded in this process"
             : "libtorch_cuda.so has no aoti_torch_get_current_cuda_stream, which torch 2.10 and later have";
}

// The stream that torch uses on `device`: null, or what failed.
inline const char* torch_stream(int32_t device, void** stream) {
  const TorchStream function = find_torch_stream();
  if (function == nullptr) return torch_stream_unbound();
  return function(device, stream) == 0 ? nullptr : "torch could not tell its current stream";
}

}  // namespace
