"""Writes absgd_fast/selftest/vectors.json: inputs, and the exact results by tests/oracle.py and, for optimizers, torch.optim.

    python tests/selftest_vectors.py

tests/test_selftest.py compares the file with what this computes.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import oracle
import weights_cases
from conftest import LOSSES
from optim_cases import CASES

from absgd_fast import selftest

FILE = Path(__file__).resolve().parent.parent / "absgd_fast" / "selftest" / "vectors.json"
# The widths of a register of every type lie between these, and the second has rows of both walks (csrc/cpu/along_classes.h).
SHAPES = [(21, 3), (6, 37)]
# One row of each rule and form is enough: the tests of the optimizers try them all. The lr changes from step to step: with
# a constant one the two forms of momentum are the same.
RULES = [
    "sgd-momentum-decay",
    "sgd-nesterov",
    "sgd-heavy-ball",
    "adam-betas",
    "adam-amsgrad-decay",
    "adam-paper-form",
    "adamw-amsgrad",
    "rmsprop-centered",
    "rmsprop-momentum",
    "adagrad-initial",
]
LRS = [0.0625, 0.25, 0.03125]
# Every way through the kernels: many rows, rows for a block each, classes that do not lie side by side (csrc/launch.h). Behind
# each shape stands which rows and columns of the results are stored.
LARGE = {"many rows": ([3000, 5], (37, 1)), "a block a row": ([7, 2051], (1, 41)), "columns": ([4, 6, 50], (1, 3))}
STATES = {
    "wrong labels": dict(lam=-0.5),
    "rare classes": dict(lam=2.0, gamma=0.5),
    "far in the log domain": dict(lam=0.0625),
    "plain mean": dict(lam="inf"),
    "this batch alone": dict(lam=-1.0, normalizer="batch"),
    "no normaliser": dict(lam=4.0, normalizer="none"),
    "capped": dict(lam=0.5, max_weight=2.0),
    "mixed": dict(lam=-0.5, mix=0.25, alpha=0.5),
    "from zero": dict(lam=1.0, init="zero"),
}


def exact_numbers(seed, *shape, spread=2.0):
    """Multiples of 1/16 below 8 in size: they have 7 bits, so every dtype holds them exactly."""
    values = np.random.default_rng(seed).normal(scale=spread, size=shape)
    return np.clip(np.round(values * 16) / 16, -7.9375, 7.9375)


def batch(seed, rows, classes, ignored):
    target = np.random.default_rng(seed + 1).integers(0, classes, rows)
    target[rows // 2] = ignored
    return {"logits": exact_numbers(seed, rows, classes), "target": target}


def plain(values):
    """As JSON has them."""
    if isinstance(values, dict):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return values.tolist() if isinstance(values, (np.ndarray, torch.Tensor, np.generic)) else values


def check(kind, name, expected, **inputs):
    return {"kind": kind, "name": f"{kind}: {name}", **plain(inputs), "expected": plain(expected)}


def module_of(name, classes):
    """The fields of a check that say which loss it is, and the oracle's options. Class weights are exact in every dtype."""
    loss = LOSSES[name]
    given = loss.given(classes)
    if "weight" in given:
        given["weight"] = plain(np.round(np.array(given["weight"]) * 16) / 16)
    return {"module": loss.fused.__name__, "given": given}, loss.options(classes) | {"weight": given.get("weight")}


FACTORS = (1.0, 0.5)  # by which the values of the first and the second batch are multiplied before backward


def robust(batches, options):
    """The results of ABLoss over batches of logits and labels."""
    criterion, expected = oracle.ABLoss(-0.75), {}
    for step, (given, factor) in enumerate(zip(batches, FACTORS), 1):
        losses, gradient = oracle.logit_loss(**given, **options)
        forward = criterion(losses, mask=oracle.valid(**given, **options))
        expected |= {f"value {step}": forward.loss, f"gradient {step}": factor * forward.grad[:, None] * gradient}
        expected |= {f"log s {step}": criterion.log_s}
    return expected


def of_logits():
    for shape in SHAPES:
        for name in LOSSES:
            module, options = module_of(name, shape[1])
            batches = [batch(seed, *shape, options.get("ignore_index", -100)) for seed in (1, 3)]
            losses, gradient = oracle.logit_loss(**batches[0], **options)
            called = f"{name}, {shape[0]} x {shape[1]}"
            yield check("logits", called, {"losses": losses, "gradient": gradient}, **module, **batches[0])
            given = [one | {"factor": factor} for one, factor in zip(batches, FACTORS)]
            yield check("robust logits", called, robust(batches, options), **module, batches=given, options={"lam": -0.75})


def of_large_logits():
    for called, (shape, every) in LARGE.items():
        for name in ("ce", "focal"):
            module, options = module_of(name, shape[1])
            logits = {"kind": "logits", "shape": shape}
            target = {"kind": "labels", "shape": [shape[0], *shape[2:]], "classes": shape[1]}
            flat = {"logits": oracle.rows(selftest.large(**logits).numpy()), "target": selftest.large(**target).numpy().ravel()}
            expected = robust([flat], options)
            losses, gradient = oracle.logit_loss(**flat, **options)
            expected["gradient 1"] = part(oracle.unrows(expected["gradient 1"], shape), every)
            given = [{"logits": logits, "target": target, "factor": 1.0}]
            yield check("robust logits", f"{name}, {called}", expected, **module, batches=given, options={"lam": -0.75})
            losses = losses.reshape(target["shape"])
            expected = {"losses": part(losses, every), "gradient": part(oracle.unrows(gradient, shape), every)}
            yield check("logits", f"{name}, {called}", expected, **module, logits=logits, target=target)


def part(values, every):
    """The rows and columns of a large result that are stored."""
    return {"every": list(every), "values": selftest.part(values, every)}


def of_parts_of_a_batch():
    module, options = module_of("ce-weight", 7)
    batches = [batch(seed, rows, 7, -100) for seed, rows in ((61, 9), (62, 14))]
    whole = {key: np.concatenate([given[key] for given in batches]) for key in ("logits", "target")}
    expected = robust([whole], options)
    gradients = np.split(expected["gradient 1"], [9])
    expected = {"log s": expected["log s 1"], "gradient 1": gradients[0], "gradient 2": gradients[1]}
    yield check("deferred", "two micro-batches", expected, **module, batches=batches, options={"lam": -0.75})


def of_losses():
    for name, options in STATES.items():
        batches = [(np.abs(exact_numbers(10 * step, 19)), np.arange(19) % 7 != step) for step in (1, 2, 3)]
        given = [{"losses": losses, "mask": mask} for losses, mask in batches]
        yield check("losses", name, weighed(options, batches), options=options, batches=given)
    many = {"kind": "losses", "shape": [5000]}
    expected = weighed({"lam": -0.5}, [(selftest.large(**many).numpy(), None)])
    expected = {key: part(value, (61, 1)) if np.ndim(value) else value for key, value in expected.items()}
    yield check("losses", "5000 of them", expected, options={"lam": -0.5}, batches=[{"losses": many, "mask": None}])


def weighed(options, batches):
    criterion, expected = oracle.ABLoss(**options | {"lam": float(options["lam"])}), {}
    for step, (losses, mask) in enumerate(batches, 1):
        forward = criterion(losses, mask=mask)
        expected |= {f"value {step}": forward.loss, f"gradient {step}": forward.grad, f"weights {step}": forward.weights}
        if options["lam"] != "inf":  # the plain mean has no s
            expected |= {f"log s {step}": criterion.log_s}
    return expected


def of_weights():
    """MATH §1.2: the weights as a function, and the derivative of c . W, in which s' depends on the losses too."""
    losses, upstream, log_s, lam = np.abs(exact_numbers(70, 23)), exact_numbers(71, 23), 0.25, -0.5
    w = oracle.robust_weights(losses, log_s, lam, gamma=0.75)
    share = w.share * w.weights / len(losses)  # d log s' / dz
    gradient = (upstream * w.weights - (upstream * w.weights).sum() * share) / lam
    expected = {"weights": w.weights, "log s": w.log_s, "gradient": gradient}
    inputs = dict(losses=losses, upstream=upstream, log_s=log_s, options={"lam": lam, "gamma": 0.75})
    yield check("weights", "gamma 0.75", expected, **inputs)


def of_rules():
    """MATH §4: from losses to weights."""
    losses, groups = np.abs(exact_numbers(80, 41)), np.arange(41) * 7 % 3
    tables = {"cvar": dict(beta=0.3), "chi2": dict(rho=0.5), "term": dict(t=-1.5)}
    for name, options in tables.items():
        exact = getattr(weights_cases, name)(losses, **options)
        yield check("rule", name, {"weights": exact}, rule=name, losses=losses, options=options)
    exact = weights_cases.GroupDRO(3, 0.25)
    expected = {f"weights {step}": exact(losses, groups) for step in (1, 2)}
    yield check("rule", "GroupDRO", expected, rule="GroupDRO", losses=losses, groups=groups, options=dict(n_groups=3, eta=0.25))


def of_a_head():
    hidden, weight, rows = exact_numbers(5, 9, 8, spread=1.0), exact_numbers(6, 11, 8, spread=1.0), np.arange(9)
    target = rows * 5 % 11
    losses, gradient = oracle.logit_loss(hidden @ weight.T, target)
    forward = oracle.ABLoss(-4.0)(losses)
    slope = forward.grad[:, None] * gradient
    expected = {"value": forward.loss, "hidden gradient": slope @ weight, "weight gradient": slope.T @ hidden}
    inputs = dict(hidden=hidden, weight=weight, target=target, lam=-4.0)
    for chunk in (None, 4):
        yield check("linear", f"chunk {chunk}", expected, **inputs, chunk=chunk)


def of_optimizers():
    shapes = [(), (5,), (3, 7), (67,)]
    params = [exact_numbers(i, *shape) for i, shape in enumerate(shapes)]
    gradients = [[exact_numbers(100 * step + i, *shape) for i, shape in enumerate(shapes)] for step in (1, 2, 3)]
    given = {"params": params, "gradients": gradients, "lrs": LRS}
    for name, max_norm in [*((name, None) for name in RULES), ("sgd-momentum-decay", 2.0)]:
        case = CASES[name]
        options = {key: value for key, value in case.options.items() if key != "lr"}
        options |= {} if max_norm is None else {"max_norm": max_norm}
        expected = {f"parameter {i}": p for i, p in enumerate(stepped(case, params, gradients, max_norm), 1)}
        called = name if max_norm is None else f"{name}, clipped"
        yield check("steps", called, expected, optimizer=case.ours.__name__, options=options, **given)


def stepped(case, params, gradients, max_norm):
    """The parameters after torch's optimizer has taken the steps in float64."""
    leaves = [torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in params]
    optimizer = case.other(leaves)
    for lr, step in zip(LRS, gradients):
        optimizer.param_groups[0]["lr"] = lr
        for leaf, gradient in zip(leaves, step):
            leaf.grad = torch.tensor(gradient, dtype=torch.float64)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        optimizer.step()
    return [leaf.detach() for leaf in leaves]


def of_weighted_steps():
    """MATH §3.2: the mean of the weighted per-sample gradients, decayed, and a step of momentum."""
    rows, shapes, lr, momentum, decay = 7, [(5,), (3, 4)], 0.125, 0.5, 0.25
    losses, log_s = np.abs(exact_numbers(20, rows)), 0.25
    params, buffers = ([exact_numbers(seed + i, *shape) for i, shape in enumerate(shapes)] for seed in (21, 31))
    grads = [exact_numbers(41 + i, rows, *shape) for i, shape in enumerate(shapes)]
    weights = oracle.robust_weights(losses, log_s, -0.5, gamma=0.75)
    expected = {"log s": weights.log_s}
    for i, (p, b, g) in enumerate(zip(params, buffers, grads), 1):
        b = momentum * b + np.tensordot(weights.weights, g, 1) / rows + decay * p
        expected |= {f"parameter {i}": p - lr * b, f"momentum {i}": b}
    yield check(
        "weighted step",
        "momentum and decay",
        expected,
        params=params,
        buffers=buffers,
        per_sample_grads=grads,
        losses=losses,
        log_s=log_s,
        options=dict(lam=-0.5, lr=lr, gamma=0.75, momentum=momentum, weight_decay=decay),
    )


def of_products():
    products = exact_numbers(50, 133)
    yield check("rectified", "133 products", {"weights": oracle.rectified(products)}, products=products)


def all_checks():
    makers = (of_logits, of_large_logits, of_parts_of_a_batch, of_losses, of_weights, of_rules, of_a_head, of_optimizers)
    made = [check for make in (*makers, of_weighted_steps, of_products) for check in make()]
    assert not any(math.isnan(x) or math.isinf(x) for check in made for x in numbers(check["expected"]))
    return made


def numbers(values):
    """All numbers of nested lists and dicts."""
    if isinstance(values, (dict, list)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from numbers(value)
    else:
        yield values


def text(checks):
    """One line for each check."""
    return "[\n" + ",\n".join(json.dumps(check, separators=(",", ":")) for check in checks) + "\n]\n"


if __name__ == "__main__":
    FILE.write_text(text(all_checks()))
