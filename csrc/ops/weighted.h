// What the operator of the weighted step does alike on every device.
#pragma once

#include <vector>

#include "step.h"

namespace {

// The tensors of one weighted step, after they were checked. It lives as long as the step.
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
    const bool has_momentum = group.states() != 0;
    STD_TORCH_CHECK(
        blocks_in.size() == n && buffers.size() == (has_momentum ? n : 0),
        "weighted_step_: expected for each parameter one block of gradients and, with momentum, one buffer");
    STD_TORCH_CHECK(losses.dim() == 1 && real == real_of(real),
                    "weighted_step_: expected losses (B,), float32 or float64");
    table.batch = losses.size(0);
    ranges.add(losses.data_ptr(), size_t(table.batch) * size_of(real), false);
    for (size_t i = 0; i < n; ++i) {
      check(params[i], blocks_in[i], device_of(losses));
      add(params[i], blocks_in[i], has_momentum ? &buffers[i] : nullptr);
    }
    STD_TORCH_CHECK(
        !ranges.clash(),
        "weighted_step_: got a parameter or momentum buffer that shares memory with another tensor, expected "
        "tensors of their own: clone() them");
    table.tensor_count = int64_t(n);
    table.tensors = tensors.data();
    table.row_stride = row_strides.data();
    table.groups = &group;
  }
  void restore() {
    for (Fitted& t : written) t.restore();
  }

 private:
  Ranges ranges;  // the memory that is read and written; of a tensor that is not dense, only its first element

  void check(const Tensor& param, const Tensor& block, Device device) const {
    const Dtype dtype = dtype_of(param);
    STD_TORCH_CHECK(is_on(param, device) && is_on(block, device) && code_of(block) == code_of(dtype) &&
                        real_of(dtype) == real && block.dim() == param.dim() + 1 && block.size(0) == table.batch,
                    "weighted_step_: expected parameters, gradients (B, ...) in their dtype and losses (B,) in float32 "
                    "(float64 for float64 parameters), all on one device");
    for (int64_t d = 0; d < param.dim(); ++d)
      STD_TORCH_CHECK(block.size(d + 1) == param.size(d),
                      "weighted_step_: expected gradients (B, ...) of the shape of a parameter");
  }
  void add(const Tensor& param, Tensor block, const Tensor* buffer) {
    // Each row of the block has the layout of the parameter, or both are contiguous; a copy makes them so.
    Tensor like = param;
    if (!row_of(block).same(layout_of(param)) || !layout_of(param).dense()) {
      like = torch::stable::contiguous(param);
      if (!row_of(block).same(layout_of(like))) block = torch::stable::contiguous(block);
    }
    StepTensor t{};
    t.dtype = dtype_of(param);
    t.param = write(param, like, t.dtype);
    if (buffer != nullptr) t.state[0] = write(*buffer, like, real);
    t.grad = blocks.emplace_back(block).data_ptr();
    t.begin = table.elements;
    t.count = param.numel();
    const int64_t stride = block.stride(0);
    if (table.batch > 0) ranges.add(t.grad, size_t((table.batch - 1) * stride + t.count) * size_of(t.dtype), false);
    tensors.push_back(t);
    row_strides.push_back(stride);
    table.elements += t.count;
  }
  static Layout row_of(const Tensor& block) {
    return {block.dim() - 1, block.sizes().data() + 1, block.strides().data() + 1};
  }
  void* write(const Tensor& t, const Tensor& like, Dtype dtype) {
    for (int64_t d = 0; d < t.dim(); ++d)
      STD_TORCH_CHECK(
          t.size(d) < 2 || t.strides()[size_t(d)] != 0,
          "weighted_step_: got a parameter or momentum buffer whose elements share one place in memory, expected "
          "a tensor of its own: clone() it");
    ranges.add(t.data_ptr(), size_of(dtype) * size_t(layout_of(t).dense() ? t.numel() : t.numel() > 0));
    return written.emplace_back(t, like, dtype).fitted.data_ptr();
  }
};

inline StepGroup sgd_group(double lr, double weight_decay, double momentum, double dampening, int64_t flags) {
  return step_group(lr, weight_decay, momentum, dampening, 0, int64_t(Rule::sgd), flags);
}

}  // namespace
