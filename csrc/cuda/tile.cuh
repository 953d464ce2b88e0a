// What the CUDA kernels are written in: how they are launched, warps and blocks, 16-byte accesses, the lane type of
// math.h, and the pattern by which the last block of a launch finishes for all.
//
// The style is plain CUDA C++ on purpose: the same files compile for the host, where a test runs every thread as a
// fiber (tests/simt). So PTX stands behind __CUDA_ARCH__ beside a portable twin, and shared memory behind the macros
// below.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../launch.h"

#ifndef LAUNCH
#define LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#define SHARED(type, name)      \
  using name##_shared_t = type; \
  __shared__ name##_shared_t name
#define DYN_SHARED(type, name)                                    \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared)
#endif

namespace absgd {
namespace gpu {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 256;  // of a block of most kernels

// The types of a kernel: S is what logits or parameters are stored in, T what they are computed in, and G what a
// gradient that is made in the forward pass is stored in (S, but float32 for float16: ops/tensors.h saved_as).
template <class S_, class G_, class T_>
struct Types {
  using S = S_;
  using G = G_;
  using T = T_;
};

// f(types)
template <class F>
void for_types(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f64:
      return f(Types<double, double, double>{});
    case Dtype::bf16:
      return f(Types<__nv_bfloat16, __nv_bfloat16, float>{});
    case Dtype::f16:
      return f(Types<__half, float, float>{});
    default:
      return f(Types<float, float, float>{});
  }
}

template <class T>
struct Tag {
  using type = T;
};
// f(Tag of the real type), for numbers that are stored as they are computed
template <class F>
void for_real(Dtype real, F f) {
  real == Dtype::f64 ? f(Tag<double>{}) : f(Tag<float>{});
}

inline const char* failure() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// ---- one value as a lane of math.h ---------------------------------------------------------------------------------

template <class T>
struct Lane {
  using V = T;
  static ABSGD_FN T set(T x) { return x; }
  static ABSGD_FN T select(bool condition, T a, T b) { return condition ? a : b; }
  static ABSGD_FN T exp(T x) { return ::exp(x); }
  static ABSGD_FN T log(T x) { return ::log(x); }
  static ABSGD_FN T log1p(T x) { return ::log1p(x); }
  static ABSGD_FN T sqrt(T x) { return ::sqrt(x); }
};
template <>
ABSGD_FN float Lane<float>::exp(float x) {
  return ::expf(x);
}
template <>
ABSGD_FN float Lane<float>::log(float x) {
  return ::logf(x);
}
template <>
ABSGD_FN float Lane<float>::log1p(float x) {
  return ::log1pf(x);
}
template <>
ABSGD_FN float Lane<float>::sqrt(float x) {
  return ::sqrtf(x);
}

// 2^x
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return ::exp2f(x);
#endif
}
// exp(x) for x <= 0: relative error below 1e-7 |x|, so what is far below 1 is less exact, and counts for as much less
// in the sum it enters.
__device__ __forceinline__ float exp_below(float x) { return exp2_fast(x * 1.44269504088896341f); }
__device__ __forceinline__ double exp_below(double x) { return ::exp(x); }

// exp(x - max) for many x <= max. In float the difference and the change of base are one instruction, 2^(x log2 e - m)
// with m = max log2 e rounded: every term then is too large by the same factor, at most 2^64, which `exact` takes out
// once. Beyond |max| = 2^30, where masks lie, that factor would leave the range; there neighbouring floats are 64 apart
// or more, so every other term is 0 in any base, and the base is 2.
template <class T>
struct Powers {
  T max;
  explicit __device__ __forceinline__ Powers(T max) : max(max) {}
  __device__ __forceinline__ T operator()(T x) const { return ::exp(x - max); }
  // What a sum of such terms is multiplied by when they become relative to a larger max.
  __device__ __forceinline__ T to(const Powers& larger) const { return ::exp(max - larger.max); }
  __device__ __forceinline__ T exact() const { return 1; }
};
template <>
struct Powers<float> {
  float max, unit, m;
  explicit __device__ __forceinline__ Powers(float max)
      : max(max), unit(::fabsf(max) < 1073741824.0f ? 1.44269504088896341f : 1.0f), m(max * unit) {}
  __device__ __forceinline__ float operator()(float x) const { return exp2_fast(::fmaf(x, unit, -m)); }
  __device__ __forceinline__ float to(const Powers& larger) const {
    return unit == larger.unit ? exp2_fast(m - larger.m) : 0.0f;
  }
  // 2^-(max unit - m), the rest of the rounding
  __device__ __forceinline__ float exact() const { return exp2_fast(-::fmaf(max, unit, -m)); }
};

// The lowest finite number: as a running maximum it never makes -inf - -inf.
__device__ __forceinline__ float lowest(float) { return -3.402823466e+38f; }
__device__ __forceinline__ double lowest(double) { return -kLargest; }

__device__ __forceinline__ float greater(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ double greater(double a, double b) { return ::fmax(a, b); }

// ---- storage -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_real(float x) { return x; }
__device__ __forceinline__ double to_real(double x) { return x; }
__device__ __forceinline__ float to_real(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_real(__half x) { return __half2float(x); }

template <class S>
__device__ __forceinline__ S to_storage(float x);
template <>
__device__ __forceinline__ float to_storage<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 to_storage<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half to_storage<__half>(float x) {
  return __float2half_rn(x);
}
template <class S>
__device__ __forceinline__ double to_storage(double x) {
  return x;
}

// Two numbers of 16 bits in a word, the first in its lower half.
template <class S>
__device__ __forceinline__ void unpack_word(unsigned word, float& first, float& second);
template <>
__device__ __forceinline__ void unpack_word<__nv_bfloat16>(unsigned word, float& first, float& second) {
  const unsigned bits[2] = {word << 16, word & 0xffff0000u};
  memcpy(&first, bits, sizeof(float));
  memcpy(&second, bits + 1, sizeof(float));
}
template <>
__device__ __forceinline__ void unpack_word<__half>(unsigned word, float& first, float& second) {
  __half2 both;
  memcpy(&both, &word, sizeof(word));
  const float2 wide = __half22float2(both);
  first = wide.x;
  second = wide.y;
}
template <class S>
__device__ __forceinline__ unsigned pack_word(float first, float second);
template <>
__device__ __forceinline__ unsigned pack_word<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  unsigned word;
  memcpy(&word, &both, sizeof(word));
  return word;
}
template <>
__device__ __forceinline__ unsigned pack_word<__half>(float first, float second) {
  const __half2 both = __floats2half2_rn(first, second);
  unsigned word;
  memcpy(&word, &both, sizeof(word));
  return word;
}

// 16 bytes, the widest access of a thread.
template <class S>
struct alignas(16) Pack {
  static constexpr int N = 16 / int(sizeof(S));
  S value[N];
};
template <class S>
__device__ __forceinline__ Pack<S> load_pack(const S* p) {
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  Pack<S> out;
  memcpy(&out, &raw, sizeof(out));
  return out;
}
template <class S>
__device__ __forceinline__ void store_pack(S* p, const Pack<S>& x) {
  uint4 raw;
  memcpy(&raw, &x, sizeof(raw));
  *reinterpret_cast<uint4*>(p) = raw;
}
// 16 bytes as they are, and the numbers in them. A bfloat16 is the upper half of a float: two of a word are two
// instructions, and back to a word one, where 16-bit values in registers of their own would take two more each.
template <class S>
__device__ __forceinline__ uint4 load_raw(const S* p) {
  return *reinterpret_cast<const uint4*>(p);
}
template <class S>
__device__ __forceinline__ void store_raw(S* p, const uint4& raw) {
  *reinterpret_cast<uint4*>(p) = raw;
}
template <class S, class T>
__device__ __forceinline__ void unpack(const uint4& raw, T (&out)[Pack<S>::N]) {
  if constexpr (sizeof(S) == 2) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) unpack_word<S>(words[w], out[2 * w], out[2 * w + 1]);
  } else {
    memcpy(out, &raw, sizeof(raw));
  }
}
template <class S, class T>
__device__ __forceinline__ uint4 pack(const T (&in)[Pack<S>::N]) {
  uint4 raw;
  if constexpr (sizeof(S) == 2)
    raw = {pack_word<S>(in[0], in[1]), pack_word<S>(in[2], in[3]), pack_word<S>(in[4], in[5]),
           pack_word<S>(in[6], in[7])};
  else
    memcpy(&raw, in, sizeof(raw));
  return raw;
}
// Elements of p before its first multiple of 16 bytes.
template <class S>
__device__ __forceinline__ int to_boundary(const S* p) {
  return int((16 - reinterpret_cast<size_t>(p) % 16) % 16 / sizeof(S));
}

__device__ __forceinline__ double read(const DeviceNumber& n) {
  return n.is_double ? *static_cast<const double*>(n.data) : double(*static_cast<const float*>(n.data));
}
__device__ __forceinline__ void write(const DeviceNumber& n, double value) {
  if (n.is_double)
    *static_cast<double*>(n.data) = value;
  else
    *static_cast<float*>(n.data) = float(value);
}

// ---- a team: the lanes of a warp that share a row, or a whole block ------------------------------------------------

// `width` neighbouring lanes of a warp, a power of two.
struct WarpTeam {
  int lane, width;

  template <class T>
  __device__ __forceinline__ T max(T x) const {
    for (int o = width / 2; o > 0; o /= 2) x = greater(x, __shfl_xor_sync(kAll, x, o));
    return x;
  }
  template <class T>
  __device__ __forceinline__ T sum(T x) const {
    for (int o = width / 2; o > 0; o /= 2) x += __shfl_xor_sync(kAll, x, o);
    return x;
  }
};

// All threads of a block, whole warps. Every thread gets the result, in the same order of summation on every run.
struct BlockTeam {
  int lane, width;
  static __device__ __forceinline__ BlockTeam here() { return {int(threadIdx.x), int(blockDim.x)}; }

  template <class T>
  __device__ __forceinline__ T max(T x) const {
    return over_warps(WarpTeam{lane % kWarp, kWarp}.max(x), [](T a, T b) { return greater(a, b); });
  }
  template <class T>
  __device__ __forceinline__ T sum(T x) const {
    return over_warps(WarpTeam{lane % kWarp, kWarp}.sum(x), [](T a, T b) { return a + b; });
  }

 private:
  template <class T, class F>
  __device__ __forceinline__ T over_warps(T x, F combine) const {
    SHARED(T[kWarp], partial);
    if (lane % kWarp == 0) partial[lane / kWarp] = x;
    __syncthreads();
    T out = partial[0];
    for (int w = 1; w < width / kWarp; ++w) out = combine(out, partial[w]);
    __syncthreads();  // the next reduction writes `partial` again
    return out;
  }
};

// ---- the last block of a launch ------------------------------------------------------------------------------------

// True, in all threads, of the one block that comes last: it sees what all others wrote, with plain loads, which the
// fences order behind the stores (and which unlike the volatile __ldcg a compiler may have under way together).
// `ticket` is zero before the launch and after it, because atomicInc wraps at the number of blocks.
__device__ __forceinline__ bool is_last_block(unsigned* ticket) {
  SHARED(bool[1], last);
  __syncthreads();  // all writes of this block come before thread 0's fence
  if (threadIdx.x == 0) {
    __threadfence();
    last[0] = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last[0];
}

// ---- what launchers have on the host -------------------------------------------------------------------------------

// While any stream is captured memory can be had in relaxed mode only.
struct Relaxed {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  Relaxed(const Relaxed&) = delete;
};

// A ticket that no launch which may run at the same time uses (tickets.cu): the stream's, whose launches follow each
// other, or, of a captured launch, its own. Null: failure() has the reason.
unsigned* ticket_for(cudaStream_t stream);

}  // namespace gpu
}  // namespace absgd
