// What torch's C++ classes make faster for plain tensors: the way of a batch on the CPU through autograd (the operator
// robust_logit_loss, the node of the graph, and its backward), and StepPlan's look at tensors. ops/autograd.py, torch's
// dispatcher and the DLPack exchange table do the same and serve wherever this module cannot. These classes change from
// version to version, so the module is built for the torch at hand and serves no other.
//
// docs/design-cpu.md, decision 51, has the measurements.
#include <ATen/record_function.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include "eager/access.h"
#include "eager/known_gradient.h"
#include "ops/cpu/weights.h"

namespace {
const absgd::CpuKernels& (*kernels_of_library)() = nullptr;  // of _ops_cpu.so
}  // namespace

namespace absgd {
const CpuKernels& cpu_kernels() { return kernels_of_library(); }
}  // namespace absgd

namespace {

torch::stable::Tensor stable(PyObject* object) {
  return torch::stable::Tensor(torch::aot_inductor::new_tensor_handle(at::Tensor(THPVariable_Unpack(object))));
}
std::optional<torch::stable::Tensor> stable_or_none(PyObject* object) {
  if (object == Py_None) return std::nullopt;
  return stable(object);
}
at::Tensor torchs(const torch::stable::Tensor& t) {
  return *torch::aot_inductor::tensor_handle_to_tensor_pointer(t.get());
}

// ---- functions for Python ------------------------------------------------------------------------------------------

// attach(x, value, grad, (recompute, recover)) -> value, or None where this node cannot serve
PyObject* attach(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4 && PyTuple_CheckExact(args[3]), "attach: expected x, value, grad, (recompute, recover)");
  if (!no_mode() || !is_plain(args[0]) || !is_plain(args[1]) || !is_plain(args[2])) Py_RETURN_NONE;
  const at::Tensor &x = THPVariable_Unpack(args[0]), &value = THPVariable_Unpack(args[1]);
  if (value.requires_grad() || value.is_view()) Py_RETURN_NONE;
  attach_to(x, value, THPVariable_Unpack(args[2]), at::Tensor(), args[3], PyTuple_GET_ITEM(args[3], 1) != Py_None);
  return Py_NewRef(args[1]);
  END_HANDLE_TH_ERRORS
}

enum Place : int {
  kLogits,
  kTarget,
  kClassWeight,
  kAdjust,
  kHyperA,
  kHyperB,
  kIgnoreIndex,
  kScore,
  kSampleWeight,
  kMask,
  kLogS,
  kNonfinite,
  kLam,
  kGamma,
  kAlpha,
  kMix,
  kMaxWeight,
  kFlags,
  kGiven,
  kPlaces
};

// robust_logit_loss(the arguments of the operator up to its flags, given) -> (loss with its graph, sample stats), or
// None where this way cannot serve. The graph recovers the logits.
PyObject* robust_logit_loss_attached(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == kPlaces, "robust_logit_loss: got ", count, " arguments, expected ", int(kPlaces));
  if (!no_mode()) Py_RETURN_NONE;
  for (const int place : {kLogits, kTarget, kLogS, kNonfinite, kLam})
    if (!is_plain(args[place])) Py_RETURN_NONE;
  for (const int place : {kClassWeight, kAdjust, kScore, kSampleWeight, kMask})
    if (args[place] != Py_None && !is_plain(args[place])) Py_RETURN_NONE;
  const at::Tensor& logits = THPVariable_Unpack(args[kLogits]);
  const double hyper_a = PyFloat_AsDouble(args[kHyperA]), hyper_b = PyFloat_AsDouble(args[kHyperB]);
  const double gamma = PyFloat_AsDouble(args[kGamma]), alpha = PyFloat_AsDouble(args[kAlpha]);
  const double mix = PyFloat_AsDouble(args[kMix]), max_weight = PyFloat_AsDouble(args[kMaxWeight]);
  const int64_t ignore_index = PyLong_AsLongLong(args[kIgnoreIndex]), flags = PyLong_AsLongLong(args[kFlags]);
  if (PyErr_Occurred()) return nullptr;
  at::Tensor loss, sample_stats;
  {
    RECORD_FUNCTION("absgd_fast::robust_logit_loss", c10::ArrayRef<const c10::IValue>{});
    const auto x = stable(args[kLogits]), y = stable(args[kTarget]);
    const auto log_s = stable(args[kLogS]), nonfinite = stable(args[kNonfinite]), lam = stable(args[kLam]);
    const auto class_weight = stable_or_none(args[kClassWeight]), adjust = stable_or_none(args[kAdjust]);
    const auto score = stable_or_none(args[kScore]), sample_weight = stable_or_none(args[kSampleWeight]);
    const auto mask = stable_or_none(args[kMask]);
    std::optional<py::gil_scoped_release> others_may_run;  // it costs 1 us, so not in a small batch
    if (logits.numel() > kSerialElements) others_may_run.emplace();
    const auto [value, stats, grad] =
        robust_logit_loss(x, y, class_weight, adjust, hyper_a, hyper_b, ignore_index, score, sample_weight, mask, log_s,
                          nonfinite, lam, gamma, alpha, mix, max_weight, flags, std::nullopt);
    others_may_run.reset();
    loss = torchs(value);
    sample_stats = torchs(stats);
    if ((flags & kWithGrad) != 0) attach_to(logits, loss, torchs(grad), sample_stats, args[kGiven], true);
  }
  THPObjectPtr first(THPVariable_Wrap(std::move(loss))), second(THPVariable_Wrap(std::move(sample_stats)));
  return first && second ? PyTuple_Pack(2, first.get(), second.get()) : nullptr;
  END_HANDLE_TH_ERRORS
}

// The same for a training forward that repeats the one before it (robust/repeat.py): None too if the gradient is not
// asked for, for targets that are no labels, and for dual numbers.
PyObject* repeat(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != kPlaces || !at::GradMode::is_enabled() || !is_plain(args[kLogits]) || !is_plain(args[kTarget]))
    Py_RETURN_NONE;
  const at::Tensor &logits = THPVariable_Unpack(args[kLogits]), &target = THPVariable_Unpack(args[kTarget]);
  if (!logits.requires_grad() || !at::isIntegralType(target.scalar_type(), false) || ag::isFwGradDefined(logits))
    Py_RETURN_NONE;
  return robust_logit_loss_attached(self, args, count);
  END_HANDLE_TH_ERRORS
}

// increment_version([tensor, ...]), as torch.autograd.graph.increment_version
PyObject* increment_version(PyObject*, PyObject* tensors) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyList_CheckExact(tensors), "increment_version: expected a list of tensors");
  for (Py_ssize_t j = 0; j < PyList_GET_SIZE(tensors); ++j) {
    PyObject* const object = PyList_GET_ITEM(tensors, j);
    TORCH_CHECK_TYPE(THPVariable_Check(object), "increment_version: expected a list of tensors");
    const at::Tensor& t = THPVariable_Unpack(object);
    if (!t.is_inference()) ag::impl::bump_version(t);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// bind(address of absgd_fast_cpu_kernels in _ops_cpu.so, ops/autograd.py _derivative, _differentiable)
PyObject* bind(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3, "bind: got ", count, " arguments, expected 3");
  kernels_of_library = reinterpret_cast<const absgd::CpuKernels& (*)()>(PyLong_AsVoidPtr(args[0]));
  if (PyErr_Occurred()) return nullptr;
  derivative = Py_NewRef(args[1]);
  differentiate = Py_NewRef(args[2]);
  torchs_table = exchange_api(py::reinterpret_borrow<py::object>(THPVariableClass));
  plain_keys = at::empty({0}).key_set();
  usual_keys = c10::impl::tls_local_dispatch_key_set().included_ | c10::autocast_dispatch_keyset;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    {"bind", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(bind)), METH_FASTCALL, nullptr},
    {"attach", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(attach)), METH_FASTCALL, nullptr},
    {"robust_logit_loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(robust_logit_loss_attached)),
     METH_FASTCALL, nullptr},
    {"repeat", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(repeat)), METH_FASTCALL, nullptr},
    {"increment_version", increment_version, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_eager", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__eager() {
  THPObjectPtr created(PyModule_Create(&module));
  THPObjectPtr access(PyCapsule_New(const_cast<TensorAccess*>(&kAccess), kTensorAccess, nullptr));
  if (!created || !access || PyModule_AddObjectRef(created, "tensor_access", access) < 0) return nullptr;
  return created.release();
}
