// The CPU operators of the robust and the rectified weights, and of the scaling of gradients.
#pragma once

#include <memory>
#include <vector>

#include "../weights.h"
#include "losses.h"

namespace {

RobustArgs robust_args(Dtype dtype, int64_t count, const Scalar& log_s, const Tensor& lam, double gamma, double alpha,
                       int64_t flags) {
  RobustArgs a{};
  fill_robust(a, dtype, count, log_s.is_double, gamma, alpha, flags);
  a.lam = Scalar(lam, "lam").get();
  return a;
}

// Memory for the stats of each block of losses, and afterwards for one number per block.
struct Blocks {
  static constexpr int64_t kFew = 4;
  BlockStats few[kFew];
  std::unique_ptr<BlockStats[]> many;

  explicit Blocks(const RobustArgs& a) : many(blocks_of(a) > kFew ? new BlockStats[size_t(blocks_of(a))] : nullptr) {}
  BlockStats* stats() { return many ? many.get() : few; }
};

void run_stats(const RobustArgs& a, BlockStats* stats) {
  parallel(blocks_of(a), kBlock,
           [&](int64_t begin, int64_t end) { cpu_kernels().robust_block_stats(a, stats, begin, end); });
}
// Makes the weights and, if a.factor is set, the factors. Returns the robust loss.
double run_apply(const RobustArgs& a, const WeightUpdate& update, Blocks& blocks) {
  double* const sums = reinterpret_cast<double*>(blocks.stats());  // the stats are not needed any more
  parallel(blocks_of(a), kBlock,
           [&](int64_t begin, int64_t end) { cpu_kernels().robust_apply(a, update, sums, begin, end); });
  double total = 0;
  for (int64_t b = 0; b < blocks_of(a); ++b) total += sums[b];
  return total;
}
// Finds the lambda of TargetESS, and the score that the weights are relative to (math/target.h).
void solve_target(RobustArgs& a) {
  const size_t count = size_t(blocks_of(a));
  const auto each_block = [&](const auto& f) { parallel(blocks_of(a), kBlock, f); };
  std::vector<TargetRange> ranges(count);
  each_block([&](int64_t begin, int64_t end) { cpu_kernels().target_range(a, ranges.data(), begin, end); });
  TargetRange range{HUGE_VAL, -HUGE_VAL, 0, 0};
  for (const TargetRange& r : ranges) range.add(r);
  a.shift = range.extreme(a.target_share);
  a.z_limit = HUGE_VAL;  // the range has seen which samples are finite

  const std::unique_ptr<char[]> distances(new char[size_t(a.count) * size_of(a.dtype)]);
  const TargetDistances to{a.target_share, a.shift, 1 / range.spread(), distances.get()};
  std::vector<TargetMoments> moments(count);
  TargetMoments all{0, 0};
  if (range.spread() > 0) {
    each_block([&](int64_t begin, int64_t end) { cpu_kernels().target_distances(a, to, moments.data(), begin, end); });
    for (const TargetMoments& m : moments) all = {all.first + m.first, all.second + m.second};
  }
  TargetSolver solver = cpu_kernels().target_solver(a.dtype, to, range, all);
  std::vector<TargetSums<double>> parts(count);
  for (bool more = solver.begins(); more;) {
    each_block([&](int64_t begin, int64_t end) {
      cpu_kernels().target_sums(a, to.distances, solver.u, parts.data(), begin, end);
    });
    TargetSums<double> sums{0, 0, 0, 0};
    for (const auto& p : parts) sums.merge(p);
    more = cpu_kernels().target_next(solver, sums);
  }
  a.lam = solver.lam(a.target_share, a.dtype == Dtype::f64 ? DBL_MAX : FLT_MAX);
}
// Solves for lambda first with NormalizerKind::target; then a.lam is that of this batch.
WeightUpdate run_robust(RobustArgs& a, double log_s, double* loss) {
  if (a.normalizer_kind == NormalizerKind::target) solve_target(a);
  Blocks blocks(a);
  run_stats(a, blocks.stats());
  const WeightUpdate update = cpu_kernels().robust_finish(a, blocks.stats(), log_s);
  *loss = run_apply(a, update, blocks);
  return update;
}

// Writes the lambda that was solved for, if it was.
void commit_lam(const RobustArgs& a, const Tensor& lam) {
  if (a.normalizer_kind == NormalizerKind::target) Scalar(lam, "lam").set(a.lam);
}
void commit(const WeightUpdate& update, int64_t flags, const Scalar& log_s, const Tensor& nonfinite) {
  if ((flags & kUpdate) == 0) return;
  if (update.nonfinite > 0)
    ++*static_cast<int64_t*>(nonfinite.data_ptr());
  else
    log_s.set(update.new_log_s);
}

// Fills in the losses (0 where a sample does not count) and the validity; the weights are there already.
template <class T>
void fill_typed(const SampleStats& out, const RobustArgs& a) {
  const T* const losses = static_cast<const T*>(a.losses);
  T *const seen = reinterpret_cast<T*>(out.losses()), *const valid = reinterpret_cast<T*>(out.valid());
  for (int64_t i = 0; i < a.count; ++i) {
    const bool counts = a.valid == nullptr || a.valid[i] != 0;
    seen[i] = counts ? losses[i] : T(0);
    valid[i] = T(counts);
  }
}
void fill(const SampleStats& out, const RobustArgs& a) {
  if (a.count == 0) return;
  a.dtype == Dtype::f64 ? fill_typed<double>(out, a) : fill_typed<float>(out, a);
}

std::tuple<Tensor, Tensor, Tensor> robust_logit_loss(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& adjust, double hyper_a, double hyper_b, int64_t ignore_index,
    const std::optional<Tensor>& score, const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& mask,
    const Tensor& log_s, const Tensor& nonfinite, const Tensor& lam, double gamma, double alpha, double mix,
    double max_weight, int64_t flags, const std::optional<Tensor>& weighing) {
  STD_TORCH_CHECK(!weighing.has_value(),
                  "robust_logit_loss: got weighing, expected None: the CPU kernels make the weights at once");
  Logits rows({logits, target, class_weight, adjust, loss_numbers(hyper_a, hyper_b, flags), ignore_index, mask});
  Tensor grad = rows.make_grad((flags & kWithGrad) != 0);
  const int64_t count = rows.args.rows();
  const Scalar state(log_s, "log_s");
  RobustArgs a = robust_args(rows.real(), count, state, lam, gamma, alpha, flags);
  a.mix = mix;
  a.max_weight = max_weight;
  a.scores = per_row(score, kHere, count, code_of(a.dtype), "score");
  a.sample_weight = per_row(sample_weight, kHere, count, code_of(a.dtype), "sample_weight");
  rows.stats();  // raises if a label is out of range, before anything is written

  const SampleStats out(rows.tensors.per_row_results(3, a.dtype), a.dtype);
  a.losses = rows.args.losses;
  a.valid = rows.args.valid;
  a.weights = out.weights();
  a.factor = rows.factor;
  double value;
  const WeightUpdate update = run_robust(a, state.get(), &value);
  fill(out, a);
  Tensor loss = empty_scalar(kHere, a.dtype);
  Scalar(loss, "loss").set(value);
  rows.grads(rows.factor);
  commit_lam(a, lam);
  commit(update, flags, state, nonfinite);
  return {loss, out.tensor, grad};
}

// The input and the results of an operator on a vector of losses.
struct Losses {
  RobustArgs args;
  SampleStats samples;
  Tensor loss, grad;

  Losses(const RobustArgs& a, const LossOperands& given, double mix, double max_weight, int64_t flags)
      : args(a),
        samples(empty_rows(kHere, 3, given.losses, a.dtype), a.dtype),
        loss(empty_scalar(kHere, a.dtype)),
        grad((flags & kWithGrad) != 0 ? empty_on(kHere, given.losses.sizes().data(), given.losses.dim(), a.dtype)
                                      : empty_none(kHere, a.dtype)) {
    args.mix = mix;
    args.max_weight = max_weight;
    args.losses = per_row(given.losses, kHere, a.count, code_of(real_of(a.dtype)), "losses");
    args.scores = per_row(given.score, kHere, a.count, code_of(a.dtype), "score");
    args.sample_weight = per_row(given.sample_weight, kHere, a.count, code_of(a.dtype), "sample_weight");
    args.valid = per_row_mask(given.mask, kHere, a.count);
    args.weights = samples.weights();
    args.factor = (flags & kWithGrad) != 0 ? grad.data_ptr() : nullptr;
  }
  std::tuple<Tensor, Tensor, Tensor> done(double value) const {
    fill(samples, args);
    Scalar(loss, "loss").set(value);
    return {loss, samples.tensor, grad};
  }
};

std::tuple<Tensor, Tensor, Tensor> robust_loss(const Tensor& losses, const std::optional<Tensor>& score,
                                               const std::optional<Tensor>& sample_weight,
                                               const std::optional<Tensor>& mask, const Tensor& log_s,
                                               const Tensor& nonfinite, const Tensor& lam, double gamma, double alpha,
                                               double mix, double max_weight, int64_t flags) {
  const Scalar state(log_s, "log_s");
  Losses op(robust_args(dtype_of(losses), losses.numel(), state, lam, gamma, alpha, flags),
            {losses, score, sample_weight, mask}, mix, max_weight, flags);
  double value;
  const WeightUpdate update = run_robust(op.args, state.get(), &value);
  commit_lam(op.args, lam);
  commit(update, flags, state, nonfinite);
  return op.done(value);
}

// The stages of robust_loss, for samples that are spread over processes, micro-batches or chunks.

// settled: it bounds z.
Tensor robust_partial_stats(const Tensor& losses, const std::optional<Tensor>& score, const std::optional<Tensor>& mask,
                            const Tensor& log_s, const Tensor& lam, const std::optional<Tensor>& settled) {
  const int64_t size = kPartialStatsSize;
  RobustArgs a = robust_args(dtype_of(losses), losses.numel(), Scalar(log_s, "log_s"), lam, 1, 1, 0);
  a.losses = per_row(losses, kHere, a.count, code_of(real_of(a.dtype)), "losses");
  a.scores = per_row(score, kHere, a.count, code_of(a.dtype), "score");
  a.valid = per_row_mask(mask, kHere, a.count);
  if (settled.has_value()) a.z_max = normalizer_on(kHere, *settled)->z_max;
  Blocks blocks(a);
  run_stats(a, blocks.stats());
  Tensor out = empty_on(kHere, &size, 1, Dtype::f64);
  *static_cast<PartialStats*>(out.data_ptr()) = cpu_kernels().robust_partial_stats(a, blocks.stats());
  return out;
}

Tensor robust_settle(const Tensor& partials, const Tensor& log_s, const Tensor& nonfinite, const Tensor& lam,
                     const std::optional<Tensor>& reference, double gamma, double alpha, double grad_multiplier,
                     int64_t flags) {
  const Scalar state(log_s, "log_s");
  const int64_t size = kNormalizerSize;
  const RobustArgs config = robust_args(Dtype::f64, 0, state, lam, gamma, alpha, flags);
  Tensor out = empty_on(kHere, &size, 1, Dtype::f64);
  const SettleResult result =
      cpu_kernels().robust_settle({config, state.get(), partials_on(kHere, partials), partials.size(0),
                                   partials.size(1), grad_multiplier, reference_on(kHere, reference)});
  *static_cast<Normalizer*>(out.data_ptr()) = result.settled;
  WeightUpdate update{};
  update.new_log_s = result.new_log_s;
  update.nonfinite = int64_t(result.settled.nonfinite);
  commit(update, flags, state, nonfinite);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> robust_apply(const Tensor& losses, const std::optional<Tensor>& score,
                                                const std::optional<Tensor>& sample_weight,
                                                const std::optional<Tensor>& mask, const Tensor& settled_tensor,
                                                const Tensor& log_s, const Tensor& lam, bool bounded, double mix,
                                                double max_weight, int64_t flags) {
  Losses op(robust_args(dtype_of(losses), losses.numel(), Scalar(log_s, "log_s"), lam, 1, 1, 0),
            {losses, score, sample_weight, mask}, mix, max_weight, flags);
  const Normalizer& settled = *normalizer_on(kHere, settled_tensor);
  if (bounded) op.args.z_max = settled.z_max;
  WeightUpdate update{};
  update.log_s = settled.log_s;
  update.inverse_n = settled.scale;
  Blocks blocks(op.args);
  return op.done(run_apply(op.args, update, blocks));
}

std::tuple<Tensor, Tensor, Tensor> robust_weights(const Tensor& losses, const Tensor& log_s, const Tensor& lam,
                                                  const std::optional<Tensor>& mask, double gamma, double alpha,
                                                  int64_t flags) {
  const Dtype real = dtype_of(losses);
  const int64_t count = losses.numel(), two = 2;
  const Scalar state(log_s, "log_s");
  RobustArgs a = robust_args(real, count, state, lam, gamma, alpha, flags);
  a.losses = per_row(losses, kHere, count, code_of(real_of(real)), "losses");
  a.valid = per_row_mask(mask, kHere, count);
  Tensor weights = empty_on(kHere, losses.sizes().data(), losses.dim(), real);
  a.weights = weights.data_ptr();
  double value;
  const WeightUpdate update = run_robust(a, state.get(), &value);
  Tensor new_log_s = empty_scalar(kHere, state.is_double ? Dtype::f64 : Dtype::f32),
         dlog_s = empty_on(kHere, &two, 1, Dtype::f64);
  Scalar(new_log_s, "log_s").set(update.new_log_s);
  static_cast<double*>(dlog_s.data_ptr())[0] = update.dlog_s;
  static_cast<double*>(dlog_s.data_ptr())[1] = update.dlog_s_state;
  return {weights, new_log_s, dlog_s};
}

Tensor robust_weights_backward(const Tensor& weights, const Tensor& grad_weights, const Tensor& grad_log_s,
                               const Tensor& lam, const Tensor& dlog_s) {
  RobustArgs a{};
  a.dtype = dtype_of(weights);
  a.count = weights.numel();
  a.weights = weights.data_ptr();
  a.lam = Scalar(lam, "lam").get();
  VjpArgs g{};
  g.upstream = per_row(grad_weights, kHere, a.count, code_of(a.dtype), "grad_weights");
  g.upstream_log_s = Scalar(grad_log_s, "grad_log_s").get();
  g.dlog_s = static_cast<const double*>(dlog_s.data_ptr())[0];
  g.dlog_s_state = static_cast<const double*>(dlog_s.data_ptr())[1];
  Tensor out = empty_on(kHere, weights.sizes().data(), weights.dim(), a.dtype);
  g.out = out.data_ptr();
  std::vector<double> dots(size_t(blocks_of(a)));
  parallel(blocks_of(a), kBlock,
           [&](int64_t begin, int64_t end) { cpu_kernels().robust_dot(a, g.upstream, dots.data(), begin, end); });
  for (double dot : dots) g.dot += dot;
  parallel(blocks_of(a), kBlock, [&](int64_t begin, int64_t end) { cpu_kernels().robust_vjp(a, g, begin, end); });
  return out;
}

Tensor rectified(const Tensor& products) {
  const Dtype real = real_of(dtype_of(products));
  const int64_t count = products.numel();
  const void* const given = per_row(products, kHere, count, code_of(real), "products");
  Tensor weights = empty_on(kHere, products.sizes().data(), products.dim(), real);
  cpu_kernels().rectified(real, given, count, weights.data_ptr());
  return weights;
}

// ---- gradient scaling ----------------------------------------------------------------------------------------------

void run_scale(const Tensor& source, const Tensor& out, const Tensor& upstream_in) {
  ScaleArgs a{};
  bool constant;
  const Tensor upstream = fill_scale(a, constant, source, out, upstream_in);
  if (out.numel() == 0) return;
  if (!constant)
    return parallel(a.batch * a.classes, a.inner,
                    [&](int64_t begin, int64_t end) { cpu_kernels().scale(a, begin, end); });
  const void* value = upstream.data_ptr();
  a.scalar = a.dtype == Dtype::f64 ? *static_cast<const double*>(value) : double(*static_cast<const float*>(value));
  if (a.scalar == 1.0 && a.source == a.grad) return;  // loss.backward(): the gradient is already there
  // The slices have a fixed size. The last one may be shorter, so it is walked by itself.
  constexpr int64_t kSlice = 4096;
  a.inner = kSlice;
  const int64_t whole = out.numel() / kSlice;
  parallel(whole, kSlice, [&](int64_t begin, int64_t end) { cpu_kernels().scale(a, begin, end); });
  const size_t done = size_t(whole * kSlice);
  a.inner = out.numel() - whole * kSlice;
  a.source = static_cast<const char*>(a.source) + done * size_of(saved_as(a.dtype));
  a.grad = static_cast<char*>(a.grad) + done * size_of(a.dtype);
  if (a.inner > 0) cpu_kernels().scale(a, 0, 1);
}

Tensor scale(const Tensor& grad, const Tensor& upstream, bool to_half) {
  const Dtype dtype = to_half ? Dtype::f16 : dtype_of(grad);
  Tensor out = empty_on(kHere, grad.sizes().data(), grad.dim(), dtype);
  prefer_huge_pages(out.data_ptr(), size_t(out.numel()) * size_of(dtype));
  run_scale(grad, out, upstream);
  return out;
}
void scale_(const Tensor& grad, const Tensor& upstream) { run_scale(grad, grad, upstream); }

}  // namespace
