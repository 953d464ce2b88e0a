"""The robust loss of a linear head, chunk by chunk.

chunks.py      the walk over the samples: logits, losses, and the gradients of the losses in place of the logits
gradients.py   the sums of the gradients relative to a reference point, and what finishes them in backward
loss.py        LinearABLoss: settles and weighs
"""

from .loss import LinearABLoss

__all__ = ["LinearABLoss"]
