"""Transformers' Trainer on handwritten digits, of whose training labels 40 % are wrong: plain cross-entropy and ABSGD.

The mixin, criterion=, schedule= and optimizer= are new in a script. Run it with: python examples/trainer_noisy_labels.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

import absgd_fast as ab
from absgd_fast.integrations.transformers import RobustTrainerMixin


class MyTrainer(RobustTrainerMixin, Trainer):
    """Trainer with a robust loss."""


class Classifier(nn.Module):
    """A small network. A model of transformers with a head for sequences or images serves as well."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x):
        """Return the logits."""
        return {"logits": self.net(x)}


x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
draw = torch.Generator().manual_seed(0)
order = torch.randperm(len(x), generator=draw)
x, y = x[order].float() / 16, y[order]
wrong = torch.rand(1200, generator=draw) < 0.4
noisy = torch.where(wrong, (y[:1200] + torch.randint(1, 10, (1200,), generator=draw)) % 10, y[:1200])
train = [{"x": a, "labels": b} for a, b in zip(x[:1200], noisy, strict=True)]
test = [{"x": a, "labels": b} for a, b in zip(x[1200:], y[1200:], strict=True)]

quiet = dict(use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True)
args = TrainingArguments(
    tempfile.mkdtemp(),
    per_device_train_batch_size=32,
    gradient_accumulation_steps=2,
    num_train_epochs=30,
    learning_rate=0.1,
    lr_scheduler_type="cosine",
    **quiet,
)
robust = ab.ABLoss(lam=ab.RelativeLam(-0.5))  # lam < 0: small losses count more, after 30 % of the epochs
stages = ab.TwoStage(robust, ab.RelativeLam(-0.5), start=9)
for criterion, schedule in ((ab.CrossEntropy(), None), (robust, stages)):
    set_seed(0)
    options = dict(criterion=criterion, schedule=schedule, optimizer="ABSGD")
    trainer = MyTrainer(Classifier(), args, train_dataset=train, **options)
    trainer.train()
    found = trainer.predict(test)  # the test labels are right
    print(f"{type(criterion).__name__}: accuracy {100 * (found.predictions.argmax(-1) == found.label_ids).mean():.1f} %")
