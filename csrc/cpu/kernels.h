// The kernels of the CPU: what each is given, and the table of them. There is one table per instruction set;
// dispatch.cpp chooses one at run time.
//
// A kernel works on a range of a flat index (tiles of rows, blocks of losses, elements), so the caller decides how
// ranges are spread over threads. The result does not depend on that choice, bit for bit.
#pragma once

#include "../launch.h"

namespace absgd {

// ---- losses.cpp ----------------------------------------------------------------------------------------------------

constexpr int64_t kFewClasses = 48;  // below, a SIMD register holds rows instead of classes
constexpr int64_t kTileRows = 16;    // rows that one tile finishes together; per-row scratch is padded to whole tiles
constexpr int64_t kAllLabelsInRange = INT64_MAX;

// How the class vectors S and D come to a row (LogitArgs::adjust_form); 0 where there are none.
enum AdjustForm : int { kAdjusts = 1, kScales = 2 /* S differs between classes */, kShifts = 4 /* D is not 0 */ };

// The two walks over the logits.
struct LogitArgs : LogitInput {
  int adjust_form;
  // One number per row, which logit_stats writes and logit_grads reads; padded to whole tiles.
  void* losses;             // real
  void* row_max;            // real
  void* row_sumexp_others;  // real, see math/losses.h Row
  void* row_exp_target;     // real
  void* coefficient;        // real, c of math/losses.h
  void* row_weight_total;   // real, sum_k weight_k (launch.h)
  uint8_t* valid;           // 0 = ignored

  // The gradient: factor_i * d loss_i / d logits.
  void* grad;  // (batch, classes, inner) contiguous, of the logits' dtype but f32 for f16; or null
  // logit_stats may leave exp(a - max) for logit_grads to scale:
  bool keep;           // along_classes(): in grad
  void* kept;          // else: here, (tiles, classes, kTileRows) real; or null
  const void* factor;  // (batch * inner) real; or null = 1

  ABSGD_INLINE bool along_classes() const { return stride_class == 1 && inner == 1 && classes >= kFewClasses; }
  ABSGD_INLINE int64_t tiles() const { return (rows() + kTileRows - 1) / kTileRows; }
};

// ---- weights.cpp ---------------------------------------------------------------------------------------------------

constexpr int64_t kBlock = 4096;  // losses per partial sum: fixed, so sums do not depend on the number of threads
ABSGD_INLINE int64_t blocks_of(const RobustArgs& a) { return (a.count + kBlock - 1) / kBlock; }

// log-sum-exp of z over one block: max + log(sum)
struct BlockStats {
  double max, sum;
  int64_t finite, nonfinite;  // valid losses that are finite and have a finite z; valid losses without
};

// What moves the normaliser: the partial stats of processes, micro-batches or chunks.
struct SettleArgs {
  NormalizerConfig config;
  double log_s;
  const double* partials;  // (count, stride), of which the first three are PartialStats
  int64_t count, stride;
  double grad_multiplier;
  const double* reference;  // or null
};
struct SettleResult {
  Normalizer settled;
  double new_log_s;
};

struct VjpArgs {
  const void* upstream;  // (count) real: on the weights
  double dot;            // sum of W_i upstream_i over the losses that have a weight
  double upstream_log_s;
  double dlog_s, dlog_s_state;  // WeightUpdate
  void* out;                    // (count) real
};

// ---- rules.cpp -----------------------------------------------------------------------------------------------------

// Weightings that only the CPU has kernels of (math/rules.h): W_i = n p_i, mean 1 over the n finite losses; 0 where not
// valid, NaN where not finite.
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
  double* log_q;  // (n_groups), the next one is written over it
  double* sums;   // (2 n_groups)
};

// ---- the table -----------------------------------------------------------------------------------------------------

// KERNEL(result, name, arguments): the only list of the CPU's kernels.
#define ABSGD_CPU_KERNELS(KERNEL)                                                                                     \
  /* tiles [begin, end): losses and row statistics; returns the first row with a label out of range, or               \
     kAllLabelsInRange */                                                                                             \
  KERNEL(int64_t, logit_stats, (const LogitArgs&, int64_t begin, int64_t end))                                        \
  /* tiles [begin, end): the gradient */                                                                              \
  KERNEL(void, logit_grads, (const LogitArgs&, int64_t begin, int64_t end))                                           \
  /* blocks [begin, end) */                                                                                           \
  KERNEL(void, robust_block_stats, (const RobustArgs&, BlockStats*, int64_t begin, int64_t end))                      \
  /* all blocks -> log s', the state and d log s' */                                                                  \
  KERNEL(WeightUpdate, robust_finish, (const RobustArgs&, const BlockStats*, double log_s))                           \
  /* all blocks -> one */                                                                                             \
  KERNEL(PartialStats, robust_partial_stats, (const RobustArgs&, const BlockStats*))                                  \
  /* the sums of several -> log s' and the state (math/weights.h normalizer_of) */                                    \
  KERNEL(SettleResult, robust_settle, (const SettleArgs&))                                                            \
  /* blocks [begin, end): weights and factors; loss_sums[block] = sum of factor_i * loss_i */                         \
  KERNEL(void, robust_apply, (const RobustArgs&, const WeightUpdate&, double* loss_sums, int64_t begin, int64_t end)) \
  /* blocks [begin, end): dot_sums[block] = sum of W_i d_i */                                                         \
  KERNEL(void, robust_dot, (const RobustArgs&, const void* upstream, double* dot_sums, int64_t begin, int64_t end))   \
  /* blocks [begin, end): the vjp is written to VjpArgs::out */                                                       \
  KERNEL(void, robust_vjp, (const RobustArgs&, const VjpArgs&, int64_t begin, int64_t end))                           \
  /* (count) real -> (count) real (math/weights.h RectifiedNumbers) */                                                \
  KERNEL(void, rectified, (Dtype, const void* products, int64_t count, void* weights))                                \
  /* (batch * classes) slices [begin, end) of `inner` elements */                                                     \
  KERNEL(void, scale, (const ScaleArgs&, int64_t begin, int64_t end))                                                 \
  KERNEL(void, level_weights, (const LevelArgs&))                                                                     \
  /* whether log_q may be kept: no nonfinite loss, no number beyond the range */                                      \
  KERNEL(bool, group_weights, (const GroupArgs&))                                                                     \
  /* elements [begin, end) of the flat index; the counts of steps already include this one */                         \
  KERNEL(void, step, (const StepTable&, int64_t begin, int64_t end))                                                  \
  /* elements [begin, end) of the flat index */                                                                       \
  KERNEL(void, weighted_step, (const WeightedTable&, int64_t begin, int64_t end))

struct CpuKernels {
  const char* isa;
#define ABSGD_MEMBER(result, name, arguments) result(*name) arguments;
  ABSGD_CPU_KERNELS(ABSGD_MEMBER)
#undef ABSGD_MEMBER
};

#ifdef ABSGD_ISA_NAMESPACE  // one instruction set's
namespace ABSGD_ISA_NAMESPACE {
#define ABSGD_DECLARE(result, name, arguments) result name arguments;
ABSGD_CPU_KERNELS(ABSGD_DECLARE)
#undef ABSGD_DECLARE
}  // namespace ABSGD_ISA_NAMESPACE
#endif

const CpuKernels& cpu_kernels();
// Names of the instruction sets this build has and this machine runs, best first; `name` must be one of them.
int cpu_isa_count();
const char* cpu_isa_name(int index);
bool use_cpu_isa(const char* name);

}  // namespace absgd
