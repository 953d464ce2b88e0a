// Tensors that an operator updates in place: whether they share memory, and copies of those that do not have the layout
// that the kernels need.
#pragma once

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace {

// Ranges of memory. They clash if one that is written shares a byte with another.
struct Ranges {
  struct Range {
    const char *begin, *end;
    bool written;
  };
  std::vector<Range> all;

  void add(const void* start, size_t bytes, bool written = true) {
    const char* const begin = static_cast<const char*>(start);
    if (start != nullptr && bytes > 0) all.push_back({begin, begin + bytes, written});
  }
  bool clash() {
    std::sort(all.begin(), all.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    const char *end = nullptr, *end_written = nullptr;
    for (const Range& r : all) {
      if (r.begin < (r.written ? end : end_written)) return true;
      end = std::max(end, r.end);
      if (r.written) end_written = std::max(end_written, r.end);
    }
    return false;
  }
};

inline Layout layout_of(const Tensor& t) { return {t.dim(), t.sizes().data(), t.strides().data()}; }

// A tensor in the layout of `like`, which is dense, as the kernels need it. If it has another layout it is copied, and
// `restore` copies the result back.
struct Fitted {
  Tensor original, fitted;

  Fitted(const Tensor& t, const Tensor& like, Dtype dtype) : original(t), fitted(t) {
    STD_TORCH_CHECK(
        is_on(t, device_of(like)) && code_of(t) == code_of(dtype) && t.dim() == like.dim(),
        "step_: expected a parameter and a gradient of one dtype, and states of that dtype (float32 for half "
        "precision), all on one device and of equal shapes");
    for (int64_t d = 0; d < t.dim(); ++d)
      STD_TORCH_CHECK(t.size(d) == like.size(d),
                      "step_: got a gradient or state of another shape than its parameter, expected equal shapes");
    if (layout_of(t).same(layout_of(like)) && layout_of(t).dense()) return;
    fitted = empty_dense_like(like, dtype);
    torch::stable::copy_(fitted, original);
  }
  void restore() {
    if (fitted.data_ptr() != original.data_ptr()) torch::stable::copy_(original, fitted);
  }
};

}  // namespace
