"""The Triton kernels of the steps in Triton's interpreter, against reference/ in float64 and the public API."""

import pytest
import torch
from tensors import wide

pytest.importorskip("triton")

from interpreted_cases import INF, NAN, close
from interpreted_hooks import counters_are_left_zero, launches, pytestmark  # noqa: F401

import absgd_fast as ab
from absgd_fast import reference
from absgd_fast._codes import RULES
from absgd_fast.functional import weighted_momentum_step_
from absgd_fast.kernels import launch, step, tables, weighted

# ---- steps -----------------------------------------------------------------------------------------------------------

FORMS = {
    "sgd": ("sgd", dict(lr=0.1)),
    "sgd decay": ("sgd", dict(lr=0.1, weight_decay=0.3)),
    "sgd momentum": ("sgd", dict(lr=0.1, momentum=0.9, weight_decay=0.01)),
    "sgd dampening": ("sgd", dict(lr=0.1, momentum=0.9, dampening=0.3, maximize=True)),
    "sgd nesterov": ("sgd", dict(lr=0.1, momentum=0.8, weight_decay=0.01, nesterov=True)),
    "sgd heavy ball": ("sgd", dict(lr=0.1, momentum=0.8, weight_decay=0.01, heavy_ball=True)),
    "adam": ("adam", dict(lr=0.1)),
    "adam decay": ("adam", dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3, maximize=True)),
    "adam without memory": ("adam", dict(lr=0.1, betas=(0.0, 0.0))),
    "amsgrad": ("adam", dict(lr=0.1, betas=(0.8, 0.5), amsgrad=True, weight_decay=0.01)),
    "adamw": ("adam", dict(lr=0.1, weight_decay=0.3, decoupled_weight_decay=True)),
    "adamw amsgrad": ("adam", dict(lr=0.1, weight_decay=0.3, decoupled_weight_decay=True, amsgrad=True, maximize=True)),
    "paper form": ("adam", dict(lr=0.1, eps=1e-2, weight_decay=0.3, paper_form=True)),
    "rmsprop": ("rmsprop", dict(lr=0.1)),
    "rmsprop decay": ("rmsprop", dict(lr=0.1, alpha=0.5, eps=1e-3, weight_decay=0.3, maximize=True)),
    "rmsprop momentum": ("rmsprop", dict(lr=0.1, momentum=0.9)),
    "rmsprop centered": ("rmsprop", dict(lr=0.1, alpha=0.9, centered=True)),
    "rmsprop centered momentum": ("rmsprop", dict(lr=0.1, alpha=0.9, momentum=0.9, weight_decay=0.01, centered=True)),
    "adagrad": ("adagrad", dict(lr=0.1)),
    "adagrad decay": ("adagrad", dict(lr=0.1, lr_decay=0.2, eps=1e-3, weight_decay=0.3, maximize=True)),
}
FLAGS = dict(maximize=1, nesterov=2, heavy_ball=4, amsgrad=8, decoupled_weight_decay=16, paper_form=16 | 32, centered=64)
DEFAULTS = {  # of reference/
    "sgd": dict(momentum=0.0, dampening=0.0),
    "adam": dict(betas=(0.9, 0.999), eps=1e-8),
    "rmsprop": dict(alpha=0.99, momentum=0.0, eps=1e-8),
    "adagrad": dict(lr_decay=0.0, eps=1e-10),
}
KEPT = {
    "sgd": lambda o: [o["momentum"] != 0],
    "adam": lambda o: [True, True, "amsgrad" in o],
    "rmsprop": lambda o: [True, o["momentum"] != 0, "centered" in o],
    "adagrad": lambda o: [True],
}


class Step:
    """What a step of `form` works on: parameters, gradients, kinds of states (zeros, or None), counts of steps."""

    def __init__(self, form, shapes, dtype=torch.float32, count=torch.float32, **options):
        self.rule, given = FORMS[form]
        self.options = DEFAULTS[self.rule] | given | options
        generator = torch.Generator().manual_seed(3)
        self.params, self.grads = (
            [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes] for _ in range(2)
        )
        self.states = [
            [torch.zeros(s, dtype=wide(dtype)) for s in shapes] if kept else None for kept in KEPT[self.rule](self.options)
        ]
        self.steps = [] if self.rule == "sgd" else [torch.tensor(7.0 * j, dtype=count) for j in range(len(shapes))]

    def lists(self):
        return [self.params, self.grads, *(ts for ts in self.states if ts is not None), self.steps]

    def copy(self):
        return [[t.clone() for t in ts] for ts in self.lists()]

    def run(self, lr_tensor=None, grad_scale=None, found_inf=None, robust=None, **options):
        o = dict(weight_decay=0.0, eps=0.0) | self.options | options
        first, second = {
            "sgd": lambda: (o["momentum"], o["dampening"]),
            "adam": lambda: o["betas"],
            "rmsprop": lambda: (o["alpha"], o["momentum"]),
            "adagrad": lambda: (o["lr_decay"], 0.0),
        }[self.rule]()
        step.step_(
            self.params,
            self.grads,
            [t for ts in self.states if ts is not None for t in ts],
            self.steps,
            lr_tensor,
            grad_scale,
            found_inf,
            robust,
            o["lr"],
            o["weight_decay"],
            first,
            second,
            o["eps"],
            RULES.index(self.rule),
            sum(bit for name, bit in FLAGS.items() if o.get(name)),
        )

    def wanted(self, scale=1.0, **options):
        """The lists after the same step by reference/, in float64."""
        options = {k: v for k, v in (self.options | options).items() if k not in ("amsgrad", "centered")}
        params, grads, *states, steps = (
            [None] * len(self.params) if ts is None else [t.double() for t in ts]
            for ts in (self.params, self.grads, *self.states, self.steps)
        )
        params, grads = [p.clone() for p in params], [g / scale for g in grads]
        states = [[None if t is None else t.clone() for t in ts] for ts in states]
        steps = [t.clone() for t in steps]
        function = {"sgd": reference.momentum_step_, "adam": reference.adam_step_, "rmsprop": reference.rmsprop_step_}.get(
            self.rule, reference.adagrad_step_
        )
        function(params, grads, *states, *([steps] if steps else []), **options)
        return [params, grads, *(ts for ts in states if ts[0] is not None), steps]

    def compare(self, wanted, scaled=False):
        tol = 1e-12 if self.params[0].dtype == torch.float64 else 1e-6
        for j, (got, exact) in enumerate(zip(self.lists(), wanted, strict=True)):
            for t, e in zip(got, exact, strict=True):
                half = t.dtype in (torch.bfloat16, torch.float16)
                rounding = torch.finfo(t.dtype).eps if half and (j == 0 or scaled) else 0  # the interpreter rounds to 0
                tiny = 6e-8 if t.dtype == torch.float16 else 0
                close(t, e, tol + rounding, tol + tiny)


def run_as(form, params, grads, **options):
    """One step from states of 0."""
    made = Step(form, [p.shape for p in params], params[0].dtype, **options)
    made.params, made.grads = params, grads
    made.run()
    return made


def step_twice(form, shapes, dtype):
    """With other gradients the second time. Counts start apart."""
    made = Step(form, shapes, dtype)
    for k in range(2):
        grads = made.grads = [g * (1 - 1.5 * k) for g in made.grads]
        before, wanted = [g.clone() for g in grads], made.wanted()
        made.run()
        made.compare(wanted)
        assert all(map(torch.equal, grads, before))
        assert [float(t) for t in made.steps] == [7 * j + k + 1 for j in range(len(made.steps))]


@pytest.mark.parametrize("form", FORMS)
def test_step(form, dtype):
    """Tensors of no and one element, one program and two; one launch for all."""
    step_twice(form, [(0,), (5, 3), (step._BLOCK[wide(dtype)] + 1,), ()], dtype)


@pytest.mark.parametrize("form", ["sgd nesterov", "amsgrad"])
def test_step_sizes(form, dtype):
    """Around one and two programs' elements."""
    block = step._BLOCK[wide(dtype)]
    step_twice(form, [(block - 1,), (1,), (block,), (0,), (2 * block - 1,), (2 * block,)], dtype)


@pytest.mark.parametrize("form", ["amsgrad", "rmsprop momentum", "adagrad decay"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_step_counts(form, dtype, monkeypatch):
    """In float32 and float64, one set of tensors having both; for more tensors than a program counts; far on."""
    monkeypatch.setattr(step, "_COUNT_BLOCK", 4)
    for count in (torch.float32, torch.float64, None):
        made = Step(form, [(j,) for j in range(9)], dtype, count or torch.float32)
        made.steps[3].fill_(1e5)
        if count is None:
            made.steps[::2] = [t.double() for t in made.steps[::2]]
        made.steps[5] = made.steps[5].view(1)
        types, wanted = [t.dtype for t in made.steps], made.wanted()
        made.run()
        made.compare(wanted)
        assert types == [t.dtype for t in made.steps] and made.steps[3] == 100001


def test_step_corrections_keep_their_digits():
    """1 - beta^t for t = 1, where beta in float32 has lost all but four digits of 1 - beta."""
    made = Step("adam", [(1,)], torch.float64, betas=(0.9999, 0.999999), eps=0.0, lr=1.0)
    before = made.params[0].clone()
    made.run()
    close(before - made.params[0], made.grads[0].sign(), 1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_step_with_infinite_weights(form):
    """0 * inf is no weight decay of 0."""
    weight = torch.tensor([INF])
    run_as(form, [weight], [torch.ones(1)], weight_decay=0.0)
    assert weight == INF


def test_step_amsgrad_keeps_a_nan():
    """And takes one from u."""
    made = Step("amsgrad", [(3,)])
    made.states[2][0][1] = NAN
    made.grads[0][2] = NAN
    made.run()
    assert made.states[2][0].isnan().tolist() == [False, True, True] == made.params[0].isnan().tolist()
    assert made.states[1][0].isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("sgd decay", "adam without memory")])
def test_step_with_device_numbers(form, dtype):
    """lr in a tensor wins over the float; gradients are divided by grad_scale and stay so; found_inf stops everything, also at
    the first step."""
    for number in {torch.float32, wide(dtype)} | ({torch.float64} if form.startswith("a") else set()):
        made = Step(form, [(5, 3), (step._BLOCK[wide(dtype)] + 2,)], dtype)
        made.steps = [torch.zeros_like(t) for t in made.steps]
        before, wanted = made.copy(), made.wanted(scale=3.0, lr=0.25)
        given = dict(lr_tensor=torch.tensor([0.25], dtype=number), grad_scale=torch.tensor(3.0, dtype=number), lr=77.0)
        made.run(**given, found_inf=torch.tensor(1.0))
        for ts, kept in zip(made.lists(), before, strict=True):
            assert all(map(torch.equal, ts, kept))
        made.run(**given, found_inf=torch.tensor(0.0))
        made.compare(wanted, scaled=True)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("sgd decay", "adam without memory")])
def test_step_with_a_settled_normaliser(form, dtype):
    """What reference.settle returns: gradients count so many times as much and stay as they are; a bad row stops everything."""
    made = Step(form, [(5, 3), (step._BLOCK[wide(dtype)] + 2,)], dtype)
    made.steps = [torch.zeros_like(t) for t in made.steps]
    before, wanted = made.copy(), made.wanted(scale=4.0)
    made.run(robust=torch.tensor([0.0, 0.25, 60.0, 0.0, 2.0, 1.0], dtype=torch.float64))
    for ts, kept in zip(made.lists(), before, strict=True):
        assert all(map(torch.equal, ts, kept))
    made.run(robust=torch.tensor([0.0, 0.25, 60.0, 0.0, 2.0, 0.0], dtype=torch.float64))
    wanted[1] = [g.double() for g in before[1]]
    made.compare(wanted, scaled=True)


@pytest.mark.parametrize("form", ["sgd momentum", "amsgrad", "rmsprop centered momentum"])
def test_step_layouts(form):
    """Dense tensors in any order, and those that are not: strided parameters, transposed gradients, a state laid out otherwise;
    float32, float64 and bfloat16 together; an address that is no multiple of 16; grad_scale writes back to all."""
    made = Step(form, [(2, 3, 4, 5), (6, 4), (6, 4), (5, 3), (8,), (7,), (6, 5)])
    made.params[0] = made.params[0].to(memory_format=torch.channels_last)
    made.params[1] = torch.randn(6, 8)[:, ::2]
    made.params[4] = torch.randn(9)[1:]
    made.grads[0] = made.grads[0].to(memory_format=torch.channels_last)
    made.grads[2] = made.grads[2].t().contiguous().t()
    made.states[0][3] = made.states[0][3].t().contiguous().t()
    for lists in (made.params, made.grads, *(ts for ts in made.states if ts)):
        lists[5] = lists[5].double()
    made.params[6], made.grads[6] = made.params[6].bfloat16(), made.grads[6].bfloat16().t().contiguous().t()
    for g in made.grads:
        g.mul_(2)
    wanted = made.wanted(scale=2.0)
    made.run(grad_scale=torch.tensor(2.0))
    made.compare(wanted, scaled=True)


def test_step_expanded_gradient():
    p = torch.ones(4, 3)
    made = run_as("sgd momentum", [p], [torch.tensor(2.0).expand(4, 3)], lr=0.5, weight_decay=0.0)
    assert torch.equal(p, torch.zeros(4, 3)) and torch.equal(made.states[0][0], torch.full((4, 3), 2.0))


@pytest.mark.parametrize("form", ["sgd", "amsgrad", "rmsprop", "adagrad"])
def test_step_refuses_other_shapes_and_types(form):
    """Nothing is written then."""

    def refused(change, match):
        made = Step(form, [(5,), (3, 2)])
        change(made)
        before = made.copy()
        with pytest.raises(ValueError, match=match):
            made.run()
        assert all(all(map(torch.equal, ts, kept)) for ts, kept in zip(made.lists(), before))

    def put(kind, index, value):
        return lambda made: getattr(made, kind).__setitem__(index, value)

    refused(put("grads", 0, torch.ones(4)), r"\(4,\).*\(5,\)")
    refused(put("grads", 0, torch.ones(5).double()), "got {torch.float64}, expected gradients of torch.float32")
    refused(lambda made: made.grads.pop(), "1 gradients.* 2 parameters")
    if form != "sgd":
        refused(lambda made: made.states[0].__setitem__(1, torch.zeros(3, 2, 1)[:, :, 0].t()), r"\(2, 3\).*\(3, 2\)")
        refused(
            lambda made: made.states[0].__setitem__(1, torch.zeros(3, 2).half()),
            "got {torch.float16}, .* states of torch.float32",
        )
        refused(lambda made: made.states[0].pop(), "states")
        refused(lambda made: made.steps.pop(), "1 counts for 2 parameters")


@pytest.mark.parametrize("form", ["sgd", "amsgrad", "rmsprop", "adagrad"])
def test_step_of_nothing(form):
    """No parameters; none with elements, whose steps are counted all the same."""
    Step(form, []).run()
    made = Step(form, [(0,), (0, 3)])
    made.run()
    assert [float(t) for t in made.steps] == [1, 8][: len(made.steps)]


def test_step_table_follows_the_tensors(monkeypatch):
    """Uploaded once while the tensors stay, again when one moves or another size comes; the oldest is dropped."""
    monkeypatch.setattr(tables, "_KEPT", 2)
    tables._tables.clear()
    p, g = torch.ones(3), torch.ones(3)
    kept = []  # so that no address is given away twice
    for _ in range(3):
        run_as("sgd", [p], [g], lr=0.125)
    assert len(tables._tables) == 1 and torch.equal(p, torch.full((3,), 0.625))
    for _ in range(4):
        kept.append(g)
        g = torch.ones(3)
        run_as("sgd", [p], [g], lr=0.125)
    assert len(tables._tables) == 2 and torch.equal(p, torch.full((3,), 0.125))
    run_as("sgd", [p[:2]], [g[:2]], lr=0.125)
    assert p.tolist() == [0, 0, 0.125]


def test_step_captured_with_new_addresses(monkeypatch):
    """Nothing pinned is allocated meanwhile, and what a graph copies from at each replay is never written again. Two sets of
    tensors in a step, of two dtypes."""

    def made():
        step_of = Step("adam", [(5,), (3, 2), (7,)])
        for lists in (step_of.params, step_of.grads, *step_of.states[:2]):
            lists[1] = lists[1].double()
        return step_of

    def run_and_compare(one):
        wanted = one.wanted()
        one.run()
        one.compare(wanted)

    def refuse(size, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    plain = tables._pinned
    monkeypatch.setattr(tables, "_reserve", tables.Reserve())
    monkeypatch.setattr(tables, "_captured", [])
    kept = [made() for _ in range(4)]  # so that no address is given away twice
    run_and_compare(kept[0])
    for one in kept[1:3]:
        captured = len(tables._captured)
        monkeypatch.setattr(launch, "captures", lambda like: True)
        monkeypatch.setattr(tables, "_pinned", refuse)
        run_and_compare(one)
        uploads = [upload for owned in tables._captured[captured:] for upload in owned[:2]]
        assert len(uploads) == 4 and tables._reserve.left == 0
        monkeypatch.setattr(tables, "_pinned", plain)
        monkeypatch.setattr(launch, "captures", lambda like: False)
        run_and_compare(kept[0])
        assert tables._reserve.left == tables._reserve.needed > 0
    everything = [upload.host for owned in tables._captured for upload in owned[:2]]
    before = [host.clone() for host in everything]
    monkeypatch.setattr(launch, "captures", lambda like: True)
    monkeypatch.setattr(tables, "_pinned", plain)
    run_and_compare(kept[3])
    assert len({host.data_ptr() for host in everything if len(host)}) == len(everything) == 8
    assert all(map(torch.equal, everything, before))


def test_step_captured_without_one_before(monkeypatch):
    """Then torch is asked for pinned memory after all; and a table that is there already is used as it is."""
    asked, plain = [], tables._pinned
    monkeypatch.setattr(tables, "_reserve", tables.Reserve())
    monkeypatch.setattr(tables, "_captured", [])
    monkeypatch.setattr(tables, "_pinned", lambda size, device: asked.append(size) or plain(size, device))
    first, second = Step("sgd", [(5,), (3, 2)]), Step("sgd", [(5,), (3, 2)])
    monkeypatch.setattr(launch, "captures", lambda like: True)
    first.run()
    assert asked == [128, 16] and tables._reserve.needed == 0
    monkeypatch.setattr(launch, "captures", lambda like: False)
    second.run()
    assert asked == [128, 16, 144]
    monkeypatch.setattr(launch, "captures", lambda like: True)
    second.run()
    assert asked == [128, 16, 144] and tables._reserve.left == 144 and len(tables._captured) == 2


def test_step_table_knows_which_states():
    """Two rules with as many arrays at the same addresses keep their states in other places."""
    made = Step("rmsprop momentum", [(5,)])
    wanted = made.wanted()
    made.run()
    made.compare(wanted)
    made.options = {k: v for k, v in made.options.items() if k != "momentum"} | dict(momentum=0.0, centered=True)
    made.states = [made.states[0], None, made.states[1]]
    made.states[2][0].zero_()
    wanted = made.wanted()
    made.run()
    made.compare(wanted)


def test_memory_shared_by_two_parameters():
    """Updated one after the other, as without a kernel."""
    memory = torch.ones(8)
    run_as("sgd", [memory[:6], memory[2:]], [torch.ones(6), torch.ones(6)])
    torch.testing.assert_close(memory, torch.tensor([0.9, 0.9, 0.8, 0.8, 0.8, 0.8, 0.9, 0.9]))


def test_a_parameter_listed_twice():
    """Two steps, the second with the next count."""
    twice, once = Step("adam decay", [(5,)]), Step("adam decay", [(5,)])
    for ts in (twice.params, twice.grads, *twice.states[:2], twice.steps):
        ts *= 2
    twice.run()
    once.run()
    wanted = once.wanted()
    once.run()
    once.compare(wanted)
    assert torch.equal(twice.params[0], once.params[0]) and twice.steps[0] == 2


@pytest.mark.parametrize("count", [torch.float32, torch.float64], ids=["fp32 counts", "fp64 counts"])
def test_count_shared_by_two_parameters(count):
    made = Step("adam", [(5,), (4,)], count=count)
    made.steps[1] = made.steps[0]
    wanted = made.wanted()
    made.steps[0].fill_(1)
    second = made.wanted()
    made.steps[0].zero_()
    made.run()
    close(made.params[0], wanted[0][0], 1e-6, 1e-6)
    close(made.params[1], second[0][1], 1e-6, 1e-6)
    assert made.steps[0] == 2


OPTIMIZERS = {
    "ABSGD": ("SGD", dict(lr=0.1, momentum=0.9)),
    "ABAdam": ("Adam", dict(lr=0.1, amsgrad=True)),
    "ABAdamW": ("AdamW", dict(lr=0.1)),
    "ABRMSprop": ("RMSprop", dict(lr=0.1, momentum=0.5, centered=True)),
    "ABAdagrad": ("Adagrad", dict(lr=0.1, lr_decay=0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_the_optimizers(name):
    """Three of each optimizer of the package by these kernels, beside torch's own."""
    theirs, options = OPTIMIZERS[name]
    ours = [torch.nn.Parameter(torch.linspace(-1, 1, 7).view(s)) for s in ((7,), (7, 1))]
    exact = [torch.nn.Parameter(p.detach().double()) for p in ours]
    pair = getattr(ab, name)(ours, backend="triton", **options), getattr(torch.optim, theirs)(exact, **options)
    for k in range(3):
        for params, optimizer in zip((ours, exact), pair):
            for p in params:
                p.grad = (p.detach() - 0.3 * k).cos()
            optimizer.step()
    for p, q in zip(ours, exact):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)


# ---- the weighted step, through the public function ------------------------------------------------------------------------


def weighted_twice(params, buffers, grads, losses, log_s=-INF, **options):
    """Two steps, each against plain torch in float64 from the same place; the last log s."""
    options = dict(lam=-0.75, lr=0.125, weight_decay=0.25) | options
    near = {
        torch.float64: 1e-13,
        torch.float32: 2e-6,
        torch.bfloat16: 2**-7,
        torch.float16: 2**-9,
    }  # twice a rounding: it cuts off
    for _ in range(2):
        exact = [[t.double() for t in ts] for ts in (params, buffers, grads, [losses])]
        wanted = weighted_momentum_step_(*exact[:3], exact[3][0], log_s, **options, backend="reference")
        log_s = weighted_momentum_step_(params, buffers, grads, losses, log_s, **options, backend="triton")
        close(log_s, wanted.double(), near[log_s.dtype], near[log_s.dtype])
        for t, e in zip([*params, *buffers], exact[0] + exact[1]):
            close(t, e, near[t.dtype], min(near[t.dtype], 2e-6))
    return log_s


def weighted_lists(dtype, batch, shapes=((0,), (5, 3), (), (8,))):
    shapes = [*shapes, (weighted._BYTES // dtype.itemsize + 1,)]
    params, buffers = ([torch.randn(s).to(d) for s in shapes] for d in (dtype, wide(dtype)))
    return params, buffers, [torch.randn(batch, *s).to(dtype) for s in shapes], torch.rand(batch, dtype=wide(dtype))


WEIGHTED = {
    "momentum": {},
    "plain": dict(momentum=0.0, weight_decay=0.0),
    "nesterov": dict(nesterov=True, mix=0.5),
    "heavy ball": dict(heavy_ball=True, maximize=True),
    "dampening": dict(dampening=0.5, normalizer="batch"),
    "inf": dict(lam=INF, max_weight=0.5),
    "in tensors": dict(lam=torch.tensor(0.75), lr=torch.tensor([0.125]), init="zero", max_weight=1.5),
}


@pytest.mark.parametrize("options", WEIGHTED)
def test_weighted_step(options, dtype, launches):
    """11 rows, 8 at a time: one masked and one without weight, both of NaN."""
    torch.manual_seed(0)
    lists = weighted_lists(dtype, 11)
    mask, weight = torch.arange(11) != 4, torch.linspace(0, 2, 11, dtype=wide(dtype))
    for g in lists[2]:
        g[4] = g[0] = NAN
    weighted_twice(*lists, mask=mask, sample_weight=weight, **WEIGHTED[options])


def test_weighted_step_of_a_bad_row_writes_nothing(launches):
    params, buffers, grads, losses = weighted_lists(torch.float32, 5)
    log_s = weighted_twice(params, buffers, grads, losses)
    before = [t.clone() for t in params + buffers]
    losses[2] = NAN
    assert torch.equal(weighted_momentum_step_(params, buffers, grads, losses, log_s, lam=0.5, lr=0.1, backend="triton"), log_s)
    assert all(torch.equal(a, b) for a, b in zip(before, params + buffers))


def test_weighted_step_of_no_rows():
    assert weighted_twice(*weighted_lists(torch.float32, 0), torch.tensor(0.5)) == 0.5


def test_weighted_step_layouts():
    """Gaps, rows of a wider block, an odd address, several dtypes at once; a tensor listed twice is refused."""
    torch.manual_seed(0)
    params, buffers, grads, losses = weighted_lists(torch.float32, 5)
    more = weighted_lists(torch.bfloat16, 5)
    params += [p.clone() for p in more[0]] + [torch.randn(6, 2)[:, 0], torch.randn(8)[1:]]
    buffers += more[1] + [torch.randn(6), torch.randn(14)[::2]]
    grads += more[2] + [torch.randn(6, 5).t(), torch.randn(5, 9)[:, 1:8]]
    weighted_twice(params, buffers, grads, losses)
    with pytest.raises(ValueError, match=r"params\[0\], params\[1\]: share memory"):
        weighted_momentum_step_(
            [params[1]] * 2, [buffers[1], buffers[1].clone()], [grads[1]] * 2, losses, 0.0, lam=1.0, lr=0.1, backend="triton"
        )
