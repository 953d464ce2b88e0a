"""The optimizers as torch optimizers: closures, hooks, groups, schedulers, and torch.compile."""

import inspect
import warnings

import pytest
import torch
from optim_cases import (
    EACH,
    SHAPES,
    assert_identical,
    assert_near,
    assert_same,
    each_optimizer,
    make,
    set_grads,
    states,
)
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from absgd_fast import _backend

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the optimizer as a torch optimizer ------------------------------------------------------------------------------


@each_optimizer
def test_closure_and_hooks(one_way, case):
    params, expected = make([(3,)]), make([(3,)])
    optimizer, other = case.own(params, one_way), case.other(expected)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: calls.append("global before") if o is optimizer else None),
        register_optimizer_step_post_hook(lambda o, *_: calls.append("global after") if o is optimizer else None),
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = (params[0] * 3).sum()
        loss.backward()
        return loss

    try:
        start = params[0].sum().item() * 3
        with torch.no_grad():  # closures are run with gradients all the same
            assert optimizer.step(closure).item() == pytest.approx(start)
            assert optimizer.step(closure=closure) is not None
        once = ["global before", "before", "closure", "after", "global after"]
        assert sorted(calls) == sorted(once * 2)
        assert [c for c in calls if "global" not in c] == ["before", "closure", "after"] * 2
        for _ in range(2):
            expected[0].grad = torch.full((3,), 3.0, dtype=torch.float64)
            other.step()
        assert_same(params, optimizer, expected, other)
    finally:
        for handle in handles:
            handle.remove()
    calls.clear()
    assert optimizer.step() is None
    assert calls == []


@each_optimizer
def test_a_hook_may_change_the_gradients_and_the_arguments(one_way, case):
    """Weight decay and closures are put in by pre-hooks; a post-hook sees the new parameters."""
    params, expected = make([(3,)]), make([(3,)])
    optimizer, other = case.own(params, one_way), case.other(expected)
    seen = []

    def double(optimizer, args, kwargs):
        params[0].grad.mul_(2)

    optimizer.register_step_pre_hook(double)
    optimizer.register_step_pre_hook(lambda *_: ((optimizer, lambda: 5.0), {}))
    optimizer.register_step_post_hook(lambda *_: seen.append(params[0].detach().clone()))
    params[0].grad, expected[0].grad = torch.ones(3, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64)
    assert optimizer.step() == 5.0
    other.step()
    assert_same(params, optimizer, expected, other)
    assert torch.equal(seen[0], params[0])


@each_optimizer
def test_profiler_sees_the_step(case):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = case.own([p])
    p.grad = torch.ones(3)
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert f"Optimizer.step#{case.ours.__name__}.step" in {event.key for event in profile.key_averages()}


@each_optimizer
def test_named_parameters(one_way, case):
    """The names are kept in the groups and in checkpoints, and change nothing."""
    model, twin = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)
    twin.load_state_dict(model.state_dict())
    named, plain = case.own(model.named_parameters(), one_way), case.own(twin.parameters(), one_way)
    for step in range(3):
        set_grads([*model.parameters()], [*twin.parameters()], seed=step)
        named.step()
        plain.step()
    assert_identical([p.data for p in model.parameters()], [p.data for p in twin.parameters()])
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]
    assert named.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    plain.load_state_dict(named.state_dict())
    with pytest.raises(ValueError, match="same format|names"):
        named.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    named.add_param_group({"params": [("more", torch.nn.Parameter(torch.ones(2)))]})
    assert named.param_groups[1]["param_names"] == ["more"]


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.1),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=has_momentum(o)),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 12, cycle_momentum=has_momentum(o)),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 4),
}


def has_momentum(optimizer):
    return bool({"momentum", "betas"} & optimizer.defaults.keys())


def test_every_scheduler_is_tested():
    classes = {name for name in lr_scheduler.__all__ if inspect.isclass(getattr(lr_scheduler, name))} - {"LRScheduler"}
    assert SCHEDULERS.keys() == classes | {"SWALR"}


@each_optimizer
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_schedulers(case, scheduler, tensor):
    """The one that was changed last counts: lr, and with it momentum or betas."""
    params, expected = make(SHAPES[3:5]), make(SHAPES[3:5])
    lr = torch.tensor(0.05, dtype=torch.float64) if tensor else 0.05
    ours, theirs = case.own(params, lr=lr), case.other(expected, lr=lr)
    schedules = [scheduler(ours), scheduler(theirs)]
    used = set()
    for step in range(10):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        for schedule in schedules:
            schedule.step(*[1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else [])
        assert_same(params, ours, expected, theirs)
        used.add(float(ours.param_groups[0]["lr"]))
    assert len(used) > 1  # it did change
    assert isinstance(ours.param_groups[0]["lr"], torch.Tensor) == tensor


# ---- torch.compile --------------------------------------------------------------------------------------------------


class Graphs:
    """A backend for torch.compile that counts the steps its graphs make with our operator."""

    def __init__(self, backend="aot_eager"):
        self.backend = torch._dynamo.lookup_backend(backend)
        self.launches = []

    def __call__(self, graph, inputs):
        self.launches.append(sum("absgd_fast" in str(n.target) and "step_" in str(n.target) for n in graph.graph.nodes))
        return self.backend(graph, inputs)


@pytest.fixture
def compiler():
    """torch.compile of a step without graph breaks, and nothing left of it afterwards."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield lambda optimizer, graphs: torch.compile(optimizer.step, fullgraph=True, backend=graphs)
    torch._dynamo.reset()


@each_optimizer
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_compiled_step(one_backend, case, tensor, compiler):
    """One graph with one call of the operator; no other one when a tensor lr gets another value."""
    if tensor and one_backend == "reference":
        pytest.skip("nothing that the other three do not test, and it takes long")
    # without the 0-d one: in float64 torch 2.13's compiler loses updates in place of it, in torch.optim.SGD too
    params, expected = make(SHAPES[1:]), make(SHAPES[1:])
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    ours, theirs = case.own(params, one_backend, lr=lr), case.other(expected, lr=lr)
    graphs, compiled = Graphs(), []
    step = compiler(ours, graphs)
    for seed in range(5):
        if tensor:
            for optimizer in (ours, theirs):
                optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + seed))
        set_grads(params, expected, seed=seed)
        step()
        theirs.step()
        assert_same(params, ours, expected, theirs)
        compiled.append(len(graphs.launches))
    assert compiled[1:] == [compiled[1]] * 4  # the first step makes the states
    if one_backend == "cpu":
        assert graphs.launches and all(launches == 1 for launches in graphs.launches)


@each_optimizer
def test_compiled_groups_and_dtypes(case, compiler):
    """With more than one of each: as in eager mode."""
    params, expected = (make(SHAPES[1:4], torch.bfloat16) + make(SHAPES[4:], torch.float32) for _ in range(2))
    ours, eager = (case.own([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.1}]) for ps in (params, expected))
    step = compiler(ours, "aot_eager")
    for seed in range(3):
        set_grads(params, expected, seed=seed)
        step()
        eager.step()
        assert_near("half", params[:3], expected[:3], 1e-2)
        assert_near("parameters", params[3:], expected[3:], 3e-6)
        for ours_of_p, eager_of_p in zip(states(ours)[3:], states(eager)[3:]):
            for name in eager_of_p:
                assert_near(name, [ours_of_p[name]], [eager_of_p[name]], 3e-6)


@pytest.mark.parametrize("case", [EACH["sgd-nesterov"], EACH["adam-amsgrad-decay"]], ids=["sgd", "adam"])
def test_compiled_by_inductor(case, compiler):
    """The default compiler, where it can build what it generates."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"no compiler for torch.compile: {error}")
    params, expected = make(SHAPES[1:], torch.float32), make(SHAPES[1:])
    ours, theirs = case.own(params), case.other(expected)
    graphs = Graphs("inductor")
    step = compiler(ours, graphs)
    for seed in range(3):
        set_grads(params, expected, seed=seed)
        step()
        theirs.step()
        assert_same(params, ours, expected, theirs, torch.float32)
    if _backend.available("cpu"):
        assert graphs.launches and all(launches == 1 for launches in graphs.launches)
