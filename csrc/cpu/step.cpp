// The loop of the momentum step. Compiled once per instruction set beside loops.cpp.
#include "../launch.h"
#include "lanes.h"

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {
namespace {

// One value: the last elements of a tensor.
template <class T>
struct OneLane {
  using V = T;
  static ABSGD_FN V set(T x) { return x; }
};

// 1 KB ahead: ResNet-32 39 -> 33 us, ResNet-50 10.0 -> 9.5 ms (512 B and 4 KB gain less; four registers at a time
// nothing; stores past the cache cost 1 ms). ResNet-50's 20 bytes a parameter then move at 61 GB/s, which is what the
// same two cores reach when they scale one vector in place (60 to 62 GB/s): memory is the limit there.
template <class T>
ABSGD_FN void ahead(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 1024);
}

// Elements [begin, end) of one tensor. begin is a multiple of kStepBlock, and so is end unless it is the tensor's end:
// an element is in the same place of the same kind of loop however the work is shared, which keeps every bit.
template <SgdForm form, class T>
void update_range(const StepTensor& t, const StepGroup& group, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  using One = OneLane<T>;
  static_assert(kStepBlock % L::N == 0, "a share is whole registers");
  T* param = static_cast<T*>(t.param);
  T* buffer = static_cast<T*>(t.buffer);
  const T* grad = static_cast<const T*>(t.grad);
  const SgdNumbers<L> many = SgdNumbers<L>::template of<T>(group, group.lr);
  int64_t i = begin;
  for (; i + L::N <= end; i += L::N) {
    ahead(param + i);
    ahead(grad + i);
    if (form != SgdForm::plain) ahead(buffer + i);
    typename L::V w = L::load(param + i), v = form == SgdForm::plain ? w : L::load(buffer + i);
    sgd_update<form, L>(w, v, L::load(grad + i), many);
    if (form != SgdForm::plain) L::store(buffer + i, v);
    L::store(param + i, w);
  }
  const SgdNumbers<One> single = SgdNumbers<One>::template of<T>(group, group.lr);
  for (; i < end; ++i) {
    T w = param[i], v = form == SgdForm::plain ? w : buffer[i];
    sgd_update<form, One>(w, v, grad[i], single);
    if (form != SgdForm::plain) buffer[i] = v;
    param[i] = w;
  }
}

template <class T>
void update(const StepTensor& t, const StepGroup& group, int64_t begin, int64_t end) {
  if (group.momentum == 0) return update_range<SgdForm::plain, T>(t, group, begin, end);
  if (group.heavy_ball) return update_range<SgdForm::heavy_ball, T>(t, group, begin, end);
  if (group.nesterov) return update_range<SgdForm::nesterov, T>(t, group, begin, end);
  update_range<SgdForm::momentum, T>(t, group, begin, end);
}

// The place of a flat index within a tensor, moved back to where a share may end.
ABSGD_FN int64_t place(const StepTensor& t, int64_t index) {
  const int64_t i = index - t.begin;
  return i <= 0 ? 0 : i >= t.count ? t.count : i - i % kStepBlock;
}

}  // namespace

void sgd_step(const StepTable& table, int64_t begin, int64_t end) {
  int64_t low = 0, high = table.tensor_count;  // the first tensor that ends after `begin`
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (table.tensors[middle].begin + table.tensors[middle].count > begin)
      high = middle;
    else
      low = middle + 1;
  }
  for (int64_t j = low; j < table.tensor_count && table.tensors[j].begin < end; ++j) {
    const StepTensor& t = table.tensors[j];
    if (j + 2 <
        table.tensor_count) {  // most tensors of a model are short, and each starts with three lines out of cache
      const StepTensor& later = table.tensors[j + 2];
      __builtin_prefetch(later.param);
      __builtin_prefetch(later.grad);
      __builtin_prefetch(later.buffer);
    }
    const StepGroup& group = table.groups[t.group];
    if (t.dtype == Dtype::f64)
      update<double>(t, group, place(t, begin), place(t, end));
    else
      update<float>(t, group, place(t, begin), place(t, end));
  }
}

}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
