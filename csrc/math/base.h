// The notation of the formulas. Every formula is a template of a lane type L. A lane type stands for N values of one
// floating-point type that are computed side by side: L::V is the type of the N values, and L::exp, L::log, L::log1p,
// L::sqrt, L::select(condition, a, b) and L::set(number) act on all of them. One lane type holds a single value (a CUDA
// thread, or a double of the state update), another holds a SIMD register of the CPU. The formulas are the same for
// both.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define ABSGD_FN __host__ __device__ __forceinline__
#else
#define ABSGD_FN inline __attribute__((always_inline))
#endif

namespace absgd {

constexpr double kLargest = 1.7976931348623157e308;  // DBL_MAX

}  // namespace absgd
