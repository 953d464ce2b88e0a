// The CUDA operators of the losses on logits.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

#include "weights.h"

namespace {

// Where kernels report a label out of range. Raises if a kernel of an earlier call has reported one.
gpu::LabelReport* labels_so_far() {
  gpu::LabelReport* const report = gpu::label_report();
  if (report != nullptr && static_cast<volatile gpu::LabelReport*>(report)->found != 0) {
    const gpu::LabelReport found = *report;
    *report = {};
    raise_bad_label(found.label, found.row, found.classes, " in an earlier call");
  }
  return report;
}

// The arguments that an operator on logits gives to the kernels.
struct Logits {
  gpu::LogitForward args{};
  LogitTensors tensors;

  explicit Logits(const LogitOperands& given) : tensors(args, given) {
    STD_TORCH_CHECK(args.classes <= INT32_MAX, "logits: got ", args.classes, " classes, expected at most 2^31 - 1");
    args.report = labels_so_far();
  }
  Dtype real() const { return real_of(args.dtype); }
  // Makes the results for the losses and their validity.
  std::pair<Tensor, Tensor> make_losses() {
    std::pair<Tensor, Tensor> out{tensors.per_row_results(0, real(), true), tensors.per_row_results(0, real(), true)};
    args.losses = out.first.data_ptr();
    args.valid = out.second.data_ptr();
    return out;
  }
  // Makes the result for the gradient.
  Tensor make_grad(Device device) {
    const Tensor& logits = tensors.logits;
    Tensor grad = empty_on(device, logits.sizes().data(), logits.dim(), saved_as(args.dtype));
    args.grad = grad.data_ptr();
    return grad;
  }
  // Makes the result for the statistics of the rows.
  Tensor make_stats() {
    Tensor stats = tensors.per_row_results(4, real());
    args.stats = stats.data_ptr();
    return stats;
  }
};

std::tuple<Tensor, Tensor, Tensor> logit_loss(const Tensor& logits, const Tensor& target,
                                              const std::optional<Tensor>& class_weight,
                                              const std::optional<Tensor>& adjust, double hyper_a, double hyper_b,
                                              int64_t ignore_index, int64_t flags) {
  STD_TORCH_CHECK((flags & kWithGrad) == 0,
                  "logit_loss: got WITH_GRAD, expected WITH_STATS or 0: the CUDA kernels leave statistics");
  const OnDevice here(logits);
  Logits rows(
      {logits, target, class_weight, adjust, loss_numbers(hyper_a, hyper_b, flags), ignore_index, std::nullopt});
  const auto [losses, valid] = rows.make_losses();
  Tensor saved = (flags & kWithStats) != 0 ? rows.make_stats() : empty_none(here.device, saved_as(rows.args.dtype));
  check(gpu::logit_loss_fwd(rows.args, here.stream));
  return {losses, saved, valid};
}

Tensor logit_loss_backward(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& class_weight,
                           const std::optional<Tensor>& adjust, double smoothing, const Tensor& stats,
                           const Tensor& upstream_in, const std::optional<Tensor>& sample_stats,
                           const std::optional<Tensor>& weighing) {
  const OnDevice here(logits);
  gpu::LogitBackward a{};
  const LogitTensors rows(
      a, {logits, target, class_weight, adjust, loss_numbers(smoothing, 0, 0), INT64_MIN, std::nullopt});
  const int32_t real = code_of(real_of(a.dtype));
  STD_TORCH_CHECK(is_on(stats, here.device) && stats.numel() == 4 * a.rows() && stats.is_contiguous() &&
                      code_of(stats) == real && is_on(upstream_in, here.device) && code_of(upstream_in) == real,
                  "logit_loss_backward: expected the statistics of the forward pass, and an upstream gradient in the "
                  "dtype of the losses");
  Tensor upstream = upstream_in;
  for (int64_t stride : upstream.strides()) a.upstream_per_row = a.upstream_per_row || stride != 0;
  if (a.upstream_per_row) {
    upstream = torch::stable::contiguous(upstream);
    STD_TORCH_CHECK(upstream.numel() == a.rows(), "logit_loss_backward: expected one upstream gradient per row");
  }
  if (weighing.has_value()) {
    STD_TORCH_CHECK(sample_stats.has_value() && is_on(*sample_stats, here.device) &&
                        sample_stats->numel() == 3 * a.rows() && sample_stats->is_contiguous() &&
                        code_of(*sample_stats) == real,
                    "logit_loss_backward: expected sample_stats and weighing of robust_logit_loss");
    a.z = static_cast<const char*>(sample_stats->data_ptr()) + size_t(a.rows()) * size_of(real_of(a.dtype));
    a.weighing = weighing_on(here.device, *weighing);
  }
  Tensor grad = empty_on(here.device, logits.sizes().data(), logits.dim(), a.dtype);
  a.stats = stats.data_ptr();
  a.upstream = upstream.data_ptr();
  a.grad = grad.data_ptr();
  check(gpu::logit_loss_bwd(a, here.stream));
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> robust_logit_loss(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& adjust, double hyper_a, double hyper_b, int64_t ignore_index,
    const std::optional<Tensor>& score, const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& mask,
    const Tensor& log_s, const Tensor& nonfinite, const Tensor& lam, double gamma, double alpha, double mix,
    double max_weight, int64_t flags, const std::optional<Tensor>& weighing) {
  const OnDevice here(logits);
  Logits rows({logits, target, class_weight, adjust, loss_numbers(hyper_a, hyper_b, flags), ignore_index, mask});
  const Dtype real = rows.real();
  RobustOp op(here, real, rows.args.rows(), log_s, lam, gamma, alpha, flags);
  Tensor loss = empty_scalar(here.device, real);
  op.moves_state(nonfinite, flags);
  op.weighs(mix, max_weight);
  op.args.loss = loss.data_ptr();
  op.per_sample(score, sample_weight);
  const SampleStats stats(rows.tensors.per_row_results(3, real), real);
  op.of_rows(rows.args, stats);
  Tensor saved = (flags & kWithGrad) != 0    ? rows.make_grad(here.device)
                 : (flags & kWithStats) != 0 ? rows.make_stats()
                                             : empty_none(here.device, saved_as(rows.args.dtype));
  if (!weighing.has_value()) {
    STD_TORCH_CHECK(
        (flags & kWithGrad) != 0 && gpu::fits_one_block(rows.args.rows(), rows.args.classes) && real == Dtype::f32,
        "robust_logit_loss: got no weighing, expected weighing and WITH_STATS: only a float32 batch that fits into one "
        "block takes WITH_GRAD without weighing");
    op.args.weights = stats.weights();
    check(gpu::robust_logit_loss_block(rows.args, op.args, here.stream));
  } else {
    STD_TORCH_CHECK((flags & kWithGrad) == 0,
                    "robust_logit_loss: got weighing and WITH_GRAD, expected weighing and WITH_STATS");
    op.args.weights = op.args.z = stats.weights();  // robust_fwd, which serves a batch without rows, wants `weights`
    op.args.weighing = weighing_on(here.device, *weighing);
    op.make_scratch(std::min(rows.args.rows(), gpu::kMostBlocks));
    check(gpu::robust_logit_loss_fwd(rows.args, op.args, here.stream));
  }
  return {loss, stats.tensor, saved};
}

// The losses; the gradient of each row's own loss is written over the logits (LinearABLoss goes on with it).
std::tuple<Tensor, Tensor> logit_loss_(const Tensor& logits, const Tensor& target,
                                       const std::optional<Tensor>& class_weight, const std::optional<Tensor>& adjust,
                                       double hyper_a, double hyper_b, int64_t ignore_index, int64_t flags) {
  const OnDevice here(logits);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && code_of(logits) != kHalf,
                  "logit_loss_: expected contiguous logits (B, C) that are not float16");
  Logits rows(
      {logits, target, class_weight, adjust, loss_numbers(hyper_a, hyper_b, flags), ignore_index, std::nullopt});
  const auto [losses, valid] = rows.make_losses();
  rows.args.grad = logits.data_ptr();
  check(gpu::logit_loss_with_grad(rows.args, gpu::Robust{}, here.stream));
  return {losses, valid};
}

// The robust loss of rows whose normaliser is settled. Each row's gradient is made while the row is on the chip.
std::tuple<Tensor, Tensor, Tensor, Tensor> settled_logit_loss(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& adjust, double hyper_a, double hyper_b, int64_t ignore_index,
    const std::optional<Tensor>& score, const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& mask,
    const Tensor& settled, const Tensor& log_s, const Tensor& lam, int64_t flags) {
  const OnDevice here(logits);
  Logits rows({logits, target, class_weight, adjust, loss_numbers(hyper_a, hyper_b, flags), ignore_index, mask});
  const Dtype real = rows.real();
  const int64_t size = kPartialStatsSize;
  RobustOp op(here, real, rows.args.rows(), log_s, lam, 1, 1, 0);
  op.per_sample(score, sample_weight);
  const SampleStats stats(rows.tensors.per_row_results(3, real), real);
  op.of_rows(rows.args, stats);
  Tensor loss = empty_scalar(here.device, real), partial_stats = empty_on(here.device, &size, 1, Dtype::f64);
  Tensor saved = rows.make_grad(here.device);
  op.args.loss = loss.data_ptr();
  op.args.partial_stats = static_cast<double*>(partial_stats.data_ptr());
  op.args.weights = stats.weights();
  op.args.settled = normalizer_on(here.device, settled);
  op.args.bounded = true;
  op.make_scratch(std::min(rows.args.rows(), gpu::kMostBlocks));
  check(gpu::logit_loss_with_grad(rows.args, op.args, here.stream));
  return {loss, stats.tensor, saved, partial_stats};
}

}  // namespace
