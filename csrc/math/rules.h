// The level mu that CVaR and chi-squared DRO solve for (Levy et al. 2020):
//
//     CVaR, KL penalty    w = min(exp((x - mu) / reg), 1 / beta): the k largest are at the bound, and the others share
//                         what is left, n - k / beta, by their exponentials
//     chi-squared         w proportional to max(x - mu, 0), (1/2n) sum (w - 1)^2 = rho: mu follows from the mean and
//                         variance of the k losses above it
//
// CVaR takes losses in from the smallest on, as long as the largest of them stays below the bound. Chi-squared drops
// losses until none lies below mu: made of too many losses, mu is never too high.
#pragma once

#include "base.h"

namespace absgd {

// Whether the largest of the losses that divide `left` among them would be beyond the bound. sum: of their
// exponentials, of which the largest is 1.
ABSGD_FN bool cvar_is_beyond(double sum, double left, double beta) { return left * beta > sum; }
template <class L>
ABSGD_FN double chi2_level(double mean, double variance, double k, double n, double rho) {
  const double excess = k * (1 + 2 * rho) / n - 1;
  return mean - L::sqrt(variance / (excess > 1e-15 ? excess : 1e-15));  // no less than its rounding
}

}  // namespace absgd
