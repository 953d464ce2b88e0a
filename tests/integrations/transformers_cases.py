"""Trainings with Transformers' Trainer that the tests compare with the plain loop of truth.py."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

import torch
import truth
from torch import nn
from transformers import Trainer, TrainingArguments

import absgd_fast as ab
from absgd_fast.integrations.transformers import RobustTrainerMixin


class RobustTrainer(RobustTrainerMixin, Trainer):
    """Trainer as a user has it."""


class Classifier(nn.Module):
    """The network of truth.py with the interface that Trainer expects of a model."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.net = truth.network(dtype)

    def forward(self, x, labels=None):
        """The logits; a model that is no PreTrainedModel returns them as a dict."""
        return {"logits": self.net(x)}


def with_config():
    """A model with a `config`, which some options of Trainer look into."""
    model = Classifier()
    model.config = None
    return model


class Rows(torch.utils.data.Dataset):
    """x and y as the dataset of a Trainer."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


def quiet(folder):
    """Arguments of a run that says and downloads nothing, in the order of the data, with K = 4."""
    return dict(
        output_dir=str(folder),
        use_cpu=True,
        gradient_accumulation_steps=4,
        num_train_epochs=4,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def arguments(folder, **options):
    """`quiet` TrainingArguments for the samples of truth.py."""
    given = dict(per_device_train_batch_size=truth.ROWS, max_grad_norm=truth.CLIP)
    return TrainingArguments(**(quiet(folder) | given | options))


def trainer(
    folder, *, dtype=torch.float32, rows=30, optimizer=None, criterion=None, cls=RobustTrainer, model=None, more=None, **options
):
    """A RobustTrainer of the network of truth.py on `rows` samples. more: other arguments of Trainer."""
    model = Classifier(dtype) if model is None else model
    made = {} if optimizer is None else {"optimizers": (truth.OPTIMIZERS[optimizer](model.parameters()), None)}
    criterion = ab.ABLoss(lam=truth.LAM).to(dtype) if criterion is None else criterion
    data = Rows(*truth.samples(rows, dtype))
    return cls(model, arguments(folder, **options), train_dataset=data, criterion=criterion, **made, **(more or {}))


def logged(trainer, key):
    """What was logged after each step under a key."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
