// The CPU operators of the losses on logits.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "../losses.h"
#include "threads.h"

namespace {

constexpr size_t kCacheBytes = size_t(8) << 20, kScratchBytes = size_t(1) << 20;

template <class T>
int form_of(const T* s, int64_t classes) {
  const T* d = s + classes;
  int form = kAdjusts;
  if (!std::all_of(s, s + classes, [&](T x) { return x == s[0]; })) form |= kScales;
  if (!std::all_of(d, d + classes, [](T x) { return x == 0; })) form |= kShifts;
  return form;
}

// The input of the kernels, and the memory that they need per row.
struct Logits {
  LogitArgs args{};
  LogitTensors tensors;
  std::unique_ptr<char[]> scratch, kept, paired;

  explicit Logits(const LogitOperands& given) : tensors(args, given) {
    const size_t padded = size_t(args.tiles()) * kTileRows, size = size_of(real());
    scratch.reset(new char[padded * (7 * size + 1)]);
    auto take = [&, at = scratch.get()](size_t bytes) mutable { return std::exchange(at, at + bytes); };
    args.losses = take(padded * size);
    args.row_max = take(padded * size);
    args.row_sumexp_others = take(padded * size);
    args.row_exp_target = take(padded * size);
    args.coefficient = take(padded * size);
    args.row_weight_total = take(padded * size);
    factor = take(padded * size);
    args.valid = reinterpret_cast<uint8_t*>(take(padded));
    if (args.adjust != nullptr)
      args.adjust_form = real() == Dtype::f64 ? form_of(static_cast<const double*>(args.adjust), args.classes)
                                              : form_of(static_cast<const float*>(args.adjust), args.classes);
    if (args.needs_paired()) {
      paired.reset(new char[size_t(cpu_kernels().paired_bytes(args))]);
      args.paired = paired.get();
      cpu_kernels().adjust_in_pairs(args);
    }
  }

  void* factor;  // (rows) real; the caller fills it
  Dtype real() const { return real_of(args.dtype); }

  void stats() {
    each_tiles([&](int64_t begin, int64_t end) { return cpu_kernels().logit_stats(args, begin, end); });
  }
  // The losses and the gradient of each row's own loss. Without weights between them, the gradient of a tile is made
  // while its logits are in the cache.
  void stats_and_grads() {
    if (args.grad == nullptr) return stats();
    each_tiles([&](int64_t begin, int64_t end) {
      int64_t out_of_range = kAllLabelsInRange;
      for (int64_t tile = begin; tile < end; ++tile) {
        out_of_range = std::min(out_of_range, cpu_kernels().logit_stats(args, tile, tile + 1));
        cpu_kernels().logit_grads(args, tile, tile + 1);
      }
      return out_of_range;
    });
  }

  // Makes the result for the statistics of the rows; called after stats().
  Tensor make_gradient_stats() {
    Tensor stats = tensors.per_row_results(4, real());
    args.stats = stats.data_ptr();
    parallel(args.tiles(), kTileRows,
             [&](int64_t begin, int64_t end) { cpu_kernels().gradient_stats(args, begin, end); });
    return stats;
  }

  // Makes the result for the gradient; called before stats(). The exponentials of the forward pass are kept in it as
  // long as that saves time (512 x 1000 fp32: 0.35 -> 0.25 ns per element). It costs time if the gradient leaves the
  // cache in between: at 512 x 8142 (17 MB) 1.6 ms, where computing them twice takes 1.1 ms.
  Tensor make_grad(bool wanted) {
    const Dtype stored = saved_as(args.dtype);
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

  // Writes the gradient over the logits: every element is read once more just before it is written.
  void grad_in_place(const char* name) {
    STD_TORCH_CHECK(tensors.logits.is_contiguous() && saved_as(args.dtype) == args.dtype, name,
                    ": expected contiguous logits that are not float16");
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
  // Calls walk(begin, end) for all tiles; it returns the first row whose label is out of range.
  template <class F>
  void each_tiles(const F& walk) {
    std::vector<int64_t> out_of_range(size_t(args.tiles()), kAllLabelsInRange);
    parallel(args.tiles(), kTileRows * args.classes,
             [&](int64_t begin, int64_t end) { out_of_range[size_t(begin)] = walk(begin, end); });
    for (int64_t row : out_of_range)
      if (row != kAllLabelsInRange) {
        const long long label = args.target_int64 ? static_cast<const int64_t*>(args.target)[row]
                                                  : static_cast<const int32_t*>(args.target)[row];
        raise_bad_label(label, row, args.classes, "");
      }
  }
};

std::tuple<Tensor, Tensor, Tensor> logit_loss(const Tensor& logits, const Tensor& target,
                                              const std::optional<Tensor>& class_weight,
                                              const std::optional<Tensor>& adjust, double hyper_a, double hyper_b,
                                              int64_t ignore_index, int64_t flags) {
  Logits rows(
      {logits, target, class_weight, adjust, loss_numbers(hyper_a, hyper_b, flags), ignore_index, std::nullopt});
  Tensor saved = rows.make_grad((flags & kWithGrad) != 0);
  rows.stats_and_grads();
  if ((flags & kWithStats) != 0) saved = rows.make_gradient_stats();
  return {rows.losses(), saved, rows.valid()};
}

// Writes the gradient over the logits, from the statistics that the forward pass has left.
void logit_loss_backward_(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& class_weight,
                          const std::optional<Tensor>& adjust, double smoothing, const Tensor& stats,
                          const Tensor& upstream_in) {
  // A label out of range may stand in a row that does not count, and ignore_index has done its work.
  Logits rows({logits, target, class_weight, adjust, loss_numbers(smoothing, 0, 0), INT64_MIN, std::nullopt});
  const int64_t count = rows.args.rows();
  const int32_t real = code_of(rows.real());
  STD_TORCH_CHECK(stats.is_contiguous() && is_on(stats, kHere) && stats.numel() == 4 * count &&
                      code_of(stats) == real && is_on(upstream_in, kHere) && upstream_in.numel() == count &&
                      code_of(upstream_in) == real,
                  "logit_loss_backward_: expected the statistics of the forward pass, and for each row an upstream "
                  "gradient in the dtype of the losses");
  const Tensor upstream = upstream_in.is_contiguous() ? upstream_in : torch::stable::contiguous(upstream_in);
  rows.args.stats = stats.data_ptr();
  rows.grad_in_place("logit_loss_backward_");
  rows.grads(upstream.data_ptr());
}

// If a label is out of range, some rows already hold gradients and others still hold logits.
std::tuple<Tensor, Tensor> logit_loss_(const Tensor& logits, const Tensor& target,
                                       const std::optional<Tensor>& class_weight, const std::optional<Tensor>& adjust,
                                       double hyper_a, double hyper_b, int64_t ignore_index, int64_t flags) {
  Logits rows(
      {logits, target, class_weight, adjust, loss_numbers(hyper_a, hyper_b, flags), ignore_index, std::nullopt});
  STD_TORCH_CHECK(logits.dim() == 2, "logit_loss_: expected contiguous logits (B, C) that are not float16");
  rows.grad_in_place("logit_loss_");
  rows.stats_and_grads();
  return {rows.losses(), rows.valid()};
}

}  // namespace
