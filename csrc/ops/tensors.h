// Tensors on LibTorch's stable ABI: their dtypes and devices, empty tensors, and tensors of one number.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../launch.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in the headers of torch 2.10
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace absgd;

// ---- tensors -------------------------------------------------------------------------------------------------------

// torch's dtype codes, read once, because Tensor::scalar_type() asks for up to a dozen of them on every call (30 ns).
const int32_t kFloat = aoti_torch_dtype_float32(), kDouble = aoti_torch_dtype_float64();
const int32_t kBFloat16 = aoti_torch_dtype_bfloat16(), kHalf = aoti_torch_dtype_float16();
const int32_t kLong = aoti_torch_dtype_int64(), kInt = aoti_torch_dtype_int32(), kBool = aoti_torch_dtype_bool();
const int32_t kCpu = aoti_torch_device_type_cpu();

inline int32_t code_of(const Tensor& t) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

inline Dtype dtype_of(const Tensor& t) {
  const int32_t code = code_of(t);
  if (code == kFloat) return Dtype::f32;
  if (code == kDouble) return Dtype::f64;
  if (code == kBFloat16) return Dtype::bf16;
  STD_TORCH_CHECK(code == kHalf, "got a tensor of another dtype, expected float32, float64, bfloat16 or float16");
  return Dtype::f16;
}

inline int32_t code_of(Dtype dtype) {
  return dtype == Dtype::f32 ? kFloat : dtype == Dtype::f64 ? kDouble : dtype == Dtype::bf16 ? kBFloat16 : kHalf;
}
// The type in which the losses and sums of tensors of this type are computed.
inline Dtype real_of(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
// The type in which a gradient that the forward pass makes is stored. It is not float16: before backward multiplies the
// gradient by GradScaler's loss scale, small numbers would already be 0.
inline Dtype saved_as(Dtype dtype) { return dtype == Dtype::f16 ? Dtype::f32 : dtype; }
inline size_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

struct Device {
  int32_t type, index;
};
inline Device device_of(const Tensor& t) {
  Device out{kCpu, 0};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &out.type));
  if (out.type != kCpu) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &out.index));
  return out;
}
inline bool is_on(const Tensor& t, Device device) {
  const Device here = device_of(t);
  return here.type == device.type && here.index == device.index;
}

inline Tensor empty_on(Device device, const int64_t* sizes, int64_t dim, Dtype dtype) {
  int64_t strides[16] = {};
  STD_TORCH_CHECK(dim <= 16, "got a tensor of more than 16 dimensions, expected at most 16");
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
inline Tensor empty_scalar(Device device, Dtype dtype) { return empty_on(device, nullptr, 0, dtype); }
inline Tensor empty_none(Device device, Dtype dtype) {
  const int64_t zero = 0;
  return empty_on(device, &zero, 1, dtype);
}
// An empty tensor of `count` values for every value of `like`: (count, ...)
inline Tensor empty_rows(Device device, int64_t count, const Tensor& like, Dtype dtype) {
  int64_t shape[16] = {count};
  STD_TORCH_CHECK(like.dim() < 16, "got a tensor of more than 15 dimensions, expected at most 15");
  const auto sizes = like.sizes();
  for (int64_t d = 0; d < like.dim(); ++d) shape[d + 1] = sizes[d];
  return empty_on(device, shape, like.dim() + 1, dtype);
}

// An empty tensor in the memory layout of `like` if that is dense, otherwise a contiguous one.
inline Tensor empty_dense_like(const Tensor& like, Dtype dtype) {
  const Device device = device_of(like);
  if (!Layout{like.dim(), like.sizes().data(), like.strides().data()}.dense())
    return empty_on(device, like.sizes().data(), like.dim(), dtype);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(like.dim(), like.sizes().data(), like.strides().data(),
                                                         code_of(dtype), device.type, device.index, &handle));
  return Tensor(handle);
}

// The number in a tensor of one element.
inline DeviceNumber number_on(const Device& device, const Tensor& t, const char* name) {
  const int32_t code = code_of(t);
  STD_TORCH_CHECK((code == kDouble || code == kFloat) && t.numel() == 1 && is_on(t, device), name,
                  ": expected one float32 or float64 number on the device of the other tensors");
  return {t.data_ptr(), code == kDouble, device.index};
}

// The data of a tensor of one number per row.
inline const void* per_row(const std::optional<Tensor>& t, Device device, int64_t rows, int32_t code,
                           const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(
      is_on(*t, device) && t->numel() == rows && t->is_contiguous() && code_of(*t) == code, name,
      ": expected a contiguous tensor on the device of the losses, with one value per sample, of the dtype they are "
      "computed in");
  return t->data_ptr();
}
inline const uint8_t* per_row_mask(const std::optional<Tensor>& t, Device device, int64_t rows) {
  return static_cast<const uint8_t*>(per_row(t, device, rows, kBool, "mask"));
}

}  // namespace
