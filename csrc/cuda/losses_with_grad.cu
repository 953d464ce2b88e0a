// Losses on logits with the gradient in the same pass, while the row is on the chip: one read and one write of the
// logits. This is possible if the factor of a row is known as soon as its loss is. So it serves rows whose normaliser
// is already settled (deferred normalisation, MATH §5) and rows without a factor.
#include "row_gradient.cuh"
#include "row_launch.cuh"

namespace absgd {
namespace gpu {
namespace {

// The first packs of a row stay in shared memory between the two walks. The packs that do not fit are read again, from
// the second-level cache. A thread reads only packs that it kept itself, so no barrier is needed.
template <class S>
struct Kept {
  uint4* shared;
  int capacity;  // in packs

  template <class Sums>
  struct Keeping {
    static constexpr bool kGeneral = Sums::kGeneral;
    Sums& sums;
    Kept kept;
    template <class T>
    __device__ __forceinline__ void one(T x, int k) {
      sums.one(x, k);
    }
    template <class>
    __device__ __forceinline__ void pack(const uint4& in, int first, int p) {
      if (p < kept.capacity) kept.shared[p] = in;
      sums.template pack<S>(in, first, p);
    }
  };
  struct Source {
    Kept kept;
    const S* packs;
    __device__ __forceinline__ uint4 operator()(int p) const {
      return p < kept.capacity ? kept.shared[p] : load_raw(packs + p * Pack<S>::N);
    }
  };
  __device__ __forceinline__ Source operator()(const S* packs) const { return {*this, packs}; }
};

// Passes the numbers of a row's gradient from the thread that made them to its team.
template <Walk walk, class T>
__device__ __forceinline__ void tell_team(RowResult<T>& row, T& factor) {
  if constexpr (walk == Walk::block) {
    struct Shared {
      RowResult<T> row;
      T factor;
    };
    SHARED(Shared[1],
           of_row);  // It is free: all threads have passed the barriers of this row's sums since its last use.
    if (threadIdx.x == 0) of_row[0] = {row, factor};
    __syncthreads();
    row = of_row[0].row;
    factor = of_row[0].factor;
  } else if constexpr (walk == Walk::lanes) {
    __syncwarp();  // All lanes have read the label's logit. One of them may overwrite it now.
  }
}

// Losses and gradients of all rows. With a ticket, the rows are weighed by a log s' that is already settled.
//     1. A team walks along the classes of its row, keeps what it reads in shared memory, and combines its sums.
//     2. One thread makes the loss of these sums. With log s' it also makes the weight and the factor of the row. It
//        stores them.
//     3. The thread passes the gradient's numbers to its team.
//     4. The team walks along the classes again and writes the gradient. Steps 1 to 4 repeat for every tile.
//     5. With a ticket, every block stores its sums. The last block adds them up, and stores the partial statistics and
//        the loss.
template <class S, class T, class G, Walk walk, bool kGeneral>
__global__ void __launch_bounds__(threads_of(walk), sizeof(T) == 8 ? 1 : blocks_of<T>(walk))
    logit_loss_with_grad_kernel(const LogitForward __grid_constant__ a, const Robust __grid_constant__ r, int width,
                                int capacity, unsigned* ticket) {
  DYN_SHARED(uint4, shared);
  const Kept<S> kept{shared, capacity};
  const bool robust = ticket != nullptr;
  RobustRows<T> all(r);
  const auto numbers = RobustNumbers<Lane<T>>::template of<T>(
      robust ? Weighing{r.settled->log_s, r.settled->scale, 0, INFINITY} : Weighing{0, 1, 0, INFINITY});
  along_row_tiles<walk>(a, width, [&](const Place<walk>& place) {
    const int64_t i = place.row;
    const bool writes = place.writes();
    const T t = robust ? all.sample_weight(i) : T(1), score = robust ? all.score(i) : T(0);
    using Sums = RowSums<T, kGeneral>;
    using Keeping = typename Kept<S>::template Keeping<Sums>;
    const WalkedRow<S, T, walk, kGeneral> walked(a, place, width, [&](Sums& sums) { return Keeping{sums, kept}; });
    RowResult<T> row{};
    T factor = 0;
    if (walk != Walk::block || threadIdx.x < kWarp) {  // The other warps of a block wait for the first.
      row = walked.finish(a);
      factor = T(row.counts);
      if (robust) {
        const Sample<T> sample = all.sample(row, score);
        const Weighed<T> own(numbers, sample, t);
        factor = own.factor;
        if (writes) {
          static_cast<T*>(r.weights)[i] = own.weight;
          all.sums.add(sample, t);
        }
      }
      if (writes) store_row(a, i, row, T(1));
    }
    tell_team<walk>(row, factor);
    if (!place.inside) return;
    const RowView<T, kGeneral> view(a, i, row.counts ? walked.label.y : -1);
    const RowGradients<T, kGeneral> gradients(view, row.max, row.gradient, factor);
    write_row<S, G, walk, false>(a, static_cast<G*>(a.grad), place, width, walked.x, gradients, kept);
  });
  BatchSums total;
  if (!robust || !all.finish(ticket, total) || threadIdx.x != 0) return;
  write_partial_stats(r, total);
  const Weighing weighing{r.settled->log_s, r.settled->scale, 0, INFINITY};
  *static_cast<T*>(r.loss) = T(loss_of(total, weighing));
}

// Shared memory for the row of a block, in bytes. Two blocks of this size fit a multiprocessor with 228 KB.
constexpr int kKeptBytes = 108 << 10;

int most_shared() {
  int device = 0, most = 48 << 10;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  // 2048 bytes are left for the kernel's own shared memory and for the system.
  return most - 2048 < kKeptBytes ? most - 2048 : kKeptBytes;
}

}  // namespace

const char* logit_loss_with_grad(const LogitForward& a, const Robust& r, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const bool robust = r.settled != nullptr;
  if (a.rows() == 0) return robust ? robust_fwd(r, stream) : nullptr;
  unsigned* const ticket = robust ? ticket_for(s) : nullptr;
  if (robust && ticket == nullptr) return failure();
  return for_row_kernel(a, [&](auto of, const RowShape& shape) {
    using K = decltype(of);
    const auto kernel = logit_loss_with_grad_kernel<typename K::S, typename K::T, typename K::G, K::walk, K::kGeneral>;
    constexpr int threads = threads_of(K::walk);
    static Resident resident;
    const int most = most_shared(), packs = K::walk == Walk::block ? int(a.classes / Pack<typename K::S>::N) : 0;
    const int bytes = packs * 16 < most ? packs * 16 : most / 16 * 16;
    // The number is always the same, so two threads of the host cannot undo each other's setting.
    if (bytes > 0)
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    const int64_t fit = bytes == 0 ? INT64_MAX : 2 * kKeptBytes / bytes;
    LAUNCH(kernel, grid_of(shape.tiles, resident(kernel, threads, fit)), threads, bytes, s, a, r, shape.width,
           bytes / 16, ticket);
  });
}

}  // namespace gpu
}  // namespace absgd
