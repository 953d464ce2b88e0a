// Rules from losses to weights: CVaR, chi-squared and group DRO. One number a sample, so one thread, and one number at
// a time but for what the compiler makes of it. Compiled once per instruction set.
#include "lanes.h"

namespace absgd {
namespace ABSGD_ISA_NAMESPACE {
namespace {

constexpr double kInfinity = __builtin_inf();

// Whether a row counts: 1 with a finite loss, -1 without, 0 if it is ignored.
template <class T>
ABSGD_FN int state_of(const RuleArgs& a, int64_t i) {
  if (a.valid && !a.valid[i]) return 0;
  const T x = static_cast<const T*>(a.losses)[i];
  return x - x == 0 ? 1 : -1;
}

// weight(x) for each row that counts, in the losses' own numbers.
template <class T, class F>
void write(const RuleArgs& a, F weight) {
  T* const out = static_cast<T*>(a.weights);
  for (int64_t i = 0; i < a.count; ++i) {
    const int state = state_of<T>(a, i);
    out[i] = state == 0  ? T(0)
             : state < 0 ? T(__builtin_nan(""))
                         : T(weight(double(static_cast<const T*>(a.losses)[i])));
  }
}

// The k-th largest of x (k from 1), which are put into another order: Hoare's selection, pivots from the middle.
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

template <class T>
void cvar(const RuleArgs& a, double* x, int64_t n, double beta) {
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

// Heap sort, smallest first: no worst case, and no memory but its own.
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

template <class T>
void cvar_kl(const RuleArgs& a, double* x, int64_t n, double beta, double reg) {
  sort(x, n);
  // From the smallest on, the sum of exp((x - x_i) / reg) over the rows up to the i-th, until x_i would be beyond the
  // bound.
  double top = x[0], sum = 1, left = 0, running = 0, before = x[0];
  for (int64_t i = 0; i < n; ++i) {
    running = 1 + running * __builtin_exp((before - x[i]) / reg);
    before = x[i];
    const double rest = double(n) - double(n - 1 - i) / beta;  // what those above leave over
    if (!(rest > 0)) continue;
    if (left > 0 && cvar_is_beyond(running, rest, beta)) break;
    top = x[i];
    sum = running;
    left = rest;
  }
  write<T>(a, [=](double v) {
    const double w = v > top ? 1 / beta : left * (__builtin_exp((v - top) / reg) / sum);
    return w < 1 / beta ? w : 1 / beta;
  });
}

template <class T>
void chi2(const RuleArgs& a, double* x, int64_t n, double rho) {
  double top = x[0], bottom = x[0];
  for (int64_t i = 1; i < n; ++i) {
    top = x[i] > top ? x[i] : top;
    bottom = x[i] < bottom ? x[i] : bottom;
  }
  // relative to the largest, in units of the spread, so that no square leaves the range; halved where the spread would
  const double part = top - bottom < kInfinity ? 1 : 0.5, spread = top * part - bottom * part;
  const double unit = spread > 0 ? spread : 1;
  const auto relative = [=](double v) { return (v * part - top * part) / unit; };
  double ties = 0;
  for (int64_t i = 0; i < n; ++i) {
    ties += x[i] == top;
    x[i] = relative(x[i]);
  }
  const auto largest = [=](double v) { return v == top ? double(n) / ties : 0.0; };
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
    if (k == 0) return write<T>(a, largest);  // differences whose squares are 0
    if (k >= before) {                        // nobody has left
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
    level = next > level ? next : level;  // it only rises, but for rounding
  }
}

template <class T>
void rule_weights_typed(const RuleArgs& a, LossRule rule, double first, double second) {
  int64_t n = 0;
  for (int64_t i = 0; i < a.count; ++i)
    if (state_of<T>(a, i) > 0) a.scratch[n++] = double(static_cast<const T*>(a.losses)[i]);
  if (n == 0 || (rule == LossRule::chi2 && first == 0)) return write<T>(a, [](double) { return 1.0; });
  if (rule == LossRule::chi2) return chi2<T>(a, a.scratch, n, first);
  return second == 0 ? cvar<T>(a, a.scratch, n, first) : cvar_kl<T>(a, a.scratch, n, first, second);
}

template <class T>
bool group_weights_typed(const GroupArgs& a) {
  double *const sizes = a.sums, *const means = a.sums + a.n_groups;
  for (int64_t g = 0; g < a.n_groups; ++g) sizes[g] = means[g] = 0;
  bool fine = true;
  double n = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const int state = state_of<T>(a, i);
    fine = fine && state >= 0;
    if (state <= 0) continue;
    n += 1;
    sizes[a.groups[i]] += 1;
    means[a.groups[i]] += double(static_cast<const T*>(a.losses)[i]);
  }
  double top = -kInfinity, sum = 0;
  for (int64_t g = 0; g < a.n_groups; ++g) {
    if (sizes[g] > 0) {
      const double step = a.eta * (means[g] / sizes[g]);
      a.log_q[g] += step < -1e300 ? -1e300 : step > 1e300 ? 1e300 : step;
    }
    if (a.log_q[g] > top) top = a.log_q[g];
  }
  for (int64_t g = 0; g < a.n_groups; ++g) sum += __builtin_exp(a.log_q[g] - top);
  for (int64_t g = 0; g < a.n_groups; ++g) {
    a.log_q[g] = (a.log_q[g] - top) - __builtin_log(sum);
    fine = fine && a.log_q[g] - a.log_q[g] == 0;
    means[g] = sizes[g] > 0 ? n * __builtin_exp(a.log_q[g]) / sizes[g] : 0;  // W of the group
  }
  T* const out = static_cast<T*>(a.weights);
  for (int64_t i = 0; i < a.count; ++i) {
    const int state = state_of<T>(a, i);
    out[i] = state == 0 ? T(0) : state < 0 ? T(__builtin_nan("")) : T(means[a.groups[i]]);
  }
  return fine;
}

}  // namespace

void rule_weights(const RuleArgs& a, LossRule rule, double first, double second) {
  for_real(a.dtype, [&](auto t) { rule_weights_typed<typename decltype(t)::type>(a, rule, first, second); });
}
bool group_weights(const GroupArgs& a) {
  return for_real(a.dtype, [&](auto t) { return group_weights_typed<typename decltype(t)::type>(a); });
}

}  // namespace ABSGD_ISA_NAMESPACE
}  // namespace absgd
