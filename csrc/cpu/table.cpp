// The table of the kernels of one instruction set. This file is compiled once for each instruction set, as the kernels
// are.
#include "kernels.h"

#define ABSGD_STRING(x) #x
#define ABSGD_NAME(x) ABSGD_STRING(x)

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {

#define ABSGD_ADDRESS(result, name, arguments) , name
extern const CpuKernels kernels;
const CpuKernels kernels = {&ABSGD_NAME(ABSGD_ISA_NAMESPACE)[4] /* the name without "isa_" */
                            ABSGD_CPU_KERNELS(ABSGD_ADDRESS)};
#undef ABSGD_ADDRESS

}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
