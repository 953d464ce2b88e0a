// What a kernel is given: raw pointers, sizes and numbers. No torch, no CUDA headers: anything that can fill these
// structs can run the kernels.
//
// A launcher works on a range of a flat index (tiles of rows, blocks of losses, ...), so the caller decides how ranges
// are spread over threads; the result does not depend on that choice, bit for bit.
#pragma once

#include <stdint.h>

#include "math.h"

// Inlined always: a copy that the linker keeps might be the one compiled for AVX-512.
#define ABSGD_INLINE ABSGD_FN

namespace absgd {

enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Everything is computed in double for f64 and in float otherwise; "real" below means that type.

// ---- losses on logits ----------------------------------------------------------------------------------------------

constexpr int64_t kFewClasses = 48;  // below, a SIMD register of the CPU holds rows instead of classes
constexpr int64_t kTileRows = 16;    // rows that one tile finishes together; per-row scratch is padded to whole tiles

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
  double share_keep, share_uniform;  // with label smoothing e: 1 - e, e / C (ClassShares)

  ABSGD_INLINE int64_t rows() const { return batch * inner; }
  // Every class has a share in the loss, not the label alone.
  ABSGD_INLINE bool spreads() const { return soft != nullptr || loss.smoothing() != 0; }
};

// What class k weighs in the sum over all classes of a row, sum_k weight_k (-log p_k): times the factor spread() of the
// row. With label smoothing e: v_k, and e / C; with soft targets t: ((1 - e) t_k + e / C) v_k, and 1.
template <class T>
struct ClassShares {
  const T* v;       // (classes) or null = 1
  T keep, uniform;  // of soft targets: 1 - e, e / C

  static ABSGD_INLINE ClassShares of(const LogitInput& a) {
    return {static_cast<const T*>(a.class_weight), T(a.share_keep), T(a.share_uniform)};
  }
  ABSGD_INLINE T spread(bool soft) const { return soft ? T(1) : uniform; }
};

// How the class vectors S and D come to a row (LogitArgs::adjust_form); 0 where there are none.
enum AdjustForm : int { kAdjusts = 1, kScales = 2 /* S differs between classes */, kShifts = 4 /* D is not 0 */ };

// The CPU's two walks over the logits.
struct LogitArgs : LogitInput {
  int adjust_form;
  // per row, written by logit_stats, read by logit_grads; padded to whole tiles
  void* losses;       // real
  void* row_max;      // real
  void* row_rest;     // real, see math.h Row
  void* row_own;      // real
  void* coefficient;  // real, c of math.h
  void* row_total;    // real, sum_k weight_k (ClassShares)
  uint8_t* valid;     // 0 = ignored

  // gradient: factor_i * d loss_i / d logits
  void* grad;  // (batch, classes, inner) contiguous, of the logits' dtype but f32 for f16; or null
  // logit_stats may leave exp(a - max) for logit_grads to scale:
  bool keep;           // along_classes(): in grad
  void* kept;          // else: here, (tiles, classes, kTileRows) real; or null
  const void* factor;  // (batch * inner) real; or null = 1

  ABSGD_INLINE bool along_classes() const { return stride_class == 1 && inner == 1 && classes >= kFewClasses; }
  ABSGD_INLINE int64_t tiles() const { return (rows() + kTileRows - 1) / kTileRows; }
};

constexpr int64_t kAllLabelsGood = INT64_MAX;

// ---- robust weights on a vector of losses --------------------------------------------------------------------------

constexpr int64_t kBlock = 4096;  // losses per partial sum: fixed, so sums do not depend on the number of threads

struct RobustArgs : RobustRule {
  Dtype dtype;  // f32 or f64
  int64_t count;
  const void* losses;         // (count) real
  const void* scores;         // (count) real: z = score / lam; or null = the losses
  const void* sample_weight;  // (count) real; or null = 1
  const uint8_t* valid;       // (count); or null = all
  double mix, max_weight;
  double z_limit;  // a larger |z| counts as non-finite
  double z_top;    // and so does a larger z

  void* weights;  // (count) real
  void* factor;   // (count) real: d loss / d losses; or null

  ABSGD_INLINE int64_t blocks() const { return (count + kBlock - 1) / kBlock; }
};

// log-sum-exp of z over one block: max + log(sum)
struct Partial {
  double max, sum;
  int64_t good, bad;  // valid rows with a finite loss and z; valid rows without
};

// Weights of the rules that CPU kernels have beside the robust ones (math.h): W_i = n p_i, mean 1 over the n rows with
// a finite loss; 0 where not valid, NaN where not finite.
enum class LossRule : int32_t { cvar, chi2 };
struct RuleArgs {
  Dtype dtype;  // f32 or f64
  int64_t count;
  const void* losses;    // (count) real
  const uint8_t* valid;  // (count); or null = all
  void* weights;         // (count) real
  double* scratch;       // cvar, chi2: (count)
};
// Group DRO: q_g <- q_g exp(eta mean loss of g), normalised.
struct GroupArgs : RuleArgs {
  const int64_t* groups;  // (count), in [0, n_groups) where valid
  int64_t n_groups;
  double eta;
  double* log_q;  // (n_groups), the next one is written over it
  double* sums;   // (2 n_groups)
};

struct VjpArgs {
  const void* upstream;  // (count) real: on the weights
  double dot;            // sum of W_i upstream_i over the rows that have a weight
  double upstream_log_s, share, share_state;
  void* out;  // (count) real
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
// The elements of all tensors form one flat index space, so threads get equal shares whatever the sizes of the tensors.

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
  const Settled* robust;    // the gradients are multiplied by its scale, not written back; bad rows: nothing is written

  // Both on the host, of memory that is the host's.
  ABSGD_INLINE bool skips() const { return robust != nullptr && robust->bad > 0; }
};

constexpr int64_t kStepBlock = 64;  // a share of the flat index ends at a multiple of this within a tensor

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

// ---- CPU: one row per operation; a set per instruction set, chosen at run time (cpu/dispatch.cpp) -------------------

struct CpuKernels {
  const char* isa;
  // tiles [begin, end): losses and row statistics; returns the first row with a label out of range, or kAllLabelsGood
  int64_t (*logit_stats)(const LogitArgs&, int64_t begin, int64_t end);
  // tiles [begin, end): the gradient
  void (*logit_grads)(const LogitArgs&, int64_t begin, int64_t end);
  // blocks [begin, end)
  void (*robust_partials)(const RobustArgs&, Partial* partials, int64_t begin, int64_t end);
  // all partials -> log s', state, share
  Outcome (*robust_finish)(const RobustArgs&, const Partial* partials, double log_s);
  // all partials -> one; `count` rows of totals -> log s', state (math.h settled_of)
  Totals (*robust_totals)(const RobustArgs&, const Partial* partials);
  Settled (*robust_settle)(const RobustArgs&, const double* totals, int64_t count, int64_t stride, double log_s,
                           double share, const double* reference, double* new_log_s);
  // blocks [begin, end): weights and factors; loss_partials[block] = sum of factor_i * loss_i
  void (*robust_apply)(const RobustArgs&, const Outcome&, double* loss_partials, int64_t begin, int64_t end);
  // blocks [begin, end): dot_partials[block] = sum of W_i d_i
  void (*robust_dot)(const RobustArgs&, const void* upstream, double* dot_partials, int64_t begin, int64_t end);
  // blocks [begin, end): vjp written to out
  void (*robust_vjp)(const RobustArgs&, const VjpArgs&, int64_t begin, int64_t end);
  // first, second: beta and reg, or rho
  void (*rule_weights)(const RuleArgs&, LossRule, double first, double second);
  // whether log_q may be kept: no bad row, no number beyond the range
  bool (*group_weights)(const GroupArgs&);
  // (count) real -> (count) real (math.h RectifiedNumbers)
  void (*rectified)(Dtype, const void* products, int64_t count, void* weights);
  // (batch * classes) slices [begin, end) of `inner` elements
  void (*scale)(const ScaleArgs&, int64_t begin, int64_t end);
  // elements [begin, end) of the flat index; the counts of steps already include this one
  void (*step)(const StepTable&, int64_t begin, int64_t end);
  // elements [begin, end) of the flat index
  void (*weighted_step)(const WeightedTable&, int64_t begin, int64_t end);
};

const CpuKernels& cpu_kernels();
// Names of the instruction sets this build has and this machine runs, best first; `name` must be one of them.
int cpu_isa_count();
const char* cpu_isa_name(int index);
bool use_cpu_isa(const char* name);

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
// Whether one block takes the batch: each row has a team of lanes, and each lane a few classes (ops.py one_block).
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
  void* stats;          // (4, rows) real: max, then math.h RowGradient: scale, at_label, spread; or null
  LabelReport* report;  // or null
  // Where the gradient is made in the forward pass: (batch, classes, inner) contiguous; for logit_loss_made also the
  // logits themselves.
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

// What the losses of some rows come to, relative to their largest z: of one block of a launch. T: their real.
template <class T>
struct alignas(16) LossSums {
  T max;       // largest z that counts; the lowest number without
  T sum;       // sum of exp(z - max)
  T weighted;  // sum of t exp(z - max) L, t the sample weight
  T plain;     // sum of t L
  int good, bad;
};

// RobustArgs with its numbers in device memory (without lam_on_device RobustRule::lam serves).
struct Robust : RobustArgs {
  const void* valid_rows;  // (count) real, instead of RobustArgs::valid; or null
  DeviceNumber lam_on_device, log_s;
  long long* nonfinite;  // one more after a batch with a bad row; or null
  bool update;           // write log_s and nonfinite
  void* losses_out;      // (count) real: the losses, 0 where ignored; or null
  void* valid_out;       // (count) real: 1 or 0; or null
  void* stats;           // (4, count) real, rows 1 to 3 of which are multiplied by the factor; or null
  void* loss;            // one real; or null
  DeviceNumber new_log_s;
  double* shares;  // Outcome::share and share_state; or null
  // The stages by themselves: only the totals are made; or what is settled is taken from elsewhere.
  double* totals;          // 3: Totals; or null
  const Settled* settled;  // or null
  bool bounded;            // RobustArgs::z_top is settled->top
  // Of rows of logits, whose weights nobody writes: backward makes them from z.
  void* z;             // (count) real: z, -inf where ignored, NaN where bad
  Weighing* weighing;  // out
  // Scratch: sums of every block of a launch, and what they come to (vectors beyond kOneBlock losses)
  void* sums;             // (sum_blocks()) LossSums of real
  double* loss_partials;  // (sum_blocks())
  Outcome* outcome;

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
// a row is known: exp(z - robust.settled->log_s) (robust.totals, loss and weights are made too), or 1 without settled.
const char* logit_loss_made(const LogitForward&, const Robust&, void* stream);
const char* robust_fwd(const Robust&, void* stream);
// Robust::lam_on_device, log_s, nonfinite and update are used; out: one Settled.
struct Settle : Robust {
  const double* rows;  // (rows_count, rows_stride) of which the first three are Totals
  int64_t rows_count, rows_stride;
  double share;
  const double* reference;  // or null
  Settled* out;
};
const char* robust_settle(const Settle&, void* stream);
// dot_partials: (loss_blocks() + 1) doubles. One launch up to kOneBlock losses.
const char* robust_weights_bwd(const Robust&, DeviceNumber lam, const void* upstream, DeviceNumber upstream_log_s,
                               const double* shares, double* dot_partials, void* out, void* stream);
// (count) real -> (count) real, in one launch of one block
const char* rectified(Dtype, const void* products, int64_t count, void* weights, void* stream);
// ScaleArgs::upstream is in device memory, `constant`: one number
const char* scale(const ScaleArgs&, bool constant, void* stream);
const char* step(const StepTable&, void* stream);
// One launch up to kOneBlock rows and as many tensors as it holds. Where a row is bad nothing but robust.new_log_s is
// written. Beyond kOneBlock rows, or without elements, robust needs weights and factor.
const char* weighted_step(const WeightedTable&, const Robust&, void* stream);

}  // namespace gpu

}  // namespace absgd
