"""Situations: states that are saved, loaded, copied, moved, offloaded and dropped, and the memory that this frees."""

import copy
import gc
import io
import pickle
import sys
import weakref
from collections import OrderedDict, defaultdict

import torch
from conformance_world import attempt, attempted, kept_names, look, situation, watch_states, watched

FLOATS = (torch.float64, torch.bfloat16)


def through_a_file(value, weights_only=True):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


# ---- hooks of checkpoints -----------------------------------------------------------------------------------------------


def swapped(state):
    state[0], state[1] = state[1], state[0]


def dropped(state):
    del state[1]


def one_name_dropped(state):
    del state[1][next(name for name in state[1] if name != "step")]


def doubled(state):
    for of_p in state.values():
        for name, value in of_p.items():
            if name != "step" and isinstance(value, torch.Tensor):
                of_p[name] = value * 2


def doubled_in_place(state):
    for of_p in state.values():
        for name, value in of_p.items():
            if name != "step" and isinstance(value, torch.Tensor):
                value.mul_(2)


def restarted(state):
    for of_p in state.values():
        if "step" in of_p:
            of_p["step"] = torch.zeros_like(of_p["step"])


def emptied(state):
    state.clear()


def one_more_name(state):
    for of_p in state.values():
        of_p["mine"] = torch.ones(2)


def another_dtype(state):
    for of_p in state.values():
        for name, value in of_p.items():
            if isinstance(value, torch.Tensor) and name != "step":
                of_p[name] = value.float() if value.dtype == torch.float64 else value.double()


EDITS = {
    f.__name__.replace("_", " "): f
    for f in (swapped, dropped, one_name_dropped, doubled, doubled_in_place, restarted, emptied, one_more_name, another_dtype)
}


def checkpoint(world):
    """Of an optimizer whose states differ from those of the one that loads it."""
    params = world.params([(4,), (4,)], seed=3)
    optimizer = world(params)
    world.train(optimizer, range(10, 14))
    return copy.deepcopy(optimizer.state_dict())


def states_by_number(optimizer):
    """The states of an optimizer as checkpoints have them: the parameter's number -> its states. Edits are written back."""

    class Numbered(dict):
        def write(self):
            optimizer.state.clear()
            for i, p in enumerate(params):
                if i in self:
                    optimizer.state[p] = self[i]

    params = optimizer.param_groups[0]["params"]
    return Numbered({i: optimizer.state[p] for i, p in enumerate(params) if p in optimizer.state})


def edited_copy(edit):
    """A hook of a checkpoint that hands out another one."""

    def hook(o, state_dict):
        state_dict = copy.deepcopy(state_dict)
        edit(state_dict["state"])
        return state_dict

    return hook


@situation(EDITS, dtypes=FLOATS)
def hook_before_loading(world, edit):
    """It edits the dict that it is given."""
    _, optimizer = world.started([(4,), (4,)])
    saved = checkpoint(world)

    def hook(o, state_dict):
        state_dict["state"] = {i: dict(of_p) for i, of_p in state_dict["state"].items()}
        edit(state_dict["state"])

    optimizer.register_load_state_dict_pre_hook(hook)
    optimizer.load_state_dict(saved)
    return look(optimizer), attempt(lambda: world.train(optimizer)) or look(optimizer)


@situation(EDITS, dtypes=FLOATS)
def hook_before_loading_that_returns_another_dict(world, edit):
    _, optimizer = world.started([(4,), (4,)])
    optimizer.register_load_state_dict_pre_hook(edited_copy(edit))
    optimizer.load_state_dict(checkpoint(world))
    return look(optimizer), attempt(lambda: world.train(optimizer)) or look(optimizer)


@situation({name: edit for name, edit in EDITS.items() if name != "another dtype"}, dtypes=FLOATS)
def hook_after_loading(world, edit):
    _, optimizer = world.started([(4,), (4,)])

    def hook(o):
        state = states_by_number(o)
        edit(state)
        state.write()

    optimizer.register_load_state_dict_post_hook(hook)
    optimizer.load_state_dict(checkpoint(world))
    return look(optimizer), attempt(lambda: world.train(optimizer)) or look(optimizer)


@situation(EDITS, dtypes=FLOATS)
def hook_after_saving(world, edit):
    params, optimizer = world.started([(4,), (4,)])
    handle = optimizer.register_state_dict_post_hook(edited_copy(edit))
    saved = optimizer.state_dict()
    handle.remove()
    seen = copy.deepcopy(saved["state"])
    other = world(params)
    other.load_state_dict(saved)
    return seen, attempt(lambda: world.train(other)) or look(other)


@situation()
def calls_of_the_hooks_of_checkpoints(world):
    _, optimizer = world.started([(4,), (4,)])
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda o, d: calls.append(("after saving", sorted(d))))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append(("before loading", sorted(d))))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("before loading, first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    world.train(optimizer)
    return calls, look(optimizer)


@situation({"before": True, "after": False}, dtypes=FLOATS)
def hook_of_loading_that_raises(world, before):
    _, optimizer = world.started([(4,), (4,)])
    if before:
        optimizer.register_load_state_dict_pre_hook(lambda o, d: 1 / 0)
    else:
        optimizer.register_load_state_dict_post_hook(lambda o: 1 / 0)
    error = attempt(lambda: optimizer.load_state_dict(checkpoint(world)))
    world.train(optimizer)
    return error, look(optimizer)


@situation(dtypes=FLOATS)
def hook_that_renumbers_groups(world):
    """As a hook that loads by names does: the order of parameters is another one."""
    _, optimizer = world.started([(4,), (4,)])
    saved = checkpoint(world)

    def hook(o, state_dict):
        return {
            "state": state_dict["state"],
            "param_groups": [{**group, "params": group["params"][::-1]} for group in state_dict["param_groups"]],
        }

    optimizer.register_load_state_dict_pre_hook(hook)
    optimizer.load_state_dict(saved)
    world.train(optimizer)
    return look(optimizer)


# ---- checkpoints ------------------------------------------------------------------------------------------------------------


@situation(dtypes=(torch.float32, torch.float64))
def through_torchs_class_and_back(world):
    params, optimizer = world.started()
    for _ in range(2):
        guest = world.torch(params)
        guest.load_state_dict(through_a_file(optimizer.state_dict()))
        world.train(guest)
        optimizer = world.bare(params)
        optimizer.load_state_dict(through_a_file(guest.state_dict()))
        world.train(optimizer)
    return look(optimizer), optimizer.state_dict()


@situation(dtypes=(*FLOATS, torch.complex64))
def resumed_from_a_file(world):
    """weights_only, as torch.load does by default. A fresh optimizer takes over options and states."""
    params, optimizer = world.started()
    saved = through_a_file(optimizer.state_dict())
    seen = copy.deepcopy(saved)
    other = world.bare(params)
    other.load_state_dict(saved)
    world.train(other)
    return seen, look(other)


@situation(dtypes=FLOATS)
def a_checkpoint_shares_memory(world):
    """state_dict() gives the states themselves, and load_state_dict takes those that need no other dtype."""
    params, optimizer = world.started([(4,), (4,)])
    saved = optimizer.state_dict()
    given = [{name: value is optimizer.state[p][name] for name, value in saved["state"][i].items()} for i, p in enumerate(params)]
    other = world(params)
    other.load_state_dict(saved)
    before = copy.deepcopy(saved["state"])
    world.train(other)
    moved = [
        {name: not torch.equal(value, before[i][name]) for name, value in of_p.items()} for i, of_p in saved["state"].items()
    ]
    return given, moved


@situation(dtypes=FLOATS)
def states_are_updated_in_place(world):
    """Who holds a state, or its memory, sees the next step in it."""
    params, optimizer = world.started()
    held = [(optimizer.state[p], dict(optimizer.state[p])) for p in params]
    memory = [{name: value.data_ptr() for name, value in of_p.items()} for _, of_p in held]
    world.train(optimizer)
    return [
        (optimizer.state[p] is state, {n: state[n] is v and v.data_ptr() == pointers[n] for n, v in of_p.items()})
        for p, (state, of_p), pointers in zip(params, held, memory)
    ]


DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


@situation(DTYPES, dtypes=(torch.float32, torch.float64, torch.bfloat16))
def checkpoint_of_another_dtype(world, dtype):
    """Its states are powers of two, which every dtype has."""
    _, optimizer = world.started([(4,), (4,)])
    saved = copy.deepcopy(optimizer.state_dict())
    for of_p in saved["state"].values():
        for name, value in of_p.items():
            if isinstance(value, torch.Tensor) and name != "step":
                of_p[name] = torch.full_like(value, 0.5, dtype=dtype)
    optimizer.load_state_dict(saved)
    seen = look(optimizer)
    world.train(optimizer)
    return seen, look(optimizer)


COUNTS = {
    "as it is": lambda t: t.clone(),
    "int": lambda t: int(t),
    "float": lambda t: float(t),
    "float64": lambda t: t.double(),
    "int64": lambda t: t.long(),
    "one element": lambda t: t.reshape(1),
    "2^24": lambda t: torch.full_like(t, 2**24 - 1),
    "2^30": lambda t: torch.full_like(t, 2**30),
}


@situation(COUNTS, only=("adam", "adamw", "rmsprop", "adagrad"))
def counts_of_steps(world, convert):
    """As old or edited checkpoints have them."""
    _, optimizer = world.started([(4,), (4,)])
    saved = copy.deepcopy(optimizer.state_dict())
    for of_p in saved["state"].values():
        of_p["step"] = convert(of_p["step"])
    optimizer.load_state_dict(saved)
    return attempt(lambda: world.train(optimizer)) or look(optimizer)


@situation(COUNTS, only=("adam", "adamw", "rmsprop", "adagrad"))
def counts_of_steps_in_the_state(world, convert):
    params, optimizer = world.started([(4,), (4,)])
    for p in params:
        optimizer.state[p]["step"] = convert(optimizer.state[p]["step"])
    return attempt(lambda: world.train(optimizer)) or look(optimizer)


def without_groups(saved):
    del saved["param_groups"]


def without_state(saved):
    del saved["state"]


def one_group_more(saved):
    saved["param_groups"] *= 2


def one_parameter_less(saved):
    saved["param_groups"][0]["params"].pop()


def without_options(saved):
    saved["param_groups"] = [{"params": group["params"], "lr": group["lr"]} for group in saved["param_groups"]]


def without_new_options(saved):
    for group in saved["param_groups"]:
        for name in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            group.pop(name, None)


def more_options(saved):
    for group in saved["param_groups"]:
        group["initial_lr"] = 0.3


def states_of_nobody(saved):
    saved["state"]["somebody"] = {"x": torch.ones(2)}


def state_of_another_shape(saved):
    for name, value in saved["state"][0].items():
        if name != "step":
            saved["state"][0][name] = torch.ones(3, 3, dtype=value.dtype)


def none_in_the_state(saved):
    for name in [name for name in saved["state"][0] if name != "step"][-1:]:
        saved["state"][0][name] = None


def list_in_the_state(saved):
    saved["state"][0]["history"] = [torch.ones(2), torch.ones(3)]


def ordered(saved):
    saved["state"] = OrderedDict((i, OrderedDict(of_p)) for i, of_p in saved["state"].items())


def numbers_that_are_names(saved):
    names = ["a", "b"]
    saved["param_groups"][0]["params"] = names
    saved["state"] = {names[i]: of_p for i, of_p in saved["state"].items()}


BROKEN = {
    f.__name__.replace("_", " "): f
    for f in (
        without_groups,
        without_state,
        one_group_more,
        one_parameter_less,
        without_options,
        without_new_options,
        more_options,
        states_of_nobody,
        state_of_another_shape,
        none_in_the_state,
        list_in_the_state,
        ordered,
        numbers_that_are_names,
    )
}


@situation(BROKEN, dtypes=FLOATS)
def checkpoint_that_was_edited(world, edit):
    _, optimizer = world.started([(4,), (4,)])
    saved = checkpoint(world)
    edit(saved)
    error = attempt(lambda: optimizer.load_state_dict(saved))
    if error is not None:
        world.train(optimizer)
        return error, look(optimizer)
    return attempt(lambda: world.train(optimizer)) or look(optimizer)


@situation({"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW, "RMSprop": torch.optim.RMSprop})
def checkpoint_of_another_class(world, cls):
    """torch looks at the number of groups and parameters only."""
    params, optimizer = world.started([(4,), (4,)])
    guest = cls(params, lr=0.1)
    world.train(guest)
    error = attempt(lambda: optimizer.load_state_dict(guest.state_dict()))
    return error, attempt(lambda: world.train(optimizer)) or look(optimizer)["params"]


@situation()
def load_state_dict_of_something_else(world):
    _, optimizer = world.started([(4,)])
    return [attempt(lambda value=value: optimizer.load_state_dict(value)) for value in (None, {}, [], optimizer, 5)]


@situation()
def states_looked_at_before_the_first_step(world):
    """optimizer.state is a defaultdict: who looks makes an entry."""
    params = world.params([(4,), (4,)])
    optimizer = world(params)
    seen = [dict(optimizer.state[p]) for p in params]
    world.train(optimizer)
    return seen, look(optimizer)


@situation()
def checkpoint_after_a_group_was_removed(world):
    """Its states are still there."""
    params = world.params([(4,), (3,)])
    optimizer = world([{"params": params[:1]}, {"params": params[1:]}])
    world.train(optimizer)
    del optimizer.param_groups[1]
    return attempt(optimizer.state_dict)


@situation(dtypes=FLOATS)
def setstate(world):
    """As old code calls it, to fill in options that are missing."""
    _, optimizer = world.started([(4,)])
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
    optimizer.__setstate__(optimizer.__getstate__())
    world.train(optimizer)
    return look(optimizer)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "save": lambda pair: through_a_file(pair, weights_only=False),
}


@situation(COPIES, dtypes=FLOATS)
def copies_go_on(world, copied):
    """Neither sees what happens to the other."""
    params, optimizer = world.started()
    _, other = copied((params, optimizer))
    world.train(other)
    seen = look(optimizer)
    world.train(optimizer, range(3, 5))
    return type(other) is type(optimizer), seen, look(optimizer), look(other)


@situation()
def hooks_are_not_copied(world):
    _, optimizer = world.started([(4,)])
    optimizer.register_step_post_hook(lambda *_: 1 / 0)
    other = copy.deepcopy(optimizer)
    return attempt(lambda: world.train(optimizer)), attempt(lambda: world.train(other)), look(other)


@situation(dtypes=FLOATS)
def shallow_copy(world):
    """Both have the same parameters and states."""
    _, optimizer = world.started([(4,), (4,)])
    other = copy.copy(optimizer)
    world.train(other)
    world.train(optimizer)
    return other.state is optimizer.state, look(other), look(optimizer)


@situation()
def tensor_lr_of_a_checkpoint(world):
    """It is copied: another tensor after loading, that schedulers change alone."""
    params, optimizer = world.started([(4,)], lr=torch.tensor(0.5, dtype=torch.float64))
    saved = optimizer.state_dict()
    other = world(params)
    other.load_state_dict(saved)
    mine, its = (o.param_groups[0]["lr"] for o in (optimizer, other))
    its.fill_(0.25)
    world.train(other)
    return mine is saved["param_groups"][0]["lr"], mine is its, mine, look(other)


@situation({"no_grad": torch.no_grad, "inference_mode": torch.inference_mode})
def checkpoint_loaded_in_a_mode(world, mode):
    params, optimizer = world.started([(4,), (4,)])
    saved = checkpoint(world)
    with mode():
        optimizer.load_state_dict(saved)
    inference = [[value.is_inference() for value in optimizer.state[p].values()] for p in params]
    return inference, attempt(lambda: world.train(optimizer)) or look(optimizer)


# ---- moved, offloaded, replaced ---------------------------------------------------------------------------------------------


class Box(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.kept = torch.nn.ParameterList(params)


@situation({"double": torch.float64, "float": torch.float32}, dtypes=(torch.float32, torch.float64), tolerance=3e-6)
def model_of_another_dtype(world, dtype):
    """module.to(dtype) changes parameters and gradients, and leaves the states."""
    params, optimizer = world.started([(4,), (4, 5)])
    Box(params).to(dtype)
    return attempted(world, optimizer, lambda: world.train(optimizer, [5]))


@situation(dtypes=(torch.float32,))
def model_becomes_half_precision(world):
    params, optimizer = world.started([(4,), (4, 5)])
    Box(params).to(torch.bfloat16)
    return attempt(lambda: world.train(optimizer))


@situation({"double": torch.float64, "float": torch.float32}, dtypes=(torch.float32, torch.float64), tolerance=3e-6)
def model_of_another_dtype_and_states_loaded_again(world, dtype):
    """The documented way: load_state_dict casts the states to the dtype of the parameters."""
    params, optimizer = world.started([(4,), (4, 5)])
    Box(params).to(dtype)
    optimizer.load_state_dict(optimizer.state_dict())
    world.train(optimizer)
    return look(optimizer)


@situation({"swap": True, "set data": False}, dtypes=(torch.float32, torch.bfloat16))
def module_to(world, swap):
    """As torch.__future__ lets module.to work: parameters are swapped with new ones. Here by double and back."""
    params, optimizer = world.started([(4,), (4, 5)])
    module = Box(params)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    dtype = params[0].dtype
    try:
        error = attempt(lambda: module.to(torch.float64).to(dtype))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    return error, [p is q for p, q in zip(params, module.kept)], attempt(lambda: world.train(optimizer)) or look(optimizer)


@situation(dtypes=FLOATS)
def swapped_states(world):
    """torch.utils.swap_tensors wants that nobody else holds the tensors, in C++ either."""
    params, optimizer = world.started([(4,), (4, 5)])
    errors = []
    for p in params:
        for name in kept_names(optimizer, p):
            new = torch.full_like(optimizer.state[p][name], 0.5)
            errors.append(attempt(lambda p=p, name=name, new=new: torch.utils.swap_tensors(optimizer.state[p][name], new)))
    world.train(optimizer)
    return errors, look(optimizer)


@situation(dtypes=FLOATS)
def swapped_counts(world):
    params, optimizer = world.started([(4,), (4, 5)])
    errors = []
    for p in params:
        if "step" in optimizer.state[p]:
            new = torch.full_like(optimizer.state[p]["step"], 7)
            errors.append(attempt(lambda p=p, new=new: torch.utils.swap_tensors(optimizer.state[p]["step"], new)))
    world.train(optimizer)
    return errors, look(optimizer)


@situation({"with gradients": True, "without": False}, dtypes=FLOATS)
def swapped_parameters(world, gradients):
    params, optimizer = world.started([(4,), (4, 5)])
    if not gradients:
        optimizer.zero_grad()
    errors = []
    for p in params:
        new = torch.nn.Parameter(torch.full_like(p, 0.5))
        errors.append(attempt(lambda p=p, new=new: torch.utils.swap_tensors(p, new)))
    world.train(optimizer)
    return errors, look(optimizer)


@situation(dtypes=FLOATS)
def swapped_gradients(world):
    params, optimizer = world.started([(4,), (4, 5)])
    errors = [attempt(lambda p=p: torch.utils.swap_tensors(p.grad, torch.ones_like(p))) for p in params]
    world.step(optimizer)
    return errors, look(optimizer)


@situation()
def swapped_lr(world):
    _, optimizer = world.started([(4,)], lr=torch.tensor(0.5, dtype=torch.float64))
    error = attempt(lambda: torch.utils.swap_tensors(optimizer.param_groups[0]["lr"], torch.tensor(0.25, dtype=torch.float64)))
    world.train(optimizer)
    return error, look(optimizer)


@situation(dtypes=FLOATS)
def use_counts(world):
    """How many hold each tensor, in C++: none but its Python object, between steps as after torch's."""
    params, optimizer = world.started([(4,), (4, 5)])
    return [
        (p._use_count(), p.grad._use_count(), {name: value._use_count() for name, value in optimizer.state[p].items()})
        for p in params
    ]


def offload(optimizer, p):
    """As offloading does: the states leave, and something small stands in their place."""
    away = {name: optimizer.state[p][name].clone() for name in kept_names(optimizer, p)}
    for name in away:
        optimizer.state[p][name] = torch.zeros(1)
    return away


@situation(dtypes=FLOATS)
def offloaded_and_back(world):
    params, optimizer = world.started([(4,), (4, 5)])
    for seed in range(3):
        away = [offload(optimizer, p) for p in params]
        for p, of_p in zip(params, away):
            optimizer.state[p].update(of_p)
        world.train(optimizer, [seed])
    return look(optimizer)


@situation(dtypes=FLOATS)
def offloaded_when_it_steps(world):
    """The states are missing then: of another shape than their parameter."""
    params, optimizer = world.started([(4,), (4, 5)])
    for p in params:
        for name in kept_names(optimizer, p):
            optimizer.state[p][name] = torch.zeros(3, 3)
    world.grads(params, 0)
    return attempt(optimizer.step)


@situation({"meta": "meta"})
def states_on_another_device(world, device):
    params, optimizer = world.started([(4,), (4, 5)])
    for p in params:
        for name in kept_names(optimizer, p):
            optimizer.state[p][name] = optimizer.state[p][name].to(device)
    world.grads(params, 0)
    return attempt(optimizer.step) is not None


def cleared(optimizer, params):
    optimizer.state.clear()


def popped(optimizer, params):
    optimizer.state.pop(params[0])


def new_defaultdict(optimizer, params):
    optimizer.state = defaultdict(dict)


def plain_dict(optimizer, params):
    optimizer.state = {}


def plain_dict_with_all(optimizer, params):
    optimizer.state = {p: dict(of_p) for p, of_p in optimizer.state.items()}


def ordered_dicts(optimizer, params):
    optimizer.state = defaultdict(dict, {p: OrderedDict(of_p) for p, of_p in optimizer.state.items()})


def new_dicts(optimizer, params):
    for p in params:
        optimizer.state[p] = dict(optimizer.state[p])


def halved(optimizer, params):
    for p in params:
        for name in kept_names(optimizer, p):
            optimizer.state[p][name] = optimizer.state[p][name] / 2


def halved_data(optimizer, params):
    for p in params:
        for name in kept_names(optimizer, p):
            optimizer.state[p][name].data = optimizer.state[p][name] / 2


def pending_signs(optimizer, params):
    """The memory holds the opposite sign."""
    for p in params:
        for name in kept_names(optimizer, p):
            value = torch.complex(torch.zeros_like(optimizer.state[p][name]), -optimizer.state[p][name]).conj().imag
            if name == "momentum_buffer":
                optimizer.state[p][name] = value


def expanded(optimizer, params):
    """All elements share memory: nothing may be written there."""
    name = kept_names(optimizer, params[0])[0]
    optimizer.state[params[0]][name] = torch.ones(1, dtype=optimizer.state[params[0]][name].dtype).expand(4)


def double_states(optimizer, params):
    for p in params:
        for name in kept_names(optimizer, p):
            optimizer.state[p][name] = optimizer.state[p][name].double()


def float_states(optimizer, params):
    for p in params:
        for name in kept_names(optimizer, p):
            optimizer.state[p][name] = optimizer.state[p][name].float()


def one_count_for_all(optimizer, params):
    for p in params[1:]:
        if "step" in optimizer.state[p]:
            optimizer.state[p]["step"] = optimizer.state[params[0]]["step"]


def one_tensor_in_two_places(optimizer, params):
    name = kept_names(optimizer, params[0])[0]
    optimizer.state[params[1]][name] = optimizer.state[params[0]][name]


def parameters_as_states(optimizer, params):
    for p in params:
        for name in kept_names(optimizer, p):
            optimizer.state[p][name] = torch.nn.Parameter(optimizer.state[p][name])


def none_for_the_first(optimizer, params):
    optimizer.state[params[0]][kept_names(optimizer, params[0])[0]] = None


def one_missing(optimizer, params):
    del optimizer.state[params[0]][kept_names(optimizer, params[0])[0]]


def count_missing(optimizer, params):
    optimizer.state[params[0]].pop("step", None)


def number_for_a_state(optimizer, params):
    optimizer.state[params[0]][kept_names(optimizer, params[0])[0]] = 0.0


def one_state_for_two(optimizer, params):
    optimizer.state[params[1]] = {name: value.clone() for name, value in optimizer.state[params[0]].items()}


REPLACED = {
    f.__name__.replace("_", " "): f
    for f in (
        cleared,
        popped,
        new_defaultdict,
        plain_dict,
        plain_dict_with_all,
        ordered_dicts,
        new_dicts,
        halved,
        halved_data,
        pending_signs,
        expanded,
        double_states,
        float_states,
        one_count_for_all,
        one_tensor_in_two_places,
        parameters_as_states,
        none_for_the_first,
        one_missing,
        count_missing,
        number_for_a_state,
        one_state_for_two,
    )
}


@situation(REPLACED, dtypes=FLOATS, tolerance=3e-7)
def state_replaced(world, replace):
    params, optimizer = world.started([(4,), (4,)])
    replace(optimizer, params)
    return attempt(lambda: world.train(optimizer)) or look(optimizer)


@situation(dtypes=FLOATS)
def states_at_used_addresses(world):
    """New tensors of other layouts, one after the other, often where the last one was."""
    params, optimizer = world.started([(4, 6), (3,)])
    layouts = [
        torch.clone,
        lambda t: t.t().contiguous().t() if t.dim() == 2 else t.clone(),
        lambda t: torch.stack([t, t], -1)[..., 0],
    ]
    for seed in range(9):
        for p in params:
            for name in kept_names(optimizer, p):
                away = optimizer.state[p].pop(name).clone()
                optimizer.state[p][name] = layouts[seed % 3](away)
                del away
        world.train(optimizer, [seed])
    return look(optimizer)


@situation(dtypes=FLOATS)
def parameters_at_used_addresses(world):
    """One parameter leaves with its group and states, and another of the same size comes, several times."""
    _, optimizer = world.started([(3,)])
    outcomes = []
    for seed in range(6):
        optimizer.add_param_group({"params": world.params([(7,)], seed=seed), "lr": 0.1 * (seed + 1)})
        world.train(optimizer, range(seed, seed + 2))
        outcomes.append(look(optimizer))
        for p in optimizer.param_groups.pop()["params"]:
            optimizer.state.pop(p)
        del p
    return outcomes


class Elsewhere(dict):
    """States that are somewhere else, as offloading keeps them: whoever asks for one gets it from there."""

    def __init__(self, stored):
        super().__init__({name: torch.zeros_like(value) for name, value in stored.items()})
        self.stored = stored

    def __getitem__(self, name):
        return self.stored[name]

    def get(self, name, default=None):
        return self.stored.get(name, default)

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        self.stored[name] = value


@situation()
def states_that_are_elsewhere(world):
    params, optimizer = world.started([(4,), (4,)])
    kept = [dict(optimizer.state[p]) for p in params]
    for p, stored in zip(params, kept):
        optimizer.state[p] = Elsewhere(stored)
    world.train(optimizer)
    return [p.detach() for p in params], kept


@situation()
def state_of_all_is_elsewhere(world):
    """The outer dict looks its parameters up by itself."""
    params, optimizer = world.started([(4,), (4,)])
    kept = dict(optimizer.state)

    class Outer(defaultdict):
        def __getitem__(self, p):
            return kept[p]

        def get(self, p, default=None):
            return kept.get(p, default)

    optimizer.state = Outer(dict, {p: {name: torch.zeros_like(value) for name, value in kept[p].items()} for p in params})
    world.train(optimizer)
    return [p.detach() for p in params], [kept[p] for p in params]


# ---- memory -----------------------------------------------------------------------------------------------------------------


class Held:
    """Parameters and an optimizer that somebody can let go; the garbage collector stays out of it."""

    def __init__(self, world, **options):
        self.params = world.params([(40,), (4, 5), (0,)])
        self.optimizer = world([{"params": self.params[:2]}, {"params": self.params[2:]}], **options)
        world.train(self.optimizer, range(2))


def freed(world, let_go, options=None):
    """Which states are freed at once when something happens that should free them. Steps have been made with each."""
    gc.disable()
    try:
        held = Held(world, **options or {})
        questions = watch_states(held.optimizer, held.params[:2])
        world.train(held.optimizer, range(2, 4))
        alive = [question() for question in questions]
        let_go(held)
        return alive, [question() for question in questions]
    finally:
        gc.enable()


def small_tensors(held):
    for p in held.params[:2]:
        for name in kept_names(held.optimizer, p):
            held.optimizer.state[p][name] = torch.zeros(1)


def clones(held):
    for p in held.params[:2]:
        for name in kept_names(held.optimizer, p):
            held.optimizer.state[p][name] = held.optimizer.state[p][name].clone()


def other_memory(held):
    for p in held.params[:2]:
        for name in kept_names(held.optimizer, p):
            held.optimizer.state[p][name].data = torch.zeros(1)


def the_dicts(held):
    for p in held.params[:2]:
        held.optimizer.state[p] = {}


def clear(held):
    held.optimizer.state.clear()


def pop(held):
    for p in held.params:
        held.optimizer.state.pop(p, None)


def another_defaultdict(held):
    held.optimizer.state = defaultdict(dict)


def the_group_and_its_states(held):
    for p in held.optimizer.param_groups.pop(0)["params"]:
        del held.optimizer.state[p]


def load(held):
    held.optimizer.load_state_dict(copy.deepcopy(held.optimizer.state_dict()))


def the_optimizer(held):
    del held.optimizer


def all_of_it(held):
    del held.optimizer, held.params


def a_step_that_fails(held):
    held.params[0].data = torch.zeros(7)
    attempt(held.optimizer.step)
    held.optimizer.state.clear()


def a_copy_stays(held):
    held.optimizer = copy.deepcopy(held.optimizer)


LET_GO = {
    f.__name__.replace("_", " "): f
    for f in (
        small_tensors,
        clones,
        other_memory,
        the_dicts,
        clear,
        pop,
        another_defaultdict,
        the_group_and_its_states,
        load,
        the_optimizer,
        all_of_it,
        a_step_that_fails,
        a_copy_stays,
    )
}


@situation(LET_GO, dtypes=FLOATS)
def states_freed(world, let_go):
    return freed(world, let_go)


@situation(dtypes=FLOATS)
def states_freed_under_no_grad(world):
    with torch.no_grad():
        return freed(world, small_tensors)


@situation(only=("sgd", "adam", "adamw", "adagrad"))
def states_freed_of_fused(world):
    return freed(world, clear, dict(fused=True))


def watch_parameters(held):
    questions = []
    for p in held.params[:2]:
        p.data, question = watched(p.detach())
        questions.append(question)
    return questions


def new_data(held):
    for p in held.params:
        p.data = p.data.clone()


@situation({"data": new_data, "everything": all_of_it, "nothing": lambda held: None}, dtypes=FLOATS)
def parameters_freed(world, let_go):
    gc.disable()
    try:
        held = Held(world)
        questions = watch_parameters(held)
        world.train(held.optimizer)
        let_go(held)
        return [question() for question in questions]
    finally:
        gc.enable()


def removed_parameters(held):
    for p in held.optimizer.param_groups.pop(0)["params"]:
        del held.optimizer.state[p]
        del p
    del held.params[:2]


@situation(dtypes=FLOATS)
def removed_parameters_freed(world):
    gc.disable()
    try:
        held = Held(world)
        questions = watch_parameters(held)
        world.train(held.optimizer)
        for p in held.params:
            p.grad = None
        removed_parameters(held)
        gone = [question() for question in questions]
        world.train(held.optimizer)
        return gone, [question() for question in questions]
    finally:
        gc.enable()


def gradients_of_zeros(held):
    held.optimizer.zero_grad(set_to_none=False)


def no_more_gradients(held):
    held.optimizer.zero_grad()


def other_gradients(held):
    for p in held.params:
        p.grad = torch.ones_like(p)


@situation({"zero_grad": no_more_gradients, "others": other_gradients, "zeros": gradients_of_zeros}, dtypes=FLOATS)
def gradients_freed(world, let_go):
    gc.disable()
    try:
        held = Held(world)
        seen = []
        for seed in range(2):
            world.grads(held.params, seed)
            questions = []
            for p in held.params[:2]:
                p.grad, question = watched(p.grad)
                questions.append(question)
            world.step(held.optimizer)
            let_go(held)
            seen.append([question() for question in questions])
        return seen
    finally:
        gc.enable()


@situation()
def lr_freed(world):
    gc.disable()
    try:
        lr, question = watched(torch.tensor(0.5, dtype=torch.float64))
        held = Held(world, lr=lr)
        del lr
        for group in held.optimizer.param_groups:
            group["lr"] = 0.1
        held.optimizer.defaults["lr"] = 0.1
        return question()
    finally:
        gc.enable()


@situation(only=("sgd", "adam", "adamw", "adagrad"), dtypes=(torch.float32,))
def numbers_of_grad_scaler_freed(world):
    gc.disable()
    try:
        held = Held(world, fused=True)
        world.grads(held.params, 0)
        held.optimizer.grad_scale, scale = watched(torch.tensor(1.0))
        held.optimizer.found_inf, found = watched(torch.tensor(0.0))
        held.optimizer.step()
        del held.optimizer.grad_scale, held.optimizer.found_inf
        return scale(), found()
    finally:
        gc.enable()


@situation(dtypes=FLOATS)
def references(world):
    """No step keeps one more reference to anything: to tensors, groups, options, dicts of states."""
    params, optimizer = world.started([(4,), (4, 5)], lr=torch.tensor(0.5, dtype=torch.float64))

    def counts():
        (group,) = optimizer.param_groups
        held = [optimizer, optimizer.param_groups, group, *group.values(), optimizer.state, *params]
        held += [p.grad for p in params] + [optimizer.state[p] for p in params]
        held += [value for p in params for value in optimizer.state[p].values()]
        return [sys.getrefcount(value) for value in held if type(value) not in (bool, int, float, type(None))]

    world.train(optimizer)
    before = counts()
    world.train(optimizer, range(20))
    return [after - count for after, count in zip(counts(), before)]


@situation()
def no_cycle(world):
    """The optimizer goes at once when nobody needs it, also with a scheduler and hooks."""
    gc.disable()
    try:
        seen = []
        for attach in (
            lambda o: None,
            lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
            lambda o: o.register_step_pre_hook(print),
        ):
            optimizer = world(world.params([(4,)]))
            attached = attach(optimizer)
            if attached is None:
                world.train(optimizer)
            gone = weakref.ref(optimizer)
            del optimizer, attached
            seen.append(gone() is None)
        return seen
    finally:
        gc.enable()
