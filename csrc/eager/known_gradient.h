// The node of a value whose gradient is known (ops/autograd.py _KnownGradient does the same in Python).
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "python.h"

namespace {

namespace ag = torch::autograd;
using NodePtr = decltype(ag::Edge::function);  // a std::shared_ptr or a c10::intrusive_ptr, as torch has it

PyObject *derivative = nullptr, *differentiate = nullptr;  // ops/autograd.py _derivative and _differentiable

// upstream * grad, as a new tensor or in place, by the operators of whichever device the gradient is on.
at::Tensor scaled(const at::Tensor& grad, const at::Tensor& upstream, bool to_half) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("absgd_fast::scale", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, bool)>();
  return op.call(grad, upstream, to_half);
}
void scale_in_place(const at::Tensor& grad, const at::Tensor& upstream) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("absgd_fast::scale_", "")
                             .typed<void(const at::Tensor&, const at::Tensor&)>();
  op.call(grad, upstream);
}

// loss.backward() gives the upstream gradient 1, which needs no multiplication.
bool is_one(const at::Tensor& upstream) {
  if (upstream.dim() != 0 || !upstream.is_cpu()) return false;
  if (upstream.scalar_type() == at::kFloat) return *upstream.const_data_ptr<float>() == 1.0f;
  return upstream.scalar_type() == at::kDouble && *upstream.const_data_ptr<double>() == 1.0;
}

// The node of a value whose derivative by x is known (ops/autograd.py _KnownGradient).
struct KnownGradient : ag::Node {
  at::Tensor grad;            // undefined once a backward has freed it
  at::Tensor sample_stats;    // or undefined
  ag::SavedVariable x;        // unless it is recovered
  PyObject* given = nullptr;  // what _derivative makes recompute(x) and recover(grad) of, for a second derivative
  bool recovers = false, to_half = false;

  std::string name() const override { return "KnownGradientBackward"; }

  ag::variable_list apply(ag::variable_list&& upstream) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(grad.defined(), ag::ERR_BACKWARD_TWICE);
    if (!upstream[0].defined()) return {at::Tensor()};
    if (at::GradMode::is_enabled()) return {differentiable(upstream[0])};
    if (to_half || ag::get_current_graph_task_keep_graph()) return {scaled(grad, upstream[0], to_half)};
    if (!is_one(upstream[0])) scale_in_place(grad, upstream[0]);
    return {std::move(grad)};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    let_go();
  }

  ~KnownGradient() override { let_go(); }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(grad);
    args.collect(to_half);
  }
  ag::variable_list apply_with_saved(const ag::variable_list& upstream,
                                     torch::dynamo::autograd::SwapSavedVariables& saved) override {
    saved.before(grad);
    saved.before(to_half);
    // New memory, because a compiled backward does not say whether the graph is kept.
    ag::variable_list out{scaled(grad, upstream[0], to_half)};
    saved.after(grad);
    saved.after(to_half);
    return out;
  }

 private:
  void let_go() {
    grad.reset();
    sample_stats.reset();
    x.reset_data();
    if (given == nullptr || !Py_IsInitialized()) return;
    const Gil gil;
    Py_CLEAR(given);
  }

  // upstream * d value / d x with a graph of its own.
  at::Tensor differentiable(const at::Tensor& upstream) {
    const Gil gil;
    const auto object = [](const at::Tensor& t) { return THPObjectPtr(THPVariable_Wrap(t)); };
    THPObjectPtr stats = object(sample_stats);
    THPObjectPtr pair(PyObject_CallFunctionObjArgs(derivative, given, stats.get(), nullptr));
    if (!pair) throw python_error();
    PyObject *const recompute = PyTuple_GET_ITEM(pair.get(), 0), *const recover = PyTuple_GET_ITEM(pair.get(), 1);
    at::Tensor again;
    if (recovers) {
      // It takes the place of x in the graph, of which nothing else was saved.
      again = unpacked(PyObject_CallOneArg(recover, object(grad).get())).detach();
      ag::impl::set_gradient_edge(again, next_edge(0));
    } else {
      again = x.unpack();
    }
    THPObjectPtr a = object(again), u = object(upstream);
    return unpacked(PyObject_CallFunctionObjArgs(differentiate, recompute, a.get(), u.get(), nullptr));
  }
};

template <class N>
auto make_node() {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<ag::Node>>)
    return std::shared_ptr<N>(new N, [](auto* node) { deleteNode(node); });
  else
    return c10::make_intrusive<N>();
}

// Makes value, which has no graph, a function of x (ops/autograd.py attach).
void attach_to(const at::Tensor& x, const at::Tensor& value, at::Tensor grad, at::Tensor sample_stats, PyObject* given,
               bool recovers) {
  if (!at::GradMode::is_enabled() || !x.requires_grad()) return;
  auto node = make_node<KnownGradient>();
  node->add_next_edge(ag::impl::gradient_edge(x));
  node->to_half = grad.scalar_type() != x.scalar_type();
  node->grad = std::move(grad);
  node->sample_stats = std::move(sample_stats);
  node->given = Py_NewRef(given);
  node->recovers = recovers && !x.is_leaf();  // the graph keeps a leaf anyway, as that whose gradient is accumulated
  if (!node->recovers) node->x = ag::SavedVariable(x, false);
  const uint32_t output = node->add_input_metadata(value);
  ag::impl::set_gradient_edge(value, ag::Edge(std::move(node), output));
}

}  // namespace
