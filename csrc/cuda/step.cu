// Optimizer steps (MATH §3) of many tensors. Tensors with the same functor and dtype share a launch. A further launch
// raises the counts of steps.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "tensors.cuh"

namespace absgd {
namespace gpu {
namespace {

constexpr int kGroups = 16;  // parameter groups of a launch

// F is a functor of math/step.h, here and below. kReadsCount: whether its numbers depend on the count of steps.
template <class F>
constexpr bool kReadsCount = false;
template <class L, bool amsgrad>
constexpr bool kReadsCount<AdamStep<L, amsgrad>> = true;
template <class L>
constexpr bool kReadsCount<AdagradStep<L>> = true;
// kRows: the number of rows that its table has for states.
template <class F>
constexpr int kRows = 1 + (F::kSlots >= 2) + (F::kSlots >= 4);

template <class F>
__host__ __device__ constexpr bool keeps(int state) {
  return (F::kSlots >> state & 1) != 0;
}

// The work of a block. With 2048 float32 numbers a block, a model of half a million parameters fills the chip (227
// blocks).
template <class F, class S>
struct Chunk {
  static constexpr int kWide = int(sizeof(typename F::V) / sizeof(S));  // accesses to a state for one to parameters
  static constexpr int kAccesses = 2 + kWide * ((F::kSlots & 1) + (F::kSlots >> 1 & 1) + (F::kSlots >> 2 & 1));
  static constexpr int kEach = kWide == 1 && kAccesses <= 3 ? 2 : 1;  // packs of parameters that a thread holds at once
  // Blocks that a multiprocessor must hold. There are fewer where registers would spill, and each then has more bytes
  // under way.
  static constexpr int kBlocks = sizeof(S) == 8 ? 2 : kEach * kAccesses > 6 ? 3 : 4;
  static constexpr int kElements = kThreads * (kWide == 1 ? 2 : 1) * Pack<S>::N;
};

// The table of one launch.
template <class F, int kTensors>
struct StepLaunch : TensorTable<kTensors> {
  void* state[kRows<F>][kTensors];
  void* step[kReadsCount<F> ? kTensors : 1];
  unsigned char group[kTensors];
  bool step_is_double[kReadsCount<F> ? kTensors : 1];
  StepGroup groups[kGroups];
  const float *grad_scale, *found_inf;
  const Normalizer* robust;
};
// The number of tensors that a kernel's argument holds: 959 with momentum SGD, 633 with Adam, 546 with amsgrad.
template <class F>
constexpr int kMany =
    (kArgumentLimit - int(sizeof(StepGroup)) * kGroups - 64) / (8 * (2 + kRows<F>)+(kReadsCount<F> ? 18 : 9));

// An argument is copied whole, however few tensors are in it. So there are several sizes of it, and a launch takes the
// smallest that holds its tensors. Calls use(size) with the first of kRoom, kRooms... that suffices, or with the last.
template <int kRoom, int... kRooms, class Use>
void with_room_for(int64_t tensors, Use use) {
  if constexpr (sizeof...(kRooms) > 0)
    if (tensors > kRoom) return with_room_for<kRooms...>(tensors, use);
  use(std::integral_constant<int, kRoom>{});
}

__device__ __forceinline__ bool is_skipped(const float* found_inf, const Normalizer* robust) {
  return (found_inf != nullptr && *found_inf != 0) || (robust != nullptr && robust->nonfinite > 0);
}

// Divides gradients by the factor that GradScaler multiplied the loss by. The divided gradients are written back.
template <class T>
struct Unscale {
  T divisor;
  bool divides;

  explicit __device__ __forceinline__ Unscale(const float* grad_scale)
      : divisor(grad_scale != nullptr ? T(*grad_scale) : T(1)), divides(grad_scale != nullptr) {}
  template <class S>
  __device__ __forceinline__ T operator()(S& grad) const {
    T g = to_real(grad);
    if (divides) {
      g = g / divisor;
      grad = to_storage<S>(g);
    }
    return g;
  }
};

// The elements [begin, end) of one tensor that a block steps. Up to `whole` it steps 16 bytes at a time.
template <class F, class S>
struct Stretch {
  using T = typename F::V;
  static constexpr int N = Pack<S>::N;
  S *param, *grad;
  T* state[kRows<F>];
  int64_t begin, whole, end;

  template <int kTensors>
  __device__ __forceinline__ Stretch(const StepLaunch<F, kTensors>& a, int tensor)
      : param(static_cast<S*>(a.param[tensor])), grad(static_cast<S*>(a.grad[tensor])) {
    constexpr int kElements = Chunk<F, S>::kElements;
    const int64_t count = a.count[tensor];
    begin = int64_t(blockIdx.x - a.first_block[tensor]) * kElements;
    end = begin + kElements < count ? begin + kElements : count;
    size_t places = reinterpret_cast<size_t>(param) | reinterpret_cast<size_t>(grad);
#pragma unroll
    for (int k = 0; k < kRows<F>; ++k) {
      state[k] = static_cast<T*>(a.state[k][tensor]);
      if (keeps<F>(k)) places |= reinterpret_cast<size_t>(state[k]);
    }
    whole = places % 16 == 0 ? begin + (end - begin) / N * N : begin;
  }
  // Steps the elements [whole, end), one by one.
  __device__ __forceinline__ void step_rest(const F& rule, const Unscale<T>& unscale) const {
#pragma unroll 1
    for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) {
      S w = param[i], g = grad[i];
      T own[kStates] = {};
#pragma unroll
      for (int k = 0; k < kRows<F>; ++k)
        if (keeps<F>(k)) own[k] = state[k][i];
      const T slope = unscale(g);
      step_element(rule, w, own, slope);
      param[i] = w;
      if (unscale.divides) grad[i] = g;
#pragma unroll
      for (int k = 0; k < kRows<F>; ++k)
        if (keeps<F>(k)) state[k][i] = own[k];
    }
  }
};

// 16 bytes of parameters, with their gradients and states, in registers.
template <class F, class S>
struct Held {
  using T = typename F::V;
  static constexpr int N = Pack<S>::N, kWide = Chunk<F, S>::kWide;
  Pack<S> param, grad;
  Pack<T> state[kRows<F>][kWide];

  __device__ __forceinline__ void load(const Stretch<F, S>& of, int64_t i) {
    param = load_pack(of.param + i);
    grad = load_pack(of.grad + i);
#pragma unroll
    for (int k = 0; k < kRows<F>; ++k)
#pragma unroll
      for (int part = 0; part < kWide; ++part)
        if (keeps<F>(k)) state[k][part] = load_pack(of.state[k] + i + part * Pack<T>::N);
  }
  __device__ __forceinline__ void step(const F& rule, const Unscale<T>& unscale) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      T own[kStates] = {};
#pragma unroll
      for (int k = 0; k < kRows<F>; ++k)
        if (keeps<F>(k)) own[k] = state[k][j / Pack<T>::N].value[j % Pack<T>::N];
      const T slope = unscale(grad.value[j]);
      step_element(rule, param.value[j], own, slope);
#pragma unroll
      for (int k = 0; k < kRows<F>; ++k)
        if (keeps<F>(k)) state[k][j / Pack<T>::N].value[j % Pack<T>::N] = own[k];
    }
  }
  __device__ __forceinline__ void store(const Stretch<F, S>& of, int64_t i, bool with_grad) const {
    store_pack(of.param + i, param);
    if (with_grad) store_pack(of.grad + i, grad);
#pragma unroll
    for (int k = 0; k < kRows<F>; ++k)
#pragma unroll
      for (int part = 0; part < kWide; ++part)
        if (keeps<F>(k)) store_pack(of.state[k] + i + part * Pack<T>::N, state[k][part]);
  }
};

// Makes the functor for a tensor, by one thread of a block. Its numbers are computed in double.
template <class F, int kTensors>
__device__ __forceinline__ F rule_for(const StepLaunch<F, kTensors>& a, int tensor) {
  const StepGroup& group = a.groups[a.group[tensor]];
  const double lr = learning_rate(group);
  Corrections corrections{1, 1};
  if constexpr (kReadsCount<F>)
    corrections = Corrections::of<Lane<double>>(group, read({a.step[tensor], a.step_is_double[tensor], 0}) + 1);
  if (a.robust != nullptr) corrections.gain = a.robust->scale;
  return F::template of<typename F::V>(group, lr, corrections);
}

// One step of many tensors.
//     1. If GradScaler or a nonfinite loss skips the step, the kernel ends and changes nothing (MATH §3.5).
//     2. Every block looks up its tensor, and its threads start to load their elements.
//     3. Meanwhile one thread computes the numbers of the step in double, for all threads.
//     4. Each thread steps 16 bytes of parameters at a time, stores them, and loads the next.
//     5. The threads step the elements that are left one by one.
template <class F, class S, int kTensors>
__global__ void __launch_bounds__(kThreads, Chunk<F, S>::kBlocks)
    step_kernel(const StepLaunch<F, kTensors> __grid_constant__ a) {
  if (is_skipped(a.found_inf, a.robust)) return;
  const int tensor = a.of_this_block();
  const Stretch<F, S> stretch(a, tensor);
  const int64_t whole = stretch.whole;  // Reading stretch.whole in the loop takes 15 registers more in RMSprop.
  constexpr int N = Pack<S>::N, kEach = Chunk<F, S>::kEach, kStride = kThreads * N;
  Held<F, S> held[kEach];
  auto load = [&](int64_t from) {
#pragma unroll
    for (int u = 0; u < kEach; ++u)
      if (from + u * kStride < whole) held[u].load(stretch, from + u * kStride);
  };
  int64_t from = stretch.begin + int(threadIdx.x) * N;
  load(from);

  SHARED(F[1], shared_rule);
  if (threadIdx.x == 0) shared_rule[0] = rule_for<F>(a, tensor);
  const Unscale<typename F::V> unscale(a.grad_scale);
  __syncthreads();
  const F& rule = shared_rule[0];

#pragma unroll 1
  while (from < whole) {
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      const int64_t i = from + u * kStride;
      if (i >= whole) continue;
      held[u].step(rule, unscale);
      held[u].store(stretch, i, unscale.divides);
    }
    from += kEach * kStride;
    load(from);
  }
  stretch.step_rest(rule, unscale);
}

// Calls use(size) with the size of the argument for so many tensors. Every size is a kernel of its own, with the same
// registers and other offsets. So there is a size of 512 only if the largest is half as large again, and parameters in
// float16 or float64, which are rare, have two sizes. This makes 1.1 MB of compressed code for sm_90 and 26 s of
// compilation, where two sizes for all dtypes made 0.8 MB and 20 s.
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

// Launches the step of all tensors that takes(tensor) is true for. A launch has at most kTensors tensors and kGroups
// groups; `filler` begins the next one.
template <class F, class S, int kTensors, class Takes>
void launch_steps(const StepTable& given, int64_t begin, int64_t end, cudaStream_t stream, Takes takes) {
  using Table = StepLaunch<F, kTensors>;
  int groups = 0, last_group = -1;
  auto filler = filler_of<Table>([&](const Table& table, unsigned blocks) {
    LAUNCH((step_kernel<F, S, kTensors>), blocks, kThreads, 0, stream, table);
    groups = 0;
    last_group = -1;
  });
  Table& table = filler.table;
  table.grad_scale = given.grad_scale;
  table.found_inf = given.found_inf;
  table.robust = given.robust;
  for (int64_t tensor = begin; tensor < end; ++tensor) {
    if (!takes(tensor)) continue;
    const StepTensor& t = given.tensors[tensor];
    auto has_room = [&] { return t.group == last_group || groups < kGroups; };
    filler.template add<S>(t, Chunk<F, S>::kElements, has_room, [&](int j, int64_t first) {
      if (t.group != last_group) {
        table.groups[groups++] = given.groups[t.group];
        last_group = t.group;
      }
      table.group[j] = static_cast<unsigned char>(groups - 1);
      for (int k = 0; k < kRows<F>; ++k)
        table.state[k][j] = keeps<F>(k) ? static_cast<typename F::V*>(t.state[k]) + first : nullptr;
      if constexpr (kReadsCount<F>) {
        table.step[j] = t.step.data;
        table.step_is_double[j] = t.step.is_double;
      }
    });
  }
  filler.start();
}

// How a tensor is stepped. `function` steps the tensor `begin` and all other tensors of [begin, end) that have the same
// function, and sets their functions to null.
struct Run {
  void (*function)(const StepTable&, Run* runs, int64_t begin, int64_t end, cudaStream_t);
};
template <class F, class S>
void run_all(const StepTable& table, Run* runs, int64_t begin, int64_t end, cudaStream_t stream) {
  const auto own = runs[begin].function;
  const int64_t tensors = std::count_if(runs + begin, runs + end, [&](const Run& run) { return run.function == own; });
  auto takes = [&](int64_t tensor) {
    const bool taken = runs[tensor].function == own;
    if (taken) runs[tensor].function = nullptr;
    return taken;
  };
  with_room_in_launch<F, S>(
      tensors, [&](auto room) { launch_steps<F, S, decltype(room)::value>(table, begin, end, stream, takes); });
}

// for_step calls it, on the host, to choose the function of a tensor.
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
  for_types(dtype, [&](auto types) {
    using K = decltype(types);
    using T = typename K::T;
    for_step<Lane<T>, T>(group, 0, {1, 1}, Choice<typename K::S>{out});
  });
  return out;
}

// ---- counts of steps -----------------------------------------------------------------------------------------------

template <int kTensors>
struct Counts {
  void* step[kTensors];
  bool is_double[kTensors];
  const float* found_inf;
  const Normalizer* robust;
  int tensors;
};
constexpr int kManyCounts = 3600;
static_assert(sizeof(Counts<kManyCounts>) <= kArgumentLimit, "the limit of a kernel's arguments");

// Raises the counts of steps by one. It is a launch of its own, because every block of the step must have read the old
// count before.
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
  // Tensors that share memory are stepped one after the other.
  const int64_t together = table.overlap ? 1 : count;
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
