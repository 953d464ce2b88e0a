// The loops that step.cpp and weighted.cpp share: for_parts splits a range of the flat index into parts of tensors, and
// update_tensor applies a rule to the elements of a part.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {
namespace {

// Prefetches what lies 1 KB ahead: ResNet-32 39 -> 33 us, ResNet-50 10.0 -> 9.5 ms. 512 B and 4 KB gain less, four
// registers at a time gain nothing, and stores past the cache cost 1 ms. ResNet-50's 20 bytes a parameter then move at
// 61 GB/s. The same two cores reach 60 to 62 GB/s when they scale one vector in place, so memory is the limit there.
template <class T>
ABSGD_FN void ahead(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 1024);
}

// The gradients of a tensor from its element `first` on. G: the type that they are stored in.
template <class G>
struct Gradients {
  const G* data;
  int64_t first;

  ABSGD_FN const G* at(int64_t i) const { return data + (i - first); }
};

// Steps elements [i, end) of one tensor, as far as whole registers of L go. Returns the element where it stopped. S:
// the type that parameters are stored in; the states are real.
//     1. It loads a register of the parameter, of each state and of the gradient.
//     2. The rule steps it (math/step.h).
//     3. It stores the states and the parameter.
template <class L, class S, class G, class F>
int64_t update(const F& rule, const StepTensor& t, const Gradients<G>& grads, int64_t i, int64_t end) {
  using T = typename L::Scalar;
  S* const param = static_cast<S*>(t.param);
  auto each_state = [&](auto f) {
    for (int j = 0; j < kStates; ++j)
      if (F::kSlots >> j & 1) f(static_cast<T*>(t.state[j]) + i, j);
  };
  for (; i + L::N <= end; i += L::N) {
    const G* const grad = grads.at(i);
    ahead(param + i);
    ahead(grad);
    each_state([](T* state, int) { ahead(state); });
    typename L::V w = L::load(param + i), s[kStates];
    each_state([&](T* state, int j) { s[j] = L::load(state); });
    rule(w, s, L::load(grad));
    each_state([&](T* state, int j) { L::store(state, s[j]); });
    L::store(param + i, w);
  }
  return i;
}
template <class L, class S, class G, class C>
int64_t whole_registers(const C& choose, const StepTensor& t, const Gradients<G>& grads, int64_t i, int64_t end) {
  if (i + L::N <= end) choose(Type<L>{}, [&](const auto& rule) { i = update<L, S>(rule, t, grads, i, end); });
  return i;
}

// Steps elements [begin, end) of one tensor. begin is a multiple of kStepBlock, and so is end, unless it is the end of
// the tensor. So an element stands at the same place of the same loop for any number of threads, and has the same bits.
// The last elements take shorter registers, because filling a long one from memory piece by piece stalls (4.4 -> 2.3 us
// for 161 tensors of 4 elements). choose(Type<L>, f) calls f with the functor of math/step.h for lanes L.
template <class S, class T, class G, class C>
void update_tensor(const C& choose, const StepTensor& t, const Gradients<G>& grads, int64_t begin, int64_t end) {
  static_assert(kStepBlock % Lanes<T>::N == 0, "a part is whole registers");
  int64_t i = whole_registers<Lanes<T>, S>(choose, t, grads, begin, end);
  i = whole_registers<Lanes<T, 16>, S>(choose, t, grads, i, end);
  whole_registers<Lanes<T, sizeof(T)>, S>(choose, t, grads, i, end);
}

// The place of a flat index within a tensor, moved back to a multiple of kStepBlock, where a part may end.
ABSGD_FN int64_t place(const StepTensor& t, int64_t index) {
  const int64_t i = index - t.begin;
  return i <= 0 ? 0 : i >= t.count ? t.count : i - i % kStepBlock;
}

// Calls f(tensor, its number, from, to) for each part of a tensor in elements [begin, end) of the flat index.
template <class F>
void for_parts(const StepTable& table, int64_t begin, int64_t end, const F& f) {
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
    // Most tensors of a model are short, and each starts with lines that are not in the cache. So the tensor after the
    // next is prefetched.
    if (j + 2 < table.tensor_count) {
      const StepTensor& later = table.tensors[j + 2];
      __builtin_prefetch(later.param);
      __builtin_prefetch(later.grad);
      for (void* state : later.state)
        if (state != nullptr) __builtin_prefetch(state);
    }
    const int64_t from = place(t, begin), to = place(t, end);
    if (from < to) f(t, j, from, to);
  }
}

}  // namespace
}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
