// The momentum step over many tensors: one launch, because the table of tensors travels in the kernel's argument (32 KB
// since CUDA 12.1). The formula is math.h sgd_update.
#include "tile.cuh"

namespace absgd {
namespace gpu {
namespace {

constexpr int kThreads = 256;
// Elements of one block: 2048 float32 numbers fill the chip with a model of half a million parameters (227 blocks).
template <class T>
constexpr int kChunk = kThreads * 2 * Pack<T>::N;
constexpr int kGroups = 16;
constexpr int kFew = 128, kMany = 900;       // tensors of a launch: what need not travel is left at home
constexpr int64_t kMost = int64_t(1) << 31;  // elements of one entry; a larger tensor takes several

template <int kTensors>
struct Launch {
  void* param[kTensors];
  void* grad[kTensors];
  void* buffer[kTensors];
  unsigned count[kTensors];
  unsigned first_block[kTensors];
  unsigned char group[kTensors];
  StepGroup groups[kGroups];
  const float *grad_scale, *found_inf;
  int tensors;
};
static_assert(sizeof(Launch<kMany>) <= 32764, "the limit of a kernel's arguments");

// Elements first, first + stride, ... below end.
template <SgdForm form, class T>
__device__ __forceinline__ void update_apart(T* w, T* g, T* v, int64_t first, int64_t end, int stride,
                                             const SgdNumbers<Lane<T>>& n, T divisor, bool divides) {
  for (int64_t i = first; i < end; i += stride) {
    T grad = g[i];
    if (divides) g[i] = grad = grad / divisor;
    T weight = w[i], buffer = form == SgdForm::plain ? T(0) : v[i];
    sgd_update<form, Lane<T>>(weight, buffer, grad, n);
    w[i] = weight;
    if (form != SgdForm::plain) v[i] = buffer;
  }
}

template <SgdForm form, class T>
__device__ __forceinline__ void update(T* w, T* g, T* v, int64_t begin, int64_t end, const SgdNumbers<Lane<T>>& n,
                                       T divisor, bool divides) {
  constexpr int N = Pack<T>::N;
  const size_t places = reinterpret_cast<size_t>(w) | reinterpret_cast<size_t>(g) |
                        (form == SgdForm::plain ? 0 : reinterpret_cast<size_t>(v));
  if (places % 16 != 0)  // begin is a multiple of N
    return update_apart<form>(w, g, v, begin + threadIdx.x, end, kThreads, n, divisor, divides);
  const int64_t whole = begin + (end - begin) / N * N;
  constexpr int kEach = kChunk<T> / kThreads / N;  // packs of this thread
  Pack<T> weight[kEach], grad[kEach], buffer[kEach];
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    const int64_t i = begin + (u * kThreads + int(threadIdx.x)) * N;
    if (i >= whole) continue;
    weight[u] = load_pack(w + i);
    grad[u] = load_pack(g + i);
    if (form != SgdForm::plain) buffer[u] = load_pack(v + i);
  }
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    const int64_t i = begin + (u * kThreads + int(threadIdx.x)) * N;
    if (i >= whole) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (divides) grad[u].value[j] /= divisor;
      T unused = 0;
      sgd_update<form, Lane<T>>(weight[u].value[j], form == SgdForm::plain ? unused : buffer[u].value[j],
                                grad[u].value[j], n);
    }
    store_pack(w + i, weight[u]);
    if (form != SgdForm::plain) store_pack(v + i, buffer[u]);
    if (divides) store_pack(g + i, grad[u]);
  }
  update_apart<form>(w, g, v, whole + threadIdx.x, end, kThreads, n, divisor, divides);
}

template <class T, int kTensors>
__global__ void __launch_bounds__(kThreads, 4) sgd_step_kernel(const Launch<kTensors> __grid_constant__ a) {
  if (a.found_inf != nullptr && *a.found_inf != 0) return;  // the step never was
  int low = 0, high = a.tensors - 1;                        // the last tensor that starts at or before this block
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (a.first_block[middle] <= blockIdx.x)
      low = middle;
    else
      high = middle - 1;
  }
  const StepGroup& group = a.groups[a.group[low]];
  const int64_t count = a.count[low], begin = int64_t(blockIdx.x - a.first_block[low]) * kChunk<T>;
  const int64_t end = begin + kChunk<T> < count ? begin + kChunk<T> : count;
  const double lr = group.lr_tensor.data != nullptr ? read(group.lr_tensor) : group.lr;
  const auto n = SgdNumbers<Lane<T>>::template of<T>(group, lr);
  const bool divides = a.grad_scale != nullptr;
  const T divisor = divides ? T(*a.grad_scale) : T(1);
  T *w = static_cast<T*>(a.param[low]), *g = static_cast<T*>(a.grad[low]), *v = static_cast<T*>(a.buffer[low]);
  if (group.momentum == 0) return update<SgdForm::plain, T>(w, g, v, begin, end, n, divisor, divides);
  if (group.heavy_ball) return update<SgdForm::heavy_ball, T>(w, g, v, begin, end, n, divisor, divides);
  if (group.nesterov) return update<SgdForm::nesterov, T>(w, g, v, begin, end, n, divisor, divides);
  update<SgdForm::momentum, T>(w, g, v, begin, end, n, divisor, divides);
}

// Fills launches with the tensors of type T and starts each when it is full.
template <class T, int kTensors>
struct Filler {
  const StepTable& table;
  cudaStream_t stream;
  Launch<kTensors> now;
  unsigned blocks = 0;
  int groups = 0, last_group = -1;

  Filler(const StepTable& table, cudaStream_t stream) : table(table), stream(stream) {
    now.grad_scale = table.grad_scale;
    now.found_inf = table.found_inf;
    now.tensors = 0;
  }
  void add(const StepTensor& t) {
    for (int64_t done = 0; done < t.count; done += kMost) {
      const int64_t count = t.count - done < kMost ? t.count - done : kMost;
      const unsigned needed = unsigned((count + kChunk<T> - 1) / kChunk<T>);
      if (now.tensors == kTensors || (t.group != last_group && groups == kGroups) || needed > 0x7fffffffu - blocks)
        start();
      if (t.group != last_group) {
        now.groups[groups++] = table.groups[t.group];
        last_group = t.group;
      }
      const int j = now.tensors++;
      auto from = [&](void* p) { return p == nullptr ? nullptr : static_cast<void*>(static_cast<T*>(p) + done); };
      now.param[j] = from(t.param);
      now.grad[j] = from(t.grad);
      now.buffer[j] = from(t.buffer);
      now.count[j] = unsigned(count);
      now.first_block[j] = blocks;
      now.group[j] = static_cast<unsigned char>(groups - 1);
      blocks += needed;
    }
  }
  void start() {
    if (blocks > 0) LAUNCH((sgd_step_kernel<T, kTensors>), blocks, kThreads, 0, stream, now);
    now.tensors = groups = 0;
    last_group = -1;
    blocks = 0;
  }
};

template <class T, int kTensors>
void step_all(const StepTable& table, Dtype dtype, cudaStream_t stream) {
  Filler<T, kTensors> filler(table, stream);
  for (int64_t j = 0; j < table.tensor_count; ++j) {
    if (table.tensors[j].dtype != dtype) continue;
    filler.add(table.tensors[j]);
    if (table.overlap) filler.start();  // tensors that share memory are updated one after the other
  }
  filler.start();
}

}  // namespace

const char* sgd_step(const StepTable& table, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const bool few = table.tensor_count <= kFew;
  bool has[2] = {};  // float, double
  for (int64_t j = 0; j < table.tensor_count; ++j) has[table.tensors[j].dtype == Dtype::f64] = true;
  if (has[0]) few ? step_all<float, kFew>(table, Dtype::f32, s) : step_all<float, kMany>(table, Dtype::f32, s);
  if (has[1]) few ? step_all<double, kFew>(table, Dtype::f64, s) : step_all<double, kMany>(table, Dtype::f64, s);
  return failure();
}

}  // namespace gpu
}  // namespace absgd
