// The CPU operators of the step.
#pragma once

#include "../step.h"
#include "../weights.h"
#include "threads.h"

namespace {

void count(const DeviceNumber& steps) {
  if (steps.data == nullptr) return;
  if (steps.is_double)
    *static_cast<double*>(steps.data) += 1;
  else
    *static_cast<float*>(steps.data) += 1;
}

void run_step(StepTable& table) {
  if (table.skips()) return;
  check_overlap(table);
  if (table.overlap) {
    for (const StepTensor* t = table.tensors; t != table.tensors + table.tensor_count; ++t) {
      count(t->step);
      cpu_kernels().step(table, t->begin, t->begin + t->count);
    }
    return;
  }
  for (const StepTensor* t = table.tensors; t != table.tensors + table.tensor_count; ++t) count(t->step);
  parallel(table.elements, 1, [&](int64_t begin, int64_t end) { cpu_kernels().step(table, begin, end); });
}

// StepPlan (host.cpp) has just written the table into the tensor's memory. The second argument only tells the
// dispatcher where the parameters are.
void planned_step(const Tensor& table, const Tensor&) { run_step(planned_table(table)); }

// The sum of squares of each gradient in a planned table: (tensors) float64. A gradient is cut into blocks, whose sums
// are added in their order.
Tensor planned_squares(const Tensor& table_tensor, const Tensor&) {
  const StepTable& table = planned_table(table_tensor);
  const StepTensor* const end = table.tensors + table.tensor_count;
  std::vector<SquaresBlock> blocks;
  for (const StepTensor* t = table.tensors; t != end; ++t)
    for (int64_t from = 0; from < t->count; from += kSquaresBlock) {
      const char* data = static_cast<const char*>(t->grad) + size_t(from) * size_of(t->dtype);
      blocks.push_back({data, std::min(kSquaresBlock, t->count - from), t->dtype});
    }
  const auto count = int64_t(blocks.size());
  std::vector<double> sums(blocks.size());
  parallel(count, count > 0 ? table.elements / count : 0,
           [&](int64_t from, int64_t to) { cpu_kernels().squares(blocks.data(), sums.data(), from, to); });
  Tensor out = empty_on(kHere, &table.tensor_count, 1, Dtype::f64);
  double* total = static_cast<double*>(out.data_ptr());
  const double* sum = sums.data();
  for (const StepTensor* t = table.tensors; t != end; ++t) {
    *total = 0;
    for (int64_t from = 0; from < t->count; from += kSquaresBlock) *total += *sum++;
    ++total;
  }
  return out;
}

void step_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& states,
           const std::vector<Tensor>& steps, const std::optional<Tensor>& lr_tensor,
           const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
           const std::optional<Tensor>& robust, double lr, double weight_decay, double hyper_a, double hyper_b,
           double eps, int64_t rule, int64_t flags) {
  STD_TORCH_CHECK(
      !grad_scale.has_value() && !found_inf.has_value(),
      "step_: got grad_scale or found_inf, which only GPUs read; on the CPU unscale the gradients before the step");
  StepGroup group = step_group(lr, weight_decay, hyper_a, hyper_b, eps, rule, flags);
  if (lr_tensor.has_value()) {
    const DeviceNumber number = number_on(kHere, *lr_tensor, "lr");
    group.lr = number.is_double ? *static_cast<const double*>(number.data) : *static_cast<const float*>(number.data);
  }
  StepLists lists(params, grads, states, steps, group);
  if (robust.has_value()) lists.table.robust = normalizer_on(kHere, *robust);
  run_step(lists.table);
  lists.restore(false);
}

}  // namespace
