// What the operators of the robust weights and of the scaling of gradients do alike on every device.
#pragma once

#include <cfloat>
#include <cmath>
#include <utility>

#include "flags.h"
#include "tensors.h"

namespace {

// The host's logarithms, by the names that math.h uses.
struct HostMath {
  static double log(double x) { return std::log(x); }
  static double log1p(double x) { return std::log1p(x); }
};

// Fills in everything but lambda, which a GPU reads by itself.
inline void fill_robust(RobustArgs& a, Dtype dtype, int64_t count, bool state_is_double, double gamma, double alpha,
                        int64_t flags) {
  a.dtype = dtype;
  a.count = count;
  a.normalizer_kind = NormalizerKind(flags & kNormalizer);
  const bool target = a.normalizer_kind == NormalizerKind::target;
  a.target_share = target ? gamma : 0;  // no argument of its own, because each costs 0.1 us
  a.gamma = target ? 1 : gamma;
  a.alpha = alpha;
  a.log_rates = LogRates::of<HostMath>(a.gamma, alpha);
  a.max_weight = HUGE_VAL;
  a.init_first = (flags & kInitFirst) != 0;
  a.z_limit = dtype == Dtype::f64 && state_is_double ? DBL_MAX : FLT_MAX;
  a.z_max = HUGE_VAL;
}

// float64 numbers on the device of the losses: partial stats, or one Normalizer.
inline const double* doubles_on(Device device, const Tensor& t, int64_t at_least, const char* name) {
  STD_TORCH_CHECK(is_on(t, device) && code_of(t) == kDouble && t.is_contiguous() && t.numel() >= at_least, name,
                  ": expected at least ", at_least, " contiguous float64 numbers on the device of the losses");
  return static_cast<const double*>(t.data_ptr());
}
constexpr int64_t kPartialStatsSize = sizeof(PartialStats) / sizeof(double),
                  kNormalizerSize = sizeof(Normalizer) / sizeof(double);
constexpr int64_t kWeighingSize = sizeof(Weighing) / sizeof(double);
inline const Normalizer* normalizer_on(Device device, const Tensor& t) {
  return reinterpret_cast<const Normalizer*>(doubles_on(device, t, kNormalizerSize, "settled"));
}
inline Weighing* weighing_on(Device device, const Tensor& t) {
  return const_cast<Weighing*>(reinterpret_cast<const Weighing*>(doubles_on(device, t, kWeighingSize, "weighing")));
}
// A tensor (K, columns) whose first three columns are PartialStats.
inline const double* partials_on(Device device, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) >= kPartialStatsSize,
                  "partials: expected a matrix of at least three columns");
  return doubles_on(device, t, 0, "partials");
}
inline const double* reference_on(Device device, const std::optional<Tensor>& t) {
  return t.has_value() ? doubles_on(device, *t, 1, "reference") : nullptr;
}

// The arguments of an operator on a vector of losses.
struct LossOperands {
  const Tensor& losses;
  const std::optional<Tensor>&score, &sample_weight, &mask;
};

// The sample stats (3, ...) of a forward: losses, weights (or z, from which backward makes them), validity (0 or 1).
struct SampleStats {
  Tensor tensor;
  char* data;
  size_t bytes;  // of one of the three

  SampleStats(Tensor stats, Dtype real)
      : tensor(std::move(stats)),
        data(static_cast<char*>(tensor.data_ptr())),
        bytes(size_t(tensor.numel() / 3) * size_of(real)) {}
  char* losses() const { return data; }
  char* weights() const { return data + bytes; }
  char* valid() const { return data + 2 * bytes; }
};

// ---- gradient scaling ----------------------------------------------------------------------------------------------

// Prepares out = source * upstream as (batch, classes, inner), and returns the upstream gradient, to which `a` points.
// `constant` becomes true if that is one number: a 0-d tensor, or one value expanded (the gradient of a mean).
inline Tensor fill_scale(ScaleArgs& a, bool& constant, const Tensor& source, const Tensor& out,
                         const Tensor& upstream_in) {
  a.dtype = dtype_of(out);
  STD_TORCH_CHECK(dtype_of(source) == saved_as(a.dtype),
                  "scale: got a gradient of another dtype than the forward pass stores, expected that one");
  a.source = source.data_ptr();
  a.grad = out.data_ptr();
  Tensor upstream = upstream_in;
  STD_TORCH_CHECK(
      source.is_contiguous() && is_on(upstream, device_of(out)) && code_of(upstream) == code_of(real_of(a.dtype)),
      "scale: expected a contiguous gradient, and an upstream gradient in the dtype of the losses");
  constant = true;
  for (int64_t stride : upstream.strides()) constant = constant && stride == 0;
  a.batch = a.classes = 1;
  a.inner = out.numel();
  if (constant || out.numel() == 0) return upstream;
  if (!upstream.is_contiguous()) upstream = torch::stable::contiguous(upstream);
  a.upstream = upstream.data_ptr();
  const bool vector = out.dim() == upstream.dim();  // of a vector of losses: one factor per element
  a.batch = vector ? 1 : out.size(0);
  a.classes = vector ? 1 : out.size(1);
  a.inner = out.numel() / (a.batch * a.classes);
  STD_TORCH_CHECK(upstream.numel() == a.batch * a.inner, "scale: expected one number of the upstream gradient per row");
  return upstream;
}

}  // namespace
