// The kernels of the weightings CVaR, chi-squared and group DRO (MATH §4.2 to §4.4). A batch has one number per sample,
// so one thread does everything, in scalar code that the compiler may vectorise.
//     level_weights    1. copies the finite losses to scratch. 2. finds the level with cvar, cvar_kl or chi2. 3. writes
//                      the weights.
//     group_weights    1. sums the losses of each group. 2. moves log q and normalises it. 3. writes the weights.
// This file is compiled once for each instruction set.
#include "kernels.h"
#include "lanes.h"

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {
namespace {

constexpr double kInfinity = __builtin_inf();

// The state of a sample: 1 with a finite loss, -1 with another loss, 0 if it is ignored.
template <class T>
ABSGD_FN int state_of(const WeightingArgs& a, int64_t i) {
  if (a.valid && !a.valid[i]) return 0;
  const T x = static_cast<const T*>(a.losses)[i];
  return x - x == 0 ? 1 : -1;
}

// Writes weight(x) for each sample with a finite loss x, NaN for another loss, and 0 if the sample is ignored.
template <class T, class F>
void write(const WeightingArgs& a, F weight) {
  T* const out = static_cast<T*>(a.weights);
  for (int64_t i = 0; i < a.count; ++i) {
    const int state = state_of<T>(a, i);
    out[i] = state == 0  ? T(0)
             : state < 0 ? T(__builtin_nan(""))
                         : T(weight(double(static_cast<const T*>(a.losses)[i])));
  }
}

// The k-th largest number of x, k counted from 1. It changes the order of x. The method is Hoare's selection with
// pivots from the middle.
double select_largest(double* x, int64_t count, int64_t k) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const double pivot = x[low + (high - low) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
      while (x[i] > pivot) ++i;
      while (x[j] < pivot) --j;
      if (i <= j) {
        const double swapped = x[i];
        x[i++] = x[j];
        x[j--] = swapped;
      }
    }
    if (k - 1 <= j)
      high = j;
    else if (k - 1 >= i)
      low = i;
    else
      break;
  }
  return x[k - 1];
}

// CVaR without a penalty: weight 1 / beta above the boundary loss `edge`, which is the k-th largest with
// k = ceil(beta n). The losses at the boundary share what is left in equal parts.
template <class T>
void cvar(const WeightingArgs& a, double* x, int64_t n, double beta) {
  int64_t k = int64_t(__builtin_ceil(beta * double(n)));
  k = k < 1 ? 1 : k > n ? n : k;
  const double edge = select_largest(x, n, k);
  double above = 0, ties = 0;
  for (int64_t i = 0; i < n; ++i) {
    above += x[i] > edge;
    ties += x[i] == edge;
  }
  const double left = double(n) - above / beta, at_edge = left > 0 ? left / ties : 0;
  write<T>(a, [=](double v) { return v > edge ? 1 / beta : v == edge ? at_edge : 0.0; });
}

// Heap sort, smallest first. It has no bad worst case, and needs no memory beside x.
void sort(double* x, int64_t count) {
  const auto sink = [x](int64_t i, int64_t end) {
    const double value = x[i];
    for (int64_t child; (child = 2 * i + 1) < end; i = child) {
      if (child + 1 < end && x[child + 1] > x[child]) ++child;
      if (!(x[child] > value)) break;
      x[i] = x[child];
    }
    x[i] = value;
  };
  for (int64_t i = count / 2; i-- > 0;) sink(i, count);
  for (int64_t end = count; end-- > 1;) {
    const double largest = x[0];
    x[0] = x[end];
    x[end] = largest;
    sink(0, end);
  }
}

// CVaR with a KL penalty (math/rules.h).
template <class T>
void cvar_kl(const WeightingArgs& a, double* x, int64_t n, double beta, double reg) {
  sort(x, n);
  // The loop goes from the smallest loss on. `running` is the sum of exp((x - x_i) / reg) over the losses up to the
  // i-th. The loop ends when the weight of x_i would exceed the bound 1 / beta.
  double edge = x[0], sum = 1, left = 0, running = 0, before = x[0];
  for (int64_t i = 0; i < n; ++i) {
    running = 1 + running * __builtin_exp((before - x[i]) / reg);
    before = x[i];
    const double others = double(n) - double(n - 1 - i) / beta;  // the weight that the losses above x_i leave over
    if (!(others > 0)) continue;
    if (left > 0 && cvar_is_beyond(running, others, beta)) break;
    edge = x[i];
    sum = running;
    left = others;
  }
  write<T>(a, [=](double v) {
    const double w = v > edge ? 1 / beta : left * (__builtin_exp((v - edge) / reg) / sum);
    return w < 1 / beta ? w : 1 / beta;
  });
}

// Chi-squared (math/rules.h).
template <class T>
void chi2(const WeightingArgs& a, double* x, int64_t n, double rho) {
  double highest = x[0], lowest = x[0];
  for (int64_t i = 1; i < n; ++i) {
    highest = x[i] > highest ? x[i] : highest;
    lowest = x[i] < lowest ? x[i] : lowest;
  }
  // The losses are taken relative to the largest, in units of their range, so no square can overflow. They are halved
  // where the range itself would overflow.
  const double part = highest - lowest < kInfinity ? 1 : 0.5, range = highest * part - lowest * part;
  const double unit = range > 0 ? range : 1;
  const auto relative = [=](double v) { return (v * part - highest * part) / unit; };
  double ties = 0;
  for (int64_t i = 0; i < n; ++i) {
    ties += x[i] == highest;
    x[i] = relative(x[i]);
  }
  const auto largest = [=](double v) { return v == highest ? double(n) / ties : 0.0; };
  if ((1 + 2 * rho) * ties >= double(n)) return write<T>(a, largest);
  double level = -kInfinity;
  for (double before = kInfinity;;) {
    double k = 0, mean = 0, variance = 0, sum = 0;
    for (int64_t i = 0; i < n; ++i)
      if (x[i] > level) {
        k += 1;
        mean += x[i];
        sum += x[i] - level;
      }
    if (k == 0) return write<T>(a, largest);  // The losses differ so little that their squared differences are 0.
    if (k >= before) {                        // No loss was dropped, so `level` is the solution.
      const double each = double(n) / sum;
      return write<T>(a, [=](double v) {
        const double over = relative(v) - level;
        return over > 0 ? over * each : 0.0;
      });
    }
    mean /= k;
    for (int64_t i = 0; i < n; ++i)
      if (x[i] > level) variance += (x[i] - mean) * (x[i] - mean);
    before = k;
    const double next = chi2_level<StateLane>(mean, variance / k, k, double(n), rho);
    level = next > level ? next : level;  // It can only rise. Rounding must not lower it.
  }
}

template <class T>
void level_weights_typed(const LevelArgs& a) {
  const bool chi_squared = a.weighting == Weighting::chi2;
  int64_t n = 0;
  for (int64_t i = 0; i < a.count; ++i)
    if (state_of<T>(a, i) > 0) a.scratch[n++] = double(static_cast<const T*>(a.losses)[i]);
  if (n == 0 || (chi_squared && a.rho == 0)) return write<T>(a, [](double) { return 1.0; });
  if (chi_squared) return chi2<T>(a, a.scratch, n, a.rho);
  return a.reg == 0 ? cvar<T>(a, a.scratch, n, a.beta) : cvar_kl<T>(a, a.scratch, n, a.beta, a.reg);
}

// Group DRO: q_g <- q_g exp(eta mean loss of g), normalised, in logarithms. The weight of a sample of g is n q_g / n_g.
template <class T>
bool group_weights_typed(const GroupArgs& a) {
  double *const sizes = a.sums, *const means = a.sums + a.n_groups;
  for (int64_t g = 0; g < a.n_groups; ++g) sizes[g] = means[g] = 0;
  bool finite = true;
  double n = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const int state = state_of<T>(a, i);
    finite = finite && state >= 0;
    if (state <= 0) continue;
    n += 1;
    sizes[a.groups[i]] += 1;
    means[a.groups[i]] += double(static_cast<const T*>(a.losses)[i]);
  }
  double highest = -kInfinity, sum = 0;
  for (int64_t g = 0; g < a.n_groups; ++g) {
    if (sizes[g] > 0) {
      const double step = a.eta * (means[g] / sizes[g]);
      a.log_q[g] += step < -1e300 ? -1e300 : step > 1e300 ? 1e300 : step;
    }
    if (a.log_q[g] > highest) highest = a.log_q[g];
  }
  for (int64_t g = 0; g < a.n_groups; ++g) sum += __builtin_exp(a.log_q[g] - highest);
  for (int64_t g = 0; g < a.n_groups; ++g) {
    a.log_q[g] = (a.log_q[g] - highest) - __builtin_log(sum);
    finite = finite && a.log_q[g] - a.log_q[g] == 0;
    means[g] = sizes[g] > 0 ? n * __builtin_exp(a.log_q[g]) / sizes[g] : 0;  // from here on: W of the group
  }
  T* const out = static_cast<T*>(a.weights);
  for (int64_t i = 0; i < a.count; ++i) {
    const int state = state_of<T>(a, i);
    out[i] = state == 0 ? T(0) : state < 0 ? T(__builtin_nan("")) : T(means[a.groups[i]]);
  }
  return finite;
}

}  // namespace

void level_weights(const LevelArgs& a) {
  for_real(a.dtype, [&](auto t) { level_weights_typed<typename decltype(t)::type>(a); });
}
bool group_weights(const GroupArgs& a) {
  return for_real(a.dtype, [&](auto t) { return group_weights_typed<typename decltype(t)::type>(a); });
}

}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
