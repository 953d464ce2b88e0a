"""The settings of an experiment, and which of them are allowed."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch

from absgd_fast import meta
from absgd_fast._numbers import plain

from . import data, images, spec
from .choices import check_choice
from .models import check_model, last_block, make_model
from .placing import Placing


@dataclass(frozen=True)
class Config:
    """One experiment. The fields are the options of `absgd-fast train`, with `_` instead of `-`.

    Args:
        dataset, data_root: as for data.load_source.
        per_class: the number of training images of each class before imbalance; None: as many as every class has.
        data_share: the share of the training images of each class that is kept, of data whose classes have sizes of their own.
        imbalance: "none", or the kind of data.class_counts, "lt" or "step".
        rho: training samples of the largest class over those of the smallest, ≥ 1.
        noise: "none", or the kind of data.add_noise.
        noise_rate: the probability in [0, 1) that a training label is flipped.
        background: the class that "background" noise flips labels to.
        digests: whether the files of a standard data set must be the known ones (idx.load_idx, cifar.load_cifar).
        image_size, augment, workers: of images.batches; augment None is the data set's own.
        loss: LOSS[+SCHEDULE...], names in criteria.LOSSES and criteria.SCHEDULES.
        methods: specifications, as for spec.parse. Each may have its own loss and its own values of the settings below.
        lam, gamma, mix: as for ab.ABLoss.
        warmup: the fraction of the epochs that are trained with λ = inf, which is plain training, before λ = lam (two-stage
            training, ABSGD paper, Sec. 3.6). Methods without a λ begin to weigh then. The method ramp moves λ from inf to lam
            during this fraction.
        share, sign: of ab.TargetESS, for the method targetess.
        beta, reg: of weights.cvar.
        chi2_rho: the radius rho of weights.chi2.
        eta: of weights.GroupDRO; the groups are the labels.
        focal_gamma, gce_q, gce_k (of tce), sce_alpha, sce_beta, ldam_margin, ldam_scale, vs_gamma, vs_tau (of la too): of the
            losses.
        cb_beta, nu: of the class weights, ab.class_balanced_weights (cb-…, drw) and ab.adrw_weights (adrw).
        drw_start: the fraction of the epochs before the schedules of the loss switch, and before tce leaves samples out.
        sam_rho, mixup_alpha: of the extras sam and mixup.
        tau, stage_epochs, stage_lr: of the classifier stages tau, crt and lws (stages.py).
        clean: the number of training images of each class whose right label l2rw knows (data.clean_part).
        l2rw_method: how l2rw computes its weights, as for meta.l2rw_loss.
        model: as for models.make_model.
        epochs: the number of passes over the training set.
        lr, momentum, weight_decay: as in torch.optim.SGD.
        lr_schedule: "steps": the learning rate is multiplied by lr_factor after each fraction of the epochs in lr_steps.
            "cosine": it falls to 0 along a half cosine.
        batch_size: samples per step.
        trainable: what is trained after the warm-up: "all", "fc" (the classifier), or "fc+lb" (and the last block).
        device, amp, channels_last: as for placing.Placing.
        seeds: the number of seeds; they are 0 … seeds − 1.
        test_images: after each epoch the network is tested on so many of the test images, at the end on all; None: always on all.
        audit: whether to record the losses and the weights of each training sample (audit.Watch).
    """

    dataset: str = "digits"
    data_root: str | None = None
    per_class: int | None = None
    data_share: float = 1.0
    imbalance: str = "none"
    rho: float = 100.0
    noise: str = "none"
    noise_rate: float = 0.4
    background: int = 0
    digests: bool = True
    image_size: int = 224
    augment: str | None = None
    workers: int = 2
    loss: str = "ce"
    methods: tuple[str, ...] = ("sgd", "absgd", "reference")
    lam: float = -0.5
    gamma: float = 0.9
    mix: float = 0.0
    warmup: float = 0.3
    share: float = 0.95
    sign: int = 1
    beta: float = 0.5
    reg: float = 0.0
    chi2_rho: float = 0.5
    eta: float = 0.01
    focal_gamma: float = 2.0
    gce_q: float = 0.7
    gce_k: float = 0.5
    sce_alpha: float = 0.1
    sce_beta: float = 1.0
    ldam_margin: float = 0.5
    ldam_scale: float = 30.0
    vs_gamma: float = 0.3
    vs_tau: float = 1.0
    cb_beta: float = 0.9999
    nu: float = 1.0
    drw_start: float = 0.8
    sam_rho: float = 0.05
    mixup_alpha: float = 1.0
    tau: float = 1.0
    stage_epochs: int = 10
    stage_lr: float = 0.1
    clean: int = 10
    l2rw_method: str = "jvp"
    model: str = "mlp"
    epochs: int = 120
    lr: float = 0.1
    lr_schedule: str = "steps"
    lr_steps: tuple[float, ...] = (0.6, 0.8)
    lr_factor: float = 0.1
    momentum: float = 0.9
    batch_size: int = 64
    weight_decay: float = 1e-4
    trainable: str = "all"
    device: str = "auto"
    amp: str = "none"
    channels_last: bool = False
    seeds: int = 8
    test_images: int | None = None
    audit: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():  # so that results.json can hold the scalars of NumPy too
            object.__setattr__(self, name, plain(value))

    @property
    def switch(self) -> int:
        """The first epoch (counted from 0) with λ = lam, or the first in which the other methods with stages weigh."""
        return round(self.warmup * self.epochs)

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments of data.load_source beside the name and the folder."""
        return {"digests": self.digests, "image_size": self.image_size}

    def decay(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of the learning rate, which is stepped after each epoch."""
        if self.lr_schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        milestones = [round(fraction * self.epochs) for fraction in self.lr_steps]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=self.lr_factor)

    def check(self, resumed: bool = False) -> None:
        """Raises ValueError for the first bad setting. The message is one line: what was given and what is allowed.

        Args:
            resumed: whether a training goes on that was checked when it began. Then what changes nothing may stay.
        """
        self._check_names()
        self._check_numbers()
        for one in [spec.parse(text, self) for text in self.methods]:
            own = one.config(self)
            own._check_names()
            own._check_numbers()
            if not resumed:
                spec.check_effects(one, self)
            if one.method == "reference":
                _check_reference(own)
            if one.method == "l2rw" and self.amp != "none":
                raise ValueError(f"amp: got {self.amp}, but method l2rw supports only none; leave it out of the methods")
        Placing(self.device, self.amp, self.channels_last).check()
        if self.dataset in data.SHAPES:  # the shape of the others is known once they are read, see check_source
            check_model(self.model, data.SHAPES[self.dataset])

    def check_source(self, source: data.Source) -> None:
        """Raises ValueError if the data set does not have what the settings ask for. The message is one line."""
        if self.per_class is not None and self.per_class > source.n_max:
            raise ValueError(
                f"per-class: got {self.per_class}, expected at most {source.n_max}, the number of training images that every "
                f"class of {source.name} has"
            )
        if self.data_share < 1 and (self.per_class is not None or self.imbalance != "none" or not source.natural):
            raise ValueError(
                f"data-share: got {self.data_share:g}, expected 1 here; it is for folders and index files without per-class and "
                "imbalance, which say by themselves how many images are kept"
            )
        images.check_augment(source.images, self.augment or source.augment)
        check_model(self.model, source.shape)
        if self.trainable == "fc+lb":
            last_block(make_model(self.model, source.shape, source.classes, 0))  # or it says that there is none
        if self.background >= source.classes:
            raise ValueError(f"background: got {self.background}, expected a class below {source.classes}")

    def _check_names(self) -> None:
        choices: dict[str, tuple[str | None, ...]] = {
            "dataset": data.DATASETS,
            "imbalance": ("none", *data.IMBALANCES),
            "noise": ("none", *data.NOISES),
            "augment": (None, *images.AUGMENTS),
            "l2rw_method": meta.METHODS,
            "lr_schedule": ("steps", "cosine"),
            "trainable": ("all", "fc", "fc+lb"),
        }
        for name, allowed in choices.items():
            if (given := getattr(self, name)) is not None or None not in allowed:
                check_choice(name.replace("_", "-"), given, [one for one in allowed if one is not None])
        spec.check_loss(self.loss)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods: got {','.join(self.methods)!r}, expected each method at most once, e.g. sgd,absgd")

    def _check_numbers(self) -> None:
        finite, inf, fraction = math.isfinite, math.inf, "a fraction of the epochs in [0, 1]"
        positive, at_least_0, share = "a finite number > 0", "a finite number ≥ 0", "a number in (0, 1)"
        rules = {
            "per_class": (self.per_class is None or self.per_class >= 1, "at least 1"),
            "data_share": (0 < self.data_share <= 1, "a number in (0, 1]"),
            "rho": (self.rho >= 1 and finite(self.rho), "a finite number ≥ 1"),
            "noise_rate": (0 <= self.noise_rate < 1, "a number in [0, 1)"),
            "background": (self.background >= 0, "a class, at least 0"),
            "image_size": (self.image_size >= 1, "at least 1"),
            "workers": (self.workers >= 0, "at least 0"),
            "lam": (self.lam != 0 and not math.isnan(self.lam), "a number other than 0 (inf for plain training)"),
            "gamma": (0 < self.gamma <= 1, "a number in (0, 1]"),
            "mix": (0 <= self.mix < inf, at_least_0),
            "warmup": (0 <= self.warmup <= 1, fraction),
            "share": (0 < self.share < 1, share),
            "sign": (self.sign in (1, -1), "1 (λ > 0) or -1 (λ < 0)"),
            "beta": (0 < self.beta <= 1, "a fraction of the batch in (0, 1]"),
            "reg": (0 <= self.reg < inf, at_least_0),
            "chi2_rho": (0 <= self.chi2_rho < inf, at_least_0),
            "eta": (0 <= self.eta < inf, at_least_0),
            "focal_gamma": (0 <= self.focal_gamma < inf, at_least_0),
            "gce_q": (0 < self.gce_q <= 1, "a number in (0, 1]"),
            "gce_k": (0 < self.gce_k < 1, share),
            "sce_alpha": (0 <= self.sce_alpha < inf, at_least_0),
            "sce_beta": (0 <= self.sce_beta < inf, at_least_0),
            "ldam_margin": (0 <= self.ldam_margin < inf, at_least_0),
            "ldam_scale": (0 < self.ldam_scale < inf, positive),
            "vs_gamma": (0 <= self.vs_gamma < inf, at_least_0),
            "vs_tau": (0 <= self.vs_tau < inf, at_least_0),
            "cb_beta": (0 <= self.cb_beta < 1, "a number in [0, 1)"),
            "nu": (0 <= self.nu < inf, at_least_0),
            "drw_start": (0 <= self.drw_start <= 1, fraction),
            "sam_rho": (0 <= self.sam_rho < inf, at_least_0),
            "mixup_alpha": (0 < self.mixup_alpha < inf, positive),
            "tau": (0 <= self.tau < inf, at_least_0),
            "stage_epochs": (self.stage_epochs >= 1, "at least 1"),
            "stage_lr": (0 < self.stage_lr < inf, positive),
            "clean": (self.clean >= 1, "at least 1"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "lr": (0 < self.lr < inf, positive),
            "lr_steps": (all(0 <= step <= 1 for step in self.lr_steps), "fractions of the epochs in [0, 1]"),
            "lr_factor": (0 < self.lr_factor <= 1, "a number in (0, 1]"),
            "momentum": (0 <= self.momentum < inf, at_least_0),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "weight_decay": (0 <= self.weight_decay < inf, at_least_0),
            "seeds": (self.seeds >= 1, "at least 1"),
            "test_images": (self.test_images is None or self.test_images >= 1, "at least 1"),
        }
        for name, (right, expected) in rules.items():
            if not right:
                raise ValueError(f"{name.replace('_', '-')}: got {getattr(self, name)}, expected {expected}")


def _check_reference(config: Config) -> None:
    """Raises ValueError if the package absgd cannot be compared with these settings."""
    if importlib.util.find_spec("absgd") is None:
        raise ValueError(
            "method reference needs the package absgd, which is not installed: pip install absgd==0.0.1, "
            "or leave reference out of the methods"
        )
    for name, only in (("mix", 0), ("momentum", 0.9)):
        if getattr(config, name) != only:
            raise ValueError(
                f"{name}: got {getattr(config, name)}, but method reference supports only {only:g}; leave it out of the methods"
            )
