// The launch of a kernel over rows of logits: the types, the walk and the number of blocks, from the logits at hand.
#pragma once

#include <atomic>
#include <type_traits>

#include "rows.cuh"

namespace absgd {
namespace gpu {

// The template arguments of a kernel over rows.
template <class Types, Walk walk_, bool kGeneral_>
struct RowKernel : Types {
  static constexpr Walk walk = walk_;
  static constexpr bool kGeneral = kGeneral_;
};

struct RowShape {
  Walk walk;
  int width;  // lanes that share a row
  int64_t tiles;
};

// With so many rows, one warp for each row fills the chip: 132 multiprocessors of 16 warps (H100).
constexpr int64_t kManyRows = 2048;

// Chooses the walk. Rows whose classes lie apart take Walk::columns. Long rows take a block each, and so do rows of
// medium length if there are too few to fill the chip with one warp each. All others take lanes of a warp.
inline RowShape shape_of(const LogitInput& a) {
  const int64_t rows = a.rows();
  const int per_pack = a.dtype == Dtype::f64 ? 2 : a.dtype == Dtype::f32 ? 4 : 8;
  auto tiles = [&](int64_t rows_of_tile) { return (rows + rows_of_tile - 1) / rows_of_tile; };
  if (a.stride_class != 1 || a.inner != 1) return {Walk::columns, 1, tiles(threads_of(Walk::columns))};
  const int64_t packs = a.classes / per_pack, threads = threads_of(Walk::block);
  if (packs >= 4 * threads || (packs >= threads / 2 && rows < kManyRows)) return {Walk::block, int(threads), tiles(1)};
  const int width = lanes_for(a.classes, per_pack);
  return {Walk::lanes, width, tiles(threads_of(Walk::lanes) / width)};
}

inline bool is_general(const LogitInput& a) { return a.adjust != nullptr || a.all_classes_weigh(); }

// Calls f(RowKernel, shape) for these logits, where f launches the kernel. Returns failure().
template <class F>
const char* for_row_kernel(const LogitInput& a, F f) {
  const RowShape shape = shape_of(a);
  for_types(a.dtype, [&](auto types) {
    auto with = [&](auto general) {
      constexpr bool kGeneral = decltype(general)::value;
      switch (shape.walk) {
        case Walk::lanes:
          return f(RowKernel<decltype(types), Walk::lanes, kGeneral>{}, shape);
        case Walk::block:
          return f(RowKernel<decltype(types), Walk::block, kGeneral>{}, shape);
        default:
          return f(RowKernel<decltype(types), Walk::columns, kGeneral>{}, shape);
      }
    };
    is_general(a) ? with(std::true_type{}) : with(std::false_type{});
  });
  return failure();
}

// The number of blocks of a kernel that the chip holds at once. CUDA is asked once for each device. Each kernel needs
// an object of its own.
struct Resident {
  std::atomic<int> of_device[64] = {};

  template <class K>
  int64_t operator()(K kernel, int threads, int64_t shared_blocks = INT64_MAX) {
    int device = 0;
    cudaGetDevice(&device);
    std::atomic<int>& known = of_device[device % 64];
    int blocks = known.load(std::memory_order_relaxed);
    if (blocks == 0) {
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), threads, 0);
      known.store(blocks, std::memory_order_relaxed);
    }
    int processors = 1;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    const int64_t each = blocks < shared_blocks ? blocks : shared_blocks;
    return each < 1 ? processors : each * processors;
  }
};

// The number of blocks of a launch that walks along `tiles`: at most as many as the chip holds, and at most as many as
// there is room for sums (kMostBlocks).
inline unsigned grid_of(int64_t tiles, int64_t resident) {
  const int64_t most = resident < kMostBlocks ? resident : kMostBlocks;
  return unsigned(tiles < most ? tiles : most);
}

}  // namespace gpu
}  // namespace absgd
