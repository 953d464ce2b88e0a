"""Options of the robust losses that are refused: by the constructor, and in the same words by the setter."""

import math
from functools import partial

import numpy as np
import pytest
import torch

import absgd_fast as ab

RULES = [partial(ab.weights.cvar, beta=0.5), partial(ab.weights.term, t=0.5)]


@pytest.mark.parametrize("rule", RULES, ids=["cvar", "term"])
@pytest.mark.parametrize(
    "name, value", [("loss_divisor", 3), ("deferred", True), ("process_group", torch.distributed.GroupMember)]
)
def test_options_that_a_rule_does_not_use(rule, name, value):
    with pytest.raises(ValueError, match=f"{name}: got .* together with rule=") as constructor:
        ab.ABLoss(rule=rule, **{name: value})
    criterion = ab.ABLoss(rule=rule)
    before = getattr(criterion, name)
    with pytest.raises(ValueError, match=name) as setter:
        setattr(criterion, name, value)
    assert str(setter.value).replace("3.0", "3") == str(constructor.value)
    assert getattr(criterion, name) == before
    for allowed in {"loss_divisor": (1, 1.0), "deferred": (False,), "process_group": (None, "auto")}[name]:
        setattr(criterion, name, allowed)


FLAGS = {
    "deferred": partial(ab.ABLoss, lam=0.5),
    "warn_of_collapse": partial(ab.ABLoss, lam=0.5),
    "linear": ab.DFT,
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name):
    """Only True and False, NumPy's too: Python would take "no" as True."""
    for wrong in ("no", "", 1, 0.0, None, torch.tensor(True)):
        with pytest.raises(ValueError, match=f"{name}: got .*, expected True or False"):
            FLAGS[name](**{name: wrong})
    for right in (True, False, np.True_, np.False_):
        criterion = FLAGS[name](**{name: right})
        assert (type(criterion) is ab.LinearABLoss if name == "linear" else getattr(criterion, name)) is bool(right)
        if name != "linear":
            with pytest.raises(ValueError, match=f"{name}: got 'no', expected True or False"):
                setattr(criterion, name, "no")
            setattr(criterion, name, not right)
            assert getattr(criterion, name) is not bool(right)


def test_unknown_options():
    """The error names the class that was called, and for ignore_index the loss that has it."""
    with pytest.raises(TypeError, match=r"LinearABLoss: .*'ignore_index', expected CrossEntropy\(ignore_index=...\)"):
        ab.LinearABLoss(lam=1.0, ignore_index=0)
    for make in (ab.LinearABLoss, partial(ab.DFT, linear=True)):
        with pytest.raises(TypeError, match="LinearABLoss: got an unknown option 'lamb'"):
            make(lamb=1.0)
    for make in (ab.ABLoss, ab.DFT):
        with pytest.raises(TypeError, match="ABLoss.*'lamb'"):
            make(lamb=1.0)


def test_log_s_of_the_functions():
    """NaN is refused. A log s that requires grad is a constant, as the one that `robust_weights` returned."""
    x, y, head = torch.randn(4, 3), torch.arange(4) % 3, torch.eye(3)
    calls = {
        "robust_weights": lambda log_s: ab.functional.robust_weights(x[:, 0], log_s, 0.5),
        "linear_robust_loss": lambda log_s: ab.linear_robust_loss(x, head, y, log_s, 0.5),
        "weighted_momentum_step_": lambda log_s: [
            ab.functional.weighted_momentum_step_(
                [torch.zeros(2)], None, [torch.ones(4, 2)], x[:, 0], log_s, lam=0.5, lr=0.1, momentum=0
            )
        ],
    }
    for call in calls.values():
        for wrong in (math.nan, np.float32(math.nan)):
            with pytest.raises(ValueError, match="log_s: got NaN, expected a number, or -inf before the first batch"):
                call(wrong)
        for a, b in zip(call(torch.tensor(0.25, requires_grad=True)), call(0.25), strict=True):
            assert torch.equal(a, b) and not a.requires_grad
