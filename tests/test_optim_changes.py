"""What users do to parameters, gradients, options and state between steps: the optimizers go on as torch's do."""

import inspect
import warnings

import pytest
import torch
from optim_cases import (
    CASES,
    LARGE,
    SMALL,
    HeavyBall,
    assert_identical,
    assert_near,
    assert_same,
    each_of_torchs,
    each_optimizer,
    kept,
    make,
    set_grads,
    single,
    snapshot,
    states,
    through_a_file,
)
from torch.optim import lr_scheduler

import absgd_fast as ab

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what users do between steps ------------------------------------------------------------------------------------


def swap_data(params, optimizer):
    for p in params:
        p.data = p.data.clone()


def new_storage(params, optimizer):
    """The tensor stays, its memory does not."""
    for p in params:
        p.data.set_(p.data.clone())


def resize(params, optimizer):
    params[5].data, params[5].grad = params[5].data[:5].clone(), params[5].grad[:5].clone()
    del optimizer.state[params[5]]


def replace_states(params, optimizer):
    for state, name in kept(optimizer):
        state[name] = torch.full_like(state[name], 0.5)


def swap_state_data(params, optimizer):
    for state, name in kept(optimizer):
        state[name].data = state[name] / 2


def drop_one_state(params, optimizer):
    del optimizer.state[params[4]]


def drop_the_state(params, optimizer):
    optimizer.state.clear()


def set_options(params, optimizer):
    group = optimizer.param_groups[0]
    new = dict(lr=0.3, weight_decay=0.2, betas=(0.6, 0.7), eps=1e-2, alpha=0.7, lr_decay=0.3, momentum=0.4)
    group.update({name: value for name, value in new.items() if name in group})


def tensor_lr(params, optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.3, dtype=torch.float64)


def no_weight_decay(params, optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0


def maximize(params, optimizer):
    optimizer.param_groups[0]["maximize"] = not optimizer.param_groups[0]["maximize"]


def freeze(params, optimizer):
    params[5].requires_grad_(False).grad = None


def reorder(params, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def remove_a_parameter(params, optimizer):
    del optimizer.param_groups[0]["params"][3]


def replace_a_parameter(params, optimizer):
    """Another object: its state starts."""
    params[4] = optimizer.param_groups[0]["params"][4] = torch.nn.Parameter(params[4].data.clone())
    params[4].grad = torch.ones_like(params[4])


def load_own_state(params, optimizer):
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


def strided_gradient(params, optimizer):
    params[5].grad = params[5].grad.T


def expanded_gradient(params, optimizer):
    params[5].grad = torch.tensor(0.5, dtype=params[5].dtype).expand_as(params[5])


def strided_state(params, optimizer):
    for state, name in kept(optimizer):
        if state[name].dim() == 2:
            state[name] = state[name].T.contiguous().T


def strided_parameter(params, optimizer):
    params[5].data = torch.stack([params[5].data] * 2, -1)[..., 0]


def channels_last(params, optimizer):
    """Everything of another shape, in an order that is dense."""
    del optimizer.state[params[5]]
    params[5].data = params[5].data.view(2, 4, 4, 8).to(memory_format=torch.channels_last)
    params[5].grad = params[5].grad.view(2, 4, 4, 8).to(memory_format=torch.channels_last)


def channels_last_parameter(params, optimizer):
    """The same, but the gradient stays as it was."""
    channels_last(params, optimizer)
    params[5].grad = params[5].grad.contiguous()


def tie(params, optimizer):
    """Two parameters in the same memory: torch updates them one after the other."""
    other = params[6].data[: params[5].numel()].view_as(params[5])
    params[5].data = other


def share_a_gradient(params, optimizer):
    """One gradient for two parameters."""
    params[5].grad = params[6].grad[: params[5].numel()].view_as(params[5])


CHANGES = [
    swap_data,
    new_storage,
    resize,
    replace_states,
    swap_state_data,
    drop_one_state,
    drop_the_state,
    set_options,
    tensor_lr,
    no_weight_decay,
    maximize,
    freeze,
    reorder,
    remove_a_parameter,
    replace_a_parameter,
    load_own_state,
    strided_gradient,
    expanded_gradient,
    strided_state,
    strided_parameter,
    channels_last,
    channels_last_parameter,
    tie,
    share_a_gradient,
]


@each_optimizer
@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__ for c in CHANGES])
def test_equals_torch_after(one_way, case, change, threads):
    """The plan notices; the same is done to torch's optimizer."""
    two = change in (tie, new_storage)
    threads(1 + two)
    params, expected = (make(LARGE if two else SMALL) for _ in range(2))
    ours, theirs = case.own(params, one_way), case.other(expected)
    for step in range(6):
        set_grads(params, expected, seed=step)
        if step == 3:
            change(params, ours)
            change(expected, theirs)
        ours.step()
        theirs.step()
        assert_near("parameters", params, expected, 1e-12)


class Surprising(float):
    """A number that runs code when it is read."""

    def __new__(cls, number, code):
        self = super().__new__(cls, number)
        self.code = code
        return self

    def __float__(self):
        self.code()
        return super().__float__()

    def __bool__(self):
        self.code()
        return super().__bool__()


@each_optimizer
@pytest.mark.parametrize("happens", ["a step", "states are dropped", "states are replaced"])
def test_an_option_runs_code(case, happens):
    """The plan reads options before it looks at anything else, so what their code does comes first."""
    params, expected = make(), make()
    ours, other = case.own(params), case.own(expected, "reference")
    if ours._plan is None:
        pytest.skip("no host module, or no kernels")
    set_grads(params, expected, seed=0)
    for optimizer in (ours, other):
        optimizer.step()

    def code(optimizer):
        if happens == "a step":
            optimizer.param_groups[0]["maximize"] = maximize
            optimizer.step()
        elif happens == "states are dropped":
            optimizer.state.clear()
        else:
            for state, name in kept(optimizer):
                state[name] = torch.zeros_like(state[name])

    maximize = ours.param_groups[0]["maximize"]
    set_grads(params, expected, seed=1)
    pending = [1]
    ours.param_groups[0]["maximize"] = Surprising(maximize, lambda: pending.pop() and code(ours) if pending else None)
    ours.step()
    code(other)
    other.step()
    assert_near("parameters", params, expected, 1e-12)


LRS = {
    "float32": torch.tensor(0.02),
    "float64": torch.tensor(0.02, dtype=torch.float64),
    "bfloat16": torch.tensor(0.02, dtype=torch.bfloat16),
    "float16": torch.tensor(0.02, dtype=torch.float16),
    "int64": torch.tensor(1),
    "int32": torch.tensor(2, dtype=torch.int32),
    "uint8": torch.tensor(1, dtype=torch.uint8),  # -lr would be 255
}


@each_of_torchs
@pytest.mark.parametrize("lr", LRS.values(), ids=LRS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("given", ["to the constructor", "in a group", "in a checkpoint"])
def test_a_tensor_lr_is_its_number(one_way, case, lr, shape, given):
    """Of any dtype, in every tier, first and later steps alike, also after it was changed in place.

    torch's own classes round lr / (1 - beta_1^t) to the dtype of a half-precision lr, so a number is given to them.
    """
    params, expected = make(), make()
    lr = lr.clone().reshape(shape)
    theirs = case.other(expected, lr=lr.item())
    ours = case.own(params, one_way, **({"lr": lr} if given == "to the constructor" else {}))
    if given == "in a group":
        ours.param_groups[0]["lr"] = lr
    elif given == "in a checkpoint":
        other = case.own(make(), lr=lr)
        ours.load_state_dict(through_a_file(other.state_dict()))
    for step in range(4):
        if step == 2:
            ours.param_groups[0]["lr"].mul_(2)
            theirs.param_groups[0]["lr"] *= 2
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)
    left = ours.param_groups[0]["lr"]
    assert left.dtype == lr.dtype and left.shape == shape  # the kernels read it, and nobody converts what the user gave


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_comes_and_goes(one_way, dampening):
    params, expected = make(), make()
    ours = ab.ABSGD(params, lr=0.1, momentum=0.0, dampening=dampening, backend=one_way)
    theirs = single(torch.optim.SGD, expected, lr=0.1, momentum=0.0, dampening=dampening)
    for step in range(12):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["momentum"] = [0.0, 0.9, 0.5][step // 2 % 3]
        if step == 5:
            for (p, *_), optimizer in ((params, ours), (expected, theirs)):
                del optimizer.state[p]["momentum_buffer"]
        set_grads(params, expected, seed=step, skip=0.2)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


@each_optimizer
@pytest.mark.parametrize("amp", [False, True], ids=["", "amp"])
def test_unfrozen_later(one_way, case, amp):
    """A parameter without a gradient at first simply starts later. (torch 2.13's fused SGD raises TypeError here.)"""
    params, expected = make(), make()
    for ps in (params, expected):
        ps[4].requires_grad_(False)
    ours, theirs = case.own(params, one_way), case.other(expected)
    for step in range(6):
        set_grads(params, expected, seed=step)
        if step < 3:
            params[4].grad = expected[4].grad = None
        elif step == 3:
            for ps in (params, expected):
                ps[4].requires_grad_(True)
        if amp:
            ours.grad_scale, ours.found_inf = torch.tensor(1.0), torch.tensor(0.0)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


@each_optimizer
@pytest.mark.parametrize("set_to_none", [True, False])
def test_training_loop(one_way, case, set_to_none):
    """Gradients from backward, clipped; channels_last weights; a scheduler; a group that is added on the way."""

    def train(make_optimizer):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4)
        ).to(torch.float64, memory_format=torch.channels_last)
        optimizer = make_optimizer(model[:3].parameters())
        schedule = lr_scheduler.StepLR(optimizer, 3, 0.5)
        for step in range(10):
            if step == 2:
                optimizer.add_param_group({"params": model[3:].parameters(), "lr": 0.01})
            x = torch.randn(5, 3, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad(set_to_none=set_to_none)
            model(x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
        return [p.detach() for p in model.parameters()]

    # the eps of the bias in front of a normalisation, whose gradient is rounding noise
    eps = {"eps": 0.1} if "eps" in inspect.signature(case.ours).parameters else {}
    trained = train(lambda ps: case.own(ps, one_way, **eps))
    assert_near("parameters", trained, train(lambda ps: case.other(ps, **eps)), 1e-11)


@each_optimizer
def test_a_parameter_listed_twice_moves_twice(one_way, case, threads):
    threads(2)
    params, expected = make([(20_000,)]), make([(20_000,)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about the duplicate
        ours, theirs = case.own(params * 2, one_way), case.other(expected * 2)
    # torch gives each mention of a new parameter its own momentum_buffer and keeps the last, which is nobody's intention
    for optimizer, (p,) in ((ours, params), (theirs, expected)):
        if "momentum_buffer" in case.theirs.__doc__ or issubclass(case.torch, torch.optim.SGD):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    for step in range(3):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        assert_near("parameters", params, expected, 1e-12)


@each_optimizer
def test_nothing_to_do(one_way, case):
    """No gradient, or only of empty parameters: no error, no change, and what comes later starts as if this had not been."""
    params, expected = make(), make()
    ours, theirs = case.own(params, one_way), case.other(expected)
    before = snapshot(params, ours)
    ours.step()
    assert_identical(snapshot(params, ours), before)
    params[2].grad, expected[2].grad = torch.ones(0, dtype=torch.float64), torch.ones(0, dtype=torch.float64)
    ours.step()
    theirs.step()
    for step in range(3):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


@each_optimizer
def test_gradient_with_a_pending_sign(one_way, case):
    """The imaginary part of a conjugate is a tensor whose memory holds the opposite sign; autograd passes it on as it is."""
    params, expected = make([()]), make([()])
    ours, theirs = case.own(params, one_way), case.other(expected)
    for _ in range(3):
        params[0].grad = None
        two = torch.tensor(2.0, dtype=torch.float64)
        torch.view_as_real(torch.complex(two, params[0]).conj().resolve_conj()).sum().backward()
        assert params[0].grad.is_neg() and params[0].grad.item() == -1
        expected[0].grad = torch.tensor(-1.0, dtype=torch.float64)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


@each_optimizer
def test_gradient_with_a_pending_conjugate(one_way, case):
    """Complex: the memory holds the conjugate of the gradient."""
    params, expected = make([(4, 3)], torch.complex128), make([(4, 3)], torch.complex128)
    ours, theirs = case.own(params, one_way), case.other(expected)
    for step in range(3):
        set_grads(params, expected, seed=step)
        params[0].grad = params[0].grad.conj().resolve_conj().conj()
        assert params[0].grad.is_conj()
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


class Tagged(torch.Tensor):
    """A tensor subclass that does nothing."""


@each_optimizer
def test_tensor_subclasses(one_way, case):
    """They are stepped in plain torch, beside the others."""
    params, expected = make([(30,), (40,), (5,)]), make([(30,), (40,), (5,)])
    params[1] = torch.nn.Parameter(params[1].detach().as_subclass(Tagged))
    assert type(params[1].data) is Tagged
    ours, theirs = case.own(params, one_way), case.other(expected)
    for step in range(4):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


SPARSE = (
    "sgd-plain",
    "sgd-momentum",
    "sgd-dampening",
    "sgd-nesterov",
    "sgd-maximize",
    "adagrad-default",
    "adagrad-lr-decay",
    "adagrad-initial",
    "adagrad-tensor-lr",
)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients(one_way, name):
    """Beside dense ones; of a row that two samples share there are two entries."""
    case = CASES[name]
    options = {} if name.startswith("adagrad") else {"weight_decay": 0.0}  # a sparse gradient and decay: torch refuses
    params, expected = make([(30,), (40, 3), (5,)]), make([(30,), (40, 3), (5,)])
    ours, theirs = case.own(params, one_way, **options), case.other(expected, **options)
    for step in range(4):
        set_grads(params, expected, seed=step)
        for ps in (params, expected):
            rows = torch.tensor([[step, 7, 7, 39]])
            ps[1].grad = torch.sparse_coo_tensor(rows, ps[1].grad[:4], (40, 3))
        ours.step()
        theirs.step()
        for p, q in zip(params, expected):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)
        assert [set(s) for s in states(ours)] == [set(s) for s in states(theirs)]


def test_embedding_with_sparse_gradients(one_way):
    """heavy_ball, which torch has not: as with the dense gradient."""
    params, expected = make([(40, 3)]), make([(40, 3)])
    ours = ab.ABSGD(params, lr=0.1, heavy_ball=True, backend=one_way)
    theirs = HeavyBall(expected, lr=0.1, momentum=0.9)
    for step in range(3):
        for (p,) in (params, expected):
            p.grad = None
            torch.nn.functional.embedding(torch.tensor([step, 7, 7]), p, sparse=p is params[0]).square().sum().backward()
        assert params[0].grad.is_sparse and not expected[0].grad.is_sparse
        ours.step()
        theirs.step()
        assert_near("parameters", params, expected, 1e-12)


@each_optimizer
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.complex64], ids=["fp32", "bf16", "complex"])
def test_version_counters(one_way, case, kind):
    """A backward through a graph from before the step must not use the new values silently."""
    p, q = torch.nn.Parameter(torch.ones(3, dtype=kind)), torch.nn.Parameter(torch.ones(3))
    optimizer = case.own([p, q], one_way)
    for _ in range(3):  # first step, first table, later tables
        graphs = [(p * p).sum().abs(), (q * q).sum()]
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        for y in graphs:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward()


@each_optimizer
def test_the_step_leaves_no_graph(one_way, case):
    """Neither parameters nor states require gradients of the step, whatever mode the caller is in."""
    for mode in (torch.enable_grad(), torch.no_grad(), torch.autograd.detect_anomaly(check_nan=False)):
        params = make([(3,), (4, 2)], torch.float32)
        optimizer = case.own(params, one_way)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with mode:
                for step in range(2):
                    for p in params:
                        p.grad = (torch.ones_like(p) * p.detach().clone().requires_grad_()) if step else torch.ones_like(p)
                    optimizer.step()
        assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in params)
        assert all(not v.requires_grad for s in states(optimizer) for v in s.values())
