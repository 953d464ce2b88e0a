// The CUDA operators of the step.
#pragma once

#include <optional>
#include <vector>

#include "device.h"

namespace {

void planned_step(const Tensor& table_tensor, const Tensor& on) {
  const OnDevice here(on);
  StepTable& table = planned_table(table_tensor);
  check_overlap(table);
  check(gpu::step(table, here.stream));
}

void step_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& states,
           const std::vector<Tensor>& steps, const std::optional<Tensor>& lr_tensor,
           const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
           const std::optional<Tensor>& robust, double lr, double weight_decay, double hyper_a, double hyper_b,
           double eps, int64_t rule, int64_t flags) {
  if (params.empty()) return;
  const OnDevice here(params[0]);
  for (const Tensor& p : params) STD_TORCH_CHECK(is_on(p, here.device), "step_: expected parameters on one device");
  auto number = [&](const std::optional<Tensor>& t, const char* name) {
    return t.has_value() ? number_on(here.device, *t, name) : DeviceNumber{};
  };
  StepGroup group = step_group(lr, weight_decay, hyper_a, hyper_b, eps, rule, flags);
  group.lr_tensor = number(lr_tensor, "lr");
  StepLists lists(params, grads, states, steps, group);
  const DeviceNumber scale = number(grad_scale, "grad_scale"), found = number(found_inf, "found_inf");
  STD_TORCH_CHECK(!scale.is_double && !found.is_double, "step_: expected grad_scale and found_inf in float32");
  lists.table.grad_scale = static_cast<const float*>(scale.data);
  lists.table.found_inf = static_cast<const float*>(found.data);
  if (robust.has_value()) lists.table.robust = normalizer_on(here.device, *robust);
  check_overlap(lists.table);
  check(gpu::step(lists.table, here.stream));
  lists.restore(grad_scale.has_value());
}

}  // namespace
