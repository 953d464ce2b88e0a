"""The training loop: trains every method on the same splits, seed by seed, and records its time and its weights.

    for run in runs(Config(imbalance="lt", lam=0.5)): ...          one dict per method and seed, as soon as it is done
    runs(config, keep=Keeper(path, {}))                            also saves the state from time to time (checkpoint.py)
    runs(config, state=load(path)["state"])                        goes on from a saved state and gets the same bits

All methods of one seed see the same samples, wrong labels, initial weights and order of batches. So their results may be
compared seed by seed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from absgd_fast.selection.draws import random_state, restore_random_state

from . import criteria, data, images, methods, spec
from .audit import Watch
from .checkpoint import digest
from .config import Config
from .method import Setup
from .models import float32_default, last_block, make_model
from .models import split as split_model
from .placing import Placing, Processes
from .recording import Recorder, confusion, number, tested
from .stages import STAGES

Run = dict[str, Any]  # the result of one method on one seed, as runs() describes it
State = dict[str, Any]  # tensors and plain values, which checkpoint.save takes


# ------------------------------------------------------------------------------------------------ the loop


def runs(
    config: Config,
    source: data.Source | None = None,
    on_epoch: Callable[[str, int], object] = lambda method, seed: None,
    keep: Callable[[Callable[[], State], bool], object] = lambda take, finished: None,
    state: State | None = None,
    on_audit: Callable[[str, int, State], object] = lambda method, seed, parts: None,
    processes: Processes | None = None,
) -> Iterator[Run]:
    """Trains every method of `config` on every seed and yields the result of each run when it is done.

    Args:
        config: a Config.
        source: its data set. None loads it.
        on_epoch: called as on_epoch(method, seed) after each epoch.
        keep: called as keep(take, False) after each optimizer step, and as keep(take, True) after each run. take() returns the
            state of the whole training at that moment. Write it (checkpoint.Keeper does) or copy it before keep returns.
        state: a state that take() returned. Training goes on from there, with the same results bit for bit on the same
            machine. The runs that were already finished are yielded again first.
        processes: those that train together, started by torchrun; None: this one alone. Each trains on its part of every batch
            (Processes.part), and records the weights and the predictions of that part. All of them test on the same images.
        on_audit: with config.audit, called as on_audit(method, seed, parts) at the end of a run; audit.save writes the parts.

    Yields:
        A dict per run, ready for JSON (a number that is not finite is None):
            method, seed
            accuracy, balanced_accuracy    on the test set after the last epoch, percent
            per_class_recall               C percentages
            seconds                        of training alone, without evaluation and bookkeeping
            train_loss                     mean plain loss over the training set after the last epoch
            train_counts                   training samples of each class, by their true label
            parameters                     sha256 of the trained model's state_dict, in its order (checkpoint.digest)
            flipped_confusion              of the training samples with a wrong label: C × C counts, true class × prediction
            epochs                         lists with an entry per epoch: accuracy, balanced_accuracy, on config.test_images of
                                           the test images; class_weight, the C mean robust weights of the samples with this label
                                           in the steps of the epoch; clean_weight and flipped_weight, the means over right and
                                           over wrong labels; ess, the mean ESS/n of the batches; lam and log_s, both at the
                                           end; train_accuracy, percent of the labels that the network predicts while it trains;
                                           flipped_as_true and flipped_as_given, percent of the samples with a wrong label that it
                                           predicts as their true class, and as this label

    Raises:
        ValueError, FileNotFoundError, ImportError: as Config.check and data.load_source.

    Example:
        >>> from absgd_fast.experiments.train import Config, runs
        >>> config = Config(methods=("sgd", "absgd"), model="linear", epochs=1, seeds=1)
        >>> [run["method"] for run in runs(config)]
        ['sgd', 'absgd']

    Source: ABSGD paper, Sec. 4 (protocol) and Fig. 4 (weights per class).
    """
    config.check(resumed=state is not None)
    source = source or data.load_source(config.dataset, config.data_root, **config.reading)
    config.check_source(source)
    finished: list[Run] = list(state["finished"]) if state else []
    running: State | None = state["running"] if state else None
    yield from tuple(finished)
    done = {(run["method"], run["seed"]) for run in finished}
    warm = False
    for seed in range(config.seeds):
        # Each seed begins with another method. Otherwise the same one would always meet a cold or a warm machine.
        turn = seed % len(config.methods)
        left = [m for m in config.methods[turn:] + config.methods[:turn] if (m, seed) not in done]
        if not left:
            continue
        split = draw(config, source, seed)
        if not warm:
            _warm_up(config, source, split, processes)
            warm = True
            if state:
                restore_random_state(state["random"])  # after the warm-up, which may have drawn random numbers
        for method in left:
            training = Training(method, config, source, split, seed, processes=processes)
            torch.manual_seed(seed)  # dropout draws from the global generator
            if state and running:  # the first run that is not finished
                training.load_state_dict(running)
                restore_random_state(state["random"])  # torch's too, which has just been seeded
                running = None
            take = partial(_state, finished, training)
            finished.append(training.run(partial(on_epoch, method, seed), partial(keep, take, False)))
            if training.watch:
                on_audit(method, seed, training.watch.parts(split, source, f"{config.dataset}, {method}, seed {seed}"))
            yield finished[-1]
            keep(partial(_state, finished, None), True)


# Their weights or their samples are those of one process.
_OF_ONE_PROCESS = ("l2rw", "reference", "cvar", "chi2", "groupdro", "hard-mining", "random")


def check_processes(config: Config, processes: Processes) -> None:
    """Raises ValueError if several processes cannot train the methods together."""
    alone = [text for text in config.methods if spec.parse(text, config).method in _OF_ONE_PROCESS]
    if processes.world > 1 and (alone or config.audit):
        what = f"method {', '.join(alone)}" if alone else "--audit"
        raise ValueError(f"{what}: got {processes.world} processes of torchrun, expected one; leave it out or start one process")
    if processes.world > config.batch_size:
        raise ValueError(f"batch-size: got {config.batch_size}, expected at least {processes.world}, one image for each process")


def draw(config: Config, source: data.Source, seed: int) -> data.Split:
    """The split of one seed, as data.draw makes it with the settings of the experiment."""
    return data.draw(
        source,
        seed,
        per_class=config.per_class,
        share=config.data_share,
        imbalance=config.imbalance,
        rho=config.rho,
        noise=config.noise,
        rate=config.noise_rate,
        background=config.background,
    )


def _state(finished: list[Run], training: Training | None) -> State:
    """The state of the whole: the results so far, the run under way (None between two runs), and the global random generators."""
    running = training.state_dict() if training else None
    return {"finished": list(finished), "running": running, "random": random_state()}


def _warm_up(config: Config, source: data.Source, split: data.Split, processes: Processes | None) -> None:
    """Trains each method for a few steps and drops the result, so that loading code on first use is not timed."""
    few = slice(2 * config.batch_size)
    small = data.Split(split.x[few], split.y[few], split.y_true[few], split.x_test[:1], split.y_test[:1])
    short = replace(config, epochs=2, stage_epochs=1)
    for method in config.methods:
        Training(method, short, source, small, 0, processes=processes).run(lambda: None, lambda: None)


class Training:
    """The training of one method on one split. state_dict() has everything that changes, and may be called after any step.

    Args:
        name: the specification of the method (spec.parse).
        config, source, split, seed: as in runs().
        make: makes the method. None: that of the specification.
        processes: as in runs().
    """

    def __init__(
        self,
        name: str,
        config: Config,
        source: data.Source,
        split: data.Split,
        seed: int,
        make: methods.Make | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.spec = spec.parse(name, config) if make is None else spec.parse("absgd", config)
        self.name, self.config, self.source, self.split, self.seed = name, self.spec.config(config), source, split, seed
        self.placing = Placing(config.device, config.amp, config.channels_last)
        head = criteria.head(self.config.loss)
        self.model = self.placing.model(make_model(config.model, source.shape, source.classes, seed, head))
        setup = Setup(list(self.model.parameters()), self.config, split, source.classes, seed, self.spec.extras, self.placing)
        with float32_default():  # or a normaliser would be a float64 where that is torch's default
            self.method = methods.build(self.spec.method, setup) if make is None else make(setup)
        self.processes = processes
        self.frozen = False  # whether a part of the network is not trained any more
        self.net = self._wrapped()  # what the steps use: in DistributedDataParallel if there are several processes
        self.decay = self.config.decay(self.method.optimizer)
        self.order = data.generator(seed, data.ORDER)
        self.looked_at = data.some_test_images(split, config.test_images)
        self.recorder = Recorder(self.looked_at, source.classes)
        self.seconds = 0.0
        self.epoch = 0
        # Of the epoch under way: the order of its samples (None between two epochs), and its finished steps.
        self.samples: Tensor | None = None
        self.step = 0
        self.watch = Watch(len(split.y), source.classes) if config.audit else None

    @property
    def history(self) -> dict[str, list[Any]]:
        """The series with an entry per epoch."""
        return self.recorder.history

    def state_dict(self) -> State:
        """The state, for load_state_dict() of another Training with the same arguments."""
        return {
            "method": self.name,
            "seed": self.seed,
            "model": self.model.state_dict(),
            "parts": self.method.state_dict(),
            "decay": self.decay.state_dict(),
            "order": self.order.get_state(),
            "recorder": self.recorder.state_dict(),
            "seconds": self.seconds,
            "epoch": self.epoch,
            "samples": self.samples,
            "step": self.step,
            "watch": self.watch.state_dict() if self.watch else None,
        }

    def load_state_dict(self, state: State) -> None:
        """Goes on where state_dict() was called. Raises ValueError if that was another method or seed."""
        if (state["method"], state["seed"]) != (self.name, self.seed):
            raise ValueError(f"the state is {state['method']}'s on seed {state['seed']}, not {self.name}'s on seed {self.seed}")
        self.model.load_state_dict(state["model"])
        self.method.load_state_dict(state["parts"])
        # torch warns when a schedule is stepped before its optimizer; this optimizer was stepped before the state was taken
        self.method.optimizer._opt_called = True  # type: ignore[attr-defined]  # torch sets it in LRScheduler.__init__
        self.decay.load_state_dict(state["decay"])
        self.order.set_state(state["order"])
        self.recorder.load_state_dict(state["recorder"])
        self.seconds, self.epoch, self.samples, self.step = (state[key] for key in ("seconds", "epoch", "samples", "step"))
        if self.watch:
            self.watch.load_state_dict(state["watch"])

    def epochs(self, after_step: Callable[[], object]) -> Iterator[Tensor]:
        """Trains to the end from where it stands. After each epoch it yields the logits of the test images that are looked at."""
        method, split = self.method, self.split
        while self.epoch < self.config.epochs:
            if self.samples is None:
                self.samples, self.step = method.choose(torch.randperm(len(split.y), generator=self.order, device="cpu")), 0
                self.recorder.begin()
            self._train_mode()
            chosen = self._parts(self.samples.split(self.config.batch_size))
            for batch, x in zip(chosen[self.step :], self._batches(chosen)):
                self._one_step(batch, x)
                self.step += 1
                after_step()
            if self.placing.device.type == "cuda":  # the steps that the GPU has still to do are part of the time
                begun = time.perf_counter()
                self.placing.wait()
                self.seconds += time.perf_counter() - begun
            self.decay.step()
            method.after_epoch()
            logits = self._logits(self.model, self.looked_at.x_test)
            self.recorder.end(logits.argmax(1), method.robust)
            self.epoch, self.samples = self.epoch + 1, None
            yield logits

    def _batches(self, chosen: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of the batches of this epoch that are left."""
        config = self.config
        augment = config.augment or self.source.augment
        return images.batches(
            self.split.x, chosen, augment=augment, seed=self.seed, epoch=self.epoch, first=self.step, workers=config.workers
        )

    def _one_step(self, batch: Tensor, x: Tensor) -> None:
        x, y = self.placing.images(x), self.split.y[batch].to(self.placing.device)
        begun = time.perf_counter()
        self.method.step(self.net, x, y)
        self.seconds += time.perf_counter() - begun
        weights = self.method.weights()
        self.recorder.add(batch, weights, self.method.logits)
        if self.watch and self.watch.records(self.epoch, self.config.epochs):
            self._watch(batch, x, y, weights)

    def _wrapped(self) -> nn.Module:
        return self.model if self.processes is None else self.processes.wrap(self.model)

    def _parts(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """This process's parts of the batches. A part that is too small is left out: batch normalisation needs two samples."""
        parts = list(batches) if self.processes is None else [self.processes.part(batch) for batch in batches]
        normalised = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules())
        if not (kept := [part for part in parts if len(part) > normalised]):
            raise ValueError(
                f"batch-size: {self.config.batch_size} leaves no batch of two images in a process, which the batch normalisation "
                f"of {self.config.model} needs; use a larger one"
            )
        return kept

    def _train_mode(self) -> None:
        """Puts the network into training mode. After the warm-up, what is not `trainable` is left as it is."""
        self.model.train()
        if self.config.trainable == "all" or self.epoch < self.config.switch:
            return
        features, classifier = split_model(self.model)
        moving = [classifier] + ([last_block(self.model)] if self.config.trainable == "fc+lb" else [])
        features.eval()
        for part in moving:
            part.train()
        if not self.frozen:
            self.model.requires_grad_(False)
            for part in moving:
                part.requires_grad_(True)
            self.net, self.frozen = self._wrapped(), True

    def run(self, on_epoch: Callable[[], object], after_step: Callable[[], object]) -> Run:
        """Trains to the end from where it stands, and returns its result()."""
        for _ in self.epochs(after_step):
            on_epoch()
        return self.result()

    def result(self) -> Run:
        """The dict that runs() describes, of the model as it is, with the classifier stage of the method."""
        split, classes, model = self.split, self.source.classes, self._staged()
        accuracy, balanced, recall = tested(self._logits(model, split.x_test).argmax(1), split, classes)
        logits = self._logits(model, split.x)
        return {
            "method": self.name,
            "seed": self.seed,
            "accuracy": accuracy,
            "balanced_accuracy": balanced,
            "per_class_recall": recall,
            "seconds": self.seconds,
            "train_loss": number(nn.functional.cross_entropy(logits, split.y)),
            "train_counts": data.train_counts(split, classes),
            "flipped_confusion": confusion(logits.argmax(1), split, classes),
            "parameters": digest(model.state_dict()),
            "epochs": self.history,
        }

    def _staged(self) -> nn.Module:
        """The network whose classifier is that of the classifier stage, or the network itself."""
        if (stage := spec.stage_of(self.spec)) is None:
            return self.model
        features, classifier = split_model(self.model)
        begun = time.perf_counter()
        cached = torch.cat([part.cpu() for part in self._outputs(features, self.split.x)])
        new = STAGES[stage](copy.deepcopy(classifier).cpu(), cached, self.split.y, self.config, self.seed)
        self.seconds += time.perf_counter() - begun
        return nn.Sequential(features, new.to(self.placing.device))

    def _outputs(self, model: nn.Module, x: Any) -> Iterator[Tensor]:
        # In parts, so that large test sets fit into memory. 250 images at once take half the time of 2000 with the convolutions,
        # and the same with the others.
        model.eval()
        with torch.no_grad(), self.placing.autocast():
            for part in images.whole(x, size=250, workers=self.config.workers):
                yield model(self.placing.images(part)).float()

    def _logits(self, model: nn.Module, x: Any) -> Tensor:
        """The logits of all images, on the CPU."""
        return torch.cat([part.cpu() for part in self._outputs(model, x)])

    def _watch(self, batch: Tensor, x: Tensor, y: Tensor, weights: Tensor | None) -> None:
        """Adds a batch to the audit. None of this is timed."""
        assert self.watch
        logits = self.method.logits
        if logits is None:  # those after the step, of a network in evaluation mode, whose statistics do not move
            self.model.eval()
            with torch.no_grad():
                logits = self.model(x)
            self._train_mode()
        self.watch.add(batch, logits.cpu(), y.cpu(), None if weights is None else weights.cpu())
