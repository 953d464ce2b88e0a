"""Losses of language models.

dft.py       DFT, dynamic fine-tuning: a setting of `ABLoss` and `LinearABLoss`
head.py      finds the head of a model inside its wrappers, and lets it compute a loss instead of logits
causal.py    causal_lm_loss: the robust loss of a causal language model, without stored logits
"""

from .causal import causal_lm_loss
from .dft import DFT

__all__ = ["DFT", "causal_lm_loss"]
