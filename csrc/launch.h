// The arguments of the kernels: raw pointers, sizes and numbers. There are no headers of torch and none of CUDA here,
// so whatever can fill these structs can run the kernels. The structs that CPU and GPU share come first, then the
// launchers of the GPU. cpu/kernels.h has the kernels of the CPU.
#pragma once

#include <stdint.h>

#include "math.h"

// These functions must be inlined. Otherwise the linker keeps one copy of all, which might be the one for AVX-512.
#define ABSGD_INLINE ABSGD_FN

namespace absgd {

enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Kernels compute in double for f64, and in float for all other dtypes. "real" in the comments below means that type.

// ---- losses on logits ----------------------------------------------------------------------------------------------

struct LogitInput {
  Dtype dtype;         // of logits
  const void* logits;  // (batch, classes, inner), any strides, in elements
  int64_t batch, classes, inner;
  int64_t stride_batch, stride_class, stride_inner;
  const void* target;  // (batch * inner), int64 or int32; null with soft targets
  bool target_int64;
  int64_t ignore_index;
  const void* soft;          // (batch, classes, inner) contiguous real: probabilities in place of labels; or null
  const uint8_t* mask;       // (batch * inner), 0 = ignored; or null
  const void* class_weight;  // (classes) real; or null = 1
  const void* adjust;        // (3, classes) real: S, D, M of math/losses.h; or null = 1, 0, 0
  LossNumbers loss;
  double smoothing_keep, smoothing_uniform;  // with label smoothing e: 1 - e, e / C (ClassWeights)

  ABSGD_INLINE int64_t rows() const { return batch * inner; }
  // Whether the loss has a term for every class of a row (soft targets, label smoothing), not for the label alone.
  ABSGD_INLINE bool all_classes_weigh() const { return soft != nullptr || loss.smoothing() != 0; }
};

// The weights of the term that every class of a row has, smoothing_coef() sum_k weight_k (-log p_k) (MATH §2.2, §2.4).
// v are the class weights, e the label smoothing, C the number of classes:
//     label smoothing    weight_k = v_k,                           smoothing_coef = e / C
//     soft targets t     weight_k = ((1 - e) t_k + e / C) v_k,     smoothing_coef = 1
template <class T>
struct ClassWeights {
  const T* v;       // (classes) or null = 1
  T keep, uniform;  // for soft targets: 1 - e, e / C

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
  double z_limit;  // a larger |z| counts as nonfinite
  double z_max;    // a larger z counts as nonfinite, too

  void* weights;  // (count) real
  void* factor;   // (count) real: d loss / d losses; or null
};

// ---- gradient scaling ----------------------------------------------------------------------------------------------

struct ScaleArgs {
  Dtype dtype;         // of grad
  void* grad;          // (batch, classes, inner) contiguous
  const void* source;  // what is scaled: of the same dtype, but f32 if grad is f16; may be grad itself
  int64_t batch, classes, inner;
  const void* upstream;  // (batch * inner) real; or null
  double scalar;         // the factor if upstream is null
};

// ---- step ---------------------------------------------------------------------------------------------------------
//
// One flat index counts the elements of all tensors. So threads get equal parts, whatever the sizes of the tensors.

struct Layout {
  int64_t dim;
  const int64_t *sizes, *strides;  // (dim), in elements

  ABSGD_INLINE int64_t count() const {
    int64_t out = 1;
    for (int64_t d = 0; d < dim; ++d) out *= sizes[d];
    return out;
  }
  // Whether element i of this layout and element i of the other lie at the same place, for every i.
  ABSGD_INLINE bool same(const Layout& other) const {
    if (dim != other.dim) return false;
    for (int64_t d = 0; d < dim; ++d)
      if (sizes[d] != other.sizes[d] || (sizes[d] > 1 && strides[d] != other.strides[d])) return false;
    return true;
  }
  // Whether the elements fill a block of memory, each place once. The order of the dimensions does not matter
  // (channels_last).
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

// One number in device memory. It is absent if data is null.
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
  void* grad;            // of the parameter's dtype and strides; written only if grad_scale divides it
  void* state[kStates];  // real, of the parameter's strides; null for a state that the rule does not keep
  DeviceNumber step;     // number of steps that this parameter took, if the rule counts them; see StepNumbers::counts
  int64_t begin, count;  // elements [begin, begin + count) of the flat index
  int32_t group;
  Dtype dtype;
};

struct StepTable {
  int64_t elements, tensor_count;
  const StepTensor* tensors;  // ordered by begin, without gaps
  const StepGroup* groups;
  bool checked;  // `overlap` is known for these tensors
  bool overlap;  // some of the tensors that are written share memory, so they are stepped one after the other
  // The next three are null or in the memory of the tensors' device.
  const float* grad_scale;  // GPU only: the gradients are divided by it and written back
  const float* found_inf;   // GPU only: if it is not 0, nothing is written
  // The gradients are multiplied by its scale, which is not written back. If it has nonfinite samples, nothing is
  // written.
  const Normalizer* robust;

  // Whether `robust` skips this step. It is read on the host, so it must be in the host's memory.
  ABSGD_INLINE bool skips() const { return robust != nullptr && robust->nonfinite > 0; }
};

constexpr int64_t kStepBlock = 64;  // a part of the flat index ends at a multiple of this number within a tensor

// ---- weighted step -------------------------------------------------------------------------------------------------
//
// One step of momentum SGD with G = sum_r factor_r g_r, where g_r are the rows of a block of per-sample gradients
// (MATH §3.4). StepTensor::grad is that block: row r of the batch begins at r * row_stride, and its elements lie as
// those of the parameter. A row whose factor is 0 takes no part, whatever it holds.
struct WeightedTable : StepTable {
  int64_t batch;
  const int64_t* row_stride;  // of each tensor, in elements
  // CPU only: the rows that take part, in order, and their factors
  int64_t rows;
  const int64_t* row;   // (rows)
  const void* factors;  // (rows) real
};

// ---- GPU: the launchers of cuda/ ------------------------------------------------------------------------------------
//
// A launcher puts its work on `stream` (a cudaStream_t) of the current device and returns at once. It returns null, or
// CUDA's error text. Numbers that change between steps (lambda, log s, a tensor lr, ...) are read on the device. So the
// host never waits, and a captured graph follows the changes.
namespace gpu {

// The versions as cudaDriverGetVersion and cudaRuntimeGetVersion report them (13000 is 13.0); 0 without a driver.
struct Versions {
  int driver, runtime;
};
Versions versions();

constexpr int64_t kOneBlock = 2048;    // one block weighs up to so many losses, four for each of its threads
constexpr int64_t kLossBlock = 1024;   // losses of each block, where there are more than kOneBlock
constexpr int64_t kMostBlocks = 2048;  // blocks of a launch over rows of logits; each stores one LossSums
constexpr int64_t kTeamThreads = 512;  // threads of the one block that keeps a small batch of logits in its registers
constexpr int kTeamClasses = 4;        // classes of a row that one of these threads keeps

// The number of lanes of a warp that share a row, a power of two. Each lane takes at least `per_lane` classes, if the
// row has as many.
inline int lanes_for(int64_t classes, int per_lane) {
  int width = 1;
  while (width < 32 && width * per_lane < classes) width *= 2;
  return width;
}
// Whether one block can hold the batch: each row has a team of lanes, and each lane at most kTeamClasses classes.
// ops/backends.py ONE_BLOCK makes the same decision.
inline bool fits_one_block(int64_t rows, int64_t classes) {
  const int width = lanes_for(classes, kTeamClasses);
  return classes <= width * kTeamClasses && rows * width <= kTeamThreads;
}

// A label out of range. The device cannot raise an error, so it ignores the row and reports the label. The host reads
// the report later.
struct LabelReport {
  long long label, row, classes, found;
};
// The report of this process, in host memory that every device can write; null if there is no such memory.
LabelReport* label_report();

// The arguments of a forward pass: per-sample losses, and the numbers of each row that the gradient needs.
struct LogitForward : LogitInput {
  void* losses;  // (rows) real
  void* valid;   // (rows) real: 1, or 0 = ignored; or null
  void* stats;   // (4, rows) real: max, then scale, at_label, smoothing_coef of math/losses.h RowGradient; or null
  LabelReport* report;  // or null
  // The gradient, for the kernels that make it in the forward pass: (batch, classes, inner) contiguous. For
  // logit_loss_with_grad it may be the memory of the logits.
  void* grad;
};

// The arguments of a backward pass: grad = upstream_i * factor_i * d loss_i / d logits, from the statistics of the
// rows.
struct LogitBackward : LogitInput {
  const void* stats;
  const void* upstream;  // real: one per row, or one number
  bool upstream_per_row;
  const void* z;             // (rows) real: RobustNumbers makes the factor of it; or null: the factor is 1
  const Weighing* weighing;  // given with z; the statistics contain the sample weights already
  void* grad;                // (batch, classes, inner) contiguous, of the logits' dtype
};

// The sums of the samples of one block of a launch, relative to their largest z. T is the real type of the losses.
template <class T>
struct alignas(16) LossSums {
  T max;       // largest finite z; the lowest number if there is none
  T sum;       // sum of exp(z - max)
  T weighted;  // sum of t exp(z - max) L, where t is the sample weight
  T plain;     // sum of t L
  int finite, nonfinite;
};

// RobustArgs with its numbers in device memory. NormalizerConfig::lam is used if there is no lam_on_device.
struct Robust : RobustArgs {
  DeviceNumber lam_on_device, log_s;  // NormalizerKind::target writes lambda, with `update` or without
  long long* nonfinite;               // raised by 1 after a batch with a nonfinite sample; or null
  bool update;                        // write log_s and nonfinite
  void* losses_out;                   // (count) real: the losses, 0 where ignored; or null
  void* valid_out;                    // (count) real: 1 or 0; or null
  void* loss;                         // one real; or null
  DeviceNumber new_log_s;
  double* dlog_s;  // WeightUpdate::dlog_s and dlog_s_state; or null
  // Single stages of the computation.
  double* partial_stats;      // not null: only these PartialStats are made
  const Normalizer* settled;  // not null: log s' and scale are taken from it
  bool bounded;               // settled->z_max takes the place of RobustArgs::z_max
  // For rows of logits. Nobody writes their weights: backward makes the weights from z.
  void* z;             // (count) real: z, -inf where ignored, NaN where nonfinite
  Weighing* weighing;  // output
  // Scratch for more than kOneBlock losses: the sums of every block of a launch, and their result.
  void* sums;             // (loss_blocks()) LossSums of real
  double* loss_partials;  // (loss_blocks())
  WeightUpdate* weight_update;
  double* shift;  // of NormalizerKind::target

  ABSGD_INLINE int64_t loss_blocks() const { return (count + kLossBlock - 1) / kLossBlock; }
};

// The losses, and validity and statistics if their pointers are given.
const char* logit_loss_fwd(const LogitForward&, void* stream);
const char* logit_loss_bwd(const LogitBackward&, void* stream);
// logit_loss_fwd, with robust.loss, z and weighing in the same launch. A finite max_weight takes a second launch,
// because the loss then needs log s' first. So does NormalizerKind::target. robust.sums: (kMostBlocks).
const char* robust_logit_loss_fwd(const LogitForward&, const Robust&, void* stream);
// The robust loss with weights and gradient, by a single block, for a batch that fits_one_block. Not for f64. The
// gradient has the dtype of the logits, but f32 for f16.
const char* robust_logit_loss_block(const LogitForward&, const Robust&, void* stream);
// The loss and the gradient of each row while the row is on the chip: one read and one write of the logits. This takes
// a factor that is known in advance. It is exp(z - robust.settled->log_s) with robust.settled, and then
// robust.partial_stats, loss and weights are made too. It is 1 without robust.settled.
const char* logit_loss_with_grad(const LogitForward&, const Robust&, void* stream);
const char* robust_fwd(const Robust&, void* stream);
// The arguments of robust_settle. Of Robust it uses lam_on_device, log_s, nonfinite and update.
struct Settle : Robust {
  const double* partials;  // (partials_count, partials_stride): the first three numbers of a row are PartialStats
  int64_t partials_count, partials_stride;
  double grad_multiplier;
  const double* reference;  // or null
  Normalizer* out;
};
const char* robust_settle(const Settle&, void* stream);
// The vjp of robust weights (math/weights.h robust_weight_vjp): one launch up to kOneBlock losses, two beyond.
// dot_partials: (loss_blocks() + 1) doubles.
const char* robust_weights_bwd(const Robust&, DeviceNumber lam, const void* upstream, DeviceNumber upstream_log_s,
                               const double* dlog_s, double* dot_partials, void* out, void* stream);
// Rectified weights (math/weights.h RectifiedNumbers), (count) real -> (count) real, in one launch of one block.
const char* rectified(Dtype, const void* products, int64_t count, void* weights, void* stream);
// ScaleArgs::upstream is in device memory. It is one number if `constant`.
const char* scale(const ScaleArgs&, bool constant, void* stream);
const char* step(const StepTable&, void* stream);
// One launch up to kOneBlock samples and as many tensors as its table holds. If a sample is nonfinite, only
// robust.new_log_s is written. With more than kOneBlock samples, or without elements, robust needs weights and factor.
const char* weighted_step(const WeightedTable&, const Robust&, void* stream);

}  // namespace gpu

}  // namespace absgd
