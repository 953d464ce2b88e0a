"""Other robust weightings of per-sample losses: TERM, EG, CVaR, chi-squared and group DRO (docs/MATH.md §4).

Each rule turns losses into weights W with mean 1 over the n samples that count: W_i = n p_i. So (1/n) sum_i W_i L_i is the
weighted loss. (With `GroupDRO` the mean is smaller if a group is absent from the batch.) `ABLoss` takes a rule, or any callable
of the same form, in place of lambda:

    ABLoss(rule=functools.partial(weights.cvar, beta=0.1))        ABLoss(rule=weights.GroupDRO(n_groups=4))

All rules have this in common:

- The losses have any shape. mask is bool; a sample with False is ignored and has W = 0.
- A sample with a NaN or infinite loss has W = NaN. The others are weighed without it.
- W is a constant: no gradient flows through it. So (W * losses).mean() has the gradient of the rule's objective.
- W is float64 for float64 losses, else float32. All computation between is in float64, because sums of squares and of
  exponentials would lose the digits that matter.
- The host never waits for a GPU.
"""

from .group_dro import GroupDRO
from .levels import chi2, cvar
from .tilted import term

__all__ = ["GroupDRO", "chi2", "cvar", "term"]
