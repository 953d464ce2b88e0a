// The kernel of the steps. Compiled once per instruction set.
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
    if (t.group != group_before || steps != steps_before) {  // rarely: two logarithms and exponentials
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
