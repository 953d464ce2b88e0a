// The CUDA operator of the weighted step.
#pragma once

#include <optional>
#include <vector>

#include "weights.h"

namespace {

Tensor weighted_step_(const std::vector<Tensor>& params, const std::vector<Tensor>& buffers,
                      const std::vector<Tensor>& grads, const Tensor& losses,
                      const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& mask,
                      const Tensor& log_s, const std::optional<Tensor>& lam_tensor,
                      const std::optional<Tensor>& lr_tensor, double lam, double gamma, double alpha, double mix,
                      double max_weight, double lr, double weight_decay, double momentum, double dampening,
                      int64_t form, int64_t flags) {
  const OnDevice here(losses);
  WeightedLists lists(params, buffers, grads, losses, sgd_group(lr, weight_decay, momentum, dampening, form));
  if (lr_tensor.has_value()) lists.group.lr_tensor = number_on(here.device, *lr_tensor, "lr");
  const int64_t batch = lists.table.batch;
  RobustOp op(here, lists.real, batch, log_s, lam_tensor, gamma, alpha, flags);
  op.args.lam = lam;
  op.weighs(mix, max_weight);
  op.args.losses = per_row(losses, here.device, batch, op.real(), "losses");
  op.args.valid = per_row_mask(mask, here.device, batch);
  op.per_sample(std::nullopt, sample_weight);
  Tensor new_log_s = op.make_new_log_s();
  std::optional<Tensor> weights;
  if (batch > gpu::kOneBlock || lists.table.elements == 0) {
    op.make_scratch_for_vector();
    const int64_t numbers = 2 * batch;
    weights = empty_on(here.device, &numbers, 1, lists.real);
    op.args.weights = weights->data_ptr();
    op.args.factor = static_cast<char*>(op.args.weights) + size_t(batch) * size_of(lists.real);
  }
  check(gpu::weighted_step(lists.table, op.args, here.stream));
  lists.restore();
  return new_log_s;
}

}  // namespace
