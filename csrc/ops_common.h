// What the operators of every device share, on LibTorch's stable ABI: how tensors become the structs of launch.h, and
// the signatures that are compared with the schemas. Included by ops_cpu.cpp and ops_cuda.cpp, each of which is a
// library of its own; these three are the only files that include torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

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

struct Device {
  int32_t type, index;
};
Device device_of(const Tensor& t) {
  Device out{kCpu, 0};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &out.type));
  if (out.type != kCpu) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &out.index));
  return out;
}
bool is_on(const Tensor& t, Device device) {
  const Device own = device_of(t);
  return own.type == device.type && own.index == device.index;
}

Tensor empty_on(Device device, const int64_t* sizes, int64_t dim, Dtype dtype) {
  int64_t strides[16] = {};
  STD_TORCH_CHECK(dim <= 16, "at most 16 dimensions");
  int64_t step = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, code_of(dtype), device.type, device.index, &handle));
  return Tensor(handle);
}
Tensor empty_scalar(Device device, Dtype dtype) { return empty_on(device, nullptr, 0, dtype); }
Tensor empty_none(Device device, Dtype dtype) {
  const int64_t zero = 0;
  return empty_on(device, &zero, 1, dtype);
}
// `count` values for every value of `like`: (count, ...)
Tensor empty_rows(Device device, int64_t count, const Tensor& like, Dtype dtype) {
  int64_t shape[16] = {count};
  STD_TORCH_CHECK(like.dim() < 16, "at most 15 dimensions");
  const auto sizes = like.sizes();
  for (int64_t d = 0; d < like.dim(); ++d) shape[d + 1] = sizes[d];
  return empty_on(device, shape, like.dim() + 1, dtype);
}

// In the memory layout of `like` where that is dense, else contiguous.
Tensor empty_dense_like(const Tensor& like, Dtype dtype) {
  const Device device = device_of(like);
  if (!Layout{like.dim(), like.sizes().data(), like.strides().data()}.dense())
    return empty_on(device, like.sizes().data(), like.dim(), dtype);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(like.dim(), like.sizes().data(), like.strides().data(),
                                                         code_of(dtype), device.type, device.index, &handle));
  return Tensor(handle);
}

// One number in a tensor.
DeviceNumber number_on(const Device& device, const Tensor& t, const char* name) {
  const int32_t code = code_of(t);
  STD_TORCH_CHECK((code == kDouble || code == kFloat) && t.numel() == 1 && is_on(t, device), name,
                  ": expected one float32 or float64 number on the device of the other tensors");
  return {t.data_ptr(), code == kDouble, device.index};
}

// A vector of one number per row, ready for the kernels.
const void* per_row(const std::optional<Tensor>& t, Device device, int64_t rows, int32_t code, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(
      is_on(*t, device) && t->numel() == rows && t->is_contiguous() && code_of(*t) == code, name,
      ": expected a contiguous tensor on the device of the losses, with one value per sample, of the dtype they are "
      "computed in");
  return t->data_ptr();
}
const uint8_t* per_row_mask(const std::optional<Tensor>& t, Device device, int64_t rows) {
  return static_cast<const uint8_t*>(per_row(t, device, rows, kBool, "mask"));
}

// ---- losses on logits ----------------------------------------------------------------------------------------------

// logits (B, C, d1, ...) as (batch, classes, inner) with strides; copies only where d1, ... have no common stride.
struct LogitTensors {
  Tensor logits, target;
  Device device;

  LogitTensors(LogitInput& args, const Tensor& logits_in, const Tensor& target_in,
               const std::optional<Tensor>& class_weight, const std::optional<Tensor>& adjust, const LossNumbers& loss,
               int64_t ignore_index, const std::optional<Tensor>& mask)
      : logits(logits_in), target(target_in), device(device_of(logits_in)) {
    STD_TORCH_CHECK(logits.dim() >= 2 && logits.dim() <= 16 && is_on(target, device),
                    "logits: expected a tensor (B, C, ...), and target on the same device");
    args.dtype = dtype_of(logits);
    if (!view(args)) {
      logits = torch::stable::contiguous(logits);
      view(args);
    }
    if (!target.is_contiguous()) target = torch::stable::contiguous(target);
    const int32_t label_type = code_of(target), real = code_of(real_of(args.dtype));
    const bool soft = label_type == real;
    bool fits = target.dim() == logits.dim() - (soft ? 0 : 1) && target.size(0) == args.batch;
    for (int64_t d = soft ? 1 : 2; fits && d < logits.dim(); ++d)
      fits = target.size(soft ? d : d - 1) == logits.size(d);
    STD_TORCH_CHECK(fits, "target: expected one label per row of logits, or probabilities of the logits' shape");
    args.target_int64 = label_type == kLong;
    STD_TORCH_CHECK(soft || args.target_int64 || label_type == kInt,
                    "target: expected int64 or int32 labels, or probabilities in the dtype losses are computed in");
    STD_TORCH_CHECK(!soft || loss.kind == Kind::ce, "target: probabilities are for cross-entropy");
    args.logits = logits.data_ptr();
    (soft ? args.soft : args.target) = target.data_ptr();
    args.ignore_index = ignore_index;
    args.loss = loss;
    args.share_keep = 1 - loss.smoothing();
    args.share_uniform = loss.smoothing() / double(args.classes);
    args.class_weight = per_row(class_weight, device, args.classes, real, "weight");
    args.adjust = per_row(adjust, device, 3 * args.classes, real, "scale, shift, margin");
    args.mask = per_row_mask(mask, device, args.rows());
  }

  // `count` numbers for every row: (count, B, ...)
  Tensor per_row_results(int64_t count, Dtype real, bool vector = false) const {
    int64_t shape[17] = {count, logits.size(0)};
    for (int64_t d = 2; d < logits.dim(); ++d) shape[d] = logits.size(d);
    return empty_on(device, shape + (vector ? 1 : 0), logits.dim() - (vector ? 1 : 0), real);
  }

 private:
  bool view(LogitInput& args) const {
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
};

[[noreturn]] void raise_bad_label(long long label, long long row, long long classes, const char* when) {
  // ops.py turns this into an IndexError
  STD_TORCH_CHECK(false, "absgd_fast label out of range: label=", label, " row=", row, " classes=", classes, when, ";");
  __builtin_unreachable();
}

// ---- robust weights ------------------------------------------------------------------------------------------------

// Bits of `flags`; ops.py has the same table.
enum Flags : int64_t { kNormalizer = 3, kInitFirst = 4, kUpdate = 8, kWithGrad = 16, kWithStats = 32, kPrune = 64 };
constexpr int kKindShift = 8;  // the bits above: math.h Kind

// The loss of an operator's arguments: kind and pruning are in the flags; see LossNumbers for the numbers. gce: second
// is k, or 0.
LossNumbers loss_numbers(double first, double second, int64_t flags) {
  LossNumbers out{Kind(flags >> kKindShift), first, second, 0, HUGE_VAL};
  if (out.kind == Kind::gce && second > 0) {
    out.cut = -std::expm1(first * std::log(second)) / first;
    if ((flags & kPrune) != 0) out.least = -std::log(second);
  }
  return out;
}

// The host's logarithms, in math.h's terms.
struct HostMath {
  static double log(double x) { return std::log(x); }
  static double log1p(double x) { return std::log1p(x); }
};

// Everything but lambda, which a GPU reads by itself.
void fill_robust(RobustArgs& a, Dtype dtype, int64_t count, bool state_is_double, double gamma, double alpha,
                 int64_t flags) {
  a.dtype = dtype;
  a.count = count;
  a.gamma = gamma;
  a.alpha = alpha;
  a.log_shares = LogShares::of<HostMath>(gamma, alpha);
  a.max_weight = HUGE_VAL;
  a.normalizer = Normalizer(flags & kNormalizer);
  a.init_first = (flags & kInitFirst) != 0;
  a.z_limit = dtype == Dtype::f64 && state_is_double ? DBL_MAX : FLT_MAX;
  a.z_top = HUGE_VAL;
}

// Doubles on the device of the losses: rows of totals, or one Settled.
const double* doubles_on(Device device, const Tensor& t, int64_t at_least, const char* name) {
  STD_TORCH_CHECK(is_on(t, device) && code_of(t) == kDouble && t.is_contiguous() && t.numel() >= at_least, name,
                  ": expected contiguous float64 numbers on the device of the losses, at least ", at_least);
  return static_cast<const double*>(t.data_ptr());
}
constexpr int64_t kTotals = sizeof(Totals) / sizeof(double), kSettled = sizeof(Settled) / sizeof(double);
constexpr int64_t kWeighing = sizeof(Weighing) / sizeof(double);
const Settled* settled_on(Device device, const Tensor& t) {
  return reinterpret_cast<const Settled*>(doubles_on(device, t, kSettled, "settled"));
}
Weighing* weighing_on(Device device, const Tensor& t) {
  return const_cast<Weighing*>(reinterpret_cast<const Weighing*>(doubles_on(device, t, kWeighing, "weighing")));
}
// (K, columns), of which the first three are Totals
const double* totals_on(Device device, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) >= kTotals, "totals: expected rows of at least three numbers");
  return doubles_on(device, t, 0, "totals");
}
const double* reference_on(Device device, const std::optional<Tensor>& t) {
  return t.has_value() ? doubles_on(device, *t, 1, "reference") : nullptr;
}

// ---- gradient scaling ----------------------------------------------------------------------------------------------

// out = source * upstream, as (batch, classes, inner); returns the upstream gradient in the form `a` points to.
// `constant`: it is one number (a 0-d tensor, or one value expanded, the gradient of a mean).
Tensor fill_scale(ScaleArgs& a, bool& constant, const Tensor& source, const Tensor& out, const Tensor& upstream_in) {
  a.dtype = dtype_of(out);
  STD_TORCH_CHECK(dtype_of(source) == made_as(a.dtype), "scale: expected the gradient as the forward pass made it");
  a.source = source.data_ptr();
  a.grad = out.data_ptr();
  Tensor upstream = upstream_in;
  STD_TORCH_CHECK(
      source.is_contiguous() && is_on(upstream, device_of(out)) && code_of(upstream) == code_of(real_of(a.dtype)),
      "scale: expected a contiguous gradient and an upstream gradient of the losses' dtype");
  constant = true;
  for (int64_t stride : upstream.strides()) constant = constant && stride == 0;
  a.batch = a.classes = 1;
  a.inner = out.numel();
  if (constant || out.numel() == 0) return upstream;
  if (!upstream.is_contiguous()) upstream = torch::stable::contiguous(upstream);
  a.upstream = upstream.data_ptr();
  const bool vector = out.dim() == upstream.dim();  // a vector of losses: one factor per element
  a.batch = vector ? 1 : out.size(0);
  a.classes = vector ? 1 : out.size(1);
  a.inner = out.numel() / (a.batch * a.classes);
  STD_TORCH_CHECK(upstream.numel() == a.batch * a.inner, "scale: expected one factor per row");
  return upstream;
}

// ---- step ----------------------------------------------------------------------------------------------------------

// Ranges of memory: whether one that is written shares a byte with another.
struct Ranges {
  struct Range {
    const char *begin, *end;
    bool written;
  };
  std::vector<Range> all;

  void add(const void* start, size_t bytes, bool written = true) {
    const char* const begin = static_cast<const char*>(start);
    if (start != nullptr && bytes > 0) all.push_back({begin, begin + bytes, written});
  }
  bool clash() {
    std::sort(all.begin(), all.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    const char *end = nullptr, *end_written = nullptr;
    for (const Range& r : all) {
      if (r.begin < (r.written ? end : end_written)) return true;
      end = std::max(end, r.end);
      if (r.written) end_written = std::max(end_written, r.end);
    }
    return false;
  }
};

// Whether two of the tensors that a step writes share memory (a parameter listed twice, `a.data = b.data`): then the
// tensors must be updated one after the other.
bool step_overlaps(const StepTensor* tensors, int64_t count) {
  Ranges ranges;
  ranges.all.reserve(size_t((2 + kStates) * count));
  for (int64_t j = 0; j < count; ++j) {
    const StepTensor& t = tensors[j];
    ranges.add(t.param, size_t(t.count) * size_of(t.dtype));
    for (const void* state : t.state) ranges.add(state, size_t(t.count) * size_of(real_of(t.dtype)));
    ranges.add(t.step.data, t.step.is_double ? sizeof(double) : sizeof(float));
  }
  return ranges.clash();
}
void check_overlap(StepTable& table) {
  if (table.checked) return;
  table.overlap = step_overlaps(table.tensors, table.tensor_count);
  table.checked = true;
}

Layout layout_of(const Tensor& t) { return {t.dim(), t.sizes().data(), t.strides().data()}; }

// A tensor as the kernels want it: in the layout of `like`, which is dense. A copy where it is not, given back by
// `restore`.
struct Fitted {
  Tensor original, fitted;

  Fitted(const Tensor& t, const Tensor& like, Dtype dtype) : original(t), fitted(t) {
    STD_TORCH_CHECK(is_on(t, device_of(like)) && code_of(t) == code_of(dtype) && t.dim() == like.dim(),
                    "step_: expected parameters and gradients of one dtype, and states of that (float32 for half "
                    "precision), of equal shapes, on one device");
    for (int64_t d = 0; d < t.dim(); ++d)
      STD_TORCH_CHECK(t.size(d) == like.size(d), "step_: a gradient or state has another shape than its parameter");
    if (layout_of(t).same(layout_of(like)) && layout_of(t).dense()) return;
    fitted = empty_dense_like(like, dtype);
    torch::stable::copy_(fitted, original);
  }
  void restore() {
    if (fitted.data_ptr() != original.data_ptr()) torch::stable::copy_(original, fitted);
  }
};

// The tensors of one step as a table; lives as long as the step.
struct StepLists {
  StepGroup group;
  StepTable table{};
  std::vector<Fitted> written, gradients;
  std::vector<StepTensor> tensors;

  // states: those that the rule keeps, of all parameters, one kind after the other; steps: where the rule counts them
  StepLists(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& states,
            const std::vector<Tensor>& steps, const StepGroup& options)
      : group(options) {
    const size_t n = params.size();
    size_t kinds = 0;
    for (int j = 0; j < kStates; ++j) kinds += size_t(group.states() >> j & 1);
    STD_TORCH_CHECK(grads.size() == n && states.size() == kinds * n && steps.size() == (group.counts() ? n : 0),
                    "step_: expected for each parameter one gradient, the states that the rule keeps and, where it "
                    "counts them, its steps");
    for (size_t i = 0; i < n; ++i) {
      const Dtype dtype = dtype_of(params[i]);
      StepTensor t{};
      const Tensor param = written.emplace_back(params[i], params[i], dtype).fitted;
      t.param = param.data_ptr();
      size_t from = i;
      for (int j = 0; j < kStates; ++j) {
        if ((group.states() >> j & 1) == 0) continue;
        t.state[j] = written.emplace_back(states[from], param, real_of(dtype)).fitted.data_ptr();
        from += n;
      }
      t.grad = gradients.emplace_back(grads[i], param, dtype).fitted.data_ptr();
      if (group.counts()) t.step = number_on(device_of(param), steps[i], "step");
      t.begin = table.elements;
      t.count = param.numel();
      t.dtype = dtype;
      tensors.push_back(t);
      table.elements += t.count;
    }
    table.tensor_count = int64_t(tensors.size());
    table.tensors = tensors.data();
    table.groups = &group;
  }
  // Gradients are written only where they were unscaled.
  void restore(bool with_gradients) {
    for (Fitted& t : written) t.restore();
    if (with_gradients)
      for (Fitted& t : gradients) t.restore();
  }
};

StepGroup step_group(double lr, double weight_decay, double first, double second, double eps, int64_t rule,
                     int64_t flags) {
  STD_TORCH_CHECK(rule >= 0 && rule <= int64_t(Rule::adagrad), "step_: unknown rule ", rule);
  StepGroup out{};
  out.rule = Rule(rule);
  out.flags = int(flags);
  out.lr = lr;
  out.weight_decay = weight_decay;
  out.first = first;
  out.second = second;
  out.eps = eps;
  return out;
}

// ---- weighted step -------------------------------------------------------------------------------------------------

// The tensors of one weighted step, checked; lives as long as the step.
struct WeightedLists {
  StepGroup group;
  WeightedTable table{};
  Dtype real;
  std::vector<Fitted> written;
  std::vector<Tensor> blocks;
  std::vector<StepTensor> tensors;
  std::vector<int64_t> row_strides;

  WeightedLists(const std::vector<Tensor>& params, const std::vector<Tensor>& buffers,
                const std::vector<Tensor>& blocks_in, const Tensor& losses, const StepGroup& options)
      : group(options), real(dtype_of(losses)) {
    const size_t n = params.size();
    const bool keeps = group.states() != 0;
    STD_TORCH_CHECK(
        blocks_in.size() == n && buffers.size() == (keeps ? n : 0),
        "weighted_step_: expected for each parameter one block of gradients and, with momentum, one buffer");
    STD_TORCH_CHECK(losses.dim() == 1 && real == real_of(real), "weighted_step_: expected losses (B,)");
    const Device device = device_of(losses);
    table.batch = losses.size(0);
    Ranges ranges;
    ranges.add(losses.data_ptr(), size_t(table.batch) * size_of(real), false);
    for (size_t i = 0; i < n; ++i) {
      const Tensor& given = params[i];
      const Dtype dtype = dtype_of(given);
      Tensor like = given, block = blocks_in[i];
      STD_TORCH_CHECK(is_on(given, device) && is_on(block, device) && code_of(block) == code_of(dtype) &&
                          real_of(dtype) == real && block.dim() == given.dim() + 1 && block.size(0) == table.batch,
                      "weighted_step_: expected parameters, gradients (B, ...) of their dtype and losses (B,) of the "
                      "dtype those are computed in, on one device");
      for (int64_t d = 0; d < given.dim(); ++d)
        STD_TORCH_CHECK(block.size(d + 1) == given.size(d),
                        "weighted_step_: expected gradients (B, ...) of the shape of a parameter");
      // A row of the block and the parameter lie alike, or both are contiguous; what is not is copied.
      if (!row_of(block).same(layout_of(given)) || !layout_of(given).dense()) {
        like = torch::stable::contiguous(given);
        if (!row_of(block).same(layout_of(like))) block = torch::stable::contiguous(block);
      }
      StepTensor t{};
      t.param = write(given, like, dtype, ranges);
      if (keeps) t.state[0] = write(buffers[i], like, real, ranges);
      t.grad = blocks.emplace_back(block).data_ptr();
      t.begin = table.elements;
      t.count = given.numel();
      t.dtype = dtype;
      const int64_t stride = block.stride(0);
      if (table.batch > 0) ranges.add(t.grad, size_t((table.batch - 1) * stride + t.count) * size_of(dtype), false);
      tensors.push_back(t);
      row_strides.push_back(stride);
      table.elements += t.count;
    }
    STD_TORCH_CHECK(!ranges.clash(),
                    "weighted_step_: a parameter or momentum buffer shares memory with another tensor");
    table.tensor_count = int64_t(n);
    table.tensors = tensors.data();
    table.row_stride = row_strides.data();
    table.groups = &group;
  }
  void restore() {
    for (Fitted& t : written) t.restore();
  }

 private:
  static Layout row_of(const Tensor& block) {
    return {block.dim() - 1, block.sizes().data() + 1, block.strides().data() + 1};
  }
  // `ranges` has the memory that is written in the end; of a tensor that is copied, where it begins.
  void* write(const Tensor& t, const Tensor& like, Dtype dtype, Ranges& ranges) {
    for (int64_t d = 0; d < t.dim(); ++d)
      STD_TORCH_CHECK(t.size(d) < 2 || t.strides()[size_t(d)] != 0,
                      "weighted_step_: several elements of a parameter or momentum buffer share one place in memory");
    ranges.add(t.data_ptr(), size_of(dtype) * size_t(layout_of(t).dense() ? t.numel() : t.numel() > 0));
    return written.emplace_back(t, like, dtype).fitted.data_ptr();
  }
};

StepGroup sgd_group(double lr, double weight_decay, double momentum, double dampening, int64_t flags) {
  return step_group(lr, weight_decay, momentum, dampening, 0, int64_t(Rule::sgd), flags);
}

// ---- the plan's table ----------------------------------------------------------------------------------------------

StepTable& planned_table(const Tensor& table) {
  STD_TORCH_CHECK(table.is_cpu() && table.is_contiguous() && table.scalar_type() == ScalarType::Long &&
                      size_t(table.numel()) * sizeof(int64_t) >= sizeof(StepTable),
                  "planned_step: expected the table of a StepPlan");
  return *static_cast<StepTable*>(table.data_ptr());
}

// ---- signatures ----------------------------------------------------------------------------------------------------

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

// OP applied to the operators that every device has
#define ABSGD_OPS(OP)         \
  OP(logit_loss)              \
  OP(logit_loss_)             \
  OP(robust_logit_loss)       \
  OP(robust_loss)             \
  OP(robust_totals)           \
  OP(robust_settle)           \
  OP(robust_apply)            \
  OP(robust_weights)          \
  OP(robust_weights_backward) \
  OP(rectified)               \
  OP(scale)                   \
  OP(scale_)                  \
  OP(planned_step)            \
  OP(step_)                   \
  OP(weighted_step_)
#define ABSGD_SIGNATURE_LINE(op) out += std::string(#op ": ") + signature(op) + "\n";
#define ABSGD_IMPL(op) m.impl(#op, TORCH_BOX(&op));

}  // namespace
