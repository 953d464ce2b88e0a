// What the library of CPU kernels has beside the operators, for the library that stands in its place.
#include "ops_common.h"

namespace {
std::string isas() { return "cuda,cuda"; }
bool use_isa(std::string) { return true; }
std::string native_signatures() { return ""; }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(absgd_fast, CompositeExplicitAutograd, m) {
  ABSGD_IMPL(isas) ABSGD_IMPL(use_isa) ABSGD_IMPL(native_signatures)
}
