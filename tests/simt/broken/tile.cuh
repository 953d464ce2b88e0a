// The few primitives that the kernels beside this file are made of, as CUDA; a host shim predefines the macros.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

template <class T>
struct Type {
  using type = T;
};

#ifndef LAUNCH
#define LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#define SHARED(type_, name) __shared__ typename Type<type_>::type name
#define DYN_SHARED(type, name)                            \
  extern __shared__ __align__(16) unsigned char memory[]; \
  type* name = reinterpret_cast<type*>(memory)
#endif

constexpr unsigned kAll = 0xffffffffu;

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(kAll, v, offset);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kAll, v, offset));
  return v;
}

__device__ __forceinline__ unsigned lane() { return threadIdx.x % 32; }
__device__ __forceinline__ unsigned warp() { return threadIdx.x / 32; }
