// Losses on logits (MATH §2), alone and under the robust loss (MATH §1), and their gradients in two passes.
//     1. The forward pass reads the logits and stores losses and four statistics of each row.
//     2. The backward pass reads the logits again and makes the gradient from the statistics.
// So the gradient is made only if it is asked for, and the upstream gradient is in it before it is rounded.
#include "row_gradient.cuh"
#include "row_launch.cuh"
#include "target.cuh"

namespace absgd {
namespace gpu {
namespace {

// The losses of all rows. With a ticket, also the robust loss of all rows together.
//     1. A team of threads walks along the classes of its row, and combines the sums of its threads.
//     2. One thread of the team makes loss and statistics of these sums, and stores them.
//     3. For the robust loss it also stores z, and adds the row to its own sums. Steps 1 to 3 repeat for every tile.
//     4. Every block stores its sums. The last block adds them up. It never looks at the losses themselves.
//     5. One thread of the last block settles log s' and stores it with the loss. Backward makes the weights from z and
//        log s'.
template <class S, class T, Walk walk, bool kGeneral>
__global__ void __launch_bounds__(threads_of(walk), blocks_of<T>(walk, !kGeneral))
    logit_loss_fwd_kernel(const LogitForward __grid_constant__ a, const Robust __grid_constant__ r, int width,
                          unsigned* ticket) {
  const bool robust = ticket != nullptr;
  RobustRows<T> all(r);
  along_row_tiles<walk>(a, width, [&](const Place<walk>& place) {
    const int64_t i = place.row;
    const bool writes = place.writes();
    const T t = robust && writes ? all.sample_weight(i) : T(1), score = robust && writes ? all.score(i) : T(0);
    using Sums = RowSums<T, kGeneral>;
    const WalkedRow<S, T, walk, kGeneral> walked(a, place, width, [](Sums& sums) -> Sums& { return sums; });
    if (!writes) return;
    const RowResult<T> row = walked.finish(a);
    store_row(a, i, row, t);
    if (!robust) return;
    const Sample<T> sample = all.sample(row, score);
    static_cast<T*>(r.z)[i] = sample.stored();
    all.sums.add(sample, t);
  });
  BatchSums total;
  if (!robust || !all.finish(ticket, total) || threadIdx.x != 0) return;
  const double lam = lam_of(r);
  const Weighing weighing = Weighing::of(lam, r.mix, r.max_weight, settle(r, lam, total));
  *r.weighing = weighing;
  *static_cast<T*>(r.loss) = T(loss_of(total, weighing));
}

// The robust loss with a target for the effective sample size, by one block, after a launch that stored the scores of
// all rows as z. A block of this launch has more threads and more registers than the last block of that one, and only
// this launch pays for them.
//     1. The block solves for lambda.
//     2. It makes z of the scores, stores it, and adds up exp(z).
//     3. One thread settles log s' and stores it with the loss.
template <class T>
__global__ void __launch_bounds__(kOneBlockThreads, 1) target_loss_kernel(const Robust __grid_constant__ r) {
  auto for_rows = [&](auto f) { for_losses<T, StoredRow<T>>(r, 0, r.count, f); };
  const Tilt tilt = solve_target<T>(
      r, [&](auto f) { for_rows([&](int64_t, const StoredRow<T>& in) { f(in.sample(r, T(1), T(INFINITY))); }); });
  RunningSums<T> own;
  for_rows([&](int64_t i, const StoredRow<T>& in) {
    const Sample<T> sample = tilt(r, in, T(INFINITY));
    static_cast<T*>(r.z)[i] = sample.stored();
    own.add(sample, in.t);
  });
  const BatchSums total = block_sums<T>(own);
  if (threadIdx.x != 0) return;
  const Weighing weighing = Weighing::of(tilt.lam, r.mix, r.max_weight, settle<true>(r, tilt.lam, total, tilt.shift));
  *r.weighing = weighing;
  *static_cast<T*>(r.loss) = T(loss_of(total, weighing));
}

// The arguments of the launch before target_loss_kernel. It takes the scores as z, and moves no state.
Robust before_target(Robust r) {
  r.lam_on_device = {};
  r.lam = 1;
  r.normalizer_kind = NormalizerKind::none;
  r.update = false;
  return r;
}

// The robust loss with a finite max_weight, (1/n) sum_i t_i (min(W_i, max_weight) + mix) L_i. It does not follow from
// the sums of the launch before.
//     1. Every block makes the weights of its losses from z, and stores the sum of their parts of the loss.
//     2. The last block adds up these sums.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) bounded_loss_kernel(const Robust __grid_constant__ r, unsigned* ticket) {
  const auto numbers = RobustNumbers<Lane<T>>::template of<T>(*r.weighing);
  const T* z = static_cast<const T*>(r.z);
  const LossRange range(r.count);
  T sum = 0;
  for_losses<T>(r, range.begin, range.end, [&](int64_t i, const Given<T>& in) {
    if (z[i] != T(-INFINITY)) sum += numbers.factor(numbers.weight(z[i]), in.t) * in.loss;
  });
  const double own = double(BlockTeam::here().sum(sum));
  if (threadIdx.x == 0) r.loss_partials[blockIdx.x] = own;
  if (!is_last_block(ticket)) return;
  const double all = sum_of_blocks(r.loss_partials);
  if (threadIdx.x == 0) *static_cast<T*>(r.loss) = T(all);
}

// The gradient of every row. Each block has one tile.
//     1. Every thread reads the statistics of its row, and the upstream gradient.
//     2. For the robust loss it makes the row's weight from z, and multiplies the factor of the row by it.
//     3. The team walks along the classes and writes the gradient. A row that does not count gets 0.
template <class S, class T, Walk walk, bool kGeneral>
__global__ void __launch_bounds__(threads_of(walk), sizeof(T) == 8 ? 1 : blocks_of<T>(walk, !kGeneral))
    logit_loss_bwd_kernel(const LogitBackward __grid_constant__ a, int width) {
  const int64_t rows = a.rows();
  const Place<walk> place(rows, width, blockIdx.x);
  if (!place.inside) return;
  const int64_t i = place.row;
  const RawLabel raw(a, i);
  const T* stats = static_cast<const T*>(a.stats) + i;
  const RowGradient<Lane<T>> g{stats[rows], stats[2 * rows], stats[3 * rows]};
  T factor = static_cast<const T*>(a.upstream)[a.upstream_per_row ? i : 0];
  if (a.z != nullptr) {
    const auto numbers = RobustNumbers<Lane<T>>::template of<T>(*a.weighing);
    factor *= numbers.factor(numbers.weight(static_cast<const T*>(a.z)[i]), T(1));
  }
  const bool counts = g.scale != 0 || g.at_label != 0;
  const Label label = raw.checked(a, nullptr, i, false);
  const RowGradients<T, kGeneral> row(RowView<T, kGeneral>(a, i, counts && label.valid ? label.y : -1), stats[0], g,
                                      factor);
  write_row<S, S, walk, true>(a, static_cast<S*>(a.grad), place, width, row_of<S>(a, i), row, StartInMemory<S>());
}

const char* launch_forward(const LogitForward& a, const Robust& r, unsigned* ticket, cudaStream_t stream) {
  return for_row_kernel(a, [&](auto of, const RowShape& shape) {
    using K = decltype(of);
    const auto kernel = logit_loss_fwd_kernel<typename K::S, typename K::T, K::walk, K::kGeneral>;
    constexpr int threads = threads_of(K::walk);
    static Resident resident;
    LAUNCH(kernel, grid_of(shape.tiles, resident(kernel, threads)), threads, 0, stream, a, r, shape.width, ticket);
  });
}

}  // namespace

const char* logit_loss_fwd(const LogitForward& a, void* stream) {
  if (a.rows() == 0) return nullptr;
  return launch_forward(a, Robust{}, nullptr, static_cast<cudaStream_t>(stream));
}

const char* logit_loss_bwd(const LogitBackward& a, void* stream) {
  if (a.rows() == 0 || a.classes == 0) return nullptr;
  return for_row_kernel(a, [&](auto of, const RowShape& shape) {
    using K = decltype(of);
    const auto kernel = logit_loss_bwd_kernel<typename K::S, typename K::T, K::walk, K::kGeneral>;
    LAUNCH(kernel, unsigned(shape.tiles), threads_of(K::walk), 0, static_cast<cudaStream_t>(stream), a, shape.width);
  });
}

const char* robust_logit_loss_fwd(const LogitForward& a, const Robust& r, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.rows() == 0) return robust_fwd(r, stream);
  unsigned* const ticket = ticket_for(s);
  if (ticket == nullptr) return failure();
  const bool target = is_target(r);
  const char* const failed = launch_forward(a, target ? before_target(r) : r, ticket, s);
  if (failed != nullptr) return failed;
  for_real(r.dtype, [&](auto real) {
    using T = typename decltype(real)::type;
    if (target) LAUNCH((target_loss_kernel<T>), 1, one_block_threads(r.count), 0, s, r);
    if (r.max_weight < kLargest) LAUNCH((bounded_loss_kernel<T>), unsigned(r.loss_blocks()), kThreads, 0, s, r, ticket);
  });
  return failure();
}

}  // namespace gpu
}  // namespace absgd
