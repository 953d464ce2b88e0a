"""The operators and the planned step behind the optimizers: fakes, and what they refuse."""

import copy

import pytest
import torch
from optim_cases import HALF, assert_identical

import absgd_fast as ab
from absgd_fast import _backend, ops

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the operators --------------------------------------------------------------------------------------------------

# rule: how many states, with how many flags set, it takes; whether it counts
RULES = {
    "sgd": [(0, dict(first=0.0), False), (1, dict(first=0.9), False)],
    "adam": [(2, dict(first=0.9, second=0.99, eps=1e-8), True), (3, dict(first=0.9, second=0.99, eps=1e-8, flags=8), True)],
    "rmsprop": [(1, dict(first=0.9, eps=1e-8), True), (3, dict(first=0.9, second=0.5, eps=1e-8, flags=64), True)],
    "adagrad": [(1, dict(eps=1e-8), True)],
}
RULE_ROWS = [(rule, *row) for rule, rows in RULES.items() for row in rows]


def arguments(rule, kinds, numbers, counts, dtype=torch.float32):
    def tensors(dtype=dtype):
        return [torch.rand(3, 4, dtype=dtype), torch.rand(5, dtype=dtype)]

    kept = [t for _ in range(kinds) for t in tensors(torch.float32 if dtype in HALF else dtype)]
    given = {"first": 0.0, "second": 0.0, "eps": 0.0} | {k: v for k, v in numbers.items() if k != "flags"}
    steps = [torch.zeros(()), torch.ones(())] if counts else []
    return [
        tensors(),
        tensors(),
        kept,
        steps,
        None,
        None,
        None,
        None,
        0.1,
        0.01,
        *given.values(),
        ops.RULES.index(rule),
        numbers.get("flags", 0),
    ]


@pytest.mark.parametrize("rule, kinds, numbers, counts", RULE_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_operator_has_a_right_fake(rule, kinds, numbers, counts, dtype):
    torch.library.opcheck(
        torch.ops.absgd_fast.step_.default,
        tuple(arguments(rule, kinds, numbers, counts, dtype)),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.skipif(not _backend.available("cpu"), reason="the native library is not built here")
def test_parameters_on_another_device():
    """Parameters that come to a device after the optimizer was made find the kernels there."""
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = ab.ABSGD([p], lr=0.5)
    optimizer.param_groups[0]["params"][0] = p = torch.nn.Parameter(torch.ones(3))
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    assert optimizer._operators[p.device].backend == "cpu" and optimizer._plan is not None
    assert optimizer._plan.refresh(optimizer.param_groups, optimizer.state)[3] == []
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.5 - 0.5 * 1.9))


@pytest.mark.skipif(not _backend.available("cpu"), reason="the native library is not built here")
@pytest.mark.parametrize("rule, kinds, numbers, counts", RULE_ROWS)
def test_operator_refuses_what_does_not_fit(rule, kinds, numbers, counts):
    def refused(message, **wrong):
        given = arguments(rule, kinds, numbers, counts)
        for place, value in wrong.items():
            given[int(place[1:])] = value(given[int(place[1:])])
        before = copy.deepcopy(given)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.absgd_fast.step_(*given)
        assert_identical(given, before)

    refused("one gradient", _1=lambda grads: grads[:1])
    refused("states that the rule keeps", _2=lambda kept: [*kept, torch.ones(5)])
    refused("steps", _3=lambda steps: [*steps, torch.zeros(())])
    refused("one dtype", _1=lambda grads: [g.double() for g in grads])
    refused("another shape", _1=lambda grads: [grads[0], torch.ones(6)])
    refused("unknown rule", _13=lambda rule: 4)
    if kinds:
        refused("another shape", _2=lambda kept: [*kept[:-1], torch.ones(6)])
        refused("states of", _2=lambda kept: [*kept[:-1], torch.ones(5, dtype=torch.bfloat16)])
        refused("states that the rule keeps", _2=lambda kept: kept[:-1])
    if counts:
        refused("steps", _3=lambda steps: steps[:1])
        refused("step", _3=lambda steps: [steps[0], torch.zeros(2)])


@pytest.mark.skipif(not _backend.available("cpu"), reason="the native library is not built here")
def test_planned_step_refuses_what_is_no_table():
    with pytest.raises(RuntimeError, match="table of a StepPlan"):
        torch.ops.absgd_fast.planned_step(torch.zeros(2, dtype=torch.int64), torch.ones(3))
