// The current stream of torch, from the libtorch_cuda that this process has loaded.
//
// Only one symbol of torch's CUDA library is needed. It is looked up at its first use and not linked. So one
// `_ops_cuda.so` serves every torch: it loads beside a torch without CUDA, and a library that was built beside such a
// torch serves a torch with CUDA. A weak reference would not work. Linkers drop a library that only weak references
// need (--as-needed, the default of Debian and Ubuntu), torch loads libtorch_cuda with local visibility, and the call
// would go to address 0.
#pragma once

#include <dlfcn.h>
#include <stdint.h>

#include <atomic>

namespace {

using TorchStream = int32_t (*)(int32_t device, void** stream);  // AOTITorchError: 0 is success

// The function, or null while no libtorch_cuda is loaded. A later call looks again, so the order of loading does not
// matter.
inline TorchStream find_torch_stream() {
  static std::atomic<TorchStream> found{nullptr};
  TorchStream function = found.load(std::memory_order_acquire);
  if (function != nullptr) return function;
  void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  // If torch is linked into one library, the symbol is among the global ones.
  void* const symbol = dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
  function = reinterpret_cast<TorchStream>(symbol);
  found.store(function, std::memory_order_release);
  return function;
}

// Null if the function was found, else the reason why it was not.
inline const char* torch_stream_unbound() {
  if (find_torch_stream() != nullptr) return nullptr;
  void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library == nullptr
             ? "no libtorch_cuda.so is loaded in this process"
             : "libtorch_cuda.so has no aoti_torch_get_current_cuda_stream, which torch 2.10 and later have";
}

// Stores the stream that torch uses on `device`. Returns null, or what failed.
inline const char* torch_stream(int32_t device, void** stream) {
  const TorchStream function = find_torch_stream();
  if (function == nullptr) return torch_stream_unbound();
  return function(device, stream) == 0 ? nullptr : "torch could not tell its current stream";
}

}  // namespace
