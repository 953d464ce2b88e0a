// The CPU operators: memory and threads. Schemas are in absgd_fast/ops.py, loops in cpu/loops.cpp, cpu/step.cpp and
// cpu/weighted.cpp, formulas in math.h.
#include <algorithm>
#include <cstring>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ops_common.h"

namespace {

const Device kHere{kCpu, 0};

// Fresh pages of a large result cost more than filling them: 64 k page faults at 2048 x 32000 fp32 (83 ms against 46 ms
// with huge pages).
void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kWorthwhile = size_t(8) << 20, kPage = 4096;
  if (bytes < kWorthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// One number on the CPU, float32 or float64: a piece of state.
struct Scalar {
  void* data;
  bool is_double;

  Scalar(const Tensor& t, const char* name) : data(t.data_ptr()) {
    const int32_t code = code_of(t);
    is_double = code == kDouble;
    STD_TORCH_CHECK((is_double || code == kFloat) && t.numel() == 1 && t.is_cpu(), name,
                    ": expected one float32 or float64 number on the CPU");
  }
  double get() const {
    return is_double ? *static_cast<const double*>(data) : double(*static_cast<const float*>(data));
  }
  void set(double value) const {
    if (is_double)
      *static_cast<double*>(data) = value;
    else
      *static_cast<float*>(data) = float(value);
  }
};

// ---- threads -------------------------------------------------------------------------------------------------------

// Below this many elements one thread does it all: a parallel region costs about 1 us, the work of 16 k elements.
constexpr int64_t kSerialElements = 16384;

template <class F>
void parallel(int64_t items, int64_t elements_per_item, const F& f) {
  if (items <= 0) return;
  if (items == 1 || items * elements_per_item <= kSerialElements) return f(int64_t(0), items);
  const int64_t grain = kSerialElements / 2 / (elements_per_item > 0 ? elements_per_item : 1);
  torch::stable::parallel_for(0, items, grain > 0 ? grain : 1, f);
}

constexpr size_t kCacheBytes = size_t(8) << 20, kScratchBytes = size_t(1) << 20;

// ---- losses on logits ----------------------------------------------------------------------------------------------

template <class T>
int form_of(const T* s, int64_t classes) {
  const T* d = s + classes;
  int form = kAdjusts;
  if (!std::all_of(s, s + classes, [&](T x) { return x == s[0]; })) form |= kScales;
  if (!std::all_of(d, d + classes, [](T x) { return x == 0; })) form |= kShifts;
  return form;
}

// The input of the kernels, and their memory per row.
struct Logits {
  LogitArgs args{};
  LogitTensors tensors;
  std::unique_ptr<char[]> scratch, kept;

  Logits(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& class_weight,
         const std::optional<Tensor>& adjust, const LossNumbers& loss, int64_t ignore_index,
         const std::optional<Tensor>& mask)
      : tensors(args, logits, target, class_weight, adjust, loss, ignore_index, mask) {
    const size_t padded = size_t(args.tiles()) * kTileRows, size = size_of(real());
    scratch.reset(new char[padded * (7 * size + 1)]);
    auto take = [&, at = scratch.get()](size_t bytes) mutable { return std::exchange(at, at + bytes); };
    args.losses = take(padded * size);
    args.row_max = take(padded * size);
    args.row_rest = take(padded * size);
    args.row_own = take(padded * size);
    args.coefficient = take(padded * size);
    args.row_total = take(padded * size);
    factor = take(padded * size);
    args.valid = reinterpret_cast<uint8_t*>(take(padded));
    if (args.adjust != nullptr)
      args.adjust_form = real() == Dtype::f64 ? form_of(static_cast<const double*>(args.adjust), args.classes)
                                              : form_of(static_cast<const float*>(args.adjust), args.classes);
  }

  void* factor;  // (rows) real, for the caller to fill
  Dtype real() const { return real_of(args.dtype); }

  void stats() {
    each_tiles([&](int64_t begin, int64_t end) { return cpu_kernels().logit_stats(args, begin, end); });
  }
  // Where no weights stand between losses and gradient: a tile's gradient is made while its logits are in the cache.
  void stats_and_grads() {
    if (args.grad == nullptr) return stats();
    each_tiles([&](int64_t begin, int64_t end) {
      int64_t bad = kAllLabelsGood;
      for (int64_t tile = begin; tile < end; ++tile) {
        bad = std::min(bad, cpu_kernels().logit_stats(args, tile, tile + 1));
        cpu_kernels().logit_grads(args, tile, tile + 1);
      }
      return bad;
    });
  }

  // Room for the gradient, before stats(): the exponentials of the forward pass are kept there while that saves time
  // (512 x 1000 fp32: 0.35 -> 0.25 ns per element; a loss where the gradient leaves the cache
  // in between: at 512 x 8142, 17 MB, kept 1.6 ms, computed twice 1.1 ms).
  Tensor make_grad(bool wanted) {
    const Dtype stored = made_as(args.dtype);
    if (!wanted) return empty_none(kHere, stored);
    Tensor grad = empty_on(kHere, tensors.logits.sizes().data(), tensors.logits.dim(), stored);
    args.grad = grad.data_ptr();
    const size_t bytes = size_t(args.rows() * args.classes) * size_of(stored);
    prefer_huge_pages(args.grad, bytes);
    if (args.along_classes()) {
      args.keep = args.dtype == real() && bytes <= kCacheBytes;
    } else {
      const size_t needed = size_t(args.tiles() * kTileRows * args.classes) * size_of(real());
      if (needed <= kScratchBytes) kept.reset(new char[needed]);
      args.kept = kept.get();
    }
    return grad;
  }

  // The gradient takes the place of the logits: every element is read once more just before it is written.
  void grad_in_place() {
    STD_TORCH_CHECK(tensors.logits.dim() == 2 && tensors.logits.is_contiguous() && made_as(args.dtype) == args.dtype,
                    "logit_loss_: expected contiguous logits (B, C) that are not float16");
    args.grad = const_cast<void*>(args.logits);
  }

  void grads(const void* factors) {
    if (args.grad == nullptr) return;
    args.factor = factors;
    parallel(args.tiles(), kTileRows * args.classes,
             [&](int64_t begin, int64_t end) { cpu_kernels().logit_grads(args, begin, end); });
  }

  Tensor losses() const {
    Tensor out = tensors.per_row_results(0, real(), true);
    if (args.rows() > 0) std::memcpy(out.data_ptr(), args.losses, size_t(args.rows()) * size_of(real()));
    return out;
  }
  // 1 where a row counts, else 0
  Tensor valid() const {
    Tensor out = tensors.per_row_results(0, real(), true);
    const auto fill = [&](auto* ones) { std::copy_n(args.valid, args.rows(), ones); };
    real() == Dtype::f64 ? fill(static_cast<double*>(out.data_ptr())) : fill(static_cast<float*>(out.data_ptr()));
    return out;
  }

 private:
  // walk(begin, end) of all tiles, which returns the first row whose label is out of range
  template <class F>
  void each_tiles(const F& walk) {
    std::vector<int64_t> bad(size_t(args.tiles()), kAllLabelsGood);
    parallel(args.tiles(), kTileRows * args.classes,
             [&](int64_t begin, int64_t end) { bad[size_t(begin)] = walk(begin, end); });
    for (int64_t row : bad)
      if (row != kAllLabelsGood) {
        const long long label = args.target_int64 ? static_cast<const int64_t*>(args.target)[row]
                                                  : static_cast<const int32_t*>(args.target)[row];
        raise_bad_label(label, row, args.classes, "");
      }
  }
};

std::tuple<Tensor, Tensor, Tensor> logit_loss(const Tensor& logits, const Tensor& target,
                                              const std::optional<Tensor>& class_weight,
                                              const std::optional<Tensor>& adjust, double first, double second,
                                              int64_t ignore_index, int64_t flags) {
  Logits rows(logits, target, class_weight, adjust, loss_numbers(first, second, flags), ignore_index, std::nullopt);
  Tensor grad = rows.make_grad((flags & kWithGrad) != 0);
  rows.stats_and_grads();
  return {rows.losses(), grad, rows.valid()};
}

// After a bad label there may be logits and gradients side by side.
std::tuple<Tensor, Tensor> logit_loss_(const Tensor& logits, const Tensor& target,
                                       const std::optional<Tensor>& class_weight, const std::optional<Tensor>& adjust,
                                       double first, double second, int64_t ignore_index, int64_t flags) {
  Logits rows(logits, target, class_weight, adjust, loss_numbers(first, second, flags), ignore_index, std::nullopt);
  rows.grad_in_place();
  rows.stats_and_grads();
  return {rows.losses(), rows.valid()};
}

// ---- robust weights ------------------------------------------------------------------------------------------------

RobustArgs robust_args(Dtype dtype, int64_t count, const Scalar& log_s, const Tensor& lam, double gamma, double alpha,
                       int64_t flags) {
  RobustArgs a{};
  fill_robust(a, dtype, count, log_s.is_double, gamma, alpha, flags);
  a.lam = Scalar(lam, "lam").get();
  return a;
}

// One number or partial sum for each block of losses.
struct Blocks {
  static constexpr int64_t kFew = 4;
  Partial few[kFew];
  std::unique_ptr<Partial[]> many;

  explicit Blocks(const RobustArgs& a) : many(a.blocks() > kFew ? new Partial[size_t(a.blocks())] : nullptr) {}
  Partial* partials() { return many ? many.get() : few; }
};

void run_partials(const RobustArgs& a, Partial* partials) {
  parallel(a.blocks(), kBlock,
           [&](int64_t begin, int64_t end) { cpu_kernels().robust_partials(a, partials, begin, end); });
}
// The weights and, where a.factor is set, the factors; returns the robust loss.
double run_apply(const RobustArgs& a, const Outcome& outcome, Blocks& blocks) {
  double* const sums = reinterpret_cast<double*>(blocks.partials());  // the partials have served
  parallel(a.blocks(), kBlock,
           [&](int64_t begin, int64_t end) { cpu_kernels().robust_apply(a, outcome, sums, begin, end); });
  double total = 0;
  for (int64_t b = 0; b < a.blocks(); ++b) total += sums[b];
  return total;
}
Outcome run_robust(const RobustArgs& a, double log_s, double* loss) {
  Blocks blocks(a);
  run_partials(a, blocks.partials());
  const Outcome outcome = cpu_kernels().robust_finish(a, blocks.partials(), log_s);
  *loss = run_apply(a, outcome, blocks);
  return outcome;
}

void commit(const Outcome& outcome, int64_t flags, const Scalar& log_s, const Tensor& nonfinite) {
  if ((flags & kUpdate) == 0) return;
  if (outcome.bad > 0)
    ++*static_cast<int64_t*>(nonfinite.data_ptr());
  else
    log_s.set(outcome.new_log_s);
}

// (3, ...): losses, weights and validity (0 or 1) of one forward, for `.last`
struct Rows {
  Tensor tensor;
  size_t bytes;  // of one row

  char* data;

  Rows(Tensor rows, int64_t count, Dtype real)
      : tensor(std::move(rows)), bytes(size_t(count) * size_of(real)), data(static_cast<char*>(tensor.data_ptr())) {}
  char* row(int k) const { return data + size_t(k) * bytes; }

  template <class T>
  void fill(const RobustArgs& a) const {
    const T* const losses = static_cast<const T*>(a.losses);
    T *const seen = reinterpret_cast<T*>(row(0)), *const valid = reinterpret_cast<T*>(row(2));
    for (int64_t i = 0; i < a.count; ++i) {
      const bool counts = a.valid == nullptr || a.valid[i] != 0;
      seen[i] = counts ? losses[i] : T(0);
      valid[i] = T(counts);
    }
  }
  void fill(const RobustArgs& a) const {
    if (a.count == 0) return;
    a.dtype == Dtype::f64 ? fill<double>(a) : fill<float>(a);
  }
};

std::tuple<Tensor, Tensor, Tensor> robust_logit_loss(const Tensor& logits, const Tensor& target,
                                                     const std::optional<Tensor>& class_weight,
                                                     const std::optional<Tensor>& adjust, double first, double second,
                                                     int64_t ignore_index, const std::optional<Tensor>& score,
                                                     const std::optional<Tensor>& sample_weight,
                                                     const std::optional<Tensor>& mask, const Tensor& log_s,
                                                     const Tensor& nonfinite, const Tensor& lam, double gamma,
                                                     double alpha, double mix, double max_weight, int64_t flags,
                                                     const std::optional<Tensor>& weighing) {
  STD_TORCH_CHECK(!weighing.has_value(), "robust_logit_loss: the CPU's kernels make the weights at once");
  Logits rows(logits, target, class_weight, adjust, loss_numbers(first, second, flags), ignore_index, mask);
  Tensor grad = rows.make_grad((flags & kWithGrad) != 0);
  const int64_t count = rows.args.rows();
  const Scalar state(log_s, "log_s");
  RobustArgs a = robust_args(rows.real(), count, state, lam, gamma, alpha, flags);
  a.mix = mix;
  a.max_weight = max_weight;
  a.scores = per_row(score, kHere, count, code_of(a.dtype), "score");
  a.sample_weight = per_row(sample_weight, kHere, count, code_of(a.dtype), "sample_weight");
  rows.stats();  // raises on a bad label, before anything is written

  const Rows out(rows.tensors.per_row_results(3, a.dtype), count, a.dtype);
  a.losses = rows.args.losses;
  a.valid = rows.args.valid;
  a.weights = out.row(1);
  a.factor = rows.factor;
  double value;
  const Outcome outcome = run_robust(a, state.get(), &value);
  out.fill(a);
  Tensor loss = empty_scalar(kHere, a.dtype);
  Scalar(loss, "loss").set(value);
  rows.grads(rows.factor);
  commit(outcome, flags, state, nonfinite);
  return {loss, out.tensor, grad};
}

// The input and the results of an operator on a vector of losses.
struct Losses {
  RobustArgs args;
  Rows rows;
  Tensor loss, grad;

  Losses(const RobustArgs& a, const Tensor& losses, const std::optional<Tensor>& score,
         const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& mask, double mix, double max_weight,
         int64_t flags)
      : args(a),
        rows(empty_rows(kHere, 3, losses, a.dtype), a.count, a.dtype),
        loss(empty_scalar(kHere, a.dtype)),
        grad((flags & kWithGrad) != 0 ? empty_on(kHere, losses.sizes().data(), losses.dim(), a.dtype)
                                      : empty_none(kHere, a.dtype)) {
    args.mix = mix;
    args.max_weight = max_weight;
    args.losses = per_row(losses, kHere, a.count, code_of(real_of(a.dtype)), "losses");
    args.scores = per_row(score, kHere, a.count, code_of(a.dtype), "score");
    args.sample_weight = per_row(sample_weight, kHere, a.count, code_of(a.dtype), "sample_weight");
    args.valid = per_row_mask(mask, kHere, a.count);
    args.weights = rows.row(1);
    args.factor = (flags & kWithGrad) != 0 ? grad.data_ptr() : nullptr;
  }
  std::tuple<Tensor, Tensor, Tensor> done(double value) const {
    rows.fill(args);
    Scalar(loss, "loss").set(value);
    return {loss, rows.tensor, grad};
  }
};

std::tuple<Tensor, Tensor, Tensor> robust_loss(const Tensor& losses, const std::optional<Tensor>& score,
                                               const std::optional<Tensor>& sample_weight,
                                               const std::optional<Tensor>& mask, const Tensor& log_s,
                                               const Tensor& nonfinite, const Tensor& lam, double gamma, double alpha,
                                               double mix, double max_weight, int64_t flags) {
  const Scalar state(log_s, "log_s");
  const Losses op(robust_args(dtype_of(losses), losses.numel(), state, lam, gamma, alpha, flags), losses, score,
                  sample_weight, mask, mix, max_weight, flags);
  double value;
  const Outcome outcome = run_robust(op.args, state.get(), &value);
  commit(outcome, flags, state, nonfinite);
  return op.done(value);
}

// The stages of robust_loss by themselves, for rows that are spread over processes, micro-batches or chunks.

// settled: bounds z
Tensor robust_totals(const Tensor& losses, const std::optional<Tensor>& score, const std::optional<Tensor>& mask,
                     const Tensor& log_s, const Tensor& lam, const std::optional<Tensor>& settled) {
  const int64_t size = kTotals;
  RobustArgs a = robust_args(dtype_of(losses), losses.numel(), Scalar(log_s, "log_s"), lam, 1, 1, 0);
  a.losses = per_row(losses, kHere, a.count, code_of(real_of(a.dtype)), "losses");
  a.scores = per_row(score, kHere, a.count, code_of(a.dtype), "score");
  a.valid = per_row_mask(mask, kHere, a.count);
  if (settled.has_value()) a.z_top = settled_on(kHere, *settled)->top;
  Blocks blocks(a);
  run_partials(a, blocks.partials());
  Tensor out = empty_on(kHere, &size, 1, Dtype::f64);
  *static_cast<Totals*>(out.data_ptr()) = cpu_kernels().robust_totals(a, blocks.partials());
  return out;
}

Tensor robust_settle(const Tensor& totals, const Tensor& log_s, const Tensor& nonfinite, const Tensor& lam,
                     const std::optional<Tensor>& reference, double gamma, double alpha, double share, int64_t flags) {
  const Scalar state(log_s, "log_s");
  const int64_t size = kSettled;
  const double* const rows = totals_on(kHere, totals);
  const RobustArgs a = robust_args(Dtype::f64, 0, state, lam, gamma, alpha, flags);
  Tensor out = empty_on(kHere, &size, 1, Dtype::f64);
  double new_log_s;
  const Settled settled = cpu_kernels().robust_settle(a, rows, totals.size(0), totals.size(1), state.get(), share,
                                                      reference_on(kHere, reference), &new_log_s);
  *static_cast<Settled*>(out.data_ptr()) = settled;
  Outcome outcome{};
  outcome.new_log_s = new_log_s;
  outcome.bad = int64_t(settled.bad);
  commit(outcome, flags, state, nonfinite);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> robust_apply(const Tensor& losses, const std::optional<Tensor>& score,
                                                const std::optional<Tensor>& sample_weight,
                                                const std::optional<Tensor>& mask, const Tensor& settled_tensor,
                                                const Tensor& log_s, const Tensor& lam, bool bounded, double mix,
                                                double max_weight, int64_t flags) {
  Losses op(robust_args(dtype_of(losses), losses.numel(), Scalar(log_s, "log_s"), lam, 1, 1, 0), losses, score,
            sample_weight, mask, mix, max_weight, flags);
  const Settled& settled = *settled_on(kHere, settled_tensor);
  if (bounded) op.args.z_top = settled.top;
  Outcome outcome{};
  outcome.log_s = settled.log_s;
  outcome.inverse_n = settled.scale;
  Blocks blocks(op.args);
  return op.done(run_apply(op.args, outcome, blocks));
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
  const Outcome outcome = run_robust(a, state.get(), &value);
  Tensor new_log_s = empty_scalar(kHere, state.is_double ? Dtype::f64 : Dtype::f32),
         shares = empty_on(kHere, &two, 1, Dtype::f64);
  Scalar(new_log_s, "log_s").set(outcome.new_log_s);
  static_cast<double*>(shares.data_ptr())[0] = outcome.share;
  static_cast<double*>(shares.data_ptr())[1] = outcome.share_state;
  return {weights, new_log_s, shares};
}

Tensor robust_weights_backward(const Tensor& weights, const Tensor& grad_weights, const Tensor& grad_log_s,
                               const Tensor& lam, const Tensor& shares) {
  RobustArgs a{};
  a.dtype = dtype_of(weights);
  a.count = weights.numel();
  a.weights = weights.data_ptr();
  a.lam = Scalar(lam, "lam").get();
  VjpArgs g{};
  g.upstream = per_row(grad_weights, kHere, a.count, code_of(a.dtype), "grad_weights");
  g.upstream_log_s = Scalar(grad_log_s, "grad_log_s").get();
  g.share = static_cast<const double*>(shares.data_ptr())[0];
  g.share_state = static_cast<const double*>(shares.data_ptr())[1];
  Tensor out = empty_on(kHere, weights.sizes().data(), weights.dim(), a.dtype);
  g.out = out.data_ptr();
  std::vector<double> dots(size_t(a.blocks()));
  parallel(a.blocks(), kBlock,
           [&](int64_t begin, int64_t end) { cpu_kernels().robust_dot(a, g.upstream, dots.data(), begin, end); });
  for (double dot : dots) g.dot += dot;
  parallel(a.blocks(), kBlock, [&](int64_t begin, int64_t end) { cpu_kernels().robust_vjp(a, g, begin, end); });
  return out;
}

// ---- other rules from losses to weights ----------------------------------------------------------------------------

RuleArgs rule_args(const Tensor& losses, const std::optional<Tensor>& mask, const Tensor& weights) {
  RuleArgs a{};
  a.dtype = dtype_of(weights);
  a.count = losses.numel();
  a.losses = per_row(losses, kHere, a.count, code_of(a.dtype), "losses");
  a.valid = per_row_mask(mask, kHere, a.count);
  a.weights = weights.data_ptr();
  return a;
}

Tensor rule_weights(const Tensor& losses, const std::optional<Tensor>& mask, int64_t rule, double first,
                    double second) {
  Tensor weights = empty_on(kHere, losses.sizes().data(), losses.dim(), real_of(dtype_of(losses)));
  RuleArgs a = rule_args(losses, mask, weights);
  std::vector<double> scratch(size_t(a.count));
  a.scratch = scratch.data();
  cpu_kernels().rule_weights(a, static_cast<LossRule>(rule), first, second);
  return weights;
}

Tensor group_weights(const Tensor& losses, const std::optional<Tensor>& mask, const Tensor& groups, const Tensor& log_q,
                     double eta, bool update) {
  Tensor weights = empty_on(kHere, losses.sizes().data(), losses.dim(), real_of(dtype_of(losses)));
  GroupArgs a{};
  static_cast<RuleArgs&>(a) = rule_args(losses, mask, weights);
  a.groups = static_cast<const int64_t*>(per_row(groups, kHere, a.count, kLong, "groups"));
  a.n_groups = log_q.numel();
  a.eta = eta;
  const Dtype state = dtype_of(log_q);
  void* const kept =
      const_cast<void*>(per_row(log_q, kHere, a.n_groups, code_of(real_of(state)), "log_q"));  // schema: (a!)
  for (int64_t i = 0; i < a.count; ++i)
    STD_TORCH_CHECK((a.valid && !a.valid[i]) || (a.groups[i] >= 0 && a.groups[i] < a.n_groups), "group_weights: group ",
                    a.groups[i], " in row ", i, ", expected one below ", a.n_groups);
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
  // slices of a fixed size; the last one may be short, so it is walked by itself
  constexpr int64_t kSlice = 4096;
  a.inner = kSlice;
  const int64_t whole = out.numel() / kSlice;
  parallel(whole, kSlice, [&](int64_t begin, int64_t end) { cpu_kernels().scale(a, begin, end); });
  const size_t done = size_t(whole * kSlice);
  a.inner = out.numel() - whole * kSlice;
  a.source = static_cast<const char*>(a.source) + done * size_of(made_as(a.dtype));
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

// ---- step ----------------------------------------------------------------------------------------------------------

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

// The table lies in the tensor's memory, where StepPlan (host.cpp) wrote it a moment ago. (The second argument only
// tells the dispatcher where the parameters are.)
void planned_step(const Tensor& table, const Tensor&) { run_step(planned_table(table)); }

void step_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& states,
           const std::vector<Tensor>& steps, const std::optional<Tensor>& lr_tensor,
           const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
           const std::optional<Tensor>& robust, double lr, double weight_decay, double first, double second, double eps,
           int64_t rule, int64_t flags) {
  STD_TORCH_CHECK(!grad_scale.has_value() && !found_inf.has_value(),
                  "step_: grad_scale and found_inf are for GPUs; on the CPU unscale before");
  StepGroup group = step_group(lr, weight_decay, first, second, eps, rule, flags);
  if (lr_tensor.has_value()) {
    const DeviceNumber number = number_on(kHere, *lr_tensor, "lr");
    group.lr = number.is_double ? *static_cast<const double*>(number.data) : *static_cast<const float*>(number.data);
  }
  StepLists lists(params, grads, states, steps, group);
  if (robust.has_value()) lists.table.robust = settled_on(kHere, *robust);
  run_step(lists.table);
  lists.restore(false);
}

// ---- weighted step -------------------------------------------------------------------------------------------------

// The rows that take part and what they weigh, without those of factor 0: a masked row may hold anything.
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
  const Outcome outcome = run_robust(a, state.get(), &value);
  Tensor new_log_s = empty_scalar(kHere, state.is_double ? Dtype::f64 : Dtype::f32);
  Scalar(new_log_s, "log_s").set(outcome.new_log_s);
  if (outcome.bad > 0) return new_log_s;  // one bad batch never poisons the state
  table.row = row;
  table.factors = a.factor;
  table.rows = lists.real == Dtype::f64 ? compact(row, static_cast<double*>(a.factor), a.count)
                                        : compact(row, static_cast<float*>(a.factor), a.count);
  // four numbers that are multiplied and added take the time of one logit
  parallel(table.elements, 1 + table.rows / 4,
           [&](int64_t begin, int64_t end) { cpu_kernels().weighted_step(table, begin, end); });
  lists.restore();
  return new_log_s;
}

// ---- the instruction set, and what these signatures are ------------------------------------------------------------

std::string isas() {
  std::string out = cpu_kernels().isa;
  for (int j = 0; j < cpu_isa_count(); ++j) out += std::string(",") + cpu_isa_name(j);
  return out;
}
bool use_isa(std::string name) { return use_cpu_isa(name.c_str()); }

std::string native_signatures();

#define ABSGD_TOOLS(OP) \
  OP(isas)              \
  OP(use_isa)           \
  OP(native_signatures)

// Operators that only the CPU has.
#define ABSGD_HERE_ALONE(OP) \
  OP(rule_weights)           \
  OP(group_weights)

std::string native_signatures() {
  std::string out;
  ABSGD_OPS(ABSGD_SIGNATURE_LINE)
  ABSGD_HERE_ALONE(ABSGD_SIGNATURE_LINE)
  ABSGD_TOOLS(ABSGD_SIGNATURE_LINE)
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(absgd_fast, CPU, m){
    ABSGD_OPS(ABSGD_IMPL)

        ABSGD_HERE_ALONE(ABSGD_IMPL)} STABLE_TORCH_LIBRARY_IMPL(absgd_fast, CompositeExplicitAutograd, m) {
  ABSGD_TOOLS(ABSGD_IMPL)
}
