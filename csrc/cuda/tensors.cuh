// Launches over many tensors. One kernel steps all of them: the table of the tensors travels in its argument, which may
// have 32 KB since CUDA 12.1. Each tensor has some blocks of the launch, and each block looks up its tensor in the
// table.
#pragma once

#include "tile.cuh"

namespace absgd {
namespace gpu {

constexpr int kArgumentLimit = 32764;
constexpr int64_t kMostElements = int64_t(1) << 31;  // most elements of a table's entry; a larger tensor takes several
constexpr unsigned kMostLaunched = 0x7fffffffu;      // most blocks of a launch

// The part of the table that all kernels over tensors share. The table of each kernel is derived from it.
template <int kTensors>
struct TensorTable {
  static constexpr int kRoom = kTensors;
  void *param[kTensors], *grad[kTensors];
  unsigned count[kTensors], first_block[kTensors];
  int tensors;

  // The tensor that this block works on: the last one whose first block is not after this one.
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

// Steps one element with a rule, a functor of math/step.h.
template <class F, class S>
__device__ __forceinline__ void step_element(const F& rule, S& param, typename F::V* states, typename F::V grad) {
  typename F::V w = to_real(param);
  rule(w, states, grad);
  param = to_storage<S>(w);
}

// Fills a table with tensors, on the host. When the table is full it calls launch(table, blocks) and begins a new one.
template <class Table, class Launch>
struct Filler {
  Table table;
  Launch launch;
  unsigned blocks = 0;

  static_assert(sizeof(Table) <= kArgumentLimit, "the limit of a kernel's arguments");

  explicit Filler(Launch launch) : launch(launch) { table.tensors = 0; }
  // Adds a tensor. S: the type of the parameter. elements: elements that one block takes. has_room() says whether the
  // limits of the derived table allow one more entry. fill(entry, first element) fills in the derived table's own
  // fields.
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
