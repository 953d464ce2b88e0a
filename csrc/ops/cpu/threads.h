// Tools of the CPU operators: threads, huge pages, and numbers in tensors.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../../cpu/kernels.h"
#include "../tensors.h"

namespace {

const Device kHere{kCpu, 0};

// Asks for huge pages, because fresh pages of a large result cost more than filling them: 64 k page faults at
// 2048 x 32000 fp32 (83 ms, with huge pages 46 ms).
void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kWorthwhile = size_t(8) << 20, kPage = 4096;
  if (bytes < kWorthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// One float32 or float64 number on the CPU that is part of the state.
struct Scalar {
  void* data;
  bool is_double;

  Scalar(const Tensor& t, const char* name) : data(t.data_ptr()) {
    const int32_t code = code_of(t);
    is_double = code == kDouble;
    STD_TORCH_CHECK((is_double || code == kFloat) && t.numel() == 1 && t.is_cpu(), name,
                    ": expected one float32 or float64 number on the CPU");
  }
  double get() const {
    return is_double ? *static_cast<const double*>(data) : double(*static_cast<const float*>(data));
  }
  void set(double value) const {
    if (is_double)
      *static_cast<double*>(data) = value;
    else
      *static_cast<float*>(data) = float(value);
  }
};

// ---- threads -------------------------------------------------------------------------------------------------------

// Up to this many elements one thread does all work: a parallel region costs about 1 us, the time of 16 k elements.
constexpr int64_t kSerialElements = 16384;

template <class F>
void parallel(int64_t items, int64_t elements_per_item, const F& f) {
  if (items <= 0) return;
  if (items == 1 || items * elements_per_item <= kSerialElements) return f(int64_t(0), items);
  const int64_t grain = kSerialElements / 2 / (elements_per_item > 0 ? elements_per_item : 1);
  torch::stable::parallel_for(0, items, grain > 0 ? grain : 1, f);
}

}  // namespace
