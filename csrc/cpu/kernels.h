// The kernels of the CPU: their arguments, and the table of their addresses. There is one table for each instruction
// set. dispatch.cpp chooses one at run time.
//
// A kernel works on a range of a flat index: of tiles of rows, of blocks of losses, or of elements. The caller decides
// how the ranges are spread over threads. The result has the same bits for every choice.
#pragma once

#include "../launch.h"

namespace absgd {

// ---- losses.cpp ----------------------------------------------------------------------------------------------------

constexpr int64_t kFewClasses = 48;  // with fewer classes, a SIMD register holds rows instead of classes
constexpr int64_t kTileRows = 16;    // rows of a tile, which are finished together; scratch per row has whole tiles
constexpr int64_t kAllLabelsInRange = INT64_MAX;

// How the class vectors S and D act on a row (LogitArgs::adjust_form). 0: there are none.
enum AdjustForm : int { kAdjusts = 1, kScales = 2 /* S differs between classes */, kShifts = 4 /* D is not 0 */ };

// The arguments of the two walks over the logits, logit_stats and logit_grads, and of gradient_stats between them.
struct LogitArgs : LogitInput {
  int adjust_form;
  // The vectors S and D of bf16 logits in the order of the registers (tile.h PairedVectors); or null.
  // adjust_in_pairs writes them, and the two walks read them if adjust_form has kScales or kShifts.
  void* paired;
  // One number per row, padded to whole tiles. logit_stats writes them, and logit_grads or gradient_stats reads them.
  void* losses;             // real
  void* row_max;            // real
  void* row_sumexp_others;  // real, of math/losses.h Row
  void* row_exp_target;     // real, of math/losses.h Row
  void* coefficient;        // real, c of math/losses.h
  void* row_weight_total;   // real, sum_k weight_k of launch.h ClassWeights
  uint8_t* valid;           // 0 = ignored

  // The four numbers of math/losses.h RowGradient for each row: (4, rows) real, max, scale, at_label, smoothing_coef,
  // all 0 for an ignored row; or null. gradient_stats writes them. If they are given to logit_grads, it reads them
  // instead of the numbers above, of which it writes `valid`.
  void* stats;

  // The gradient: factor_i * d loss_i / d logits.
  void* grad;  // (batch, classes, inner) contiguous, of the logits' dtype but f32 for f16; or null
  // logit_stats may keep exp(a - max), so that logit_grads only scales it.
  bool keep;           // if along_classes(), and of real logits alone: it is kept in grad
  void* kept;          // if not along_classes(): it is kept here, (tiles, classes, kTileRows) real; or null
  const void* factor;  // (batch * inner) real; or null = 1

  ABSGD_INLINE bool needs_paired() const {
    return dtype == Dtype::bf16 && (adjust_form & (kScales | kShifts)) != 0 && along_classes();
  }
  ABSGD_INLINE bool along_classes() const { return stride_class == 1 && inner == 1 && classes >= kFewClasses; }
  ABSGD_INLINE int64_t tiles() const { return (rows() + kTileRows - 1) / kTileRows; }
};

// ---- weights.cpp ---------------------------------------------------------------------------------------------------

constexpr int64_t kBlock = 4096;  // losses of a partial sum. It is fixed, so sums do not depend on the threads.
ABSGD_INLINE int64_t blocks_of(const RobustArgs& a) { return (a.count + kBlock - 1) / kBlock; }

// The log-sum-exp of z over one block is max + log(sum).
struct BlockStats {
  double max, sum;
  int64_t finite, nonfinite;  // number of valid losses with a finite loss and z, and of valid losses without
};

// The search for the lambda of TargetESS (math/target.h). The scores of a batch are made into distances once, and every
// evaluation of the share reads these.
struct TargetDistances {
  double share;     // with the sign of lambda
  double extreme;   // the score that the distances are from
  double unit;      // 1 / spread, by which the moments are scaled so that squares do not overflow
  void* distances;  // (count) real: |extreme - score|, or inf where the sample does not count
};
struct TargetMoments {
  double first, second;  // sum of unit d, and of its square
};

// The arguments of robust_settle: the partial stats of processes, micro-batches or chunks, and the state they move.
struct SettleArgs {
  NormalizerConfig config;
  double log_s;
  const double* partials;  // (count, stride): the first three numbers of a row are PartialStats
  int64_t count, stride;
  double grad_multiplier;
  const double* reference;  // or null
};
struct SettleResult {
  Normalizer settled;
  double new_log_s;
};

// The arguments of robust_vjp (math/weights.h robust_weight_vjp).
struct VjpArgs {
  const void* upstream;  // (count) real: the upstream gradient of the weights
  double dot;            // sum of W_i upstream_i over the losses whose weight is not NaN
  double upstream_log_s;
  double dlog_s, dlog_s_state;  // WeightUpdate
  void* out;                    // (count) real
};

// ---- rules.cpp -----------------------------------------------------------------------------------------------------

// Weightings that have a kernel on the CPU only (MATH §4.2 to §4.4): W_i = n p_i over the n finite losses. A loss that
// is not valid has weight 0, and a valid loss that is not finite has weight NaN.
enum class Weighting : int32_t { cvar, chi2 };
struct WeightingArgs {
  Dtype dtype;  // f32 or f64
  int64_t count;
  const void* losses;    // (count) real
  const uint8_t* valid;  // (count); or null = all
  void* weights;         // (count) real
};
// CVaR and chi-squared DRO.
struct LevelArgs : WeightingArgs {
  Weighting weighting;
  double beta, reg;  // cvar
  double rho;        // chi2
  double* scratch;   // (count)
};
// Group DRO: q_g <- q_g exp(eta mean loss of g), normalised.
struct GroupArgs : WeightingArgs {
  const int64_t* groups;  // (count), in [0, n_groups) where valid
  int64_t n_groups;
  double eta;
  double* log_q;  // (n_groups): the state, over which the next state is written
  double* sums;   // (2 n_groups): scratch
};

// ---- the table -----------------------------------------------------------------------------------------------------

// ---- squares.cpp ---------------------------------------------------------------------------------------------------

constexpr int64_t kSquaresBlock = 16384;  // most numbers of a block. It is fixed, so sums do not depend on the threads.
struct SquaresBlock {
  const void* data;  // (count) dense
  int64_t count;
  Dtype dtype;
};

// The only list of the CPU's kernels: KERNEL(result, name, arguments). "tiles [begin, end)" and the like is the range
// that one call works on.
#define ABSGD_CPU_KERNELS(KERNEL)                                                                                     \
  /* how many bytes LogitArgs::paired takes */                                                                        \
  KERNEL(int64_t, paired_bytes, (const LogitArgs&))                                                                   \
  /* LogitArgs::adjust -> LogitArgs::paired */                                                                        \
  KERNEL(void, adjust_in_pairs, (const LogitArgs&))                                                                   \
  /* tiles [begin, end): losses and row statistics. Returns the first row whose label is out of range, or             \
     kAllLabelsInRange. */                                                                                            \
  KERNEL(int64_t, logit_stats, (const LogitArgs&, int64_t begin, int64_t end))                                        \
  /* tiles [begin, end): LogitArgs::stats */                                                                          \
  KERNEL(void, gradient_stats, (const LogitArgs&, int64_t begin, int64_t end))                                        \
  /* tiles [begin, end): the gradient */                                                                              \
  KERNEL(void, logit_grads, (const LogitArgs&, int64_t begin, int64_t end))                                           \
  /* blocks [begin, end): BlockStats of each */                                                                       \
  KERNEL(void, robust_block_stats, (const RobustArgs&, BlockStats*, int64_t begin, int64_t end))                      \
  /* blocks [begin, end): TargetRange of each */                                                                      \
  KERNEL(void, target_range, (const RobustArgs&, TargetRange*, int64_t begin, int64_t end))                           \
  /* blocks [begin, end): the distances, and TargetMoments of each */                                                 \
  KERNEL(void, target_distances,                                                                                      \
         (const RobustArgs&, const TargetDistances&, TargetMoments*, int64_t begin, int64_t end))                     \
  /* the ranges and the moments of all blocks -> the search */                                                        \
  KERNEL(TargetSolver, target_solver, (Dtype, const TargetDistances&, const TargetRange&, const TargetMoments&))      \
  /* blocks [begin, end): TargetSums of each by one u */                                                              \
  KERNEL(void, target_sums,                                                                                           \
         (const RobustArgs&, const void* distances, double u, TargetSums<double>*, int64_t begin, int64_t end))       \
  /* the sums of all blocks move the search on; whether it needs sums again */                                        \
  KERNEL(bool, target_next, (TargetSolver&, const TargetSums<double>&))                                               \
  /* the stats of all blocks -> log s', the next state and d log s' */                                                \
  KERNEL(WeightUpdate, robust_finish, (const RobustArgs&, const BlockStats*, double log_s))                           \
  /* the stats of all blocks -> PartialStats */                                                                       \
  KERNEL(PartialStats, robust_partial_stats, (const RobustArgs&, const BlockStats*))                                  \
  /* PartialStats of several -> log s' and the next state (math/weights.h normalizer_of) */                           \
  KERNEL(SettleResult, robust_settle, (const SettleArgs&))                                                            \
  /* blocks [begin, end): weights and factors; loss_sums[block] = sum of factor_i * loss_i */                         \
  KERNEL(void, robust_apply, (const RobustArgs&, const WeightUpdate&, double* loss_sums, int64_t begin, int64_t end)) \
  /* blocks [begin, end): dot_sums[block] = sum of W_i upstream_i */                                                  \
  KERNEL(void, robust_dot, (const RobustArgs&, const void* upstream, double* dot_sums, int64_t begin, int64_t end))   \
  /* blocks [begin, end): the vjp is written to VjpArgs::out */                                                       \
  KERNEL(void, robust_vjp, (const RobustArgs&, const VjpArgs&, int64_t begin, int64_t end))                           \
  /* (count) real -> (count) real (math/weights.h RectifiedNumbers) */                                                \
  KERNEL(void, rectified, (Dtype, const void* products, int64_t count, void* weights))                                \
  /* slices [begin, end) of `inner` elements; there are batch * classes of them */                                    \
  KERNEL(void, scale, (const ScaleArgs&, int64_t begin, int64_t end))                                                 \
  KERNEL(void, level_weights, (const LevelArgs&))                                                                     \
  /* returns whether the new log_q may be kept: every loss and every number of it is finite */                        \
  KERNEL(bool, group_weights, (const GroupArgs&))                                                                     \
  /* elements [begin, end) of the flat index. The counts of steps already include this step. */                       \
  KERNEL(void, step, (const StepTable&, int64_t begin, int64_t end))                                                  \
  /* elements [begin, end) of the flat index */                                                                       \
  KERNEL(void, weighted_step, (const WeightedTable&, int64_t begin, int64_t end))                                     \
  /* blocks [begin, end): sums[block] = sum of the squares of its numbers */                                          \
  KERNEL(void, squares, (const SquaresBlock* blocks, double* sums, int64_t begin, int64_t end))

struct CpuKernels {
  const char* isa;
#define ABSGD_MEMBER(result, name, arguments) result(*name) arguments;
  ABSGD_CPU_KERNELS(ABSGD_MEMBER)
#undef ABSGD_MEMBER
};

#ifdef ABSGD_ISA_NAMESPACE  // defined in the files that are compiled once for each instruction set
namespace ABSGD_ISA_NAMESPACE {
#define ABSGD_DECLARE(result, name, arguments) result name arguments;
ABSGD_CPU_KERNELS(ABSGD_DECLARE)
#undef ABSGD_DECLARE
}  // namespace ABSGD_ISA_NAMESPACE
#endif

const CpuKernels& cpu_kernels();
// The instruction sets that this build has and this machine runs, best first. use_cpu_isa chooses one of them by its
// name, and returns false for any other name.
int cpu_isa_count();
const char* cpu_isa_name(int index);
bool use_cpu_isa(const char* name);

}  // namespace absgd
