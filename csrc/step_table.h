// What the two makers of a StepTable share: the operator that is given tensors (ops_cpu.cpp) and the plan that keeps its
// table between steps (host.cpp). Standard library only.
#pragma once

#include <algorithm>
#include <vector>

#include "launch.h"

namespace absgd {

struct Layout {
  int64_t dim;
  const int64_t *sizes, *strides;  // (dim), in elements

  int64_t count() const {
    int64_t out = 1;
    for (int64_t d = 0; d < dim; ++d) out *= sizes[d];
    return out;
  }

  // Element i of the one and element i of the other lie at the same place.
  bool same(const Layout& other) const {
    if (dim != other.dim) return false;
    for (int64_t d = 0; d < dim; ++d)
      if (sizes[d] != other.sizes[d] || (sizes[d] > 1 && strides[d] != other.strides[d])) return false;
    return true;
  }

  // The elements fill a block of memory, each place once, in any order of dimensions.
  bool dense() const {
    int64_t expected = 1;
    bool row_major = true;
    for (int64_t d = dim - 1; d >= 0; --d) {
      row_major = row_major && (sizes[d] == 1 || strides[d] == expected);
      expected *= sizes[d];
    }
    if (row_major || expected == 0) return true;
    // channels_last and other permutations: walk the dimensions from the smallest stride up
    std::vector<int64_t> order;
    for (int64_t d = 0; d < dim; ++d)
      if (sizes[d] > 1) order.push_back(d);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
    expected = 1;
    for (int64_t d : order) {
      if (strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  }
};

// Whether two of the tensors that a step writes share memory (a parameter listed twice, `a.data = b.data`): then the
// tensors must be updated one after the other.
inline bool step_overlaps(const StepTensor* tensors, int64_t count) {
  struct Range {
    const char *begin, *end;
  };
  std::vector<Range> ranges;
  ranges.reserve(size_t(2 * count));
  for (int64_t j = 0; j < count; ++j) {
    const int64_t bytes = tensors[j].count * (tensors[j].dtype == Dtype::f64 ? 8 : 4);
    for (void* start : {tensors[j].param, tensors[j].buffer})
      if (start != nullptr && bytes > 0) ranges.push_back({static_cast<char*>(start), static_cast<char*>(start) + bytes});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t j = 1; j < ranges.size(); ++j)
    if (ranges[j].begin < ranges[j - 1].end) return true;
  return false;
}

}  // namespace absgd
