// The CPU operators: memory and threads, in ops/cpu/. Schemas are in Python, kernels in cpu/, formulas in math/.
#include "ops/cpu/losses.h"
#include "ops/cpu/rules.h"
#include "ops/cpu/step.h"
#include "ops/cpu/weighted.h"
#include "ops/cpu/weights.h"
#include "ops/signatures.h"

namespace {

std::string isas() {
  std::string out = cpu_kernels().isa;
  for (int j = 0; j < cpu_isa_count(); ++j) out += std::string(",") + cpu_isa_name(j);
  return out;
}
bool use_isa(std::string name) { return use_cpu_isa(name.c_str()); }

std::string native_signatures();

#define ABSGD_TOOLS(OP) \
  OP(isas)              \
  OP(use_isa)           \
  OP(native_signatures)

// Operators that only the CPU has.
#define ABSGD_HERE_ALONE(OP) \
  OP(logit_loss_backward_)   \
  OP(rule_weights)           \
  OP(group_weights)          \
  OP(planned_squares)

std::string native_signatures() {
  std::string out;
  ABSGD_OPS(ABSGD_SIGNATURE_LINE)
  ABSGD_HERE_ALONE(ABSGD_SIGNATURE_LINE)
  ABSGD_TOOLS(ABSGD_SIGNATURE_LINE)
  return out;
}

}  // namespace

// For csrc/eager.cpp, which calls the kernels without the dispatcher.
extern "C" __attribute__((visibility("default"))) const CpuKernels& absgd_fast_cpu_kernels() { return cpu_kernels(); }

STABLE_TORCH_LIBRARY_IMPL(absgd_fast, CPU, m){
    ABSGD_OPS(ABSGD_IMPL)

        ABSGD_HERE_ALONE(ABSGD_IMPL)} STABLE_TORCH_LIBRARY_IMPL(absgd_fast, CompositeExplicitAutograd, m) {
  ABSGD_TOOLS(ABSGD_IMPL)
}
