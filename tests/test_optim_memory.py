"""What the optimizers keep alive, and what they let go."""

import gc
import sys
import weakref

import pytest
import torch
from optim_cases import EACH, each_optimizer, kept, make, set_grads, steps

from absgd_fast.optim import planned_step

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- memory ----------------------------------------------------------------------------------------------------------


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", [EACH["sgd-nesterov"], EACH["adam-amsgrad-decay"]], ids=["sgd", "adam"])
def test_no_growth(case, one_way, garbage):
    """Thousands of steps; one leaked Python object a step would show as that many blocks, 100 bytes a step as 1 MB."""
    params = make([(4,), (8, 8)], torch.float32)
    optimizer = case.own(params, one_way, lr=1e-3)

    def run(n):
        for _ in range(n):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        return sys.getallocatedblocks(), resident_bytes()

    count = {"reference": 500, "cpu": 10_000, None: 1_000}[one_way]
    blocks, resident = run(200)
    more_blocks, more_resident = run(count)
    assert more_blocks - blocks < 200
    assert more_resident - resident < 1_000_000


@each_optimizer
def test_gradients_and_replaced_states_are_let_go(case, garbage):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = case.own([p])
    old = []
    for _ in range(3):
        p.grad = torch.ones(3)
        grad = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert grad() is None and all(t() is None for t in old)
        old = [weakref.ref(state[name]) for state, name in kept(optimizer)]
        assert old
        for state, name in kept(optimizer):
            state[name] = torch.ones(3)
    p.grad = torch.ones(3)
    optimizer.step()
    old = [weakref.ref(value) for kept_of_p in optimizer.state.values() for value in kept_of_p.values()]
    assert old and all(t() is not None for t in old)
    del optimizer, state
    gc.collect()
    assert all(t() is None for t in old)


def watched(optimizer):
    """Puts every state, and the count of steps, into memory of NumPy's. Returns weak references to that memory."""
    memory = []
    for of_p in optimizer.state.values():
        for name, value in of_p.items():
            array = value.detach().numpy().copy()
            of_p[name] = torch.from_numpy(array)
            memory.append(weakref.ref(array))
    return memory


def replace_all(optimizer):
    for of_p in optimizer.state.values():
        for name in of_p:
            of_p[name] = torch.zeros(1)


def clear_all(optimizer):
    optimizer.state.clear()


def clear_each(optimizer):
    for of_p in optimizer.state.values():
        of_p.clear()


def new_memory(optimizer):
    for of_p in optimizer.state.values():
        for value in of_p.values():
            value.data = value.data.clone()


def swap_all(optimizer):
    for of_p in optimizer.state.values():
        for value in of_p.values():
            torch.utils.swap_tensors(value, torch.zeros_like(value))


def load_others(optimizer):
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {}})


def remove_the_group(optimizer):
    for p in optimizer.param_groups.pop()["params"]:
        del optimizer.state[p]


def drop_the_optimizer(optimizer):
    optimizer.param_groups, optimizer.state = [], {}


WAYS_TO_LET_GO = [
    replace_all,
    clear_all,
    clear_each,
    new_memory,
    swap_all,
    load_others,
    remove_the_group,
    drop_the_optimizer,
]


@each_optimizer
@pytest.mark.parametrize("let_go", WAYS_TO_LET_GO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dropped_states_are_freed_at_once(case, let_go, dtype, one_way, garbage):
    """Not in the next step, and without the garbage collector: people offload states to make room."""
    params = make([(3,), (4, 2)], dtype)
    optimizer = case.own(params, one_way)
    steps(params, optimizer, range(1))
    memory = watched(optimizer)
    steps(params, optimizer, range(1, 3))  # the kernels took these very tensors
    assert memory and all(array() is not None for array in memory)
    let_go(optimizer)
    assert all(array() is None for array in memory)


@each_optimizer
def test_states_live_as_long_as_the_kernel_runs(case, monkeypatch, garbage):
    """Another thread may drop them meanwhile."""
    params = make([(3,), (4, 2)], torch.float32)
    optimizer = case.own(params)
    if optimizer._plan is None:
        pytest.skip("no host module, or no kernels")
    steps(params, optimizer, range(1))
    memory = watched(optimizer)
    launch, alive = planned_step.launch, []

    def launch_without_states(*args):
        optimizer.state.clear()
        alive.extend(array() is not None for array in memory)
        launch(*args)

    monkeypatch.setattr(planned_step, "launch", launch_without_states)
    set_grads(params, seed=1)
    optimizer.step()
    assert alive and all(alive)
    assert all(array() is None for array in memory)


@each_optimizer
@pytest.mark.parametrize("bad", [None, "0.1", torch.tensor([0.1, 0.2])], ids=["None", "str", "two"])
def test_an_option_that_is_no_number(case, bad, one_way, garbage):
    """The error names it, and the step that failed keeps no gradient alive."""
    params = make([(3,), (4, 2)], torch.float32)
    optimizer = case.own([{"params": params[:1]}, {"params": params[1:]}], one_way)
    steps(params, optimizer, range(2))
    name = "eps" if "eps" in optimizer.param_groups[1] else "weight_decay"
    optimizer.param_groups[1][name] = bad
    set_grads(params, seed=2)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"{name}: got .*expected a number"):
        optimizer.step()
    grads = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert all(grad() is None for grad in grads)


@each_optimizer
def test_the_table_is_kept_between_steps(case):
    """As long as nothing grows: a step allocates no new one."""
    params = make()
    optimizer = case.own(params)
    if optimizer._plan is None:
        pytest.skip("no host module, or no kernels")
    steps(params, optimizer, range(2))
    set_grads(params, seed=2)
    optimizer.step()
    plan, table = optimizer._plan, optimizer._plan.table.data_ptr()
    steps(params, optimizer, range(5))
    assert optimizer._plan is plan and plan.table.data_ptr() == table


@each_optimizer
def test_a_step_inside_backward_does_not_keep_the_model_alive(one_way, case, garbage):
    """The hook's closure makes a cycle: parameter, hook, optimizer, plan. The garbage collector can undo it."""
    model = torch.nn.Linear(3, 2)
    alive = weakref.ref(model)
    for p in model.parameters():
        optimizer = case.own([p], one_way)

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
