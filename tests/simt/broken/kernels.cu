// Small kernels of the usual kinds, right for Bug::none and otherwise with one bug each: what a checker must catch.
// run(kernel, bug) launches one and compares with a plain loop: 0 = right, 1 = wrong, 2 = the launch failed.
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "tile.cuh"

// clang-format off
enum class Bug {
  none,
  // block
  missing_barrier, missing_loop_barrier, divergent_barrier, early_return, late_return, uninitialised_shared,
  past_static_shared, past_dynamic_shared, too_much_static_shared,
  // warp
  own_lane_not_in_mask, lanes_missing, lane_returned, other_intrinsic, reads_lane_not_in_mask, wrong_width, odd_width,
  missing_syncwarp, wrong_half, shuffle_as_fence,
  // grid
  no_fence, block_fence, no_acquire, no_barrier_before_fence, late_fence, leader_fence, counter_not_reset,
  plain_counter, stale_cache, spin, overlapping_blocks, plain_increment,
  // memory
  off_by_one, one_short, misaligned, misaligned_shared,
  // launch
  large_block, zero_grid, much_shared, no_opt_in, many_parameters,
};
// clang-format on

// Memory that host and device see, of exactly the size asked for
template <class T>
struct Buffer {
  T* data = nullptr;
  int n;
  explicit Buffer(int n) : n(n) {
    cudaHostAlloc(reinterpret_cast<void**>(&data), n * sizeof(T), 0);
    memset(static_cast<void*>(data), 0, n * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFreeHost(data); }
  T& operator[](int i) { return data[i]; }
};

float value(int i) { return static_cast<float>((i * 37 + 11) % 64) - 31.5f; }  // sums of these are exact in float

int verdict(bool right) {
  cudaDeviceSynchronize();
  return cudaGetLastError() != cudaSuccess ? 2 : right ? 0 : 1;
}

// ---- Rows: a block reduces one row after another -------------------------------------------------------------------

template <Bug bug>
__device__ __forceinline__ float block_sum(float v) {
  SHARED(float[32], s);
  const unsigned warps = blockDim.x / 32;
  if (bug == Bug::own_lane_not_in_mask) {
    v += __shfl_xor_sync(0x0000ffffu, v, 8);
  } else if (bug == Bug::lanes_missing) {
    if (lane() < 16) v += __shfl_xor_sync(kAll, v, 8);
  } else if (bug == Bug::other_intrinsic) {
    if (lane() < 16)
      v += __shfl_xor_sync(kAll, v, 8);
    else
      v += static_cast<float>(__ballot_sync(kAll, v > 0));
  } else if (bug == Bug::reads_lane_not_in_mask) {
    if (lane() < 16) v += __shfl_down_sync(0x0000ffffu, v, 8);
  } else if (bug == Bug::wrong_width) {
    for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(kAll, v, offset, 16);
  } else if (bug == Bug::odd_width) {
    for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(kAll, v, offset, 24);
  } else {
    v = warp_sum(v);
  }
  if (lane() == 0) s[warp()] = v;
  if (bug == Bug::divergent_barrier) {
    if (warp() == 0)
      __syncthreads();
    else
      __syncthreads();
  } else if (bug != Bug::missing_barrier) {
    __syncthreads();
  }
  const bool mine = bug == Bug::uninitialised_shared || lane() < warps;
  const float total = warp_sum(mine ? s[bug == Bug::past_static_shared ? lane() + 25 : lane()] : 0.f);
  if (bug != Bug::missing_loop_barrier) __syncthreads();
  return total;
}

template <Bug bug>
__global__ void __launch_bounds__(256)
    sum_rows_kernel(const float* __restrict__ in, float* out, int rows, int columns) {
  if (bug == Bug::early_return && threadIdx.x >= 200) return;
  if (bug == Bug::lane_returned && threadIdx.x == 77) return;
  if (bug == Bug::too_much_static_shared) {
    SHARED(float[13000], s);
    s[threadIdx.x] = 0;
  }
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    float v = 0;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) v += in[row * columns + i];
    v = block_sum<bug>(v);
    if (bug == Bug::late_return && threadIdx.x >= 224) return;
    if (threadIdx.x == 0) out[row] = v;
  }
}

template <Bug bug>
int sum_rows() {
  constexpr int rows = 7, columns = 1000;
  Buffer<float> in(rows * columns), out(rows);
  for (int i = 0; i < in.n; ++i) in[i] = value(i);
  LAUNCH((sum_rows_kernel<bug>), bug == Bug::zero_grid ? 0 : 3, bug == Bug::large_block ? 1056 : 256, 0, 0, in.data,
         out.data, rows, columns);
  const int failed = verdict(true);
  bool right = true;
  for (int r = 0; r < rows; ++r) {
    float sum = 0;
    for (int i = 0; i < columns; ++i) sum += in[r * columns + i];
    right &= out[r] == sum;
  }
  return failed ? failed : verdict(right);
}

// fmaxf swallows NaN, so only a large poison shows what was never written.
template <Bug bug>
__global__ void max_rows_kernel(const float* in, float* out, int columns) {
  SHARED(float[32], s);
  float v = -INFINITY;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) v = fmaxf(v, in[blockIdx.x * columns + i]);
  v = warp_max(v);
  if (lane() == 0) s[warp()] = v;
  __syncthreads();
  const bool mine = bug == Bug::uninitialised_shared || lane() < blockDim.x / 32;
  v = warp_max(mine ? s[lane()] : -INFINITY);
  if (threadIdx.x == 0) out[blockIdx.x] = v;
}

template <Bug bug>
int max_rows() {
  constexpr int rows = 3, columns = 500;
  Buffer<float> in(rows * columns), out(rows);
  for (int i = 0; i < in.n; ++i) in[i] = value(i);
  LAUNCH((max_rows_kernel<bug>), rows, 128, 0, 0, in.data, out.data, columns);
  const int failed = verdict(true);
  bool right = true;
  for (int r = 0; r < rows; ++r) right &= out[r] == *std::max_element(&in[r * columns], &in[r * columns] + columns);
  return failed ? failed : verdict(right);
}

// ---- Total: the last block to finish adds up what all have left ---------------------------------------------------

static __device__ unsigned finished[64];  // of each Bug: some leave it as it should not be

template <Bug bug>
__global__ void total_kernel(const float* in, float* partial, float* out, int n) {
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += in[i];
  v = block_sum<Bug::none>(v);
  // Not thread 0, so that a barrier has to stand before its fence
  if (threadIdx.x == 32) partial[blockIdx.x] = v;
  if (bug != Bug::no_barrier_before_fence) __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    if (bug == Bug::block_fence)
      __threadfence_block();
    else if (bug != Bug::no_fence)
      __threadfence();
    if (bug == Bug::plain_counter)
      last = finished[int(bug)]++ == gridDim.x - 1;
    else
      last = atomicAdd(&finished[int(bug)], 1) == gridDim.x - 1;
    if (bug == Bug::spin) {
      while (atomicAdd(&finished[int(bug)], 0) < gridDim.x) {
      }
    }
    if (bug != Bug::no_acquire) __threadfence();
  }
  if (!__syncthreads_or(last)) return;
  v = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x)
    v += bug == Bug::stale_cache ? __ldg(partial + i) : partial[i];
  v = block_sum<Bug::none>(v);
  if (threadIdx.x == 0) {
    *out = v;
    if (bug != Bug::counter_not_reset) finished[int(bug)] = 0;
  }
}

template <Bug bug>
int total() {
  constexpr int n = 5000, blocks = 10;
  Buffer<float> in(n), partial(blocks), out(2);
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += in[i] = value(i);
  for (int i = 0; i < 2; ++i) LAUNCH((total_kernel<bug>), blocks, 96, 0, 0, in.data, partial.data, out.data + i, n);
  const int failed = verdict(true);
  return failed ? failed : verdict(out[0] == sum && out[1] == sum);
}

// The same with atomics that add up, a counter that wraps by itself, and fences by all threads on either side: each
// fences its own writes, so the barrier may come after that.
static __device__ unsigned long long tallied[64];

template <Bug bug>
__global__ void tally_kernel(const int* in, int* doubled, long long* out, int n) {
  SHARED(bool, last);
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    doubled[i] = 2 * in[i];
    atomicAdd(&tallied[int(bug)], static_cast<unsigned long long>(in[i]));
  }
  if (bug != Bug::late_fence && (bug != Bug::leader_fence || threadIdx.x == 0)) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(&finished[int(bug)], gridDim.x - 1) == gridDim.x - 1;
  if (bug == Bug::late_fence) __threadfence();
  __syncthreads();
  if (!last) return;
  if (bug != Bug::no_acquire) __threadfence();
  int v = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) v += doubled[i];
  v = warp_sum(v);
  if (threadIdx.x == 0) {  // one warp
    *out = v - static_cast<long long>(tallied[int(bug)]);
    tallied[int(bug)] = 0;
  }
}

template <Bug bug>
int tally() {
  Buffer<int> in(900), doubled(in.n);
  Buffer<long long> out(2);
  long long sum = 0;
  for (int i = 0; i < in.n; ++i) sum += in[i] = i % 17;
  for (int i = 0; i < 2; ++i) LAUNCH((tally_kernel<bug>), 5, 32, 0, 0, in.data, doubled.data, out.data + i, in.n);
  const int failed = verdict(true);
  return failed ? failed : verdict(out[0] == sum && out[1] == sum);
}

// The same with a release by every warp, at a counter in shared memory, and nothing but warps: "last warp done".
template <Bug bug>
__global__ void last_warp_kernel(const float* in, float* out) {
  SHARED(unsigned, count);
  SHARED(float[256], s);
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  s[threadIdx.x] = in[blockIdx.x * 256 + threadIdx.x];
  __syncwarp();
  unsigned before = 0;
  if (lane() == 0) {
    if (bug != Bug::no_fence) __threadfence_block();
    before = atomicAdd(&count, 1);
    if (bug != Bug::no_acquire) __threadfence_block();
  }
  __syncwarp();
  if (__shfl_sync(kAll, before, 0) != 7) return;
  float v = 0;
  for (int i = lane(); i < 256; i += 32) v += s[i];
  v = warp_sum(v);
  if (lane() == 0) out[blockIdx.x] = v;
}

template <Bug bug>
int last_warp() {
  Buffer<float> in(3 * 256), out(3);
  for (int i = 0; i < in.n; ++i) in[i] = value(i);
  LAUNCH((last_warp_kernel<bug>), 3, 256, 0, 0, in.data, out.data);
  const int failed = verdict(true);
  bool right = true;
  for (int b = 0; b < 3; ++b) {
    float sum = 0;
    for (int i = 0; i < 256; ++i) sum += in[b * 256 + i];
    right &= out[b] == sum;
  }
  return failed ? failed : verdict(right);
}

// ---- Reverse: tiles of 16-byte accesses through dynamic shared memory ---------------------------------------------

template <Bug bug>
__global__ void reverse_kernel(const float* __restrict__ in, float* __restrict__ out, int n) {
  DYN_SHARED(float4, tile);
  const int vectors = n / 4, first = blockIdx.x * blockDim.x, i = first + threadIdx.x;
  const int size = min(static_cast<int>(blockDim.x), vectors - first);
  const float* source = bug == Bug::misaligned ? in + 1 : in;
  const int shift = bug == Bug::past_dynamic_shared;
  if (i < vectors + (bug == Bug::off_by_one)) tile[threadIdx.x + shift] = reinterpret_cast<const float4*>(source)[i];
  if (bug != Bug::missing_barrier) __syncthreads();
  const float4* from = tile + shift;
  if (bug == Bug::misaligned_shared) from = reinterpret_cast<const float4*>(reinterpret_cast<const float*>(tile) + 2);
  if (static_cast<int>(threadIdx.x) < size) {
    const float4 v = from[size - 1 - threadIdx.x];
    reinterpret_cast<float4*>(out)[vectors - first - size + threadIdx.x] = make_float4(v.w, v.z, v.y, v.x);
  }
}

template <Bug bug>
int reverse() {
  constexpr int n = 4 * 300, block = 128;
  Buffer<float> in(n), out(n);
  for (int i = 0; i < n; ++i) in[i] = value(i);
  const size_t bytes = bug == Bug::much_shared ? 232464 : bug == Bug::no_opt_in ? 65536 : block * sizeof(float4);
  if (bug == Bug::much_shared)
    cudaFuncSetAttribute(reinterpret_cast<const void*>(&reverse_kernel<bug>),
                         cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  LAUNCH((reverse_kernel<bug>), (n / 4 + block - 1) / block, block, bytes, 0, in.data, out.data, n);
  const int failed = verdict(true);
  return failed ? failed : verdict(std::equal(in.data, in.data + n, std::reverse_iterator<float*>(out.data + n)));
}

// ---- Step: a list of tensors in the kernel's parameters, in chunks ------------------------------------------------

struct Step {
  static constexpr int kTensors = 100, kChunk = 256;
  float* p[kTensors];
  const float* g[kTensors];
  int n[kTensors], first_chunk[kTensors + 1];
  int tensors;
  float lr;
};

template <Bug bug>
__global__ void __launch_bounds__(128) step_kernel(const Step __grid_constant__ a) {
  int t = 0;
  while (a.first_chunk[t + 1] <= static_cast<int>(blockIdx.x)) ++t;
  const int begin = (blockIdx.x - a.first_chunk[t]) * Step::kChunk;
  const int end = min(a.n[t], begin + Step::kChunk + (bug == Bug::overlapping_blocks) - (bug == Bug::one_short));
  for (int i = begin + threadIdx.x; i < end + (bug == Bug::off_by_one && end == a.n[t]); i += blockDim.x)
    a.p[t][i] -= a.lr * a.g[t][i];
}

struct Large : Step {
  char more[32768];
};

template <Bug bug>
__global__ void large_kernel(Large) {}

template <Bug bug>
int step() {
  constexpr int sizes[] = {1, 1000, 256, 255, 513};
  std::vector<Buffer<float>*> p, g;
  Step a = {};
  for (int n : sizes) {
    p.push_back(new Buffer<float>(n)), g.push_back(new Buffer<float>(n));
    for (int i = 0; i < n; ++i) (*p.back())[i] = value(i), (*g.back())[i] = value(i + 5);
    a.p[a.tensors] = p.back()->data, a.g[a.tensors] = g.back()->data, a.n[a.tensors] = n;
    a.first_chunk[a.tensors + 1] = a.first_chunk[a.tensors] + (n + Step::kChunk - 1) / Step::kChunk;
    ++a.tensors;
  }
  a.lr = 0.5f;
  LAUNCH((step_kernel<bug>), a.first_chunk[a.tensors], 128, 0, 0, a);
#ifndef __CUDACC__  // the compiler of CUDA refuses it
  if (bug == Bug::many_parameters) LAUNCH((large_kernel<bug>), 1, 32, 0, 0, Large());
#endif
  const int failed = verdict(true);
  bool right = true;
  for (int t = 0; t < a.tensors; ++t) {
    for (int i = 0; i < a.n[t]; ++i) right &= (*p[t])[i] == value(i) - 0.5f * value(i + 5);
    delete p[t], delete g[t];
  }
  return failed ? failed : verdict(right);
}

// ---- Turn: lanes of a warp trade places through shared memory; the lower half once more ---------------------------

template <Bug bug>
__global__ void turn_kernel(float* x) {
  SHARED(float[4][32], s);
  float v = x[blockIdx.x * blockDim.x + threadIdx.x];
  s[warp()][lane()] = v;
  if (bug == Bug::shuffle_as_fence)
    __shfl_sync(kAll, v, 0);
  else if (bug != Bug::missing_syncwarp)
    __syncwarp();
  v = s[warp()][31 - lane()];
  __syncwarp();
  if (lane() < 16) {
    s[warp()][lane()] = v;
    __syncwarp(bug == Bug::wrong_half ? 1u << lane() : 0x0000ffffu);
    v = s[warp()][15 - lane()];
  }
  x[blockIdx.x * blockDim.x + threadIdx.x] = v;
}

template <Bug bug>
int turn() {
  Buffer<float> x(5 * 128);
  for (int i = 0; i < x.n; ++i) x[i] = static_cast<float>(i);
  LAUNCH((turn_kernel<bug>), 5, 128, 0, 0, x.data);
  const int failed = verdict(true);
  bool right = true;
  for (int i = 0; i < x.n; ++i)
    right &= x[i] == static_cast<float>(i / 32 * 32 + (i % 32 < 16 ? 16 + i % 32 : 31 - i % 32));
  return failed ? failed : verdict(right);
}

// ---- Histogram: bins in shared memory, then in global memory ------------------------------------------------------

template <Bug bug>
__global__ void histogram_kernel(const int* labels, unsigned* bins, int n) {
  SHARED(unsigned[10], s);
  if (threadIdx.x < 10) s[threadIdx.x] = 0;
  if (bug != Bug::missing_barrier) __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    if (bug == Bug::plain_increment)
      ++s[labels[i]];
    else
      atomicAdd(&s[labels[i]], 1);
  }
  __syncthreads();
  if (threadIdx.x < 10) {
    if (bug == Bug::overlapping_blocks)
      bins[threadIdx.x] += s[threadIdx.x];
    else
      atomicAdd(&bins[threadIdx.x], s[threadIdx.x]);
  }
}

template <Bug bug>
int histogram() {
  Buffer<int> labels(1000);
  Buffer<unsigned> bins(10);
  unsigned exact[10] = {};
  for (int i = 0; i < labels.n; ++i) ++exact[labels[i] = i * i % 10];
  LAUNCH((histogram_kernel<bug>), 4, 64, 0, 0, labels.data, bins.data, labels.n);
  const int failed = verdict(true);
  return failed ? failed : verdict(std::equal(exact, exact + 10, bins.data));
}

// ---- Halve: bfloat16, eight to an access, the rest one by one -----------------------------------------------------

template <Bug bug>
__global__ void halve_kernel(__nv_bfloat16* x, int n) {
  const int i = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
  if (i + 8 <= n) {
    struct alignas(16) Eight {
      __nv_bfloat16 v[8];
    };
    Eight eight = *reinterpret_cast<const Eight*>(x + i);
    for (__nv_bfloat16& v : eight.v) v = __float2bfloat16_rn(__bfloat162float(v) / 2);
    *reinterpret_cast<Eight*>(x + i) = eight;
  }
  const int tail = n / 8 * 8 - (bug == Bug::overlapping_blocks) + i / 8;
  if (tail < n) x[tail] = __float2bfloat16_rn(__bfloat162float(x[tail]) / 2);
}

template <Bug bug>
int halve() {
  Buffer<__nv_bfloat16> x(8 * 64 + 5);
  for (int i = 0; i < x.n; ++i) x[i] = __float2bfloat16_rn(value(i));
  LAUNCH((halve_kernel<bug>), 2, 32, 0, 0, x.data, x.n);
  const int failed = verdict(true);
  bool right = true;
  for (int i = 0; i < x.n; ++i) right &= __bfloat162float(x[i]) == value(i) / 2;
  return failed ? failed : verdict(right);
}

// ---- Words: what each primitive returns ---------------------------------------------------------------------------

struct Words {
  int up, down, index, exclusive, up8, down8, exclusive8;
  double wide;
  unsigned ballot;
  int any, all, sync_or, sync_and, sync_count;
};

template <Bug>
__global__ void words_kernel(Words* out, unsigned long long* sum, unsigned* wrapped, int* most, float* total,
                             int* taken) {
  const int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int v = 100 * block + t;
  Words w;
  w.up = __shfl_up_sync(kAll, v, 3);
  w.down = __shfl_down_sync(kAll, v, 3);
  w.index = __shfl_sync(kAll, v, t * 5);
  w.exclusive = __shfl_xor_sync(kAll, v, 9);
  w.up8 = __shfl_up_sync(kAll, v, 3, 8);
  w.down8 = __shfl_down_sync(kAll, v, 3, 8);
  w.exclusive8 = __shfl_xor_sync(kAll, v, 9, 8);
  w.wide = __shfl_sync(kAll, 1.0 / (1 + v), 7);
  w.ballot = __ballot_sync(kAll, t % 3 == 0);
  w.any = __any_sync(kAll, t == 40);
  w.all = __all_sync(kAll, t >= 32);
  w.sync_or = __syncthreads_or(v == 140);
  w.sync_and = __syncthreads_and(v != 140);
  w.sync_count = __syncthreads_count(t % 7 == 0);
  out[64 * block + t] = w;
  atomicAdd(sum, 1ull << 33);
  atomicInc(wrapped, 4);
  atomicMax(most, v);
  atomicAdd(total, 0.5f);
  if (atomicCAS(taken, 0, 1) == 0) atomicExch(taken + 1, 7);
}

template <Bug bug>
int words() {
  Buffer<Words> out(6 * 64);
  Buffer<unsigned long long> sum(1);
  Buffer<unsigned> wrapped(1);
  Buffer<int> most(1), taken(2);
  Buffer<float> total(1);
  LAUNCH((words_kernel<bug>), dim3(3, 1, 2), dim3(4, 8, 2), 0, 0, out.data, sum.data, wrapped.data, most.data,
         total.data, taken.data);
  const int failed = verdict(true);
  bool right = sum[0] == 384ull << 33 && wrapped[0] == 384 % 5 && most[0] == 563 && total[0] == 192 && taken[1] == 7;
  for (int block = 0; block < 6; ++block) {
    for (int t = 0; t < 64; ++t) {
      const Words& w = out[64 * block + t];
      const int l = t % 32, first = 100 * block + t - l, v = first + l, eight = v - l % 8;
      right &= w.up == (l < 3 ? v : v - 3) && w.down == (l > 28 ? v : v + 3) && w.index == first + t * 5 % 32;
      right &= w.exclusive == first + (l ^ 9) && w.up8 == (l % 8 < 3 ? v : v - 3) && w.down8 == (l % 8 > 4 ? v : v + 3);
      right &= w.exclusive8 == ((l ^ 9) < l / 8 * 8 + 8 ? first + (l ^ 9) : v) && w.wide == 1.0 / (1 + first + 7);
      right &= w.ballot == (t < 32 ? 0x49249249u : 0x92492492u) && w.any == (t >= 32) && w.all == (t >= 32);
      right &= w.sync_or == (block == 1) && w.sync_and == (block != 1) && w.sync_count == 10 && eight >= 0;
    }
  }
  return failed ? failed : verdict(right);
}

// ---- All of them --------------------------------------------------------------------------------------------------

struct Case {
  const char *kernel, *bug;
  int (*run)();
};
#define CASE(kernel, bug) {#kernel, #bug, kernel<Bug::bug>}
// clang-format off
const Case kCases[] = {
  CASE(sum_rows, none), CASE(max_rows, none), CASE(total, none), CASE(tally, none), CASE(last_warp, none),
  CASE(reverse, none), CASE(step, none), CASE(turn, none), CASE(histogram, none), CASE(halve, none), CASE(words, none),
#ifndef ONLY_RIGHT
  CASE(sum_rows, missing_barrier), CASE(sum_rows, missing_loop_barrier), CASE(sum_rows, divergent_barrier),
  CASE(sum_rows, early_return), CASE(sum_rows, late_return), CASE(sum_rows, uninitialised_shared),
  CASE(sum_rows, past_static_shared), CASE(sum_rows, too_much_static_shared), CASE(sum_rows, own_lane_not_in_mask),
  CASE(sum_rows, lanes_missing), CASE(sum_rows, lane_returned), CASE(sum_rows, other_intrinsic),
  CASE(sum_rows, reads_lane_not_in_mask), CASE(sum_rows, wrong_width), CASE(sum_rows, odd_width),
  CASE(sum_rows, large_block), CASE(sum_rows, zero_grid), CASE(max_rows, uninitialised_shared),
  CASE(total, no_fence), CASE(total, block_fence), CASE(total, no_acquire), CASE(total, no_barrier_before_fence),
  CASE(total, counter_not_reset), CASE(total, plain_counter), CASE(total, stale_cache), CASE(total, spin),
  CASE(tally, late_fence), CASE(tally, leader_fence), CASE(tally, no_acquire),
  CASE(last_warp, no_fence), CASE(last_warp, no_acquire),
  CASE(reverse, missing_barrier), CASE(reverse, off_by_one), CASE(reverse, misaligned),
  CASE(reverse, misaligned_shared), CASE(reverse, past_dynamic_shared), CASE(reverse, much_shared),
  CASE(reverse, no_opt_in),
  CASE(step, overlapping_blocks), CASE(step, one_short), CASE(step, off_by_one), CASE(step, many_parameters),
  CASE(turn, missing_syncwarp), CASE(turn, shuffle_as_fence), CASE(turn, wrong_half),
  CASE(histogram, missing_barrier), CASE(histogram, plain_increment), CASE(histogram, overlapping_blocks),
  CASE(halve, overlapping_blocks),
#endif
};
// clang-format on

#define API extern "C" __attribute__((visibility("default")))

API int run(const char* kernel, const char* bug) {
  for (const Case& c : kCases)
    if (!strcmp(c.kernel, kernel) && !strcmp(c.bug, bug)) return c.run();
  return -1;
}

API const char* case_name(int i) {  // "kernel bug", null after the last
  static char name[100];
  if (i >= static_cast<int>(sizeof kCases / sizeof *kCases)) return nullptr;
  strcat(strcat(strcpy(name, kCases[i].kernel), " "), kCases[i].bug);
  return name;
}
