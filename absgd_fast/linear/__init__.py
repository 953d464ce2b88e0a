"""The robust loss of a linear head, chunk by chunk, without storing the logits (docs/MATH.md §6).

chunks.py      the walk over the samples: makes logits and losses, and overwrites the logits with the gradients of the losses
products.py    the matrix products, in the dtype in which the device multiplies fast
gradients.py   sums the gradients relative to a reference point, and multiplies them by the last factor in backward
loss.py        LinearABLoss: settles log s' and weighs
functional.py  linear_robust_loss: the same as a pure function, with torch's names of the arguments
"""

from .functional import linear_robust_loss
from .loss import LinearABLoss

__all__ = ["LinearABLoss", "linear_robust_loss"]
