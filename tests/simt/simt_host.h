// CUDA for a CPU: a kernel file compiled as C++ with this header included first (g++ -x c++ -include simt_host.h) runs
// on the fibers of runtime.cpp, one per CUDA thread. Test code: nothing outside tests/ knows of it.
//
// A kernel file defines LAUNCH, SHARED and DYN_SHARED itself unless they exist; those here take their place. Everything
// else is CUDA's own spelling. PTX hides behind __CUDA_ARCH__, which is not defined here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "runtime.h"

// ---- Language ------------------------------------------------------------------------------------------------------

#undef __shared__  // only through SHARED and DYN_SHARED
#undef __launch_bounds__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __grid_constant__ &  // `const Args __grid_constant__ a`: one copy for the whole launch, as on the device

// Constant for as long as a thread runs, so the compiler may keep them in registers across barriers. The runtime
// defines them without const. Reads of constants are also not instrumented in the race build.
extern SIMT_LOCAL const uint3 threadIdx, blockIdx;
extern SIMT_LOCAL const dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define LAUNCH(kernel, grid, block, smem, stream, ...) \
  simt::launch(#kernel, simt::here(), grid, block, smem, stream, kernel, ##__VA_ARGS__)
#define SHARED(type, name)           \
  static simt::Shared name##_memory; \
  auto& name = *reinterpret_cast<std::add_pointer_t<type>>(simt_shared(&name##_memory, sizeof(type), alignof(type)))
#define DYN_SHARED(type, name) type* name = static_cast<type*>(simt_dynamic_shared())

namespace simt {

template <class... P, class... A>
void launch(const char* name, Site site, dim3 grid, dim3 block, size_t smem, cudaStream_t, void (*kernel)(P...),
            A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "wrong number of kernel arguments");
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> arguments;
    static void run(void* call) { std::apply(static_cast<Call*>(call)->kernel, static_cast<Call*>(call)->arguments); }
  } call{kernel, {static_cast<std::decay_t<P>>(arguments)...}};
  size_t bytes = 0;
  [[maybe_unused]] const auto add = [&](size_t n, size_t align) { bytes = (bytes + align - 1) / align * align + n; };
  (add(sizeof(std::decay_t<P>), alignof(std::decay_t<P>)), ...);
  const void* const function = reinterpret_cast<const void*>(kernel);
  const unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
  simt_launch(
      {name, site, {g[0], g[1], g[2]}, {b[0], b[1], b[2]}, smem, bytes, function, Call::run, &call, sizeof call});
}

template <class T>
struct Given {  // a parameter that takes no part in deduction: atomicAdd(&u, 1)
  using type = T;
};
template <class T>
using given = typename Given<T>::type;

// ---- Threads of a block and of a warp ------------------------------------------------------------------------------

template <class T>
__forceinline__ T shuffle(Move move, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = simt_shuffle(move, mask, bits, operand, width, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

#define SIMT_SITE simt::Site site = simt::here()

__forceinline__ void __syncthreads(SIMT_SITE) { simt_barrier(false, site); }
__forceinline__ int __syncthreads_count(int p, SIMT_SITE) { return simt_barrier(p != 0, site); }
__forceinline__ int __syncthreads_or(int p, SIMT_SITE) { return simt_barrier(p != 0, site) != 0; }
__forceinline__ int __syncthreads_and(int p, SIMT_SITE) { return simt_barrier(p == 0, site) == 0; }

__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) { simt_sync_warp(mask, site); }
__forceinline__ unsigned __ballot_sync(unsigned mask, int p, SIMT_SITE) { return simt_ballot(mask, p != 0, site); }
__forceinline__ int __any_sync(unsigned mask, int p, SIMT_SITE) { return simt_ballot(mask, p != 0, site) != 0; }
__forceinline__ int __all_sync(unsigned mask, int p, SIMT_SITE) { return simt_ballot(mask, p == 0, site) == 0; }

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::Move::index, mask, value, lane, width, site);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::Move::exclusive, mask, value, lanes, width, site);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::Move::up, mask, value, static_cast<int>(delta), width, site);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::Move::down, mask, value, static_cast<int>(delta), width, site);
}

__forceinline__ void __threadfence_block() { simt_fence(false); }
__forceinline__ void __threadfence() { simt_fence(true); }
__forceinline__ void __threadfence_system() { simt_fence(true); }

// ---- Atomics -------------------------------------------------------------------------------------------------------
// A place where another thread may come first; then one step, which the race build sees as one.

namespace simt {
template <class T, class F>
__attribute__((no_sanitize("thread"))) T update(T* p, F f) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics work on 4 and 8 bytes");
  const T old = *p;
  *p = f(old);
  return old;
}
}  // namespace simt

#define SIMT_ATOMIC(name, condition, expression)                     \
  template <class T>                                                 \
  __forceinline__ T name(T* p, simt::given<T> v) {                   \
    static_assert(condition, #name " does not exist for this type"); \
    simt_atomic(p, sizeof(T));                                       \
    return simt::update(p, [v](T old) -> T { return expression; });  \
  }
SIMT_ATOMIC(atomicAdd, !(std::is_integral<T>::value && std::is_signed<T>::value && sizeof(T) == 8), old + v)
SIMT_ATOMIC(atomicSub, std::is_integral<T>::value && sizeof(T) == 4, old - v)
SIMT_ATOMIC(atomicExch, sizeof(T) == 4 || sizeof(T) == 8, ((void)old, v))
SIMT_ATOMIC(atomicMax, std::is_integral<T>::value, old < v ? v : old)
SIMT_ATOMIC(atomicMin, std::is_integral<T>::value, v < old ? v : old)
SIMT_ATOMIC(atomicAnd, std::is_integral<T>::value, (old & v))
SIMT_ATOMIC(atomicOr, std::is_integral<T>::value, old | v)
SIMT_ATOMIC(atomicXor, std::is_integral<T>::value, old ^ v)
SIMT_ATOMIC(atomicInc, (std::is_same<T, unsigned>::value), old >= v ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, (std::is_same<T, unsigned>::value), old == 0 || old > v ? v : old - 1)

template <class T>
__forceinline__ T atomicCAS(T* p, simt::given<T> expected, simt::given<T> v) {
  static_assert(std::is_integral<T>::value, "atomicCAS works on integers");
  simt_atomic(p, sizeof(T));
  return simt::update(p, [=](T old) -> T { return old == expected ? v : old; });
}

// ---- Loads and stores with a cache hint ----------------------------------------------------------------------------

template <class T>
__forceinline__ T __ldg(const T* p) {
#ifdef __SANITIZE_THREAD__
  simt_read_only(p, sizeof(T));  // this cache is not coherent: nobody may have written there in this launch
#endif
  return *p;
}
#define SIMT_LOAD(name)                \
  template <class T>                   \
  __forceinline__ T name(const T* p) { \
    return *p;                         \
  }
#define SIMT_STORE(name)                              \
  template <class T>                                  \
  __forceinline__ void name(T* p, simt::given<T> v) { \
    *p = v;                                           \
  }
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldlu)
SIMT_LOAD(__ldcv)
SIMT_STORE(__stwb)
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
SIMT_STORE(__stwt)

// ---- Arithmetic ----------------------------------------------------------------------------------------------------

namespace simt {
template <class A, class B>
using common = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value, std::common_type_t<A, B>>;
}

template <class A, class B, class C = simt::common<A, B>>
__forceinline__ C min(A a, B b) {
  if constexpr (std::is_floating_point<C>::value) return fmin(static_cast<C>(a), static_cast<C>(b));
  return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b);
}
template <class A, class B, class C = simt::common<A, B>>
__forceinline__ C max(A a, B b) {
  if constexpr (std::is_floating_point<C>::value) return fmax(static_cast<C>(a), static_cast<C>(b));
  return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a);
}

namespace simt {
template <class To, class From>
__forceinline__ To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace simt

__forceinline__ int __float_as_int(float x) { return simt::bits<int>(x); }
__forceinline__ unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
__forceinline__ float __int_as_float(int x) { return simt::bits<float>(x); }
__forceinline__ float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
__forceinline__ long long __double_as_longlong(double x) { return simt::bits<long long>(x); }
__forceinline__ double __longlong_as_double(long long x) { return simt::bits<double>(x); }
__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
__forceinline__ int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
__forceinline__ int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ int __ffsll(long long x) { return __builtin_ffsll(x); }
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
__forceinline__ unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned __int128>(a) * b >> 64;
}
__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
__forceinline__ float __fsqrt_rn(float x) { return sqrtf(x); }
__forceinline__ float __frcp_rn(float x) { return 1 / x; }
__forceinline__ double __dadd_rn(double a, double b) { return a + b; }
__forceinline__ double __dmul_rn(double a, double b) { return a * b; }
__forceinline__ double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

// Macros where the C library has functions of the same name
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf(x, y)
#define __fdividef(x, y) ((x) / (y))
#define rsqrtf(x) (1 / sqrtf(x))
#define rsqrt(x) (1 / sqrt(x))
