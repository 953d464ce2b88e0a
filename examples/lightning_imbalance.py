"""Lightning on handwritten digits whose classes are imbalanced, 100 to 1: plain cross-entropy and ABSGD with lam > 0.

An optimizer step has two micro-batches and is clipped. Lambda is switched on after half of the epochs.
Run it with: python examples/lightning_imbalance.py
"""

import logging
import warnings

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import absgd_fast as ab
from absgd_fast.integrations.lightning import RobustCallback

EPOCHS = 50
QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


class Classifier(pl.LightningModule):
    """A linear model. The criterion is a part of it, so Lightning saves its state."""

    def __init__(self, criterion):
        super().__init__()
        self.net, self.criterion = torch.nn.Linear(64, 10), criterion

    def training_step(self, batch, batch_idx):
        """Return the loss of a micro-batch."""
        loss = self.criterion(self.net(batch[0]), batch[1])
        self.log("loss", loss)  # the plain mean
        return loss

    def configure_optimizers(self):
        """Any optimizer will do, without robust=."""
        return ab.ABSGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x, held_out = x.float() / 16, torch.arange(len(y)) % 2 == 0
kept = [max(int(88 * 100 ** (-k / 9)), 1) for k in range(10)]  # 88, 52, 31, ..., 2, 1, 1
rows = torch.cat([torch.nonzero((y == k) & ~held_out)[: kept[k], 0] for k in range(10)])
train = TensorDataset(x[rows], y[rows])
for name, lam in (("cross-entropy", float("inf")), ("ABSGD", 0.5)):
    pl.seed_everything(0, verbose=False)
    module = Classifier(ab.ABLoss(lam=lam))
    callback = RobustCallback(ab.TwoStage(module.criterion, lam=lam, start=EPOCHS // 2))
    steps = dict(max_epochs=EPOCHS, accumulate_grad_batches=2, gradient_clip_val=1.0)
    trainer = pl.Trainer(accelerator="cpu", callbacks=callback, **steps, **QUIET)
    trainer.fit(module, DataLoader(train, batch_size=32, shuffle=True))
    hit = module.net(x[held_out]).argmax(1) == y[held_out]
    recall = torch.stack([hit[y[held_out] == k].float().mean() for k in range(10)])
    print(f"{name}: balanced accuracy {recall.mean():.1%}, three rarest classes {recall[-3:].mean():.1%}")
