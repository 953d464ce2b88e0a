// What StepPlan (host.cpp) asks of every tensor in every step, without the checks of Python's ways.
#pragma once

#include <torch/csrc/autograd/variable.h>

#include "../host/tensor_access.h"
#include "python.h"

namespace {

const DLPackExchangeAPI* torchs_table = nullptr;

// Returns false for a dtype that StepPlan does not read.
bool read_dtype(at::ScalarType type, DLTensor* out) {
  const auto set = [&](uint8_t code, uint8_t bits) {
    out->dtype = {code, bits, 1};
    return true;
  };
  switch (type) {
    case at::kFloat:
      return set(kDLFloat, 32);
    case at::kDouble:
      return set(kDLFloat, 64);
    case at::kHalf:
      return set(kDLFloat, 16);
    case at::kBFloat16:
      return set(kDLBfloat, 16);
    default:
      return false;
  }
}

int describe(void* object, DLTensor* out) {
  const at::Tensor& t = THPVariable_Unpack(static_cast<PyObject*>(object));
  if (!are_among(t.key_set(), plain_keys) || !read_dtype(t.scalar_type(), out))
    return torchs_table->dltensor_from_py_object(object, out);
  out->data = t.data_ptr();
  out->device = {kDLCPU, 0};
  out->ndim = int32_t(t.dim());
  out->shape = const_cast<int64_t*>(t.sizes().data());
  out->strides = const_cast<int64_t*>(t.strides().data());
  out->byte_offset = 0;
  return 0;
}

PyObject* gradient(PyObject* object) { return THPVariable_Wrap(THPVariable_Unpack(object).mutable_grad()); }

const TensorAccess kAccess{describe, gradient};

}  // namespace
