"""Situations: options of every kind, schedulers, flags, mistakes, hooks of a step, closures, and GradScaler."""

import math
import warnings
from fractions import Fraction

import numpy as np
import torch
from conformance_world import attempt, look, situation
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

FUSED = ("sgd", "adam", "adamw", "adagrad")  # torch's classes that have fused=


# ---- the learning rate ----------------------------------------------------------------------------------------------------

LR_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int64": torch.int64,
}
LR_SHAPES = {"": (), " of one element": (1,), " of three dimensions": (1, 1, 1)}
LRS = {f"{kind}{shape}": (LR_DTYPES[kind], LR_SHAPES[shape]) for kind in LR_DTYPES for shape in LR_SHAPES}


def schedule(optimizer, world, lrs, dtypes=None):
    """Steps with these learning rates one after the other, written into the tensor that the group holds."""
    for seed, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"].fill_(lr)
        world.train(optimizer, [seed])


def tensor_lr(world, lr, fill):
    params = world.params([(3,), (20,), ()])
    dtype, shape = lr
    first = torch.full(shape, 1 if dtype == torch.int64 else 0.02, dtype=dtype)
    optimizers = []
    error = attempt(lambda: optimizers.append(world(params, lr=first)))
    if error is not None:
        return error
    (optimizer,) = optimizers
    error = attempt(lambda: world.train(optimizer, range(3)))
    held = optimizer.param_groups[0]["lr"] is first
    return error or held, attempt(lambda: schedule(optimizer, world, fill)) or look(optimizer)


# torch computes lr / (1 - beta^t) in the dtype of lr, and the kernels in float64
@situation({name: lr for name, lr in LRS.items() if "float" in name}, tolerance=1e-6)
def lr_is_a_tensor(world, lr):
    return tensor_lr(world, lr, (0.05, 0.01, 0.0, 0.3))


@situation({name: lr for name, lr in LRS.items() if "float" not in name}, tolerance=2**-7)
def lr_is_a_tensor_of_few_digits(world, lr):
    return tensor_lr(world, lr, (2, 1, 0, 1))


@situation({name: lr for name, lr in LRS.items() if "one" not in name and "three" not in name}, tolerance=2**-7)
def lr_becomes_a_tensor(world, lr):
    """In the middle of a training; it was a number."""
    _, optimizer = world.started([(3,), (20,)])
    optimizer.param_groups[0]["lr"] = torch.ones(lr[1], dtype=lr[0])
    return attempt(lambda: schedule(optimizer, world, (1, 2))) or look(optimizer)


@situation({name: lr for name, lr in LRS.items() if "three" not in name}, tolerance=2**-7)
def scheduler_of_a_tensor_lr(world, lr):
    params = world.params([(3,), (20,)])
    optimizer = world(params, lr=torch.full(lr[1], 8, dtype=lr[0]))
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)

    def train():
        for seed in range(4):
            world.train(optimizer, [seed])
            scheduler.step()

    return attempt(train) or look(optimizer)


@situation({"bf16": torch.bfloat16, "fp16": torch.float16, "float64": torch.float64}, only=("adam", "adamw"))
def decay_by_a_tensor_lr(world, dtype):
    """Decoupled, with gradients of zero, so that nothing else moves the parameters. 0.125 is exact in every dtype."""
    params = world.params([(3,), (20,)])
    decoupled = world.known(decoupled_weight_decay=True)
    optimizer = world(params, lr=torch.tensor(0.125, dtype=dtype), weight_decay=0.01, **decoupled)
    for p in params:
        p.grad = torch.zeros_like(p)
    world.step(optimizer)
    return [p.detach() for p in params]


@situation({"foreach=True": True, "foreach=False": False}, only=("adam", "adamw"))
def tensor_lr_and_an_option_of_the_group(world, foreach):
    """The constructor does not see the option, so torch looks at it in the first step."""
    params = world.params([(3,), (20,)])
    optimizer = world([{"params": params, "foreach": foreach}], lr=torch.tensor(0.02, dtype=torch.float64))
    error = attempt(lambda: world.train(optimizer, [0]))
    return error or {name: value for name, value in look(optimizer).items() if name != "options"}


NUMBERS = {
    "int": 1,
    "bool": True,
    "zero": 0.0,
    "negative zero": -0.0,
    "numpy float64": np.float64(0.1),
    "numpy float32": np.float32(0.5),
    "numpy int64": np.int64(1),
    "numpy 0-d array": np.array(0.5),
    "fraction": Fraction(1, 2),
    "inf": math.inf,
}


def with_option(world, extra=None, **option):
    """What training with this option makes of parameters and states, or the exception."""
    params = world.params([(3,), (20,)])
    optimizers = []
    error = attempt(lambda: optimizers.append(world(params, **option, **extra or {})))
    if error is not None:
        return "refused", error
    error = attempt(lambda: world.train(*optimizers))
    return error or {name: value for name, value in look(*optimizers).items() if name != "options"}


@situation(NUMBERS, tolerance=1e-6)
def lr_is_a_number(world, lr):
    return with_option(world, lr=lr)


@situation({name: number for name, number in NUMBERS.items() if name != "inf"}, tolerance=1e-6)
def weight_decay_is_a_number(world, decay):
    return with_option(world, weight_decay=decay)


def requiring_grad(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


TENSORS = {
    "float64": lambda value: torch.tensor(value, dtype=torch.float64),
    "float32": torch.tensor,
    "one element": lambda value: torch.tensor([value], dtype=torch.float64),
    "requires grad": requiring_grad,
}
OPTION = {"lr": 0.5, "weight_decay": 0.25, "momentum": 0.5, "eps": 0.5, "alpha": 0.5, "lr_decay": 0.5, "dampening": 0.5}


@situation({f"{name}, {kind}": (name, TENSORS[kind]) for name in OPTION for kind in TENSORS}, tolerance=1e-6)
def option_is_a_tensor(world, given):
    """Powers of two, which no dtype rounds."""
    name, make = given
    if not world.known(**{name: None}):
        return "no such option"
    return with_option(world, {"nesterov": False} if name == "dampening" else None, **{name: make(OPTION[name])})


@situation(TENSORS, only=("adam", "adamw"), tolerance=1e-6)
def betas_are_tensors(world, make):
    return with_option(world, betas=(make(0.5), make(0.75)))


# ---- schedulers -----------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 12, cycle_momentum=bool({"momentum", "betas"} & o.defaults.keys())),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=bool({"momentum", "betas"} & o.defaults.keys())),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 4),
}


@situation(SCHEDULERS)
def scheduler(world, make):
    """Checkpoints of both are loaded in the middle."""
    params = world.params([(3,), (4, 5)])
    optimizer = world([{"params": params[:1], "lr": 0.3}, {"params": params[1:]}])
    schedule = make(optimizer)
    for seed in range(8):
        world.train(optimizer, [seed])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule.step(*[1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else [])
        if seed == 4:
            saved = optimizer.state_dict(), schedule.state_dict()
            optimizer = world([{"params": params[:1]}, {"params": params[1:]}])
            schedule = make(optimizer)
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
    return look(optimizer)


@situation()
def scheduler_before_the_first_step(world):
    """torch warns if the scheduler steps first, and counts the optimizer's steps for that."""
    seen = []
    for first in (False, True):
        params = world.params([(3,)])
        optimizer = world(params)
        schedule = lr_scheduler.StepLR(optimizer, 1, 0.5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if first:
                world.train(optimizer, [0])
            schedule.step()
        seen.append([w.category for w in caught])
    return seen


# ---- options of a group ---------------------------------------------------------------------------------------------------

NEW = {
    "numbers": dict(lr=0.3, weight_decay=0.2, betas=(0.6, 0.7), eps=1e-2, alpha=0.7, lr_decay=0.3, momentum=0.4),
    "all zero": dict(lr=0.0, weight_decay=0.0, betas=(0.0, 0.0), eps=0.0, alpha=0.0, lr_decay=0.0),
    "integers": dict(lr=1, weight_decay=1, eps=1, alpha=1, momentum=1, lr_decay=1),
    "list of betas": dict(betas=[0.6, 0.7]),
    "maximize": dict(maximize=True),
    "no nesterov": dict(nesterov=False),
    "nesterov with dampening": dict(nesterov=True, dampening=0.5),
    "dampening": dict(nesterov=False, dampening=0.5),
    "no momentum": dict(nesterov=False, momentum=0.0),
    "no amsgrad": dict(amsgrad=False),
    "amsgrad": dict(amsgrad=True),
    "not centered": dict(centered=False),
    "decoupled": dict(decoupled_weight_decay=True),
    "coupled": dict(decoupled_weight_decay=False),
    "negative lr": dict(lr=-0.1),
    "negative decay": dict(weight_decay=-0.1),
    "betas above one": dict(betas=(1.5, 0.9)),
    "beta of one": dict(betas=(0.5, 1.0)),
    "nan": dict(lr=math.nan),
    "string": dict(lr="0.1"),
    "none": dict(weight_decay=None),
    "string of a number": dict(eps="1e-3", momentum="0.5", lr_decay="0.5"),
    "numpy": dict(lr=np.float32(0.5), weight_decay=np.float64(0.25)),
    "foreach": dict(foreach=True),
    "fused": dict(fused=True),
    "differentiable": dict(differentiable=True),
    "capturable": dict(capturable=True),
    "extra": dict(initial_lr=3.0, name="head"),
}


@situation(NEW, tolerance=1e-6)
def group_option_changed(world, new):
    _, optimizer = world.started([(3,), (20,)])
    group = optimizer.param_groups[0]
    known = new if "initial_lr" in new else {name: value for name, value in new.items() if name in group}
    group.update(known)
    return attempt(lambda: world.train(optimizer)) or look(optimizer)


@situation({name: name for name in ("lr", "weight_decay", "eps", "betas", "maximize", "momentum")})
def group_option_removed(world, name):
    _, optimizer = world.started([(3,)])
    optimizer.param_groups[0].pop(name, None)
    return attempt(lambda: world.train(optimizer)) or look(optimizer)["params"]


@situation()
def group_that_computes_an_option(world):
    """A dict whose lr and weight_decay are asked for each time."""

    class Computing(dict):
        def __getitem__(self, name):
            return {"lr": 0.25, "weight_decay": 0.125}.get(name, super().__getitem__(name))

    params, optimizer = world.started([(3,), (20,)])
    optimizer.param_groups[0] = Computing(optimizer.param_groups[0])
    world.train(optimizer)
    return [p.detach() for p in params]


LATER = {"momentum": ("sgd", "rmsprop"), "centered": ("rmsprop",), "amsgrad": ("adam", "adamw")}


@situation({name: name for name in LATER})
def state_that_is_needed_later(world, name):
    """An option that keeps one more state is turned on in the middle of a training."""
    if world.name not in LATER[name]:
        return "no such option"
    off = {"momentum": 0.0, **({"nesterov": False} if world.name == "sgd" else {})} if name == "momentum" else {name: False}
    _, optimizer = world.started([(3,), (20,)], **off)
    optimizer.param_groups[0][name] = 0.5 if name == "momentum" else True
    return attempt(lambda: world.train(optimizer)) or look(optimizer)


@situation()
def options_of_each_group(world):
    params = world.params([(3,), (20,), (4, 5)])
    options = [
        {},
        world.known(lr=0.5, weight_decay=0.0, betas=(0.5, 0.6), eps=0.5, momentum=0.25, lr_decay=0.5),
        world.known(lr=torch.tensor(0.25, dtype=torch.float64), maximize=True, alpha=0.5),
    ]
    optimizer = world([{"params": [p]} | more for p, more in zip(params, options)])
    world.train(optimizer, range(5), skip=0.2)
    return look(optimizer)


@situation()
def lr_of_zero(world):
    params = world.params([(3,), (20,)])
    optimizer = world(params, lr=0)
    world.train(optimizer)
    return look(optimizer)


# ---- flags ------------------------------------------------------------------------------------------------------------------


def one_of_each(*names):
    return {f"{name}={value}": {name: value} for name in names for value in (None, False, True)}


FLAGS = one_of_each("foreach", "maximize") | {
    "fused=None": dict(fused=None),
    "fused=False": dict(fused=False),
    "fused=True": dict(fused=True),
    "differentiable=False": dict(differentiable=False),
    "differentiable=True": dict(differentiable=True),
    "capturable=False": dict(capturable=False),
    "capturable=True": dict(capturable=True),
    "fused and foreach": dict(fused=True, foreach=True),
    "fused and differentiable": dict(fused=True, differentiable=True),
    "foreach and differentiable": dict(foreach=True, differentiable=True),
    "foreach and capturable": dict(foreach=True, capturable=True),
}


# torch's capturable and differentiable forms compute the bias correction in float32
@situation(FLAGS, tolerance=1e-6)
def flags(world, given):
    """A flag that torch's class does not have is a TypeError; others may be refused at once or by the first step."""
    outcome = with_option(world, **given)
    return outcome[1] if isinstance(outcome, tuple) else outcome


@situation(
    {"capturable": dict(capturable=True), "differentiable": dict(differentiable=True), "fused": dict(fused=True)}, tolerance=1e-6
)
def flags_of_a_checkpoint(world, given):
    """Saved where the flag was allowed, loaded here."""
    params, optimizer = world.started([(3,), (20,)])
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.update({name: value for name, value in given.items() if name in world.torch([torch.ones(1)]).defaults})
    other = world(params)
    other.load_state_dict(saved)
    seen = look(other)
    return seen, attempt(lambda: world.train(other)) or look(other)


POSITIONS = {
    "sgd": (0.1, 0.9, 0.5, 0.25, False),
    "adam": (0.1, (0.5, 0.75), 1e-3, 0.25, True),
    "adamw": (0.1, (0.5, 0.75), 1e-3, 0.25, True),
    "rmsprop": (0.1, 0.5, 1e-3, 0.25, 0.5, True, False, None, True, False),
    "adagrad": (0.1, 0.5, 0.25, 0.5, 1e-3, None),
}


@situation({str(count): count for count in range(1, 12)})
def positional_arguments(world, count):
    """So many of them; too many are a TypeError."""
    params = world.params([(3,)])
    given = (POSITIONS[world.name] + (None,) * 12)[:count]
    optimizers = []
    if world.name == "sgd" and count == 1:
        given = (*given, 0.9)  # the default of momentum differs
    error = attempt(lambda: optimizers.append(world.bare(params, *given)))
    return error or attempt(lambda: world.train(*optimizers)) or look(*optimizers)


MISTAKES = {
    "negative lr": dict(lr=-1.0),
    "negative tensor lr": dict(lr=torch.tensor(-0.5)),
    "two lrs": dict(lr=torch.ones(2)),
    "empty lr": dict(lr=torch.ones(0)),
    "lr is a string": dict(lr="0.1"),
    "lr is none": dict(lr=None),
    "lr is a list": dict(lr=[0.1]),
    "lr is complex": dict(lr=0.1j),
    "lr is nan, which only some refuse": dict(lr=math.nan),
    "negative decay": dict(weight_decay=-0.1),
    "decay is none": dict(weight_decay=None),
    "negative eps": dict(eps=-1e-3),
    "beta of one": dict(betas=(1.0, 0.5)),
    "negative beta": dict(betas=(0.5, -0.25)),
    "one beta": dict(betas=(0.5,)),
    "three betas": dict(betas=(0.5, 0.5, 0.5)),
    "betas are a number": dict(betas=0.5),
    "beta is nan": dict(betas=(0.5, math.nan)),
    "one beta is a tensor": dict(betas=(0.5, torch.tensor(0.5))),
    "betas are integers": dict(betas=(0, 0)),
    "tensor betas of two elements": dict(betas=(torch.rand(2), torch.rand(2))),
    "negative momentum": dict(momentum=-0.1),
    "nesterov without momentum": dict(nesterov=True, momentum=0.0),
    "nesterov with dampening": dict(nesterov=True, dampening=0.1, momentum=0.9),
    "negative dampening": dict(nesterov=False, dampening=-0.5),
    "negative alpha": dict(alpha=-0.1),
    "alpha above one": dict(alpha=1.5),
    "negative lr_decay": dict(lr_decay=-0.1),
    "negative start": dict(initial_accumulator_value=-0.1),
    "unknown": dict(learning_rate=0.1),
}


@situation(MISTAKES)
def mistakes(world, options):
    return with_option(world, **options)


NO_PARAMETERS = {
    "none": list,
    "nothing": lambda: None,
    "no group": lambda: [{"lr": 0.1}],
    "a tensor": lambda: torch.nn.Parameter(torch.ones(3)),
    "a dict of parameters": lambda: {"weight": torch.nn.Parameter(torch.ones(3))},
    "a set": lambda: [{"params": {torch.nn.Parameter(torch.ones(3))}}],
    "a number": lambda: [1.0],
    "not a leaf": lambda: [torch.nn.Parameter(torch.ones(3)) * 2],
    "names for some": lambda: [("weight", torch.nn.Parameter(torch.ones(3))), torch.nn.Parameter(torch.ones(3))],
    "a generator": lambda: (torch.nn.Parameter(torch.ones(n)) for n in range(3)),
    "a group whose params are one tensor": lambda: [{"params": torch.nn.Parameter(torch.ones(3))}],
    "an empty group": lambda: [{"params": []}],
    "a module": lambda: torch.nn.Linear(2, 2),
    "missing": lambda: [torch.nn.Parameter(torch.ones(3)), None],
}


@situation(NO_PARAMETERS)
def lists_of_parameters(world, make):
    made = make()
    if isinstance(made, (torch.Tensor, dict)) or made is None:
        return attempt(lambda: world(made))
    optimizers = []
    error = attempt(lambda: optimizers.append(world(made)))
    return error or [len(group["params"]) for group in optimizers[0].param_groups]


@situation()
def defaults(world):
    """momentum is given: that of ABSGD is 0.9 by default."""
    optimizer = world.bare(world.params([(3,)]), **world.known(momentum=0.5))
    return optimizer.defaults, look(optimizer)["options"]


@situation()
def what_is_printed(world):
    lines = repr(world(world.params([(3,)]))).splitlines()[1:]
    return [line for line in lines if not {"heavy_ball:", "paper_form:", "fused:"} & {*line.split()}]


@situation()
def subclass_with_its_own_step(world):
    calls = []

    class Mine(world.cls):
        def step(self, closure=None):
            calls.append("step")
            return super().step(closure)

    world.cls = Mine
    _, optimizer = world.started([(3,)])
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    world.train(optimizer)
    return calls, look(optimizer)


# ---- hooks of a step, closures -----------------------------------------------------------------------------------------------


@situation()
def order_of_the_hooks_of_a_step(world):
    params, optimizer = world.started([(3,)])
    other = world(params)
    calls = []

    def note(name):
        return lambda o, args, kwargs: calls.append((name, len(args), sorted(kwargs), o is optimizer)) and None

    handles = [
        register_optimizer_step_pre_hook(note("global before")),
        register_optimizer_step_post_hook(note("global after")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_pre_hook(note("before, the second")),
        optimizer.register_step_post_hook(note("after")),
    ]
    try:
        world.grads(params, 0)
        results = [optimizer.step(), optimizer.step(lambda: 5.0), optimizer.step(closure=lambda: 6.0), other.step()]
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    return calls, results, look(optimizer)


HOOKS = {
    "changes gradients": lambda o, args, kwargs: [p.grad.mul_(2) for p in o.param_groups[0]["params"]] and None,
    "replaces gradients": lambda o, args, kwargs: [setattr(p, "grad", p.grad * 2) for p in o.param_groups[0]["params"]] and None,
    "drops gradients": lambda o, args, kwargs: o.zero_grad(),
    "changes lr": lambda o, args, kwargs: o.param_groups[0].update(lr=0.3),
    "clears the state": lambda o, args, kwargs: o.state.clear(),
    "gives a closure": lambda o, args, kwargs: ((o, lambda: 5.0), {}),
    "gives a list": lambda o, args, kwargs: [o],
    "gives one": lambda o, args, kwargs: (o,),
    "raises": lambda o, args, kwargs: 1 / 0,
    "removes a parameter": lambda o, args, kwargs: o.param_groups[0].update(params=o.param_groups[0]["params"][:1]),
}


@situation(HOOKS)
def hook_before_a_step(world, hook):
    _, optimizer = world.started([(3,), (20,)])
    optimizer.register_step_pre_hook(hook)
    return attempt(lambda: world.train(optimizer)) or look(optimizer)


@situation(HOOKS)
def hook_after_a_step(world, hook):
    _, optimizer = world.started([(3,), (20,)])
    optimizer.register_step_post_hook(hook)
    return attempt(lambda: world.train(optimizer)) or look(optimizer)


def no_loss():
    return None


def raising():
    raise KeyError


CLOSURES = {"none": no_loss, "number": lambda: 3, "raising": raising, "of an argument": lambda x: x, "no function": 5}


@situation(CLOSURES)
def closures(world, closure):
    params, optimizer = world.started([(3,)])
    world.grads(params, 0)
    results = []
    error = attempt(lambda: results.append(optimizer.step(closure)))
    return error, results, attempt(lambda: world.train(optimizer)) or look(optimizer) if error is not TypeError else None


@situation()
def closure_that_steps(world):
    """The optimizer itself, and another one of the same parameters."""
    params, optimizer = world.started([(3,), (20,)])
    other = world(params)

    def closure():
        world.grads(params, 1)
        optimizer.step()
        other.step()
        world.grads(params, 2)
        return 7.0

    return optimizer.step(closure), look(optimizer), look(other)


@situation({"no_grad": torch.no_grad, "enable_grad": torch.enable_grad, "inference_mode": torch.inference_mode})
def closure_with_backward(world, mode):
    params, optimizer = world.started([(3,)])

    def closure():
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    results = []
    with mode():
        error = attempt(lambda: results.append(optimizer.step(closure)))
    return error, [r.item() for r in results], look(optimizer)


# ---- GradScaler ---------------------------------------------------------------------------------------------------------------


def scaled(world, protocol, overflows, unscale=()):
    params = world.params([(3,), (20,), ()])
    optimizer = world(params, **protocol)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    step, calls, seen = optimizer.step, [], []
    optimizer.step = lambda *args, **kwargs: (calls.append(True), step(*args, **kwargs))[1]
    for seed in range(7):
        world.grads(params, seed)
        scaler.scale(torch.ones(()))
        for p in params:
            p.grad *= scaler.get_scale()
        if seed in overflows:
            params[1].grad[7] = torch.inf
        if seed in unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        seen.append((scaler.step(optimizer), len(calls), [p.detach().clone() for p in params]))
        scaler.update()
        seen.append((scaler.get_scale(), hasattr(optimizer, "grad_scale"), hasattr(optimizer, "found_inf")))
    return seen, look(optimizer), scaler.state_dict()


PROTOCOLS = {"default": {}, "False": dict(fused=False), "True": dict(fused=True)}


@situation({name: PROTOCOLS[name] for name in ("False", "True")}, only=FUSED, dtypes=(torch.float32,))
def grad_scaler(world, protocol):
    return scaled(world, protocol, (3, 5), (4,))


@situation(dtypes=(torch.float32,))
def grad_scaler_of_the_default(world):
    return scaled(world, {}, (0, 3), (2,))


@situation(dtypes=(torch.float32,), only=FUSED)
def grad_scaler_that_skips_the_first_step(world):
    return scaled(world, dict(fused=True), (0,))


@situation({name: PROTOCOLS[name] for name in ("False", "True")}, only=FUSED, dtypes=(torch.float32,))
def misuse_of_grad_scaler(world, protocol):
    """No gradients; a closure; a second step before update; a second unscale_; a scaler that is not enabled."""
    params = world.params([(3,), (20,)])
    optimizer = world(params, **protocol)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    errors = [attempt(lambda: scaler.step(optimizer))]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    world.grads(params, 0)
    errors += [attempt(lambda: scaler.step(optimizer, closure=no_loss)), attempt(lambda: scaler.step(optimizer))]
    errors += [attempt(lambda: scaler.step(optimizer)), attempt(lambda: scaler.unscale_(optimizer))]
    scaler.update()
    scaler.unscale_(optimizer)
    errors += [attempt(lambda: scaler.unscale_(optimizer))]
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
    return errors, look(optimizer)


@situation({name: PROTOCOLS[name] for name in ("False", "True")}, only=FUSED, dtypes=(torch.float32,))
def grad_scaler_of_two_optimizers(world, protocol):
    """One of them meets an infinite gradient."""
    params = world.params([(3,), (20,)])
    optimizers = [world([p], **protocol) for p in params]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for seed in range(4):
        world.grads(params, seed)
        scaler.scale(torch.ones(()))
        for p in params:
            p.grad *= scaler.get_scale()
        if seed == 2:
            params[1].grad[3] = torch.inf
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    return [look(optimizer) for optimizer in optimizers], scaler.get_scale()


@situation()
def grad_scaler_of_float16(world):
    """torch's GradScaler refuses to unscale float16 gradients in its default protocol."""
    params = world.params([(3,)], dtype=torch.float16)
    optimizer = world(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    world.grads(params, 0)
    scaler.scale(torch.ones(()))
    return attempt(lambda: scaler.step(optimizer))


@situation({name: PROTOCOLS[name] for name in ("False", "True")}, only=FUSED)
def who_unscales(world, protocol):
    """What frameworks ask before they decide how to clip."""
    optimizer = world(world.params([(3,)], dtype=torch.float32), **protocol)
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@situation()
def who_unscales_by_default(world):
    optimizer = world(world.params([(3,)], dtype=torch.float32))
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


# ---- torch.compile ---------------------------------------------------------------------------------------------------------


# the counts of steps are float32, and so is what a graph computes from them
@situation({"number": 0.1, "tensor": torch.tensor(0.1, dtype=torch.float64)}, deep=True, tolerance=1e-6)
def compiled_step(world, lr):
    params = world.params([(3,), (4, 5)])
    optimizer = world(params, lr=lr)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(4):
            world.grads(params, seed)
            step()
    torch._dynamo.reset()
    return look(optimizer)
