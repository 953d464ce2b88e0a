"""The data sets in idx files: reading, what is wrong with a bad file, where files are found, and trainings on them."""

import gzip
import hashlib
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import in_an_empty_folder, refused  # noqa: F401 (a fixture)

from absgd_fast import __main__ as cli
from absgd_fast import _backend
from absgd_fast.experiments import data, idx, report, train
from absgd_fast.experiments.train import Config

PER_CLASS = 6
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(values, kind=8):
    """An idx file as its format says, byte by byte."""
    values = np.asarray(values, dtype=np.uint8)
    return bytes((0, 0, kind, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def contents(per_class=PER_CLASS):
    """{file: values} of a data set: `per_class` training images of each class in a random order, and 20 to test."""
    random = np.random.default_rng(0)
    y, y_test = random.permutation(np.arange(10 * per_class) % 10), np.arange(20) % 10
    x, x_test = (random.integers(0, 100, (len(labels), 28, 28)) for labels in (y, y_test))
    for images, labels in ((x, y), (x_test, y_test)):
        for image, label in zip(images, labels):
            image[2 * label : 2 * label + 3] += 150  # so that a network can tell the classes
    return dict(zip(FILES, (x, y, x_test, y_test)))


def idx_folder(folder, end="", dot="-", per_class=PER_CLASS):
    """Writes the four files, "train-images" + dot + "idx3-ubyte" + end and so on; returns {usual name: values}."""
    folder.mkdir(parents=True, exist_ok=True)
    found = contents(per_class)
    for name, values in found.items():
        content = idx_bytes(values)
        (folder / (name.replace("-idx", f"{dot}idx") + end)).write_bytes(gzip.compress(content) if end else content)
    return found


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_files_come_back_as_written(tmp_path, end, dot):
    x, y, x_test, y_test = idx_folder(tmp_path, end, dot).values()
    loaded = idx.load_idx(str(tmp_path), "mnist", digests=False)
    for images, labels, (given_x, given_y) in ((*loaded[:2], (x, y)), (*loaded[2:], (x_test, y_test))):
        assert images.shape == (len(given_y), 1, 28, 28) and images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert torch.equal(images[:, 0], torch.from_numpy(given_x.astype(np.uint8))) and labels.tolist() == given_y.tolist()


def test_a_plain_file_comes_before_a_packed_one(tmp_path):
    idx_folder(tmp_path, ".gz")
    plain = contents()
    (tmp_path / FILES[1]).write_bytes(idx_bytes(plain[FILES[1]][::-1]))
    assert idx.load_idx(tmp_path, "kmnist", digests=False)[1].tolist() == plain[FILES[1]][::-1].tolist()


def test_a_large_file_is_read_in_parts(tmp_path):
    """More than the mebibyte that is read at once, and no multiple of it."""
    values = np.random.default_rng(0).integers(0, 256, (3001, 28, 28), dtype=np.uint8)
    for name, pack in (("a", bytes), ("a.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(idx_bytes(values)))
        assert torch.equal(idx.read_idx(tmp_path / name, 3), torch.from_numpy(values))


IMAGES, LABELS = idx_bytes(contents()[FILES[0]]), idx_bytes(contents()[FILES[1]])
HUGE = bytes((0, 0, 8, 3)) + struct.pack(">3I", *3 * [2**32 - 1])
NO_STRIDES = bytes((0, 0, 8, 3)) + struct.pack(">3I", 0, *2 * [2**32 - 1])  # no values, but torch refuses such sizes


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    "file, content, message",
    [
        (0, b"", "it is empty, expected 00 00 08 03 (unsigned bytes in 3 dimensions)"),
        (0, b"\0\0\x08", "it begins with the bytes 00 00 08, expected 00 00 08 03"),
        (0, b"GIF89a", "it begins with the bytes 47 49 46 38, expected 00 00 08 03"),
        (0, LABELS, "it begins with the bytes 00 00 08 01, expected 00 00 08 03"),
        (1, IMAGES, "it begins with the bytes 00 00 08 03, expected 00 00 08 01 (unsigned bytes in 1 dimension)"),
        (0, idx_bytes(np.zeros((2, 28, 28)), kind=13), "it begins with the bytes 00 00 0d 03"),
        (0, IMAGES[:15], "it ends inside its header of 16 bytes"),
        (1, LABELS[:7], "it ends inside its header of 8 bytes"),
        (0, IMAGES[:-1], "it holds 47039 values, expected the 60 × 28 × 28 = 47040 of its header"),
        (0, IMAGES[:-20], "it holds 47020 values, expected the 60 × 28 × 28 = 47040 of its header"),
        (0, IMAGES + b"\0", "it holds more values, expected the 60 × 28 × 28 = 47040 of its header"),
        (1, LABELS[:-3], "it holds 57 values, expected the 60 = 60 of its header"),
        (0, HUGE, "which cannot hold the 4294967295 × 4294967295 × 4294967295 ="),  # memory is not even asked for
        (0, NO_STRIDES, "is not the idx file that is expected: "),
        (0, idx_bytes(np.zeros((60, 32, 28))), "got 60 × 32 × 28 values, expected one or more images of 28 × 28"),
        (0, idx_bytes(np.zeros((0, 28, 28))), "got 0 × 28 × 28 values, expected one or more images"),
        (1, idx_bytes(np.arange(60) % 11), "got the label 10, expected labels in [0, 10)"),
        (1, idx_bytes(np.arange(59) % 10), "60 images and"),
        (3, idx_bytes(np.arange(21) % 10), "20 images and"),
    ],
)
def test_a_bad_idx_file_is_named(tmp_path, file, content, message, zipped):
    end = ".gz" * zipped
    idx_folder(tmp_path, end)
    bad = tmp_path / (FILES[file] + end)
    bad.write_bytes(gzip.compress(content) if zipped else content)
    if not zipped and content == IMAGES[:-20]:
        message = "which cannot hold the 60 × 28 × 28 = 47040 values of its header"  # known before it is read
    with pytest.raises(ValueError, match="idx[13]-ubyte") as caught:
        idx.load_idx(tmp_path, "fashion-mnist", digests=False)
    assert str(bad) in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda packed: packed[: len(packed) // 2], "Compressed file ended"),
        (lambda packed: IMAGES, "Not a gzipped file"),
        (lambda packed: packed[:-8] + bytes(4) + packed[-4:], "CRC check failed"),
        (lambda packed: packed[:2000] + bytes(200) + packed[2200:], ""),
    ],
)
def test_a_damaged_gzip_file_is_named(tmp_path, change, message):
    idx_folder(tmp_path, ".gz")
    bad = tmp_path / (FILES[0] + ".gz")
    bad.write_bytes(change(bad.read_bytes()))
    with pytest.raises(ValueError, match="is not the idx file that is expected") as caught:
        idx.load_idx(tmp_path, "fashion-mnist", digests=False)
    assert str(bad) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("name", idx.DATASETS)
@pytest.mark.parametrize("file", range(4))
def test_a_file_with_other_values_is_refused(tmp_path, monkeypatch, name, end, file):
    """In one line with both digests, which are those of `git hash-object`; packing does not change them."""
    written = list(idx_folder(tmp_path, end).values())
    ids = []
    for values in written:
        content = idx_bytes(values)
        ids.append(hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
    monkeypatch.setitem(idx.DIGESTS, name, (*ids[:file], known := idx.DIGESTS[name][file], *ids[file + 1 :]))
    with pytest.raises(ValueError, match="is not the file that is distributed") as caught:
        idx.load_idx(tmp_path, name)
    line = str(caught.value)
    assert all(word in line for word in (f"{tmp_path / FILES[file]}{end}", ids[file], known, idx.GET[name], "--no-digests"))
    assert "\n" not in line
    with pytest.raises(ValueError, match="--no-digests"):
        data.load_source(name, tmp_path)
    monkeypatch.setitem(idx.DIGESTS, name, tuple(ids))
    assert torch.equal(idx.load_idx(tmp_path, name)[0], idx.load_idx(tmp_path, name, digests=False)[0])


def test_the_known_digests_are_of_sha1():
    known = [digest for digests in idx.DIGESTS.values() for digest in digests]
    assert list(idx.DIGESTS) == list(idx.DATASETS) and len(set(known)) == 12
    assert all(len(digest) == 40 and set(digest) <= set("0123456789abcdef") for digest in known)


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_files_are_the_known_ones():
    """Though its gzip files are packed otherwise than the distributed ones."""
    x, y, x_test, y_test = idx.load_idx(FASHION_MNIST, "fashion-mnist")
    assert x.shape == (60000, 1, 28, 28) and torch.bincount(y).tolist() == [6000] * 10 and len(x_test) == len(y_test) == 10000


# ------------------------------------------------------------------------------------------------ where the files are


@pytest.mark.parametrize("inside", [".", "fashion-mnist", "FashionMNIST/raw"])
def test_the_folder_or_the_one_around_it(tmp_path, inside):
    idx_folder(tmp_path / inside)
    assert len(idx.load_idx(tmp_path, "fashion-mnist", digests=False)[0]) == 10 * PER_CLASS


@pytest.mark.parametrize("where", ["home", "dirs", "prefix"])
def test_shared_data_is_found(tmp_path, monkeypatch, where):
    """In the user's folder, the system's, or Python's own, in this order."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_DIRS", f"relative:{tmp_path / 'nothing'}:{tmp_path / 'dirs'}:")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    share = tmp_path / where / "share" if where == "prefix" else tmp_path / where
    idx_folder(share / "datasets" / "kmnist", per_class=3)
    assert len(idx.load_idx(None, "kmnist", digests=False)[0]) == 30
    idx_folder(tmp_path / "home" / "datasets" / "kmnist", per_class=4)
    assert len(idx.load_idx(None, "kmnist", digests=False)[0]) == 40


def test_folders_of_shared_data(monkeypatch):
    """As the XDG standard says: an unset or empty variable has a default, and relative paths do not count."""
    shared = ["/usr/local/share", "/usr/share"]
    for home, dirs, expected in (
        (None, None, ["/me/.local/share", *shared]),
        ("", "", ["/me/.local/share", *shared]),
        ("/data", "/a:b::/usr/share", ["/data", "/a", "/usr/share", "/usr/local/share"]),
        ("data", "/a", ["/a", *shared]),
    ):
        monkeypatch.setenv("HOME", "/me")
        for name, value in (("XDG_DATA_HOME", home), ("XDG_DATA_DIRS", dirs)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        assert list(map(str, _backend.data_folders())) == expected


@pytest.mark.parametrize(
    "name, words", [("mnist", "yann.lecun.com"), ("kmnist", "kmnist"), ("fashion-mnist", "apt install dataset-fashion-mnist")]
)
def test_without_files_one_line_says_how_to_get_them(tmp_path, monkeypatch, name, words, capsys, in_an_empty_folder):
    monkeypatch.setattr(_backend, "data_folders", lambda: [tmp_path / "share"])
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    for options, place in (([], f"{tmp_path}/share/datasets/{name}, and no --data-root"), (["--data-root", "there"], "in there")):
        line = refused(capsys, "train", "--dataset", name, *options)
        assert all(word in line for word in (words, place, "train-images-idx3-ubyte, ", "may end in .gz"))
    assert list(in_an_empty_folder.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "tune"])
def test_a_folder_that_cannot_be_opened_is_refused(command, capsys, in_an_empty_folder):
    """As one that is not there: exit code 2, one line, nothing written."""
    assert "File name too long" in refused(capsys, command, "--dataset", "mnist", "--data-root", "a" * 300)
    assert list(in_an_empty_folder.iterdir()) == []


def test_a_missing_file_is_named(tmp_path):
    idx_folder(tmp_path, ".gz")
    (tmp_path / (FILES[3] + ".gz")).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz in .*mnist has four"
    ):
        idx.load_idx(tmp_path, "mnist", digests=False)
    with pytest.raises(ValueError, match="use one of mnist, fashion-mnist, kmnist"):
        idx.load_idx(tmp_path, "emnist", digests=False)


def test_every_class_has_training_images(tmp_path):
    idx_folder(tmp_path)
    (tmp_path / FILES[1]).write_bytes(idx_bytes(np.arange(60) % 9))
    with pytest.raises(ValueError, match="kmnist: class 9 has no training images"):
        data.load_source("kmnist", tmp_path, digests=False)


# ------------------------------------------------------------------------------------------------ in a training

# (class, the class it is mistaken for), by the names in the papers
NAMES = ["top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
FASHION = [("boot", "sneaker"), ("sneaker", "sandal"), ("pullover", "shirt"), ("coat", "dress"), ("dress", "coat")]
MISTAKEN = {
    "fashion-mnist": {(NAMES.index(a), NAMES.index(b)) for a, b in FASHION},
    "mnist": {(7, 1), (2, 7), (5, 6), (6, 5), (3, 8)},
    "kmnist": {(c, (c + 1) % 10) for c in range(10)},
}


@pytest.mark.parametrize("name", idx.DATASETS)
def test_asymmetric_noise_is_the_papers(tmp_path, name):
    idx_folder(tmp_path, per_class=40)
    source = data.load_source(name, tmp_path, digests=False)
    assert source.shape == data.SHAPES[name] == (1, 28, 28) and source.n_max == 40 and source.augment == "none"
    split = data.draw(source, 0, noise="asymmetric", rate=0.4)
    assert {(a, b) for a, b in zip(split.y_true.tolist(), split.y.tolist()) if a != b} == MISTAKEN[name]
    torch.testing.assert_close(split.x.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(split.x.std(), torch.tensor(1.0))
    assert source.images.dtype == torch.uint8  # the source is not changed by drawing


def test_nines_and_fours_of_mnist(tmp_path):
    """Nines are class 0 and dominate; the test images are MNIST's own."""
    idx_folder(tmp_path, per_class=40)
    every = data.load_source("mnist", tmp_path, digests=False)
    source = data.load_source("mnist-9-4", tmp_path, digests=False)
    assert source.shape == data.SHAPES["mnist-9-4"] == (1, 28, 28) and (source.classes, source.n_max) == (2, 40)
    assert [source.class_name(c) for c in (0, 1)] == ["9", "4"] and source.mapping is None
    for (images, labels), (of_all, labels_of_all) in zip(
        ((source.images, source.labels), source.test), ((every.images, every.labels), every.test)
    ):
        assert len(labels) == ((labels_of_all == 9) | (labels_of_all == 4)).sum() > 0
        for label, digit in ((0, 9), (1, 4)):
            assert torch.equal(images[labels == label], of_all[labels_of_all == digit])
    split = data.draw(source, 0, imbalance="step", rho=20)
    assert torch.bincount(split.y).tolist() == [40, 2] and torch.bincount(split.y_test).tolist() == [2, 2]


@pytest.mark.parametrize("source", ["digits", "fashion-mnist"])
def test_images_per_class(tmp_path, source):
    """The seed chooses them, imbalance comes after, and the test set stays whole."""
    idx_folder(tmp_path, per_class=40)
    source = data.load_source(source, tmp_path, digests=False)
    whole, few, other = (data.draw(source, seed, per_class=n) for seed, n in ((0, None), (0, 20), (1, 20)))
    assert torch.bincount(few.y).tolist() == [20] * 10 and not torch.equal(few.x, other.x)
    assert torch.equal(few.y_test, whole.y_test) and len(few.x_test) == len(whole.x_test)
    if source.test is None:  # else its images are standardised by those of the training set
        assert torch.equal(few.x_test, whole.x_test)
    tail = data.draw(source, 0, per_class=20, imbalance="lt", rho=10)
    assert torch.bincount(tail.y).tolist() == data.class_counts(20, 10, "lt", 10)
    assert torch.equal(data.draw(source, 0, per_class=source.n_max).x, whole.x)
    for n in (0, source.n_max + 1):
        with pytest.raises(ValueError, match=rf"in \[1, {source.n_max}\], got {n}"):
            data.draw(source, 0, per_class=n)
    with pytest.raises(ValueError, match=f"per-class: got 5000, expected at most {source.n_max}, .* class of {source.name}"):
        list(train.runs(Config(per_class=5000), source))


@pytest.mark.parametrize("model", ["linear", "mlp", "cnn"])
def test_a_training_on_idx_files(tmp_path, model, monkeypatch, capsys, in_an_empty_folder):
    monkeypatch.setattr(report, "html", lambda results: "")
    idx_folder(tmp_path / "files", ".gz")
    options = ["--dataset", "fashion-mnist", "--data-root", "files", "--model", model, "--per-class", "5", "--epochs", "14"]
    options += ["--no-digests", "--methods", "sgd,absgd", "--seeds", "1", "--batch-size", "10", "--lr", "0.05", "--lam", "-5"]
    assert cli.main(["train", *options, "--out", "results"]) == 0
    results = json.loads((in_an_empty_folder / "results" / "results.json").read_text())
    assert results["environment"]["threads"] == 1 and results["config"]["per_class"] == 5
    assert "fashion-mnist, 5 images of each class" in " ".join(capsys.readouterr().out.split())
    for run in results["runs"]:
        assert run["train_counts"] == [5] * 10 and run["accuracy"] > 50  # 10 is chance


def test_resnet32_is_refused(tmp_path, capsys, in_an_empty_folder):
    line = refused(capsys, "train", "--dataset", "kmnist", "--data-root", str(tmp_path), "--model", "resnet32")
    assert "resnet32 takes 32×32 images, these are 28×28" in line
