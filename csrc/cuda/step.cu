// The steps of math.h over many tensors: one launch for all that take the same step, because the table of tensors
// travels in the kernel's argument (up to 32 KB since CUDA 12.1), and one for their counts of steps.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "tile.cuh"

namespace absgd {
namespace gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kGroups = 16;
constexpr int64_t kMost = int64_t(1) << 31;  // elements of one entry; a larger tensor takes several
constexpr int kArgumentLimit = 32764;

// F, here and below: a functor of math.h. Whether its numbers depend on how many steps there were:
template <class F>
constexpr bool kReadsCount = false;
template <class L, bool amsgrad>
constexpr bool kReadsCount<AdamStep<L, amsgrad>> = true;
template <class L>
constexpr bool kReadsCount<AdagradStep<L>> = true;
// Rows of states in its table.
template <class F>
constexpr int kRows = 1 + (F::kSlots >= 2) + (F::kSlots >= 4);

template <class F>
__host__ __device__ constexpr bool keeps(int state) {
  return (F::kSlots >> state & 1) != 0;
}

// What a block does. 2048 float32 numbers fill the chip with a model of half a million parameters (227 blocks).
template <class F, class S>
struct Chunk {
  static constexpr int kWide = int(sizeof(typename F::V) / sizeof(S));  // accesses of a state for one of parameters
  static constexpr int kAccesses = 2 + kWide * ((F::kSlots & 1) + (F::kSlots >> 1 & 1) + (F::kSlots >> 2 & 1));
  static constexpr int kEach = kWide == 1 && kAccesses <= 3 ? 2 : 1;  // parameters, in 16 bytes, a thread holds at once
  // Resident at once: fewer where registers would be spilled, and then each has more bytes under way.
  static constexpr int kBlocks = sizeof(S) == 8 ? 2 : kEach * kAccesses > 6 ? 3 : 4;
  static constexpr int kElements = kThreads * (kWide == 1 ? 2 : 1) * Pack<S>::N;
};

template <class F, int kTensors>
struct Launch {
  void *param[kTensors], *grad[kTensors], *state[kRows<F>][kTensors];
  void* step[kReadsCount<F> ? kTensors : 1];
  unsigned count[kTensors], first_block[kTensors];
  unsigned char group[kTensors];
  bool step_is_double[kReadsCount<F> ? kTensors : 1];
  StepGroup groups[kGroups];
  const float *grad_scale, *found_inf;
  const Settled* robust;
  int tensors;
};
// As many tensors as an argument holds: 959 with momentum SGD, 633 with Adam, 546 with amsgrad.
template <class F>
constexpr int kMany =
    (kArgumentLimit - int(sizeof(StepGroup)) * kGroups - 64) / (8 * (2 + kRows<F>)+(kReadsCount<F> ? 18 : 9));

// An argument travels whole, however few tensors are in it: so there are several sizes of it, and a launch takes the
// smallest that holds its tensors. use(their number): the first of kRooms that is enough, or the last.
template <int kRoom, int... kRooms, class Use>
void with_room_for(int64_t tensors, Use use) {
  if constexpr (sizeof...(kRooms) > 0)
    if (tensors > kRoom) return with_room_for<kRooms...>(tensors, use);
  use(std::integral_constant<int, kRoom>{});
}

__device__ __forceinline__ bool is_skipped(const float* found_inf, const Settled* robust) {
  return (found_inf != nullptr && *found_inf != 0) || (robust != nullptr && robust->bad > 0);
}

template <class F, class S>
__device__ __forceinline__ void update(const F& rule, S& param, S& grad, typename F::V* states, typename F::V divisor,
                                       bool divides) {
  typename F::V w = to_real(param), g = to_real(grad);
  if (divides) {
    g = g / divisor;
    grad = to_storage<S>(g);
  }
  rule(w, states, g);
  param = to_storage<S>(w);
}

// What 16 bytes of parameters come with.
template <class F, class S>
struct Held {
  using T = typename F::V;
  static constexpr int N = Pack<S>::N, kWide = Chunk<F, S>::kWide;
  Pack<S> param, grad;
  Pack<T> state[kRows<F>][kWide];

  __device__ __forceinline__ void load(const S* w, const S* g, T* const* s, int64_t i) {
    param = load_pack(w + i);
    grad = load_pack(g + i);
#pragma unroll
    for (int k = 0; k < kRows<F>; ++k)
#pragma unroll
      for (int part = 0; part < kWide; ++part)
        if (keeps<F>(k)) state[k][part] = load_pack(s[k] + i + part * Pack<T>::N);
  }
  __device__ __forceinline__ void step(const F& rule, T divisor, bool divides) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      T own[kStates] = {};
#pragma unroll
      for (int k = 0; k < kRows<F>; ++k)
        if (keeps<F>(k)) own[k] = state[k][j / Pack<T>::N].value[j % Pack<T>::N];
      update(rule, param.value[j], grad.value[j], own, divisor, divides);
#pragma unroll
      for (int k = 0; k < kRows<F>; ++k)
        if (keeps<F>(k)) state[k][j / Pack<T>::N].value[j % Pack<T>::N] = own[k];
    }
  }
  __device__ __forceinline__ void store(S* w, S* g, T* const* s, int64_t i, bool divides) const {
    store_pack(w + i, param);
    if (divides) store_pack(g + i, grad);
#pragma unroll
    for (int k = 0; k < kRows<F>; ++k)
#pragma unroll
      for (int part = 0; part < kWide; ++part)
        if (keeps<F>(k)) store_pack(s[k] + i + part * Pack<T>::N, state[k][part]);
  }
};

template <class F, class S, int kTensors>
__global__ void __launch_bounds__(kThreads, Chunk<F, S>::kBlocks)
    step_kernel(const Launch<F, kTensors> __grid_constant__ a) {
  using T = typename F::V;
  if (is_skipped(a.found_inf, a.robust)) return;
  int low = 0, high = a.tensors - 1;  // the last tensor that starts at or before this block
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (a.first_block[middle] <= blockIdx.x)
      low = middle;
    else
      high = middle - 1;
  }
  using Mine = Chunk<F, S>;
  constexpr int N = Pack<S>::N;
  const int64_t count = a.count[low], begin = int64_t(blockIdx.x - a.first_block[low]) * Mine::kElements;
  const int64_t end = begin + Mine::kElements < count ? begin + Mine::kElements : count;
  S *const w = static_cast<S*>(a.param[low]), *const g = static_cast<S*>(a.grad[low]);
  T* s[kRows<F>];
  size_t places = reinterpret_cast<size_t>(w) | reinterpret_cast<size_t>(g);
#pragma unroll
  for (int k = 0; k < kRows<F>; ++k) {
    s[k] = static_cast<T*>(a.state[k][low]);
    if (keeps<F>(k)) places |= reinterpret_cast<size_t>(s[k]);
  }
  const int64_t whole = places % 16 == 0 ? begin + (end - begin) / N * N : begin;  // 16 bytes at a time up to here
  constexpr int kEach = Mine::kEach, kStride = kThreads * N;
  Held<F, S> held[kEach];
  auto load = [&](int64_t from) {
#pragma unroll
    for (int u = 0; u < kEach; ++u)
      if (from + u * kStride < whole) held[u].load(w, g, s, from + u * kStride);
  };
  int64_t from = begin + int(threadIdx.x) * N;
  load(from);

  // While those come, one thread does what is computed in double.
  SHARED(F[1], shared_rule);
  if (threadIdx.x == 0) {
    const StepGroup& group = a.groups[a.group[low]];
    const double lr = group.lr_tensor.data != nullptr ? read(group.lr_tensor) : group.lr;
    Corrections corrections{1, 1};
    if constexpr (kReadsCount<F>)
      corrections = Corrections::of<Lane<double>>(group, read({a.step[low], a.step_is_double[low], 0}) + 1);
    if (a.robust != nullptr) corrections.gain = a.robust->scale;
    shared_rule[0] = F::template of<T>(group, lr, corrections);
  }
  const bool divides = a.grad_scale != nullptr;
  const T divisor = divides ? T(*a.grad_scale) : T(1);
  __syncthreads();
  const F& rule = shared_rule[0];

#pragma unroll 1
  while (from < whole) {
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      const int64_t i = from + u * kStride;
      if (i >= whole) continue;
      held[u].step(rule, divisor, divides);
      held[u].store(w, g, s, i, divides);
    }
    from += kEach * kStride;
    load(from);
  }
#pragma unroll 1
  for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) {
    S param = w[i], grad = g[i];
    T own[kStates] = {};
#pragma unroll
    for (int k = 0; k < kRows<F>; ++k)
      if (keeps<F>(k)) own[k] = s[k][i];
    update(rule, param, grad, own, divisor, divides);
    w[i] = param;
    if (divides) g[i] = grad;
#pragma unroll
    for (int k = 0; k < kRows<F>; ++k)
      if (keeps<F>(k)) s[k][i] = own[k];
  }
}

// Fills launches with tensors and starts each when it is full.
template <class F, class S, int kTensors>
struct Filler {
  const StepTable& table;
  cudaStream_t stream;
  Launch<F, kTensors> now;
  unsigned blocks = 0;
  int groups = 0, last_group = -1;

  static_assert(sizeof(now) <= kArgumentLimit, "the limit of a kernel's arguments");

  Filler(const StepTable& table, cudaStream_t stream) : table(table), stream(stream) {
    now.grad_scale = table.grad_scale;
    now.found_inf = table.found_inf;
    now.robust = table.robust;
    now.tensors = 0;
  }
  void add(const StepTensor& t) {
    for (int64_t done = 0; done < t.count; done += kMost) {
      const int64_t count = t.count - done < kMost ? t.count - done : kMost;
      constexpr int kElements = Chunk<F, S>::kElements;
      const unsigned needed = unsigned((count + kElements - 1) / kElements);
      if (now.tensors == kTensors || (t.group != last_group && groups == kGroups) || needed > 0x7fffffffu - blocks)
        start();
      if (t.group != last_group) {
        now.groups[groups++] = table.groups[t.group];
        last_group = t.group;
      }
      const int j = now.tensors++;
      now.param[j] = static_cast<S*>(t.param) + done;
      now.grad[j] = static_cast<S*>(t.grad) + done;
      for (int k = 0; k < kRows<F>; ++k)
        now.state[k][j] = keeps<F>(k) ? static_cast<typename F::V*>(t.state[k]) + done : nullptr;
      if constexpr (kReadsCount<F>) {
        now.step[j] = t.step.data;
        now.step_is_double[j] = t.step.is_double;
      }
      now.count[j] = unsigned(count);
      now.first_block[j] = blocks;
      now.group[j] = static_cast<unsigned char>(groups - 1);
      blocks += needed;
    }
  }
  void start() {
    if (blocks > 0) LAUNCH((step_kernel<F, S, kTensors>), blocks, kThreads, 0, stream, now);
    now.tensors = groups = 0;
    last_group = -1;
    blocks = 0;
  }
};

// Every size is a kernel of its own (the same registers, other offsets). So there is one of 512 only where the largest
// is half as large again, and parameters in float16 or float64, which are rare, have two sizes: 1.1 MB of compressed
// code for sm_90 and 26 s of compilation, where two sizes for all were 0.8 MB and 20 s.
template <class F, class S, class Use>
void with_room_in_launch(int64_t tensors, Use use) {
  constexpr bool common = std::is_same<S, float>::value || std::is_same<S, __nv_bfloat16>::value;
  if constexpr (common && kMany<F> >= 768)
    with_room_for<128, 256, 512, kMany<F>>(tensors, use);
  else if constexpr (common)
    with_room_for<128, 256, kMany<F>>(tensors, use);
  else
    with_room_for<128, kMany<F>>(tensors, use);
}

// How a tensor is stepped: `function` takes the first of the tensors [begin, end) and all others among them whose
// function it is, and clears these functions.
struct Run {
  void (*function)(const StepTable&, Run* runs, int64_t begin, int64_t end, cudaStream_t);
};
template <class F, class S>
void run_all(const StepTable& table, Run* runs, int64_t begin, int64_t end, cudaStream_t stream) {
  const auto own = runs[begin].function;
  const int64_t tensors = std::count_if(runs + begin, runs + end, [&](const Run& run) { return run.function == own; });
  with_room_in_launch<F, S>(tensors, [&](auto room) {
    Filler<F, S, decltype(room)::value> filler(table, stream);
    for (int64_t j = begin; j < end; ++j) {
      if (runs[j].function != own) continue;
      filler.add(table.tensors[j]);
      runs[j].function = nullptr;
    }
    filler.start();
  });
}

// Called by for_step, on the host.
template <class S>
struct Choice {
  Run& out;

  template <class F>
  ABSGD_FN void operator()(const F&) const {
    out.function = run_all<F, S>;
  }
};
Run run_for(const StepGroup& group, Dtype dtype) {
  Run out{};
  for_storage(dtype, [&](auto stored, auto real) {
    using T = typename decltype(real)::type;
    for_step<Lane<T>, T>(group, 0, {1, 1}, Choice<typename decltype(stored)::type>{out});
  });
  return out;
}

// ---- counts of steps -----------------------------------------------------------------------------------------------

template <int kTensors>
struct Counts {
  void* step[kTensors];
  bool is_double[kTensors];
  const float* found_inf;
  const Settled* robust;
  int tensors;
};
constexpr int kManyCounts = 3600;
static_assert(sizeof(Counts<kManyCounts>) <= kArgumentLimit, "the limit of a kernel's arguments");

// A launch of its own, so that every block of the step has read the count before.
template <int kTensors>
__global__ void __launch_bounds__(kThreads) advance_kernel(const Counts<kTensors> __grid_constant__ a) {
  const int j = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (j >= a.tensors || is_skipped(a.found_inf, a.robust)) return;
  const DeviceNumber step{a.step[j], a.is_double[j], 0};
  write(step, read(step) + 1);
}

template <int kTensors>
void advance(const StepTable& table, int64_t begin, int64_t end, cudaStream_t stream) {
  Counts<kTensors> now;
  now.found_inf = table.found_inf;
  now.robust = table.robust;
  now.tensors = 0;
  for (int64_t j = begin; j < end; ++j) {
    const DeviceNumber& step = table.tensors[j].step;
    if (step.data != nullptr) {
      now.step[now.tensors] = step.data;
      now.is_double[now.tensors++] = step.is_double;
    }
    if (now.tensors == kTensors || (now.tensors > 0 && j + 1 == end)) {
      LAUNCH(advance_kernel<kTensors>, unsigned((now.tensors + kThreads - 1) / kThreads), kThreads, 0, stream, now);
      now.tensors = 0;
    }
  }
}

}  // namespace

const char* step(const StepTable& table, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t count = table.tensor_count;
  const int64_t together = table.overlap ? 1 : count;  // tensors that share memory are stepped one after the other
  std::vector<Run> runs(static_cast<size_t>(count));
  for (int64_t j = 0; j < count; ++j) {
    const StepTensor& t = table.tensors[j];
    runs[j] = run_for(table.groups[t.group], t.dtype);
  }
  for (int64_t begin = 0; begin < count; begin += together) {
    const int64_t end = begin + together;
    for (int64_t j = begin; j < end; ++j)
      if (runs[j].function != nullptr) runs[j].function(table, runs.data(), j, end, s);
    with_room_for<128, 256, 512, 1024, kManyCounts>(
        together, [&](auto room) { advance<decltype(room)::value>(table, begin, end, s); });
  }
  return failure();
}

}  // namespace gpu
}  // namespace absgd
