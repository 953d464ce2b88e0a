// Chooses the instruction set at run time: the best one that this machine has. This file is compiled for the baseline.
#include <string.h>

#include "kernels.h"

namespace absgd {

namespace isa_baseline {
extern const CpuKernels kernels;
}
namespace isa_avx2 {
extern const CpuKernels kernels;
}
namespace isa_avx512 {
extern const CpuKernels kernels;
}

namespace {

struct Choice {
  const CpuKernels* found[3];
  int count = 0;
  const CpuKernels* current;

  Choice() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#if ABSGD_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
      found[count++] = &isa_avx512::kernels;
#endif
#if ABSGD_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
      found[count++] = &isa_avx2::kernels;
#endif
    found[count++] = &isa_baseline::kernels;
    current = found[0];
  }
};

Choice& choice() {
  static Choice instance;
  return instance;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *choice().current; }
int cpu_isa_count() { return choice().count; }
const char* cpu_isa_name(int index) { return choice().found[index]->isa; }

bool use_cpu_isa(const char* name) {
  for (int j = 0; j < choice().count; ++j)
    if (strcmp(choice().found[j]->isa, name) == 0) {
      choice().current = choice().found[j];
      return true;
    }
  return false;
}

}  // namespace absgd
