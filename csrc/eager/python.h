// Tensors of Python, and what the eager module can serve: plain tensors, outside of every mode that wants to see each
// operator.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

namespace {

struct Gil {
  PyGILState_STATE state = PyGILState_Ensure();
  ~Gil() { PyGILState_Release(state); }
};

at::Tensor unpacked(PyObject* result) {
  if (result == nullptr) throw python_error();
  at::Tensor out = THPVariable_Unpack(result);
  Py_DECREF(result);
  return out;
}

c10::DispatchKeySet plain_keys, usual_keys;  // of a tensor, and of a thread outside of all modes

bool are_among(c10::DispatchKeySet keys, c10::DispatchKeySet all) { return (keys.raw_repr() & ~all.raw_repr()) == 0; }
bool no_mode() {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::impl::torch_function_mode_enabled() &&
         at::SavedTensorDefaultHooks::is_enabled() && !at::SavedTensorDefaultHooks::get_hooks(true) &&
         are_among(c10::impl::tls_local_dispatch_key_set().included_, usual_keys);
}
bool is_plain(PyObject* object) {
  return THPVariable_CheckExact(object) && are_among(THPVariable_Unpack(object).key_set(), plain_keys);
}

}  // namespace
