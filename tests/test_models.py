"""The networks of `absgd-fast train`: sizes, initial weights, heads, how they are taken apart, and torchvision's."""

import importlib
import math
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import absgd_fast as ab
from absgd_fast.experiments import models, resnets

# The smallest images that each model takes, and others.
SHAPES = {
    "linear": [(1, 1, 1), (3, 5, 2)],
    "mlp": [(1, 1, 1), (3, 5, 2)],
    "cnn": [(1, 4, 4), (3, 9, 6)],
    "resnet32": [(3, 32, 32), (1, 32, 32)],
    "cnn4": [(1, 4, 4), (3, 9, 6)],
    "cnn8": [(3, 8, 8), (1, 11, 16)],
    "lenet": [(1, 28, 28), (3, 32, 32)],
    "preact": [(1, 8, 8), (3, 11, 16)],
    "wrn-16-2": [(3, 4, 4), (1, 9, 6)],
    "wrn-28-10": [(3, 4, 4)],
    **{name: [(3, 8, 8), (1, 64, 40), (3, 65, 72), (1, 72, 65)] for name in resnets.TORCHVISION},
}
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]
BLOCKS = {"resnet32": ("17",), "preact": ("8", "9"), "wrn-16-2": ("6", "7"), "wrn-28-10": ("12", "13")}
BLOCKS |= dict.fromkeys(resnets.TORCHVISION, ("layer4.1",))


class Bottom(nn.Module):
    """A network with the parts and the forward of torchvision's ResNets, but with few channels and blocks without shortcuts."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        for stage in range(1, 5):
            convolutions = [nn.Conv2d(4, 4, 3, 2 if stage > 1 and not i else 1, 1) for i in range(2)]
            setattr(self, f"layer{stage}", nn.Sequential(*(nn.Sequential(c, nn.BatchNorm2d(4), nn.ReLU()) for c in convolutions)))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(4, num_classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer4(self.layer3(self.layer2(self.layer1(x))))), 1))


@pytest.fixture(autouse=True)
def torchvision(monkeypatch):
    """A torchvision that has nothing but these networks."""
    package, fake = ModuleType("torchvision"), ModuleType("torchvision.models")
    for name in resnets.TORCHVISION:
        setattr(fake, name, Bottom)
    package.models = fake
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", fake)


def batch(shape, n=3):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))


def settled(model):
    """The model in evaluation mode, its BatchNorm layers with means and variances that are not 0 and 1."""
    draw = torch.Generator().manual_seed(2)
    for layer in model.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.running_mean.normal_(generator=draw)
            layer.running_var.uniform_(0.5, 2, generator=draw)
            nn.init.normal_(layer.weight, generator=draw)
            nn.init.normal_(layer.bias, generator=draw)
    return model.eval()


def size(model):
    return sum(p.numel() for p in model.parameters())


def test_every_model_is_here():
    assert list(SHAPES) == list(models.MODELS)


# ------------------------------------------------------------------------------------------------ initial weights


@pytest.mark.parametrize("head", models.HEADS)
@pytest.mark.parametrize("name", models.MODELS)
def test_the_seed_decides(name, head):
    shape = SHAPES[name][0]
    state = torch.get_rng_state()
    model, twin, other = (models.make_model(name, shape, 7, seed, head).state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(model[key], twin[key]) for key in model)
    moved = [key for key in model if not torch.equal(model[key], other[key])]
    assert {key for key in model if model[key].dim() > 1} <= set(moved)


@pytest.mark.parametrize("name", models.MODELS)
def test_the_head_changes_no_other_weight(name):
    linear, cosine = (models.make_model(name, SHAPES[name][0], 7, 3, head) for head in models.HEADS)
    assert isinstance(linear[-1], nn.Linear) and isinstance(cosine[-1], ab.CosineClassifier)
    assert linear[-1].in_features == cosine[-1].weight.shape[1] and len(cosine[-1].weight) == 7
    (a, _), (b, _) = models.split(linear), models.split(cosine)
    assert list(a.state_dict()) == list(b.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert cosine.eval()(batch(SHAPES[name][0])).abs().max() <= 1 + 1e-6
    assert cosine[-1].weight.abs().max() <= 1 / math.sqrt(linear[-1].in_features)  # as its own reset_parameters() draws them


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn", "resnet32", "lenet"])
def test_weights_of_torchs_layers(name):
    """Each layer draws its weights as torch's does: committed results depend on it.

    The order is that of the layers, but in resnet32 the blocks come first."""
    model, again = (models.make_model(name, SHAPES[name][0], 7, 5) for _ in range(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for part in (again[3:18], again[:3], again[18:]) if name == "resnet32" else (again,):
            for layer in part.modules():
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["cnn4", "cnn8", "preact", "wrn-16-2", "wrn-28-10"])
def test_weights_of_he(name):
    """N(0, 2 / n): n inputs of a unit for the plain networks, the outputs of an input for the residual ones."""
    plain = name.startswith("cnn")
    for layer in models.make_model(name, (3, 32, 32), 10, 0).modules():
        if isinstance(layer, nn.Conv2d) or (plain and isinstance(layer, nn.Linear)):
            n = layer.weight[0].numel() if plain else layer.weight.numel() // layer.weight.shape[1]
            scaled = layer.weight.detach() * math.sqrt(n / 2)
            m = scaled.numel()  # the mean and the mean square, by five of their standard deviations
            assert abs(scaled.mean()) < 5 / math.sqrt(m) and abs(scaled.square().mean() - 1) < 5 * math.sqrt(2 / m)
            assert scaled.abs().max() > 2  # a uniform distribution of this variance ends at the square root of 3
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            assert not layer.bias.any()


@pytest.mark.parametrize("name", models.MODELS)
def test_torchs_default_dtype_does_not_matter(name):
    wanted = models.make_model(name, SHAPES[name][0], 7, 0, "cosine").state_dict()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        made = models.make_model(name, SHAPES[name][0], 7, 0, "cosine").state_dict()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(before)
    assert all(made[key].dtype == wanted[key].dtype and torch.equal(made[key], wanted[key]) for key in wanted)
    assert {value.dtype for value in made.values()} <= {torch.float32, torch.int64}


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("name, shape", CASES, ids=str)
def test_shapes_and_parts(name, shape):
    """classifier(features(x)) is model(x), and features(x) is (B, d)."""
    model = settled(models.make_model(name, shape, 7, 0))
    features, classifier = models.split(model)
    x = batch(shape)
    logits, hidden = model(x), features(x)
    assert logits.shape == (3, 7) and logits.dtype == torch.float32
    assert hidden.shape == (3, classifier.in_features) and classifier is model[-1]
    assert torch.equal(classifier(hidden), logits)
    assert not torch.equal(logits[0], logits[1])
    assert {id(p) for p in model.parameters()} == {id(p) for part in (features, classifier) for p in part.parameters()}


@pytest.mark.parametrize("name", models.MODELS)
def test_a_step_moves_every_weight(name):
    shape = SHAPES[name][0]
    model = models.make_model(name, shape, 7, 0)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the dropout
        loss = F.cross_entropy(model(batch(shape, 8)), torch.arange(8) % 7)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for (key, p), old in zip(model.named_parameters(), before):
        if p.dim() > 1:
            assert not torch.equal(p, old), key
        assert p.isfinite().all()


def test_parameters_as_in_the_papers():
    def millions(model):
        return round(size(model) / 1e6, 1)

    def made(name, shape=(3, 32, 32)):
        return models.make_model(name, shape, 10, 0)

    # He et al. 2016, Table 6
    assert {n: round(size(resnets.resnet(3, 10, n)) / 1e6, 2) for n in (3, 5, 7, 9)} == {3: 0.27, 5: 0.46, 7: 0.66, 9: 0.85}
    # Zagoruyko & Komodakis 2016, Table 4
    paper = {(40, 1): 0.6, (40, 4): 8.9, (16, 8): 11.0, (22, 8): 17.2, (28, 10): 36.5}
    assert {(d, k): millions(resnets.wide_resnet(3, 10, d, k)) for d, k in paper} == paper
    assert size(made("wrn-28-10")) == size(resnets.wide_resnet(3, 10, 28, 10)) == 36_479_194
    assert size(made("wrn-16-2")) == size(resnets.wide_resnet(3, 10, 16, 2))
    # LeCun et al. 1998, Sec. II.B: C1, C5 and F6 have the paper's numbers; C3 is complete here, and the last layer linear
    sizes = [size(layer) for layer in made("lenet", (1, 28, 28)) if size(layer)]
    assert sizes == [156, 6 * 16 * 25 + 16, 48_120, 10_164, 850]


def test_layers_of_the_cnns():
    """The layers of the networks in the code of Wang et al. 2019: their channels and the length of their features."""
    four, eight = models.make_model("cnn4", (1, 28, 28), 10, 0), models.make_model("cnn8", (3, 32, 32), 10, 0)
    for model, widths in ((four, [32, 64, 128, 10]), (eight, [64, 64, 128, 128, 196, 196, 256, 10])):
        weighted = [layer for layer in model if isinstance(layer, (nn.Conv2d, nn.Linear))]
        assert [len(layer.weight) for layer in weighted] == widths
        assert sum(isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) for layer in model) == len(widths) - 1
        assert sum(isinstance(layer, nn.ReLU) for layer in model) == len(widths) - 1
        for layer, follower in zip(model, list(model)[1:]):
            assert isinstance(follower, (nn.BatchNorm1d, nn.BatchNorm2d)) == (layer in weighted[:-1])
    assert four[9].in_features == 7 * 7 * 64 and eight[22].in_features == 4 * 4 * 196
    assert [i for i, layer in enumerate(four) if isinstance(layer, nn.MaxPool2d)] == [3, 7]
    assert [i for i, layer in enumerate(eight) if isinstance(layer, nn.MaxPool2d)] == [6, 13, 20]


def test_depth_and_dropout():
    def blocks(model):
        return [layer for layer in model if isinstance(layer, resnets.PreactivationBlock)]

    def convolutions(model, kernel):
        return sum(isinstance(layer, nn.Conv2d) and layer.kernel_size == kernel for layer in model.modules())

    preact, narrow, wide = (models.make_model(name, (3, 32, 32), 10, 0) for name in ("preact", "wrn-16-2", "wrn-28-10"))
    assert convolutions(preact, (3, 3)) + 1 == 18 and size(preact) < 1e6
    # Zagoruyko & Komodakis count all convolutions, those of the shortcuts too
    assert [convolutions(m, (3, 3)) + convolutions(m, (1, 1)) for m in (narrow, wide)] == [16, 28]
    assert [{block.dropout for block in blocks(m)} for m in (preact, narrow, wide)] == [{0}, {0}, {0.3}]
    assert [layer.shape[1:] for layer in (preact[:9](batch((3, 32, 32))), wide[:13](batch((3, 8, 8))))] == [
        (128, 4, 4),
        (640, 2, 2),
    ]


@pytest.mark.parametrize("depth", [4, 17, 3])
def test_depths_that_there_are_not(depth):
    with pytest.raises(ValueError, match=rf"depth: got {depth}, expected 6 n \+ 4"):
        resnets.wide_resnet(3, 10, depth, 2)


# ------------------------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize("channels, out, stride", [(4, 4, 1), (4, 6, 1), (4, 6, 2), (4, 4, 2)])
def test_preactivation_block(channels, out, stride):
    """By its formula, with the BatchNorm written out. Dropout of everything leaves the shortcut, in training only."""

    def active(norm, x):
        columns = [t.view(1, -1, 1, 1) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
        mean, variance, weight, bias = columns
        return ((x - mean) / (variance + norm.eps).sqrt() * weight + bias).clamp(min=0)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = settled(resnets.PreactivationBlock(channels, out, stride, dropout=1.0)).double()
    x = batch((channels, 7, 7)).double()
    first = active(block.bn1, x)
    second = active(block.bn2, F.conv2d(first, block.conv1.weight, stride=stride, padding=1))
    same = stride == 1 and channels == out
    assert (block.shortcut is None) == same
    shortcut = x if same else F.conv2d(first, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), shortcut + F.conv2d(second, block.conv2.weight, padding=1))
    block.train()
    block.bn1.eval()
    torch.testing.assert_close(block(x), shortcut)


@pytest.mark.parametrize("name", models.MODELS)
def test_last_block(name):
    model = models.make_model(name, SHAPES[name][0], 7, 0)
    if name not in BLOCKS:
        with pytest.raises(ValueError, match=r"^the model has no residual blocks.*trainable all or fc.*resnet32, preact, .*$"):
            models.last_block(model)
        return
    block = {id(p) for p in models.last_block(model).parameters()}
    assert block
    wanted = tuple(f"{prefix}." for prefix in BLOCKS[name])
    assert block == {id(p) for key, p in model.named_parameters() if key.startswith(wanted)}
    layers = [layer for layer in models.split(model)[0].modules() if [*layer.parameters()] and not [*layer.children()]]
    assert id(layers[-1].weight) in block  # nothing with weights comes between it and the classifier


# ------------------------------------------------------------------------------------------------ taking apart


def test_the_parts_stay_those_of_the_model():
    model = models.make_model("cnn4", (1, 8, 8), 10, 0).eval()
    features, _ = models.split(model)
    assert not features.training and not features[1].training
    model.train()
    assert features[1].training and models.split(model)[0].training
    model[-1] = nn.Linear(128, 3)  # what the stages behind a training do
    features, classifier = models.split(model.eval())
    assert classifier.out_features == 3 and torch.equal(classifier(features(batch((1, 8, 8)))), model(batch((1, 8, 8))))


@pytest.mark.parametrize("model", [nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 3)), nn.DataParallel(nn.Sequential())], ids=str)
def test_what_cannot_be_split(model):
    with pytest.raises(ValueError, match=rf"^model: got {type(model).__name__}, expected .* take \.module$"):
        models.split(model)


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("vgg", (1, 8, 8), r"unknown model 'vgg'; use one of linear, mlp, cnn, resnet32, cnn4, .*resnet152"),
        ("resnet32", (1, 8, 8), "resnet32 takes 32×32 images, these are 8×8: use linear, mlp or cnn"),
        ("lenet", (1, 28, 32), "lenet takes 28×28 and 32×32 images, these are 28×32: use linear, mlp or cnn"),
        ("lenet", (1, 30, 30), "lenet takes 28×28 and 32×32 images, these are 30×30: use linear, mlp or cnn"),
        ("cnn", (1, 3, 8), "cnn takes images of at least 4×4, these are 3×8: use linear or mlp"),
        ("cnn4", (1, 8, 3), "cnn4 takes images of at least 4×4, these are 8×3: use linear or mlp"),
        ("cnn8", (1, 8, 7), "cnn8 takes images of at least 8×8, these are 8×7: use linear, mlp or cnn"),
        ("preact", (1, 7, 8), "preact takes images of at least 8×8, these are 7×8: use linear, mlp or cnn"),
        ("wrn-16-2", (1, 3, 4), "wrn-16-2 takes images of at least 4×4"),
        ("resnet50", (1, 7, 7), "resnet50 takes images of at least 8×8"),
    ],
)
def test_refused(name, shape, words):
    for call in (lambda: models.check_model(name, shape), lambda: models.make_model(name, shape, 10, 0)):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_heads_refused():
    with pytest.raises(ValueError, match="^unknown head 'arc'; use one of linear, cosine$"):
        models.make_model("linear", (1, 8, 8), 10, 0, head="arc")


# ------------------------------------------------------------------------------------------------ torchvision


@pytest.mark.parametrize("sides, small", [((32, 32), True), ((64, 64), True), ((64, 65), False), ((65, 64), False)])
@pytest.mark.parametrize("channels", [1, 3])
def test_how_torchvisions_networks_begin(sides, small, channels):
    model = models.make_model("resnet18", (channels, *sides), 7, 0)
    first = model.conv1
    assert (first.in_channels, first.out_channels, first.bias) == (channels, 4, None)
    assert (first.kernel_size, first.stride, first.padding) == (((3, 3), (1, 1), (1, 1)) if small else ((7, 7), (2, 2), (3, 3)))
    assert isinstance(model.maxpool, nn.Identity if small else nn.MaxPool2d)
    assert model[:4](batch((channels, *sides))).shape[2:] == (sides if small else tuple(math.ceil(side / 4) for side in sides))


@pytest.mark.parametrize("name", resnets.TORCHVISION)
def test_torchvisions_own_forward(name):
    """The layers in a row compute what torchvision's module does, and have its keys."""
    ours, theirs = settled(models.make_model(name, (3, 72, 72), 7, 0)), Bottom(7).eval()
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours(batch((3, 72, 72))), theirs(batch((3, 72, 72))))


def test_the_module_of_this_name(monkeypatch):
    called = []
    fake = SimpleNamespace(**{name: lambda num_classes, name=name: called.append(name) or Bottom(num_classes) for name in SHAPES})
    monkeypatch.setitem(sys.modules, "torchvision.models", fake)
    for name in resnets.TORCHVISION:
        models.make_model(name, (3, 32, 32), 7, 0)
    assert called == list(resnets.TORCHVISION)


@pytest.mark.parametrize(
    "text, reason",
    [
        (
            "raise RuntimeError('operator torchvision::nms does not exist\\nmore of it')",
            "RuntimeError: operator .*nms does not exist",
        ),
        ("import a_module_that_is_nowhere", "ModuleNotFoundError: No module named 'a_module_that_is_nowhere'"),
        ("raise AttributeError('partially initialized module')", "AttributeError: partially initialized module"),
    ],
)
def test_torchvision_does_not_import(text, reason, tmp_path, monkeypatch):
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(text)
    (tmp_path / "torchvision" / "models.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    version = re.escape(torch.__version__)
    words = rf"^model resnet50 needs torchvision, .*\({reason}\): install .* torch {version} .*use preact, which needs no .*$"
    with pytest.raises(ValueError, match=words):
        models.check_model("resnet50", (3, 32, 32))
    for name in models.MODELS:
        if name not in resnets.TORCHVISION:
            models.check_model(name, SHAPES[name][0])


def test_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ValueError, match="^model resnet18 needs torchvision") as error:
        models.make_model("resnet18", (3, 32, 32), 10, 0)
    assert "\n" not in str(error.value)
