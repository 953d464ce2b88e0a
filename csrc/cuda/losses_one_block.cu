// The robust loss of a small batch (MATH §1, §2) by a single block: losses, log s', weights and gradient in one launch,
// with one read and one write of the logits. launch.h fits_one_block says which batches it takes.
#include "row_gradient.cuh"
#include "row_launch.cuh"
#include "target.cuh"

namespace absgd {
namespace gpu {
namespace {

// Calls f(number, class) for each class of a row that this lane keeps in registers, with number in [0, kTeamClasses).
template <class F>
__device__ __forceinline__ void along_kept_classes(int lane, int width, int classes, F f) {
#pragma unroll
  for (int u = 0; u < kTeamClasses; ++u)
    if (lane + u * width < classes) f(u, lane + u * width);
}

// The robust loss of a small batch.
//     1. Each row has a team of `width` lanes. Each lane reads up to kTeamClasses logits of the row into registers.
//     2. The team adds up the sums along the classes. Every lane makes the loss of the row, and one lane stores it.
//     3. The block adds up the sums of all rows. One thread settles log s' and the next state. With kTarget the block
//        solves for lambda before.
//     4. Every lane makes the weight of its row. The team writes the gradient from the logits in its registers.
//     5. The block adds up the parts of the loss of all rows.
template <class S, class T, class G, bool kGeneral, bool kTarget>
__global__ void __launch_bounds__(kTeamThreads, 1)
    robust_logit_loss_block_kernel(const LogitForward __grid_constant__ a, const Robust __grid_constant__ r,
                                   int width) {
  const int classes = int(a.classes);
  const Place<Walk::lanes> place(a.rows(), width, 0);
  const int64_t i = place.row;
  const int lane = place.lane;
  const bool writes = place.writes();
  RobustRows<T> all(r, kTarget ? 1 : lam_of(r));
  const S* x = row_of<S>(a, i);
  const RawLabel raw(a, i);
  S in[kTeamClasses];
  along_kept_classes(lane, width, classes, [&](int u, int k) { in[u] = x[k * a.stride_class]; });
  const T t = all.sample_weight(i), score = all.score(i);
  const Label label = raw.checked(a, a.report, i, writes);
  RowSums<T, kGeneral> sums(RowView<T, kGeneral>(a, i, label.y));
  const T target_logit = sums.view.target_logit(a, x, label);
  sums.reference = sums.view.reference(x, classes > 0, target_logit);
  along_kept_classes(lane, width, label.valid ? classes : 0, [&](int u, int k) { sums.one(to_real(in[u]), k); });
  sums.combine(WarpTeam{lane, width});
  const RowResult<T> row = finish_row(a, label, target_logit, sums);
  Sample<T> sample = all.sample(row, score);
  if (writes) store_row(a, i, row, t);
  Tilt by{0, 0};
  if constexpr (kTarget) {
    by = solve_target<T>(r, [&](auto f) {
      if (writes) f(sample);
    });
    sample = by(sample);
  }
  if (writes) all.sums.add(sample, t);
  SHARED(Weighing[1], shared);
  const BatchSums total = block_sums<T>(all.sums);
  if (threadIdx.x == 0) {
    const double lam = kTarget ? by.lam : lam_of(r);
    shared[0] = Weighing::of(lam, r.mix, r.max_weight, settle<kTarget>(r, lam, total, by.shift));
  }
  __syncthreads();
  const Weighed<T> own(RobustNumbers<Lane<T>>::template of<T>(shared[0]), sample, t);
  if (place.inside) {
    const RowView<T, kGeneral> view(a, i, row.counts ? label.y : -1);
    const RowGradients<T, kGeneral> gradients(view, row.max, row.gradient, own.factor);
    G* out = static_cast<G*>(a.grad) + RowIndex(a, i).of_class_0(a);
    along_kept_classes(lane, width, classes, [&](int u, int k) {
      const T value = gradients.scale == 0 ? gradients.finish(T(0), k) : gradients.value(to_real(in[u]), k);
      out[k * a.inner] = to_storage<G>(value);
    });
  }
  if (writes) static_cast<T*>(r.weights)[i] = own.weight;
  const double loss = double(BlockTeam::here().sum(writes && sample.valid ? own.factor * sample.loss : T(0)));
  if (threadIdx.x == 0) *static_cast<T*>(r.loss) = T(loss);
}

}  // namespace

const char* robust_logit_loss_block(const LogitForward& a, const Robust& r, void* stream) {
  if (a.rows() == 0) return robust_fwd(r, stream);
  const int width = lanes_for(a.classes, kTeamClasses);
  for_types(a.dtype, [&](auto types) {
    using K = decltype(types);
    if constexpr (sizeof(typename K::T) == sizeof(float)) {
      auto with = [&](auto general, auto target) {
        const auto kernel = robust_logit_loss_block_kernel<typename K::S, typename K::T, typename K::G,
                                                           decltype(general)::value, decltype(target)::value>;
        LAUNCH(kernel, 1, kTeamThreads, 0, static_cast<cudaStream_t>(stream), a, r, width);
      };
      using Yes = std::true_type;
      using No = std::false_type;
      if (is_target(r))
        is_general(a) ? with(Yes{}, Yes{}) : with(No{}, Yes{});
      else
        is_general(a) ? with(Yes{}, No{}) : with(No{}, No{});
    }
  });
  return failure();
}

}  // namespace gpu
}  // namespace absgd
