// What a kernel is given: raw pointers, sizes and numbers. No torch, no CUDA headers: anything that can fill these
// structs can run the kernels. First what CPU and GPU have in common, then the launchers of the GPU; cpu/kernels.h has
// those of the CPU.
#pragma once

#include <stdint.h>

#include "math.h"

// Inlined always: a copy that the linker keeps might be the one compiled for AVX-512.
#define ABSGD_INLINE ABSGD_FN

namespace absgd {

enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Everything is computed in double for f64 and in float otherwise; "real" below means that type.

// ---- losses on logits ----------------------------------------------------------------------------------------------

struct LogitInput {
  Dtype dtype;         // of logits
  const void* logits;  // (batch, classes, inner), any strides, in elements
  int64_t batch, classes, inner;
  int64_t stride_batch, stride_class, stride_inner;
  const void* target;  // (batch * inner), int64 or int32; null with soft targets
  bool target_int64;
  int64_t ignore_index;
  const void* soft;          // (batch, classes, inner) contiguous real, probabilities in place of labels; or null
  const uint8_t* mask;       // (batch * inner), 0 = ignored; or null
  const void* class_weight;  // (classes) real; or null = 1
  const void* adjust;        // (3, classes) real: S, D, M of math.h; or null = 1, 0, 0
  LossNumbers loss;
  double smoothing_keep, smoothing_uniform;  // with label smoothing e: 1 - e, e / C (ClassWeights)

  ABSGD_INLINE int64_t rows() const { return batch * inner; }
  // Every class weighs in the loss, not the label alone.
  ABSGD_INLINE bool all_classes_weigh() const { return soft != nullptr || loss.smoothing() != 0; }
};

// What class k weighs in the sum over all classes of a row, sum_k weight_k (-log p_k): times the factor
// smoothing_coef() of the row. With label smoothing e: v_k, and e / C; with soft targets t: ((1 - e) t_k + e / C) v_k,
// and 1.
template <class T>
struct ClassWeights {
  const T* v;       // (classes) or null = 1
  T keep, uniform;  // of soft targets: 1 - e, e / C

  static ABSGD_INLINE ClassWeights of(const LogitInput& a) {
    return {static_cast<const T*>(a.class_weight), T(a.smoothing_keep), T(a.smoothing_uniform)};
  }
  ABSGD_INLINE T smoothing_coef(bool soft) const { return soft ? T(1) : uniform; }
};

// ---- robust weights on a vector of losses --------------------------------------------------------------------------

struct RobustArgs : NormalizerConfig {
  Dtype dtype;  // f32 or f64
  int64_t count;
  const void* losses;         // (count) real
  const void* scores;         // (count) real: z = score / lam; or null = the losses
  const void* sample_weight;  // (count) real; or null = 1
  const uint8_t* valid;       // (count); or null = all
  double mix, max_weight;
  double z_limit;  // a larger |z| counts as non-finite
  double z_max;    // and so does a larger z

  void* weights;  // (count) real
  void* factor;   // (count) real: d loss / d losses; or null
};

// ---- gradient scaling ----------------------------------------------------------------------------------------------

struct ScaleArgs {
  Dtype dtype;         // of grad
  void* grad;          // (batch, classes, inner) contiguous
  const void* source;  // read from here, same dtype but f32 for f16; may be grad itself
  int64_t batch, classes, inner;
  const void* upstream;  // (batch * inner) real; or null
  double scalar;         // used where upstream is null
};

// ---- step ---------------------------------------------------------------------------------------------------------
//
// The elements of all tensors form one flat index space, so threads get equal parts whatever the sizes of the tensors.

struct Layout {
  int64_t dim;
  const int64_t *sizes, *strides;  // (dim), in elements

  ABSGD_INLINE int64_t count() const {
    int64_t out = 1;
    for (int64_t d = 0; d < dim; ++d) out *= sizes[d];
    return out;
  }
  // Element i of the one and element i of the other lie at the same place.
  ABSGD_INLINE bool same(const Layout& other) const {
    if (dim != other.dim) return false;
    for (int64_t d = 0; d < dim; ++d)
      if (sizes[d] != other.sizes[d] || (sizes[d] > 1 && strides[d] != other.strides[d])) return false;
    return true;
  }
  // The elements fill a block of memory, each place once, in whatever order of dimensions (channels_last).
  ABSGD_INLINE bool dense() const {
    int64_t block = 1;
    for (bool grew = true; grew;) {
      grew = false;
      for (int64_t d = dim - 1; d >= 0; --d)
        if (sizes[d] > 1 && strides[d] == block) {
          block *= sizes[d];
          grew = true;
        }
    }
    return block == count() || count() == 0;
  }
};

// One number in device memory; data = null: absent.
struct DeviceNumber {
  void* data;
  bool is_double;
  int32_t device;
};

struct StepGroup : StepNumbers {
  DeviceNumber lr_tensor;  // GPU: used instead of lr
};

struct StepTensor {
  void* param;           // (count) dense
  void* grad;            // of the parameter's dtype and strides; written only where it is unscaled
  void* state[kStates];  // real, the parameter's strides; null where the group keeps none (StepNumbers::states)
  DeviceNumber step;     // how many steps this parameter took, where the rule counts them; the kernels add 1
  int64_t begin, count;  // elements [begin, begin + count) of the flat index
  int32_t group;
  Dtype dtype;
};

struct StepTable {
  int64_t elements, tensor_count;
  const StepTensor* tensors;  // ordered by begin, without gaps
  const StepGroup* groups;
  bool checked;  // `overlap` is known for these tensors
  bool overlap;  // some of the tensors written share memory: one after the other, then
  // In the memory of the tensors' device, or null
  const float* grad_scale;  // GPU: the gradients are divided by it, and written back so
  const float* found_inf;   // GPU: not 0: nothing is written
  const Normalizer*
      robust;  // the gradients are multiplied by its scale, not written back; nonfinite: nothing is written

  // Both on the host, of memory that is the host's.
  ABSGD_INLINE bool skips() const { return robust != nullptr && robust->nonfinite > 0; }
};

constexpr int64_t kStepBlock = 64;  // a part of the flat index ends at a multiple of this within a tensor

// ---- weighted step -------------------------------------------------------------------------------------------------
//
// G = sum_r factor_r g_r over the rows of a block of per-sample gradients, and a step of momentum SGD with it.
// StepTensor::grad is the block: row r of the batch at r * row_stride, its elements placed as the parameter's. Rows
// whose factor is 0 take no part, whatever they hold.
struct WeightedTable : StepTable {
  int64_t batch;
  const int64_t* row_stride;  // of each tensor, in elements
  // CPU: the rows that take part, in order, and what they weigh
  int64_t rows;
  const int64_t* row;   // (rows)
  const void* factors;  // (rows) real
};

// ---- GPU: the launchers of cuda/ ------------------------------------------------------------------------------------
//
// Each puts its work on `stream` (a cudaStream_t) of the current device and returns at once: null, or CUDA's words for
// what went wrong. Numbers that change between steps (lambda, log s, a tensor lr, ...) are read on the device, so that
// the host never waits and a captured graph follows them.
namespace gpu {

// As cudaDriverGetVersion and cudaRuntimeGetVersion say them (13000 is 13.0); 0 without a driver.
struct Versions {
  int driver, runtime;
};
Versions versions();

constexpr int64_t kOneBlock = 2048;    // so many losses are weighted by one block: four for each of its threads
constexpr int64_t kLossBlock = 1024;   // beyond, losses of a block
constexpr int64_t kMostBlocks = 2048;  // of a launch over rows of logits, each of which leaves one LossSums
constexpr int64_t kTeamThreads = 512;  // of the one block that keeps a small batch of logits in its registers
constexpr int kTeamClasses = 4;        // of a row, in one of these threads

// Lanes of a warp that share a row, a power of two: each takes at least `per_lane` classes, if the row has them.
inline int lanes_for(int64_t classes, int per_lane) {
  int width = 1;
  while (width < 32 && width * per_lane < classes) width *= 2;
  return width;
}
// Whether one block takes the batch: each row has a team of lanes, and each lane a few classes (ops/backends.py
// ONE_BLOCK).
inline bool fits_one_block(int64_t rows, int64_t classes) {
  const int width = lanes_for(classes, kTeamClasses);
  return classes <= width * kTeamClasses && rows * width <= kTeamThreads;
}

// A label out of range is not an error on the device: its row is ignored, and the host finds this later.
struct LabelReport {
  long long label, row, classes, found;
};
// One per process, in host memory that every device writes; null where there is none.
LabelReport* label_report();

// Per-sample losses, and what the gradient needs of each row.
struct LogitForward : LogitInput {
  void* losses;         // (rows) real
  void* valid;          // (rows) real, 1 or 0 = ignored; or null
  void* stats;          // (4, rows) real: max, then math/losses.h RowGradient: scale, at_label, smoothing_coef; or null
  LabelReport* report;  // or null
  // Where the gradient is made in the forward pass: (batch, classes, inner) contiguous; for logit_loss_with_grad also
  // the logits themselves.
  void* grad;
};

// grad = upstream_i * factor_i * d loss_i / d logits from the statistics
struct LogitBackward : LogitInput {
  const void* stats;
  const void* upstream;  // real: one per row, or one number
  bool upstream_per_row;
  const void* z;             // (rows) real: the factor is RobustNumbers' of this z; or null = 1
  const Weighing* weighing;  // with z; the sample weights are in the statistics already
  void* grad;                // (batch, classes, inner) contiguous, of the logits' dtype
};

// What the losses of some samples come to, relative to their largest z: of one block of a launch. T: their real.
template <class T>
struct alignas(16) LossSums {
  T max;       // largest z that counts; the lowest number without
  T sum;       // sum of exp(z - max)
  T weighted;  // sum of t exp(z - max) L, t the sample weight
  T plain;     // sum of t L
  int finite, nonfinite;
};

// RobustArgs with its numbers in device memory (without lam_on_device NormalizerConfig::lam serves).
struct Robust : RobustArgs {
  const void* valid_rows;  // (count) real, instead of RobustArgs::valid; or null
  DeviceNumber lam_on_device, log_s;
  long long* nonfinite;  // one more after a batch with a nonfinite sample; or null
  bool update;           // write log_s and nonfinite
  void* losses_out;      // (count) real: the losses, 0 where ignored; or null
  void* valid_out;       // (count) real: 1 or 0; or null
  void* stats;           // (4, count) real, rows 1 to 3 of which are multiplied by the factor; or null
  void* loss;            // one real; or null
  DeviceNumber new_log_s;
  double* dlog_s;  // WeightUpdate::dlog_s and dlog_s_state; or null
  // The stages by themselves: only the partial stats are made; or what is settled is taken from elsewhere.
  double* partial_stats;      // PartialStats; or null
  const Normalizer* settled;  // or null
  bool bounded;               // RobustArgs::z_max is settled->z_max
  // Of rows of logits, whose weights nobody writes: backward makes them from z.
  void* z;             // (count) real: z, -inf where ignored, NaN where nonfinite
  Weighing* weighing;  // out
  // Scratch: sums of every block of a launch, and what they come to (vectors beyond kOneBlock losses)
  void* sums;             // (sum_blocks()) LossSums of real
  double* loss_partials;  // (sum_blocks())
  WeightUpdate* weight_update;

  ABSGD_INLINE int64_t loss_blocks() const { return (count + kLossBlock - 1) / kLossBlock; }
};

// Losses and, where asked for, validity and statistics.
const char* logit_loss_fwd(const LogitForward&, void* stream);
const char* logit_loss_bwd(const LogitBackward&, void* stream);
// The same, and robust.loss, z and weighing, in one launch; two with a finite max_weight, whose loss needs log s'
// first. robust.sums: (kMostBlocks).
const char* robust_logit_loss_fwd(const LogitForward&, const Robust&, void* stream);
// The same with weights and the gradient made at once by one block, for what fits_one_block and no f64; the gradient is
// of the logits' dtype but f32 for f16.
const char* robust_logit_loss_block(const LogitForward&, const Robust&, void* stream);
// Each row's losses and gradient while it is on the chip, one read and one write of the logits, because the factor of
// a row is known: exp(z - robust.settled->log_s) (robust.partial_stats, loss and weights are made too), or 1 without
// settled.
const char* logit_loss_with_grad(const LogitForward&, const Robust&, void* stream);
const char* robust_fwd(const Robust&, void* stream);
// Robust::lam_on_device, log_s, nonfinite and update are used; out: one Normalizer.
struct Settle : Robust {
  const double* partials;  // (partials_count, partials_stride) of which the first three are PartialStats
  int64_t partials_count, partials_stride;
  double grad_multiplier;
  const double* reference;  // or null
  Normalizer* out;
};
const char* robust_settle(const Settle&, void* stream);
// dot_partials: (loss_blocks() + 1) doubles. One launch up to kOneBlock losses.
const char* robust_weights_bwd(const Robust&, DeviceNumber lam, const void* upstream, DeviceNumber upstream_log_s,
                               const double* dlog_s, double* dot_partials, void* out, void* stream);
// (count) real -> (count) real, in one launch of one block
const char* rectified(Dtype, const void* products, int64_t count, void* weights, void* stream);
// ScaleArgs::upstream is in device memory, `constant`: one number
const char* scale(const ScaleArgs&, bool constant, void* stream);
const char* step(const StepTable&, void* stream);
// One launch up to kOneBlock rows and as many tensors as it holds. Where a sample is nonfinite nothing but
// robust.new_log_s is written. Beyond kOneBlock rows, or without elements, robust needs weights and factor.
const char* weighted_step(const WeightedTable&, const Robust&, void* stream);

}  // namespace gpu

}  // namespace absgd
