// The weighted step: robust weights of the losses, the weighted mean of per-sample gradients, and one step of momentum
// SGD with it, in one launch that reads the gradients once and writes no mean.
//
// Every block makes the weights itself, from losses that lie in the second-level cache: so no block waits for another.
#include "weights.cuh"

namespace absgd {
namespace gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kFew = 128;                    // tensors of a small launch, as for the steps
constexpr int kMany = 800;                   // of a large one: what the argument of a kernel holds
constexpr int64_t kMost = int64_t(1) << 31;  // elements of one entry; a larger tensor takes several
constexpr int kArgumentLimit = 32764;
constexpr int kPiece = 1024;  // rows whose factors are in shared memory
constexpr int kAhead = 4;     // rows under way in a thread, 16 bytes each: 48 KB in a multiprocessor
constexpr int kTeams = 8;     // share the rows of a block where there are few columns
// So many blocks fill the chip without sharing rows (a guess: nothing here was measured on a GPU).
constexpr int64_t kEnoughBlocks = 256;

template <int kTensors>
struct WeightedLaunch {
  void *param[kTensors], *block[kTensors], *state[kTensors];
  int64_t row_stride[kTensors];
  unsigned count[kTensors], first_block[kTensors];
  StepGroup group;
  Robust robust;
  int64_t batch;
  int tensors, teams;  // teams: 1 or kTeams threads share a column's rows
};
static_assert(sizeof(WeightedLaunch<kMany>) <= kArgumentLimit, "the limit of a kernel's arguments");

// Blocks of a multiprocessor at once: fewer where registers would be spilled.
template <class S>
constexpr int kResident = sizeof(S) == 4 ? 3 : 2;

// The columns of one thread: N adjacent ones in 16 bytes where every row lies so, else as many that lie `apart`.
template <class S>
struct Columns {
  static constexpr int N = Pack<S>::N;
  unsigned first, apart, count;  // count: of the tensor, at most kMost
  bool whole;

  __device__ __forceinline__ unsigned at(int j) const { return first + j * apart; }
  // f(j, place) for the columns that exist
  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (at(j) < count) f(j, at(j));
  }
  template <class X, int M>
  __device__ __forceinline__ void load(X (&out)[M], const X* p) const {
    static_assert(M == N, "one value of each column");
    if (whole) {
#pragma unroll
      for (int part = 0; part < N; part += Pack<X>::N) {
        const Pack<X> in = load_pack(p + first + part);
#pragma unroll
        for (int j = 0; j < Pack<X>::N; ++j) out[part + j] = in.value[j];
      }
    } else {
      each([&](int j, unsigned i) { out[j] = p[i]; });
    }
  }
  // The rows under way in a thread.
  struct Ahead {
    uint4 held[kAhead];
  };
  // Rows first, first + step, ... below `rows`: where they lie in 16 bytes, their loads are under way when it returns.
  __device__ __forceinline__ void load_rows(Ahead& ahead, const S* block, int64_t stride, int first_row, int step,
                                            int rows) const {
    if (!whole) return;
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (first_row + u * step < rows) ahead.held[u] = load_raw(block + (first_row + u * step) * stride + first);
  }
  // mean += factor_r block_r over these rows, the first of which are in `ahead`; a row of factor 0 takes no part,
  // whatever it holds.
  template <class T>
  __device__ __forceinline__ void add_rows(T (&mean)[N], Ahead& ahead, const S* block, int64_t stride, const T* factors,
                                           int first_row, int step, int rows) const {
    if (whole) {
#pragma unroll 1
      for (int r = first_row; r < rows; r += kAhead * step) {
        if (r != first_row) load_rows(ahead, block, stride, r, step, rows);
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          const T factor = r + u * step < rows ? factors[r + u * step] : T(0);
          if (factor == T(0)) continue;
          T row[N];
          unpack<S>(ahead.held[u], row);
#pragma unroll
          for (int j = 0; j < N; ++j) mean[j] += factor * row[j];
        }
      }
    } else {
      each([&](int j, unsigned i) {
#pragma unroll 4
        for (int r = first_row; r < rows; r += step)
          if (factors[r] != T(0)) mean[j] += factors[r] * to_real(block[r * stride + i]);
      });
    }
  }
  template <class X, int M>
  __device__ __forceinline__ void store(X* p, const X (&in)[M]) const {
    static_assert(M == N, "one value of each column");
    if (whole) {
#pragma unroll
      for (int part = 0; part < N; part += Pack<X>::N) {
        Pack<X> out;
#pragma unroll
        for (int j = 0; j < Pack<X>::N; ++j) out.value[j] = in[part + j];
        store_pack(p + first + part, out);
      }
    } else {
      each([&](int j, unsigned i) { p[i] = in[j]; });
    }
  }
};

template <class S, class T, int kTensors>
__global__ void __launch_bounds__(kThreads, kResident<S>)
    weighted_step_kernel(const WeightedLaunch<kTensors> __grid_constant__ a) {
  constexpr int N = Pack<S>::N;
  int low = 0, high = a.tensors - 1;  // the last tensor that starts at or before this block
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (a.first_block[middle] <= blockIdx.x)
      low = middle;
    else
      high = middle - 1;
  }
  S* const w = static_cast<S*>(a.param[low]);
  T* const s = static_cast<T*>(a.state[low]);
  const S* const block = static_cast<const S*>(a.block[low]);
  const int64_t stride = a.row_stride[low], batch = a.batch;
  const int teams = a.teams, width = kThreads / teams;
  const int team = int(threadIdx.x) / width, lane = int(threadIdx.x) % width;

  Columns<S> columns;
  const unsigned begin = (blockIdx.x - a.first_block[low]) * unsigned(width * N);
  const size_t places = reinterpret_cast<size_t>(w) | reinterpret_cast<size_t>(s) | reinterpret_cast<size_t>(block) |
                        size_t(stride) * sizeof(S);
  const bool aligned = places % 16 == 0;
  columns.count = a.count[low];
  columns.apart = aligned ? 1 : width;
  columns.first = begin + unsigned(aligned ? lane * N : lane);
  columns.whole = aligned && columns.first + N <= columns.count;

  // The first rows come while log s' is settled.
  typename Columns<S>::Ahead ahead;
  columns.load_rows(ahead, block, stride, team, teams, batch < kPiece ? int(batch) : kPiece);

  SHARED(Outcome[1], outcome);
  const Robust& robust = a.robust;
  const double lam = lam_of(robust);
  const bool weighed = robust.outcome != nullptr;  // by launches of their own
  if (!weighed) {
    const BatchSums sums = vector_sums<T>(robust, lam, 0, batch);
    if (threadIdx.x == 0) {
      outcome[0] = outcome_of(robust, lam, sums);
      if (blockIdx.x == 0) write(robust.new_log_s, outcome[0].new_log_s);
    }
  } else if (threadIdx.x == 0) {
    outcome[0] = *robust.outcome;
  }
  __syncthreads();
  if (outcome[0].bad > 0) return;  // all threads alike
  const auto numbers =
      RobustNumbers<Lane<T>>::template of<T>(Weighing::of(lam, robust.mix, robust.max_weight, outcome[0]));

  SHARED(T[kPiece], factors);
  T mean[N] = {};
#pragma unroll 1
  for (int64_t piece = 0; piece < batch; piece += kPiece) {
    const int rows = batch - piece < kPiece ? int(batch - piece) : kPiece;
    __syncthreads();  // the factors before these have served
    if (weighed)
      for (int r = threadIdx.x; r < rows; r += kThreads) factors[r] = static_cast<const T*>(robust.factor)[piece + r];
    else
      for_losses<T>(robust, piece, piece + rows, [&](int64_t i, const Given<T>& in) {
        factors[i - piece] = Weighed<T>(numbers, in.sample(robust, T(lam), T(INFINITY)), in.t).factor;
      });
    __syncthreads();
    if (piece > 0) columns.load_rows(ahead, block + piece * stride, stride, team, teams, rows);
    columns.add_rows(mean, ahead, block + piece * stride, stride, factors, team, teams, rows);
  }

  if (teams > 1) {
    SHARED(T[kThreads * N], partial);
#pragma unroll
    for (int j = 0; j < N; ++j) partial[j * kThreads + threadIdx.x] = mean[j];
    __syncthreads();
    if (team > 0) return;  // after the last barrier
    for (int other = 1; other < teams; ++other)
#pragma unroll
      for (int j = 0; j < N; ++j) mean[j] += partial[j * kThreads + other * width + lane];
  }
  const double lr = a.group.lr_tensor.data != nullptr ? read(a.group.lr_tensor) : a.group.lr;
  for_sgd<Lane<T>, T>(a.group, lr, {1, 1}, [&](const auto& rule) {
    constexpr bool kKeeps = std::decay_t<decltype(rule)>::kSlots != 0;
    S param[N];
    T state[N];
    columns.load(param, w);
    if (kKeeps) columns.load(state, s);
    columns.each([&](int j, unsigned) {
      T x = to_real(param[j]);
      rule(x, state + j, mean[j]);
      param[j] = to_storage<S>(x);
    });
    columns.store(w, param);
    if (kKeeps) columns.store(s, state);
  });
}

// Fills launches with tensors of one dtype and starts each when it is full.
template <class S, class T, int kTensors>
void run(const WeightedTable& table, const Robust& robust, Dtype dtype, cudaStream_t stream) {
  WeightedLaunch<kTensors> now;
  now.group = *table.groups;
  now.robust = robust;
  now.batch = table.batch;
  now.tensors = 0;
  constexpr int N = Pack<S>::N;
  int64_t wide = 0;  // blocks without teams
  for (int64_t j = 0; j < table.tensor_count; ++j)
    if (table.tensors[j].dtype == dtype) wide += (table.tensors[j].count + kThreads * N - 1) / (kThreads * N);
  now.teams = wide < kEnoughBlocks ? kTeams : 1;
  const int64_t elements = kThreads / now.teams * N;  // columns of a block
  unsigned blocks = 0;
  auto start = [&] {
    if (blocks > 0) LAUNCH((weighted_step_kernel<S, T, kTensors>), blocks, kThreads, 0, stream, now);
    now.tensors = 0;
    blocks = 0;
  };
  for (int64_t j = 0; j < table.tensor_count; ++j) {
    const StepTensor& t = table.tensors[j];
    if (t.dtype != dtype) continue;
    for (int64_t done = 0; done < t.count; done += kMost) {
      const int64_t count = t.count - done < kMost ? t.count - done : kMost;
      const unsigned needed = unsigned((count + elements - 1) / elements);
      if (now.tensors == kTensors || needed > 0x7fffffffu - blocks) start();
      const int k = now.tensors++;
      now.param[k] = static_cast<S*>(t.param) + done;
      now.block[k] = static_cast<S*>(t.grad) + done;
      now.state[k] = t.state[0] == nullptr ? nullptr : static_cast<T*>(t.state[0]) + done;
      now.row_stride[k] = table.row_stride[j];
      now.count[k] = unsigned(count);
      now.first_block[k] = blocks;
      blocks += needed;
    }
  }
  start();
}

}  // namespace

const char* weighted_step(const WeightedTable& table, const Robust& given, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  Robust robust = given;
  if (table.batch > kOneBlock || table.elements == 0) {
    const char* const failed = robust_fwd(robust, stream);
    if (failed != nullptr || table.elements == 0) return failed;
  } else {
    robust.outcome = nullptr;
  }
  const bool few = table.tensor_count <= kFew;
  for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
    for_storage(dtype, [&](auto stored, auto real) {
      using S = typename decltype(stored)::type;
      using T = typename decltype(real)::type;
      few ? run<S, T, kFew>(table, robust, dtype, s) : run<S, T, kMany>(table, robust, dtype, s);
    });
  return failure();
}

}  // namespace gpu
}  // namespace absgd
