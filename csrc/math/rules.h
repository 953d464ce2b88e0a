// The level mu that CVaR and chi-squared DRO solve for (Levy et al. 2020; MATH §4.3, §4.4). x are the n losses of a
// batch, and w their weights, of mean 1.
//
// CVaR with a KL penalty: w = min(exp((x - mu) / reg), 1 / beta). The k largest losses are at the bound 1 / beta. The
// other losses share what is left, n - k / beta, in proportion to their exponentials. The solver adds losses from the
// smallest on, as long as the largest of them stays below the bound.
//
// Chi-squared: w is proportional to max(x - mu, 0), with (1/2n) sum (w - 1)^2 = rho. The mean and the variance of the k
// losses above mu give mu. The solver starts with all losses and drops those below mu until there are none. A mu that
// is computed from too many losses is never too high, so no loss is dropped wrongly.
#pragma once

#include "base.h"

namespace absgd {

// CVaR: whether the weight of the largest loss among those that share `left` would exceed 1 / beta. sum is the sum of
// their exponentials, relative to that largest loss, whose exponential is 1.
ABSGD_FN bool cvar_is_beyond(double sum, double left, double beta) { return left * beta > sum; }
// Chi-squared: mu = mean - sqrt(variance / (k (1 + 2 rho) / n - 1)), from the k losses above it.
template <class L>
ABSGD_FN double chi2_level(double mean, double variance, double k, double n, double rho) {
  const double excess = k * (1 + 2 * rho) / n - 1;
  // The excess is taken as at least 1e-15, the size of its rounding error.
  return mean - L::sqrt(variance / (excess > 1e-15 ? excess : 1e-15));
}

}  // namespace absgd
