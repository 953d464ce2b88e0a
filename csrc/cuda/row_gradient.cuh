// The gradient of one row of logits inside a kernel: a second walk along the classes, with the max of the row and the
// three numbers of math/losses.h RowGradient. It is the same for every loss.
#pragma once

#include "row_loss.cuh"

namespace absgd {
namespace gpu {

// The value of the gradient at each class of a row.
template <class T, bool kGeneral>
struct RowGradients {
  RowView<T, kGeneral> view;
  Powers<T> powers;
  T scale, at_label, smoothing_coef;
  T scale_of_powers;  // `scale` times the correction of `powers` (Powers::exact)

  __device__ __forceinline__ RowGradients(const RowView<T, kGeneral>& view, T max, const RowGradient<Lane<T>>& g,
                                          T factor)
      : view(view),
        powers(max),
        scale(g.scale * factor),
        at_label(g.at_label * factor),
        smoothing_coef(g.smoothing_coef * factor),
        scale_of_powers(scale * powers.exact()) {}
  __device__ __forceinline__ T value(T x, int k) const { return finish(powers(view.logit(x, k)) * scale_of_powers, k); }
  // The gradient at class k, from e = exp(a_k - max) * scale.
  __device__ __forceinline__ T finish(T e, int k) const { return shaped(k == view.label ? at_label : e, k); }
  // S_k (e - smoothing_coef weight_k): applies class weights and class vectors.
  __device__ __forceinline__ T shaped(T e, int k) const {
    if (!kGeneral) return e;
    if (smoothing_coef != 0) e -= smoothing_coef * view.class_weight(k);
    return e * view.slope(k);
  }
  // The gradient at N adjacent classes, in place of their logits. Only one pack of a row holds the label.
  template <int N>
  __device__ __forceinline__ void values(T (&x)[N], int first) const {
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = powers(view.logit(x[j], first + j)) * scale_of_powers;
    const unsigned target = unsigned(view.label - first);
    if (target < unsigned(N)) {
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = target == unsigned(j) ? at_label : x[j];
    }
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = shaped(x[j], first + j);
  }
};

// Writes the gradient of adjacent classes. The walk of rows.cuh calls it.
template <class S, class T, class G, bool kGeneral_>
struct WriteAdjacent {
  static constexpr bool kGeneral = kGeneral_;
  RowGradients<T, kGeneral> row;
  G* grad;
  bool wide;  // grad has the dtype and the alignment of the logits, so whole packs are stored

  __device__ __forceinline__ WriteAdjacent(const RowGradients<T, kGeneral>& row, G* grad, const S* x)
      : row(row),
        grad(grad),
        wide(sizeof(G) == sizeof(S) && to_boundary(grad) == to_boundary(reinterpret_cast<const G*>(x))) {}
  __device__ __forceinline__ void one(T x, int k) const { grad[k] = to_storage<G>(row.value(x, k)); }
  template <class>
  __device__ __forceinline__ void pack(const uint4& in, int first, int) const {
    constexpr int N = Pack<S>::N;
    T x[N];
    unpack<S>(in, x);
    row.values(x, first);
    if constexpr (sizeof(G) == sizeof(S))
      if (wide) return store_raw(grad + first, absgd::gpu::pack<G>(x));
#pragma unroll
    for (int j = 0; j < N; ++j) grad[first + j] = to_storage<G>(x[j]);
  }
};

// Writes the gradient of classes that lie apart.
template <class G, class T, bool kGeneral_>
struct WriteStrided {
  static constexpr bool kGeneral = kGeneral_;
  RowGradients<T, kGeneral> row;
  G* grad;
  int64_t stride;
  __device__ __forceinline__ void one(T x, int k) const { grad[k * stride] = to_storage<G>(row.value(x, k)); }
};

// Writes the gradient of one row, by the threads of its team. `from` makes the source of the packs. With `early`, the
// first loads start before it is known whether the row counts. That is not allowed where the gradient overwrites the
// logits: another thread may be writing what this one would load in vain.
template <class S, class G, Walk walk, bool early, class T, bool kGeneral, class From>
__device__ __forceinline__ void write_row(const LogitInput& a, G* grads, const Place<walk>& place, int width,
                                          const S* x, const RowGradients<T, kGeneral>& row, From from) {
  const int classes = int(a.classes), lane = place.lane, step = Place<walk>::class_step(width);
  G* grad = grads + RowIndex(a, place.row).of_class_0(a);
  const bool counts = row.scale != 0;
  if constexpr (walk == Walk::columns) {
    const WriteStrided<G, T, kGeneral> write{row, grad, a.inner};
    along_strided_classes(x, counts ? classes : 0, a.stride_class, write);
  } else {
    const WriteAdjacent<S, T, G, kGeneral> write(row, grad, x);
    const WarpTeam team{lane, step};  // It only says which thread takes which classes.
    along_adjacent_classes(x, early || counts ? classes : 0, team, from, [&] { return counts; }, write);
  }
  if (counts) return;
  // The row is ignored or has weight 0. Its gradient must not depend on its logits, whatever these are.
  const int64_t stride = walk == Walk::columns ? a.inner : 1;
  for (int k = lane; k < classes; k += step) grad[k * stride] = to_storage<G>(row.finish(T(0), k));
}

}  // namespace gpu
}  // namespace absgd
