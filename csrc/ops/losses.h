// What the operators of the losses on logits do alike on every device.
#pragma once

#include <cmath>

#include "flags.h"
#include "tensors.h"

namespace {

// The numbers of a loss, from an operator's arguments. The flags hold its kind and whether it prunes. For gce hyper_b
// is k, or 0 without k.
inline LossNumbers loss_numbers(double hyper_a, double hyper_b, int64_t flags) {
  LossNumbers out{Kind(flags >> kKindShift), hyper_a, hyper_b, 0, HUGE_VAL};
  if (out.kind == Kind::gce && hyper_b > 0) {
    out.cut = -std::expm1(hyper_a * std::log(hyper_b)) / hyper_a;
    if ((flags & kPrune) != 0) out.least = -std::log(hyper_b);
  }
  return out;
}

// The arguments of an operator on logits.
struct LogitOperands {
  const Tensor &logits, &target;
  const std::optional<Tensor>&class_weight, &adjust;
  LossNumbers loss;
  int64_t ignore_index;
  const std::optional<Tensor>& mask;
};

// logits (B, C, d1, ...) as (batch, classes, inner) with strides. They are copied only if d1, ... have no common
// stride.
struct LogitTensors {
  Tensor logits, target;
  Device device;

  LogitTensors(LogitInput& args, const LogitOperands& given)
      : logits(given.logits), target(given.target), device(device_of(given.logits)) {
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
    STD_TORCH_CHECK(!soft || given.loss.kind == Kind::ce,
                    "target: got probabilities, expected labels: only cross-entropy takes probabilities");
    args.logits = logits.data_ptr();
    (soft ? args.soft : args.target) = target.data_ptr();
    args.ignore_index = given.ignore_index;
    args.loss = given.loss;
    args.smoothing_keep = 1 - given.loss.smoothing();
    args.smoothing_uniform = given.loss.smoothing() / double(args.classes);
    args.class_weight = per_row(given.class_weight, device, args.classes, real, "weight");
    args.adjust = per_row(given.adjust, device, 3 * args.classes, real, "scale, shift, margin");
    args.mask = per_row_mask(given.mask, device, args.rows());
  }

  // An empty result of `count` numbers for every row: (count, B, ...), or (B, ...) if `vector`.
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

[[noreturn]] inline void raise_bad_label(long long label, long long row, long long classes, const char* when) {
  // absgd_fast/ops/labels.py turns this into an IndexError.
  STD_TORCH_CHECK(false, "absgd_fast label out of range: label=", label, " row=", row, " classes=", classes, when, ";");
  __builtin_unreachable();
}

}  // namespace
