// How the threads of a launch share the rows of a matrix of logits: the row that a thread works on, the label of that
// row, and the walk along its classes. Nothing here knows a loss.
//
// There are three walks:
//     Walk::lanes      some lanes of a warp share a row. The classes are adjacent in memory.
//     Walk::block      a whole block shares a row. The classes are adjacent in memory.
//     Walk::columns    each thread has a row of its own, and neighbouring threads have neighbouring rows. The classes
//                      lie apart (a class stride other than 1: transposed logits, (B, C, d1, ...)).
// In the first two each thread reads 16 bytes at a time.
#pragma once

#include "tile.cuh"

namespace absgd {
namespace gpu {

enum class Walk : int { lanes = 0, block = 1, columns = 2 };

constexpr int threads_of(Walk walk) { return walk == Walk::columns ? 128 : 256; }
// The number of blocks that a multiprocessor must be able to hold, which bounds the registers of a thread. Two blocks
// of 256 threads leave 128 registers a thread. Three leave 80, where long rows are only read and in plain float: then
// 48 KB are under way. With fewer registers some kernels spill.
template <class T>
constexpr int blocks_of(Walk walk, bool reads_only = false) {
  return (reads_only && walk == Walk::block && sizeof(T) == 4 ? 3 : 2) * 256 / threads_of(walk);
}

// ---- the rows of a block -------------------------------------------------------------------------------------------

// The rows that a block works on together form a tile. Place is the place of one thread in its tile: its row, and its
// lane in the team that shares the row. `width`: the lanes of a team (Walk::lanes).
template <Walk walk>
struct Place {
  int64_t row;
  int lane;
  bool inside;

  static __device__ __forceinline__ int64_t rows_of_tile(int width) {
    return walk == Walk::block ? 1 : walk == Walk::columns ? blockDim.x : blockDim.x / width;
  }
  __device__ __forceinline__ Place(int64_t rows, int width, int64_t tile) {
    lane = walk == Walk::columns ? 0 : walk == Walk::block ? threadIdx.x : threadIdx.x % width;
    row = tile * rows_of_tile(width) + (walk == Walk::columns ? threadIdx.x
                                        : walk == Walk::block ? 0
                                                              : threadIdx.x / width);
    inside = row < rows;
    if (!inside) row = rows - 1;  // The thread takes part in the shuffles, but its results are not used.
  }
  // Whether this thread writes the numbers that a row has only one of.
  __device__ __forceinline__ bool writes() const { return inside && lane == 0; }
  // The distance from one class of this thread to its next.
  static __device__ __forceinline__ int class_step(int width) {
    return walk == Walk::columns ? 1 : walk == Walk::block ? blockDim.x : width;
  }
};

// Calls f(place) for every tile of this block. A block walks along the tiles with the stride of the launch. So a launch
// needs no more blocks than the chip holds, and stores no more sums than that.
template <Walk walk, class F>
__device__ __forceinline__ void along_row_tiles(const LogitInput& a, int width, F f) {
  const int64_t rows = a.rows(), each = Place<walk>::rows_of_tile(width), tiles = (rows + each - 1) / each;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) f(Place<walk>(rows, width, tile));
}

// The team of threads that shares a row.
template <Walk walk>
__device__ __forceinline__ auto team_of(int lane, int width) {
  if constexpr (walk == Walk::block)
    return BlockTeam::here();
  else
    return WarpTeam{lane, width};
}

// ---- where a row lies ----------------------------------------------------------------------------------------------

// Row i as (batch, inner). Most logits have no inner dimensions, and then a 64-bit division of 60 instructions is
// saved.
struct RowIndex {
  int64_t batch, inner;
  __device__ __forceinline__ RowIndex(const LogitInput& a, int64_t i)
      : batch(a.inner == 1 ? i : i / a.inner), inner(a.inner == 1 ? 0 : i - batch * a.inner) {}
  // The offset of the row's class 0 in a contiguous (batch, classes, inner).
  __device__ __forceinline__ int64_t of_class_0(const LogitInput& a) const {
    return batch * a.classes * a.inner + inner;
  }
};

template <class S>
__device__ __forceinline__ const S* row_of(const LogitInput& a, int64_t i) {
  const RowIndex index(a, i);
  return static_cast<const S*>(a.logits) + index.batch * a.stride_batch + index.inner * a.stride_inner;
}

// ---- labels --------------------------------------------------------------------------------------------------------

struct Label {
  int64_t y;
  bool valid;
};

// The label and the mask of a row as they stand in memory. They are loaded long before `checked` looks at them, so that
// other loads need not wait.
struct RawLabel {
  int64_t y;
  uint8_t on;

  __device__ __forceinline__ RawLabel(const LogitInput& a, int64_t i) {
    y = a.soft != nullptr ? -1
        : a.target_int64  ? static_cast<const long long*>(a.target)[i]
                          : static_cast<const int*>(a.target)[i];
    on = a.mask == nullptr ? 1 : a.mask[i];
  }
  // The label, and whether the row counts. The thread with `reports` reports a label out of range.
  __device__ __forceinline__ Label checked(const LogitInput& a, LabelReport* report, int64_t i, bool reports) const {
    if (a.soft != nullptr) return {-1, on != 0};
    if (y == a.ignore_index) return {0, false};
    if (y < 0 || y >= a.classes) {
      if (reports && report != nullptr) {  // Two stores of 16 bytes each: label and row come from the same thread.
        *reinterpret_cast<longlong2*>(&report->label) = longlong2{(long long)y, (long long)i};
        __threadfence_system();  // The host sees `found` no sooner than label and row.
        *reinterpret_cast<longlong2*>(&report->classes) = longlong2{(long long)a.classes, 1};
      }
      return {0, false};
    }
    return {y, on != 0};
  }
};

// ---- along the classes of a row ------------------------------------------------------------------------------------

constexpr int kLoadsInFlight = 4;  // loads that a thread starts before it uses the first

// The source of a row's packs of 16 bytes: here the memory of the logits.
template <class S>
struct FromMemory {
  const S* packs;
  __device__ __forceinline__ uint4 operator()(int p) const { return load_raw(packs + p * Pack<S>::N); }
};
template <class S>
struct StartInMemory {
  __device__ __forceinline__ FromMemory<S> operator()(const S* packs) const { return {packs}; }
};

// The walk along the adjacent classes of a row, by a team:
//     1. Each thread starts the loads of its first packs.
//     2. begin() says whether the row counts. It may wait for the label of the row. If it returns false, the walk ends.
//     3. f.one(value, class) is called for each class before the first multiple of 16 bytes.
//     4. f.pack(values, first class, number of the pack) is called for N classes at a time, with the next loads under
//     way.
//     5. f.one(value, class) is called for each class after the last whole pack.
// from(address of the first pack) makes the source of the packs.
template <class S, class Team, class From, class Begin, class F>
__device__ __forceinline__ void along_adjacent_classes(const S* x, int classes, const Team& team, From from,
                                                       Begin begin, F& f) {
  constexpr int N = Pack<S>::N, kLoads = F::kGeneral ? 2 : kLoadsInFlight;  // Class vectors take the registers.
  const int boundary = to_boundary(x), head = boundary < classes ? boundary : classes;
  const int packs = (classes - head) / N, width = team.width;
  const auto source = from(x + head);
  uint4 in[kLoads];
  int p = team.lane;
  auto load = [&] {
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
      if (p + u * width < packs) in[u] = source(p + u * width);
  };
  load();
  if (!begin()) return;
  for (int k = team.lane; k < head; k += width) f.one(to_real(x[k]), k);
  while (p + (kLoads - 1) * width < packs) {
#pragma unroll
    for (int u = 0; u < kLoads; ++u) f.template pack<S>(in[u], head + (p + u * width) * N, p + u * width);
    p += kLoads * width;
    load();
  }
  if constexpr (kLoads > 1) {
#pragma unroll
    for (int u = 0; u < kLoads - 1; ++u)  // At most kLoads - 1 packs are left.
      if (p + u * width < packs) f.template pack<S>(in[u], head + (p + u * width) * N, p + u * width);
  }
  for (int k = head + packs * N + team.lane; k < classes; k += width) f.one(to_real(x[k]), k);
}

// Calls f.one(value, class) for all classes of a row, by one thread.
template <class S, class F>
__device__ __forceinline__ void along_strided_classes(const S* x, int classes, int64_t stride, F& f) {
  int k = 0;
  for (; k + kLoadsInFlight <= classes; k += kLoadsInFlight) {
    S in[kLoadsInFlight];
#pragma unroll
    for (int u = 0; u < kLoadsInFlight; ++u) in[u] = x[(k + u) * stride];
#pragma unroll
    for (int u = 0; u < kLoadsInFlight; ++u) f.one(to_real(in[u]), k + u);
  }
  for (; k < classes; ++k) f.one(to_real(x[k * stride]), k);
}

}  // namespace gpu
}  // namespace absgd
