// StepPlan: what an optimizer keeps between steps, so that Python does not gather it again in each step. This file uses
// Python and the DLPack exchange table, but not torch. It has no loop over data, because a second pool of threads would
// disturb torch's.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "host/rule_names.h"
#include "host/tensor_access.h"
#include "launch.h"

namespace {

// A parameter and its state. With it a step looks nothing up by tensor, whose hash is Python code.
// These pointers are only compared. A step follows a pointer only after it has found it again in the optimizer's own
// containers. So the plan keeps nothing alive, takes no part in reference cycles, and a state that the user drops is
// freed at once. References to the states would make a step 9 to 18 ns shorter for each of them, because torch goes
// through the interpreter whenever it looks at a tensor that only Python refers to.
struct Slot {
  PyObject *param, *state;  // state: the parameter's dict in optimizer.state, or null; a dict of another class is left
                            // to Python, because it may fetch its values from elsewhere
};

// Moves the objects into a list.
py::list handed_over(std::vector<py::object>& objects) {
  py::list out(objects.size());
  for (size_t j = 0; j < objects.size(); ++j) PyList_SET_ITEM(out.ptr(), Py_ssize_t(j), objects[j].release().ptr());
  return out;
}

class StepPlan {
 public:
  // cpu, cuda: whether the kernels of that device serve. access: `tensor_access` of the eager module, or None.
  StepPlan(py::object tensor_type, py::object parameter_type, py::function allocate, bool cpu, bool cuda, int rule,
           const py::dict& numbers, const py::dict& flags, const py::tuple& states, const py::object& access)
      : describe_(exchange_api(tensor_type)->dltensor_from_py_object),
        tensor_type_(tensor_type),
        parameter_type_(parameter_type),
        allocate_(allocate),
        cpu_(cpu),
        cuda_(cuda),
        names_(rule, numbers, flags, states),
        grad_(getter(tensor_type)) {
    if (access.is_none()) return;
    const auto* faster = static_cast<const TensorAccess*>(PyCapsule_GetPointer(access.ptr(), kTensorAccess));
    if (faster == nullptr) throw py::error_already_set();
    describe_ = faster->describe;
    gradient_ = faster->gradient;
  }

  // Reads every tensor afresh, and writes the table for one step over all parameters that have a gradient.
  // Returns (updated, held, on, others):
  //   updated  the parameters in the table
  //   held     their gradients, states and counts of steps, which the caller keeps alive until the step is done:
  //   another
  //            thread may drop a state while the kernel writes it
  //   on       a plain tensor of the table, or None if the table is empty
  //   others   [(group, [param, ...])]: parameters that the table cannot hold (without a state yet, with an lr that no
  //            kernel reads, or of another dtype, device, layout or tensor type), which the caller steps otherwise
  // grad_scale, found_inf: one-element float32 tensors on the GPU, or None. They and a tensor lr on the GPU are not
  // read
  //   here: the table has their addresses.
  // sharded: the class whose tensors hold a plain one in `_local_tensor` (torch's DTensor), or None.
  // robust: math/weights.h Normalizer as six float64 numbers on the device of the tensors, or None.
  py::tuple refresh(py::list groups, py::dict state, py::object grad_scale, py::object found_inf, py::object sharded,
                    py::object robust) {
    // Options may be objects whose __float__ runs any code, another step too. So they are read before all else.
    std::vector<Options> options;
    for (py::handle group : groups) options.push_back(read_options(group.ptr()));
    if (!same_state(state)) remember(options, state);
    groups_.clear();
    std::swap(tensors_, before_);
    tensors_.clear();
    elements_ = 0;
    device_ = {0, 0};
    sharded_ = sharded.is_none() ? nullptr : sharded.ptr();
    found_inf_ = device_float(found_inf);
    grad_scale_ = device_float(grad_scale);
    read_robust(robust);
    std::vector<py::object> updated, held;
    updated.reserve(slots_.size());
    held.reserve((2 + absgd::kStates) * slots_.size());
    py::list others;
    size_t slot = 0;
    for (const Options& of_group : options) {
      groups_.push_back(of_group.numbers);
      const py::list& params = of_group.params;
      py::list left;
      for (Py_ssize_t j = 0; j < PyList_GET_SIZE(params.ptr()); ++j, ++slot) {
        PyObject* param = PyList_GET_ITEM(params.ptr(), j);
        if (slot >= slots_.size() || slots_[slot].param != param) {
          remember(options, state);  // afterwards the slot has this parameter
          if (slot >= slots_.size() || slots_[slot].param != param)
            throw py::value_error("param_groups changed during a step, expected the same parameters throughout");
        }
        if (!is_plain(param) && !is_shard(param)) {  // its attributes may be computed by any code
          left.append(py::handle(param));
          continue;
        }
        py::object grad = grad_of(param);
        if (grad.is_none()) continue;
        if (of_group.readable && add(param, grad.ptr(), slot, int32_t(groups_.size() - 1), held)) {
          updated.push_back(py::reinterpret_borrow<py::object>(param));
          held.push_back(std::move(grad));
        } else {
          left.append(py::handle(param));
        }
      }
      if (PyList_GET_SIZE(left.ptr()) > 0) others.append(py::make_tuple(of_group.group, left));
    }
    write_table();
    const auto on = py::reinterpret_borrow<py::object>(updated.empty() ? Py_None : local(updated[0].ptr()));
    return py::make_tuple(handed_over(updated), handed_over(held), on, others);
  }

  // An int64 tensor on the CPU, which holds a StepTable and what that points to, until the next refresh.
  py::object table() const { return table_; }

 private:
  // What a step has read of a group.
  struct Options {
    py::object group;
    py::list params;
    absgd::StepGroup numbers;
    bool readable;  // whether the table can hold parameters of the group
  };
  Options read_options(PyObject* group) const {
    const py::object params = py::reinterpret_steal<py::object>(PyObject_GetItem(group, names().params));
    if (!params) throw py::error_already_set();
    Options out{py::reinterpret_borrow<py::object>(group), py::list(params), {}, false};
    // A dict of another class may compute its values, which only Python would notice.
    if (PyDict_CheckExact(group)) {
      out.numbers = names_.read(group);
      out.readable = read_learning_rate(item(group, names().lr), out.numbers);
    }
    return out;
  }

  // Whether the optimizer's state holds the same dicts in the same order as when it was remembered.
  bool same_state(const py::dict& state) const {
    if (size_t(PyDict_Size(state.ptr())) != state_.size()) return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (size_t j = 0; PyDict_Next(state.ptr(), &position, &key, &value) != 0; ++j)
      if (j >= state_.size() || state_[j].param != key || state_[j].state != value) return false;
    return true;
  }

  void remember(const std::vector<Options>& groups, const py::dict& state) {
    state_.clear();
    slots_.clear();
    std::unordered_map<PyObject*, PyObject*> state_of;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(state.ptr(), &position, &key, &value) != 0) {
      state_.push_back({key, value});
      if (PyDict_CheckExact(value)) state_of[key] = value;
    }
    for (const Options& group : groups)
      for (py::handle param : group.params) {
        const auto found = state_of.find(param.ptr());
        slots_.push_back({param.ptr(), found == state_of.end() ? nullptr : found->second});
      }
  }

  // The gradient. If torch.Tensor.grad is a C function it is called directly, which takes 24 ns less than looking the
  // attribute up by its name.
  py::object grad_of(PyObject* param) const {
    const bool plain = is_plain(param);
    py::object out =
        py::reinterpret_steal<py::object>(plain && gradient_ != nullptr ? gradient_(param)
                                          : plain && grad_ != nullptr   ? grad_->get(param, grad_->closure)
                                                                        : PyObject_GetAttr(param, names().grad));
    if (!out) throw py::error_already_set();
    return out;
  }
  static const PyGetSetDef* getter(const py::object& tensor_type) {
    const py::object descriptor = tensor_type.attr("grad");
    if (Py_TYPE(descriptor.ptr()) != &PyGetSetDescr_Type) return nullptr;
    return reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset;  // lives as long as the type
  }

  bool is_plain(PyObject* object) const {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor_type_.ptr() || type == parameter_type_.ptr();
  }
  bool is_shard(PyObject* object) const {
    return sharded_ != nullptr && reinterpret_cast<PyObject*>(Py_TYPE(object)) == sharded_;
  }
  // The plain tensor of a shard, or the object itself. It is borrowed: the shard keeps it alive.
  PyObject* local(PyObject* object) const {
    if (!is_shard(object)) return object;
    const py::object inner = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, names().local));
    if (!inner) throw py::error_already_set();
    return inner.ptr();
  }
  // Whether two tensors are shared out alike. A gradient whose parts are still to be summed up is not like its
  // parameter.
  bool same_shard(PyObject* a, PyObject* b) const {
    if (!is_shard(a) || !is_shard(b)) return is_shard(a) == is_shard(b);
    const py::object x = py::reinterpret_steal<py::object>(PyObject_GetAttr(a, names().spec));
    const py::object y = py::reinterpret_steal<py::object>(PyObject_GetAttr(b, names().spec));
    if (!x || !y) throw py::error_already_set();
    if (x.is(y)) return true;
    return x.attr("mesh").equal(y.attr("mesh")) && x.attr("placements").equal(y.attr("placements"));
  }

  // Describes a plain tensor. Returns false for anything else; a subclass may be anything.
  bool describe(PyObject* object, DLTensor* out) const {
    if (!is_plain(object)) return false;
    if (describe_(object, out) != 0) {  // no storage: sparse, meta
      PyErr_Clear();
      return false;
    }
    return true;
  }
  // The same for a tensor of floating-point numbers.
  bool read(PyObject* object, DLTensor* out) const { return describe(object, out) && is_floating(*out); }
  static bool is_floating(const DLTensor& t) {
    if (t.dtype.lanes != 1) return false;
    const int bits = t.dtype.bits;
    return t.dtype.code == kDLFloat ? bits == 16 || bits == 32 || bits == 64 : t.dtype.code == kDLBfloat && bits == 16;
  }
  // The same for a tensor of one float32 or float64 number.
  bool read_number(PyObject* object, DLTensor* out) const { return describe(object, out) && is_number(*out); }
  static bool is_number(const DLTensor& t) {
    if (!is_floating(t) || t.dtype.bits < 32) return false;
    for (int32_t d = 0; d < t.ndim; ++d)
      if (t.shape[d] != 1) return false;
    return true;
  }

  static char* data(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

  // lr as a number. Of a tensor on the GPU only the address is taken, because reading it would wait for the GPU.
  // Returns false if it has another dtype than the kernels read (an integer, half precision).
  bool read_learning_rate(PyObject* lr, absgd::StepGroup& group) const {
    DLTensor t;
    if (PyFloat_Check(lr) || !describe(lr, &t) || t.device.type == kDLCPU) {
      group.lr = as_double(lr, names().lr);
      return true;
    }
    if (!is_number(t)) return false;
    group.lr_tensor = {data(t), t.dtype.bits == 64, t.device.id};
    return true;
  }

  const float* device_float(const py::object& object) {
    if (object.is_none()) return nullptr;
    DLTensor t;
    if (!read_number(object.ptr(), &t) || t.dtype.bits != 32)
      throw py::value_error("grad_scale, found_inf: expected float32 tensors of one element");
    amp_device_ = t.device.id;
    return reinterpret_cast<const float*>(data(t));
  }

  void read_robust(const py::object& robust) {
    robust_ = nullptr;
    if (robust.is_none()) return;
    DLTensor t;
    if (!read(robust.ptr(), &t) || t.dtype.bits != 64 || t.ndim != 1 || t.shape[0] != 6)
      throw py::value_error("robust: expected a tensor of six float64 numbers");
    robust_ = reinterpret_cast<const absgd::Normalizer*>(data(t));
    robust_device_ = {t.device.type, t.device.id};
  }

  // Adds a parameter to the table, and returns whether it could. All tensors of a table are on the device of its first.
  // held: takes references to the states.
  bool add(PyObject* param, PyObject* grad, size_t slot, int32_t group_index, std::vector<py::object>& held) {
    const absgd::StepGroup& group = groups_[size_t(group_index)];
    DLTensor p, g;
    if (!read(local(param), &p) || !read(local(grad), &g) || !same_shard(param, grad)) return false;
    const auto here = [&](const DLTensor& t) { return t.device.type == device_.type && t.device.id == device_.id; };
    const int32_t where = p.device.type;
    if (!(where == kDLCPU && cpu_) && !(where == kDLCUDA && cuda_)) return false;
    const bool near_robust =
        robust_ == nullptr || (robust_device_.type == p.device.type && robust_device_.id == p.device.id);
    if (tensors_.empty() && ((grad_scale_ == nullptr && found_inf_ == nullptr) || amp_device_ == p.device.id) &&
        near_robust)
      device_ = {where, p.device.id};
    const auto layout = [](const DLTensor& t) { return absgd::Layout{t.ndim, t.shape, t.strides}; };
    const auto like_p = [&](const DLTensor& t) { return here(t) && layout(t).same(layout(p)); };
    if (!here(p) || !layout(p).dense() || !like_p(g) || g.dtype.bits != p.dtype.bits || g.dtype.code != p.dtype.code)
      return false;
    if (group.lr_tensor.data != nullptr && (where == kDLCPU || group.lr_tensor.device != p.device.id)) return false;
    absgd::StepTensor out{};
    out.dtype = p.dtype.bits == 64          ? absgd::Dtype::f64
                : p.dtype.bits == 32        ? absgd::Dtype::f32
                : p.dtype.code == kDLBfloat ? absgd::Dtype::bf16
                                            : absgd::Dtype::f16;
    const uint8_t real_bits = p.dtype.bits == 64 ? 64 : 32;
    const int states = group.states();
    PyObject* const kept = slots_[slot].state;
    if ((states != 0 || group.counts()) && kept == nullptr) return false;
    for (int j = 0; j < absgd::kStates; ++j) {
      if ((states >> j & 1) == 0) continue;
      DLTensor t;
      PyObject* const state = PyDict_GetItemWithError(kept, names_.states[j]);
      if (state == nullptr || !read(local(state), &t) || t.dtype.bits != real_bits || !like_p(t)) return false;
      out.state[j] = data(t);
      held.push_back(py::reinterpret_borrow<py::object>(state));
    }
    if (group.counts()) {
      DLTensor t;
      PyObject* const step = PyDict_GetItemWithError(kept, names().step);
      if (step == nullptr || !read_number(step, &t) || !here(t)) return false;
      out.step = {data(t), t.dtype.bits == 64, t.device.id};
      held.push_back(py::reinterpret_borrow<py::object>(step));
    }
    out.count = layout(p).count();
    // The memory of a single number may hold its opposite (the imaginary part of a conjugate, as autograd hands it
    // out). A larger tensor of this kind has stride 2, so it was refused above.
    if (out.count == 1 && (negated(local(param)) || negated(local(grad)) || any_negated(kept, states))) return false;
    out.param = data(p);
    out.grad = data(g);
    out.begin = elements_;
    out.group = group_index;
    tensors_.push_back(out);
    elements_ += out.count;
    return true;
  }

  bool negated(PyObject* tensor) const {
    const py::object answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, names().is_neg));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
  }

  bool any_negated(PyObject* kept, int states) const {
    for (int j = 0; j < absgd::kStates; ++j)
      if ((states >> j & 1) != 0 && negated(local(PyDict_GetItemWithError(kept, names_.states[j])))) return true;
    return false;
  }

  // Writes [StepTable][groups][tensors] into memory that torch owns.
  void write_table() {
    const size_t groups = sizeof(absgd::StepTable), tensors = groups + groups_.size() * sizeof(absgd::StepGroup);
    const size_t bytes = tensors + tensors_.size() * sizeof(absgd::StepTensor);
    const bool grown = bytes > capacity_;
    if (grown) {
      table_ = allocate_((bytes + 7) / 8);
      DLTensor t;
      if (describe_(table_.ptr(), &t) != 0) throw py::error_already_set();
      memory_ = static_cast<char*>(t.data) + t.byte_offset;
      capacity_ = bytes;
    }
    // What was found about overlapping memory in the last step still holds if no tensor has moved since.
    auto stayed = [](const absgd::StepTensor& a, const absgd::StepTensor& b) {
      return a.param == b.param && a.state[0] == b.state[0] && a.state[1] == b.state[1] && a.state[2] == b.state[2] &&
             a.count == b.count && a.dtype == b.dtype;
    };
    const bool same = std::equal(tensors_.begin(), tensors_.end(), before_.begin(), before_.end(), stayed);
    const absgd::StepTable* last = same && !grown ? reinterpret_cast<absgd::StepTable*>(memory_) : nullptr;
    const absgd::StepTable table{elements_,
                                 int64_t(tensors_.size()),
                                 reinterpret_cast<absgd::StepTensor*>(memory_ + tensors),
                                 reinterpret_cast<absgd::StepGroup*>(memory_ + groups),
                                 last != nullptr && last->checked,
                                 last != nullptr && last->overlap,
                                 grad_scale_,
                                 found_inf_,
                                 robust_};
    std::memcpy(memory_, &table, sizeof(table));
    std::copy(groups_.begin(), groups_.end(), reinterpret_cast<absgd::StepGroup*>(memory_ + groups));
    std::copy(tensors_.begin(), tensors_.end(), reinterpret_cast<absgd::StepTensor*>(memory_ + tensors));
  }

  int (*describe_)(void* tensor, DLTensor* out);
  PyObject* (*gradient_)(PyObject* tensor) = nullptr;
  py::object tensor_type_, parameter_type_;
  py::function allocate_;
  bool cpu_, cuda_;
  RuleNames names_;
  const PyGetSetDef* grad_;
  PyObject* sharded_ = nullptr;  // the argument of this step
  py::object table_;

  std::vector<Slot> state_;  // in the order of optimizer.state
  std::vector<Slot> slots_;  // in the order of the parameters

  std::vector<absgd::StepGroup> groups_;
  std::vector<absgd::StepTensor> tensors_, before_;  // of this step and of the last
  int64_t elements_ = 0;
  struct Place {
    int32_t type, id;
  };
  Place device_{0, 0}, robust_device_{0, 0};                  // the device of this step's tensors, and of robust
  int32_t amp_device_ = 0;                                    // the device of grad_scale and found_inf
  const float *grad_scale_ = nullptr, *found_inf_ = nullptr;  // of this step
  const absgd::Normalizer* robust_ = nullptr;                 // of this step
  char* memory_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host objects of absgd_fast: see csrc/host.cpp";
  py::class_<StepPlan>(m, "StepPlan", "Writes the table of a step over many tensors, and is kept between steps.")
      .def(py::init<py::object, py::object, py::function, bool, bool, int, py::dict, py::dict, py::tuple, py::object>(),
           py::arg("tensor_type"), py::arg("parameter_type"), py::arg("allocate"), py::arg("cpu"), py::arg("cuda"),
           py::arg("rule"), py::arg("numbers"), py::arg("flags"), py::arg("states"), py::arg("access") = py::none())
      .def("refresh", &StepPlan::refresh, py::arg("param_groups"), py::arg("state"), py::arg("grad_scale") = py::none(),
           py::arg("found_inf") = py::none(), py::arg("sharded") = py::none(), py::arg("robust") = py::none())
      .def_property_readonly("table", &StepPlan::table);
}
