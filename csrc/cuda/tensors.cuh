// Launches over many tensors: one kernel steps all of them, because the table of tensors travels in its argument (up to
// 32 KB since CUDA 12.1). Each tensor has some blocks of the launch, and each block looks up whose it is.
#pragma once

#include "tile.cuh"

namespace absgd {
namespace gpu {

constexpr int kArgumentLimit = 32764;
constexpr int64_t kMostElements = int64_t(1) << 31;  // of one entry of a table; a larger tensor takes several
constexpr unsigned kMostLaunched = 0x7fffffffu;      // blocks of one launch

// What every table has of its tensors. A kernel's own table is derived from it.
template <int kTensors>
struct TensorTable {
  static constexpr int kRoom = kTensors;
  void *param[kTensors], *grad[kTensors];
  unsigned count[kTensors], first_block[kTensors];
  int tensors;

  // The tensor that this block works on: the last one that starts at or before it.
  __device__ __forceinline__ int of_this_block() const {
    int low = 0, high = tensors - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_block[middle] <= blockIdx.x)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
};

__device__ __forceinline__ double learning_rate(const StepGroup& group) {
  return group.lr_tensor.data != nullptr ? read(group.lr_tensor) : group.lr;
}

// One element's step. rule: a functor of math.h.
template <class F, class S>
__device__ __forceinline__ void step_element(const F& rule, S& param, typename F::V* states, typename F::V grad) {
  typename F::V w = to_real(param);
  rule(w, states, grad);
  param = to_storage<S>(w);
}

// Fills a table with tensors, on the host, and starts the launch when it is full: launch(table, blocks).
template <class Table, class Launch>
struct Filler {
  Table table;
  Launch launch;
  unsigned blocks = 0;

  static_assert(sizeof(Table) <= kArgumentLimit, "the limit of a kernel's arguments");

  explicit Filler(Launch launch) : launch(launch) { table.tensors = 0; }
  // S: of the parameter; elements: of a block. has_room() says whether the table's own limits allow one more entry, and
  // fill(entry, first element) fills in what the table has beside.
  template <class S, class HasRoom, class Fill>
  void add(const StepTensor& t, int64_t elements, HasRoom has_room, Fill fill) {
    for (int64_t done = 0; done < t.count; done += kMostElements) {
      const int64_t count = t.count - done < kMostElements ? t.count - done : kMostElements;
      const unsigned needed = unsigned((count + elements - 1) / elements);
      if (table.tensors == Table::kRoom || needed > kMostLaunched - blocks || !has_room()) start();
      const int j = table.tensors++;
      table.param[j] = static_cast<S*>(t.param) + done;
      table.grad[j] = static_cast<S*>(t.grad) + done;
      table.count[j] = unsigned(count);
      table.first_block[j] = blocks;
      fill(j, done);
      blocks += needed;
    }
  }
  void start() {
    if (blocks > 0) launch(table, blocks);
    table.tensors = 0;
    blocks = 0;
  }
};
template <class Table, class Launch>
Filler<Table, Launch> filler_of(Launch launch) {
  return Filler<Table, Launch>(launch);
}

}  // namespace gpu
}  // namespace absgd
