// The building blocks of all CUDA kernels: launches, reductions over warps and blocks, 16-byte accesses, the lane type
// of math.h, and the pattern by which the last block of a launch finishes the work of all blocks.
//
// The style is plain CUDA C++ on purpose. The same files compile for the host, where a test runs every thread as a
// fiber (tests/simt). So PTX stands behind __CUDA_ARCH__ with a portable twin beside it, and shared memory stands
// behind the macros below.
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
constexpr int kThreads = 256;  // threads of a block, in most kernels

// The types of a kernel. Logits or parameters are stored in S and computed in T. A gradient that the forward pass makes
// is stored in G, which is S, but float32 for float16 (ops/tensors.h saved_as).
template <class S_, class G_, class T_>
struct Types {
  using S = S_;
  using G = G_;
  using T = T_;
};

// Calls f with the Types of a dtype.
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
// Calls f with the Tag of the real type, for numbers that are stored in the type they are computed in.
template <class F>
void for_real(Dtype real, F f) {
  real == Dtype::f64 ? f(Tag<double>{}) : f(Tag<float>{});
}

// Null, or CUDA's text for the last error of this thread, which is thereby cleared.
inline const char* failure() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// ---- the lane type of one value (math/base.h) ----------------------------------------------------------------------

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
// exp(x) for x <= 0. The relative error is below 1e-7 |x|. So a result far below 1 is less exact, but it also counts
// for less in the sum that it enters.
__device__ __forceinline__ float exp_below(float x) { return exp2_fast(x * 1.44269504088896341f); }
__device__ __forceinline__ double exp_below(double x) { return ::exp(x); }

// exp(x - max) for many x <= max. In float the difference and the change of base are one instruction: 2^(x log2 e - m),
// where m is max log2 e, rounded. This rounding makes every term too large by the same factor, at most 2^64. `exact`
// is that factor's inverse, and the sum is multiplied by it once. Beyond |max| = 2^30, where the values of masks lie,
// the factor would leave the range. There neighbouring floats are at least 64 apart, so every other term is 0 in any
// base, and the base is 2.
template <class T>
struct Powers {
  T max;
  explicit __device__ __forceinline__ Powers(T max) : max(max) {}
  __device__ __forceinline__ T operator()(T x) const { return ::exp(x - max); }
  // The factor that makes a sum of such terms relative to a larger max.
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
  // 2^-(max unit - m), which takes out the rounding of m
  __device__ __forceinline__ float exact() const { return exp2_fast(-::fmaf(max, unit, -m)); }
};

// The lowest finite number. A running maximum starts with it, because -inf would make -inf - -inf = NaN.
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

// Two 16-bit numbers in a word, the first in its lower half.
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

// A pack: 16 bytes, the widest access of a thread.
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
// A pack as raw 16 bytes, and the conversions to and from its numbers. A bfloat16 is the upper half of a float, so two
// instructions unpack the two numbers of a word, and one packs them again. 16-bit values in registers of their own
// would take two more instructions each.
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
// The number of elements from p up to the next multiple of 16 bytes.
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

// `width` neighbouring lanes of a warp; width is a power of two.
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

// All threads of a block, which has whole warps. Every thread gets the result. The order of summation is the same on
// every run.
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
    __syncthreads();  // The next reduction writes `partial` again.
    return out;
  }
};

// ---- the last block of a launch ------------------------------------------------------------------------------------

// Returns true in all threads of the block that comes last, and false in those of all other blocks. The last block may
// read whatever the others wrote, with plain loads: the fences order these loads behind the stores. (Unlike the
// volatile
// __ldcg, several plain loads can be under way at once.)
//     1. All threads of the block have made their stores.
//     2. Thread 0 makes them visible to the device, and counts its block in `ticket`.
//     3. The block that counts last is the last block.
// `ticket` is zero before the launch and after it, because atomicInc wraps at the number of blocks.
__device__ __forceinline__ bool is_last_block(unsigned* ticket) {
  SHARED(bool[1], last);
  __syncthreads();  // All writes of this block come before the fence of thread 0.
  if (threadIdx.x == 0) {
    __threadfence();
    last[0] = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last[0];
}

// ---- for the launchers, on the host --------------------------------------------------------------------------------

// Switches this thread to the relaxed capture mode. While any stream is captured, memory can be allocated in no other.
struct Relaxed {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  Relaxed(const Relaxed&) = delete;
};

// A ticket for is_last_block that no other launch uses at the same time (tickets.cu). All launches of a stream share
// one, because they follow each other. A captured launch has its own. Null if there is no memory; failure() has the
// reason.
unsigned* ticket_for(cudaStream_t stream);

}  // namespace gpu
}  // namespace absgd
