// What the operators of the step do alike on every device.
#pragma once

#include <vector>

#include "memory.h"

namespace {

// Whether two of the tensors that a step writes share memory (a parameter listed twice, `a.data = b.data`). If so, the
// tensors are updated one after the other.
inline bool step_overlaps(const StepTensor* tensors, int64_t count) {
  Ranges ranges;
  ranges.all.reserve(size_t((2 + kStates) * count));
  for (int64_t j = 0; j < count; ++j) {
    const StepTensor& t = tensors[j];
    ranges.add(t.param, size_t(t.count) * size_of(t.dtype));
    for (const void* state : t.state) ranges.add(state, size_t(t.count) * size_of(real_of(t.dtype)));
    ranges.add(t.step.data, t.step.is_double ? sizeof(double) : sizeof(float));
  }
  return ranges.clash();
}
inline void check_overlap(StepTable& table) {
  if (table.checked) return;
  table.overlap = step_overlaps(table.tensors, table.tensor_count);
  table.checked = true;
}

// The tensors of one step as a table. It lives as long as the step.
struct StepLists {
  StepGroup group;
  StepTable table{};
  std::vector<Fitted> written, gradients;
  std::vector<StepTensor> tensors;

  // states: the states that the rule keeps, of all parameters, one kind after the other. steps: the counts of steps, or
  // nothing if the rule does not count them.
  StepLists(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& states,
            const std::vector<Tensor>& steps, const StepGroup& options)
      : group(options) {
    const size_t n = params.size();
    size_t kinds = 0;
    for (int j = 0; j < kStates; ++j) kinds += size_t(group.states() >> j & 1);
    STD_TORCH_CHECK(grads.size() == n && states.size() == kinds * n && steps.size() == (group.counts() ? n : 0),
                    "step_: expected for each parameter one gradient, the states that the rule keeps and, if the rule "
                    "counts steps, their count");
    for (size_t i = 0; i < n; ++i) {
      const Dtype dtype = dtype_of(params[i]);
      StepTensor t{};
      const Tensor param = written.emplace_back(params[i], params[i], dtype).fitted;
      t.param = param.data_ptr();
      size_t from = i;
      for (int j = 0; j < kStates; ++j) {
        if ((group.states() >> j & 1) == 0) continue;
        t.state[j] = written.emplace_back(states[from], param, real_of(dtype)).fitted.data_ptr();
        from += n;
      }
      t.grad = gradients.emplace_back(grads[i], param, dtype).fitted.data_ptr();
      if (group.counts()) t.step = number_on(device_of(param), steps[i], "step");
      t.begin = table.elements;
      t.count = param.numel();
      t.dtype = dtype;
      tensors.push_back(t);
      table.elements += t.count;
    }
    table.tensor_count = int64_t(tensors.size());
    table.tensors = tensors.data();
    table.groups = &group;
  }
  // Gradients were written only if they were unscaled.
  void restore(bool with_gradients) {
    for (Fitted& t : written) t.restore();
    if (with_gradients)
      for (Fitted& t : gradients) t.restore();
  }
};

inline StepGroup step_group(double lr, double weight_decay, double hyper_a, double hyper_b, double eps, int64_t rule,
                            int64_t flags) {
  STD_TORCH_CHECK(rule >= 0 && rule <= int64_t(Rule::adagrad), "step_: unknown rule ", rule,
                  ", expected an index of RULES");
  StepGroup out{};
  out.rule = Rule(rule);
  out.flags = int(flags);
  out.lr = lr;
  out.weight_decay = weight_decay;
  out.hyper_a = hyper_a;
  out.hyper_b = hyper_b;
  out.eps = eps;
  return out;
}

// ---- the plan's table ----------------------------------------------------------------------------------------------

inline StepTable& planned_table(const Tensor& table) {
  STD_TORCH_CHECK(table.is_cpu() && table.is_contiguous() && table.scalar_type() == ScalarType::Long &&
                      size_t(table.numel()) * sizeof(int64_t) >= sizeof(StepTable),
                  "planned_step: expected the table of a StepPlan");
  return *static_cast<StepTable*>(table.data_ptr());
}

}  // namespace
