// The list of the operators, and the signatures that the compiler sees.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "tensors.h"

namespace {

// The stable ABI does not compare a C++ signature with its schema: an int read as a double is silently 0. So a test
// compares them, by the types that the compiler writes here.
template <class T>
struct Name;
#define ABSGD_TYPE_NAME(type, text)           \
  template <>                                 \
  struct Name<type> {                         \
    static std::string get() { return text; } \
  }
ABSGD_TYPE_NAME(Tensor, "Tensor");
ABSGD_TYPE_NAME(std::optional<Tensor>, "Tensor?");
ABSGD_TYPE_NAME(std::vector<Tensor>, "Tensor[]");
ABSGD_TYPE_NAME(double, "float");
ABSGD_TYPE_NAME(int64_t, "int");
ABSGD_TYPE_NAME(bool, "bool");
ABSGD_TYPE_NAME(std::string, "str");
ABSGD_TYPE_NAME(void, "");
template <class... T>
struct Name<std::tuple<T...>> {
  static std::string get() {
    std::string out;
    ((out += (out.empty() ? "" : ", ") + Name<T>::get()), ...);
    return out;
  }
};
template <class R, class... A>
std::string signature(R (*)(A...)) {
  return Name<std::tuple<std::decay_t<A>...>>::get() + " -> " + Name<R>::get();
}

// OP applied to every operator that both devices have
#define ABSGD_OPS(OP)         \
  OP(logit_loss)              \
  OP(logit_loss_)             \
  OP(robust_logit_loss)       \
  OP(robust_loss)             \
  OP(robust_partial_stats)    \
  OP(robust_settle)           \
  OP(robust_apply)            \
  OP(robust_weights)          \
  OP(robust_weights_backward) \
  OP(rectified)               \
  OP(scale)                   \
  OP(scale_)                  \
  OP(planned_step)            \
  OP(step_)                   \
  OP(weighted_step_)
#define ABSGD_SIGNATURE_LINE(op) out += std::string(#op ": ") + signature(op) + "\n";
#define ABSGD_IMPL(op) m.impl(#op, TORCH_BOX(&op));

}  // namespace
