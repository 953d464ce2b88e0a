// The weighted step (MATH §3.4): robust weights of the losses, the weighted mean of per-sample gradients, and one step
// of momentum SGD with that mean. It is one launch, which reads the gradients once and does not write the mean.
//
// Every block makes all weights by itself, so no block waits for another. The losses lie in the second-level cache.
#include "tensors.cuh"
#include "weights.cuh"

namespace absgd {
namespace gpu {
namespace {

constexpr int kFew = 128;     // tensors of a small launch, as in step.cu
constexpr int kMany = 800;    // tensors of a large launch: as many as the argument of a kernel holds
constexpr int kPiece = 1024;  // samples whose factors are in shared memory together
constexpr int kAhead = 4;     // rows that a thread has under way, 16 bytes each: 48 KB in a multiprocessor
constexpr int kTeams = 8;     // teams that share the rows of a block, if there are few columns
// With so many blocks the chip is full without sharing rows. This is a guess: nothing here was measured on a GPU.
constexpr int64_t kEnoughBlocks = 256;

// The table of one launch. TensorTable::grad is the block of per-sample gradients of each tensor.
template <int kTensors>
struct WeightedLaunch : TensorTable<kTensors> {
  void* state[kTensors];
  int64_t row_stride[kTensors];
  StepGroup group;
  Robust robust;
  int64_t batch;
  int teams;  // so many threads share the rows of a column: 1 or kTeams
};

// Blocks that a multiprocessor must hold. More would spill registers.
template <class S>
constexpr int kResident = sizeof(S) == 4 ? 3 : 2;

// The N columns of one thread. If every row is aligned, they are adjacent, 16 bytes. Otherwise they lie `apart`.
template <class S>
struct Columns {
  static constexpr int N = Pack<S>::N;
  unsigned first, apart, count;  // count: columns of the tensor, at most kMostElements
  bool whole;                    // the columns are 16 aligned bytes within the tensor

  // The columns of one of the `width` lanes of a team. places: all addresses and strides, ORed together.
  __device__ __forceinline__ Columns(unsigned begin, int lane, int width, unsigned count, size_t places)
      : count(count) {
    const bool aligned = places % 16 == 0;
    apart = aligned ? 1 : width;
    first = begin + unsigned(aligned ? lane * N : lane);
    whole = aligned && first + N <= count;
  }

  __device__ __forceinline__ unsigned at(int j) const { return first + j * apart; }
  // Calls f(j, place) for each column that exists.
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
  // Starts the loads of rows first_row, first_row + step, ... below `rows`, kAhead of them, if the columns are whole.
  // It does not wait for the loads.
  __device__ __forceinline__ void load_rows(Ahead& ahead, const S* block, int64_t stride, int first_row, int step,
                                            int rows) const {
    if (!whole) return;
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (first_row + u * step < rows) ahead.held[u] = load_raw(block + (first_row + u * step) * stride + first);
  }
  // mean += factor_r block_r over rows first_row, first_row + step, ... below `rows`. The first of them are in `ahead`.
  // A row of factor 0 takes no part, whatever it holds.
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

// The WeightUpdate of this batch, for all threads of a block. Every block settles log s' by itself, and block 0 stores
// it. If launches of their own have settled it before, it is read.
template <class T>
__device__ __forceinline__ const WeightUpdate& settle_in_every_block(const Robust& robust, double lam, int64_t batch) {
  SHARED(WeightUpdate[1], update);
  if (robust.weight_update == nullptr) {
    const BatchSums sums = vector_sums<T>(robust, ByLam{lam}, 0, batch);
    if (threadIdx.x == 0) {
      update[0] = weight_update_of(robust, lam, sums);
      if (blockIdx.x == 0) write(robust.new_log_s, update[0].new_log_s);
    }
  } else if (threadIdx.x == 0) {  // more than kOneBlock losses
    update[0] = *robust.weight_update;
  }
  __syncthreads();
  return update[0];
}

// Writes the factors of samples [begin, begin + samples), by all threads of a block.
template <class T>
__device__ __forceinline__ void make_factors(const Robust& robust, double lam, const RobustNumbers<Lane<T>>& numbers,
                                             int64_t begin, int samples, T* factors) {
  if (robust.weight_update != nullptr)
    for (int r = threadIdx.x; r < samples; r += kThreads) factors[r] = static_cast<const T*>(robust.factor)[begin + r];
  else
    for_losses<T>(robust, begin, begin + samples, [&](int64_t i, const Given<T>& in) {
      factors[i - begin] = Weighed<T>(numbers, in.sample(robust, T(lam), T(INFINITY)), in.t).factor;
    });
}

// Adds up the means of all teams, in the threads of the first team. Returns false in all other threads, which have
// nothing left to do.
template <class T, int N>
__device__ __forceinline__ bool add_teams(T (&mean)[N], int teams, int width, int team, int lane) {
  SHARED(T[kThreads * N], partial);
#pragma unroll
  for (int j = 0; j < N; ++j) partial[j * kThreads + threadIdx.x] = mean[j];
  __syncthreads();
  if (team > 0) return false;  // No barrier comes after this.
  for (int other = 1; other < teams; ++other)
#pragma unroll
    for (int j = 0; j < N; ++j) mean[j] += partial[j * kThreads + other * width + lane];
  return true;
}

// Steps the columns of a thread with the mean of their gradients.
template <class S, class T, int N>
__device__ __forceinline__ void step_columns(const StepGroup& group, const Columns<S>& columns, S* w, T* s,
                                             T (&mean)[N]) {
  for_sgd<Lane<T>, T>(group, learning_rate(group), {1, 1}, [&](const auto& rule) {
    constexpr bool kKeeps = std::decay_t<decltype(rule)>::kSlots != 0;
    S param[N];
    T state[N];
    columns.load(param, w);
    if (kKeeps) columns.load(state, s);
    columns.each([&](int j, unsigned) { step_element(rule, param[j], state + j, mean[j]); });
    columns.store(w, param);
    if (kKeeps) columns.store(s, state);
  });
}

// One weighted step of many tensors.
//     1. Every block looks up which columns of which tensor it has. Its threads start to load their first rows.
//     2. Meanwhile it settles log s' of the batch. If a loss is nonfinite, the kernel ends and the step changes
//     nothing.
//     3. It makes the factors of kPiece samples, and adds their weighted gradients to the means of its columns. This
//        repeats for every piece of the batch.
//     4. If teams share the rows of a column, their means are added.
//     5. Every thread steps its columns with the mean.
template <class S, class T, int kTensors>
__global__ void __launch_bounds__(kThreads, kResident<S>)
    weighted_step_kernel(const WeightedLaunch<kTensors> __grid_constant__ a) {
  constexpr int N = Pack<S>::N;
  const int tensor = a.of_this_block();
  S* const w = static_cast<S*>(a.param[tensor]);
  T* const s = static_cast<T*>(a.state[tensor]);
  const S* const block = static_cast<const S*>(a.grad[tensor]);
  const int64_t stride = a.row_stride[tensor], batch = a.batch;
  const int teams = a.teams, width = kThreads / teams;
  const int team = int(threadIdx.x) / width, lane = int(threadIdx.x) % width;
  const Columns<S> columns((blockIdx.x - a.first_block[tensor]) * unsigned(width * N), lane, width, a.count[tensor],
                           reinterpret_cast<size_t>(w) | reinterpret_cast<size_t>(s) | reinterpret_cast<size_t>(block) |
                               size_t(stride) * sizeof(S));
  typename Columns<S>::Ahead ahead;
  columns.load_rows(ahead, block, stride, team, teams, batch < kPiece ? int(batch) : kPiece);

  const Robust& robust = a.robust;
  const double lam = lam_of(robust);
  const WeightUpdate& update = settle_in_every_block<T>(robust, lam, batch);
  if (update.nonfinite > 0) return;  // This is the same in all threads.
  const auto numbers = RobustNumbers<Lane<T>>::template of<T>(Weighing::of(lam, robust.mix, robust.max_weight, update));

  SHARED(T[kPiece], factors);
  T mean[N] = {};
#pragma unroll 1
  for (int64_t piece = 0; piece < batch; piece += kPiece) {
    const int rows = batch - piece < kPiece ? int(batch - piece) : kPiece;
    __syncthreads();  // Nobody reads the factors of the piece before any more.
    make_factors<T>(robust, lam, numbers, piece, rows, factors);
    __syncthreads();
    if (piece > 0) columns.load_rows(ahead, block + piece * stride, stride, team, teams, rows);
    columns.add_rows(mean, ahead, block + piece * stride, stride, factors, team, teams, rows);
  }
  if (teams > 1 && !add_teams(mean, teams, width, team, lane)) return;
  step_columns(a.group, columns, w, s, mean);
}

// Fills tables with the tensors of one dtype, and launches the kernel for each table.
template <class S, class T, int kTensors>
void launch_weighted_steps(const WeightedTable& given, const Robust& robust, Dtype dtype, cudaStream_t stream) {
  using Table = WeightedLaunch<kTensors>;
  auto filler = filler_of<Table>([&](const Table& table, unsigned blocks) {
    LAUNCH((weighted_step_kernel<S, T, kTensors>), blocks, kThreads, 0, stream, table);
  });
  Table& table = filler.table;
  table.group = *given.groups;
  table.robust = robust;
  table.batch = given.batch;
  constexpr int N = Pack<S>::N;
  int64_t wide = 0;  // blocks that there would be without teams
  for (int64_t tensor = 0; tensor < given.tensor_count; ++tensor)
    if (given.tensors[tensor].dtype == dtype) wide += (given.tensors[tensor].count + kThreads * N - 1) / (kThreads * N);
  table.teams = wide < kEnoughBlocks ? kTeams : 1;
  const int64_t columns_of_block = kThreads / table.teams * N;
  for (int64_t tensor = 0; tensor < given.tensor_count; ++tensor) {
    const StepTensor& t = given.tensors[tensor];
    if (t.dtype != dtype) continue;
    filler.template add<S>(
        t, columns_of_block, [] { return true; },
        [&](int j, int64_t first) {
          table.state[j] = t.state[0] == nullptr ? nullptr : static_cast<T*>(t.state[0]) + first;
          table.row_stride[j] = given.row_stride[tensor];
        });
  }
  filler.start();
}

}  // namespace

const char* weighted_step(const WeightedTable& table, const Robust& given, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  Robust robust = given;
  if (table.batch > kOneBlock || table.elements == 0) {
    const char* const failed = robust_fwd(robust, stream);
    if (failed != nullptr || table.elements == 0) return failed;
  } else {
    robust.weight_update = nullptr;
  }
  const bool few = table.tensor_count <= kFew;
  for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
    for_types(dtype, [&](auto types) {
      using S = typename decltype(types)::S;
      using T = typename decltype(types)::T;
      few ? launch_weighted_steps<S, T, kFew>(table, robust, dtype, s)
          : launch_weighted_steps<S, T, kMany>(table, robust, dtype, s);
    });
  return failure();
}

}  // namespace gpu
}  // namespace absgd
