// What a kernel is given: raw pointers, sizes and numbers. No torch, no CUDA: anything that can fill these structs can
// run the kernels.
//
// A launcher works on a range of a flat index (tiles of rows, blocks of losses, ...), so the caller decides how ranges
// are spread over threads; the result does not depend on that choice, bit for bit.
#pragma once

#include <stdint.h>

// Inlined always: a copy that the linker keeps might be the one compiled for AVX-512.
#define ABSGD_INLINE inline __attribute__((always_inline))

namespace absgd {

enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Everything is computed in double for f64 and in float otherwise; "real" below means that type.

// ---- losses on logits ----------------------------------------------------------------------------------------------

constexpr int64_t kFewClasses = 48;  // below, a SIMD register holds rows instead of classes
constexpr int64_t kTileRows = 16;    // rows that one tile finishes together; per-row scratch is padded to whole tiles

struct LogitArgs {
  Dtype dtype;         // of logits
  const void* logits;  // (batch, classes, inner), any strides, in elements
  int64_t batch, classes, inner;
  int64_t stride_batch, stride_class, stride_inner;
  const void* target;  // (batch * inner), int64 or int32
  bool target_int64;
  int64_t ignore_index;
  const uint8_t* mask;       // (batch * inner), 0 = ignored; or null
  const void* class_weight;  // (classes) real; or null = 1
  double label_smoothing;

  // per row, written by logit_stats, read by logit_grads; padded to whole tiles
  void* losses;       // real
  void* row_max;      // real
  void* row_rest;     // real, see math.h Row
  void* row_own;      // real
  void* coefficient;  // real, d loss / d nll
  uint8_t* valid;     // 0 = ignored

  // gradient: factor_i * d loss_i / d logits
  void* grad;  // (batch, classes, inner) contiguous, of the logits' dtype but f32 for f16; or null
  // logit_stats may leave exp(a - max) for logit_grads to scale:
  bool keep;           // along_classes(): in grad
  void* kept;          // else: here, (tiles, classes, kTileRows) real; or null
  const void* factor;  // (batch * inner) real; or null = 1

  ABSGD_INLINE int64_t rows() const { return batch * inner; }
  ABSGD_INLINE bool along_classes() const { return stride_class == 1 && inner == 1 && classes >= kFewClasses; }
  ABSGD_INLINE int64_t tiles() const { return (rows() + kTileRows - 1) / kTileRows; }
};

constexpr int64_t kAllLabelsGood = INT64_MAX;

// ---- robust weights on a vector of losses --------------------------------------------------------------------------

constexpr int64_t kBlock = 4096;  // losses per partial sum: fixed, so sums do not depend on the number of threads

// Where log s' comes from: the moving average, this batch alone, or nowhere (log s' = 0).
enum class Normalizer : int { moving = 0, batch = 1, none = 2 };

struct RobustArgs {
  Dtype dtype;  // f32 or f64
  int64_t count;
  const void* losses;         // (count) real
  const void* scores;         // (count) real: z = score / lam; or null = the losses
  const void* sample_weight;  // (count) real; or null = 1
  const uint8_t* valid;       // (count); or null = all
  double lam, gamma, alpha, mix, max_weight;
  double z_limit;  // a larger |z| counts as non-finite
  Normalizer normalizer;
  bool init_first;

  void* weights;  // (count) real
  void* factor;   // (count) real: d loss / d losses; or null

  ABSGD_INLINE int64_t blocks() const { return (count + kBlock - 1) / kBlock; }
};

// log-sum-exp of z over one block: max + log(sum)
struct Partial {
  double max, sum;
  int64_t good, bad;  // valid rows with a finite loss and z; valid rows without
};

struct Outcome {
  double log_s;        // what the weights are divided by, in logarithms
  double new_log_s;    // what the state becomes (the old value after a bad or an empty batch)
  double share;        // gamma' alpha / n: what W_j owes to log s' (math.h robust_weight_vjp)
  double share_state;  // the same for new_log_s: 0 where the state did not move
  double inverse_n;
  int64_t good, bad;
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

// ---- momentum step -------------------------------------------------------------------------------------------------
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

struct StepGroup {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize, heavy_ball;
};

struct StepTensor {
  void* param;  // (count) dense, f32 or f64; grad and buffer have the same strides
  const void* grad;
  void* buffer;          // momentum; null where the group's momentum is 0
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
};

constexpr int64_t kStepBlock = 64;  // a share of the flat index ends at a multiple of this within a tensor

// One row per operation; a set per instruction set, chosen at run time (cpu/dispatch.cpp).
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
  // blocks [begin, end): weights and factors; loss_partials[block] = sum of factor_i * loss_i
  void (*robust_apply)(const RobustArgs&, const Outcome&, double* loss_partials, int64_t begin, int64_t end);
  // blocks [begin, end): dot_partials[block] = sum of W_i d_i
  void (*robust_dot)(const RobustArgs&, const void* upstream, double* dot_partials, int64_t begin, int64_t end);
  // blocks [begin, end): vjp written to out
  void (*robust_vjp)(const RobustArgs&, const VjpArgs&, int64_t begin, int64_t end);
  // (batch * classes) slices [begin, end) of `inner` elements
  void (*scale)(const ScaleArgs&, int64_t begin, int64_t end);
  // elements [begin, end) of the flat index
  void (*sgd_step)(const StepTable&, int64_t begin, int64_t end);
};

const CpuKernels& cpu_kernels();
// Names of the instruction sets this build has and this machine runs, best first; `name` must be one of them.
int cpu_isa_count();
const char* cpu_isa_name(int index);
bool use_cpu_isa(const char* name);

}  // namespace absgd
