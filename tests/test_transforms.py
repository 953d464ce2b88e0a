"""Fused losses inside torch.func and forward mode, and differentiated twice: against fp64 autograd of eager formulas."""

import warnings
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

import absgd_fast as ab
from absgd_fast.functional import logit_loss

ROWS, CLASSES = 5, 7  # two different sizes: a wrong axis shows; every row of the table has rows that count
TARGET = torch.tensor([2, 3, 4, 5, 6])
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def inputs(seed=0, shape=(ROWS, CLASSES)):
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind()
    x[range(3), TARGET[:3]] += 3  # three labels that are likely, and not pruned
    return x.requires_grad_(), t


def eager_of(case):
    return partial(case.eager, **case.tensors(CLASSES, torch.float64))


@pytest.fixture(params=["module", "functional"])
def fused(request, case, one_backend):
    if request.param == "module":
        return case.module(CLASSES, backend=one_backend)
    return partial(logit_loss, backend=one_backend, **case.tensors(CLASSES, torch.float64))


@pytest.fixture(autouse=True)
def no_slow_path():
    """vmap without a batching rule falls back to a loop with a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        yield


def test_jvp(case, fused):
    x, t = inputs()
    got, wanted = (jvp(lambda x: f(x, TARGET), (x.detach(),), (t,)) for f in (fused, eager_of(case)))
    close(got, wanted)
    assert wanted[1].abs().max() > 1e-3


def test_dual_numbers_with_the_graph(case, fused):
    """Forward mode while the autograd graph is recorded: value, tangent, gradient. (torch cannot differentiate the tangent.)"""
    x, t = inputs()
    results = []
    for f in (fused, eager_of(case)):
        with fwAD.dual_level():
            value, tangent = fwAD.unpack_dual(f(fwAD.make_dual(x, t), TARGET))
            results.append([value.detach(), tangent.detach(), *torch.autograd.grad(value.sum(), x)])
    close(*results)


def test_per_sample_gradients(case, fused):
    """vmap(grad) over rows, and over logits with a leading axis that the loss does not see."""
    x, _ = inputs()
    x = x.detach()
    results = [vmap(grad(lambda x, y: f(x[None], y[None])[0]))(x, TARGET) for f in (fused, eager_of(case))]
    close(*results)
    stacked = torch.stack([x, x * 0.3, -x])
    results = [vmap(grad(lambda x: f(x, TARGET).sum()))(stacked) for f in (fused, eager_of(case))]
    close(*results)


def test_vmap_of_values(case, fused):
    x, _ = inputs()
    stacked = torch.stack([x.detach(), x.detach() * 0.3], 2)  # the mapped axis is the last
    results = [vmap(lambda x: f(x, TARGET), in_dims=2, out_dims=1)(stacked) for f in (fused, eager_of(case))]
    close(*results)


def test_func_grad_and_vjp(case, fused):
    x, _ = inputs()
    results = []
    for f in (fused, eager_of(case)):
        value, pull = vjp(lambda x: f(x, TARGET), x.detach())
        results.append(
            [
                value,
                *pull(torch.linspace(-1, 2, ROWS, dtype=x.dtype)),
                grad(lambda x: f(x, TARGET).sum())(x.detach()),
                jacrev(lambda x: f(x, TARGET))(x.detach()),
            ]
        )
    close(*results)


def test_hessian(case, fused):
    x, _ = inputs()
    got, wanted = (hessian(lambda x: f(x, TARGET).sum())(x.detach()) for f in (fused, eager_of(case)))
    close(got, wanted)
    assert wanted.abs().max() > 1e-3


def test_double_backward(case, fused):
    """create_graph: the derivative of sum(u grad^2) in the logits and in the upstream vector, accumulated twice."""
    x, _ = inputs()
    results = []
    for f in (fused, eager_of(case)):
        u = torch.linspace(-1, 2, ROWS, dtype=x.dtype).requires_grad_()
        (first,) = torch.autograd.grad(f(x, TARGET), x, u, create_graph=True)
        results.append([first.detach(), *torch.autograd.grad(first.square().sum() + first[:, 1].sum(), (x, u))])
    close(*results)


def test_gradgradcheck(case, fused):
    x, _ = inputs()
    assert torch.autograd.gradgradcheck(lambda x: fused(x, TARGET), x)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduced(case, one_backend, reduction):
    x, t = inputs()
    fused = case.module(CLASSES, backend=one_backend, reduction=reduction)
    results = []
    for f in (fused, partial(eager_of(case), reduction=reduction)):
        g = partial(lambda f, x: f(x, TARGET), f)
        results.append([*jvp(g, (x.detach(),), (t,)), hessian(g)(x.detach())])
    close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(case, one_backend, dtype):
    """Tangents of losses are wide, gradients have the dtype of the logits: in transforms too."""
    x, t = (z.detach().to(dtype) for z in inputs())
    fused = case.module(CLASSES, torch.float32, backend=one_backend)
    value, tangent = jvp(lambda x: fused(x, TARGET), (x,), (t,))
    per_sample = vmap(grad(lambda x, y: fused(x[None], y[None])[0]))(x, TARGET)
    assert value.dtype == tangent.dtype == torch.float32 and per_sample.dtype == dtype
    exact = jvp(lambda x: eager_of(case)(x, TARGET), (x.double(),), (t.double(),))
    torch.testing.assert_close((value.double(), tangent.double()), exact, rtol=1e-4, atol=1e-5)
    wanted = grad(lambda x: eager_of(case)(x, TARGET).sum())(x.double())
    torch.testing.assert_close(per_sample.double(), wanted, rtol=max(1e-4, torch.finfo(dtype).eps), atol=1e-5)


def test_images(case, one_backend):
    """(B, C, d1) logits; the batch of vmap is an image."""
    x, t = (z.detach() for z in inputs(1, (3, CLASSES, 4)))
    target = torch.arange(12).reshape(3, 4) % 5 + 2
    fused = case.module(CLASSES, backend=one_backend)
    results = [
        [*jvp(lambda x: f(x, target), (x,), (t,)), vmap(grad(lambda x, y: f(x[None], y[None]).sum()))(x, target)]
        for f in (fused, eager_of(case))
    ]
    close(*results)


def test_soft_targets(one_backend):
    x, t = (z.detach() for z in inputs())
    target = torch.softmax(inputs(3)[0].detach(), 1)
    weight = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)
    options = dict(weight=weight, label_smoothing=0.2, reduction="none")
    results = [
        [
            *jvp(lambda x: f(x, target), (x,), (t,)),
            hessian(lambda x: f(x, target).sum())(x),
            vmap(grad(lambda x, y: f(x[None], y[None])[0]))(x, target),
        ]
        for f in (ab.CrossEntropy(backend=one_backend, **options), torch.nn.CrossEntropyLoss(**options))
    ]
    close(*results)


def test_per_sample_gradients_of_a_model(one_backend):
    """As in torch's tutorial: vmap(grad) of functional_call over the samples equals one backward each."""
    model, x = torch.nn.Linear(4, CLASSES).double(), torch.randn(ROWS, 4, dtype=torch.float64)
    loss = ab.Focal(backend=one_backend)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def one(parameters, x, y):
        return loss(torch.func.functional_call(model, parameters, (x[None],)), y[None]).sum()

    got = vmap(grad(one), in_dims=(None, 0, 0))(parameters, x, TARGET)
    for i in range(ROWS):
        wanted = torch.autograd.grad(loss(model(x[i : i + 1]), TARGET[i : i + 1]).sum(), model.parameters())
        close((got["weight"][i], got["bias"][i]), wanted)


# ---- through ABLoss: W is a constant ------------------------------------------------------------------------------------


def robust_pair(case, backend):
    """ABLoss in the middle of a run, and (1/n) sum (W + mix) L with its W, in eager torch."""
    criterion = ab.ABLoss(case.module(CLASSES, backend=backend), lam=0.8, mix=0.3, backend=backend).double()
    x, _ = inputs()
    criterion(x.detach() * 0.9, TARGET)  # near this batch: weights around 1
    criterion(x.detach(), TARGET, update=False)
    weights = criterion.last.weights.clone()
    n = int(case.valid(x.detach(), TARGET, **case.options(CLASSES)).sum())
    assert n > 1 and weights.std() > 1e-3  # otherwise nothing is weighted
    factor = torch.where(weights > 0, weights + 0.3, 0.0) / n
    return criterion, lambda x, y: (factor * eager_of(case)(x, y)).sum()


@pytest.mark.parametrize("update", [True, False])
def test_second_derivative_through_abloss(case, one_backend, update):
    x, _ = inputs()
    criterion, eager = robust_pair(case, one_backend)
    results = []
    for f in (partial(criterion, update=update), eager):
        (first,) = torch.autograd.grad(f(x, TARGET), x, create_graph=True)
        results.append([first.detach(), *torch.autograd.grad(first.square().sum(), x)])
    close(*results)


def test_transforms_of_abloss(case, one_backend):
    x, t = inputs()
    criterion, eager = robust_pair(case, one_backend)
    before = criterion.log_s.clone()
    results = []
    for f in (partial(criterion, update=False), eager):
        g = partial(lambda f, x: f(x, TARGET), f)
        results.append([*jvp(g, (x.detach(),), (t,)), grad(g)(x.detach()), hessian(g)(x.detach())])
    close(*results)
    assert torch.equal(criterion.log_s, before)


def test_dual_numbers_through_abloss_write_the_state(case, one_backend):
    """A training step under forward mode is a training step: log s moves as without it, and stays a plain tensor."""
    x, t = inputs()
    (criterion, eager), (plain, _) = (robust_pair(case, one_backend) for _ in range(2))
    plain(x, TARGET)
    with fwAD.dual_level():
        value, tangent = fwAD.unpack_dual(criterion(fwAD.make_dual(x, t), TARGET))
        wanted_value, wanted = fwAD.unpack_dual(eager(fwAD.make_dual(x, t), TARGET))
    close((value, tangent, criterion.log_s), (wanted_value, wanted, plain.log_s))
