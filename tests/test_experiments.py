"""Data, models, training loop and report of absgd_fast.experiments."""

import json
import math
import os
import pickle
import re
import struct
import sys
from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest
import torch

import absgd_fast as ab
from absgd_fast.experiments import cifar, data, methods, models, report, style, summary, train, tune
from absgd_fast.experiments.method import Setup
from absgd_fast.experiments.train import Config

SHORT = Config(model="linear", epochs=4, warmup=0.5, seeds=1)


@pytest.fixture(scope="module")
def digits():
    return data.load_source("digits")


# ------------------------------------------------------------------------------------------------ class counts


def test_long_tail_is_the_cifar_one():
    # CIFAR-10-LT and CIFAR-100-LT, ρ = 100, as published: 12,406 and 10,847 images
    ten, hundred = data.class_counts(5000, 10, "lt", 100), data.class_counts(500, 100, "lt", 100)
    assert ten == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50] and sum(ten) == 12406
    assert (hundred[0], hundred[-1], sum(hundred)) == (500, 5, 10847)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((110, 10, "lt", 100), [110, 65, 39, 23, 14, 8, 5, 3, 1, 1]),
        ((100, 4, "step", 10), [100, 100, 10, 10]),
        ((100, 5, "step", 10), [100, 100, 100, 10, 10]),
        ((7, 3, "lt", 1), [7, 7, 7]),
        ((3, 2, "step", 1e6), [3, 1]),  # never an empty class
        ((9, 1, "lt", 100), [9]),
        ((1000, 4, "lt", 1000), [1000, 100, 10, 1]),  # whole numbers that floating point may put just below
    ],
)
def test_class_counts(arguments, expected):
    assert data.class_counts(*arguments) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 10, "lt", 100), "at least 1"),
        ((10, 0, "lt", 100), "at least 1"),
        ((10, 10, "exp", 100), "lt, step"),
        ((10, 10, "lt", 0.5), "≥ 1, got 0.5"),
        ((10, 10, "lt", math.nan), "≥ 1, got nan"),
        ((10, 10, "step", math.inf), "≥ 1, got inf"),
    ],
)
def test_class_counts_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.class_counts(*arguments)


# ------------------------------------------------------------------------------------------------ label noise

N = 20_000  # the standard deviation of an observed rate is at most 0.0036
CLEAN = torch.arange(N) % 10


@pytest.mark.parametrize("kind", ["symmetric", "uniform"])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 0.9])
def test_symmetric_noise(kind, rate):
    noisy = data.add_noise(CLEAN, kind, rate, 10, seed=1)
    flipped = noisy != CLEAN
    # four standard deviations; were flips drawn from all ten classes, 10 % fewer would show, 11 of them at 0.4
    assert abs(flipped.double().mean() - rate) <= 4 * math.sqrt(rate * (1 - rate) / N)
    if rate == 0.9:
        # each ordered pair of classes expects 200 flips, standard deviation below 15
        table = torch.zeros(10, 10).index_put_((CLEAN[flipped], noisy[flipped]), torch.tensor(1.0), accumulate=True)
        off_diagonal = table[~torch.eye(10, dtype=bool)]
        assert table.diagonal().sum() == 0 and off_diagonal.min() > 140 and off_diagonal.max() < 260


def test_uniform_is_symmetric():
    assert torch.equal(data.add_noise(CLEAN, "uniform", 0.4, 10, 3), data.add_noise(CLEAN, "symmetric", 0.4, 10, 3))


def test_asymmetric_noise_goes_to_the_next_class_or_by_the_map():
    noisy = data.add_noise(CLEAN, "asymmetric", 0.3, 10, seed=0)
    flipped = noisy != CLEAN
    assert abs(flipped.double().mean() - 0.3) < 0.013
    assert torch.equal(noisy[flipped], (CLEAN[flipped] + 1) % 10)
    noisy = data.add_noise(CLEAN, "asymmetric", 0.3, 10, seed=0, mapping=data.CIFAR10_MAPPING)
    pairs = {(a, b) for a, b in zip(CLEAN.tolist(), noisy.tolist()) if a != b}
    assert pairs == {(9, 1), (2, 0), (4, 7), (3, 5), (5, 3)}  # truck→car, bird→plane, deer→horse, cat↔dog


def test_background_noise_goes_to_one_class():
    noisy = data.add_noise(CLEAN, "background", 0.4, 10, seed=0, background=7)
    flipped = noisy != CLEAN
    assert set(noisy[flipped].tolist()) == {7}
    assert abs(flipped.double().mean() - 0.4 * 0.9) < 0.014  # the background's own tenth cannot flip


@pytest.mark.parametrize("kind", data.NOISES)
def test_noise_is_deterministic_and_leaves_its_input_alone(kind):
    labels = CLEAN.to(torch.int32)
    before = labels.clone()
    noisy = data.add_noise(labels, kind, 0.4, 10, seed=5)
    assert torch.equal(labels, before) and noisy.dtype == torch.int32
    assert torch.equal(noisy, data.add_noise(labels, kind, 0.4, 10, seed=5))
    assert not torch.equal(noisy, data.add_noise(labels, kind, 0.4, 10, seed=6))
    assert data.add_noise(labels, kind, 0.0, 10, seed=5).data_ptr() != labels.data_ptr()


def test_noise_leaves_torchs_generator_alone():
    state = torch.get_rng_state()
    data.add_noise(CLEAN, "symmetric", 0.4, 10, seed=5)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "pairflip"}, "symmetric, uniform, asymmetric, background"),
        ({"rate": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"rate": -0.1}, "got -0.1"),
        ({"rate": math.nan}, "got nan"),
        ({"n_classes": 1}, "at least 2 classes"),
        ({"labels": torch.tensor([0, 10])}, r"\[0, 10\), got 0 to 10"),
        ({"labels": torch.tensor([-1, 3])}, "got -1 to 3"),
        ({"labels": torch.tensor([0.0, 1.0])}, "integers, got torch.float32"),
        ({"labels": torch.zeros(2, 2, dtype=torch.int64)}, r"shape \(2, 2\)"),
        ({"kind": "asymmetric", "mapping": [0, 1]}, "10 classes"),
        ({"kind": "background", "background": 10}, "got 10"),
    ],
)
def test_noise_refuses(change, message):
    arguments = {"labels": CLEAN, "kind": "symmetric", "rate": 0.4, "n_classes": 10, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        data.add_noise(**arguments)


# ------------------------------------------------------------------------------------------------ CIFAR files


def python2_pickle(pixels, labels, key):
    """The bytes that Python 2 and the numpy of 2009 wrote, as the distributed files have them: str for bytes, and
    numpy.core; no Python 3 writes this any more."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def number(value):
        return b"M" + struct.pack("<H", value)

    raw = pixels.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array += b"(K\x01" + number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86"
    array += b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array += b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    numbers = b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(key) + numbers + b"u."


def cifar_folder(root, name, write, per_file=20):
    """Tiny files in CIFAR's format → the (pixels, labels) of each, training first, test last."""
    folder, train_files, test_file, key, classes = cifar.FILES[name]
    (root / folder).mkdir()
    random, contents = np.random.default_rng(0), []
    for file in (*train_files, test_file):
        pixels = random.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        labels = [i % classes for i in range(per_file)]
        (root / folder / file).write_bytes(write(pixels, labels, key))
        contents.append((pixels, labels))
    return contents


def python3_pickle(protocol):
    return lambda pixels, labels, key: pickle.dumps({b"data": pixels, key: labels, b"batch_label": b"x"}, protocol)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("write", [python2_pickle, python3_pickle(2), python3_pickle(5)], ids=["python2", "2", "5"])
def test_cifar_comes_back_as_written(tmp_path, name, write):
    per_file = 20 if name == "cifar10" else 200
    contents = cifar_folder(tmp_path, name, write, per_file)
    for root in (tmp_path, tmp_path / cifar.FILES[name][0]):  # the folder itself, or the one it lies in
        x, y, x_test, y_test = data.load_cifar(str(root), name, digests=False)
        pixels = np.concatenate([p for p, _ in contents[:-1]])
        assert x.shape == (len(pixels), 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
        # a row holds 1024 red, 1024 green, 1024 blue values, row by row
        assert torch.equal(x[7, 2, 5], torch.from_numpy(pixels[7, 2048 + 160 : 2048 + 192]))
        assert torch.equal(x.flatten(1), torch.from_numpy(pixels))
        assert y.tolist() == [label for _, labels in contents[:-1] for label in labels]
        assert torch.equal(x_test.flatten(1), torch.from_numpy(contents[-1][0])) and y_test.tolist() == contents[-1][1]


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda path: pickle.dumps({b"data": Harmful(path), b"labels": [0]}), "has no place in a CIFAR file"),
        (lambda path: b"not a pickle", "not a CIFAR batch file"),
        (lambda path: b"", "not a CIFAR batch file"),
        (lambda path: python3_pickle(2)(np.zeros((2, 3072), np.uint8), [0, 1], b"labels")[:-40], "not a CIFAR batch"),
        (lambda path: python3_pickle(2)(np.zeros((2, 3072), np.uint8), [0], b"labels"), "1 × 3072"),
        (lambda path: python3_pickle(2)(np.zeros((1, 3072), np.float32), [0], b"labels"), "uint8"),
        (lambda path: python3_pickle(2)(np.zeros((1, 3072), np.uint8), [10], b"labels"), r"\[0, 10\)"),
        (lambda path: python3_pickle(2)(np.zeros((1, 3072), np.uint8), [0], b"fine_labels"), "KeyError"),
        (lambda path: pickle.dumps(np.array([{}], dtype=object)), "not a CIFAR batch"),
    ],
)
def test_a_bad_cifar_file_is_named(tmp_path, content, message):
    cifar_folder(tmp_path, "cifar10", python3_pickle(2))
    victim = tmp_path / "victim"
    bad = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    bad.write_bytes(content(str(victim)))
    with pytest.raises(ValueError, match=message) as caught:
        data.load_cifar(tmp_path, "cifar10", digests=False)
    assert str(bad) in str(caught.value)
    assert not victim.exists()  # nothing in the file was run


def test_missing_cifar_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_batch_1.*cifar-10-batches-py"):
        data.load_cifar(tmp_path, "cifar10")
    with pytest.raises(ValueError, match="cifar10 or cifar100"):
        data.load_cifar(tmp_path, "mnist")
    with pytest.raises(ValueError, match="--data-root"):
        data.load_source("cifar10")


# ------------------------------------------------------------------------------------------------ splits


def test_digits_split(digits):
    split = data.draw(digits, 0)
    assert split.x.shape == (1100, 1, 8, 8) and split.x_test.shape == (600, 1, 8, 8) and split.x.dtype == torch.float32
    assert torch.bincount(split.y).tolist() == [110] * 10 and torch.bincount(split.y_test).tolist() == [60] * 10
    # no image is in both parts; two pairs of the data set's own images are all but equal, none is equal
    images = torch.cat([split.x, split.x_test]).flatten(1)
    assert len(images.unique(dim=0)) == 1700
    again, other = data.draw(digits, 0), data.draw(digits, 1)
    assert torch.equal(split.x, again.x) and not torch.equal(split.x, other.x)


def test_imbalance_and_noise_leave_the_test_part_alone(digits):
    plain = data.draw(digits, 3)
    tail = data.draw(digits, 3, imbalance="lt", rho=100)
    noisy = data.draw(digits, 3, noise="symmetric", rate=0.4)
    assert torch.bincount(tail.y).tolist() == data.class_counts(110, 10, "lt", 100)
    for split in (tail, noisy):
        assert torch.equal(split.x_test, plain.x_test) and torch.equal(split.y_test, plain.y_test)
    assert torch.equal(noisy.x, plain.x) and torch.equal(noisy.y_true, plain.y)
    # 1100 labels: four standard deviations are 0.06
    assert abs((noisy.y != noisy.y_true).double().mean() - 0.4) < 0.06


def test_cifar_is_standardised_by_its_training_part(tmp_path):
    cifar_folder(tmp_path, "cifar10", python3_pickle(2), per_file=40)
    source = data.load_source("cifar10", tmp_path, digests=False)
    assert source.n_max == 20 and source.mapping == data.CIFAR10_MAPPING
    split = data.draw(source, 0, imbalance="step", rho=4)
    assert torch.bincount(split.y).tolist() == [20] * 5 + [5] * 5
    torch.testing.assert_close(split.x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(split.x.std((0, 2, 3)), torch.ones(3))
    assert source.images.dtype == torch.uint8  # the source is not changed by drawing


def test_augmented_images_are_shifted_or_mirrored_ones():
    x = torch.rand(6, 3, 8, 8)
    once, again = (data.augment(x, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(once, again) and not torch.equal(once, x)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    for image, result in zip(padded, once):
        crops = [image[:, i : i + 8, j : j + 8] for i in range(9) for j in range(9)]
        assert any(torch.equal(result, c) or torch.equal(result, c.flip(2)) for c in crops)


# ------------------------------------------------------------------------------------------------ models


def test_sizes_of_the_networks():
    def size(name, shape):
        return sum(p.numel() for p in models.make_model(name, shape, 10, 0).parameters())

    assert size("linear", (1, 8, 8)) == 650
    assert size("mlp", (1, 8, 8)) == 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    assert size("resnet32", (3, 32, 32)) == 464_154  # He et al. 2016, Table 6: 0.46 million


def test_models_refuse():
    with pytest.raises(ValueError, match="linear, mlp, cnn, resnet32"):
        models.make_model("vgg", (1, 8, 8), 10, 0)
    with pytest.raises(ValueError, match="32×32.*8×8.*use linear, mlp or cnn"):
        models.make_model("resnet32", (1, 8, 8), 10, 0)
    with pytest.raises(ValueError, match="at least 4×4"):
        models.make_model("cnn", (1, 3, 8), 10, 0)


# ------------------------------------------------------------------------------------------------ training


def test_methods_of_a_seed_see_the_same(monkeypatch):
    """Initial weights, inputs, labels and order of batches, and the wrong labels among them."""
    seen = {}

    def spy(name, build):
        def built(setup):
            record = {"start": [p.detach().clone() for p in setup.parameters], "batches": []}
            method = build(setup)
            seen.setdefault(name, []).append(record)
            loss = method.loss

            def recorded(logits, labels):
                record["batches"].append((logits.detach().clone(), labels.clone()))
                return loss(logits, labels)

            return replace(method, loss=recorded)

        return built

    monkeypatch.setattr(methods, "METHODS", {name: spy(name, methods.METHODS[name]) for name in SHORT.methods})
    config = replace(SHORT, noise="symmetric", seeds=2, epochs=2, warmup=0)
    finished = list(train.runs(config))
    assert [(r["method"], r["seed"]) for r in finished] == [
        ("sgd", 0),
        ("absgd", 0),
        ("reference", 0),
        ("absgd", 1),
        ("reference", 1),
        ("sgd", 1),
    ]
    for run in (1, 2):  # run 0 is the warm-up
        ours, *others = (seen[name][run] for name in SHORT.methods)
        assert len(ours["batches"]) == 2 * 18
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(ours["start"], other["start"]))
            assert torch.equal(ours["batches"][0][0], other["batches"][0][0])  # equal logits: equal inputs
            assert all(torch.equal(a[1], b[1]) for a, b in zip(ours["batches"], other["batches"]))
    assert not torch.equal(seen["sgd"][1]["batches"][0][1], seen["sgd"][2]["batches"][0][1])


def test_weights_are_those_of_the_formula(digits):
    """One step on the whole training set from the start: W = n softmax(L / λ), averaged per class by hand."""
    config = replace(SHORT, methods=("absgd",), imbalance="lt", lam=0.5, warmup=0, epochs=1, batch_size=10_000)
    (run,) = train.runs(config, digits)
    split = data.draw(digits, 0, imbalance="lt", rho=100)
    logits = models.make_model("linear", (1, 8, 8), 10, 0)(split.x)
    losses = torch.nn.functional.cross_entropy(logits, split.y, reduction="none").double()
    weights = len(losses) * torch.softmax(losses / 0.5, 0)
    expected = [weights[split.y == c].mean().item() for c in range(10)]
    assert run["epochs"]["class_weight"][0] == pytest.approx(expected, rel=1e-4)
    assert run["epochs"]["clean_weight"][0] == pytest.approx(1, rel=1e-4)
    assert run["epochs"]["flipped_weight"] == [None]  # there are none


def expected_weights(method, losses, labels, config):
    """By the formula of each method, in numpy; the losses of a batch are all different."""
    n, order = len(losses), np.argsort(-losses)
    counts = np.bincount(labels)
    if method in ("term", "eg"):
        z = np.exp(losses / (config.lam if method == "term" else -abs(config.lam)))
        return n * z / z.sum()
    weights = np.zeros(n)
    if method == "cvar":
        k = int(config.beta * n)
        weights[order[:k]] = 1 / config.beta
        weights[order[k]] += n - k / config.beta
    elif method == "chi2":
        low, high = losses.min() - 100 * np.ptp(losses), losses.max()
        for _ in range(200):
            mu = (low + high) / 2
            weights = np.maximum(losses - mu, 0) * n / np.maximum(losses - mu, 0).sum()
            low, high = (mu, high) if ((weights - 1) ** 2).mean() / 2 <= config.chi2_rho else (low, mu)
    elif method == "groupdro":
        q = np.exp(config.eta * np.array([losses[labels == c].mean() for c in range(len(counts))]))
        weights = n * (q / q.sum() / counts)[labels]
    elif method == "proportion":
        weights = n / len(counts) / counts[labels]
    elif method == "hard-mining":
        for c in range(len(counts)):
            rows = np.flatnonzero(labels == c)
            weights[rows[np.argsort(-losses[rows])[: counts.min()]]] = n / (counts.min() * len(counts))
    return weights


@pytest.mark.parametrize("method", ["term", "eg", "cvar", "chi2", "groupdro", "proportion", "hard-mining"])
def test_weights_of_the_other_methods(method, digits):
    """One step on the whole training set from the start, averaged per class."""
    config = replace(SHORT, methods=(method,), imbalance="lt", rho=20, lam=0.5, warmup=0, epochs=1, batch_size=10_000, eta=2.0)
    (run,) = train.runs(config, digits)
    split = data.draw(digits, 0, imbalance="lt", rho=20)
    logits = models.make_model("linear", (1, 8, 8), 10, 0)(split.x)
    losses = torch.nn.functional.cross_entropy(logits, split.y, reduction="none").double().detach().numpy()
    weights = expected_weights(method, losses, split.y.numpy(), config)
    assert weights.mean() == pytest.approx(1)
    expected = [weights[split.y.numpy() == c].mean() for c in range(10)]
    assert run["epochs"]["class_weight"][0] == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("share, sign", [(0.7, 1), (0.9, 1), (0.4, -1)])
def test_targetess_has_its_share(share, sign, digits):
    """One step on the whole training set from the start: λ of this sign at which ESS/n is the share."""
    config = replace(SHORT, methods=("targetess",), imbalance="lt", warmup=0, epochs=1, batch_size=10_000, share=share, sign=sign)
    (run,) = train.runs(config, digits)
    split = data.draw(digits, 0, imbalance="lt", rho=100)
    logits = models.make_model("linear", (1, 8, 8), 10, 0)(split.x)
    losses = torch.nn.functional.cross_entropy(logits, split.y, reduction="none").double()

    def weights(tau):
        return len(losses) * torch.softmax(tau * losses, 0)

    low, high = 0.0, sign * 1e4
    for _ in range(100):
        tau = (low + high) / 2
        low, high = (tau, high) if 1 / weights(tau).square().mean() > share else (low, tau)
    expected = [weights(tau)[split.y == c].mean().item() for c in range(10)]
    assert run["epochs"]["class_weight"][0] == pytest.approx(expected, rel=5e-3)


def test_a_ramp_of_lambda(digits):
    """Over the first half of four epochs of one step each: plain, then 2 λ, then λ. γ = 1: the batch's own normaliser."""
    config = replace(SHORT, methods=("ramp",), noise="symmetric", lam=-0.5, gamma=1.0, batch_size=10_000)
    (run,) = train.runs(config, digits)
    split = data.draw(digits, 0, noise="symmetric", rate=0.4)
    model = models.make_model("linear", (1, 8, 8), 10, 0)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    for epoch, inverse in enumerate([0, -1, -2, -2]):
        losses = torch.nn.functional.cross_entropy(model(split.x), split.y, reduction="none")
        weights = len(losses) * torch.softmax(inverse * losses.detach(), 0)
        expected = [weights[split.y == c].mean().item() for c in range(10)]
        assert run["epochs"]["class_weight"][epoch] == pytest.approx(expected, rel=1e-3)
        optimizer.param_groups[0]["lr"] = config.lr * 0.1 ** ((epoch >= 2) + (epoch >= 3))  # after 60 % and 80 % of the epochs
        optimizer.zero_grad()
        (weights * losses).mean().backward()
        optimizer.step()


def test_no_warmup_no_ramp(digits):
    absgd, ramp = train.runs(replace(SHORT, methods=("absgd", "ramp"), noise="symmetric", warmup=0), digits)
    assert absgd["parameters"] == ramp["parameters"]


def test_l2rw_takes_the_right_labels_of_a_few(digits):
    """They are the first of each class, and stay in the training set with the labels they have there; the weights are those of
    the formula: a linear model's gradient is an outer product."""
    split = data.draw(digits, 3, imbalance="lt", rho=50, noise="symmetric", rate=0.4)
    x, y = data.clean_part(split, 4)
    assert torch.bincount(y).tolist() == [min(4, n) for n in torch.bincount(split.y_true).tolist()]
    for c in range(10):
        assert torch.equal(x[y == c], split.x[split.y_true == c][:4])
    config = replace(SHORT, methods=("l2rw",), noise="symmetric", epochs=1, batch_size=10_000, clean=4)
    (run,) = train.runs(config, digits)
    split = data.draw(digits, 0, noise="symmetric", rate=0.4)
    layer = models.make_model("linear", (1, 8, 8), 10, 0)[-1].double()

    def slopes(x, y):
        x = torch.cat([x.flatten(1).double(), torch.ones(len(x), 1, dtype=torch.double)], 1)
        return x, (layer(x[:, :-1]).softmax(1) - torch.nn.functional.one_hot(y, 10)).detach()

    (x, out), (clean_x, clean_out) = slopes(split.x, split.y), slopes(*data.clean_part(split, 4))
    products = ((x @ clean_x.T) * (out @ clean_out.T)).mean(1).clamp(min=0)  # Eq. 12
    weights = len(x) * products / products.sum()
    right = split.y == split.y_true
    assert run["epochs"]["clean_weight"][0] == pytest.approx(weights[right].mean().item(), rel=1e-4)
    assert run["epochs"]["flipped_weight"][0] == pytest.approx(weights[~right].mean().item(), rel=1e-4)
    assert weights[right].mean() > 1.5 * weights[~right].mean()


def test_resampled_batches_are_balanced(digits):
    """8,000 draws: 800 of each class on average, with a standard deviation of 27."""
    split = data.draw(digits, 0, imbalance="lt", rho=100)
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    method = methods.METHODS["resample"](Setup(parameters, SHORT, split, 10, 0))
    drawn = torch.cat([method.choose(torch.arange(64)) for _ in range(125)])
    assert (torch.bincount(split.y[drawn], minlength=10) - 800).abs().max() < 5 * 27
    assert len(drawn.unique()) > 0.9 * len(split.y)
    other = methods.METHODS["resample"](Setup(parameters, SHORT, split, 10, 1))
    assert not torch.equal(other.choose(torch.arange(64)), drawn[:64])


def test_random_weights_are_a_rectified_gaussian(digits):
    """Eq. 16: half of them 0, the others with a coefficient of variation of sqrt(pi / 2 - 1) = 0.756 (1,100 samples)."""
    config = replace(SHORT, methods=("random",))
    split = data.draw(digits, 0)
    method = methods.METHODS["random"](Setup([torch.nn.Parameter(torch.zeros(2))], config, split, 10, 0))
    method.loss(torch.randn(1100, 10), torch.arange(1100) % 10)
    weights = method.weights()
    kept = weights[weights > 0]
    assert float(weights.mean()) == pytest.approx(1, rel=1e-5) and 0.45 < len(kept) / 1100 < 0.55
    assert float(kept.std() / kept.mean()) == pytest.approx(0.756, abs=0.06)


def test_nines_and_fours(digits):
    source = data.load_source("digits-9-4")
    split = data.draw(source, 0, imbalance="step", rho=20)
    assert (
        source.classes == 2 and torch.bincount(split.y).tolist() == [100, 5] and torch.bincount(split.y_test).tolist() == [80, 80]
    )
    for label, digit in ((0, 9), (1, 4)):
        rows = {tuple(image.flatten().tolist()) for image in digits.images[digits.labels == digit]}
        assert all(tuple(image.flatten().tolist()) in rows for image in split.x_test[split.y_test == label])


def test_l2rw_tells_right_labels_from_wrong_ones(digits, one_thread):
    """With 40 % of the labels wrong; what that is worth after 120 epochs is for `make l2rw` to say."""
    (run,) = train.runs(Config(model="mlp", noise="symmetric", methods=("l2rw",), epochs=8, seeds=1), digits)
    assert run["epochs"]["clean_weight"][-1] > 1.3 and run["epochs"]["flipped_weight"][-1] < 0.6


class WithoutGraph(methods.Method):
    """ABSGD on softmax regression with public functions and without a graph (docs/scale.md, "From per-sample gradients")."""

    def step(self, model, images, labels):
        pixels, layer, (group,), loss = images.flatten(1), model[-1], self.optimizer.param_groups, self.loss
        params, state = [layer.weight, layer.bias], self.optimizer.state
        buffers = [state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
        logits = layer(pixels).detach().requires_grad_()
        losses = ab.functional.logit_loss(logits, labels)
        (slopes,) = torch.autograd.grad(losses.sum(), logits)
        log_s = ab.functional.weighted_momentum_step_(
            [p.detach() for p in params],
            buffers,
            [slopes[:, :, None] * pixels[:, None, :], slopes],
            losses.detach(),
            loss.log_s,
            lam=loss.lam,
            gamma=loss.gamma,
            mix=loss.mix,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
        )
        loss.log_s.copy_(log_s)
        self.weights = lambda: torch.exp(losses.detach() / loss.lam - log_s) if loss.lam.isfinite() else None


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # weighted_momentum_step_ steps, not the optimizer
@pytest.mark.parametrize("options", [{}, {"mix": 0.5, "lam": -0.5}, {"imbalance": "lt", "lam": 0.5, "warmup": 0.0}], ids=str)
def test_a_training_without_a_graph_comes_to_the_same(monkeypatch, options):
    """It comes to the same parameters, weights and state as ABLoss with ABSGD, to rounding."""
    config = replace(SHORT, model="linear", methods=("absgd",), epochs=6, **options)
    (plain,) = train.runs(config)
    monkeypatch.setattr(methods, "Method", WithoutGraph)
    (own,) = train.runs(config)
    assert own["parameters"] != plain["parameters"]  # the other loop was taken
    assert own["accuracy"] == plain["accuracy"] and own["train_loss"] == pytest.approx(plain["train_loss"], rel=2e-5)
    for key in ("class_weight", "clean_weight"):
        assert own["epochs"][key][-1] == pytest.approx(plain["epochs"][key][-1], rel=2e-4)


def test_two_stages_and_the_reference_agree(digits):
    """Weights are 1 before λ is on, in the same epoch for both; afterwards only the reference's first-step spike
    tells them apart, which the moving average forgets within a step or two at γ = 0.9."""
    config = replace(SHORT, noise="symmetric", methods=("sgd", "absgd", "reference"), model="mlp", epochs=12, lr=0.05)
    sgd, ours, theirs = train.runs(config, digits)
    assert config.switch == 6
    for run in (sgd, ours, theirs):
        assert run["epochs"]["class_weight"][:6] == [[1.0] * 10] * 6
        assert run["train_counts"] == [110] * 10 and run["seconds"] > 0
        assert run["balanced_accuracy"] == pytest.approx(np.mean(run["per_class_recall"]), rel=1e-5)
        assert run["accuracy"] == run["epochs"]["accuracy"][-1]
    assert sgd["epochs"]["class_weight"][6:] == [[1.0] * 10] * 6
    assert ours["epochs"]["accuracy"][:6] == pytest.approx(sgd["epochs"]["accuracy"][:6], abs=0.5)
    for key in ("clean_weight", "flipped_weight"):
        assert ours["epochs"][key][7:] == pytest.approx(theirs["epochs"][key][7:], rel=0.1)
    # λ < 0 attends to small losses, which are the right labels'
    assert ours["epochs"]["clean_weight"][-1] > 1.2 and ours["epochs"]["flipped_weight"][-1] < 0.6


def test_infinite_lambda_is_plain_sgd(digits):
    sgd, ours = train.runs(replace(SHORT, methods=("sgd", "absgd"), lam=math.inf, imbalance="lt"), digits)
    assert ours["train_loss"] == pytest.approx(sgd["train_loss"], rel=1e-4)
    assert ours["per_class_recall"] == pytest.approx(sgd["per_class_recall"], abs=2)


@pytest.mark.deep
def test_cifar_trains(tmp_path):
    cifar_folder(tmp_path, "cifar10", python3_pickle(2))
    config = replace(SHORT, dataset="cifar10", data_root=str(tmp_path), digests=False, model="resnet32", epochs=1)
    config = replace(config, methods=("absgd",), noise="asymmetric")
    first, again = (list(train.runs(config)) for _ in range(2))
    assert first[0]["train_counts"] == [10] * 10 and 0 <= first[0]["accuracy"] <= 100
    assert first[0]["parameters"] == again[0]["parameters"]


def test_progress_is_told_after_each_epoch(digits):
    calls = []
    list(train.runs(replace(SHORT, methods=("sgd", "absgd")), digits, lambda *who: calls.append(who)))
    assert calls == [("sgd", 0)] * 4 + [("absgd", 0)] * 4


def test_a_diverged_run_is_told(digits):
    config = replace(SHORT, methods=("sgd",), lr=1e30)
    results = report.collect(config, list(train.runs(config, digits)))
    json.dumps(results, allow_nan=False)
    assert results["runs"][0]["train_loss"] is None
    assert any("1 of 1 runs of sgd" in note for note in report.notes(results))


# ------------------------------------------------------------------------------------------------ report


def made_up(gains, *, methods=("absgd",), sgd_seeds=None, slower=2.0, train_loss=0.5, **changes):
    """Results in which `methods` differ from sgd by gains[seed] points on each class, and by more on the last."""
    config = replace(Config(epochs=3, seeds=len(gains), methods=("sgd", *methods)), **changes)
    runs = []
    for seed, gain in enumerate(gains):
        for method in ("sgd", *methods):
            if method == "sgd" and sgd_seeds is not None and seed not in sgd_seeds:
                continue
            extra = 0.0 if method == "sgd" else gain
            recall = [70.0 + seed + extra, 60.0 + seed + extra, 50.0 + seed + 2 * extra]
            average = sum(recall) / 3
            runs.append(
                {
                    "method": method,
                    "seed": seed,
                    "accuracy": average,
                    "balanced_accuracy": average,
                    "per_class_recall": recall,
                    "seconds": 1.0 if method == "sgd" else slower,
                    "train_loss": train_loss,
                    "train_counts": [100, 10, 1],
                    "parameters": 64 * "0",
                    "epochs": {
                        "accuracy": [average] * 3,
                        "balanced_accuracy": [average] * 3,
                        "class_weight": [[1.0, 1.0, 1.0], [0.5, 1.0, 20.0], [0.5, None, 20.0]],
                        "clean_weight": [1.0, 1.5, 1.5],
                        "flipped_weight": [1.0, None, 0.1],
                    },
                }
            )
    return report.collect(config, runs, command=["absgd-fast", "train", "--out", "a <b> & c"], threads=1)


def test_summary_and_paired_differences():
    results = made_up([3.0, 6.0, 9.0])
    # balanced accuracy: sgd 60, 61, 62; absgd more by 4, 8, 12
    assert results["summary"]["sgd"]["balanced_accuracy"] == {"mean": 61.0, "std": 1.0, "n": 3}
    paired = results["paired"]["absgd"]["balanced_accuracy"]
    assert paired["mean"] == pytest.approx(8) and paired["stderr"] == pytest.approx(4 / math.sqrt(3)) and paired["n"] == 3
    assert results["paired"]["absgd"]["seconds"]["mean"] == 1.0
    assert list(results["summary"]) == ["sgd", "absgd"] and list(results["paired"]) == ["absgd"]


def test_only_shared_seeds_are_paired():
    results = made_up([3.0, 6.0, 9.0], sgd_seeds={1})
    assert results["summary"]["sgd"]["accuracy"]["std"] is None and results["summary"]["absgd"]["accuracy"]["n"] == 3
    assert results["paired"]["absgd"]["accuracy"] == {"mean": pytest.approx(8), "stderr": None, "n": 1}
    assert "paired" in results and made_up([1.0], sgd_seeds=set())["paired"] == {}


@pytest.mark.parametrize(
    "gains, verdict, help_, classes",
    [
        (
            [3, 4, 5],
            "better",
            r"^Yes. absgd beat sgd by 5.3 ± 0.8 points .*66.3 % against 61.0 %.*3 of them",
            (
                r"rose on 3 of 3 classes, most on class 2 \(\+8.0 points, 1 training image\).*It fell on none.*"
                r"1 largest classes: \+4.0 points; over the 2 smallest: \+6.0\. "
                r"In the last epoch right labels weighed 1.50 on average, wrong ones 0.10"
            ),
        ),
        (
            [-3, -4, -5],
            "worse",
            r"^No, it did harm. absgd fell behind sgd by 5.3 ± 0.8 points .*better in 0 of them",
            r"rose on 0 of 3 classes. It fell on 3, most on class 2 \(−8.0 points, 1 training image\)",
        ),
        ([3, -3, 0.3], "unclear", r"^Not shown. .* \+0.1 ± .*interval, −.* to \+.*, contains 0", "rose on 3"),
        ([30], "unclear", r"^One seed cannot tell: absgd came out \+40.0 points", "rose on 3"),
    ],
)
def test_headline_follows_the_results(gains, verdict, help_, classes):
    answers = report.answers(made_up(gains))
    assert answers["verdict"] == verdict
    assert re.search(help_, answers["help"]) and re.search(classes, answers["classes"])
    assert re.search(r"absgd trained for 2 s per run: 2.00 times sgd's time", answers["cost"])


def test_headline_needs_a_comparison():
    results = made_up([3, 4], sgd_seeds=set())
    assert report.answers(results)["verdict"] == "none" and "Cannot be said" in report.answers(results)["help"]
    assert "Cannot be said" in report.html(results)


def test_cost_names_the_reference_too():
    results = made_up([3, 4], methods=("absgd", "reference"))
    assert "1.00 times reference's time" in report.answers(results)["cost"]


def test_cost_has_no_other_weightings():
    """With twelve methods the sentence would have twelve ratios; the table has them."""
    results = made_up([3, 4], methods=("absgd", "reference", "term"))
    cost = report.answers(results)["cost"]
    assert "sgd's time" in cost and "reference's time" in cost and "term" not in cost


def test_many_methods_have_panels_and_tables():
    """The bars and lines of more than report.MANY methods cannot be told apart in one plot."""
    few = made_up([3, 4], methods=("absgd", "reference", "term", "eg", "cvar"), noise="symmetric")
    many = made_up([3, 4], methods=("absgd", "reference", "term", "eg", "cvar", "chi2"), noise="symmetric", loss="sce")
    titles = [[title for title, _, _ in report.figures(results)] for results in (few, many)]
    assert titles[0] == [
        "Accuracy while training",
        "Recall of each class",
        "Weight of each class",
        "Weight of right and wrong labels",
        "Time",
    ]
    assert titles[1][:2] == ["Accuracy while training", "Recall of each class"] and titles[1][-1] == "Time"
    recall = report.figures(many)[1][2].axes[0]
    assert [label.get_text() for label in recall.get_yticklabels()] == ["sgd", "absgd", "reference", "term", "eg", "cvar", "chi2"]
    assert report.html(many).count("<img") == len(titles[1])


def test_two_names_of_one_method_are_two_lines():
    """Of a recipe too, the plots name the methods as the table does."""
    methods = ("sgd:ce", "absgd", "absgd@lam=5", "absgd@lam=5.0", "ramp", "eg")  # in the order of methods.METHODS
    results = made_up([3, 4], methods=methods) | {"recipe": {"rows": {"absgd": "ABSGD (CE)"}}}
    recall = report.figures(results)[1][2].axes[0]
    assert [label.get_text() for label in recall.get_yticklabels()] == ["sgd", *methods]


def test_notes_tell_what_spoils_the_numbers():
    assert report.notes(made_up([1, 2])) == []
    assert "nothing left to reweight" in report.notes(made_up([1, 2], train_loss=1e-4))[0]
    results = made_up([1, 2], seeds=5) | {"partial": True}
    assert "4 of 10 runs" in report.notes(results)[0]
    assert "interrupted" in report.table(results).title


@pytest.mark.parametrize(
    "config, words, mark",
    [
        ({"methods": ("absgd",), "lam": 0.5}, "digits, mlp, λ = 0.5, 2 seeds", "λ on"),
        ({"methods": ("ramp",)}, "digits, mlp, λ = −0.5, 2 seeds", "full λ"),
        ({"methods": ("absgd", "ramp")}, "digits, mlp, λ = −0.5, 2 seeds", "full λ"),
        ({"methods": ("targetess",)}, "digits, mlp, ESS/n = 0.95, 2 seeds", "λ on"),
        ({"methods": ("targetess", "absgd"), "sign": -1}, "digits, mlp, λ = −0.5, ESS/n = 0.95 with λ < 0, 2 seeds", "λ on"),
        ({"methods": ("cvar",), "per_class": 50}, "digits, 50 images of each class, mlp, 2 seeds", "weights on"),
        ({"methods": ("l2rw",)}, "digits, mlp, 2 seeds", None),
    ],
    ids=lambda value: "+".join(value["methods"]) if isinstance(value, dict) else "",
)
def test_title_and_mark_follow_the_methods(config, words, mark):
    results = made_up([1.0, 2.0], **config)
    assert report.title(results) == words
    _, axes = style.make_axes("epoch", "")
    style.mark_switch(axes, results)
    assert [text.get_text() for text in axes.texts] == [mark] * (mark is not None)
    page = report.html(results)
    assert all(
        ("ab." + name in page) == (method in config["methods"]) for method, name in (("ramp", "Ramp"), ("targetess", "TargetESS"))
    )


@pytest.mark.parametrize("least", [0.2, 0.02, 0.006, 1e-3, 1e-5, 1e-8, 1e-10, 1e-20])
def test_a_logarithmic_axis_has_a_few_labels(least):
    """Over one power of ten as over twenty."""
    figure, axes = style.make_axes("epoch", "weight")
    axes.plot([least, 1.7])
    style.log_if_wide(axes, [least, 1.7])
    figure.canvas.draw()
    low, high = axes.get_ylim()
    labels = [label.get_text() for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert 3 <= len(labels) <= 9 and len(set(labels)) == len(labels) and "" not in labels


def test_methods_can_be_told_apart():
    assert list(style.STYLES) == list(methods.METHODS)
    assert len({(s["color"], str(s["linestyle"])) for s in style.STYLES.values()}) == len(style.STYLES)


@pytest.mark.parametrize("noise, plots", [("none", 4), ("symmetric", 5)])
def test_report_is_one_file_with_plots_and_words(noise, plots):
    results = made_up([3, 4, 5], noise=noise)
    page = report.html(results)
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) == plots and all(b"<svg" in b64decode(image) for image in images)
    assert not re.search(r'(src|href)="(?!data:)', page) and "@import" not in page  # needs no other file, no network
    assert "Yes. absgd beat sgd by 5.3 ± 0.8 points" in page
    assert 'class="card verdict better"' in page
    assert "Cannot" not in page and "nan" not in re.sub(r'src="[^"]+"', "", page)
    assert "a &lt;b&gt; &amp; c" in page and "<b>" not in page  # what comes from outside is escaped
    harm = report.html(made_up([-3, -4, -5], noise=noise))
    assert "No, it did harm" in harm and "card verdict worse" in harm and "Yes." not in harm


def test_report_of_one_run_of_many_classes():
    """One seed, a hundred classes, one method alone: nothing to average, too many bars."""
    results = made_up([1.0])
    for run in results["runs"]:
        run["per_class_recall"] = [float(c) for c in range(100)]
        run["train_counts"] = [max(1, 500 - 5 * c) for c in range(100)]
        run["epochs"]["class_weight"] = [[1.0 + c / 10 for c in range(100)]] * 3
    assert report.html(results).count("<figure") == 4
    alone = report.collect(Config(methods=("sgd",), epochs=3, seeds=1), results["runs"][:1])
    assert report.html(alone).count("<figure") == 3


@pytest.mark.parametrize("module", ["report", "tune_report"])
def test_the_results_are_written_even_if_the_page_cannot_be(module, tmp_path, monkeypatch):
    """A plot that cannot be drawn costs no training."""

    def broken(results):
        raise RuntimeError("no such font")

    monkeypatch.setattr(f"absgd_fast.experiments.{module}.html", broken)
    writes, name = {"report": (report.write, "results.json"), "tune_report": (tune.write, "selection.json")}[module]
    with pytest.raises(RuntimeError, match="no such font"):
        writes({"table": []}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert json.loads((tmp_path / name).read_text()) == {"table": []}


def test_results_json_is_strict_and_complete(tmp_path, digits):
    config = replace(SHORT, methods=("sgd", "absgd"), lam=math.inf, seeds=2, epochs=2)
    results = report.collect(config, list(train.runs(config, digits)), command=["absgd-fast", "train"], threads=1)
    paths = report.write(results, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["results.json", "report.html"]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["report.html", "results.json"]

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(paths[0].read_text(), parse_constant=refuse)
    assert read == results | {"config": results["config"] | {"lr_steps": [0.6, 0.8]}}
    assert {"config", "runs", "summary", "paired", "partial", "command", "environment", "changes"} <= set(read)
    assert read["config"]["lam"] == "inf" and read["config"]["methods"] == ["sgd", "absgd"] and read["partial"] is False
    for run in read["runs"]:
        assert {"method", "seed", "accuracy", "balanced_accuracy", "per_class_recall", "seconds", "parameters"} <= set(run)
        assert len(run["per_class_recall"]) == 10 and len(run["epochs"]["class_weight"]) == 2
    for metrics in read["summary"].values():
        assert set(metrics) == {"accuracy", "balanced_accuracy", "seconds"}
        assert all(set(entry) == {"mean", "std", "n"} for entry in metrics.values())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(made_up([1, 2]), tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("results.json", "old")]


def test_config_refuses_the_reference_where_it_cannot_follow(monkeypatch):
    with pytest.raises(ValueError, match="mix: got 1"):
        replace(SHORT, mix=1.0).check()
    replace(SHORT, mix=1.0, methods=("sgd", "absgd")).check()
    monkeypatch.setitem(sys.modules, "absgd", None)  # as if not installed
    with pytest.raises(ValueError, match="pip install absgd==0.0.1"):
        SHORT.check()


def test_the_epochs_may_look_at_some_of_the_test_images(digits):
    """The training and its end are the same; the epochs' accuracies are those on these images, which are always the same ones."""
    config = replace(SHORT, methods=("absgd",), epochs=2)
    few = replace(config, test_images=7)
    (whole,), (some,), (again,) = ([*train.runs(one, digits)] for one in (config, few, few))
    different = {"accuracy", "balanced_accuracy"}
    for one, other in ((some, again), (whole, some)):
        assert all(one[key] == other[key] for key in one if key not in ("seconds", "epochs"))
        assert all(one["epochs"][key] == other["epochs"][key] for key in one["epochs"] if key not in different)
    assert some["epochs"] == again["epochs"]
    assert all(round(accuracy * 7 / 100, 3).is_integer() for accuracy in some["epochs"]["accuracy"])
    split = data.draw(digits, 0)
    looked_at = data.some_test_images(split, 7)
    assert len(looked_at.y_test) == 7 and torch.equal(looked_at.x, split.x)
    places = [torch.nonzero((split.x_test == image).flatten(1).all(1)).item() for image in looked_at.x_test]
    assert places == sorted(places) and torch.equal(split.y_test[places], looked_at.y_test)
    assert data.some_test_images(split, 600) is data.some_test_images(split, None) is split


@pytest.mark.parametrize(
    "methods, judged",
    [
        (("sgd:sce", "term", "absgd@lam=2"), "absgd@lam=2"),
        (("sgd:sce", "term"), "term"),
        (("sgd:sce",), "sgd:sce"),
        ((), None),
    ],
)
def test_the_report_judges_absgd_first(methods, judged):
    assert summary.judged(summary.by_method(made_up([3, 4], methods=methods)["runs"])) == judged


@pytest.mark.parametrize(
    "methods, words, absent",
    [
        (("sgd", "absgd@lam=2"), ["λ = 2"], ["0.5"]),
        (("sgd", "absgd@lam=2", "ramp"), [], ["λ ="]),
        (("absgd", "ramp"), ["λ = −0.5"], []),
        (("targetess@share=0.7@sign=-1",), ["ESS/n = 0.7 with λ < 0"], ["λ ="]),
        (("targetess@share=0.7", "targetess"), [], ["ESS"]),
    ],
)
def test_the_title_names_what_all_methods_have(methods, words, absent):
    results = made_up([3, 4], methods=())
    results["config"]["methods"] = list(methods)
    text = report.title(results)
    assert all(word in text for word in words) and not any(word in text for word in absent), text


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model": "linear", "trainable": "fc+lb"}, "the model has no residual blocks"),
        ({"model": "linear", "augment": "randaugment"}, "augment: got randaugment, expected none or crop-flip"),
    ],
)
def test_settings_that_the_data_or_the_model_lack_are_refused_early(options, words, digits):
    with pytest.raises(ValueError, match=re.escape(words)):
        Config(**options).check_source(digits)


def test_batch_normalisation_needs_two_images(digits):
    config = Config(model="preact", batch_size=1, epochs=1, seeds=1, methods=("sgd",), per_class=2)
    with pytest.raises(ValueError, match="^batch-size: 1 leaves no batch of two images in a process"):
        list(train.runs(config, digits))
