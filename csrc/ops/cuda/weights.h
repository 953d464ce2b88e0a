// The CUDA operators of the robust weights of any vector of losses, and of the scaling of gradients.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

#include "device.h"

namespace {

// The arguments that an operator of the robust loss gives to the kernels, and its scratch memory.
struct RobustOp {
  gpu::Robust args{};
  std::optional<Tensor> scratch;
  Device device;

  RobustOp(const OnDevice& here, Dtype real, int64_t count, const Tensor& log_s, const std::optional<Tensor>& lam,
           double gamma, double alpha, int64_t flags)
      : device(here.device) {
    args.log_s = number_on(device, log_s, "log_s");
    if (lam.has_value()) args.lam_on_device = number_on(device, *lam, "lam");
    fill_robust(args, real, count, args.log_s.is_double, gamma, alpha, flags);
  }
  // Makes scratch memory for the sums of that many blocks, for their parts of the loss, for the WeightUpdate, and for
  // the shift of a target.
  void make_scratch(int64_t blocks) {
    const size_t sums = args.dtype == Dtype::f64 ? sizeof(gpu::LossSums<double>) : sizeof(gpu::LossSums<float>);
    const size_t losses = size_t(args.loss_blocks()) * sizeof(double);
    const int64_t words = int64_t((size_t(blocks) * sums + losses + sizeof(WeightUpdate)) / sizeof(double)) + 1;
    scratch = empty_on(device, &words, 1, Dtype::f64);
    args.sums = scratch->data_ptr();
    args.loss_partials = reinterpret_cast<double*>(static_cast<char*>(args.sums) + size_t(blocks) * sums);
    args.weight_update = reinterpret_cast<WeightUpdate*>(args.loss_partials + args.loss_blocks());
    args.shift = reinterpret_cast<double*>(args.weight_update + 1);
  }
  // For a vector of losses that is too long for one block.
  void make_scratch_for_vector() {
    if (args.count > gpu::kOneBlock) make_scratch(args.loss_blocks());
  }
  int32_t real() const { return code_of(args.dtype); }
  void per_sample(const std::optional<Tensor>& score, const std::optional<Tensor>& sample_weight) {
    args.scores = per_row(score, device, args.count, real(), "score");
    args.sample_weight = per_row(sample_weight, device, args.count, real(), "sample_weight");
  }
  void vector(const Tensor& losses, const std::optional<Tensor>& mask) {
    make_scratch_for_vector();
    args.losses = per_row(losses, device, args.count, code_of(real_of(args.dtype)), "losses");
    args.valid = per_row_mask(mask, device, args.count);
  }
  // For rows of logits: `out` takes their losses, z or weights, and validity.
  void of_rows(gpu::LogitForward& rows, const SampleStats& out) {
    rows.losses = out.losses();
    rows.valid = out.valid();
    args.losses = out.losses();
  }
  void moves_state(const Tensor& nonfinite, int64_t flags) {
    STD_TORCH_CHECK(is_on(nonfinite, device) && code_of(nonfinite) == kLong, "nonfinite: expected an int64 number");
    args.nonfinite = static_cast<long long*>(nonfinite.data_ptr());
    args.update = (flags & kUpdate) != 0;
  }
  void weighs(double mix, double max_weight) {
    args.mix = mix;
    args.max_weight = max_weight;
  }
  // Makes a tensor of its own for log s', in the dtype of log s.
  Tensor make_new_log_s() {
    Tensor out = empty_scalar(device, args.log_s.is_double ? Dtype::f64 : Dtype::f32);
    args.new_log_s = number_on(device, out, "log_s");
    return out;
  }
};

// The results of an operator on a vector of losses.
struct Losses {
  SampleStats stats;
  Tensor loss, grad;

  Losses(RobustOp& op, const LossOperands& given, int64_t flags)
      : stats(empty_rows(op.device, 3, given.losses, op.args.dtype), op.args.dtype),
        loss(empty_scalar(op.device, op.args.dtype)),
        grad((flags & kWithGrad) != 0
                 ? empty_on(op.device, given.losses.sizes().data(), given.losses.dim(), op.args.dtype)
                 : empty_none(op.device, op.args.dtype)) {
    op.per_sample(given.score, given.sample_weight);
    op.vector(given.losses, given.mask);
    op.args.losses_out = stats.losses();
    op.args.weights = stats.weights();
    op.args.valid_out = stats.valid();
    op.args.factor = (flags & kWithGrad) != 0 ? grad.data_ptr() : nullptr;
    op.args.loss = loss.data_ptr();
  }
  std::tuple<Tensor, Tensor, Tensor> done() const { return {loss, stats.tensor, grad}; }
};

std::tuple<Tensor, Tensor, Tensor> robust_loss(const Tensor& losses, const std::optional<Tensor>& score,
                                               const std::optional<Tensor>& sample_weight,
                                               const std::optional<Tensor>& mask, const Tensor& log_s,
                                               const Tensor& nonfinite, const Tensor& lam, double gamma, double alpha,
                                               double mix, double max_weight, int64_t flags) {
  const OnDevice here(losses);
  RobustOp op(here, dtype_of(losses), losses.numel(), log_s, lam, gamma, alpha, flags);
  const Losses out(op, {losses, score, sample_weight, mask}, flags);
  op.moves_state(nonfinite, flags);
  op.weighs(mix, max_weight);
  check(gpu::robust_fwd(op.args, here.stream));
  return out.done();
}

// The stages of robust_loss, for samples that are spread over processes, micro-batches or chunks.

// settled: it bounds z.
Tensor robust_partial_stats(const Tensor& losses, const std::optional<Tensor>& score, const std::optional<Tensor>& mask,
                            const Tensor& log_s, const Tensor& lam, const std::optional<Tensor>& settled) {
  const OnDevice here(losses);
  const int64_t size = kPartialStatsSize;
  RobustOp op(here, dtype_of(losses), losses.numel(), log_s, lam, 1, 1, 0);
  op.per_sample(score, std::nullopt);
  op.vector(losses, mask);
  Tensor out = empty_on(here.device, &size, 1, Dtype::f64);
  op.args.partial_stats = static_cast<double*>(out.data_ptr());
  op.args.bounded = settled.has_value();
  if (op.args.bounded) op.args.settled = normalizer_on(here.device, *settled);
  check(gpu::robust_fwd(op.args, here.stream));
  return out;
}

Tensor robust_settle(const Tensor& partials, const Tensor& log_s, const Tensor& nonfinite, const Tensor& lam,
                     const std::optional<Tensor>& reference, double gamma, double alpha, double grad_multiplier,
                     int64_t flags) {
  const OnDevice here(log_s);
  const int64_t size = kNormalizerSize;
  gpu::Settle a{};
  RobustOp op(here, Dtype::f64, 0, log_s, lam, gamma, alpha, flags);
  op.moves_state(nonfinite, flags);
  static_cast<gpu::Robust&>(a) = op.args;
  a.partials = partials_on(here.device, partials);
  a.partials_count = partials.size(0);
  a.partials_stride = partials.size(1);
  a.grad_multiplier = grad_multiplier;
  a.reference = reference_on(here.device, reference);
  Tensor out = empty_on(here.device, &size, 1, Dtype::f64);
  a.out = static_cast<Normalizer*>(out.data_ptr());
  check(gpu::robust_settle(a, here.stream));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> robust_apply(const Tensor& losses, const std::optional<Tensor>& score,
                                                const std::optional<Tensor>& sample_weight,
                                                const std::optional<Tensor>& mask, const Tensor& settled,
                                                const Tensor& log_s, const Tensor& lam, bool bounded, double mix,
                                                double max_weight, int64_t flags) {
  const OnDevice here(losses);
  RobustOp op(here, dtype_of(losses), losses.numel(), log_s, lam, 1, 1, 0);
  const Losses out(op, {losses, score, sample_weight, mask}, flags);
  op.weighs(mix, max_weight);
  op.args.settled = normalizer_on(here.device, settled);
  op.args.bounded = bounded;
  check(gpu::robust_fwd(op.args, here.stream));
  return out.done();
}

std::tuple<Tensor, Tensor, Tensor> robust_weights(const Tensor& losses, const Tensor& log_s, const Tensor& lam,
                                                  const std::optional<Tensor>& mask, double gamma, double alpha,
                                                  int64_t flags) {
  const OnDevice here(losses);
  const Dtype real = dtype_of(losses);
  const int64_t two = 2;
  RobustOp op(here, real, losses.numel(), log_s, lam, gamma, alpha, flags);
  op.vector(losses, mask);
  Tensor weights = empty_on(here.device, losses.sizes().data(), losses.dim(), real);
  Tensor new_log_s = op.make_new_log_s();
  Tensor dlog_s = empty_on(here.device, &two, 1, Dtype::f64);
  op.args.weights = weights.data_ptr();
  op.args.dlog_s = static_cast<double*>(dlog_s.data_ptr());
  check(gpu::robust_fwd(op.args, here.stream));
  return {weights, new_log_s, dlog_s};
}

Tensor robust_weights_backward(const Tensor& weights, const Tensor& grad_weights, const Tensor& grad_log_s,
                               const Tensor& lam, const Tensor& dlog_s) {
  const OnDevice here(weights);
  gpu::Robust a{};
  a.dtype = dtype_of(weights);
  a.count = weights.numel();
  a.weights = weights.data_ptr();
  const void* upstream = per_row(grad_weights, here.device, a.count, code_of(a.dtype), "grad_weights");
  const int64_t words = a.count <= gpu::kOneBlock ? 0 : a.loss_blocks() + 1;
  const Tensor dots = empty_on(here.device, &words, 1, Dtype::f64);
  Tensor out = empty_on(here.device, weights.sizes().data(), weights.dim(), a.dtype);
  check(gpu::robust_weights_bwd(a, number_on(here.device, lam, "lam"), upstream,
                                number_on(here.device, grad_log_s, "grad_log_s"),
                                static_cast<const double*>(dlog_s.data_ptr()), static_cast<double*>(dots.data_ptr()),
                                out.data_ptr(), here.stream));
  return out;
}

Tensor rectified(const Tensor& products) {
  const OnDevice here(products);
  const Dtype real = real_of(dtype_of(products));
  const int64_t count = products.numel();
  const void* const given = per_row(products, here.device, count, code_of(real), "products");
  Tensor weights = empty_on(here.device, products.sizes().data(), products.dim(), real);
  check(gpu::rectified(real, given, count, weights.data_ptr(), here.stream));
  return weights;
}

// ---- gradient scaling ----------------------------------------------------------------------------------------------

void run_scale(const Tensor& source, const Tensor& out, const Tensor& upstream_in, const OnDevice& here) {
  ScaleArgs a{};
  bool constant;
  const Tensor upstream = fill_scale(a, constant, source, out, upstream_in);
  a.upstream = upstream.data_ptr();
  check(gpu::scale(a, constant, here.stream));
}

Tensor scale(const Tensor& grad, const Tensor& upstream, bool to_half) {
  const OnDevice here(grad);
  Tensor out = empty_on(here.device, grad.sizes().data(), grad.dim(), to_half ? Dtype::f16 : dtype_of(grad));
  run_scale(grad, out, upstream, here);
  return out;
}
void scale_(const Tensor& grad, const Tensor& upstream) { run_scale(grad, grad, upstream, OnDevice(grad)); }

}  // namespace
