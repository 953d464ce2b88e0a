"""The state of the optimizers: saved, copied, resumed, and exchanged with torch's classes."""

import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
from optim_cases import (
    HALF,
    assert_identical,
    assert_same,
    each_of_torchs,
    each_optimizer,
    every_case,
    make,
    set_grads,
    snapshot,
    states,
    steps,
    through_a_file,
)

import absgd_fast as ab

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- saving and copying ---------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resumed_is_identical(case, dtype, one_way):
    """From a file, and through a torch optimizer in between: the same bits as without."""
    params, resumed = make(dtype=dtype), make(dtype=dtype)
    ours = case.own(params, one_way)
    steps(params, ours, range(4))
    for p, q in zip(params, resumed):
        q.data.copy_(p.data)
    state = through_a_file(ours.state_dict())
    if not case.form and dtype not in HALF:
        guest = case.torch(resumed)
        guest.load_state_dict(state)
        state = through_a_file(guest.state_dict())
    other = case.ours(resumed, **case.form, backend=one_way)
    other.load_state_dict(state)
    assert_identical(states(other), states(ours))
    steps(params, ours, range(4, 8))
    steps(resumed, other, range(4, 8))
    assert_identical([p.data for p in params], [p.data for p in resumed])
    assert_identical(states(other), states(ours))


# what checkpoints of torch's classes may have been made with
MADE_WITH = {"foreach": dict(foreach=True), "fused": dict(fused=True), "capturable": dict(capturable=True), "default": {}}


@each_of_torchs
@pytest.mark.parametrize("made_with", MADE_WITH.values(), ids=MADE_WITH)
def test_checkpoints_of_torchs_other_forms(one_way, case, made_with):
    """torch.optim's class with foreach, fused or capturable, on both sides of a few steps of ours."""
    if not made_with.keys() <= inspect.signature(case.torch).parameters.keys():
        pytest.skip(f"torch.optim.{case.torch.__name__} has no {', '.join(made_with)}")
    stepped = "capturable" not in made_with  # which torch takes on GPUs only
    params, expected = make(), make()
    options = {name: value for name, value in case.options.items() if name != "lr"}
    guest, theirs = case.torch(params, lr=0.02, **options, **made_with), case.other(expected)
    if not stepped:  # as loaded from a checkpoint that was made elsewhere
        made = case.other(params)
        set_grads(params, expected, seed=100)
        made.step()
        theirs.step()
        guest.load_state_dict(made.state_dict())
        guest.param_groups[0].update(made_with)
    for _ in range(2):
        if stepped:
            for step in range(3):
                set_grads(params, expected, seed=step)
                guest.step()
                theirs.step()
        ours = case.ours(params, backend=one_way)
        ours.load_state_dict(through_a_file(guest.state_dict()))
        for step in range(3, 6):
            set_grads(params, expected, seed=step)
            ours.step()
            theirs.step()
            assert_same(params, ours, expected, theirs)
        guest = case.torch(params, **made_with)
        guest.load_state_dict(through_a_file(ours.state_dict()))


@each_of_torchs
def test_checkpoints_with_counts_that_are_numbers(one_way, case):
    """As written by old releases of torch."""
    params, expected = make(), make()
    ours, theirs = case.own(params, one_way), case.other(expected)
    for step in range(4):
        if step == 2:
            state = ours.state_dict()
            for entry in state["state"].values():
                if "step" in entry:
                    entry["step"] = int(entry["step"].item())
            ours = case.ours(params, backend=one_way)
            ours.load_state_dict(state)
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


@pytest.mark.parametrize("ours, form", [(ab.ABSGD, "heavy_ball"), (ab.ABAdam, "paper_form"), (ab.ABAdamW, "paper_form")])
@pytest.mark.parametrize("loaded", [True, False])
def test_checkpoint_of_the_other_form(one_way, ours, form, loaded):
    """Its states mean something else: refused before anything is loaded, in any group, from torch's class too."""
    theirs = ours.__mro__[ours.__mro__.index(torch.optim.Optimizer) - 1]
    sources = [lambda ps: ours(ps, lr=0.3, **{form: loaded})] + ([] if loaded else [lambda ps: theirs(ps, lr=0.3)])
    for source in sources:
        for groups in (lambda ps: ps, lambda ps: [{"params": ps[:3]}, {"params": ps[3:], form: loaded}]):
            params = make()
            split = groups(params)
            optimizer = ours(split, lr=0.1, backend=one_way, **{form: not loaded})
            if split is not params:
                optimizer.param_groups[1][form] = not loaded
            steps(params, optimizer, range(2))
            before = snapshot(params, optimizer)
            checkpoint = source(groups(make())).state_dict()
            checkpoint["param_groups"][0].pop(form, None) if not loaded else None
            with pytest.raises(ValueError, match=f"{form}.*{form}={loaded}.*{form}={not loaded}"):
                optimizer.load_state_dict(checkpoint)
            assert_identical(snapshot(params, optimizer), before)


@each_optimizer
def test_state_of_another_model_is_refused(one_way, case):
    params = make()
    optimizer = case.own(params, one_way)
    steps(params, optimizer, range(2))
    before = snapshot(params, optimizer)
    for other in (params[:2], [{"params": params[:2]}, {"params": params[2:]}]):
        with pytest.raises(ValueError, match="doesn't match the size|different number of parameter groups"):
            optimizer.load_state_dict(case.own(other, lr=0.3).state_dict())
        assert_identical(snapshot(params, optimizer), before)


def swaps_two(_, checkpoint):
    state = checkpoint["state"]
    state[2], state[6] = state[6], state[2]


def drops_one(_, checkpoint):
    del checkpoint["state"][5]


def hands_out_another(_, checkpoint):
    return checkpoint | {
        "state": {index: {name: 2 * t for name, t in kept.items()} for index, kept in checkpoint["state"].items()}
    }


def scales_loaded(optimizer):
    for kept in optimizer.state.values():
        for name, value in kept.items():
            kept[name] = 3 * value


def drops_loaded(optimizer):
    del optimizer.state[optimizer.param_groups[0]["params"][6]]


@each_of_torchs
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("pre", [None, swaps_two, drops_one, hands_out_another])
@pytest.mark.parametrize("post", [None, scales_loaded, drops_loaded])
@pytest.mark.parametrize("prepend", [False, True])
def test_hooks_change_what_is_loaded(case, dtype, pre, post, prepend):
    """Whatever the dtype of the parameters: the states are those that torch's class loads for float32 parameters."""
    shapes = [(3,)] * 7
    params = make(shapes, dtype)
    source = case.own(params)
    steps(params, source, range(2))
    loaded = []
    for optimizer in (case.own(make(shapes, dtype)), case.other(make(shapes, torch.float32))):
        if pre is not None:
            optimizer.register_load_state_dict_pre_hook(pre, prepend=prepend)
        if post is not None:
            optimizer.register_load_state_dict_post_hook(post, prepend=prepend)
        for _ in range(2):  # the second time as the first
            optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
        loaded.append(states(optimizer))
    assert_identical(*loaded)
    assert any(loaded[0])


@each_of_torchs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("when", ["pre", "post"])
def test_a_hook_loads_by_itself(case, dtype, when):
    """Another checkpoint, inside a hook, beside a second hook: as in torch, the outer one is loaded last before post-hooks."""
    shapes = [(3,)] * 4
    params = make(shapes, dtype)
    source = case.own(params)
    steps(params, source, range(3))
    outer = source.state_dict()
    inner = copy.deepcopy(outer)
    for kept in inner["state"].values():
        kept.update({name: value + 1 for name, value in kept.items() if name != "step"})
    loaded = []
    for optimizer in (case.own(make(shapes, dtype)), case.other(make(shapes, torch.float32))):
        calls = []

        def loads(optimizer, *_, calls=calls):
            calls.append(1)
            if len(calls) == 1:
                optimizer.load_state_dict(copy.deepcopy(inner))

        getattr(optimizer, f"register_load_state_dict_{when}_hook")(loads)
        getattr(optimizer, f"register_load_state_dict_{when}_hook")(lambda *_, calls=calls: calls.append(2))
        optimizer.load_state_dict(copy.deepcopy(outer))
        loaded.append((states(optimizer), calls))
    assert_identical(*loaded)


def test_a_hook_may_adapt_the_form():
    """It is asked for after the hooks, and a checkpoint that is refused leaves no hook behind."""
    params = make()
    source = ab.ABSGD(params, lr=0.1, heavy_ball=True)
    steps(params, source, range(2))
    optimizer = ab.ABSGD(make(), lr=0.1)
    for _ in range(2):
        with pytest.raises(ValueError, match="heavy_ball"):
            optimizer.load_state_dict(source.state_dict())
        assert not optimizer._optimizer_load_state_dict_pre_hooks and not optimizer._optimizer_load_state_dict_post_hooks

    def to_torchs_form(_, checkpoint):
        buffers = {index: {"momentum_buffer": kept["momentum_buffer"] / -0.1} for index, kept in checkpoint["state"].items()}
        return {"state": buffers, "param_groups": [group | {"heavy_ball": False} for group in checkpoint["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(to_torchs_form)
    optimizer.load_state_dict(source.state_dict())
    for kept, before in zip(states(optimizer), states(source)):
        assert torch.equal(kept["momentum_buffer"], before["momentum_buffer"] / -0.1)


@each_optimizer
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o)), through_a_file],
    ids=["deepcopy", "copy", "pickle", "save"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_copies_go_on(one_way, case, copied, dtype, monkeypatch):
    if copied is through_a_file:
        monkeypatch.setattr(torch, "load", partial(torch.load, weights_only=False))
    params = make(dtype=dtype)
    optimizer = case.own(params, one_way)
    for step in range(3):
        set_grads(params, seed=step)
        optimizer.step()
    other = copied(optimizer)
    assert type(other) is type(optimizer) and other.backend == one_way
    others = other.param_groups[0]["params"]
    if copied is copy.copy:  # the same parameters and the same state
        assert others[0] is params[0] and other.state is optimizer.state
        other.step()
        return
    assert_identical(states(other), states(optimizer))
    set_grads(params, others, seed=9)
    optimizer.step()
    other.step()
    for p, q in zip(params, others):
        assert p is not q and torch.equal(p, q)
    assert_identical(states(other), states(optimizer))
