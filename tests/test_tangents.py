"""Tangents that are followed beside a training forward: against per-sample gradients in float64, or not followed at all."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from absgd_fast import meta
from absgd_fast._tangents import Tangents, Unknown
from absgd_fast.meta import l2rw_loss, l2rw_weights

pytestmark = pytest.mark.usefixtures("one_thread")
B, M, C = 8, 5, 3
cross_entropy = nn.CrossEntropyLoss(reduction="none")


def setting(forward, *layers, shape=(2, 6, 6), dtype=torch.float64):
    """A model of these layers by this forward(x, *layers), a batch and a clean one."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            return forward(x, *self.layers)

    torch.manual_seed(3)
    model = Model().to(dtype)
    for p in model.parameters():
        nn.init.normal_(p, 0.1, 0.5)
    x, y = torch.randn(B + M, *shape, dtype=dtype), torch.arange(B + M) % C
    return model, (x[:B], y[:B]), (x[B:], y[B:])


def by_samples(model, batch, clean):
    """u by one forward and backward for each sample, all of the whole batch: what BatchNorm mixes counts too."""
    model = copy.deepcopy(model)
    params = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(cross_entropy(model(clean[0]), clean[1]).mean(), params, allow_unused=True)

    def row(i):
        return torch.autograd.grad(cross_entropy(model(batch[0]), batch[1])[i], params, allow_unused=True)

    rows = [row(i) for i in range(B)]
    return torch.stack([sum((a * b).sum() for a, b in zip(row, grads) if a is not None and b is not None) for row in rows])


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes of their own over the training batch."""
    found, along = [], meta._Step._along

    def counted(self, *args):
        found.append(1)
        return along(self, *args)

    monkeypatch.setattr(meta._Step, "_along", counted)
    return found


def weights_of(call, model, batch, clean, loss=cross_entropy):
    if call is l2rw_weights:
        return l2rw_weights(model, loss, batch, clean)
    return l2rw_loss(model, loss, batch, clean, return_weights=True)[1]


def assert_as_defined(call, model, batch, clean, loss):
    wanted = l2rw_weights(model, loss, batch, clean, "unrolled")
    torch.testing.assert_close(weights_of(call, model, batch, clean, loss), wanted, rtol=1e-9, atol=1e-12)


def assert_right(call, model, batch, clean):
    u = by_samples(model, batch, clean).clamp(min=0)
    assert 1 < (u > 0).sum() < B
    torch.testing.assert_close(weights_of(call, model, batch, clean), u / u.sum(), rtol=1e-9, atol=1e-12)


# ---- followed -----------------------------------------------------------------------------------------------------------

conv, same, head = partial(nn.Conv2d, 2, 4, 3), partial(nn.Conv2d, 4, 4, 3, padding=1), partial(nn.Linear, 64, C)


def residual(x, a, b, last):
    h = F.relu(a(x))
    return last((h + b(h)).flatten(1))


def in_place(x, a, b, last):
    h = F.relu(a(x), inplace=True)
    y = b(h)
    y += h
    return last(torch.relu_(y).flatten(1))


def padded(x, a, last):
    h = F.pad(a(x), (1, 1, 1, 1), value=2.0)
    return last(F.avg_pool2d(F.relu(h[:, :, :-2, 2:] + 1), 2).reshape(len(x), -1))


def without_grad(x, a, b, last):
    h = a(x)
    with torch.no_grad():
        gate = h.sigmoid()
    return last((gate * h + b(h.detach().clamp(max=1))).flatten(1))


def random(x, a, last):
    h = F.dropout(a(x), 0.5)
    return last(F.rrelu(h, 0.1, 0.9, training=True).flatten(1) * torch.rand(len(x), 1, dtype=x.dtype))


def several(x, a, last):
    one, two = a(x).chunk(2, 1)
    values, _ = torch.cat([one * two, one.exp(), torch.stack([two[:, 0], two[:, 1]], 1).tanh()], 1).max(3)
    return last(F.layer_norm(values, values.shape[2:]).flatten(1)).tanh()


def normed_checkpoint(x, a, n, last):
    return last(checkpoint(lambda z: n(a(z)).relu(), x, use_reentrant=False).flatten(1))


def selective_checkpoint(x, a, b, last):
    kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    return last(checkpoint(lambda z: b(a(z).tanh()).tanh(), x, use_reentrant=False, context_fn=kept).flatten(1))


FOLLOWED = {
    "residual": lambda: setting(residual, conv(), same(bias=False), head()),
    "in place": lambda: setting(in_place, conv(), same(), head()),
    "padded": lambda: setting(padded, conv(), nn.Linear(16, C)),
    "no_grad": lambda: setting(without_grad, conv(), nn.Conv2d(4, 4, 1), head()),
    "several": lambda: setting(several, conv(), nn.Linear(24, C)),
    "1d": lambda: setting(lambda x, a, last: last(F.relu(a(x)).mean(2)), nn.Conv1d(2, 5, 3), nn.Linear(5, C), shape=(2, 9)),
    "3d": lambda: setting(
        lambda x, a, last: last(a(x).relu().flatten(1)), nn.Conv3d(1, 2, 2, groups=1), nn.Linear(16, C), shape=(1, 3, 3, 3)
    ),
    "groups": lambda: setting(residual, conv(), same(groups=2, dilation=1, padding_mode="circular"), head()),
    "norm": lambda: setting(lambda x, a, n, last: last(n(a(x)).relu().flatten(1)), conv(), nn.BatchNorm2d(4), head()),
    "norm first": lambda: setting(lambda x, n, a, last: last(a(n(x)).relu().flatten(1)), nn.BatchNorm2d(2), conv(), head()),
    "norm without parameters": lambda: setting(
        lambda x, a, n, last: last(n(a(x)).tanh().flatten(1)), conv(), nn.BatchNorm2d(4, affine=False), head()
    ),
    "norm in evaluation": lambda: setting(
        lambda x, a, n, last: last(n(a(x)).relu().flatten(1)), conv(), nn.BatchNorm2d(4).eval(), head()
    ),
    "instances": lambda: setting(
        lambda x, a, n, last: last(n(a(x)).relu().flatten(1)), conv(), nn.InstanceNorm2d(4, affine=True), head()
    ),
    "checkpoint": lambda: setting(
        lambda x, a, last: last(checkpoint(a, x, use_reentrant=False).relu().flatten(1)), conv(), head()
    ),
    "checkpoint with a norm": lambda: setting(normed_checkpoint, conv(), nn.BatchNorm2d(4), head()),
    "selective checkpoint": lambda: setting(selective_checkpoint, conv(), same(), head()),
    "arguments by name": lambda: setting(
        lambda x, a, last: F.linear(input=torch.flatten(input=a(x), start_dim=1), weight=last.weight, bias=last.bias),
        conv(),
        head(),
    ),
}


@pytest.mark.parametrize("call", [l2rw_weights, l2rw_loss])
@pytest.mark.parametrize("name", FOLLOWED)
def test_tangents_that_are_followed(call, name, passes):
    """Every rule, one term of each at least that a wrong rule would leave out, and no other pass."""
    model, batch, clean = FOLLOWED[name]()
    assert_right(call, model, batch, clean)
    assert not passes


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "1.weight", "1.bias"])
def test_parts_that_are_frozen(frozen, passes):
    """A term of a rule is 0, and the others are not."""
    for name in ("norm", "residual", "groups"):
        model, batch, clean = FOLLOWED[name]()
        if f"layers.{frozen}" in dict(model.named_parameters()):
            model.get_parameter(f"layers.{frozen}").requires_grad_(False)
            assert_right(l2rw_loss, model, batch, clean)
    assert not passes


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["residual", "norm", "padded"])
def test_single_precision(name, format, passes):
    model, batch, clean = FOLLOWED[name]()
    u = by_samples(model, batch, clean).clamp(min=0)
    model = model.float().to(memory_format=format)
    batch, clean = ((x.float().to(memory_format=format), y) for x, y in (batch, clean))
    w = weights_of(l2rw_loss, model, batch, clean)
    assert float((w - u / u.sum()).abs().sum()) <= 1e-5 and not passes


def test_random_functions_draw_once(passes):
    """The tangents have the masks of the training forward, and the random state is that after one forward."""
    model, batch, clean = setting(random, conv(), head())
    torch.manual_seed(7)
    loss, w = l2rw_loss(model, cross_entropy, batch, clean, return_weights=True)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    wanted = l2rw_weights(model, cross_entropy, batch, clean, "unrolled")
    losses = cross_entropy(model(batch[0]), batch[1])
    assert torch.equal(after, torch.get_rng_state()) and not passes
    torch.testing.assert_close(w, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, (wanted * losses).sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["norm", "checkpoint with a norm", "selective checkpoint"])
def test_the_training_forward_is_untouched(name):
    """Losses, gradients and running statistics to the bit, also where backward computes activations again."""
    model, batch, clean = FOLLOWED[name]()
    theirs = copy.deepcopy(model)
    loss, w = l2rw_loss(model, cross_entropy, batch, clean, return_weights=True)
    loss.backward()
    (w * cross_entropy(theirs(batch[0]), batch[1])).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), theirs.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), theirs.buffers()))


def test_tangents_do_not_outlive_the_step():
    """Without the help of the garbage collector."""
    model, batch, clean = FOLLOWED["residual"]()
    made, learn = [], Tangents._learn

    def noted(self, x, tangent):
        learn(self, x, tangent)
        made.append(weakref.ref(tangent))

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tangents, "_learn", noted)
            l2rw_loss(model, cross_entropy, batch, clean).backward()
        assert made and not any(tangent() is not None for tangent in made)
        assert not any(weakref.getweakrefcount(p) for p in model.parameters())
    finally:
        gc.enable()


def test_inputs_that_require_grad(passes):
    model, (x, y), clean = FOLLOWED["residual"]()
    wanted = weights_of(l2rw_loss, model, (x, y), clean)
    x = x.clone().requires_grad_()
    loss, w = l2rw_loss(model, cross_entropy, (x, y), clean, return_weights=True)
    loss.backward()
    assert torch.equal(w, wanted) and x.grad.abs().sum() > 0 and not passes


# ---- not followed: another pass, or an error, but no wrong weights ---------------------------------------------------------


class Reverse(torch.autograd.Function):
    """Its derivative is not that of its forward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad

    @staticmethod
    def jvp(ctx, tangent):
        return -tangent


def changed_view(x, a, b, last):
    h = a(x)
    view = h[:, :2]
    h.mul_(2)
    return last((h + b(h)).flatten(1)) + view.sum((1, 2, 3))[:, None] * torch.arange(C, dtype=x.dtype)


def into_a_view(x, a, last):
    h = torch.zeros(len(x), 8, 4, 4, dtype=x.dtype)
    h[:, 1::2] = a(x)
    return last(h[:, :4].flatten(1))


def reused(x, a, b, last):
    h = a(x)
    view = h.flatten(1)
    F.relu(h, inplace=True)
    return last(view)


def scripted(x, a, last):
    return last(torch.jit.trace(lambda h: h * h, torch.ones(2, 4, 4, 4, dtype=x.dtype), check_trace=False)(a(x)).flatten(1))


class Twofold(nn.Module):
    def __init__(self, compiled):
        super().__init__()
        self.square = torch.compile(torch.square, backend="eager") if compiled else torch.square

    def forward(self, x):
        return self.square(x)


def into_grad(x, a, last):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        a(x).tanh().square().sum().backward(create_graph=True, inputs=[x])
        return last(x.grad.flatten(1))


def distances(x, a, last):
    rows = x.flatten(1)
    far = F.triplet_margin_with_distance_loss(
        rows, rows.roll(1, 0), -rows, margin=20.0, distance_function=lambda p, q: a(p - q).tanh().sum(1), reduction="none"
    )
    return last(rows).tanh() * far[:, None]


def slopes_of_rows(x, a, last):
    return last(torch.func.vmap(torch.func.grad(lambda row: a(row).sin().sum()))(x.flatten(1)))


NOT_FOLLOWED = {
    "into grad": lambda: setting(into_grad, conv(), nn.Linear(72, C)),
    "a function as argument": lambda: setting(distances, nn.Linear(72, 4), nn.Linear(72, C)),
    "gradients of rows": lambda: setting(slopes_of_rows, nn.Linear(72, 7), nn.Linear(72, C)),
    "custom": lambda: setting(lambda x, a, last: last(F.relu(Reverse.apply(a(x))).flatten(1)), conv(), head()),
    "custom at the end": lambda: setting(lambda x, a, last: Reverse.apply(last(F.relu(a(x)).flatten(1))), conv(), head()),
    "changed view": lambda: setting(changed_view, conv(), same(), head()),
    "into a view": lambda: setting(into_a_view, conv(), head()),
    "view of what changed": lambda: setting(reused, conv(), same(), head()),
    "old values": lambda: setting(lambda x, a, last: last(a(x).mul_(2).tanh().flatten(1)), conv(), head()),
    "scripted": lambda: setting(scripted, conv(), head()),
    "compiled layer": lambda: setting(
        lambda x, a, last: last(a(x).relu().flatten(1)), torch.compile(conv(), backend="eager"), head()
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", [l2rw_weights, l2rw_loss])
@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_what_is_not_followed_has_a_pass_of_its_own(call, name, passes):
    model, batch, clean = NOT_FOLLOWED[name]()
    assert_right(call, model, batch, clean)
    assert passes


def test_one_try_is_enough(passes, monkeypatch):
    """A model whose tangents were lost is not followed again."""
    model, batch, clean = NOT_FOLLOWED["custom at the end"]()
    first = weights_of(l2rw_loss, model, batch, clean)
    monkeypatch.setattr(meta, "Tangents", None)
    assert torch.equal(weights_of(l2rw_loss, model, batch, clean), first) and len(passes) == 2


@pytest.mark.parametrize("call", [l2rw_weights, l2rw_loss])
def test_compiled_functions(call):
    model, batch, clean = setting(lambda x, a, f, last: last(f(a(x)).flatten(1)), conv(), Twofold(True), head())
    assert_right(call, model, batch, clean)


def test_a_loss_that_changes_the_output():
    """In place: the tangents of the output are then those of other numbers."""
    model, batch, clean = FOLLOWED["residual"]()

    def halved(out, y):
        return cross_entropy(out.div_(2), y)

    wanted = l2rw_weights(model, lambda out, y: cross_entropy(out / 2, y), batch, clean)
    torch.testing.assert_close(weights_of(l2rw_loss, model, batch, clean, halved), wanted, rtol=1e-9, atol=1e-12)


def test_a_model_that_differentiates(passes):
    """Its graph is needed within its forward."""

    def slopes(x, a, last):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return last(torch.autograd.grad(a(x).tanh().square().sum(), x, create_graph=True)[0].flatten(1))

    model, batch, clean = setting(slopes, conv(), nn.Linear(72, C))
    for call in (l2rw_weights, l2rw_loss):
        assert_right(call, model, batch, clean)


def without_grad_in_a_loss(out, y):
    with torch.no_grad():
        doubt = 1 - out.softmax(1).gather(1, y[:, None])[:, 0]
    return doubt**2 * cross_entropy(out, y)


@pytest.mark.parametrize("call", [l2rw_weights, l2rw_loss])
@pytest.mark.parametrize("followed", [True, False])
def test_no_grad_makes_constants(call, followed, passes):
    """In the loss, and in a model that has a pass of its own, as in backward."""
    ending = nn.Identity() if followed else Reverse.apply
    model, batch, clean = setting(lambda x, a, b, last: ending(without_grad(x, a, b, last)), conv(), nn.Conv2d(4, 4, 1), head())
    assert_right(call, model, batch, clean)
    assert_as_defined(call, model, batch, clean, without_grad_in_a_loss)
    assert bool(passes) is not followed


@pytest.mark.parametrize("call", [l2rw_weights, l2rw_loss])
def test_an_operator_without_a_forward_derivative_is_refused(call):
    """Of torch.library's operators torch takes it for 0, and does not say so."""
    with torch.library._scoped_library("tests_of_tangents", "FRAGMENT"):

        @torch.library.custom_op("tests_of_tangents::square", mutates_args=())
        def square(x: torch.Tensor) -> torch.Tensor:
            return x * x

        square.register_autograd(
            lambda ctx, grad: 2 * ctx.saved_tensors[0] * grad,
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
        )
        model, batch, clean = setting(lambda x, a, last: last(square(a(x)).flatten(1)), conv(), head())
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no forward derivative of .*square.*finite_difference"):
                weights_of(call, model, batch, clean)


def test_outputs_that_are_no_numbers_of_the_loss(passes):
    """None, a number, and a tensor of inference mode, which has no version."""

    def forward(x, a, last):
        with torch.inference_mode():
            size = a(x).square().sum()
        return last(a(x).flatten(1)), None, 3, size

    def loss(out, y):
        return cross_entropy(out[0], y)

    model, batch, clean = setting(forward, conv(), head())
    for call in (l2rw_weights, l2rw_loss):
        assert_as_defined(call, model, batch, clean, loss)
    assert not passes


def test_several_outputs(passes):
    model, batch, clean = setting(
        lambda x, a, last: {"logits": last(a(x).flatten(1)), "size": [a(x).square().sum((1, 2, 3))]}, conv(), head()
    )

    def loss(out, y):
        return cross_entropy(out["logits"], y) + 0.1 * out["size"][0]

    for call in (l2rw_weights, l2rw_loss):
        assert_as_defined(call, model, batch, clean, loss)
    assert not passes


def test_a_tensor_of_elsewhere_is_unknown():
    """Not taken for a constant."""
    w = torch.ones(2, requires_grad=True)
    before = w * 2
    with Tangents([(w, torch.ones(2))]) as tangents:
        y = w * w
        assert tangents.of(y).tolist() == [2, 2] and tangents.of(torch.ones(2)) is None
        z = y * before
    assert tangents.lost
    for x in (y, z):
        with pytest.raises(Unknown):
            tangents.of(x)
