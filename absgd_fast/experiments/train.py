"""The training loop: every method on the same splits, seed by seed, with its time and the weights it gave.

    for run in runs(Config(imbalance="lt", lam=0.5)): ...          one dict per method and seed, as soon as it is done
    runs(config, keep=Keeper(path, {}))                            with its state in a file (checkpoint.py) now and then
    runs(config, state=load(path)["state"])                        going on from there, to the same bits

Within one seed all methods see the same samples, wrong labels, initial weights and order of batches, so their
differences may be taken seed by seed.
"""

import importlib.util
import math
import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from absgd_fast import meta

from . import data, methods
from .checkpoint import digest, random_state, restore_random_state
from .models import check_model, make_model


@dataclass(frozen=True)
class Config:
    """One experiment; the command line's options with `-` for `_`.

    lam, gamma and mix are those of ab.ABLoss. `warmup` is the share of the epochs trained with λ = inf, plainly, before
    λ = lam (two-stage training, ABSGD paper, Sec. 3.6), or before a rule of ab.weights weighs. The learning rate is divided
    by 10 at 60 % and 80 % of the epochs. Seeds are 0 … seeds − 1.

    beta and reg are those of weights.cvar, chi2_rho is weights.chi2's, eta weights.GroupDRO's; its groups are the labels. clean
    is how many training images of each class l2rw knows the right label of (data.clean_part), l2rw_method how it weighs.
    """

    dataset: str = "digits"
    data_root: str | None = None
    imbalance: str = "none"
    rho: float = 100.0
    noise: str = "none"
    noise_rate: float = 0.4
    loss: str = "ce"
    methods: tuple = ("sgd", "absgd", "reference")
    lam: float = -0.5
    gamma: float = 0.9
    mix: float = 0.0
    warmup: float = 0.3
    beta: float = 0.5
    reg: float = 0.0
    chi2_rho: float = 0.5
    eta: float = 0.01
    clean: int = 10
    l2rw_method: str = "jvp"
    model: str = "mlp"
    epochs: int = 120
    lr: float = 0.1
    batch_size: int = 64
    weight_decay: float = 1e-4
    seeds: int = 8

    @property
    def switch(self):
        """The first epoch (0-based) with λ = lam."""
        return round(self.warmup * self.epochs)

    def check(self):
        """Raises ValueError, one line that says what was given and what is allowed, for the first bad setting."""
        choices = {
            "dataset": data.DATASETS,
            "imbalance": ("none", *data.IMBALANCES),
            "noise": ("none", *data.NOISES),
            "loss": tuple(methods.LOSSES),
            "l2rw_method": meta.METHODS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name.replace('_', '-')} {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        for method in self.methods:
            if method not in methods.METHODS:
                raise ValueError(f"unknown method {method!r}; use some of {','.join(methods.METHODS)}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods: got {','.join(self.methods)!r}, expected each method at most once, e.g. sgd,absgd")
        rules = {
            "rho": (self.rho >= 1 and math.isfinite(self.rho), "a finite number ≥ 1"),
            "noise_rate": (0 <= self.noise_rate < 1, "a number in [0, 1)"),
            "lam": (self.lam != 0 and not math.isnan(self.lam), "a number other than 0 (inf for plain training)"),
            "gamma": (0 < self.gamma <= 1, "a number in (0, 1]"),
            "mix": (0 <= self.mix < math.inf, "a finite number ≥ 0"),
            "warmup": (0 <= self.warmup <= 1, "a share of the epochs in [0, 1]"),
            "beta": (0 < self.beta <= 1, "a share of the batch in (0, 1]"),
            "reg": (0 <= self.reg < math.inf, "a finite number ≥ 0"),
            "chi2_rho": (0 <= self.chi2_rho < math.inf, "a finite number ≥ 0"),
            "eta": (0 <= self.eta < math.inf, "a finite number ≥ 0"),
            "clean": (self.clean >= 1, "at least 1"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "a finite number > 0"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "a finite number ≥ 0"),
            "seeds": (self.seeds >= 1, "at least 1"),
        }
        for name, (right, expected) in rules.items():
            if not right:
                raise ValueError(f"{name.replace('_', '-')}: got {getattr(self, name)}, expected {expected}")
        if "reference" in self.methods:
            if importlib.util.find_spec("absgd") is None:
                raise ValueError(
                    "method reference needs the package absgd, which is not installed: pip install absgd==0.0.1, "
                    "or leave reference out of the methods"
                )
            if self.mix != 0:
                raise ValueError(f"mix: got {self.mix}, but method reference knows only 0; leave it out of the methods")
        if self.dataset.startswith("digits"):
            check_model(self.model, (1, 8, 8))
        else:
            check_model(self.model, (3, 32, 32))


# ------------------------------------------------------------------------------------------------ the loop


def runs(config, source=None, on_epoch=lambda method, seed: None, keep=lambda take, finished: None, state=None):
    """Trains every method of `config` on every seed and yields each run's result when it is done.

    Args:
        config: a Config.
        source: its data set, where load_source has been called before.
        on_epoch: called as on_epoch(method, seed) after each epoch.
        keep: called as keep(take, False) after each optimizer step and keep(take, True) between two runs; take() is the
            state of the whole at that moment, to be written (checkpoint.Keeper does) or copied before keep returns.
        state: what take() gave; training goes on from there, with the same results bit for bit on the same machine. The
            runs that were finished are yielded again, first.

    Yields:
        dict per run, ready for JSON (numbers that are not finite are None):
            method, seed
            accuracy, balanced_accuracy    on the test set after the last epoch, percent
            per_class_recall               C percentages
            seconds                        training alone: no evaluation, no bookkeeping
            train_loss                     mean plain loss over the training set after the last epoch
            train_counts                   training samples of each class, by their true label
            parameters                     sha256 of the trained model's state_dict, in its order (checkpoint.digest)
            epochs                         per epoch: accuracy, balanced_accuracy; class_weight (C each), the mean
                                           robust weight that the steps of the epoch gave to the samples labelled so;
                                           clean_weight, flipped_weight, the same by whether the label is right

    Raises:
        ValueError, FileNotFoundError, ImportError: as Config.check and data.load_source.

    Example:
        >>> from absgd_fast.experiments.train import Config, runs
        >>> config = Config(methods=("sgd", "absgd"), model="linear", epochs=1, seeds=1)
        >>> [run["method"] for run in runs(config)]
        ['sgd', 'absgd']

    Source: ABSGD paper, Sec. 4 (protocol) and Fig. 4 (weights per class).
    """
    config.check()
    source = source or data.load_source(config.dataset, config.data_root)
    finished, running = (list(state["finished"]), state["running"]) if state else ([], None)
    yield from tuple(finished)
    done, split = {(run["method"], run["seed"]) for run in finished}, None
    for seed in range(config.seeds):
        # a different method goes first each time, so that none always meets the cold or the warm machine
        turn = seed % len(config.methods)
        left = [m for m in config.methods[turn:] + config.methods[:turn] if (m, seed) not in done]
        if not left:
            continue
        cold = split is None
        split = data.draw(source, seed, imbalance=config.imbalance, rho=config.rho, noise=config.noise, rate=config.noise_rate)
        if cold:
            _warm_up(config, source, split)
            if state:
                restore_random_state(state["random"])  # after the warm-up, which may have drawn from them
        for method in left:
            training = _Training(method, config, source, split, seed)
            if running:  # the first run that is not finished
                training.load_state_dict(running)
                running = None

            def take():
                return {"finished": list(finished), "running": training.state_dict(), "random": random_state()}

            finished.append(training.run(lambda: on_epoch(method, seed), lambda: keep(take, False)))
            yield finished[-1]
            keep(lambda: {"finished": list(finished), "running": None, "random": random_state()}, True)


def _warm_up(config, source, split):
    """A few steps of each method whose result is thrown away: what is loaded on first use is in nobody's seconds."""
    few = slice(2 * config.batch_size)
    small = data.Split(split.x[few], split.y[few], split.y_true[few], split.x_test[:1], split.y_test[:1])
    for method in config.methods:
        _Training(method, replace(config, epochs=2), source, small, 0).run(lambda: None, lambda: None)


class _Training:
    """One method on one split. Whatever changes while it trains is in state_dict(), which may be taken after any step."""

    def __init__(self, name, config, source, split, seed):
        self.name, self.config, self.source, self.split, self.seed = name, config, source, split, seed
        self.model = make_model(config.model, source.shape, source.classes, seed)
        self.method = methods.METHODS[name](self.model.parameters(), config, split, seed)
        self.decay = torch.optim.lr_scheduler.MultiStepLR(
            self.method.optimizer, [round(0.6 * config.epochs), round(0.8 * config.epochs)], gamma=0.1
        )
        self.order = data.generator(seed, data.ORDER)
        self.history = {key: [] for key in ("accuracy", "balanced_accuracy", "class_weight", "clean_weight", "flipped_weight")}
        self.seconds = 0.0
        # of the epoch under way: the order of its samples, how many steps are done, the weights they gave
        self.epoch, self.samples, self.step, self.weights = 0, None, 0, []

    def state_dict(self):
        return {
            "method": self.name,
            "seed": self.seed,
            "model": self.model.state_dict(),
            "parts": self.method.state_dict(),
            "decay": self.decay.state_dict(),
            "order": self.order.get_state(),
            "history": self.history,
            "seconds": self.seconds,
            "epoch": self.epoch,
            "samples": self.samples,
            "step": self.step,
            "weights": torch.cat(self.weights),
        }

    def load_state_dict(self, state):
        if (state["method"], state["seed"]) != (self.name, self.seed):
            raise ValueError(f"the state is {state['method']}'s on seed {state['seed']}, not {self.name}'s on seed {self.seed}")
        self.model.load_state_dict(state["model"])
        self.method.load_state_dict(state["parts"])
        self.method.optimizer._opt_called = True  # it was; torch warns where the schedule is stepped before it
        self.decay.load_state_dict(state["decay"])
        self.order.set_state(state["order"])
        self.history = {key: list(values) for key, values in state["history"].items()}
        self.seconds, self.epoch, self.samples, self.step = (state[key] for key in ("seconds", "epoch", "samples", "step"))
        self.weights = [state["weights"]]

    def run(self, on_epoch, after_step):
        """Trains from where it stands to the end and tests → the dict described in runs()."""
        model, method, config, split = self.model, self.method, self.config, self.split
        while self.epoch < config.epochs:
            if self.samples is None:
                self.samples, self.step, self.weights = torch.randperm(len(split.y), generator=self.order), 0, []
            model.train()
            for batch in self.samples.split(config.batch_size)[self.step :]:
                batch = method.choose(batch)
                x, y = split.x[batch], split.y[batch]
                if self.source.augment:
                    x = data.augment(x, self.order)
                begun = time.perf_counter()
                method.step(model, x, y)
                self.seconds += time.perf_counter() - begun
                given = method.weights()
                self.weights.append(torch.ones(len(batch)) if given is None else given)
                self.step += 1
                after_step()
            self.decay.step()
            method.after_epoch()
            accuracy, balanced, recall = _test(model, split, self.source.classes)
            weights = _mean_weights(torch.cat(self.weights), self.samples, split, self.source)
            for key, value in zip(self.history, (accuracy, balanced, *weights)):
                self.history[key].append(value)
            self.epoch, self.samples = self.epoch + 1, None
            on_epoch()
        return {
            "method": self.name,
            "seed": self.seed,
            "accuracy": accuracy,
            "balanced_accuracy": balanced,
            "per_class_recall": recall,
            "seconds": self.seconds,
            "train_loss": _number(nn.functional.cross_entropy(_logits(model, split.x), split.y)),
            "train_counts": torch.bincount(split.y_true, minlength=self.source.classes).tolist(),
            "parameters": digest(model.state_dict()),
            "epochs": self.history,
        }


def _mean_weights(weights, samples, split, source):
    """Per class (labels as trained on), over the right labels, over the wrong ones."""
    y, wrong = split.y[samples], split.y[samples] != split.y_true[samples]
    counts = torch.bincount(y, minlength=source.classes)
    per_class = torch.zeros(source.classes, dtype=torch.float64).index_add_(0, y, weights.double()) / counts
    return [_number(w) for w in per_class], _number(weights[~wrong].mean()), _number(weights[wrong].mean())


def _test(model, split, classes):
    """(accuracy, mean recall over the classes, list of recalls), percent."""
    right = _logits(model, split.x_test).argmax(1) == split.y_test
    counts = torch.bincount(split.y_test, minlength=classes)
    recall = 100 * torch.bincount(split.y_test[right], minlength=classes) / counts
    return _number(100 * right.double().mean()), _number(recall.nanmean()), [_number(r) for r in recall]


@torch.no_grad()
def _logits(model, x):
    model.eval()
    return torch.cat([model(part) for part in x.split(2000)])  # one forward, or several where memory would not do


def _number(x):
    """A float of six digits, or None where JSON has no number for it."""
    return float(f"{float(x):.6g}") if math.isfinite(x) else None
