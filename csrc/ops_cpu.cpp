// The CPU operators on LibTorch's stable ABI: checks, dtype dispatch, allocation, threads. Schemas are in
// absgd_fast/ops.py, loops in cpu/loops.cpp, formulas in math.h. With ops_cuda.cpp the only file that includes torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "launch.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in the headers of torch 2.10
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace absgd;

// ---- tensors -------------------------------------------------------------------------------------------------------

// torch's dtype codes, read once: Tensor::scalar_type() asks for up to a dozen of them on every call (30 ns).
const int32_t kFloat = aoti_torch_dtype_float32(), kDouble = aoti_torch_dtype_float64();
const int32_t kBFloat16 = aoti_torch_dtype_bfloat16(), kHalf = aoti_torch_dtype_float16();
const int32_t kLong = aoti_torch_dtype_int64(), kInt = aoti_torch_dtype_int32(), kBool = aoti_torch_dtype_bool();
const int32_t kCpu = aoti_torch_device_type_cpu();

int32_t code_of(const Tensor& t) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

Dtype dtype_of(const Tensor& t) {
  const int32_t code = code_of(t);
  if (code == kFloat) return Dtype::f32;
  if (code == kDouble) return Dtype::f64;
  if (code == kBFloat16) return Dtype::bf16;
  STD_TORCH_CHECK(code == kHalf, "expected float32, float64, bfloat16 or float16");
  return Dtype::f16;
}

int32_t code_of(Dtype dtype) {
  return dtype == Dtype::f32 ? kFloat : dtype == Dtype::f64 ? kDouble : dtype == Dtype::bf16 ? kBFloat16 : kHalf;
}
// What losses and sums of this storage type are computed in.
Dtype real_of(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
// How a gradient made in the forward pass is stored. Not in float16: what a loss scale (GradScaler) is there to lift
// into range would already be 0 when backward brings that scale.
Dtype made_as(Dtype dtype) { return dtype == Dtype::f16 ? Dtype::f32 : dtype; }
size_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

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

Tensor empty_cpu(const int64_t* sizes, int64_t dim, Dtype dtype) {
  int64_t strides[16] = {};
  STD_TORCH_CHECK(dim <= 16, "at most 16 dimensions");
  int64_t step = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, code_of(dtype), kCpu, 0, &handle));
  return Tensor(handle);
}
Tensor empty_scalar(Dtype dtype) { return empty_cpu(nullptr, 0, dtype); }
Tensor empty_none(Dtype dtype) {
  const int64_t zero = 0;
  return empty_cpu(&zero, 1, dtype);
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

// A vector of one number per row, ready for the kernels.
const void* per_row(const std::optional<Tensor>& t, int64_t rows, int32_t code, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(
      t->is_cpu() && t->numel() == rows && t->is_contiguous() && code_of(*t) == code, name,
      ": expected a contiguous CPU tensor with one value per sample, of the dtype the losses are computed in");
  return t->data_ptr();
}
const uint8_t* per_row_mask(const std::optional<Tensor>& t, int64_t rows) {
  return static_cast<const uint8_t*>(per_row(t, rows, kBool, "mask"));
}

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

// logits (B, C, d1, ...) as (batch, classes, inner) with strides; copies only where d1, ... have no common stride.
struct Logits {
  Tensor logits, target;
  LogitArgs args{};
  std::unique_ptr<char[]> scratch, kept;

  Logits(const Tensor& logits_in, const Tensor& target_in, const std::optional<Tensor>& class_weight,
         double label_smoothing, int64_t ignore_index, const std::optional<Tensor>& mask)
      : logits(logits_in), target(target_in) {
    STD_TORCH_CHECK(logits.dim() >= 2 && logits.dim() <= 16 && logits.is_cpu() && target.is_cpu(),
                    "logits: expected a CPU tensor (B, C, ...)");
    args.dtype = dtype_of(logits);
    if (!view()) {
      logits = torch::stable::contiguous(logits);
      view();
    }
    if (!target.is_contiguous()) target = torch::stable::contiguous(target);
    bool fits = target.dim() == logits.dim() - 1 && target.size(0) == args.batch;
    for (int64_t d = 2; fits && d < logits.dim(); ++d) fits = target.size(d - 1) == logits.size(d);
    STD_TORCH_CHECK(fits, "target: expected one label per row of logits");
    const int32_t label_type = code_of(target);
    args.target_int64 = label_type == kLong;
    STD_TORCH_CHECK(args.target_int64 || label_type == kInt, "target: expected int64 or int32 labels");
    args.logits = logits.data_ptr();
    args.target = target.data_ptr();
    args.ignore_index = ignore_index;
    args.label_smoothing = label_smoothing;
    args.class_weight = per_row(class_weight, args.classes, code_of(real()), "weight");
    args.mask = per_row_mask(mask, args.rows());

    const size_t padded = size_t(args.tiles()) * kTileRows, size = size_of(real());
    scratch.reset(new char[padded * (6 * size + 1)]);
    auto take = [&, at = scratch.get()](size_t bytes) mutable { return std::exchange(at, at + bytes); };
    args.losses = take(padded * size);
    args.row_max = take(padded * size);
    args.row_rest = take(padded * size);
    args.row_own = take(padded * size);
    args.coefficient = take(padded * size);
    factor = take(padded * size);
    args.valid = reinterpret_cast<uint8_t*>(take(padded));
  }

  void* factor;  // (rows) real, for the caller to fill
  Dtype real() const { return real_of(args.dtype); }

  bool view() {
    const auto sizes = logits.sizes(), strides = logits.strides();
    args.batch = sizes[0];
    args.classes = sizes[1];
    args.stride_batch = strides[0];
    args.stride_class = strides[1];
    args.inner = 1;
    args.stride_inner = 1;
    for (int64_t d = logits.dim() - 1; d >= 2; --d) {
      if (sizes[d] == 1) continue;
      if (args.inner == 1)
        args.stride_inner = strides[d];
      else if (strides[d] != args.inner * args.stride_inner)
        return false;
      args.inner *= sizes[d];
    }
    return true;
  }

  void stats() {
    std::vector<int64_t> bad(size_t(args.tiles()), kAllLabelsGood);
    parallel(args.tiles(), kTileRows * args.classes,
             [&](int64_t begin, int64_t end) { bad[size_t(begin)] = cpu_kernels().logit_stats(args, begin, end); });
    for (int64_t row : bad)
      if (row != kAllLabelsGood) {
        const long long label = args.target_int64 ? static_cast<const int64_t*>(args.target)[row]
                                                  : static_cast<const int32_t*>(args.target)[row];
        // ops.py turns this into an IndexError
        STD_TORCH_CHECK(false, "absgd_fast label out of range: label=", label, " row=", row, " classes=", args.classes,
                        ";");
      }
  }

  // Room for the gradient, before stats(): the exponentials of the forward pass are kept there while that saves time
  // (512 x 1000 fp32: 0.35 -> 0.25 ns per element; a loss where the gradient leaves the cache
  // in between: at 512 x 8142, 17 MB, kept 1.6 ms, computed twice 1.1 ms).
  Tensor make_grad(bool wanted) {
    const Dtype stored = made_as(args.dtype);
    if (!wanted) return empty_none(stored);
    Tensor grad = empty_cpu(logits.sizes().data(), logits.dim(), stored);
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

  void grads(const void* factors) {
    if (args.grad == nullptr) return;
    args.factor = factors;
    parallel(args.tiles(), kTileRows * args.classes,
             [&](int64_t begin, int64_t end) { cpu_kernels().logit_grads(args, begin, end); });
  }
};

std::tuple<Tensor, Tensor> logit_loss(const Tensor& logits, const Tensor& target,
                                      const std::optional<Tensor>& class_weight, double label_smoothing,
                                      int64_t ignore_index, bool with_grad) {
  Logits rows(logits, target, class_weight, label_smoothing, ignore_index, std::nullopt);
  Tensor grad = rows.make_grad(with_grad);
  rows.stats();
  rows.grads(nullptr);
  const auto shape = rows.target.sizes();
  Tensor losses = empty_cpu(shape.data(), rows.target.dim(), rows.real());
  if (rows.args.rows() > 0)
    std::memcpy(losses.data_ptr(), rows.args.losses, size_t(rows.args.rows()) * size_of(rows.real()));
  return {losses, grad};
}

// ---- robust weights ------------------------------------------------------------------------------------------------

// Bits of `flags`; ops.py has the same table.
enum Flags : int64_t { kNormalizer = 3, kInitFirst = 4, kUpdate = 8, kWithGrad = 16 };

RobustArgs robust_args(Dtype dtype, int64_t count, const Scalar& log_s, const Tensor& lam, double gamma, double alpha,
                       int64_t flags) {
  RobustArgs a{};
  a.dtype = dtype;
  a.count = count;
  a.lam = Scalar(lam, "lam").get();
  a.gamma = gamma;
  a.alpha = alpha;
  a.max_weight = HUGE_VAL;
  a.normalizer = Normalizer(flags & kNormalizer);
  a.init_first = (flags & kInitFirst) != 0;
  a.z_limit = dtype == Dtype::f64 && log_s.is_double ? DBL_MAX : FLT_MAX;
  return a;
}

// The weights and, where a.factor is set, the factors; *loss is the robust loss.
Outcome run_robust(const RobustArgs& a, double log_s, double* loss) {
  constexpr int64_t kFew = 4;
  Partial few[kFew];
  std::unique_ptr<Partial[]> many(a.blocks() > kFew ? new Partial[size_t(a.blocks())] : nullptr);
  Partial* partials = many ? many.get() : few;
  parallel(a.blocks(), kBlock,
           [&](int64_t begin, int64_t end) { cpu_kernels().robust_partials(a, partials, begin, end); });
  const Outcome outcome = cpu_kernels().robust_finish(a, partials, log_s);
  double* sums = reinterpret_cast<double*>(partials);  // the partials have served
  parallel(a.blocks(), kBlock,
           [&](int64_t begin, int64_t end) { cpu_kernels().robust_apply(a, outcome, sums, begin, end); });
  double total = 0;
  for (int64_t b = 0; b < a.blocks(); ++b) total += sums[b];
  *loss = total;
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

  Rows(const Tensor& like, int64_t count, Dtype real)
      : tensor(empty(like, real)), bytes(size_t(count) * size_of(real)), data(static_cast<char*>(tensor.data_ptr())) {}
  char* row(int k) const { return data + size_t(k) * bytes; }

  void fill(const RobustArgs& a) const {
    if (a.count == 0) return;
    std::memcpy(row(0), a.losses, bytes);
    for (int64_t i = 0; i < a.count; ++i) {
      const bool valid = a.valid == nullptr || a.valid[i] != 0;
      if (a.dtype == Dtype::f64)
        reinterpret_cast<double*>(row(2))[i] = valid;
      else
        reinterpret_cast<float*>(row(2))[i] = valid;
    }
  }

 private:
  static Tensor empty(const Tensor& like, Dtype real) {
    int64_t shape[16] = {3};
    STD_TORCH_CHECK(like.dim() < 16, "at most 15 dimensions");
    const auto sizes = like.sizes();
    for (int64_t d = 0; d < like.dim(); ++d) shape[d + 1] = sizes[d];
    return empty_cpu(shape, like.dim() + 1, real);
  }
};

std::tuple<Tensor, Tensor, Tensor> robust_logit_loss(const Tensor& logits, const Tensor& target,
                                                     const std::optional<Tensor>& class_weight, double label_smoothing,
                                                     int64_t ignore_index, const std::optional<Tensor>& score,
                                                     const std::optional<Tensor>& sample_weight,
                                                     const std::optional<Tensor>& mask, const Tensor& log_s,
                                                     const Tensor& nonfinite, const Tensor& lam, double gamma,
                                                     double alpha, double mix, double max_weight, int64_t flags) {
  Logits rows(logits, target, class_weight, label_smoothing, ignore_index, mask);
  const int64_t count = rows.args.rows();
  const Scalar state(log_s, "log_s");
  RobustArgs a = robust_args(rows.real(), count, state, lam, gamma, alpha, flags);
  a.mix = mix;
  a.max_weight = max_weight;
  a.scores = per_row(score, count, code_of(a.dtype), "score");
  a.sample_weight = per_row(sample_weight, count, code_of(a.dtype), "sample_weight");
  Tensor grad = rows.make_grad((flags & kWithGrad) != 0);
  rows.stats();  // raises on a bad label, before anything is written

  const Rows out(rows.target, count, a.dtype);
  a.losses = rows.args.losses;
  a.valid = rows.args.valid;
  a.weights = out.row(1);
  a.factor = rows.factor;
  double value;
  const Outcome outcome = run_robust(a, state.get(), &value);
  out.fill(a);
  Tensor loss = empty_scalar(a.dtype);
  Scalar(loss, "loss").set(value);
  rows.grads(rows.factor);
  commit(outcome, flags, state, nonfinite);
  return {loss, out.tensor, grad};
}

std::tuple<Tensor, Tensor, Tensor> robust_loss(const Tensor& losses, const std::optional<Tensor>& score,
                                               const std::optional<Tensor>& sample_weight,
                                               const std::optional<Tensor>& mask, const Tensor& log_s,
                                               const Tensor& nonfinite, const Tensor& lam, double gamma, double alpha,
                                               double mix, double max_weight, int64_t flags) {
  const Dtype real = dtype_of(losses);
  const int64_t count = losses.numel();
  const Scalar state(log_s, "log_s");
  RobustArgs a = robust_args(real, count, state, lam, gamma, alpha, flags);
  a.mix = mix;
  a.max_weight = max_weight;
  a.losses = per_row(losses, count, code_of(real_of(real)), "losses");
  a.scores = per_row(score, count, code_of(real), "score");
  a.sample_weight = per_row(sample_weight, count, code_of(real), "sample_weight");
  a.valid = per_row_mask(mask, count);
  const Rows out(losses, count, real);
  Tensor loss = empty_scalar(real);
  Tensor grad = (flags & kWithGrad) != 0 ? empty_cpu(losses.sizes().data(), losses.dim(), real) : empty_none(real);
  a.weights = out.row(1);
  a.factor = (flags & kWithGrad) != 0 ? grad.data_ptr() : nullptr;
  double value;
  const Outcome outcome = run_robust(a, state.get(), &value);
  out.fill(a);
  Scalar(loss, "loss").set(value);
  commit(outcome, flags, state, nonfinite);
  return {loss, out.tensor, grad};
}

std::tuple<Tensor, Tensor, Tensor> robust_weights(const Tensor& losses, const Tensor& log_s, const Tensor& lam,
                                                  const std::optional<Tensor>& mask, double gamma, double alpha,
                                                  int64_t flags) {
  const Dtype real = dtype_of(losses);
  const int64_t count = losses.numel(), two = 2;
  const Scalar state(log_s, "log_s");
  RobustArgs a = robust_args(real, count, state, lam, gamma, alpha, flags);
  a.losses = per_row(losses, count, code_of(real_of(real)), "losses");
  a.valid = per_row_mask(mask, count);
  Tensor weights = empty_cpu(losses.sizes().data(), losses.dim(), real);
  a.weights = weights.data_ptr();
  double value;
  const Outcome outcome = run_robust(a, state.get(), &value);
  Tensor new_log_s = empty_scalar(state.is_double ? Dtype::f64 : Dtype::f32), shares = empty_cpu(&two, 1, Dtype::f64);
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
  g.upstream = per_row(grad_weights, a.count, code_of(a.dtype), "grad_weights");
  g.upstream_log_s = Scalar(grad_log_s, "grad_log_s").get();
  g.share = static_cast<const double*>(shares.data_ptr())[0];
  g.share_state = static_cast<const double*>(shares.data_ptr())[1];
  Tensor out = empty_cpu(weights.sizes().data(), weights.dim(), a.dtype);
  g.out = out.data_ptr();
  std::vector<double> dots(size_t(a.blocks()));
  parallel(a.blocks(), kBlock,
           [&](int64_t begin, int64_t end) { cpu_kernels().robust_dot(a, g.upstream, dots.data(), begin, end); });
  for (double dot : dots) g.dot += dot;
  parallel(a.blocks(), kBlock, [&](int64_t begin, int64_t end) { cpu_kernels().robust_vjp(a, g, begin, end); });
  return out;
}

// ---- gradient scaling ----------------------------------------------------------------------------------------------

void run_scale(const Tensor& source, const Tensor& out, const Tensor& upstream_in) {
  ScaleArgs a{};
  a.dtype = dtype_of(out);
  STD_TORCH_CHECK(dtype_of(source) == made_as(a.dtype), "scale: expected the gradient as the forward pass made it");
  a.source = source.data_ptr();
  a.grad = out.data_ptr();
  Tensor upstream = upstream_in;
  STD_TORCH_CHECK(source.is_contiguous() && upstream.is_cpu() && code_of(upstream) == code_of(real_of(a.dtype)),
                  "scale: expected a contiguous gradient and an upstream gradient of the losses' dtype");
  bool constant = true;  // a 0-d tensor, or one value expanded (the gradient of a mean)
  for (int64_t stride : upstream.strides()) constant = constant && stride == 0;
  if (out.numel() == 0) return;
  if (constant) {
    const void* value = upstream.data_ptr();
    a.scalar = a.dtype == Dtype::f64 ? *static_cast<const double*>(value) : double(*static_cast<const float*>(value));
    if (a.scalar == 1.0 && a.source == a.grad) return;  // loss.backward(): the gradient is already there
    // slices of a fixed size; the last one may be short, so it is walked by itself
    constexpr int64_t kSlice = 4096;
    a.batch = a.classes = 1;
    a.inner = kSlice;
    const int64_t whole = out.numel() / kSlice;
    parallel(whole, kSlice, [&](int64_t begin, int64_t end) { cpu_kernels().scale(a, begin, end); });
    const size_t done = size_t(whole * kSlice);
    a.inner = out.numel() - whole * kSlice;
    a.source = static_cast<const char*>(a.source) + done * size_of(made_as(a.dtype));
    a.grad = static_cast<char*>(a.grad) + done * size_of(a.dtype);
    if (a.inner > 0) cpu_kernels().scale(a, 0, 1);
    return;
  }
  if (!upstream.is_contiguous()) upstream = torch::stable::contiguous(upstream);
  a.upstream = upstream.data_ptr();
  const bool vector = out.dim() == upstream.dim();  // a vector of losses: one factor per element
  a.batch = vector ? 1 : out.size(0);
  a.classes = vector ? 1 : out.size(1);
  a.inner = out.numel() / (a.batch * a.classes);
  STD_TORCH_CHECK(upstream.numel() == a.batch * a.inner, "scale: expected one factor per row");
  parallel(a.batch * a.classes, a.inner, [&](int64_t begin, int64_t end) { cpu_kernels().scale(a, begin, end); });
}

Tensor scale(const Tensor& grad, const Tensor& upstream, bool to_half) {
  const Dtype dtype = to_half ? Dtype::f16 : dtype_of(grad);
  Tensor out = empty_cpu(grad.sizes().data(), grad.dim(), dtype);
  prefer_huge_pages(out.data_ptr(), size_t(out.numel()) * size_of(dtype));
  run_scale(grad, out, upstream);
  return out;
}
void scale_(const Tensor& grad, const Tensor& upstream) { run_scale(grad, grad, upstream); }

// ---- momentum step -------------------------------------------------------------------------------------------------

// Whether two of the tensors that a step writes share memory (a parameter listed twice, `a.data = b.data`): then the
// tensors must be updated one after the other.
bool step_overlaps(const StepTensor* tensors, int64_t count) {
  struct Range {
    const char *begin, *end;
  };
  std::vector<Range> ranges;
  ranges.reserve(size_t(2 * count));
  for (int64_t j = 0; j < count; ++j) {
    const int64_t bytes = tensors[j].count * (tensors[j].dtype == Dtype::f64 ? 8 : 4);
    for (void* start : {tensors[j].param, tensors[j].buffer})
      if (start != nullptr && bytes > 0)
        ranges.push_back({static_cast<char*>(start), static_cast<char*>(start) + bytes});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t j = 1; j < ranges.size(); ++j)
    if (ranges[j].begin < ranges[j - 1].end) return true;
  return false;
}

void run_step(StepTable& table) {
  if (!table.checked) {
    table.overlap = step_overlaps(table.tensors, table.tensor_count);
    table.checked = true;
  }
  if (!table.overlap) {
    parallel(table.elements, 1, [&](int64_t begin, int64_t end) { cpu_kernels().sgd_step(table, begin, end); });
    return;
  }
  for (int64_t j = 0; j < table.tensor_count; ++j)
    cpu_kernels().sgd_step(table, table.tensors[j].begin, table.tensors[j].begin + table.tensors[j].count);
}

// The table lies in the tensor's memory, where StepPlan (host.cpp) wrote it a moment ago.
void sgd_planned_step(const Tensor& table) {
  STD_TORCH_CHECK(table.is_contiguous() && table.scalar_type() == ScalarType::Long &&
                      size_t(table.numel()) * sizeof(int64_t) >= sizeof(StepTable),
                  "sgd_planned_step: expected the table of a StepPlan");
  run_step(*static_cast<StepTable*>(table.data_ptr()));
}

Layout layout_of(const Tensor& t) { return {t.dim(), t.sizes().data(), t.strides().data()}; }

// A tensor as the kernels want it: in the layout of `like`, which is dense. A copy where it is not, given back by
// `restore`.
struct Fitted {
  Tensor original, fitted;

  Fitted(const Tensor& t, const Tensor& like) : original(t), fitted(t) {
    STD_TORCH_CHECK(
        t.is_cpu() && t.scalar_type() == like.scalar_type() && t.dim() == like.dim() &&
            (t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double),
        "sgd_step_: expected parameters, gradients and momentum buffers of equal shapes, on the CPU, all float32 "
        "or all float64");
    for (int64_t d = 0; d < t.dim(); ++d)
      STD_TORCH_CHECK(t.size(d) == like.size(d),
                      "sgd_step_: a gradient or momentum buffer has another shape than its parameter");
    if (layout_of(t).same(layout_of(like)) && layout_of(t).dense()) return;
    fitted = torch::stable::empty_like(like);
    torch::stable::copy_(fitted, original);
  }
  void restore() {
    if (fitted.data_ptr() != original.data_ptr()) torch::stable::copy_(original, fitted);
  }
};

void sgd_step_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
               const std::vector<Tensor>& momentum_buffers, double lr, double momentum, double dampening,
               double weight_decay, bool nesterov, bool maximize, bool heavy_ball) {
  STD_TORCH_CHECK(grads.size() == params.size() && momentum_buffers.size() == (momentum != 0 ? params.size() : 0),
                  "sgd_step_: expected one gradient and, with momentum, one momentum buffer for each parameter");
  const StepGroup group{lr, momentum, dampening, weight_decay, nesterov, maximize, heavy_ball};
  std::vector<Fitted> written, read;
  std::vector<StepTensor> tensors;
  StepTable table{0, int64_t(params.size()), nullptr, &group, false, false};
  for (size_t j = 0; j < params.size(); ++j) {
    const Tensor param = written.emplace_back(params[j], params[j]).fitted;
    void* buffer = momentum != 0 ? written.emplace_back(momentum_buffers[j], param).fitted.data_ptr() : nullptr;
    const void* grad = read.emplace_back(grads[j], param).fitted.data_ptr();
    tensors.push_back({param.data_ptr(), grad, buffer, table.elements, param.numel(), 0, dtype_of(param)});
    table.elements += tensors.back().count;
  }
  table.tensors = tensors.data();
  run_step(table);
  for (Fitted& t : written) t.restore();
}

// ---- the instruction set, and what these signatures are ------------------------------------------------------------

std::string isas() {
  std::string out = cpu_kernels().isa;
  for (int j = 0; j < cpu_isa_count(); ++j) out += std::string(",") + cpu_isa_name(j);
  return out;
}
bool use_isa(std::string name) { return use_cpu_isa(name.c_str()); }

// The stable ABI does not compare a C++ signature with its schema (an int read as a double is silently 0), so a test
// does, from the types written here by the compiler.
template <class T>
struct Name;
#define ABSGD_TYPE_NAME(type, text)           \
  template <>                                 \
  struct Name<type> {                         \
    static std::string get() { return text; } \
  }
ABSGD_TYPE_NAME(Tensor, "Tensor");
ABSGD_TYPE_NAME(std::optional<Tensor>, "Tensor?");
ABSGD_TYPE_NAME(std::vector<Tensor>, "Tensor[]");
ABSGD_TYPE_NAME(double, "float");
ABSGD_TYPE_NAME(int64_t, "int");
ABSGD_TYPE_NAME(bool, "bool");
ABSGD_TYPE_NAME(std::string, "str");
ABSGD_TYPE_NAME(void, "");
template <class... T>
struct Name<std::tuple<T...>> {
  static std::string get() {
    std::string out;
    ((out += (out.empty() ? "" : ", ") + Name<T>::get()), ...);
    return out;
  }
};
template <class R, class... A>
std::string signature(R (*)(A...)) {
  return Name<std::tuple<std::decay_t<A>...>>::get() + " -> " + Name<R>::get();
}

std::string native_signatures();

#define ABSGD_OPS(OP)         \
  OP(logit_loss)              \
  OP(robust_logit_loss)       \
  OP(robust_loss)             \
  OP(robust_weights)          \
  OP(robust_weights_backward) \
  OP(scale)                   \
  OP(scale_)                  \
  OP(sgd_planned_step)        \
  OP(sgd_step_)
#define ABSGD_TOOLS(OP) \
  OP(isas)              \
  OP(use_isa)           \
  OP(native_signatures)

std::string native_signatures() {
  std::string out;
#define ABSGD_LINE(op) out += std::string(#op ": ") + signature(op) + "\n";
  ABSGD_OPS(ABSGD_LINE)
  ABSGD_TOOLS(ABSGD_LINE)
#undef ABSGD_LINE
  return out;
}

}  // namespace

#define ABSGD_IMPL(op) m.impl(#op, TORCH_BOX(&op));
STABLE_TORCH_LIBRARY_IMPL(absgd_fast, CPU, m){
    ABSGD_OPS(ABSGD_IMPL)} STABLE_TORCH_LIBRARY_IMPL(absgd_fast, CompositeExplicitAutograd, m) {
  ABSGD_TOOLS(ABSGD_IMPL)
}
