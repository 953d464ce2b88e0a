"""L2RW: every method against Algorithm 1 written with a double backward, and all that the extra passes must leave alone."""

import copy
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import absgd_fast as ab
from absgd_fast._exact import ExactState
from absgd_fast.meta import l2rw_loss, l2rw_weights

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ["jvp", "finite_difference", "unrolled", "last_layer"]
B, M, C = 8, 5, 3  # unlike sizes: a mean over the wrong batch shows
cross_entropy = nn.CrossEntropyLoss(reduction="none")


def algorithm_1(model, loss_fn, batch, clean, only=None):
    """Lines 4 to 11, with a step size of 0.3. `only`: the names of the parameters that the step moves; None: all.

    The training pass draws the random numbers that the next forward would draw.
    """
    model = copy.deepcopy(model)
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    (x, y), (x_clean, y_clean) = batch, clean
    with torch.random.fork_rng(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        losses = loss_fn(functional_call(model, theta, x), y)
        eps = torch.zeros_like(losses, requires_grad=True)
        grads = torch.autograd.grad((eps * losses).sum(), theta.values(), create_graph=True, allow_unused=True)
        moves = {n: g for n, g in zip(theta, grads) if g is not None and (only is None or n in only)}
        stepped = {n: p - 0.3 * moves[n] if n in moves else p for n, p in theta.items()}
        (slope,) = torch.autograd.grad(loss_fn(functional_call(model, stepped, x_clean), y_clean).mean(), eps)
    w = (-slope).clamp(min=0)
    return w / (w.sum() if w.sum() > 0 else 1)


# ---- networks ---------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, C)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x).tanh()).tanh())


class HeadFirst(nn.Module):
    """The layer that runs last is registered first; one runs never, one parameter is nobody's."""

    def __init__(self):
        super().__init__()
        self.head, self.body, self.unused = nn.Linear(7, C), nn.Linear(6, 7), nn.Linear(6, C)
        self.loose = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return 2 * self.head(self.body(x).tanh())


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(6, C)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, C)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Drop(nn.Module):
    """Draws a mask for every batch, and applies it to batches of B rows alone: the clean pass is then known to an oracle."""

    def forward(self, x):
        dropped = F.dropout(x, 0.5, self.training)
        return dropped if len(x) == B else x


class Moving(nn.Module):
    """Buffers that a forward writes in place, and that it replaces."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(9))
        self.register_buffer("largest", torch.zeros(9), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls += 1
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.largest = torch.maximum(self.largest, x.detach().abs().amax(0))
        return x


class Criterion(nn.Module):
    """A criterion inside the model: its state tensors are no buffers, and it keeps more than tensors."""

    def __init__(self, options):
        super().__init__()
        self.criterion = eval(f"ab.ABLoss({options})", {"ab": ab, "C": C})

    def forward(self, x):
        labels = x.detach().argmax(1)
        self.criterion(x, labels, **({} if self.criterion.rule is None else {"groups": labels}))
        return x


def frozen():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, C))
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    return model


def bias_alone(model):
    model[-1].weight.requires_grad_(False)
    return model


def conv(norm):
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, C))


class Net(NamedTuple):
    make: object
    shape: tuple = (6,)
    last: tuple = ()  # the last layer's parameters; none where they have another use beside it
    train: bool = True


NETS = {
    "mlp": Net(lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, C)), last=("2.weight", "2.bias")),
    "inplace": Net(
        lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, C, bias=False)), last=("2.weight",)
    ),
    "linear": Net(lambda: nn.Linear(6, C), last=("weight", "bias")),
    "batchnorm": Net(lambda: conv(nn.BatchNorm2d), (2, 6, 6), ("5.weight", "5.bias")),
    "batchnorm, eval": Net(lambda: conv(nn.BatchNorm2d), (2, 6, 6), ("5.weight", "5.bias"), False),
    "average": Net(lambda: conv(partial(nn.BatchNorm2d, momentum=None)), (2, 6, 6), ("5.weight", "5.bias")),
    "layernorm": Net(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, C)), (6,), ("3.weight", "3.bias")
    ),
    "tied": Net(Tied, last=("head.weight", "head.bias")),
    "frozen": Net(frozen, last=("4.weight", "4.bias")),
    "frozen weight": Net(lambda: bias_alone(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, C))), last=("2.bias",)),
    "unused": Net(HeadFirst, last=("head.weight", "head.bias")),
    "transformer": Net(Encoder, (4, 6), ("head.weight", "head.bias")),
    "dropout": Net(
        lambda: nn.Sequential(nn.Linear(6, 9), Drop(), nn.Tanh(), Drop(), nn.Linear(9, C)), (6,), ("4.weight", "4.bias")
    ),
}


def setting(net, dtype=torch.float32):
    """Model, batch and clean batch; the same at every call, running statistics not those of a new model."""
    net = NETS[net] if isinstance(net, str) else net
    torch.manual_seed(3)
    # float64 numbers that are float32 numbers: both precisions have the same problem
    model = net.make().to(dtype)
    batch = torch.randn(B, *net.shape).to(dtype), torch.arange(B) % C
    clean = torch.randn(M, *net.shape).to(dtype), torch.arange(M) % C
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        with torch.no_grad():
            model(2 * batch[0] + 1)
    return model.train(net.train), batch, clean


@pytest.fixture(params=NETS)
def net(request):
    return request.param


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def distance(a, b):
    return float((a - b).abs().sum())


# in float32 a finite difference of float32 losses is asked for no more than this (MATH §4.5)
TOLERANCE = {("finite_difference", d): 1e-2 for d in (torch.float32, torch.float64)}


def tolerance(method, dtype):
    return TOLERANCE.get((method, dtype), 1e-5 if dtype == torch.float32 else 1e-12)


# ---- the weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_are_those_of_algorithm_1(net, method, dtype):
    """Dropout's mask is another in float64, so its oracle keeps the dtype."""
    model, batch, clean = setting(net, dtype)
    exact, batch_64, clean_64 = setting(net, dtype if net == "dropout" else torch.float64)
    only = NETS[net].last if method == "last_layer" else None
    torch.manual_seed(5)
    wanted = algorithm_1(exact, cross_entropy, batch_64, clean_64, only)
    w = l2rw_weights(model, cross_entropy, batch, clean, method=method)
    assert w.shape == (B,) and w.dtype == dtype and not w.requires_grad
    assert (w >= 0).all() and float(w.sum()) == pytest.approx(1, abs=1e-6)
    assert 1 < (wanted > 0).sum() < B  # some help and some do not: the clamp shows
    assert distance(w, wanted) <= tolerance(method, dtype)


def test_the_default_is_jvp():
    model, batch, clean = setting("mlp")
    assert torch.equal(l2rw_weights(model, cross_entropy, batch, clean), l2rw_weights(model, cross_entropy, batch, clean, "jvp"))


def test_the_oracle_tells_the_last_layer_from_all():
    """Otherwise the restriction was tested against nothing."""
    for net in ("mlp", "batchnorm", "layernorm", "dropout"):
        torch.manual_seed(5)
        model, batch, clean = setting(net)
        wanted = [algorithm_1(model, cross_entropy, batch, clean, only) for only in (None, NETS[net].last, NETS[net].last[:1])]
        assert distance(wanted[0], wanted[1]) > 0.05 and distance(wanted[1], wanted[2]) > 1e-3


def test_equation_12():
    """sum over layers of (features . clean features) (output gradient . clean output gradient), a bias being a feature of 1."""
    model, batch, clean = setting("mlp", torch.float64)

    def parts(x, y):
        features = [x, model[1](model[0](x))]
        z = [model[0](x)]
        z.append(model[2](model[1](z[0])))
        grads = torch.autograd.grad(cross_entropy(z[1], y).sum(), z)
        return [(torch.cat([f, torch.ones(len(f), 1)], 1), g) for f, g in zip(features, grads)]

    products = [(f @ fv.T) * (g @ gv.T) for (f, g), (fv, gv) in zip(parts(*batch), parts(*clean))]
    for u, methods in ((sum(products).mean(1), ["jvp", "unrolled"]), (products[1].mean(1), ["last_layer"])):
        wanted = u.clamp(min=0) / u.clamp(min=0).sum()
        for method in methods:
            w = l2rw_weights(model, cross_entropy, batch, clean, method)
            torch.testing.assert_close(w, wanted, rtol=1e-11, atol=1e-13)


def test_numbers_by_hand(method):
    """w = 1, y = 2 x: slopes 2 (w x - y) x of -2, -8, 20 and, for the clean sample, -18: shares 2 : 8 : 0."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    batch = torch.tensor([[1.0], [2.0], [1.0]]), torch.tensor([2.0, 4.0, -9.0])
    w = l2rw_weights(model, squares, batch, (torch.tensor([[3.0]]), torch.tensor([6.0])), method=method)
    torch.testing.assert_close(w, torch.tensor([0.2, 0.8, 0.0]), rtol=0, atol=5e-3 if method == "finite_difference" else 1e-6)


def squares(out, y):
    return (out[:, 0] - y).square()


@pytest.mark.parametrize("method", ["jvp", "unrolled", "last_layer"])
def test_every_loss(case, method):
    """The fused losses against autograd of the same in eager torch; 4 classes, labels 0 to 2 that some of them ignore."""
    net = Net(lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)), last=("2.weight", "2.bias"))
    model, batch, _ = setting(net, torch.float64)
    clean = batch[0][:M] + 0.1, batch[1][:M]  # so that somebody helps, whatever the loss leaves out
    eager = partial(case.eager, **case.tensors(4, torch.float64))
    wanted = algorithm_1(model, eager, batch, clean, net.last if method == "last_layer" else None)
    assert wanted.sum() > 0
    w = l2rw_weights(model, case.module(4), batch, clean, method=method)
    torch.testing.assert_close(w, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [ab.CrossEntropy, ab.Focal, ab.GCE, lambda: cross_entropy], ids=["ce", "focal", "gce", "torch"])
def test_losses_in_single_precision(method, make, one_backend):
    loss = make() if make() is cross_entropy else make(backend=one_backend)
    model, batch, clean = setting("mlp")
    exact = setting("mlp", torch.float64)
    eager = {
        ab.Focal: lambda x, y: (1 - (-cross_entropy(x, y)).exp()) ** 2 * cross_entropy(x, y),
        ab.GCE: lambda x, y: (1 - (-0.7 * cross_entropy(x, y)).exp()) / 0.7,
    }.get(make, cross_entropy)
    wanted = algorithm_1(exact[0], eager, *exact[1:], NETS["mlp"].last if method == "last_layer" else None)
    assert distance(l2rw_weights(model, loss, batch, clean, method=method), wanted) <= tolerance(method, torch.float32)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_unit_of_the_loss(method, scale):
    """The weights do not know it, and so no step of a difference may."""
    model, batch, clean = setting("mlp")
    exact = setting("mlp", torch.float64)
    wanted = algorithm_1(exact[0], cross_entropy, *exact[1:], NETS["mlp"].last if method == "last_layer" else None)
    w = l2rw_weights(model, lambda x, y: scale * cross_entropy(x, y), batch, clean, method=method)
    assert distance(w, wanted) <= tolerance(method, torch.float32)


def test_dropout_belongs_to_the_callers_forward(method):
    """nn.Dropout: the clean pass has masks of its own, the same for every method; the training pass those that come next."""
    net = Net(lambda: nn.Sequential(nn.Linear(6, 30), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(30, C)))
    model, batch, clean = setting(net, torch.float64)
    if method == "last_layer":  # all parameters are the last layer's
        model[0].requires_grad_(False)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    w, jvp = (l2rw_weights(model, cross_entropy, batch, clean, method=m) for m in (method, "jvp"))
    assert torch.equal(torch.get_rng_state(), state)
    assert distance(w, jvp) <= tolerance(method, torch.float64)
    torch.manual_seed(12)
    assert distance(w, l2rw_weights(model, cross_entropy, batch, clean, method=method)) > 0.01  # other masks, other weights


class Seen(nn.Module):
    """Dropout of ones, so that what comes out is the mask; keeps those of every pass."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def forward(self, x):
        mask = F.dropout(torch.ones(len(x), 9), 0.5, self.training)
        self.masks.append(mask)
        return x * mask


def test_whose_masks(method):
    """All training passes have those of the next forward, the clean pass has others."""
    model, batch, clean = setting(Net(lambda: nn.Sequential(nn.Linear(6, 9), Seen(), nn.Linear(9, C))))
    l2rw_weights(model, cross_entropy, batch, clean, method=method)
    masks, (cleans, trains) = model[1].masks, ([m for m in model[1].masks if len(m) == k] for k in (M, B))
    model(batch[0])
    assert trains and cleans and all(torch.equal(m, masks[-1]) for m in trains)
    assert not any(torch.equal(m, masks[-1][:M]) for m in cleans)


def test_recurrent_networks(method):
    """An LSTM, which torch may not differentiate forward."""
    net = Net(LSTM, (4, 6), ("head.weight", "head.bias"))
    model, batch, clean = setting(net)
    w = or_refused(method, lambda: l2rw_weights(model, cross_entropy, batch, clean, method=method))
    wanted = algorithm_1(model, cross_entropy, batch, clean, net.last if method == "last_layer" else None)
    assert w is None or distance(w, wanted) <= tolerance(method, torch.float32)


def or_refused(method, call):
    """call(), or None where it raises that jvp cannot be had and says what can."""
    try:
        return call()
    except RuntimeError as e:
        assert method == "jvp" and "finite_difference" in str(e), e


class Cube(torch.autograd.Function):
    """No forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Cubes(nn.Module):
    def forward(self, x):
        return Cube.apply(x)


def test_what_torch_cannot_differentiate_forward(method):
    """jvp says so and leaves the model as it was; the other methods have no need of it."""
    net = Net(lambda: nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), Cubes(), nn.Linear(9, C)), last=("3.weight", "3.bias"))
    model, batch, clean = setting(net)
    if method == "jvp":
        before = snapshot(model)
        with pytest.raises(RuntimeError, match="finite_difference"):
            l2rw_weights(model, cross_entropy, batch, clean, method=method)
        assert_same(before, snapshot(model))
        with pytest.raises(RuntimeError, match="finite_difference"):
            l2rw_loss(model, cross_entropy, batch, clean, method=method)
    else:
        exact = setting(net, torch.float64)
        wanted = algorithm_1(exact[0], cross_entropy, *exact[1:], net.last if method == "last_layer" else None)
        w = l2rw_weights(model, cross_entropy, batch, clean, method=method)
        assert distance(w, wanted) <= tolerance(method, torch.float32)


def test_under_no_grad(net, method):
    model, batch, clean = setting(net)
    torch.manual_seed(5)
    w = l2rw_weights(model, cross_entropy, batch, clean, method=method)
    with torch.no_grad():
        assert torch.equal(l2rw_weights(model, cross_entropy, batch, clean, method=method), w)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("net", ["mlp", "batchnorm", "transformer"])
def test_autocast(net, method):
    """bf16 products keep 8 bits, 0.4 %: of u, a sum of inner products of either sign over two or three layers, a few percent
    of the largest remain, and |w - w*|_1 is at most twice the relative error of u: 0.15."""
    model, batch, clean = setting(net)
    exact = setting(net, torch.float64)
    wanted = algorithm_1(exact[0], cross_entropy, *exact[1:], NETS[net].last if method == "last_layer" else None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        w = l2rw_weights(model, cross_entropy, batch, clean, method=method)
        loss = l2rw_loss(model, cross_entropy, batch, clean, method=method)
    assert w.isfinite().all() and float(w.sum()) == pytest.approx(1, abs=1e-2)
    assert distance(w.double(), wanted) <= 0.15
    loss.backward()
    # a mean of losses that are each known to 1 %, by weights that are known as above
    losses = cross_entropy(exact[0](exact[1][0]), exact[1][1]).detach()
    assert abs(float(loss.detach()) - float((wanted * losses).sum())) <= 0.15 * float(losses.max())
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_training_sample(method, bad):
    """Its weight is NaN, the others are those without it; but for the definition, whose step goes through all samples at once:
    there all are NaN."""
    model, (x, y), clean = setting("mlp")
    x = x.clone()
    x[2, 3] = bad

    def loss(out, y):
        return cross_entropy(out, y) + 0 * out.sum(1)  # tanh(inf) = 1 is as good as any

    if bad == float("inf"):
        model[1] = nn.Identity()
    rest = [0, 1, 3, 4, 5, 6, 7]
    wanted = l2rw_weights(model, loss, (x[rest], y[rest]), clean, method=method)
    w = l2rw_weights(model, loss, (x, y), clean, method=method)
    assert w[2].isnan() and wanted.isfinite().all()
    if method == "unrolled":
        assert w.isnan().all()
        return
    # the step of the difference may differ with the batch
    assert distance(w[rest], wanted) <= (2e-2 if method == "finite_difference" else 1e-6)


def test_a_bad_clean_sample(method):
    """Nothing is known of any sample: not zeros, which would pass for "nobody helps"."""
    model, batch, (x, y) = setting("mlp")
    assert l2rw_weights(model, cross_entropy, batch, (x * float("nan"), y), method=method).isnan().all()


# ---- what is left alone -----------------------------------------------------------------------------------------------


def snapshot(model):
    """Everything that a pass could leave behind, bit for bit."""
    parameters = dict(model.named_parameters())
    hooks = [
        len(getattr(m, k))
        for m in model.modules()
        for k in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    return {
        "parameters": {n: p.detach().clone() for n, p in parameters.items()},
        "identity": {n: (id(p), p.data_ptr(), p.is_leaf, p.requires_grad) for n, p in parameters.items()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "state": {n: b.nan_to_num(7e30) for n, b in model.state_dict().items()},
        "numbers": [repr(found[1:]) for m in model.modules() if isinstance(m, ExactState) for found in m.also_changed()],
        "modes": [m.training for m in model.modules()],
        "hooks": hooks,
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(before, after):
    def bits(x):
        return {k: bits(v) for k, v in x.items()} if isinstance(x, dict) else x.tolist() if torch.is_tensor(x) else x

    for what in before:
        assert bits(after[what]) == bits(before[what]), what


def normed(norm):
    return nn.Sequential(norm(nn.Linear(6, 9)), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.Tanh(), nn.Linear(9, C))


HOOKED = {
    "spectral_norm": Net(lambda: normed(nn.utils.parametrizations.spectral_norm)),
    "spectral_norm, hooks": Net(lambda: normed(nn.utils.spectral_norm)),
    "weight_norm": Net(lambda: normed(nn.utils.parametrizations.weight_norm)),
}
STATEFUL = {
    "moving": Net(lambda: nn.Sequential(nn.Linear(6, 9), Moving(), nn.Tanh(), nn.Linear(9, C))),
    **{
        f"criterion, {options}": Net(lambda o=options: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, C), Criterion(o)))
        for options in ("lam=0.5", "lam=ab.RelativeLam(0.5)", "lam=0.5, deferred=True", "rule=ab.weights.GroupDRO(C)")
    },
}
LEFT = NETS | STATEFUL | HOOKED


@pytest.mark.parametrize("net", LEFT)
@pytest.mark.parametrize("grad", [None, 0.5])
def test_weights_leave_everything_alone(net, method, grad):
    """Power iterations, running statistics, num_batches_tracked, masks, .grad that is None or is not."""
    model, batch, clean = setting(LEFT[net])
    for p in model.parameters():
        p.grad = None if grad is None else torch.full_like(p, grad)
    model.register_forward_hook(lambda *_: None)
    torch.manual_seed(5)
    before, x = snapshot(model), batch[0].clone()
    call = partial(l2rw_weights, model, cross_entropy, batch, clean, method=method)
    w = or_refused(method, call) if net in HOOKED else call()
    assert w is None or w.isfinite().all()
    assert_same(before, snapshot(model))
    assert torch.equal(batch[0], x) and not batch[0].requires_grad and torch.is_grad_enabled()


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_an_error_leaves_everything_alone(method, fails):
    """A loss_fn that fails at its first, second or third call."""
    net = Net(lambda: nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.Linear(9, C)))
    model, batch, clean = setting(net)
    calls = []

    def loss(out, y):
        calls.append(1)
        if len(calls) > fails:
            raise KeyError("mine")
        return cross_entropy(out, y)

    before = snapshot(model)
    try:
        l2rw_weights(model, loss, batch, clean, method=method)
    except KeyError:
        assert_same(before, snapshot(model))
    else:
        assert fails == 2 and method != "finite_difference"  # two passes are enough for the others


# ---- l2rw_loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", LEFT)
def test_loss_is_a_plain_step_with_these_weights(net, method):
    """Value and gradient of sum w L with w held constant; statistics and random state exactly those of one plain forward."""
    model, batch, clean = setting(LEFT[net], torch.float64)
    plain, _, _ = setting(LEFT[net], torch.float64)
    torch.manual_seed(5)
    call = partial(l2rw_weights, model, cross_entropy, batch, clean, method=method)
    w = or_refused(method, call) if net in HOOKED else call()
    if w is None:
        assert or_refused(method, partial(l2rw_loss, model, cross_entropy, batch, clean, method=method)) is None
        return
    losses = cross_entropy(plain(batch[0]), batch[1])
    wanted = (w * losses).sum()
    wanted.backward()
    state = torch.get_rng_state()
    torch.manual_seed(5)
    loss = l2rw_loss(model, cross_entropy, batch, clean, method=method)
    assert loss.shape == () and loss.dtype == torch.float64
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    for (name, mine), theirs in zip(model.state_dict().items(), plain.state_dict().values()):
        assert torch.equal(mine, theirs), name
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters()):
        if theirs.grad is None:
            assert mine.grad is None or not mine.grad.any(), name
        else:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-13)


def test_loss_in_single_precision(net, method):
    """Statistics in the float32 of every day too: exactly those of a plain forward."""
    model, batch, clean = setting(net)
    plain, _, _ = setting(net)
    torch.manual_seed(5)
    w = l2rw_weights(model, cross_entropy, batch, clean, method=method)
    wanted = (w * cross_entropy(plain(batch[0]), batch[1])).sum()
    torch.manual_seed(5)
    loss = l2rw_loss(model, cross_entropy, batch, clean, method=method)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers()))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, 0.01),
        lambda p: ab.ABSGD(p, 0.1, momentum=0.9),
    ],
    ids=["sgd", "adamw", "absgd"],
)
def test_three_steps_of_an_optimizer(method, make):
    """Each like a step on the oracle's weights; .grad of the step before is still there when the weights are taken."""
    mine, batch, clean = setting("batchnorm", torch.float64)
    theirs, _, _ = setting("batchnorm", torch.float64)
    optimizers = make(mine.parameters()), make(theirs.parameters())
    for _ in range(3):
        w = l2rw_weights(theirs, cross_entropy, batch, clean, method)
        if method != "finite_difference":
            only = NETS["batchnorm"].last if method == "last_layer" else None
            torch.testing.assert_close(w, algorithm_1(theirs, cross_entropy, batch, clean, only), rtol=1e-9, atol=1e-12)
        loss = l2rw_loss(mine, cross_entropy, batch, clean, method)
        for optimizer, value in zip(optimizers, (loss, (w * cross_entropy(theirs(batch[0]), batch[1])).sum())):
            optimizer.zero_grad(set_to_none=False)
            value.backward()
            optimizer.step()
    for a, b in zip(mine.state_dict().values(), theirs.state_dict().values()):
        # Adam divides by the root of squares of what may be 1e-17 instead of 0
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_gradients_accumulate():
    """A second l2rw_loss adds to .grad, and takes nothing from it."""
    model, batch, clean = setting("mlp", torch.float64)
    l2rw_loss(model, cross_entropy, batch, clean).backward()
    once = [p.grad.clone() for p in model.parameters()]
    l2rw_loss(model, cross_entropy, batch, clean).backward()
    for p, g in zip(model.parameters(), once):
        torch.testing.assert_close(p.grad, 2 * g, rtol=1e-12, atol=0)


def test_nobody_helps(method):
    """All inputs positive, targets far above, the clean target far below: weights and gradient exactly 0, and a step of SGD
    still goes on by momentum and decay."""
    model = nn.Linear(2, 1)
    batch = torch.rand(B, 2) + 0.5, torch.full((B,), 10.0)
    clean = torch.rand(M, 2) + 0.5, torch.full((M,), -10.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    squares(model(batch[0]), batch[1]).mean().backward()
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    assert l2rw_weights(model, squares, batch, clean, method=method).tolist() == [0] * B
    optimizer.zero_grad()
    loss = l2rw_loss(model, squares, batch, clean, method=method)
    loss.backward()
    assert loss == 0 and all(p.grad.tolist() == torch.zeros_like(p).tolist() for p in model.parameters())
    optimizer.step()
    for p, old, m in zip(model.parameters(), before, momentum):
        torch.testing.assert_close(p.detach(), old - 0.01 * (0.9 * m + 0.1 * old))
        assert not torch.equal(p, old)


@pytest.mark.parametrize("method", ["jvp", "finite_difference", "unrolled"])
def test_parameters_that_no_loss_depends_on(method):
    """All gradients are 0, and so are the weights."""
    model, batch, clean = setting("unused")
    model.requires_grad_(False)
    model.unused.requires_grad_(True)
    assert l2rw_weights(model, cross_entropy, batch, clean, method=method).tolist() == [0] * B


# ---- bad input --------------------------------------------------------------------------------------------------------


def frozen_wholly():
    return setting("mlp")[0].requires_grad_(False)


class Tokens(nn.Module):
    """The last layer sees the four tokens of all samples as rows."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, C)

    def forward(self, x):
        return self.head(x.reshape(-1, 6)).view(len(x), 4, C).mean(1)


X, Y = torch.randn(B, 6), torch.arange(B) % C
BAD = {
    "method": (dict(method="reverse"), "method"),
    "method in capitals": (dict(method="JVP"), "method"),
    "batch of one": (dict(batch=(X,)), "batch"),
    "batch of three": (dict(batch=(X, Y, Y)), "batch"),
    "clean batch of one": (dict(clean_batch=(X,)), "clean"),
    "targets": (dict(batch=(X, Y[:5])), "5"),
    "clean targets": (dict(clean_batch=(X, Y[:5])), "5"),
    "empty clean batch": (dict(clean_batch=(X[:0], Y[:0])), "clean"),
    "shape of the clean inputs": (dict(clean_batch=(X[:, :4], Y)), "clean"),
    "mean": (dict(loss_fn=nn.CrossEntropyLoss()), "reduction=.none"),
    "our mean": (dict(loss_fn=ab.CrossEntropy(reduction="mean")), "reduction=.none"),
    "nothing to train": (dict(model=frozen_wholly()), "requires? grad|requires_grad|trainable"),
    "bfloat16": (
        dict(
            model=setting("mlp", torch.bfloat16)[0],
            batch=(X.bfloat16(), Y),
            clean_batch=(X.bfloat16(), Y),
            method="finite_difference",
        ),
        "bfloat16|float32",
    ),
    "float16": (
        dict(model=setting("mlp", torch.float16)[0], batch=(X.half(), Y), clean_batch=(X.half(), Y), method="finite_difference"),
        "float16|float32",
    ),
    "rows that are no samples": (
        dict(model=Tokens(), batch=(torch.randn(B, 4, 6), Y), clean_batch=(torch.randn(B, 4, 6), Y), method="last_layer"),
        "last_layer|last layer",
    ),
    "no parameters in the last layer": (dict(model=nn.Tanh(), method="last_layer"), "param|layer|train"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("call", [l2rw_weights, l2rw_loss])
def test_bad_input_is_named(call, name):
    changed, names = BAD[name]
    arguments = dict(model=setting("mlp")[0], loss_fn=cross_entropy, batch=(X, Y), clean_batch=(X[:M], Y[:M])) | changed
    before = snapshot(arguments["model"])
    with pytest.raises(ValueError, match=names):
        call(**arguments)
    if call is l2rw_weights:
        assert_same(before, snapshot(arguments["model"]))


@pytest.mark.parametrize("call", [l2rw_weights, l2rw_loss])
@pytest.mark.parametrize("method", METHODS)
def test_a_mean_is_refused_by_every_method(call, method):
    model, batch, clean = setting("mlp")
    with pytest.raises(ValueError, match="reduction=.none"):
        call(model, nn.CrossEntropyLoss(), batch, clean, method=method)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 7), nn.Linear(7, C)

    def forward(self, x):
        return self.head(self.body(x).tanh()) - self.head(self.body(-2 * x).tanh() ** 2)


@pytest.mark.parametrize("kind", ["tokens", "conv", "layernorm", "twice"])
def test_last_layers_of_other_kinds(kind):
    """(B, 4, C) outputs, feature maps, no matrix product, two calls: the right weights or an error, never others."""
    make, shape, last = {
        "tokens": (lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, C), Mean()), (4, 6), ("2.weight", "2.bias")),
        "conv": (lambda: nn.Sequential(nn.Conv2d(2, C, 3), Mean(), Mean()), (2, 6, 6), ("0.weight", "0.bias")),
        "twice": (Twice, (6,), ("head.weight", "head.bias")),
        "layernorm": (lambda: nn.Sequential(nn.Linear(6, C), nn.LayerNorm(C)), (6,), ("1.weight", "1.bias")),
    }[kind]
    model, batch, clean = setting(Net(make, shape))
    wanted = algorithm_1(model, cross_entropy, batch, clean, last)
    try:
        w = l2rw_weights(model, cross_entropy, batch, clean, method="last_layer")
    except ValueError as e:
        assert "last" in str(e)
    else:
        assert distance(w, wanted) <= 1e-5


class Mean(nn.Module):
    """Over the tokens, or over an image's last side."""

    def forward(self, x):
        return x.mean(1 if x.dim() == 3 and x.shape[1] == 4 and x.shape[2] == C else -1)


def test_the_host_never_waits(method, monkeypatch):
    """A model on `meta` has no numbers: whatever would wait for one of a GPU's raises there."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # which knows no such device
    monkeypatch.setattr(torch, "autocast", lambda *device, **options: nullcontext())
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, C)
    model = nn.Sequential(*layers).to("meta")
    x, y = torch.empty(B, 1, 6, 6, device="meta"), torch.empty(B, dtype=torch.int64, device="meta")
    batch, clean = (x, y), (x[:M], y[:M])
    assert l2rw_weights(model, cross_entropy, batch, clean, method).shape == (B,)
    l2rw_loss(model, cross_entropy, batch, clean, method).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


# ---- at the edges ------------------------------------------------------------------------------------------------------


def layers(*modules, dtype=torch.float64):
    """A model of these layers on four numbers, a batch and a clean one."""
    torch.manual_seed(0)
    model = nn.Sequential(*modules).to(dtype)
    x, y = torch.randn(B + M, 4, dtype=dtype), torch.arange(B + M) % C
    return model, (x[:B], y[:B]), (x[B:], y[B:])


class Masked(nn.Module):
    """A last layer that draws random numbers."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(C, 6))

    def forward(self, x):
        return F.dropout(x, 0.5, self.training) @ self.w.T


@pytest.mark.parametrize(
    "last", [nn.Sequential(nn.Linear(6, C), nn.BatchNorm1d(C, affine=False)), Masked()], ids=["mixed", "drawn"]
)
def test_last_layer_that_is_mixed_or_draws(last):
    model, batch, clean = layers(nn.Linear(4, 6), nn.ReLU(), last)
    ours = l2rw_weights(model, cross_entropy, batch, clean, "last_layer")
    for p in model[0].parameters():
        p.requires_grad_(False)
    torch.testing.assert_close(ours, l2rw_weights(model, cross_entropy, batch, clean, "unrolled"))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.w = nn.Linear(4, 6), nn.Parameter(torch.randn(C, 6))

    def forward(self, x):
        return self.hidden(x) @ self.w.T


def test_last_layer_that_is_not_seen():
    """Not silently the layer before it."""
    model, batch, clean = layers(Bare())
    with pytest.raises(ValueError, match=r"depend on 0\.w by another way .*jvp"):
        l2rw_weights(model, cross_entropy, batch, clean, "last_layer")
    model, batch, clean = layers(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C))
    model[2] = torch.compile(model[2], backend="eager")
    model(batch[0])  # from now on it looks for no hooks
    with pytest.raises(ValueError, match="last_layer"):
        l2rw_weights(model, cross_entropy, batch, clean, "last_layer")
    model, x = nn.Sequential(model[2], nn.BatchNorm1d(C, affine=False)).double(), torch.randn(B + M, 6).double()
    model(x[:B])
    with pytest.raises(ValueError, match="last_layer: got a forward without a layer"):
        l2rw_weights(model, cross_entropy, (x[:B], batch[1]), (x[B:], clean[1]), "last_layer")


def test_statistics_of_instances(method):
    """InstanceNorm writes them even where it is told not to track."""
    norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    model, batch, clean = layers(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 4, 2), norm, nn.Flatten(), nn.Linear(12, C))
    before = copy.deepcopy(model.state_dict())
    l2rw_weights(model, cross_entropy, batch, clean, method)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("method", ["jvp", "last_layer"])
def test_half_precision_autocast(method):
    """1024 inputs of size 4: a gradient that a loss scale of 2^10 would take out of float16's range. Weights to a few percent,
    as float16 has the products' terms."""
    torch.manual_seed(0)
    model, y = nn.Sequential(nn.Linear(1024, 32), nn.ReLU(), nn.Linear(32, C)), torch.arange(B + M) % C
    x = 4 * torch.randn(B + M, 1024).relu()
    batch, clean = (x[:B], y[:B]), (x[B:], y[B:])
    exact = l2rw_weights(model, cross_entropy, batch, clean, method)
    with torch.autocast("cpu", dtype=torch.float16):
        w = l2rw_weights(model, cross_entropy, batch, clean, method)
        loss = l2rw_loss(model, cross_entropy, batch, clean, method)
    assert distance(w.float(), exact) < 0.1 and loss.isfinite()


@pytest.mark.parametrize("size", [0.0, 1e-4, 1e-2, 1.0])
def test_difference_of_small_parameters(size):
    """A model that starts at 0 has weights too; the step has a shortest length."""
    model, batch, clean = layers(nn.Linear(4, C), dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(size)
    star = l2rw_weights(model, cross_entropy, batch, clean, "unrolled")
    assert distance(l2rw_weights(model, cross_entropy, batch, clean, "finite_difference"), star) <= 1e-2


def test_shortcuts_without_forward_mode():
    """What torch takes for an LSTM and an encoder in evaluation where no gradient is asked for."""
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, C)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    for model in (Recurrent(), nn.Sequential(encoder, nn.Flatten(), nn.Linear(12, C)).eval()):
        x, y = torch.randn(B + M, 3, 4), torch.arange(B + M) % C
        batch, clean = (x[:B], y[:B]), (x[B:], y[B:])
        enabled = torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()
        jvp = l2rw_weights(model, cross_entropy, batch, clean)
        assert enabled == (torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled())
        assert distance(jvp, l2rw_weights(model, cross_entropy, batch, clean, "unrolled")) < 1e-5


def test_errors_that_are_not_forward_modes():
    """An error of the model's own in the dual pass keeps its words."""
    model, batch, clean = layers(nn.Linear(4, C))
    calls = []

    def fail(out, y):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("boom: out of memory")
        return cross_entropy(out, y)

    with pytest.raises(RuntimeError, match="^boom"):
        l2rw_weights(model, fail, batch, clean)
    with pytest.raises(ValueError, match="lazy"):
        l2rw_weights(nn.LazyLinear(C), cross_entropy, batch, clean)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        l2rw_loss(model, cross_entropy, batch, clean)


def test_sparse_gradients():
    torch.manual_seed(0)
    model, y = nn.Sequential(nn.EmbeddingBag(20, C, sparse=True)), torch.arange(B + M) % C
    x = torch.randint(20, (B + M, 3))
    batch, clean = (x[:B], y[:B]), (x[B:], y[B:])
    star = l2rw_weights(model, cross_entropy, batch, clean, "finite_difference")
    assert star.isfinite().all() and float(star.sum()) == pytest.approx(1)
