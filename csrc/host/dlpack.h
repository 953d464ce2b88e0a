// The DLPack exchange table, version 1 (dmlc/dlpack), a public C interface through which torch >= 2.10 describes a
// tensor. Here are only the declarations that the package uses.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

namespace {

namespace py = pybind11;

struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
constexpr int32_t kDLCPU = 1, kDLCUDA = 2;
constexpr uint8_t kDLFloat = 2, kDLBfloat = 4;

struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
    void* previous;
  } header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*dltensor_from_py_object)(void* py_object, DLTensor* out);  // valid while the tensor lives: it owns none
  void* current_work_stream;
};

const DLPackExchangeAPI* exchange_api(const py::object& tensor_type) {
  const py::capsule capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->header.major != 1 || api->dltensor_from_py_object == nullptr)
    throw py::value_error("got another version of the DLPack exchange table from this torch, expected version 1");
  return api;
}

}  // namespace
