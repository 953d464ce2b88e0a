// The kernel of the optimizer step (MATH §3). For each part of a tensor in its range of the flat index:
//     1. It makes the corrections for the count of steps, where group or count differ from the part before.
//     2. It steps the elements with the functor of the rule (math/step.h), one register after the other.
// This file is compiled once for each instruction set.
#include "update.h"

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {
namespace {

ABSGD_FN double steps_of(const StepTensor& t) {
  if (t.step.data == nullptr) return 0;
  return t.step.is_double ? *static_cast<const double*>(t.step.data) : double(*static_cast<const float*>(t.step.data));
}

}  // namespace

void step(const StepTable& table, int64_t begin, int64_t end) {
  int32_t group_before = -1;
  double steps_before = 0;
  Corrections corrections{1, 1};
  for_parts(table, begin, end, [&](const StepTensor& t, int64_t, int64_t from, int64_t to) {
    const StepGroup& group = table.groups[t.group];
    const double steps = steps_of(t);
    // Corrections take two logarithms and two exponentials, so they are made only when something changed.
    if (t.group != group_before || steps != steps_before) {
      corrections = Corrections::of<StateLane>(group, steps);
      if (table.robust != nullptr) corrections.gain = table.robust->scale;
      group_before = t.group;
      steps_before = steps;
    }
    const auto choose = [&](auto lanes, const auto& f) {
      using L = typename decltype(lanes)::type;
      for_step<L, typename L::Scalar>(group, group.lr, corrections, f);
    };
    for_storage(t.dtype, [&](auto stored, auto real) {
      using S = typename decltype(stored)::type;
      update_tensor<S, typename decltype(real)::type>(choose, t, Gradients<S>{static_cast<const S*>(t.grad), 0}, from,
                                                      to);
    });
  });
}

}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
