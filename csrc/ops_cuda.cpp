// The CUDA operators: results, scratch memory, device and stream. Schemas are in absgd_fast/ops.py, kernels in cuda/,
// formulas in math.h. Nothing here waits for the device.
#include <torch/csrc/stable/accelerator.h>

#include "ops_common.h"
#include "torch_stream.h"

#ifndef ABSGD_DISPATCH_KEY  // a test runs these operators on tensors of the CPU
#define ABSGD_DISPATCH_KEY CUDA
#endif

namespace {

void check(const char* failed) { STD_TORCH_CHECK(failed == nullptr, "absgd_fast: CUDA says: ", failed); }

// The device of a tensor made current, and its stream.
struct OnDevice {
  Device device;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  void* stream = nullptr;

  explicit OnDevice(const Tensor& t) : device(device_of(t)) {
    if (device.type == kCpu) return;
    guard.emplace(device.index);
    const char* const failed = torch_stream(device.index, &stream);
    STD_TORCH_CHECK(failed == nullptr, "absgd_fast: ", failed);
  }
};

// A label that a kernel of an earlier call found out of range.
gpu::LabelReport* labels_so_far() {
  gpu::LabelReport* const report = gpu::label_report();
  if (report != nullptr && static_cast<volatile gpu::LabelReport*>(report)->found != 0) {
    const gpu::LabelReport found = *report;
    *report = {};
    raise_bad_label(found.label, found.row, found.classes, " in an earlier call");
  }
  return report;
}

// ---- losses on logits ----------------------------------------------------------------------------------------------

struct Logits {
  gpu::LogitForward args{};
  LogitTensors tensors;

  Logits(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& class_weight,
         const std::optional<Tensor>& adjust, const LossNumbers& loss, int64_t ignore_index,
         const std::optional<Tensor>& mask)
      : tensors(args, logits, target, class_weight, adjust, loss, ignore_index, mask) {
    STD_TORCH_CHECK(args.classes <= INT32_MAX, "logits: at most 2^31 - 1 classes");
    args.report = labels_so_far();
  }
  Dtype real() const { return real_of(args.dtype); }
  // Room for the gradient.
  Tensor make_grad(Device device) {
    const Tensor& logits = tensors.logits;
    Tensor grad = empty_on(device, logits.sizes().data(), logits.dim(), made_as(args.dtype));
    args.grad = grad.data_ptr();
    return grad;
  }
  // Room for the statistics of the rows.
  Tensor make_stats() {
    Tensor stats = tensors.per_row_results(4, real());
    args.stats = stats.data_ptr();
    return stats;
  }
};

std::tuple<Tensor, Tensor, Tensor> logit_loss(const Tensor& logits, const Tensor& target,
                                              const std::optional<Tensor>& class_weight,
                                              const std::optional<Tensor>& adjust, double first, double second,
                                              int64_t ignore_index, int64_t flags) {
  STD_TORCH_CHECK((flags & kWithGrad) == 0, "logit_loss: the CUDA kernels leave statistics, not a gradient");
  const OnDevice here(logits);
  Logits rows(logits, target, class_weight, adjust, loss_numbers(first, second, flags), ignore_index, std::nullopt);
  Tensor losses = rows.tensors.per_row_results(0, rows.real(), true);
  Tensor valid = rows.tensors.per_row_results(0, rows.real(), true);
  Tensor made = (flags & kWithStats) != 0 ? rows.make_stats() : empty_none(here.device, made_as(rows.args.dtype));
  rows.args.losses = losses.data_ptr();
  rows.args.valid = valid.data_ptr();
  check(gpu::logit_loss_fwd(rows.args, here.stream));
  return {losses, made, valid};
}

Tensor logit_loss_backward(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& class_weight,
                           const std::optional<Tensor>& adjust, double smoothing, const Tensor& stats,
                           const Tensor& upstream_in, const std::optional<Tensor>& rows_in,
                           const std::optional<Tensor>& weighing) {
  const OnDevice here(logits);
  gpu::LogitBackward a{};
  const LogitTensors rows(a, logits, target, class_weight, adjust, loss_numbers(smoothing, 0, 0), INT64_MIN,
                          std::nullopt);
  const int32_t real = code_of(real_of(a.dtype));
  STD_TORCH_CHECK(is_on(stats, here.device) && stats.numel() == 4 * a.rows() && stats.is_contiguous() &&
                      code_of(stats) == real && is_on(upstream_in, here.device) && code_of(upstream_in) == real,
                  "logit_loss_backward: expected the statistics of the forward pass, and an upstream gradient of the "
                  "losses' dtype");
  Tensor upstream = upstream_in;
  for (int64_t stride : upstream.strides()) a.upstream_per_row = a.upstream_per_row || stride != 0;
  if (a.upstream_per_row) {
    upstream = torch::stable::contiguous(upstream);
    STD_TORCH_CHECK(upstream.numel() == a.rows(), "logit_loss_backward: expected one upstream gradient per row");
  }
  if (weighing.has_value()) {
    STD_TORCH_CHECK(rows_in.has_value() && is_on(*rows_in, here.device) && rows_in->numel() == 3 * a.rows() &&
                        rows_in->is_contiguous() && code_of(*rows_in) == real,
                    "logit_loss_backward: expected rows and weighing as the robust loss left them");
    a.z = static_cast<const char*>(rows_in->data_ptr()) + size_t(a.rows()) * size_of(real_of(a.dtype));
    a.weighing = weighing_on(here.device, *weighing);
  }
  Tensor grad = empty_on(here.device, logits.sizes().data(), logits.dim(), a.dtype);
  a.stats = stats.data_ptr();
  a.upstream = upstream.data_ptr();
  a.grad = grad.data_ptr();
  check(gpu::logit_loss_bwd(a, here.stream));
  return grad;
}

// ---- robust weights ------------------------------------------------------------------------------------------------

// (3, ...): losses, weights (or z, of which backward makes them) and validity (0 or 1) of one forward, for `.last`
struct Rows {
  Tensor tensor;
  char* data;
  size_t bytes;  // of one row

  Rows(Tensor rows, Dtype real)
      : tensor(std::move(rows)),
        data(static_cast<char*>(tensor.data_ptr())),
        bytes(size_t(tensor.numel() / 3) * size_of(real)) {}
  char* row(int k) const { return data + size_t(k) * bytes; }
};

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
  // Scratch for the sums of so many blocks, for their parts of the loss, and for one outcome.
  void make_scratch(int64_t blocks) {
    const size_t sums = args.dtype == Dtype::f64 ? sizeof(gpu::LossSums<double>) : sizeof(gpu::LossSums<float>);
    const size_t losses = size_t(args.loss_blocks()) * sizeof(double);
    const int64_t words = int64_t((size_t(blocks) * sums + losses + sizeof(Outcome)) / sizeof(double));
    scratch = empty_on(device, &words, 1, Dtype::f64);
    args.sums = scratch->data_ptr();
    args.loss_partials = reinterpret_cast<double*>(static_cast<char*>(args.sums) + size_t(blocks) * sums);
    args.outcome = reinterpret_cast<Outcome*>(args.loss_partials + args.loss_blocks());
  }
  // For losses that no single block weighs.
  void make_scratch_for_vector() {
    if (args.count > gpu::kOneBlock) make_scratch(args.loss_blocks());
  }
  int32_t real() const { return code_of(args.dtype); }
  void optional_rows(const std::optional<Tensor>& score, const std::optional<Tensor>& sample_weight) {
    args.scores = per_row(score, device, args.count, real(), "score");
    args.sample_weight = per_row(sample_weight, device, args.count, real(), "sample_weight");
  }
  void vector(const Tensor& losses, const std::optional<Tensor>& mask) {
    make_scratch_for_vector();
    args.losses = per_row(losses, device, args.count, code_of(real_of(args.dtype)), "losses");
    args.valid = per_row_mask(mask, device, args.count);
  }
  // Rows of logits: `out` has their losses, z or weights, and validity.
  void of_rows(gpu::LogitForward& rows, const Rows& out) {
    rows.losses = out.row(0);
    rows.valid = out.row(2);
    args.losses = out.row(0);
  }
  void numbers(const Tensor& nonfinite, double mix, double max_weight, int64_t flags, const Tensor& loss) {
    STD_TORCH_CHECK(is_on(nonfinite, device) && code_of(nonfinite) == kLong, "nonfinite: expected an int64 number");
    args.nonfinite = static_cast<long long*>(nonfinite.data_ptr());
    args.mix = mix;
    args.max_weight = max_weight;
    args.update = (flags & kUpdate) != 0;
    args.loss = loss.data_ptr();
  }
};

std::tuple<Tensor, Tensor, Tensor> robust_logit_loss(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& adjust, double first, double second, int64_t ignore_index,
    const std::optional<Tensor>& score, const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& mask,
    const Tensor& log_s, const Tensor& nonfinite, const Tensor& lam, double gamma, double alpha, double mix,
    double max_weight, int64_t flags, const std::optional<Tensor>& weighing) {
  const OnDevice here(logits);
  Logits rows(logits, target, class_weight, adjust, loss_numbers(first, second, flags), ignore_index, mask);
  const Dtype real = rows.real();
  RobustOp op(here, real, rows.args.rows(), log_s, lam, gamma, alpha, flags);
  Tensor loss = empty_scalar(here.device, real);
  op.numbers(nonfinite, mix, max_weight, flags, loss);
  op.optional_rows(score, sample_weight);
  const Rows out(rows.tensors.per_row_results(3, real), real);
  op.of_rows(rows.args, out);
  Tensor made = (flags & kWithGrad) != 0    ? rows.make_grad(here.device)
                : (flags & kWithStats) != 0 ? rows.make_stats()
                                            : empty_none(here.device, made_as(rows.args.dtype));
  if (!weighing.has_value()) {
    STD_TORCH_CHECK(
        (flags & kWithGrad) != 0 && gpu::fits_one_block(rows.args.rows(), rows.args.classes) && real == Dtype::f32,
        "robust_logit_loss: more than one block holds, or no gradient; expected weighing, and statistics");
    op.args.weights = out.row(1);
    check(gpu::robust_logit_loss_block(rows.args, op.args, here.stream));
  } else {
    STD_TORCH_CHECK((flags & kWithGrad) == 0, "robust_logit_loss: with weighing it leaves statistics, not a gradient");
    op.args.weights = op.args.z = out.row(1);  // weights of no rows at all
    op.args.weighing = weighing_on(here.device, *weighing);
    op.make_scratch(std::min(rows.args.rows(), gpu::kMostBlocks));
    check(gpu::robust_logit_loss_fwd(rows.args, op.args, here.stream));
  }
  return {loss, out.tensor, made};
}

// Losses and, over the logits, the gradient of each row's own loss: for a linear head that goes on with it.
std::tuple<Tensor, Tensor> logit_loss_(const Tensor& logits, const Tensor& target,
                                       const std::optional<Tensor>& class_weight, const std::optional<Tensor>& adjust,
                                       double first, double second, int64_t ignore_index, int64_t flags) {
  const OnDevice here(logits);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && code_of(logits) != kHalf,
                  "logit_loss_: expected contiguous logits (B, C) that are not float16");
  Logits rows(logits, target, class_weight, adjust, loss_numbers(first, second, flags), ignore_index, std::nullopt);
  Tensor losses = rows.tensors.per_row_results(0, rows.real(), true);
  Tensor valid = rows.tensors.per_row_results(0, rows.real(), true);
  rows.args.losses = losses.data_ptr();
  rows.args.valid = valid.data_ptr();
  rows.args.grad = logits.data_ptr();
  check(gpu::logit_loss_made(rows.args, gpu::Robust{}, here.stream));
  return {losses, valid};
}

// The robust loss of rows whose normaliser is settled: their weights, and each row's gradient while it is on the chip.
std::tuple<Tensor, Tensor, Tensor, Tensor> settled_logit_loss(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& adjust, double first, double second, int64_t ignore_index,
    const std::optional<Tensor>& score, const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& mask,
    const Tensor& settled, const Tensor& log_s, const Tensor& lam, int64_t flags) {
  const OnDevice here(logits);
  Logits rows(logits, target, class_weight, adjust, loss_numbers(first, second, flags), ignore_index, mask);
  const Dtype real = rows.real();
  const int64_t three = kTotals;
  RobustOp op(here, real, rows.args.rows(), log_s, lam, 1, 1, 0);
  op.optional_rows(score, sample_weight);
  const Rows out(rows.tensors.per_row_results(3, real), real);
  op.of_rows(rows.args, out);
  Tensor loss = empty_scalar(here.device, real), totals = empty_on(here.device, &three, 1, Dtype::f64);
  Tensor made = rows.make_grad(here.device);
  op.args.loss = loss.data_ptr();
  op.args.totals = static_cast<double*>(totals.data_ptr());
  op.args.weights = out.row(1);
  op.args.settled = settled_on(here.device, settled);
  op.args.bounded = true;
  op.make_scratch(std::min(rows.args.rows(), gpu::kMostBlocks));
  check(gpu::logit_loss_made(rows.args, op.args, here.stream));
  return {loss, out.tensor, made, totals};
}

// The results of an operator on a vector of losses.
struct Losses {
  Rows rows;
  Tensor loss, grad;

  Losses(RobustOp& op, const Tensor& losses, const std::optional<Tensor>& score,
         const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& mask, int64_t flags)
      : rows(empty_rows(op.device, 3, losses, op.args.dtype), op.args.dtype),
        loss(empty_scalar(op.device, op.args.dtype)),
        grad((flags & kWithGrad) != 0 ? empty_on(op.device, losses.sizes().data(), losses.dim(), op.args.dtype)
                                      : empty_none(op.device, op.args.dtype)) {
    op.optional_rows(score, sample_weight);
    op.vector(losses, mask);
    op.args.losses_out = rows.row(0);
    op.args.weights = rows.row(1);
    op.args.valid_out = rows.row(2);
    op.args.factor = (flags & kWithGrad) != 0 ? grad.data_ptr() : nullptr;
    op.args.loss = loss.data_ptr();
  }
  std::tuple<Tensor, Tensor, Tensor> done() const { return {loss, rows.tensor, grad}; }
};

std::tuple<Tensor, Tensor, Tensor> robust_loss(const Tensor& losses, const std::optional<Tensor>& score,
                                               const std::optional<Tensor>& sample_weight,
                                               const std::optional<Tensor>& mask, const Tensor& log_s,
                                               const Tensor& nonfinite, const Tensor& lam, double gamma, double alpha,
                                               double mix, double max_weight, int64_t flags) {
  const OnDevice here(losses);
  RobustOp op(here, dtype_of(losses), losses.numel(), log_s, lam, gamma, alpha, flags);
  const Losses out(op, losses, score, sample_weight, mask, flags);
  op.numbers(nonfinite, mix, max_weight, flags, out.loss);
  check(gpu::robust_fwd(op.args, here.stream));
  return out.done();
}

// The stages of robust_loss by themselves, for rows that are spread over processes, micro-batches or chunks.

// settled: bounds z
Tensor robust_totals(const Tensor& losses, const std::optional<Tensor>& score, const std::optional<Tensor>& mask,
                     const Tensor& log_s, const Tensor& lam, const std::optional<Tensor>& settled) {
  const OnDevice here(losses);
  const int64_t size = kTotals;
  RobustOp op(here, dtype_of(losses), losses.numel(), log_s, lam, 1, 1, 0);
  op.optional_rows(score, std::nullopt);
  op.vector(losses, mask);
  Tensor out = empty_on(here.device, &size, 1, Dtype::f64);
  op.args.totals = static_cast<double*>(out.data_ptr());
  op.args.bounded = settled.has_value();
  if (op.args.bounded) op.args.settled = settled_on(here.device, *settled);
  check(gpu::robust_fwd(op.args, here.stream));
  return out;
}

Tensor robust_settle(const Tensor& totals, const Tensor& log_s, const Tensor& nonfinite, const Tensor& lam,
                     const std::optional<Tensor>& reference, double gamma, double alpha, double share, int64_t flags) {
  const OnDevice here(log_s);
  const int64_t size = kSettled;
  gpu::Settle a{};
  const RobustOp op(here, Dtype::f64, 0, log_s, lam, gamma, alpha, flags);
  static_cast<gpu::Robust&>(a) = op.args;
  STD_TORCH_CHECK(is_on(nonfinite, here.device) && code_of(nonfinite) == kLong, "nonfinite: expected an int64 number");
  a.nonfinite = static_cast<long long*>(nonfinite.data_ptr());
  a.update = (flags & kUpdate) != 0;
  a.rows = totals_on(here.device, totals);
  a.rows_count = totals.size(0);
  a.rows_stride = totals.size(1);
  a.share = share;
  a.reference = reference_on(here.device, reference);
  Tensor out = empty_on(here.device, &size, 1, Dtype::f64);
  a.out = static_cast<Settled*>(out.data_ptr());
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
  const Losses out(op, losses, score, sample_weight, mask, flags);
  op.args.mix = mix;
  op.args.max_weight = max_weight;
  op.args.settled = settled_on(here.device, settled);
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
  Tensor new_log_s = empty_scalar(here.device, op.args.log_s.is_double ? Dtype::f64 : Dtype::f32);
  Tensor shares = empty_on(here.device, &two, 1, Dtype::f64);
  op.args.weights = weights.data_ptr();
  op.args.new_log_s = number_on(here.device, new_log_s, "log_s");
  op.args.shares = static_cast<double*>(shares.data_ptr());
  check(gpu::robust_fwd(op.args, here.stream));
  return {weights, new_log_s, shares};
}

Tensor robust_weights_backward(const Tensor& weights, const Tensor& grad_weights, const Tensor& grad_log_s,
                               const Tensor& lam, const Tensor& shares) {
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
                                static_cast<const double*>(shares.data_ptr()), static_cast<double*>(dots.data_ptr()),
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

// ---- step ----------------------------------------------------------------------------------------------------------

void planned_step(const Tensor& table_tensor, const Tensor& on) {
  const OnDevice here(on);
  StepTable& table = planned_table(table_tensor);
  check_overlap(table);
  check(gpu::step(table, here.stream));
}

void step_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& states,
           const std::vector<Tensor>& steps, const std::optional<Tensor>& lr_tensor,
           const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
           const std::optional<Tensor>& robust, double lr, double weight_decay, double first, double second, double eps,
           int64_t rule, int64_t flags) {
  if (params.empty()) return;
  const OnDevice here(params[0]);
  for (const Tensor& p : params) STD_TORCH_CHECK(is_on(p, here.device), "step_: expected parameters on one device");
  auto number = [&](const std::optional<Tensor>& t, const char* name) {
    return t.has_value() ? number_on(here.device, *t, name) : DeviceNumber{};
  };
  StepGroup group = step_group(lr, weight_decay, first, second, eps, rule, flags);
  group.lr_tensor = number(lr_tensor, "lr");
  StepLists lists(params, grads, states, steps, group);
  const DeviceNumber scale = number(grad_scale, "grad_scale"), found = number(found_inf, "found_inf");
  STD_TORCH_CHECK(!scale.is_double && !found.is_double, "grad_scale, found_inf: expected float32");
  lists.table.grad_scale = static_cast<const float*>(scale.data);
  lists.table.found_inf = static_cast<const float*>(found.data);
  if (robust.has_value()) lists.table.robust = settled_on(here.device, *robust);
  check_overlap(lists.table);
  check(gpu::step(lists.table, here.stream));
  lists.restore(grad_scale.has_value());
}

// ---- weighted step -------------------------------------------------------------------------------------------------

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
  op.args.mix = mix;
  op.args.max_weight = max_weight;
  op.args.losses = per_row(losses, here.device, batch, op.real(), "losses");
  op.args.valid = per_row_mask(mask, here.device, batch);
  op.optional_rows(std::nullopt, sample_weight);
  Tensor new_log_s = empty_scalar(here.device, op.args.log_s.is_double ? Dtype::f64 : Dtype::f32);
  op.args.new_log_s = number_on(here.device, new_log_s, "log_s");
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

// Why torch's stream cannot be asked for, or an empty string. Needs no tensor and no GPU.
std::string cuda_unbound() {
  const char* const failed = torch_stream_unbound();
  return failed == nullptr ? "" : failed;
}

// "DRIVER RUNTIME": the newest CUDA that the driver serves (0 without a driver), and the CUDA that is linked in.
std::string cuda_versions() {
  const gpu::Versions v = gpu::versions();
  return std::to_string(v.driver) + " " + std::to_string(v.runtime);
}

std::string cuda_signatures() {
  std::string out;
  ABSGD_OPS(ABSGD_SIGNATURE_LINE)
  ABSGD_SIGNATURE_LINE(logit_loss_backward)
  ABSGD_SIGNATURE_LINE(settled_logit_loss)
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(absgd_fast, ABSGD_DISPATCH_KEY, m){
    ABSGD_OPS(ABSGD_IMPL) ABSGD_IMPL(logit_loss_backward)
        ABSGD_IMPL(settled_logit_loss)} STABLE_TORCH_LIBRARY_IMPL(absgd_fast, CompositeExplicitAutograd, m) {
  ABSGD_IMPL(cuda_signatures) ABSGD_IMPL(cuda_unbound) ABSGD_IMPL(cuda_versions)
}

// The same look-up for whoever has no torch at hand (tests/test_cuda_binding.py): null, or what is missing.
extern "C" __attribute__((visibility("default"))) const char* absgd_fast_stream(int32_t device, void** stream) {
  return torch_stream(device, stream);
}
