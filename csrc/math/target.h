// TargetESS: the lambda by which the effective sample size of a batch has a given share (MATH §1.7).
#pragma once

#include "base.h"

namespace absgd {

// x_i are the scores of the n finite samples, e is the largest of them for lambda > 0 and the smallest for lambda < 0:
//     d_i = |e - x_i|,  u = 1 / |lambda|,  S1 = sum_i exp(-u d_i),  S2 = sum_i exp(-2 u d_i),  share(u) = S1^2 / (n S2)
//     d log share / du = -2 (D1 / S1 - D2 / S2),  D1 = sum_i d_i exp(-u d_i),  D2 = sum_i d_i exp(-2 u d_i)
// share falls from 1 at u = 0 to the share of the ties at e. The weights depend on x_i - e alone: W_i = n softmax(-u
// d)_i.

// The scores of a batch.
struct TargetRange {
  double lowest, highest;     // of the finite ones; +inf and -inf if there are none
  int64_t finite, nonfinite;  // n, the valid samples with a finite loss and score; and the valid samples without

  ABSGD_FN void add(const TargetRange& other) {
    lowest = other.lowest < lowest ? other.lowest : lowest;
    highest = other.highest > highest ? other.highest : highest;
    finite += other.finite;
    nonfinite += other.nonfinite;
  }
  // e, for a signed share. 0 without a finite score.
  ABSGD_FN double extreme(double share) const { return finite == 0 ? 0 : share > 0 ? highest : lowest; }
  // The largest d.
  ABSGD_FN double spread() const {
    const double d = highest - lowest;
    return d < kLargest ? d : kLargest;
  }
};

// Smaller differences of scores are the rounding of losses of this size, in the type T. They make no weights.
template <class T>
ABSGD_FN double target_floor(const TargetRange& range) {
  const double low = range.lowest < 0 ? -range.lowest : range.lowest;
  const double high = range.highest < 0 ? -range.highest : range.highest;
  const double largest = low > high ? low : high;
  return (sizeof(T) == 8 ? 0x1p-46 : 0x1p-17) * (largest > 1 ? largest : 1);  // 64 times the epsilon of T
}

// The sums over some samples by one u. d is inf where a sample is not counted.
template <class V>
struct TargetSums {
  V s1, s2, d1, d2;

  template <class L>
  ABSGD_FN void add(V d, V u) {
    const V e = L::exp(L::set(0) - u * d), e2 = e * e;
    const V finite_d = L::select(d - d == L::set(0), d, L::set(0));  // inf * 0 is NaN
    s1 = s1 + e;
    s2 = s2 + e2;
    d1 = d1 + finite_d * e;
    d2 = d2 + finite_d * e2;
  }

  // Adds the sums over other samples.
  template <class U>
  ABSGD_FN void merge(const TargetSums<U>& o) {
    s1 += o.s1;
    s2 += o.s2;
    d1 += o.d1;
    d2 += o.d2;
  }
};

// Solves share(u) = target by Newton's method on h(u) = sqrt(-log share(u)), which is a straight line for normally
// distributed scores and nearly one for others. Where Newton leaves the bracket or converges slowly, the bracket is
// halved on the logarithmic scale. Every caller evaluates the sums at u() as long as next() returns true.
struct TargetSolver {
  double target, n, wanted;  // the share, and h at it
  double low, high;          // share(low) >= target; share(high) < target once high was tried
  double u;                  // of the next sums, and at last the solution
  double distance;           // |h - wanted| by the u before
  bool high_was_tried;
  int left;  // so many more evaluations

  // mean, mean_square: of d / spread.
  // The bracket begins at 2 wanted / spread, because share(u) >= 1 / cosh^2(u spread / 2) (Kantorovich's inequality).
  // It ends where the exponentials of all d above the floor are 0.
  template <class L, class T>
  static ABSGD_FN TargetSolver of(double share, const TargetRange& range, double mean, double mean_square) {
    TargetSolver out{share < 0 ? -share : share, double(range.finite), 0, 0, 0, 0, kLargest, false, 60};
    const double spread = range.spread(), floor = target_floor<T>(range);
    if (!(spread > floor)) {
      out.left = 0;
      return out;
    }
    out.wanted = L::sqrt(-L::log(out.target));
    out.high = (sizeof(T) == 8 ? 750 : 110) / floor;
    out.low = 2 * out.wanted / spread;
    if (out.low > out.high) out.low = out.high;
    const double variance = mean_square - mean * mean;  // at most 1/4
    out.u = variance > 0 ? out.wanted / (spread * L::sqrt(variance)) : out.low;
    if (!(out.u < out.high)) out.u = out.high;
    if (out.u < out.low) out.u = out.low;
    return out;
  }
  // Whether there is anything to solve. If not, u is 0: all weights are 1.
  ABSGD_FN bool begins() const { return left > 0; }

  // Takes the sums at u, and sets u to the next one, or to the solution. Returns whether it needs sums again.
  template <class L>
  ABSGD_FN bool next(const TargetSums<double>& s) {
    constexpr double kClose = 1e-3;     // Newton's last step from here ends at about the square of it
    constexpr double kRounding = 1e-5;  // of a share that is summed in float
    const double share = s.s1 * s.s1 / (n * s.s2), ratio = share / target - 1;
    const double h = share < 1 ? L::sqrt(-L::log(share)) : 0;
    const double slope = h > 0 ? (s.d1 / s.s1 - s.d2 / s.s2) / h : 0;
    const double newton = slope > 0 ? u + (wanted - h) / slope : h < wanted ? kLargest : 0;
    const double here = h < wanted ? wanted - h : h - wanted, off = ratio < 0 ? -ratio : ratio;
    const bool tied = h < wanted && u >= high;  // even the largest u leaves the ties more than the target
    if (h < wanted) {
      low = u;
    } else {
      high = u;
      high_was_tried = true;
    }
    const bool inside = newton > low && newton < high;
    if ((here <= kClose * wanted && off <= kClose) || off <= kRounding || --left == 0 || tied ||
        high <= low * (1 + 1e-9)) {
      if (inside && !tied) u = newton;
      return false;
    }
    const bool fast = here < 0.5 * distance;
    distance = here;
    if (inside && fast)
      u = newton;
    else if (newton >= high && !high_was_tried)
      u = high;
    else
      u = L::sqrt(low) * L::sqrt(high);
    return true;
  }

  // lambda of the solution with the sign of `share`, and inf for u = 0. largest: of the type of the losses.
  ABSGD_FN double lam(double share, double largest) const {
    if (u == 0) return kLargest + kLargest;
    const double lam = 1 / u < largest ? 1 / u : largest;
    return share > 0 ? lam : -lam;
  }
};

}  // namespace absgd
