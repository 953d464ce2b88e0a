"""The data of the cases, and their right answers.

The data knows the right answer, computed by absgd_fast.reference in float64. Its `error` says how far a competitor's result is
from it. A competitor whose error exceeds `tolerance` is not timed.
"""

import math
from copy import copy, deepcopy
from functools import cached_property, partial

import torch

import absgd_fast as ab
from absgd_fast import reference
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
        return _off_after(loss, seen, lam, init)


class LanguageModel:
    """A causal language model on batches of tokens. A token's label is the next one. Only the loss is checked, as in Whole."""

    tolerance = 1e-4

    def __init__(self, vocabulary, length, width, layers, heads, count):
        start = models.made_on("cpu", partial(models.Decoder, vocabulary, length, width, heads, layers))
        self.model = lambda: deepcopy(start)
        draw = torch.Generator().manual_seed(0)
        self.batches = [text(count, length, vocabulary, draw, "cpu") for _ in range(2)]

    def error(self, loss, seen, lam, init):
        """The error of the last loss, given what the head got in every step so far: features, weight, labels."""
        return _off_after(loss, ((features.double() @ weight.double().t(), y) for features, weight, y in seen), lam, init)


def _off_after(loss, seen, lam, init):
    """The error of the last loss. seen: logits and labels of every step so far."""
    log_s = -math.inf
    for logits, y in seen:
        losses = torch.cat([reference.logit_loss(x.double(), t) for x, t in zip(logits.split(1024), y.split(1024))])
        exact, _, log_s, _ = reference.robust_loss(losses, log_s, lam, gamma=GAMMA, init=init)
    return float(distance(loss.detach()[None], exact[None]))


def images(count, size, classes, memory_format, draw, device):
    x = torch.rand(count, 3, size, size, generator=draw, device=device).to(memory_format=memory_format)
    return x, torch.randint(classes, (count,), generator=draw, device=device)


def text(count, length, vocabulary, draw, device):
    """Tokens and labels; the label of a token is the next token."""
    tokens = torch.randint(vocabulary, (count, length + 1), generator=draw, device=device)
    return tokens[:, :-1], tokens[:, 1:].flatten()


def torchvision_resnet50():
    from torchvision.models import resnet50

    return resnet50()


@torch.no_grad()
def _way_off(start, given, exact):
    ways = [((g.double() - s).flatten(), (e - s).flatten()) for s, g, e in zip(start, given, exact)]
    return float(torch.stack([distance(*way) for way in ways]).max())
