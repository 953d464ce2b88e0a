"""Bad input to the optimizers: the errors are torch's, and a step that fails changes nothing."""

import math
import operator
import re

import pytest
import torch
from optim_cases import CASES, OPTIMIZERS, assert_identical, assert_same, each_optimizer, make, set_grads, snapshot, states

import absgd_fast as ab

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- bad input ------------------------------------------------------------------------------------------------------

ONLY = {"sgd": "sgd", "adam": "adam adamw", "rmsprop": "rmsprop", "adagrad": "adagrad", "all": "sgd adam adamw rmsprop adagrad"}
# options that torch's class refuses, and for which of them
MISTAKES = [
    ("all", dict(lr=-1.0), "-1.0"),
    ("all", dict(lr=torch.tensor(-0.5)), "-0.5"),
    ("all", dict(lr=torch.ones(2)), "1-element"),
    ("all", dict(weight_decay=-0.125), "-0.125"),
    ("adam rmsprop adagrad adamw", dict(lr=math.nan), "nan"),
    ("adam rmsprop adagrad adamw", dict(eps=-1e-3), "-0.001"),
    ("adam rmsprop adagrad adamw", dict(eps=math.nan), "nan"),
    ("adam rmsprop adagrad adamw", dict(weight_decay=math.nan), "nan"),
    ("adam adamw", dict(betas=(1.0, 0.5)), "1.0"),
    ("adam adamw", dict(betas=(0.5, -0.25)), "-0.25"),
    ("adam adamw", dict(betas=(0.5, math.nan)), "nan"),
    ("adam adamw", dict(betas=(0.5, torch.tensor(0.5))), "betas"),
    ("adam adamw", dict(betas=(torch.rand(2), torch.rand(2))), ""),
    ("sgd rmsprop", dict(momentum=-0.1), "-0.1"),
    ("sgd", dict(nesterov=True, momentum=0.0), "Nesterov"),
    ("sgd", dict(nesterov=True, dampening=0.1, momentum=0.9), "Nesterov"),
    ("rmsprop", dict(alpha=-0.1), "-0.1"),
    ("adagrad", dict(lr_decay=-0.1), "-0.1"),
    ("adagrad", dict(initial_accumulator_value=-0.1), "-0.1"),
    ("all", dict(lr="0.1"), ""),
    ("all", dict(learning_rate=0.1), "learning_rate"),
]
# what is no list of parameters
NO_PARAMETERS = {
    "none": list,
    "no group": lambda: [{"lr": 0.1}],
    "a tensor": lambda: torch.nn.Parameter(torch.ones(3)),
    "a set": lambda: [{"params": {torch.nn.Parameter(torch.ones(3))}}],
    "a number": lambda: [1.0],
    "not a leaf": lambda: [torch.nn.Parameter(torch.ones(3)) * 2],
    "in two groups": lambda: [{"params": (p := [torch.nn.Parameter(torch.ones(3))])}, {"params": p}],
    "names for some": lambda: [("weight", torch.nn.Parameter(torch.ones(3))), torch.nn.Parameter(torch.ones(3))],
}


def assert_same_error(ours, theirs, replaced=()):
    """Both raise the same type with the same words."""
    with pytest.raises(Exception) as expected:  # noqa: PT011 - ours is compared with it
        theirs()
    message = str(expected.value)
    for theirs_name, ours_name in replaced:
        message = message.replace(theirs_name, ours_name)
    with pytest.raises(expected.type, match=f"^{re.escape(message)}$"):
        ours()
    return message


@pytest.mark.parametrize(
    "name, options, named",
    [(name, options, named) for names, options, named in MISTAKES for name in ONLY.get(names, names).split()],
    ids=lambda value: None if isinstance(value, (str, dict)) else value,
)
def test_mistakes_that_torch_knows(name, options, named):
    ours, theirs, _ = OPTIMIZERS[name]
    replaced = [(f"{theirs.__name__}.", f"{ours.__name__}.")]
    message = assert_same_error(lambda: ours(make(), **options), lambda: theirs(make(), **options), replaced)
    assert named in message


@pytest.mark.parametrize("params", NO_PARAMETERS.values(), ids=NO_PARAMETERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_no_list_of_parameters(name, params):
    ours, theirs, _ = OPTIMIZERS[name]
    assert_same_error(lambda: ours(params()), lambda: theirs(params()))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(robust=ab.ABLoss(lam=1.0)), TypeError, "robust: got an ABLoss that is not deferred, expected ABLoss"),
        (dict(backend="gpu"), ValueError, "backend: got 'gpu', expected one of None"),
        (dict(backend="cuda"), RuntimeError, "backend 'cuda' cannot run: "),
    ],
    ids=["robust", "unknown-backend", "backend-that-cannot-run"],
)
def test_bad_options_of_every_class(name, options, error, message):
    with pytest.raises(error, match=message):
        OPTIMIZERS[name][0](make(), **options)


@pytest.mark.parametrize(
    "ours, options, message",
    [
        (ab.ABSGD, dict(lr=math.nan), "Invalid learning rate: nan"),
        (ab.ABSGD, dict(momentum=math.nan), "Invalid momentum value: nan"),
        (ab.ABSGD, dict(weight_decay=math.nan), "Invalid weight_decay value: nan"),
        (ab.ABSGD, dict(heavy_ball=True, nesterov=True), "heavy_ball.*nesterov.*True"),
        (ab.ABSGD, dict(heavy_ball=True, dampening=0.125), "heavy_ball.*dampening.*0.125"),
        (ab.ABAdam, dict(paper_form=True, amsgrad=True), "paper_form.*amsgrad"),
        (ab.ABAdamW, dict(paper_form=True, amsgrad=True), "paper_form.*amsgrad"),
    ],
)
def test_bad_options_that_torch_does_not_know(ours, options, message):
    with pytest.raises(ValueError, match=message):
        ours(make(), **options)


@each_optimizer
@pytest.mark.parametrize("bad", ["twice", "not a leaf", "a number", "a set"])
def test_a_bad_group_is_not_added(one_way, case, bad):
    """torch's error, and the optimizer goes on as if nothing had been."""
    params, expected = make(), make()
    ours, theirs = case.own(params, one_way), case.other(expected)

    def group(ps):
        return {"twice": ps[:1], "not a leaf": [ps[0] * 2], "a number": [1.0], "a set": {*ps}}[bad]

    assert_same_error(
        lambda: ours.add_param_group({"params": group(params)}), lambda: theirs.add_param_group({"params": group(expected)})
    )
    assert len(ours.param_groups) == 1
    for step in range(3):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


def sparse_gradient(params, optimizer):
    params[5].grad = params[5].grad.to_sparse()


def gradient_of_another_size(params, optimizer):
    params[5].data = torch.cat([params[5].data] * 2)


def number_that_is_a_string(params, optimizer):
    optimizer.param_groups[1]["weight_decay"] = "0.1"


def option_that_is_missing(params, optimizer):
    del optimizer.param_groups[1]["weight_decay"]


def parameter_in_one_place(params, optimizer):
    """All elements share memory: no tensor may be written in place there."""
    params[5].data = params[5].data[:1, :1].clone().expand(8, 8)


def closure_that_raises(params, optimizer):
    pass


FAILURES = [
    sparse_gradient,
    gradient_of_another_size,
    number_that_is_a_string,
    option_that_is_missing,
    parameter_in_one_place,
    closure_that_raises,
]


@each_optimizer
@pytest.mark.parametrize("fail", FAILURES, ids=operator.attrgetter("__name__"))
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_step_that_fails_changes_nothing(one_way, case, fail, first):
    """The mistake is in the second group. The error is torch's, and, once it is mended, steps go on as if that had not been."""
    if fail is sparse_gradient and issubclass(case.torch, torch.optim.SGD) and case.form:
        pytest.skip("heavy_ball takes sparse gradients")

    def build(make_optimizer):
        params = make()
        return params, make_optimizer([{"params": params[:3]}, {"params": params[3:]}])

    (params, ours), (untouched, other) = build(lambda groups: case.own(groups, one_way)), build(lambda groups: case.own(groups))
    other = case.own([{"params": untouched[:3]}, {"params": untouched[3:]}], one_way)
    for step in range(0 if first else 2):
        set_grads(params, untouched, seed=step)
        ours.step()
        other.step()
    if not case.form:
        theirs_params, theirs = build(case.other)
        set_grads(theirs_params, seed=7)
        theirs.step()
        set_grads(theirs_params, seed=8)
        fail(theirs_params, theirs)
        with pytest.raises(Exception) as error:  # noqa: PT011 - ours is compared with it
            theirs.step(*[lambda: 1 / 0] * (fail is closure_that_raises))
        error = error.type
    else:
        error = Exception
    set_grads(params, seed=8)
    data, options = params[5].data, dict(ours.param_groups[1])
    fail(params, ours)
    before = snapshot(params, ours)
    with pytest.raises(error):
        ours.step(*[lambda: 1 / 0] * (fail is closure_that_raises))
    after = snapshot(params, ours)
    assert_identical(after[:2], before[:2])
    if not first:
        assert_identical(after[2], before[2])
    params[5].data = data
    ours.param_groups[1].update(options)
    for step in range(3):
        set_grads(params, untouched, seed=10 + step)
        ours.step()
        other.step()
        assert_identical([p.data for p in params], [p.data for p in untouched])
        assert_identical(states(ours), states(other))


@pytest.mark.parametrize(
    "name, message",
    [
        ("adam-default", "Adam does not support sparse gradients, please consider SparseAdam instead"),
        ("adamw-default", "Adam does not support sparse gradients, please consider SparseAdam instead"),
        ("adam-paper-form", "Adam does not support sparse gradients, please consider SparseAdam instead"),
        ("rmsprop-default", "RMSprop does not support sparse gradients"),
        ("adagrad-decay", "weight_decay option is not compatible with sparse gradients"),
    ],
)
def test_sparse_gradients_that_are_refused(one_way, name, message):
    params = make()
    optimizer = CASES[name].own(params, one_way)
    set_grads(params, seed=0)
    params[4].grad = params[4].grad.to_sparse()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
