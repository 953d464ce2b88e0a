// How StepPlan looks at a tensor: through the DLPack exchange table, or through the eager module, which is faster.
#pragma once

#include "dlpack.h"

namespace {

constexpr const char* kTensorAccess = "absgd_fast.TensorAccess";  // the name of the capsule

struct TensorAccess {
  int (*describe)(void* tensor, DLTensor* out);  // as DLPackExchangeAPI::dltensor_from_py_object
  PyObject* (*gradient)(PyObject* tensor);       // as the attribute `grad` of a plain tensor
};

}  // namespace
