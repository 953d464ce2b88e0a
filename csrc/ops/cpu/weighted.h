// The CPU operator of the weighted step.
#pragma once

#include <memory>

#include "../weighted.h"
#include "weights.h"

namespace {

// Keeps the samples whose factor is not 0, and their factors; a masked sample may hold anything.
template <class T>
int64_t compact(int64_t* row, T* factors, int64_t count) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (factors[i] == 0) continue;
    row[kept] = i;
    factors[kept++] = factors[i];
  }
  return kept;
}

Tensor weighted_step_(const std::vector<Tensor>& params, const std::vector<Tensor>& buffers,
                      const std::vector<Tensor>& grads, const Tensor& losses,
                      const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& mask,
                      const Tensor& log_s, const std::optional<Tensor>& lam_tensor,
                      const std::optional<Tensor>& lr_tensor, double lam, double gamma, double alpha, double mix,
                      double max_weight, double lr, double weight_decay, double momentum, double dampening,
                      int64_t form, int64_t flags) {
  if (lr_tensor.has_value()) lr = Scalar(*lr_tensor, "lr").get();
  WeightedLists lists(params, buffers, grads, losses, sgd_group(lr, weight_decay, momentum, dampening, form));
  WeightedTable& table = lists.table;
  const Scalar state(log_s, "log_s");
  RobustArgs a{};
  fill_robust(a, lists.real, table.batch, state.is_double, gamma, alpha, flags);
  a.lam = lam_tensor.has_value() ? Scalar(*lam_tensor, "lam").get() : lam;
  a.mix = mix;
  a.max_weight = max_weight;
  const size_t count = size_t(table.batch), bytes = count * size_of(lists.real);
  a.losses = per_row(losses, kHere, table.batch, code_of(lists.real), "losses");
  a.sample_weight = per_row(sample_weight, kHere, table.batch, code_of(lists.real), "sample_weight");
  a.valid = per_row_mask(mask, kHere, table.batch);
  const std::unique_ptr<char[]> scratch(new char[count * sizeof(int64_t) + 2 * bytes]);
  int64_t* const row = reinterpret_cast<int64_t*>(scratch.get());
  a.weights = row + count;
  a.factor = static_cast<char*>(a.weights) + bytes;
  double value;
  const WeightUpdate update = run_robust(a, state.get(), &value);
  Tensor new_log_s = empty_scalar(kHere, state.is_double ? Dtype::f64 : Dtype::f32);
  Scalar(new_log_s, "log_s").set(update.new_log_s);
  if (update.nonfinite > 0) return new_log_s;  // a nonfinite batch changes nothing
  table.row = row;
  table.factors = a.factor;
  table.rows = lists.real == Dtype::f64 ? compact(row, static_cast<double*>(a.factor), a.count)
                                        : compact(row, static_cast<float*>(a.factor), a.count);
  // multiplying and adding four numbers takes the time of one logit
  parallel(table.elements, 1 + table.rows / 4,
           [&](int64_t begin, int64_t end) { cpu_kernels().weighted_step(table, begin, end); });
  lists.restore();
  return new_log_s;
}

}  // namespace
