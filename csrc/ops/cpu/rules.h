// The CPU operators of CVaR, chi-squared and group DRO.
#pragma once

#include <vector>

#include "threads.h"

namespace {

WeightingArgs weighting_args(const Tensor& losses, const std::optional<Tensor>& mask, const Tensor& weights) {
  WeightingArgs a{};
  a.dtype = dtype_of(weights);
  a.count = losses.numel();
  a.losses = per_row(losses, kHere, a.count, code_of(a.dtype), "losses");
  a.valid = per_row_mask(mask, kHere, a.count);
  a.weights = weights.data_ptr();
  return a;
}

// rule: a Weighting. hyper_a, hyper_b: beta and reg of CVaR, or rho of chi-squared DRO.
Tensor rule_weights(const Tensor& losses, const std::optional<Tensor>& mask, int64_t rule, double hyper_a,
                    double hyper_b) {
  Tensor weights = empty_on(kHere, losses.sizes().data(), losses.dim(), real_of(dtype_of(losses)));
  LevelArgs a{};
  static_cast<WeightingArgs&>(a) = weighting_args(losses, mask, weights);
  a.weighting = static_cast<Weighting>(rule);
  (a.weighting == Weighting::chi2 ? a.rho : a.beta) = hyper_a;
  a.reg = hyper_b;
  std::vector<double> scratch(size_t(a.count));
  a.scratch = scratch.data();
  cpu_kernels().level_weights(a);
  return weights;
}

Tensor group_weights(const Tensor& losses, const std::optional<Tensor>& mask, const Tensor& groups, const Tensor& log_q,
                     double eta, bool update) {
  Tensor weights = empty_on(kHere, losses.sizes().data(), losses.dim(), real_of(dtype_of(losses)));
  GroupArgs a{};
  static_cast<WeightingArgs&>(a) = weighting_args(losses, mask, weights);
  a.groups = static_cast<const int64_t*>(per_row(groups, kHere, a.count, kLong, "groups"));
  a.n_groups = log_q.numel();
  a.eta = eta;
  const Dtype state = dtype_of(log_q);
  void* const kept =
      const_cast<void*>(per_row(log_q, kHere, a.n_groups, code_of(real_of(state)), "log_q"));  // schema: (a!)
  for (int64_t i = 0; i < a.count; ++i)
    STD_TORCH_CHECK((a.valid && !a.valid[i]) || (a.groups[i] >= 0 && a.groups[i] < a.n_groups),
                    "group_weights: got group ", a.groups[i], " in row ", i, ", expected 0 <= group < ", a.n_groups);
  std::vector<double> numbers(size_t(3 * a.n_groups));
  a.log_q = numbers.data();
  a.sums = a.log_q + a.n_groups;
  const auto at = [&](auto* q) {
    for (int64_t g = 0; g < a.n_groups; ++g) a.log_q[g] = q[g];
    if (!cpu_kernels().group_weights(a) || !update) return;
    for (int64_t g = 0; g < a.n_groups; ++g) q[g] = static_cast<std::remove_reference_t<decltype(*q)>>(a.log_q[g]);
  };
  state == Dtype::f64 ? at(static_cast<double*>(kept)) : at(static_cast<float*>(kept));
  return weights;
}

}  // namespace
