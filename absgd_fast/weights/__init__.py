"""Other robust weightings of per-sample losses: TERM, EG, CVaR, chi-squared and group DRO.

Each returns W with mean 1 over the rows that count (W_i = n p_i), so that (1/n) sum_i W_i L_i is the weighted loss, as with
`ABLoss`, which takes any of them, or any callable of the same form, in place of lambda:

    ABLoss(rule=functools.partial(weights.cvar, beta=0.1))        ABLoss(rule=weights.GroupDRO(n_groups=4))

What they have in common. Losses have any shape. mask: bool, False = ignored, W = 0. A row with a NaN or infinite loss has
W = NaN, and the others are weighed without it. W is a constant: no gradient flows through it, so that (W * losses).mean() has
the gradient of the rule's objective. W is float64 for float64 losses, else float32; between them all is float64, because
sums of squares and of exponentials would lose what the rules are exact about. The host never waits for a GPU.
"""

from .group_dro import GroupDRO
from .levels import chi2, cvar
from .tilted import term

__all__ = ["GroupDRO", "chi2", "cvar", "term"]
