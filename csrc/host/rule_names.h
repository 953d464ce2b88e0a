// The places of a rule's numbers, flags and states in the dicts of torch's optimizer.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../launch.h"

namespace {

namespace py = pybind11;

// Keys of torch's dicts, interned so that a look-up compares pointers.
struct Names {
  PyObject* grad = PyUnicode_InternFromString("grad");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* params = PyUnicode_InternFromString("params");
  PyObject* lr = PyUnicode_InternFromString("lr");
  PyObject* step = PyUnicode_InternFromString("step");
  PyObject* local = PyUnicode_InternFromString("_local_tensor");
  PyObject* spec = PyUnicode_InternFromString("_spec");
};
const Names& names() {
  static const Names instance;
  return instance;
}

PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* out = PyDict_GetItemWithError(dict, key);
  if (out == nullptr) {
    if (PyErr_Occurred() == nullptr) PyErr_SetObject(PyExc_KeyError, key);
    throw py::error_already_set();
  }
  return out;
}
// The number that stands under a key of a group. It may be a tensor, which has __float__. An error names the key.
double as_double(PyObject* object, PyObject* key) {
  const double out = PyFloat_AsDouble(object);
  if (out != -1.0 || PyErr_Occurred() == nullptr) return out;
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyErr_Format(type, "%U: got %R, expected a number (%S)", key, object, value == nullptr ? Py_None : value);
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(trace);
  throw py::error_already_set();
}
bool truth(PyObject* dict, PyObject* key) {
  const int out = PyObject_IsTrue(item(dict, key));
  if (out < 0) throw py::error_already_set();
  return out != 0;
}

// The places of a rule's numbers, flags and states (absgd_fast/optim/rule.py OptimizerRule).
struct RuleNames {
  struct Number {
    PyObject* key;     // the key in the group; null: the number is 0
    Py_ssize_t index;  // the position in the tuple under that key (betas); -1: the number itself stands there
  };
  struct Flag {
    PyObject* key;
    int bits;
  };
  absgd::Rule rule;
  Number weight_decay, hyper_a, hyper_b, eps;
  std::vector<Flag> flags;
  PyObject* states[absgd::kStates];  // the keys of the states; null beyond the last

  // numbers: {"weight_decay" | "first" (hyper_a) | "second" (hyper_b) | "eps": (key, index)}. flag_bits: {key: bits}.
  // state_names: the keys of the states.
  RuleNames(int rule, const py::dict& numbers, const py::dict& flag_bits, const py::tuple& state_names)
      : rule(absgd::Rule(rule)),
        weight_decay(place(numbers, "weight_decay")),
        hyper_a(place(numbers, "first")),
        hyper_b(place(numbers, "second")),
        eps(place(numbers, "eps")),
        states() {
    for (auto flag : flag_bits) flags.push_back({interned(flag.first), flag.second.cast<int>()});
    for (size_t j = 0; j < state_names.size() && j < absgd::kStates; ++j) states[j] = interned(state_names[j]);
  }
  absgd::StepGroup read(PyObject* group) const {
    absgd::StepGroup out{};
    out.rule = rule;
    for (const Flag& flag : flags)
      if (truth(group, flag.key)) out.flags |= flag.bits;
    out.weight_decay = value(group, weight_decay);
    out.hyper_a = value(group, hyper_a);
    out.hyper_b = value(group, hyper_b);
    out.eps = value(group, eps);
    return out;
  }

 private:
  static PyObject* interned(const py::handle& name) {
    return PyUnicode_InternFromString(name.cast<std::string>().c_str());
  }
  static Number place(const py::dict& numbers, const char* name) {
    if (!numbers.contains(name)) return {nullptr, -1};
    const py::tuple where = numbers[name];
    return {interned(where[0]), where[1].cast<Py_ssize_t>()};
  }
  static double value(PyObject* group, const Number& number) {
    if (number.key == nullptr) return 0;
    PyObject* object = item(group, number.key);
    if (number.index < 0) return as_double(object, number.key);
    if (PySequence_Size(object) != 2) {
      if (PyErr_Occurred() != nullptr) throw py::error_already_set();
      throw py::value_error(py::cast<std::string>(py::str(number.key)) + ": got " +
                            py::cast<std::string>(py::repr(object)) + ", expected two numbers");
    }
    const py::object one = py::reinterpret_steal<py::object>(PySequence_GetItem(object, number.index));
    if (!one) throw py::error_already_set();
    return as_double(one.ptr(), number.key);
  }
};

}  // namespace
