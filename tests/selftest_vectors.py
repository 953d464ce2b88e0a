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
from conftest import LOSSES
from optim_cases import CASES

FILE = Path(__file__).resolve().parent.parent / "absgd_fast" / "selftest" / "vectors.json"
# The widths of a register of every type lie between these, and the second has rows of both walks (csrc/cpu/along_classes.h).
SHAPES = [(21, 3), (6, 37)]
# one rule of each family of options is enough: the tests of the optimizers try them all
RULES = [
    "sgd-momentum-decay",
    "sgd-nesterov",
    "sgd-heavy-ball",
    "adam-default",
    "adam-amsgrad",
    "adam-paper-form",
    "adamw-decay",
    "rmsprop-centered",
    "rmsprop-momentum",
    "adagrad-lr-decay",
]
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
    return values.tolist() if isinstance(values, (np.ndarray, torch.Tensor, np.generic)) else values


def check(kind, name, expected, **inputs):
    tidy = {key: plain(value) for key, value in inputs.items()}
    return {"kind": kind, "name": f"{kind}: {name}", **tidy, "expected": {key: plain(value) for key, value in expected.items()}}


def of_logits():
    for shape in SHAPES:
        for name, loss in LOSSES.items():
            given = loss.given(shape[1])
            if "weight" in given:
                given["weight"] = plain(np.round(np.array(given["weight"]) * 16) / 16)
            options = loss.options(shape[1]) | {"weight": given.get("weight")}
            batches = [batch(seed, *shape, options.get("ignore_index", -100)) for seed in (1, 3)]
            module = {"module": loss.fused.__name__, "given": given}
            losses, gradient = oracle.logit_loss(**batches[0], **options)
            called = f"{name}, {shape[0]} x {shape[1]}"
            yield check("logits", called, {"losses": losses, "gradient": gradient}, **module, **batches[0])
            criterion, expected = oracle.ABLoss(-0.75), {}
            for step, given in enumerate(batches, 1):
                losses, gradient = oracle.logit_loss(**given, **options)
                forward = criterion(losses, mask=oracle.valid(**given, **options))
                expected |= {f"value {step}": forward.loss, f"gradient {step}": forward.grad[:, None] * gradient}
                expected |= {f"log s {step}": criterion.log_s}
            tidy = [{key: plain(value) for key, value in given.items()} for given in batches]
            yield check("robust logits", called, expected, **module, batches=tidy, options={"lam": -0.75})


def of_losses():
    for name, options in STATES.items():
        criterion, expected, batches = oracle.ABLoss(**options | {"lam": float(options["lam"])}), {}, []
        for step in (1, 2, 3):
            losses = np.abs(exact_numbers(10 * step, 19))
            mask = np.arange(19) % 7 != step
            forward = criterion(losses, mask=mask)
            batches.append({"losses": plain(losses), "mask": plain(mask)})
            expected |= {f"value {step}": forward.loss, f"gradient {step}": forward.grad, f"weights {step}": forward.weights}
            if options["lam"] != "inf":  # the plain mean has no s
                expected |= {f"log s {step}": criterion.log_s}
        yield check("losses", name, expected, options=options, batches=batches)


def of_a_head():
    hidden, weight, rows = exact_numbers(5, 9, 8, spread=1.0), exact_numbers(6, 11, 8, spread=1.0), np.arange(9)
    target = rows * 5 % 11
    losses, gradient = oracle.logit_loss(hidden @ weight.T, target)
    forward = oracle.ABLoss(-0.5)(losses)
    slope = forward.grad[:, None] * gradient
    expected = {"value": forward.loss, "gradient of hidden": slope @ weight, "gradient of weight": slope.T @ hidden}
    inputs = dict(hidden=hidden, weight=weight, target=target, lam=-0.5)
    for chunk in (None, 4):
        yield check("linear", f"chunk {chunk}", expected, **inputs, chunk=chunk)


def of_optimizers():
    shapes = [(), (5,), (3, 7), (67,)]
    for name in RULES:
        case = CASES[name]
        params = [exact_numbers(i, *shape) for i, shape in enumerate(shapes)]
        gradients = [[exact_numbers(100 * step + i, *shape) for i, shape in enumerate(shapes)] for step in (1, 2, 3)]
        expected = {f"parameter {i}": p for i, p in enumerate(stepped(case, params, gradients), 1)}
        given = {"params": [plain(p) for p in params], "gradients": [[plain(g) for g in step] for step in gradients]}
        yield check("steps", name, expected, optimizer=case.ours.__name__, options=case.options, **given)


def stepped(case, params, gradients):
    """The parameters after torch's optimizer has taken the steps in float64."""
    leaves = [torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in params]
    optimizer = case.other(leaves)
    for step in gradients:
        for leaf, gradient in zip(leaves, step):
            leaf.grad = torch.tensor(gradient, dtype=torch.float64)
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
        params=[plain(p) for p in params],
        buffers=[plain(b) for b in buffers],
        per_sample_grads=[plain(g) for g in grads],
        losses=losses,
        log_s=log_s,
        options=dict(lam=-0.5, lr=lr, gamma=0.75, momentum=momentum, weight_decay=decay),
    )


def of_products():
    products = exact_numbers(50, 133)
    yield check("rectified", "133 products", {"weights": oracle.rectified(products)}, products=products)


def all_checks():
    made = [*of_logits(), *of_losses(), *of_a_head(), *of_optimizers(), *of_weighted_steps(), *of_products()]
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
