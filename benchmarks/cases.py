"""The cases that are timed, their right answers, and the figures to reach.

A case makes its data when asked. The data knows the right answer, computed by absgd_fast.reference in float64, and its `error`
says how far a competitor's result is from it. A competitor whose error exceeds `tolerance` is not timed.
"""

import math
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch

import absgd_fast as ab
from absgd_fast import ops, reference
from absgd_fast.experiments import data as experiments
from absgd_fast.experiments.models import make_model

from . import models

STEPS = 3  # steps before the check; from the second one on, momentum and the moving average depend on earlier steps
LAM, GAMMA = -1.0, 0.9
SGD = dict(lr=0.1, momentum=0.9, weight_decay=1e-4)
IN_CACHE, LARGE = 8e6, 64e6  # bytes of logits: fewer than IN_CACHE stay in a GPU's cache; more than LARGE depend on its memory


def distance(given, exact):
    """The largest error of a row over its largest exact value (0-d tensor). So rows of small weight count like the others."""
    return ((given.double() - exact).abs().amax(-1) / exact.abs().amax(-1)).max()


def class_counts(classes):
    """Samples per class of a long tail. The largest class has 100 times as many as the smallest."""
    return experiments.class_counts(1000, classes, "lt", rho=100)


# Our losses, by name: (classes, backend) -> module. Losses with class vectors read these for every logit.
LOSSES = {
    "cross-entropy": lambda classes, backend=None: ab.CrossEntropy(backend=backend),
    "label smoothing": lambda classes, backend=None: ab.CrossEntropy(label_smoothing=0.1, backend=backend),
    "focal": lambda classes, backend=None: ab.Focal(gamma=2.0, backend=backend),
    "GCE": lambda classes, backend=None: ab.GCE(q=0.7, backend=backend),
    "SCE": lambda classes, backend=None: ab.SCE(alpha=0.1, beta=1.0, backend=backend),
    "LDAM": lambda classes, backend=None: ab.LDAM(class_counts(classes), max_m=0.5, s=1.0, backend=backend),
    "logit adjustment": lambda classes, backend=None: ab.LogitAdjusted(class_counts(classes), backend=backend),
    "CDT": lambda classes, backend=None: ab.CDT(class_counts(classes), gamma=0.3, backend=backend),
    "VS": lambda classes, backend=None: ab.VS(class_counts(classes), gamma=0.3, tau=1.0, backend=backend),
}


class Logits:
    """logits (rows, classes) of `dtype` and labels.

    Row 0 has a large probability of its label, so p - 1 loses digits. Row 1 has a small one, so its weight is almost 0.

    Args:
        copies: the number of places in memory that hold the same logits. Calls take them in turn, so none of them is still in a
            GPU's cache. None makes copies only if the cache could hold the logits from call to call but would not in training.
        loss: a name in LOSSES.
    """

    def __init__(self, rows, classes, dtype=torch.float32, device="cpu", copies=1, loss="cross-entropy"):
        self.device, self.loss = torch.device(device), loss
        draw = torch.Generator(self.device).manual_seed(0)
        logits = torch.randn(rows, classes, generator=draw, device=self.device)
        self.target = torch.randint(classes, (rows,), generator=draw, device=self.device)
        logits[0, self.target[0]] = math.log(classes) + 3
        logits[1, self.target[1]] = -5
        self.logits = logits.to(dtype)
        # torch and the reference package round a bfloat16 loss of 16 by up to 0.06, which changes its weight as much
        self.tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
        self.bytes = self.logits.numel() * self.logits.element_size()
        self.moved = 3 * self.bytes  # by forward and backward: two reads, and one write of the gradient
        self.copies = [self.logits] + [self.logits.clone() for _ in range((copies or self._beyond_cache()) - 1)]
        self._part = max(1, (2**21 if self.device.type == "cpu" else 2**26) // classes)  # rows at a time in float64

    def _beyond_cache(self):
        """The number of copies that fill the cache of a GPU four times.

        It is 1 for small batches, which stay in the cache from layer to layer in training too, and for batches that do not fit.
        """
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size if self.device.type == "cuda" else 2**16
        return 1 if self.bytes < IN_CACHE or self.bytes >= 4 * cache else math.ceil(4 * cache / self.bytes)

    def forget(self):
        """Frees the memory of the right answer."""
        vars(self).pop("_exact", None)

    def as_cross_entropy(self):
        """The same logits with plain cross-entropy as their loss."""
        other = copy(self)
        other.forget()
        other.loss = "cross-entropy"
        return other

    @cached_property
    def _exact(self):
        """The losses (rows,) and their gradients (rows, classes) in float64."""
        losses = torch.empty(len(self.logits), dtype=torch.float64, device=self.device)
        slopes = torch.empty(self.logits.shape, dtype=torch.float64, device=self.device)
        for x, y, loss, slope in zip(*(t.split(self._part) for t in (self.logits, self.target, losses, slopes))):
            x = x.double().requires_grad_()
            value = LOSSES[self.loss](x.shape[1], backend="reference")(x, y)
            loss[:] = value.detach()
            slope[:] = torch.autograd.grad(value.sum(), x)[0]
        return losses, slopes

    def error(self, loss, grad, lam, init):
        """The error of the loss and its gradient in step number STEPS of Alg. 1 on this batch.

        lam: inf is the plain mean; a TargetESS gives every step the same weights.
        """
        losses, slopes = self._exact
        log_s = -math.inf
        for _ in range(STEPS):
            if isinstance(lam, ab.TargetESS):
                exact, weights, *_ = reference.robust_loss_at_target(losses, losses.new_tensor(log_s), lam.signed_share)
            else:
                exact, weights, log_s, _ = reference.robust_loss(losses, log_s, lam, gamma=GAMMA, init=init)
        factors = (weights / len(losses)).unsqueeze(1)
        parts = zip(*(t.split(self._part) for t in (grad, slopes, factors)))
        errors = [distance(got, slope * factor) for got, slope, factor in parts]
        return float(torch.stack([*errors, distance(loss.detach()[None], exact[None])]).max())


class MicroBatches(Logits):
    """The logits of `count` micro-batches of `rows` rows each, which make one optimizer step together."""

    def __init__(self, count, rows, classes, dtype=torch.float32, device="cpu"):
        super().__init__(count * rows, classes, dtype, device)
        self.count = count
        self.moved = 2 * self.bytes  # one read, and one write of the gradient


class Head:
    """hidden (rows, width), the weight of a linear head (classes, width), and labels."""

    def __init__(self, rows, width, classes, dtype=torch.float32, device="cpu"):
        self.device, self.tolerance = torch.device(device), 0.03 if dtype == torch.bfloat16 else 1e-4
        draw = torch.Generator(self.device).manual_seed(0)
        self.hidden, self.weight = (torch.randn(n, width, generator=draw, device=self.device) for n in (rows, classes))
        self.hidden, self.weight = self.hidden.to(dtype), (self.weight / width**0.5).to(dtype)
        self.target = torch.randint(classes, (rows,), generator=draw, device=self.device)
        self.bytes = rows * classes * self.hidden.element_size()  # of the logits
        self.moved = 2 * (self.hidden.nbytes + self.weight.nbytes)
        self._part, self._exact = max(1, 2**26 // classes), {}

    def forget(self):
        """Frees the memory of the right answers."""
        self._exact = {}

    def _make_exact(self, lam, init):
        """The loss and the gradients of hidden and weight in float64, computed for a part of the rows at a time."""
        hidden, weight = self.hidden.double(), self.weight.double()
        parts = list(zip(hidden.split(self._part), self.target.split(self._part)))
        losses, log_s = torch.cat([reference.logit_loss(h @ weight.t(), y) for h, y in parts]), -math.inf
        for _ in range(STEPS):
            loss, weights, log_s, _ = reference.robust_loss(losses, log_s, lam, gamma=GAMMA, init=init)
        of_hidden, of_weight = [], torch.zeros_like(weight)
        for (h, y), w in zip(parts, (weights / len(losses)).split(self._part)):
            logits = (h @ weight.t()).requires_grad_()
            (slopes,) = torch.autograd.grad((reference.logit_loss(logits, y) * w).sum(), logits)
            of_hidden.append(slopes @ weight)
            of_weight.addmm_(slopes.t(), h)
        return loss, torch.cat(of_hidden), of_weight

    def error(self, loss, grads, lam, init):
        """The largest error of the loss, the gradient of hidden and that of weight, each as a whole, in step number STEPS."""
        if (lam, init) not in self._exact:
            self._exact[lam, init] = self._make_exact(lam, init)
        given = (loss.detach(), *grads)
        return max(float((g.double() - e).norm() / e.norm()) for g, e in zip(given, self._exact[lam, init]))


class Rule:
    """An optimizer rule: our class, torch's class, and what the benchmark has to know of them.

    Args:
        ours, theirs: the two optimizer classes.
        fastest: the options with which torch's steps fastest, which is `fused` if it has that.
        states: the number of state arrays of a parameter.
        step: step(w, grad, options) -> w after STEPS steps, by absgd_fast.reference.
        on_gpu: like `fastest`, if torch's fastest step on a GPU is another one.
        **options: the options of both optimizers.
    """

    def __init__(self, ours, theirs, fastest, states, step, on_gpu=None, **options):
        self.ours, self.theirs, self._fastest, self.states = ours, theirs, fastest, states
        self._step, self._on_gpu, self.options = step, on_gpu or fastest, options

    def fastest(self, device):
        return self._fastest if device.type == "cpu" else self._on_gpu

    def stepped(self, w, grad):
        """w after STEPS steps, by absgd_fast.reference."""
        return self._step(w, grad, self.options)


def _sgd_steps(w, grad, options):
    buffers = [None]
    for _ in range(STEPS):
        buffers = reference.momentum_step_([w], [grad], buffers, **options)
    return w


def _counted_steps(step_, states, **more):
    def stepped(w, grad, options):
        kept = [[torch.zeros_like(w) if used else None] for used in states]
        steps = [torch.zeros(())]
        for _ in range(STEPS):
            step_([w], [grad], *kept, steps, **options, **more)
        return w

    return stepped


RULES = {
    "SGD": Rule(ab.ABSGD, torch.optim.SGD, {"fused": True}, 1, _sgd_steps, **SGD),
    "Adam": Rule(
        ab.ABAdam, torch.optim.Adam, {"fused": True}, 2, _counted_steps(reference.adam_step_, (True, True, False)), lr=0.1
    ),
    "AdamW": Rule(
        ab.ABAdamW,
        torch.optim.AdamW,
        {"fused": True},
        2,
        _counted_steps(reference.adam_step_, (True, True, False), decoupled_weight_decay=True),
        lr=0.1,
        weight_decay=1e-2,
    ),
    "RMSprop": Rule(
        ab.ABRMSprop,
        torch.optim.RMSprop,
        {"foreach": True},
        1,
        _counted_steps(reference.rmsprop_step_, (True, False, False)),
        lr=0.1,
    ),
    "AdaGrad": Rule(
        ab.ABAdagrad,
        torch.optim.Adagrad,
        {"fused": True},
        1,
        _counted_steps(reference.adagrad_step_, (True,)),
        on_gpu={"foreach": True},
        lr=0.1,
    ),
}


class Tensors:
    """Parameters of given shapes, each with a gradient that is the same in every step."""

    tolerance = 1e-5

    def __init__(self, shapes, device="cpu", rule="SGD"):
        self.device, self.rule = torch.device(device), RULES[rule]
        draw = torch.Generator(self.device).manual_seed(0)
        self.start, self.grads = ([torch.randn(s, generator=draw, device=self.device) for s in shapes] for _ in range(2))
        self.bytes = 4 * sum(map(math.prod, shapes))
        self.moved = (3 + 2 * self.rule.states) * self.bytes  # parameter and states read and written, gradient read

    def parameters(self):
        params = [torch.nn.Parameter(w.clone()) for w in self.start]
        for p, grad in zip(params, self.grads):
            p.grad = grad
        return params

    @cached_property
    def _exact(self):
        return [self.rule.stepped(w.double(), grad.double()) for w, grad in zip(self.start, self.grads)]

    def forget(self):
        """Frees the memory of the right answer."""
        vars(self).pop("_exact", None)

    def error(self, params):
        """The error of the change of the parameters in STEPS steps."""
        return _way_off(self.start, params, self._exact)


class Clipped(Tensors):
    """The same, for steps that clip the gradients to half of their norm."""

    tolerance = 1e-4  # torch adds 25 M squares in float32, and its norm is 2e-5 off

    def __init__(self, shapes, device="cpu", rule="SGD"):
        super().__init__(shapes, device, rule)
        self.max_norm = math.sqrt(math.fsum(float(g.double().square().sum()) for g in self.grads)) / 2
        self.moved += self.bytes  # the gradient is read once more
        self.plain = Tensors(shapes, device, rule)

    @cached_property
    def _exact(self):
        return [self.rule.stepped(w.double(), grad.double() / 2) for w, grad in zip(self.start, self.grads)]

    def forget(self):
        """As in `Tensors`."""
        super().forget()
        self.plain.forget()


class Samples:
    """Parameters of given shapes, each with the gradients of `rows` samples, and their losses. All are the same in every step."""

    tolerance = 1e-5

    def __init__(self, rows, shapes, device="cpu"):
        self.device = torch.device(device)
        draw = torch.Generator(self.device).manual_seed(0)
        self.start = [torch.randn(s, generator=draw, device=self.device) for s in shapes]
        self.grads = [torch.randn(rows, *s, generator=draw, device=self.device) for s in shapes]
        self.losses = 3 * torch.rand(rows, generator=draw, device=self.device)
        numbers = sum(map(math.prod, shapes))
        self.bytes = 4 * rows * numbers
        self.moved = 4 * (rows + 4) * numbers  # one read of the gradients, one read and write of parameter and momentum
        self._part = max(1, 2**22 // rows)  # columns at a time in float64

    @cached_property
    def _exact(self):
        exact = [w.double() for w in self.start]
        for whole, grads in zip(exact, self.grads):
            for w, g in zip(whole.view(-1).split(self._part), grads.flatten(1).split(self._part, 1)):
                log_s, buffer = -math.inf, torch.zeros_like(w)
                for _ in range(STEPS):
                    log_s = reference.weighted_momentum_step_(
                        [w], [buffer], [g.double()], self.losses.double(), log_s, LAM, gamma=GAMMA, init="zero", **SGD
                    )
        return exact

    def forget(self):
        """Frees the memory of the right answer."""
        vars(self).pop("_exact", None)

    def error(self, params):
        """The error of the change of the parameters in STEPS steps, which start from s = 0."""
        return _way_off(self.start, params, self._exact)


class Training:
    """A network of absgd_fast.experiments.models on batches of images, by default 64 images of 8 x 8 pixels like the digits.

    The pixels are noise, because the time of a step does not depend on them.
    """

    # The tolerance is 1e-3 by default: after few steps a float32 weight of 0.1 that moves by 1e-4 has no more digits.
    def __init__(self, name, image=(1, 8, 8), batch=64, tolerance=1e-3):
        self.tolerance = tolerance
        draw = torch.Generator().manual_seed(0)
        self.model = partial(make_model, name, image, 10, seed=0)
        sizes = [batch] * 8
        self.batches = [(torch.rand(n, *image, generator=draw), torch.randint(10, (n,), generator=draw)) for n in sizes]

    def error(self, model, lam, init):
        """The error of the change of the parameters in STEPS steps."""
        start = [p.detach().clone() for p in self.model().parameters()]
        exact = self.model().double()
        params, log_s = list(exact.parameters()), -math.inf
        buffers = [None] * len(params)
        for x, y in self.batches[:STEPS]:
            losses = reference.logit_loss(exact(x.double()), y)
            loss, _, log_s, _ = reference.robust_loss(losses, log_s, lam, gamma=GAMMA, init=init)
            buffers = reference.momentum_step_(params, torch.autograd.grad(loss, params), buffers, **SGD)
        return _way_off(start, list(model.parameters()), params)


class Whole:
    """Whole training steps in bfloat16 autocast: a model, its batches, and one of RULES.

    Only the loss is checked, given the logits of the model, because a float64 copy of such a network drifts away from it.
    """

    tolerance = 1e-3

    def __init__(self, make, batch, rule, device="cpu", memory_format=torch.contiguous_format):
        self.device, self.rule = torch.device(device), RULES[rule]
        start = models.made_on(self.device, make, memory_format)
        self.model = lambda: deepcopy(start)
        draw = torch.Generator(self.device).manual_seed(0)
        self.batches = [batch(draw, self.device) for _ in range(2)]
        self.bytes, self.moved = (
            LARGE,
            12 * models.sizes(start),
        )  # LARGE: no graphs. 12 bytes: at least the parameters are read and written

    def forget(self):
        """There is nothing to free."""

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def error(self, loss, seen, lam, init):
        """The error of the last loss, given the logits and labels of every step so far."""
        log_s = -math.inf
        for logits, y in seen:
            losses = torch.cat([reference.logit_loss(x.double(), t) for x, t in zip(logits.split(1024), y.split(1024))])
            exact, _, log_s, _ = reference.robust_loss(losses, log_s, lam, gamma=GAMMA, init=init)
        return float(distance(loss.detach()[None], exact[None]))


def _images(count, size, classes, memory_format, draw, device):
    x = torch.rand(count, 3, size, size, generator=draw, device=device).to(memory_format=memory_format)
    return x, torch.randint(classes, (count,), generator=draw, device=device)


def _text(count, length, vocabulary, draw, device):
    """Tokens and labels; the label of a token is the next token."""
    tokens = torch.randint(vocabulary, (count, length + 1), generator=draw, device=device)
    return tokens[:, :-1], tokens[:, 1:].flatten()


def _torchvision_resnet50():
    from torchvision.models import resnet50

    return resnet50()


@torch.no_grad()
def _way_off(start, given, exact):
    ways = [((g.double() - s).flatten(), (e - s).flatten()) for s, g, e in zip(start, given, exact)]
    return float(torch.stack([distance(*way) for way in ways]).max())


@dataclass(frozen=True, eq=False)
class Case:
    """A case and its figures to reach.

    Args:
        suite, name: the suite, and the name of the case in it.
        data: makes the data of the case.
        targets: {competitor: the largest ratio of our time to its time}. In suite memory: {measure: the largest value}.
        bounds: {measure: (least, most)} of our own values on a GPU (see run.py).
        memory: {competitor: the largest ratio of our peak memory to its own} on a GPU.
        peers: the names of those in the suite that take part. None means all of them.
    """

    suite: str
    name: str
    data: Callable
    targets: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    peers: frozenset | None = None

    def between(self, peers):
        """The same case with only these competitors."""
        return replace(self, peers=frozenset(peers), targets={name: self.targets[name] for name in self.targets if name in peers})


# ---- tensor lists ----------------------------------------------------------------------------------------------------


def _conv(out, channels, size):
    """A convolution and its batch norm."""
    return [(out, channels, size, size), (out,), (out,)]


def resnet32():
    """ResNet-32 for CIFAR (He et al. 2016; classifier without bias): 94 tensors, 0.46 M numbers."""
    shapes, width = _conv(16, 3, 3), 16
    for out in [16] * 5 + [32] * 5 + [64] * 5:
        shapes += _conv(out, width, 3) + _conv(out, out, 3)
        width = out
    return [*shapes, (10, width)]


def resnet50(blocks=(3, 4, 6, 3)):
    """ResNet-50 for ImageNet: 161 tensors, 25.6 M numbers."""
    shapes, width = _conv(64, 3, 7), 64
    for inner, count in zip((64, 128, 256, 512), blocks):
        for block in range(count):
            shapes += _conv(inner, width, 1) + _conv(inner, inner, 3) + _conv(4 * inner, inner, 1)
            shapes += [] if block else _conv(4 * inner, width, 1)
            width = 4 * inner
    return [*shapes, (1000, width), (1000,)]


def resnet152():
    """ResNet-152 for ImageNet: 467 tensors, 60.2 M numbers."""
    return resnet50((3, 8, 36, 3))


# ---- the cases -------------------------------------------------------------------------------------------------------


COPY = "copy of as many bytes"


def _size(rows, classes, dtype):
    return f"{rows} × {classes} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"


def _loss(rows, classes, target=None, dtype=torch.float32):
    targets = {} if target is None else {"cross_entropy": target, "absgd package": 0.4}
    return Case("loss", _size(rows, classes, dtype), partial(Logits, rows, classes, dtype), targets)


def _family(name, rows, classes):
    targets = {"our cross-entropy": 1.1, "eager, absgd package": 0.4}
    return Case("family", f"{name}, {_size(rows, classes, torch.float32)}", partial(Logits, rows, classes, loss=name), targets)


def _target(rows, classes):
    return Case("target", _size(rows, classes, torch.float32), partial(Logits, rows, classes), {"a fixed lambda": 1.15})


def _step(name, shapes, fused, default):
    return Case("step", name, partial(Tensors, shapes), {"SGD fused": fused, "SGD default": default})


def _clip(name, shapes, **more):
    return Case("clip", name, partial(Clipped, shapes), {"clip_grad_norm_, SGD fused": 1.0} | more)


def _rule(rule, name, shapes, target):
    return Case("rules", f"{rule}, {name}", partial(Tensors, shapes, rule=rule), {"torch's fastest": target})


CASES = [
    _loss(128, 10, 0.8),
    _loss(128, 100, 0.8),
    _loss(512, 1000, 0.45),
    _loss(512, 8142, 0.35),
    _loss(2048, 32000, 0.3),
    _loss(512, 8142, dtype=torch.bfloat16),
    _loss(2048, 32000, dtype=torch.bfloat16),
    *(_target(*size) for size in ((128, 10), (512, 1000))),
    *(_family(name, *size) for size in ((512, 1000), (2048, 32000)) for name in LOSSES if name != "cross-entropy"),
    # Tensors of 262 MB: the allocator maps and unmaps each of them, so the resident memory is the memory in use.
    Case("memory", "2048 × 32000 fp32", partial(Logits, 2048, 32000), {"peak": 1.01, "retained": 2.01}),
    Case("memory", "128 × 10 fp32", partial(Logits, 128, 10), {"growth": 1.0}),
    _step("ResNet-32, 94 tensors", resnet32(), 0.3, 0.15),
    _step("ResNet-50, 161 tensors", resnet50(), 1.0, 0.5),
    _step("161 tensors of 4", [(4,)] * 161, 0.2, 0.1),
    _clip("ResNet-32, 94 tensors", resnet32()),
    _clip("ResNet-50, 161 tensors", resnet50(), **{"our step without clipping": 1.5}),
    *(
        _rule(rule, *case)
        for case in (("ResNet-32", resnet32(), 0.3), ("ResNet-50", resnet50(), 1.0), ("161 tensors of 4", [(4,)] * 161, 0.2))
        for rule in RULES
        if rule != "SGD"
    ),
    # 80 % of the bandwidth of a copy: 1.25 times its time
    Case("weighted", "64 × 10⁶", partial(Samples, 64, [(1000, 1000)]), {"torch": 1.0, COPY: 1.25}),
    Case("weighted", "128 × ResNet-32, 94 tensors", partial(Samples, 128, resnet32()), {"torch": 1.0, COPY: 1.25}),
    Case("weighted", "64 × 650, a linear head", partial(Samples, 64, [(10, 64), (10,)]), {"torch": 1.0}),
    Case("train", "mlp 64-128-128-10", partial(Training, "mlp")),
    Case("train", "cnn", partial(Training, "cnn")),
    # 31 layers with kinks: after three steps of plain torch, the change in float32 differs from that in float64 by 0.26
    Case(
        "train",
        "ResNet-32, 128 of 32 × 32",
        partial(Training, "resnet32", (3, 32, 32), 128, tolerance=0.5),
        {"cross_entropy, SGD fused": 1.02},
    ),
]


# ---- the cases of a GPU ----------------------------------------------------------------------------------------------

# The sizes whose time depends on the memory come first, because they matter most if time runs out.
SHAPES = [(8192, 32000), (8192, 128256), (512, 8142), (512, 1000)]
SMALL_SHAPES = [(256, 365), (128, 100), (128, 10)]
FEW_CLASSES, FEW_ROWS = (16384, 10), (2, 8142)
# Sizes near the limits of the one-block kernel: at most 128 classes, and at most 512 lanes of 4 classes each.
ONE_BLOCK = [(128, 10), (256, 4), (16, 100), (5, 128), (32, 16)]
PROBE = {  # the cases of the short run, which may remain the only run
    "8192 × 32000 bf16",
    "16384 × 10 fp32",
    "128 × 10 fp32",
    "2 × 8142 fp32",
    "ResNet-50, 161 tensors",
    "16 × 5 fp32",
    "three tensors",
}
PROBED = {"absgd_fast", "cross_entropy", "absgd package", "SGD fused"}  # those that compile nothing
ANY = math.inf


def _share_of_copy(classes, card):
    """The bandwidth to reach in three passes over the logits, as a fraction of a copy's.

    The end of the forward pass, which makes the weights, takes a smaller part of the time if there are more classes, and a larger
    part if the memory is faster.
    """
    if classes >= 128256:
        return 0.90
    return 0.85 if "H200" in card else 0.88


def _gpu_loss(rows, classes, dtype, device, card, **more):
    """Ours makes three passes (read; read, write) and Liger two, so 1.5 times Liger's time is par. One block makes one pass."""
    large = rows * classes * torch.finfo(dtype).bits / 8 >= LARGE
    at_once = classes <= 128 and rows * ops.lanes_of_a_row(classes) <= ops.ONE_BLOCK  # as Operators.backward_mode decides
    targets = {"absgd package": 0.4 if large else 0.25, "Liger": 1.0 if at_once else 1.5} | more
    if classes < 1000:
        targets["torch.compile"] = 0.7
    bounds = {"forward launches": (1, 1), "backward launches": (0, 1)}
    if large:
        bounds["share of copy"] = (_share_of_copy(classes, card), ANY)
    return Case("gpu loss", _size(rows, classes, dtype), partial(Logits, rows, classes, dtype, device, None), targets, bounds)


def _gpu_deferred(count, rows, classes, dtype, device):
    """Ours makes two passes, like Liger."""
    name = f"{count} of {_size(rows, classes, dtype)}"
    return Case("gpu deferred", name, partial(MicroBatches, count, rows, classes, dtype, device), {"Liger": 1.0})


def _gpu_step(name, shapes, device, fused=None, **bounds):
    targets = {} if fused is None else {"SGD fused": fused}
    return Case("gpu step", name, partial(Tensors, shapes, device), targets, {"step launches": (1, 1)} | bounds)


def _gpu_weighted(name, rows, shapes, device, **bounds):
    data = partial(Samples, rows, shapes, device)
    return Case("gpu weighted", name, data, {"torch": 1.0}, {"step launches": (1, 1)} | bounds)


def _gpu_linear(rows, width, classes, dtype, device):
    peers = ("Liger", "torch, chunked")
    data = partial(Head, rows, width, classes, dtype, device)
    name = f"{rows} × {width} × {_size(0, classes, dtype).removeprefix('0 × ')}"
    return Case("gpu linear", name, data, dict.fromkeys(peers, 1.05), memory=dict.fromkeys(peers, 1.1))


def _gpu_train(name, make, batch, rule, device, memory_format=torch.contiguous_format):
    return Case("gpu train", name, partial(Whole, make, batch, rule, device, memory_format), {"plain": 1.0})


def _gpu_limit(rows, classes, device):
    """The time that one block saves by making the gradient in forward, for sizes that it serves (ops.Operators.backward_mode)."""
    return Case("gpu limit", f"{rows} × {classes}", partial(Logits, rows, classes, device=device))


def _gpu_rule(rule, name, shapes, device):
    return Case("gpu rules", f"{rule}, {name}", partial(Tensors, shapes, device, rule))


def gpu_cases(device="cuda", card="", tiny=False):
    """The cases of a GPU, the most important ones first.

    Args:
        device: where the data is.
        card: the name of the GPU, on which some figures depend.
        tiny: return a few small cases instead, which try the benchmark itself on any device.
    """
    if tiny:
        return _tiny_cases(device)
    bf16, fp32, last = torch.bfloat16, torch.float32, torch.channels_last
    return [
        *(_gpu_loss(*shape, dtype, device, card) for shape in SHAPES for dtype in (bf16, fp32)),
        _gpu_loss(*FEW_CLASSES, fp32, device, card, cross_entropy=1.3),
        _gpu_loss(*FEW_ROWS, fp32, device, card, cross_entropy=1.5),
        _gpu_deferred(4, 8192, 32000, bf16, device),
        _gpu_step("ResNet-32, 94 tensors", resnet32(), device, 0.5),
        _gpu_step("ResNet-50, 161 tensors", resnet50(), device, 0.9, **{"host us": (0, 35)}),
        _gpu_step("ResNet-152, 467 tensors", resnet152(), device),
        _gpu_step("1 B parameters, 300 tensors", [(2048, 1628)] * 300, device, **{"share of copy": (0.9, ANY)}),
        _gpu_weighted("64 × 4 M", 64, [(2048, 2048)], device, **{"share of copy": (0.8, ANY)}),
        _gpu_linear(8192, 4096, 128256, bf16, device),
        _gpu_train("ResNet-50, 128 images", _torchvision_resnet50, partial(_images, 128, 224, 1000, last), "SGD", device, last),
        _gpu_train("decoder of 124 M, 8 × 1024 tokens", models.Decoder, partial(_text, 8, 1024, 50304), "AdamW", device),
        *(_gpu_loss(*shape, dtype, device, card) for shape in SMALL_SHAPES for dtype in (bf16, fp32)),
        *(_gpu_rule(rule, "ResNet-50, 161 tensors", resnet50(), device) for rule in RULES if rule != "SGD"),
        *(_gpu_limit(*shape, device) for shape in ONE_BLOCK),
    ]


def _tiny_cases(device):
    shapes, decoder = [(3, 4), (5,), (70,)], partial(models.Decoder, 64, 8, 16, 2, 1)
    return [
        *(_gpu_loss(*size, dtype, device, "") for size, dtype in (((64, 300), torch.bfloat16), ((16, 5), torch.float32))),
        _gpu_deferred(4, 6, 11, torch.bfloat16, device),
        _gpu_step("three tensors", shapes, device, 0.9, **{"host us": (0, 35), "share of copy": (0.9, ANY)}),
        _gpu_weighted("8 × 87", 8, shapes, device),
        _gpu_linear(40, 8, 300, torch.float32, device),
        _gpu_train("decoder", decoder, partial(_text, 4, 8, 64), "AdamW", device),
        _gpu_rule("AdamW", "three tensors", shapes, device),
        _gpu_limit(8, 8, device),
    ]


def gpu_probe(cases):
    """The few of these cases that a short run measures, with only the competitors that need no compiler."""
    return [case.between(PROBED) for case in cases if case.name in PROBE and case.suite in ("gpu loss", "gpu step")]
