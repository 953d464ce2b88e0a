"""Situations: parameters and gradients of every kind, what happens to them between steps, and the modes a step is made in."""

import copy
import warnings

import torch
from conformance_world import attempt, attempted, look, situation
from tensors import LAYOUTS

BOX = (4, 6, 3, 2)
REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)


# ---- layouts and dtypes -------------------------------------------------------------------------------------------------


@situation(dtypes=(*REAL, *COMPLEX))
def numbers(world):
    """Parameters of every shape; some have no gradient in some steps."""
    optimizer = world(world.params())
    world.train(optimizer, range(6), skip=0.3)
    return look(optimizer)


@situation(LAYOUTS, dtypes=(torch.float64, torch.bfloat16))
def layout_of_parameters(world, layout):
    params = world.params([BOX, (3,)])
    params[0] = torch.nn.Parameter(layout(params[0].detach()))
    optimizer = world(params)
    world.train(optimizer)
    return look(optimizer)


@situation(LAYOUTS)
def layout_of_gradients(world, layout):
    params = world.params([BOX, (3,)])
    optimizer = world(params)
    for seed in range(4):
        world.grads(params, seed)
        if seed:
            params[0].grad = layout(params[0].grad)
        world.step(optimizer)
    return look(optimizer)


@situation(LAYOUTS)
def layout_of_states(world, layout):
    params, optimizer = world.started([BOX, (3,)])
    for name, value in optimizer.state[params[0]].items():
        if isinstance(value, torch.Tensor) and value.dim():
            optimizer.state[params[0]][name] = layout(value)
    world.train(optimizer)
    return look(optimizer)


@situation()
def expanded_gradient(world):
    params = world.params([(4, 6), ()])
    optimizer = world(params)
    for seed in range(3):
        world.grads(params, seed)
        params[0].grad = params[0].grad[:1, :1].expand(4, 6)
        world.step(optimizer)
    return look(optimizer)


@situation()
def expanded_parameter(world):
    """Its elements share memory."""
    p = torch.nn.Parameter(torch.ones(1, 4, dtype=world.dtype).expand(3, 4))
    optimizer = world([p])
    world.grads([p], 0)
    return attempt(optimizer.step)


@situation({"shrunk": lambda p: p.data[:1], "grown": lambda p: torch.cat([p.data] * 2), "flat": lambda p: p.data.flatten()})
def parameter_of_another_shape(world, change):
    """Gradient and states keep theirs."""
    params, optimizer = world.started([(5, 4)])
    world.grads(params, 0)
    params[0].data = change(params[0])
    return attempt(optimizer.step)


@situation()
def gradient_that_broadcasts(world):
    """The parameter has grown since; there is no state yet."""
    p = torch.nn.Parameter(torch.ones(1, 4, dtype=world.dtype))
    optimizer = world([p])
    p.grad = torch.ones_like(p)
    p.data = torch.ones(5, 4, dtype=world.dtype)
    return attempt(optimizer.step)


@situation()
def dtypes_in_one_group(world):
    params = [p for dtype in (torch.float32, *COMPLEX, torch.float64) for p in world.params([(5,), (2, 3), ()], dtype=dtype)]
    optimizer = world(params)
    world.train(optimizer, range(5), skip=0.2)
    return look(optimizer)


@situation({"as it is": lambda t: t, "resolved": torch.resolve_conj})
def complex_that_is_conjugated(world, change):
    """As Parameter(t.conj()): the memory holds the conjugate."""
    params = [torch.nn.Parameter(change(p.detach().conj())) for p in world.params([(4, 3)], dtype=torch.complex128)]
    optimizer = world(params)
    return attempt(lambda: world.train(optimizer)) or look(optimizer)


@situation()
def parameter_with_a_pending_sign(world):
    """As Parameter(t.conj().imag): the memory holds the opposite sign."""
    params = [torch.nn.Parameter(p.detach().conj().imag) for p in world.params([(4, 3)], dtype=torch.complex128)]
    assert params[0].is_neg()
    optimizer = world(params)
    world.train(optimizer)
    return look(optimizer)


@situation()
def conjugated_gradient(world):
    params = world.params([(4, 3)], dtype=torch.complex128)
    optimizer = world(params)

    def train():
        for seed in range(3):
            world.grads(params, seed)
            params[0].grad = params[0].grad.conj()
            world.step(optimizer)

    return attempt(train) or look(optimizer)


@situation(dtypes=(torch.bfloat16, torch.float16))
def float32_gradients_of_half_precision(world):
    """As mixed precision with float32 accumulation sets them."""
    params = world.params([(5, 4), (3,)])
    optimizer = world(params)
    for seed in range(4):
        for p in params:
            p.grad_dtype = None
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        world.step(optimizer)
    return look(optimizer)


@situation({"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2})
def dtypes_without_arithmetic(world, dtype):
    params = [torch.nn.Parameter(torch.ones(3).to(dtype))]
    optimizers = []
    error = attempt(lambda: optimizers.append(world(params)))
    params[0].grad = torch.ones(3).to(dtype)
    return error or attempt(lambda: [optimizers[0].step() for _ in range(2)]) or params[0].detach().float()


@situation()
def integer_parameters_without_gradient(world):
    params = [*world.params([(3,)]), torch.nn.Parameter(torch.arange(3), requires_grad=False)]
    optimizer = world(params)
    for seed in range(3):
        world.grads(params[:1], seed)
        world.step(optimizer)
    return look(optimizer)


@situation()
def plain_tensors(world):
    """Leaves that are no Parameters, one of them without requires_grad."""
    params = [torch.ones(3, dtype=world.dtype, requires_grad=True), torch.ones(2, dtype=world.dtype)]
    optimizer = world(params)
    world.train(optimizer)
    return look(optimizer)


@situation()
def views_of_one_buffer(world):
    flat = world.params([(30,)])[0].detach()
    params = [flat[:10].view(2, 5).requires_grad_(), flat[10:].requires_grad_()]
    optimizer = world(params)
    world.train(optimizer)
    return look(optimizer), flat


@situation()
def lazy_parameters(world):
    """The optimizer is made before they have a shape."""
    torch.manual_seed(0)
    model = torch.nn.LazyLinear(4, dtype=world.dtype)
    optimizers = []
    error = attempt(lambda: optimizers.append(world(model.parameters())))
    if error is not None:
        return error
    model(torch.ones(2, 3, dtype=world.dtype))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    world.train(*optimizers)
    return look(*optimizers)


# ---- gradients ----------------------------------------------------------------------------------------------------------


def sparse(p, seed):
    rows = torch.tensor([[seed % 5, 3, 3, 1]])
    return torch.sparse_coo_tensor(rows, p.grad[:4], p.shape, check_invariants=False)


SPARSE = {
    "twice in a row": sparse,
    "coalesced": lambda p, seed: sparse(p, seed).coalesce(),
    "without entries": lambda p, seed: torch.sparse_coo_tensor(torch.empty(1, 0).long(), p.grad[:0], p.shape),
    "hybrid of two sparse dimensions": lambda p, seed: p.grad.to_sparse(2),
    "dense at first": lambda p, seed: p.grad if seed < 2 else sparse(p, seed),
    "dense later": lambda p, seed: p.grad if seed > 1 else sparse(p, seed),
}


@situation(SPARSE)
def sparse_gradients(world, make_sparse):
    params = world.params([(5, 4), (3,)])
    optimizer = world(params, weight_decay=0.0)

    def train():
        for seed in range(4):
            world.grads(params, seed)
            params[0].grad = make_sparse(params[0], seed)
            world.step(optimizer)

    return attempt(train) or look(optimizer)


@situation()
def sparse_gradients_and_weight_decay(world):
    params = world.params([(5, 4), (3,)])
    optimizer = world(params)
    world.grads(params, 0)
    params[0].grad = sparse(params[0], 0)
    return attempt(optimizer.step)


@situation()
def sparse_gradients_of_maximize(world):
    params = world.params([(5, 4), (3,)])
    optimizer = world(params, weight_decay=0.0, maximize=True)

    def train():
        for seed in range(3):
            world.grads(params, seed)
            params[0].grad = sparse(params[0], seed)
            world.step(optimizer)

    return attempt(train) or look(optimizer)


@situation()
def compressed_sparse_gradients(world):
    params = world.params([(5, 4), (3,)])
    optimizer = world(params, weight_decay=0.0)

    def train():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's sparse CSR is in beta state
            world.grads(params, 0)
            params[0].grad = params[0].grad.to_sparse_csr()
            world.step(optimizer)

    return attempt(train) or look(optimizer)


@situation()
def no_gradients(world):
    params = world.params()
    optimizer = world(params)
    for _ in range(2):
        optimizer.step()
    untouched = look(optimizer)
    world.train(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    return untouched, look(optimizer)


@situation({"none": True, "zeros": False})
def zero_grad(world, set_to_none):
    params, optimizer = world.started([(3,), (0,), ()])
    held = params[0].grad
    optimizer.zero_grad(set_to_none=set_to_none)
    seen = [p.grad is None for p in params], params[0].grad is held, held.clone(), [p.grad for p in params]
    optimizer.step()
    return seen, look(optimizer)


@situation({"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}, dtypes=(torch.float64, torch.bfloat16))
def gradients_that_are_not_finite(world, value):
    params = world.params([(3,), (20,)])
    optimizer = world(params)
    for seed in range(4):
        world.grads(params, seed)
        if seed == 1:
            params[1].grad[4] = value
        world.step(optimizer)
    return look(optimizer)


@situation({"nan": torch.nan, "inf": torch.inf})
def parameters_that_are_not_finite(world, value):
    params = world.params([(20,)])
    params[0].data[3] = value
    optimizer = world(params)
    world.train(optimizer)
    return look(optimizer)


@situation({"huge": 1e150, "tiny": 1e-150})
def gradients_at_the_ends_of_the_range(world, factor):
    params = world.params([(20,)])
    optimizer = world(params)
    for seed in range(4):
        world.grads(params, seed)
        params[0].grad.mul_(factor)
        world.step(optimizer)
    return look(optimizer)


@situation()
def gradients_in_one_buffer(world):
    """As buckets of distributed training hold them."""
    params = world.params([(3,), (4, 5), (7,)])
    optimizer = world(params)
    buffer = torch.zeros(30, dtype=world.dtype)
    for p, piece in zip(params, buffer.split([3, 20, 7])):
        p.grad = piece.view(p.shape)
    for seed in range(3):
        buffer.copy_(torch.randn(30, generator=torch.Generator().manual_seed(seed)))
        world.step(optimizer)
    return look(optimizer), buffer


@situation()
def gradient_is_the_parameter(world):
    params = world.params([(20,), (3,)])
    optimizer = world(params)
    for seed in range(3):
        world.grads(params, seed)
        params[0].grad = params[0].detach()
        world.step(optimizer)
    return look(optimizer)


@situation()
def gradient_is_of_the_class_parameter(world):
    params = world.params([(20,)])
    optimizer = world(params)
    for seed in range(3):
        world.grads(params, seed)
        params[0].grad = torch.nn.Parameter(params[0].grad)
        world.step(optimizer)
    return look(optimizer)


@situation()
def gradient_is_another_parameter(world):
    params = world.params([(20,), (20,)])
    optimizer = world(params)
    for seed in range(3):
        world.grads(params, seed)
        params[1].grad = params[0].detach()
        world.step(optimizer)
    return look(optimizer)


@situation()
def one_gradient_of_two_parameters(world):
    params = world.params([(20,), (20,)])
    optimizer = world(params)
    for seed in range(3):
        world.grads(params, seed)
        params[1].grad = params[0].grad
        world.step(optimizer)
    return look(optimizer), params[0].grad


@situation()
def gradients_with_a_graph(world):
    """As after backward(create_graph=True)."""
    params = world.params([(5,), (2, 3)])
    optimizer = world(params)
    for _ in range(3):
        for p in params:
            p.grad = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the cycle that this makes
            sum((p**3).sum() for p in params).backward(create_graph=True)
        optimizer.step()
    requires = [v.requires_grad for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    seen = requires, [p.grad.requires_grad for p in params], [p.grad_fn for p in params]
    for p in params:
        p.grad = None
    return seen, look(optimizer)


@situation()
def gradients_stay_as_they_are(world):
    params, optimizer = world.started()
    world.grads(params, 5)
    held = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
    world.step(optimizer)
    return [(p.grad is g, torch.equal(g, before), g._version == v) for p, (g, before, v) in zip(params, held)]


@situation(
    {
        "step per parameter": "post_accumulate",
        "in a gradient's hook": "hook",
    }
)
def step_inside_backward(world, where):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(world.dtype)
    optimizers = {p: world([p]) for p in model.parameters()}

    def now(p):
        optimizers[p].step()
        p.grad = None

    def scaled(grad, p):
        if p.grad is not None:  # that of the step before
            now(p)
        return grad * 2

    for p in model.parameters():
        if where == "hook":
            p.register_hook(lambda grad, p=p: scaled(grad, p))
        else:
            p.register_post_accumulate_grad_hook(now)
    for seed in range(3):
        x = torch.randn(6, 4, dtype=world.dtype, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
    return [look(optimizer) for optimizer in optimizers.values()]


# ---- what happens to parameters between steps ---------------------------------------------------------------------------


def new_data(params, optimizer):
    for p in params:
        p.data = p.data * 2


def new_memory(params, optimizer):
    for p in params:
        p.data.set_((p.data * 2).clone())


def freeze(params, optimizer):
    params[1].requires_grad_(False).grad = None


def freeze_but_leave_the_gradient(params, optimizer):
    params[1].requires_grad_(False)


def reset(params, optimizer):
    with torch.no_grad():
        for p in params:
            p.zero_()


def replaced(params, optimizer):
    params[1] = optimizer.param_groups[0]["params"][1] = torch.nn.Parameter(params[1].detach() * 2)
    params[1].grad = torch.ones_like(params[1])


def removed(params, optimizer):
    del optimizer.param_groups[0]["params"][1]


def appended(params, optimizer):
    params.append(torch.nn.Parameter(torch.full_like(params[0], 2.0)))
    params[-1].grad = torch.ones_like(params[0])
    optimizer.param_groups[0]["params"].append(params[-1])


def reversed_order(params, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def tuple_of_parameters(params, optimizer):
    optimizer.param_groups[0]["params"] = tuple(params)


def copies_of_groups(params, optimizer):
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]


def no_groups(params, optimizer):
    optimizer.param_groups.clear()


def tied(params, optimizer):
    params[2].data = params[1].data.view(params[2].shape)


CHANGES = (
    new_data,
    new_memory,
    freeze,
    freeze_but_leave_the_gradient,
    reset,
    replaced,
    removed,
    appended,
    reversed_order,
    tuple_of_parameters,
    copies_of_groups,
    no_groups,
    tied,
)


# in bfloat16 the stand-in of two tied parameters is rounded once a step, where two parameters are rounded twice
@situation({f.__name__.replace("_", " "): f for f in CHANGES if f is not tied}, dtypes=(torch.float64, torch.bfloat16))
def parameters_changed(world, change):
    params, optimizer = world.started([(3,), (4, 5), (20,), ()])
    for seed in range(3):
        world.grads([p for p in params if p.requires_grad], seed)
        if seed == 1:
            change(params, optimizer)
        world.step(optimizer)
    return look(optimizer), [p.detach() for p in params]


@situation()
def parameters_tied(world):
    return parameters_changed(world, tied)


@situation()
def frozen_and_unfrozen(world):
    params = world.params([(3,), (4, 5)])
    params[1].requires_grad_(False)
    optimizer = world(params)
    for thawed in (False, True, False, True):
        params[1].requires_grad_(thawed).grad = None
        for seed in range(2):
            world.grads(params[: 1 + thawed], seed)
            world.step(optimizer)
    return look(optimizer)


@situation(dtypes=(torch.float64, torch.bfloat16))
def group_added(world):
    _, optimizer = world.started([(3,), (4, 5)])
    more = world.params([(7,), (2, 2)], seed=1)
    optimizer.add_param_group({"params": more[0], "lr": 0.5})
    optimizer.add_param_group({"params": (p for p in more[1:]), "weight_decay": 0.0, "initial_lr": 3.0})
    world.train(optimizer)
    return look(optimizer)


@situation()
def many_parameters(world):
    """More of them in each step."""
    optimizer = world(world.params([(2,)]))
    for seed in range(4):
        optimizer.add_param_group({"params": world.params([(seed + 1,)] * 20, seed=seed)})
        world.train(optimizer, [seed])
    return look(optimizer)


@situation()
def group_removed(world):
    params = world.params([(3,), (4, 5), (7,)])
    optimizer = world([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)])
    world.train(optimizer)
    removed = optimizer.param_groups.pop(1)
    world.train(optimizer)
    kept = removed["params"][0] in optimizer.state
    optimizer.param_groups.append(removed)
    world.train(optimizer)
    return kept, look(optimizer)


BAD_GROUPS = {
    "twice": lambda params: {"params": params[:1]},
    "no leaf": lambda params: {"params": [params[0] * 2]},
    "a number": lambda params: {"params": [1.0]},
    "a set": lambda params: {"params": {*params}},
    "a list": lambda params: params,
    "no params": lambda params: {"lr": 0.1},
    "names": lambda params: {"params": [("more", torch.nn.Parameter(torch.ones(2)))]},
    "without parameters": lambda params: {"params": []},
}


@situation(BAD_GROUPS)
def bad_group_added(world, group):
    params, optimizer = world.started([(3,)])
    error = attempt(lambda: optimizer.add_param_group(group(params)))
    world.train(optimizer)
    return error, len(optimizer.param_groups), look(optimizer)


@situation()
def named_parameters(world):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, dtype=world.dtype)
    optimizer = world(model.named_parameters())
    world.train(optimizer)
    error = attempt(lambda: optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}))
    other = world(copy.deepcopy(model).parameters())
    other.load_state_dict(optimizer.state_dict())
    return error, look(optimizer), look(other), optimizer.state_dict()


@situation()
def parameter_listed_twice(world):
    params = world.params([(20,)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = world(params * 2)
    world.train(optimizer)
    return [w.category for w in caught], look(optimizer)


@situation()
def parameter_in_two_groups(world):
    params = world.params([(20,)])
    return attempt(lambda: world([{"params": params}, {"params": params}]))


# ---- modes --------------------------------------------------------------------------------------------------------------

MODES = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "profiler": torch.profiler.profile,
}


@situation(MODES, dtypes=(torch.float32,))
def step_in_a_mode(world, mode):
    """The second and third step; then one outside."""
    params = world.params()
    optimizer = world(params)
    world.train(optimizer, range(1))
    for seed in range(2):
        world.grads(params, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with mode():
                optimizer.step()
    world.train(optimizer)
    return look(optimizer)


@situation(MODES, dtypes=(torch.float32,))
def first_step_in_a_mode(world, mode):
    """States are made in it, and used outside."""
    params = world.params([(3,), (4, 5)])
    optimizer = world(params)
    world.grads(params, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mode():
            optimizer.step()
    return attempt(lambda: world.train(optimizer)) or look(optimizer)


@situation()
def gradients_of_inference_mode(world):
    params = world.params([(3,), (4, 5)])
    optimizer = world(params)
    for seed in range(3):
        with torch.inference_mode():
            made = [torch.full_like(p, seed + 0.5) for p in params]
        for p, grad in zip(params, made):
            p.grad = grad
        optimizer.step()
    return [p.detach() for p in params]


@situation()
def parameters_of_inference_mode(world):
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.ones(3, dtype=world.dtype))
    optimizer = world([p])
    error = attempt(lambda: setattr(p, "grad", torch.ones(3, dtype=world.dtype)))
    return error or attempt(optimizer.step)


@situation({"float64": torch.float64, "bfloat16": torch.bfloat16})
def another_default_dtype(world, default):
    """Counts of steps are float64 where that is the default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        _, optimizer = world.started()
        seen = look(optimizer)
    finally:
        torch.set_default_dtype(before)
    world.train(optimizer)
    return seen, look(optimizer)


@situation()
def versions(world):
    """Autograd notices that a step has changed the parameters it needs for a backward."""
    params, optimizer = world.started([(3,), (4, 5)])
    seen = []
    for seed in range(3):
        graph = sum((p * p).sum() for p in params)
        before = [p._version for p in params]
        world.grads(params, seed)
        optimizer.step()
        seen.append((attempt(graph.backward), [p._version > v for p, v in zip(params, before)]))
    return seen


# ---- devices --------------------------------------------------------------------------------------------------------------


@situation(dtypes=(torch.float64, torch.bfloat16))
def meta_parameters(world):
    params = [torch.nn.Parameter(p.detach().to("meta")) for p in world.params([(3,), (4, 5)])]
    optimizer = world(params)

    def train():
        for _ in range(3):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()

    return attempt(train) or [
        {
            name: (v.device.type, v.dtype, v.shape, v.item() if name == "step" else None)
            for name, v in state.items()
            if v is not None
        }
        for state in optimizer.state.values()
    ]


@situation()
def meta_beside_cpu(world):
    params = [*world.params([(3,)]), torch.nn.Parameter(torch.empty(2, device="meta", dtype=world.dtype))]
    optimizer = world(params)

    def train():
        for seed in range(3):
            world.grads(params[:1], seed)
            params[1].grad = torch.empty_like(params[1])
            optimizer.step()

    return attempt(train) or (params[0].detach(), optimizer.state[params[0]])


@situation()
def made_on_meta_and_materialised(world):
    """The objects stay; their memory comes later."""
    model = torch.nn.Linear(3, 2, device="meta", dtype=world.dtype)
    optimizer = world(model.parameters())

    def go_on():
        model.to_empty(device="cpu")
        after = world([*model.parameters()])
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.5)
        world.train(after)
        return look(after)

    return len(optimizer.state), go_on()


@situation()
def made_under_another_device(world):
    """As with torch.device("meta"): a model, and its optimizer inside."""

    def build():
        with torch.device("meta"):
            world(torch.nn.Linear(3, 2).parameters())

    return attempt(build)


@situation(dtypes=(torch.float64,))
def gradient_of_another_dtype(world):
    params, optimizer = world.started([(3,), (4, 5)])
    world.grads(params, 0)
    params[0].grad_dtype = None
    params[0].grad = params[0].grad.float()
    return attempted(world, optimizer, optimizer.step)
