"""ABSGD against torch.optim.SGD in float64, and everything users do to parameters, gradients and state between steps."""

import copy
import gc
import io
import pickle
import sys
import warnings
import weakref

import pytest
import torch

import absgd_fast as ab
from absgd_fast import _backend

# scalar, one element, none, less than a register, not a multiple of one, and enough in all for a second thread (> 16384)
SHAPES = [(), (1,), (0,), (3,), (17, 5, 3), (64, 64), (20_000,)]
OPTIONS = {
    "plain": dict(momentum=0.0),
    "decay": dict(momentum=0.0, weight_decay=0.1),
    "momentum": dict(momentum=0.9),
    "momentum-decay": dict(momentum=0.9, weight_decay=0.05),
    "dampening": dict(momentum=0.8, dampening=0.3, weight_decay=0.01),
    "nesterov": dict(momentum=0.9, nesterov=True, weight_decay=0.01),
    "maximize": dict(momentum=0.5, maximize=True, weight_decay=0.01),
    "tensor-lr": dict(momentum=0.9, lr=torch.tensor(0.02)),
}


@pytest.fixture(params=["plan", "lists"])
def path(request, monkeypatch):
    """Both ways to the kernel: the table a StepPlan keeps, and, where the host module is missing, lists of tensors."""
    if request.param == "lists":
        monkeypatch.setattr(_backend, "host", lambda: None)
    elif _backend.host() is None:
        pytest.skip("built without the host module")
    return request.param


def make(shapes=SHAPES, dtype=torch.float64, seed=0):
    """Parameters of these shapes; equal for equal seeds, whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_grads(*models, seed, skip=0.0):
    """The same gradients for each list of parameters; each is None with probability `skip`."""
    generator = torch.Generator().manual_seed(seed)
    for tensors in zip(*models):
        none = torch.rand((), generator=generator) < skip
        grad = torch.randn(tensors[0].shape, generator=generator)
        for p in tensors:
            p.grad = None if none else grad.to(p.dtype, copy=True)


def torch_sgd(params, **options):
    return torch.optim.SGD(params, **{"lr": 0.02, "foreach": False, "fused": False} | options)


def buffers(optimizer):
    return [
        optimizer.state[p]["momentum_buffer"] if "momentum_buffer" in optimizer.state.get(p, {}) else None
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def assert_same(params, optimizer, expected_params, expected_optimizer, dtype=torch.float64):
    """Parameters and momentum buffers agree. 40 steps of rounding: 1e-5 of a value of about 1 in float32."""
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    for p, q in zip(params, expected_params):
        torch.testing.assert_close(p.double(), q.double(), rtol=tolerance, atol=tolerance)
    for b, c in zip(buffers(optimizer), buffers(expected_optimizer)):
        assert (b is None) == (c is None)
        if b is not None:
            torch.testing.assert_close(b.double(), c.double(), rtol=tolerance, atol=10 * tolerance)


def planned(optimizer):
    """How many parameters the kernel would take in the next step without help from Python."""
    return len(optimizer._plan.refresh(optimizer.param_groups, optimizer.state)[0])


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_torch(backend, path, options, dtype):
    """40 steps, gradients missing now and then; on the way the state moves into torch's class and back again."""
    options = {"lr": 0.02} | options
    params, expected = make(dtype=dtype), make()
    ours, theirs = ab.ABSGD(params, **options, backend=backend), torch_sgd(expected, **options)
    for step in range(40):
        if step == 15:
            guest = torch_sgd(params, lr=99.0)
            guest.load_state_dict(through_a_file(ours.state_dict()))
            for inner in range(5):
                set_grads(params, expected, seed=1000 + inner)
                guest.step()
                theirs.step()
            ours = ab.ABSGD(params, lr=99.0, backend=backend)
            ours.load_state_dict(through_a_file(guest.state_dict()))
        set_grads(params, expected, seed=step, skip=0.2)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs, dtype)
    if backend == "cpu" and path == "plan":
        assert planned(ours) == sum(p.grad is not None for p in params)


def test_heavy_ball_is_equation_2(backend, path):
    """w_{t+1} = w_t - lr_t (G + wd w_t) + beta (w_t - w_{t-1}), with an lr that changes."""
    beta, decay = 0.9, 0.01
    params = make()
    optimizer = ab.ABSGD(params, lr=0.1, momentum=beta, weight_decay=decay, heavy_ball=True, backend=backend)
    now = [p.detach().clone() for p in params]
    before = [p.clone() for p in now]
    for step in range(20):
        lr = optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        set_grads(params, seed=step)
        optimizer.step()
        after = [w - lr * (p.grad + decay * w) + beta * (w - v) for w, v, p in zip(now, before, params)]
        before, now = now, after
        for p, w in zip(params, now):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


def test_same_bits_for_any_number_of_threads(threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        params = make([(10_001,), (7,), (333, 101)], torch.float32)
        optimizer = ab.ABSGD(params, lr=0.1, weight_decay=0.1, nesterov=True)
        for step in range(3):
            set_grads(params, seed=step)
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in params]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_weight_decay_0_leaves_infinite_parameters_alone(backend):
    p = torch.nn.Parameter(torch.full((20,), torch.inf))
    optimizer = ab.ABSGD([p], lr=0.1, momentum=0.0, backend=backend)
    p.grad = torch.ones(20)
    optimizer.step()
    assert p.isinf().all()


def test_groups_with_their_own_options(backend, path):
    params, expected = make(), make()

    def groups(ps):
        return [
            dict(params=ps[:2], lr=0.5, momentum=0.0),
            dict(params=ps[2:5], nesterov=True, weight_decay=0.1),
            dict(params=ps[5:]),
        ]

    ours = ab.ABSGD(groups(params), lr=0.1, momentum=0.7, backend=backend)
    theirs = torch_sgd(groups(expected), lr=0.1, momentum=0.7)
    for step in range(4):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


# ---- what users do between steps ------------------------------------------------------------------------------------


def swap_data(params, optimizer):
    for p in params:
        p.data = p.data.clone()


def replace_buffers(params, optimizer):
    for state in optimizer.state.values():
        state["momentum_buffer"] = torch.full_like(state["momentum_buffer"], 0.5)


def swap_buffer_data(params, optimizer):
    for state in optimizer.state.values():
        state["momentum_buffer"].data = state["momentum_buffer"] * 2


def drop_one_buffer(params, optimizer):
    del optimizer.state[params[4]]["momentum_buffer"]


def drop_the_state(params, optimizer):
    optimizer.state.clear()


def set_options(params, optimizer):
    optimizer.param_groups[0].update(lr=0.3, momentum=0.5, weight_decay=0.2, nesterov=1)


def momentum_off(params, optimizer):
    optimizer.param_groups[0].update(momentum=0.0)


def freeze(params, optimizer):
    params[5].requires_grad_(False).grad = None


def reorder(params, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def remove_a_parameter(params, optimizer):
    del optimizer.param_groups[0]["params"][3]


def load_own_state(params, optimizer):
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


def strided_gradient(params, optimizer):
    params[5].grad = params[5].grad.T


def strided_buffer(params, optimizer):
    state = optimizer.state[params[5]]
    state["momentum_buffer"] = state["momentum_buffer"].T.contiguous().T


def strided_parameter(params, optimizer):
    params[5].data = torch.stack([params[5].data] * 2, -1)[..., 0]


def tie(params, optimizer):
    """Two parameters in the same memory: torch updates them one after the other."""
    other = params[6].data[: params[5].numel()].view_as(params[5])
    params[5].data = other


CHANGES = [
    swap_data, replace_buffers, swap_buffer_data, drop_one_buffer, drop_the_state, set_options, momentum_off, freeze, reorder,
    remove_a_parameter, load_own_state, strided_gradient, strided_buffer, strided_parameter, tie,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__ for c in CHANGES])
def test_equals_torch_after(one_backend, path, change):
    """The plan notices; the same is done to torch's optimizer."""
    params, expected = make(), make()
    ours = ab.ABSGD(params, lr=0.05, momentum=0.9, weight_decay=0.01, backend=one_backend)
    theirs = torch_sgd(expected, lr=0.05, momentum=0.9, weight_decay=0.01)
    for step in range(8):
        set_grads(params, expected, seed=step)
        if step == 4:
            change(params, ours)
            change(expected, theirs)
        ours.step()
        theirs.step()
        for p, q in zip(params, expected):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_unfrozen_later(one_backend, path):
    """torch 2.13's fused SGD raises TypeError here."""
    params, expected = make(), make()
    for ps in (params, expected):
        ps[4].requires_grad_(False)
    ours, theirs = ab.ABSGD(params, lr=0.1, momentum=0.9, backend=one_backend), torch_sgd(expected, lr=0.1, momentum=0.9)
    for step in range(6):
        set_grads(params, expected, seed=step)
        if step < 3:
            params[4].grad = expected[4].grad = None
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_training_loop(one_backend, path, set_to_none):
    """A model whose gradients come from backward, channels_last weights, a scheduler, a group added on the way."""

    def train(make_optimizer):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4)
        ).to(torch.float64, memory_format=torch.channels_last)
        optimizer = make_optimizer(model[:3].parameters())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        for step in range(10):
            if step == 2:
                optimizer.add_param_group({"params": model[3:].parameters(), "lr": 0.01})
            x = torch.randn(5, 3, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad(set_to_none=set_to_none)
            model(x).square().mean().backward()
            optimizer.step()
            schedule.step()
        return [p.detach() for p in model.parameters()]

    options = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    for p, q in zip(train(lambda ps: ab.ABSGD(ps, **options, backend=one_backend)), train(lambda ps: torch_sgd(ps, **options))):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


def test_a_parameter_listed_twice_moves_twice(one_backend, path):
    params, expected = make([(40_000,)]), make([(40_000,)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about the duplicate
        ours = ab.ABSGD(params * 2, lr=0.1, momentum=0.9, backend=one_backend)
        theirs = torch_sgd(expected * 2, lr=0.1, momentum=0.9)
    for step in range(2, 5):
        # from the second step on: in the first, torch gives each mention its own buffer and keeps the last
        if step == 2:
            for optimizer, (p,) in ((ours, params), (theirs, expected)):
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        torch.testing.assert_close(params[0], expected[0], rtol=1e-12, atol=1e-12)


def test_gradient_with_a_pending_sign(one_backend, path):
    """The imaginary part of a conjugate is a tensor whose memory holds the opposite sign; autograd passes it on as it is."""
    p = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = ab.ABSGD([p], lr=0.1, momentum=0.5, backend=one_backend)
    for _ in range(3):
        p.grad = None
        torch.view_as_real(torch.complex(torch.tensor(2.0), p).conj().resolve_conj()).sum().backward()
        assert p.grad.is_neg() and p.grad.item() == -1
        optimizer.step()
    torch.testing.assert_close(p.item(), 1 + 0.1 * (1 + 1.5 + 1.75))


class Tagged(torch.Tensor):
    """A tensor subclass that does nothing."""


@pytest.mark.parametrize("kind", ["bf16", "complex", "sparse", "subclass", "mixed"])
def test_tensors_without_a_kernel(one_backend, path, kind):
    """They are stepped in plain torch, beside the others."""

    def build():
        torch.manual_seed(0)
        odd = {
            "bf16": lambda: torch.randn(40, dtype=torch.bfloat16),
            "complex": lambda: torch.randn(40, dtype=torch.complex64),
            "sparse": lambda: torch.randn(40, 3),
            "subclass": lambda: torch.randn(40).as_subclass(Tagged),
            "mixed": lambda: torch.randn(40, dtype=torch.float16),
        }[kind]()
        return [
            torch.nn.Parameter(torch.randn(30)),
            torch.nn.Parameter(odd),
            torch.nn.Parameter(torch.randn(5, dtype=torch.float64)),
        ]

    params, expected = build(), build()
    ours, theirs = ab.ABSGD(params, lr=0.1, momentum=0.9, backend=one_backend), torch_sgd(expected, lr=0.1, momentum=0.9)
    for step in range(4):
        for ps in (params, expected):
            torch.manual_seed(step)
            for p in ps:
                p.grad = torch.randn_like(p)
            if kind == "sparse":
                ps[1].grad = ps[1].grad * (torch.arange(40) % 4 == step)[:, None]
                ps[1].grad = ps[1].grad.to_sparse(1)
        ours.step()
        theirs.step()
        for p, q in zip(params, expected):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=2e-2 if kind in ("bf16", "mixed") else 1e-5, atol=1e-2)


def test_version_counters(one_backend, path):
    """A backward through a graph from before the step must not use the new values silently."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ab.ABSGD([p], lr=0.1, backend=one_backend)
    for _ in range(3):  # first step, first table, later tables
        y = (p * p).sum()
        p.grad = torch.ones(3)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


# ---- the optimizer as a torch optimizer ------------------------------------------------------------------------------


def test_closure_and_hooks(one_backend):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ab.ABSGD([p], lr=0.1, momentum=0.0, backend=one_backend)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    with torch.no_grad():  # closures are run with gradients all the same
        assert optimizer.step(closure).item() == 3
    assert calls == ["before", "closure", "after"]
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))


def test_a_closure_that_raises_changes_nothing(one_backend):
    params = make()
    optimizer = ab.ABSGD(params, lr=0.1, backend=one_backend)
    set_grads(params, seed=0)
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    for p, q in zip(params, before[0]):
        assert torch.equal(p, q)
    assert optimizer.state_dict() == before[1]


def test_profiler_sees_the_step():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ab.ABSGD([p], lr=0.1)
    p.grad = torch.ones(3)
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#ABSGD.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on(one_backend, path, copied):
    params = make()
    optimizer = ab.ABSGD(params, lr=0.1, weight_decay=0.1, backend=one_backend)
    for step in range(3):
        set_grads(params, seed=step)
        optimizer.step()
    other = copied(optimizer)
    assert other.backend == one_backend
    set_grads(params, other.param_groups[0]["params"], seed=9)
    optimizer.step()
    other.step()
    for p, q in zip(params, other.param_groups[0]["params"]):
        assert p is not q and torch.equal(p, q)


def test_grad_scaler_skips_and_unscales(one_backend, path):
    """torch 2.13's fused SGD leaves the momentum uninitialised when the very first step is skipped."""
    params, expected = make(dtype=torch.float32), make(dtype=torch.float32)
    ours = ab.ABSGD(params, lr=0.1, momentum=0.9, dampening=0.5, backend=one_backend)
    theirs = torch_sgd(expected, lr=0.1, momentum=0.9, dampening=0.5)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2) for _ in range(2)]
    for step in range(8):
        for ps, optimizer, scaler in ((params, ours, scalers[0]), (expected, theirs, scalers[1])):
            set_grads(ps, seed=step)
            scaler.scale(torch.ones(()))
            for p in ps:
                p.grad *= scaler.get_scale()
            if step in (0, 4):
                ps[5].grad[0, 0] = torch.inf
            if step == 6:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert len(ours.state) == (0 if step == 0 else len(params))
        for p, q in zip(params, expected):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


class Graphs:
    """A backend for torch.compile that counts the steps its graphs make with our operator."""

    def __init__(self):
        self.launches = []

    def __call__(self, graph, inputs):
        self.launches.append(sum("sgd_step_" in str(node.target) for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_compiled_step(one_backend, lr):
    torch._dynamo.reset()
    # without the 0-d one: in float64 torch 2.13's compiler loses updates in place of it, in torch.optim.SGD too
    params, expected = make(SHAPES[1:]), make(SHAPES[1:])
    ours = ab.ABSGD(params, lr=lr, momentum=0.9, weight_decay=0.01, backend=one_backend)
    theirs = torch_sgd(expected, lr=lr, momentum=0.9, weight_decay=0.01)
    graphs = Graphs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = torch.compile(ours.step, fullgraph=True, backend=graphs)
        for seed in range(4):
            set_grads(params, expected, seed=seed)
            step()
            theirs.step()
            assert_same(params, ours, expected, theirs)
    if one_backend == "cpu" and not isinstance(lr, torch.Tensor):
        assert graphs.launches[-1] == 1


def test_operator_has_a_right_fake():
    tensors = lambda: [torch.randn(3, 4), torch.randn(5)]  # noqa: E731
    for momentum in (0.0, 0.9):
        args = (
            tensors(),
            tensors(),
            tensors() if momentum else [],
            None,
            None,
            None,
            0.1,
            momentum,
            0.0,
            0.01,
            False,
            False,
            False,
        )
        torch.library.opcheck(torch.ops.absgd_fast.sgd_step_.default, args, test_utils=("test_schema", "test_faketensor"))


def test_operator_refuses_what_does_not_fit():
    step = torch.ops.absgd_fast.sgd_step_
    p, g = torch.ones(3), torch.ones(3)
    for params, grads, momentum_buffers, momentum, message in [
        ([p], [], [], 0.0, "one gradient"),
        ([p], [g], [], 0.9, "one momentum buffer"),
        ([p], [g.double()], [], 0.0, "float32"),
        ([p], [torch.ones(4)], [], 0.0, "another shape"),
        ([p.bfloat16()], [g.bfloat16()], [], 0.0, "float32"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            step(params, grads, momentum_buffers, None, None, None, 0.1, momentum, 0.0, 0.0, False, False, False)
    assert torch.equal(p, torch.ones(3))
    with pytest.raises(RuntimeError, match="table of a StepPlan"):
        torch.ops.absgd_fast.sgd_planned_step(torch.zeros(2, dtype=torch.int64), p)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(lr=-1.0), ValueError, "Invalid learning rate: -1.0"),
        (dict(lr=float("nan")), ValueError, "Invalid learning rate: nan"),
        (dict(lr=torch.ones(2)), ValueError, "Tensor lr must be 1-element"),
        (dict(momentum=-0.1), ValueError, "Invalid momentum value: -0.1"),
        (dict(weight_decay=-0.1), ValueError, "Invalid weight_decay value: -0.1"),
        (dict(nesterov=True, momentum=0.0), ValueError, "Nesterov momentum requires a momentum and zero dampening"),
        (dict(nesterov=True, dampening=0.1), ValueError, "Nesterov momentum requires a momentum and zero dampening"),
        (dict(heavy_ball=True, nesterov=True), ValueError, "heavy_ball is Eq. 2"),
        (dict(heavy_ball=True, dampening=0.1), ValueError, "heavy_ball is Eq. 2"),
        (dict(robust=ab.ABLoss(lam=1.0)), NotImplementedError, "robust"),
        (dict(backend="gpu"), ValueError, "backend: got 'gpu', expected one of None"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ab.ABSGD(make(), **options)


def test_a_backend_that_cannot_run():
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: "):
        ab.ABSGD(make(), backend="cuda")


def test_no_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        ab.ABSGD([])


def test_state_of_another_model_is_refused(one_backend):
    params = make()
    optimizer = ab.ABSGD(params, lr=0.1, backend=one_backend)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(ab.ABSGD(params[:2], lr=0.3).state_dict())
    assert optimizer.state_dict() == before


# ---- memory ----------------------------------------------------------------------------------------------------------


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_growth(one_backend, path):
    """20,000 steps; one leaked Python object a step would show as 20,000 blocks, 100 bytes a step as 2 MB."""
    params = make([(4,), (8, 8)], torch.float32)
    optimizer = ab.ABSGD(params, lr=1e-3, weight_decay=1e-4, backend=one_backend)

    def steps(n):
        for _ in range(n):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        return sys.getallocatedblocks(), resident_bytes()

    blocks, resident = steps(1000)
    more_blocks, more_resident = steps(20_000)
    assert more_blocks - blocks < 200
    assert more_resident - resident < 1_000_000


def test_gradients_and_replaced_buffers_are_let_go():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ab.ABSGD([p], lr=0.1)
    buffer = None
    for _ in range(3):
        p.grad = torch.ones(3)
        grad = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert grad() is None and (buffer is None or buffer() is None)
        buffer = weakref.ref(optimizer.state[p]["momentum_buffer"])
        optimizer.state[p]["momentum_buffer"] = torch.zeros(3)
    optimizer.step()
    buffer = weakref.ref(optimizer.state[p]["momentum_buffer"])
    del optimizer
    gc.collect()
    assert buffer() is None


def test_a_step_inside_backward_does_not_keep_the_model_alive(path):
    """The hook's closure makes a cycle: parameter, hook, optimizer, plan. The garbage collector can undo it."""
    model = torch.nn.Linear(3, 2)
    alive = weakref.ref(model)
    for p in model.parameters():
        optimizer = ab.ABSGD([p], lr=0.1)

        def hook(param, optimizer=optimizer):
            optimizer.step()
            param.grad = None

        p.register_post_accumulate_grad_hook(hook)
    before = model.weight.detach().clone()
    for _ in range(3):
        model(torch.ones(4, 3)).sum().backward()
    assert not torch.equal(before, model.weight) and model.weight.grad is None
    del model, p, hook, optimizer
    gc.collect()
    assert alive() is None
