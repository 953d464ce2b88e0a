// What every formula is written with. A formula is a template on the lane type L, which describes N values of one
// floating type computed side by side: L::V is the values, and L has the functions L::exp, L::log1p,
// L::select(condition, a, b) and L::set(number). A lane type may hold one value (a CUDA thread, a double of the state
// update) or a whole SIMD register; the formulas cannot tell.
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
