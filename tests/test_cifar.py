"""Digests, and the superclasses and asymmetric noise of CIFAR-100. tests/test_experiments.py has the reading of the files."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from test_experiments import cifar_folder, python3_pickle

from absgd_fast.experiments import cifar, data


def with_superclasses(coarse):
    """Writes a file of CIFAR-100 in which fine class c has the superclass coarse[c]."""

    def write(pixels, labels, key):
        return pickle.dumps({b"data": pixels, key: labels, b"coarse_labels": [coarse[label] for label in labels]}, 2)

    return write


def of_five():
    """A superclass for each class, with five classes in each."""
    order = np.random.default_rng(3).permutation(100)
    return [int(place) // 5 for place in np.argsort(order)]


def test_asymmetric_noise_of_cifar100_stays_in_the_superclass(tmp_path):
    """Patrini et al. 2017: each class is mistaken for the next one of its superclass, circularly."""
    coarse = of_five()
    cifar_folder(tmp_path, "cifar100", with_superclasses(coarse), per_file=2000)
    source = data.load_source("cifar100", tmp_path, digests=False)
    split = data.draw(source, 0, noise="asymmetric", rate=0.5)
    mistaken = {(a, b) for a, b in zip(split.y_true.tolist(), split.y.tolist()) if a != b}
    assert len(mistaken) == 100  # 20 samples of each class, so one is flipped but for a chance of 1e-4
    for a, b in mistaken:
        assert coarse[a] == coarse[b]
        between = [c for c in range(100) if coarse[c] == coarse[a]]
        assert b == between[(between.index(a) + 1) % 5]


@pytest.mark.parametrize(
    "fine, coarse, classes, expected",
    [
        ([0, 1, 2, 3, 4], [7, 5, 7, 5, 7], 5, (2, 3, 4, 1, 0)),
        ([4, 3, 2, 1, 0, 0, 4], [7, 5, 7, 5, 7, 7, 7], 5, (2, 3, 4, 1, 0)),  # the order of the samples does not count
        ([0, 1, 2], [0, 1, 2], 3, (0, 1, 2)),  # alone in its superclass
        ([0, 2], [0, 0], 4, (2, 1, 0, 3)),  # classes without samples
    ],
)
def test_superclass_mapping(fine, coarse, classes, expected):
    assert cifar.superclass_mapping(torch.tensor(fine), torch.tensor(coarse), classes) == expected


def test_a_class_of_two_superclasses_is_refused():
    with pytest.raises(ValueError, match="class lies in more than one superclass"):
        cifar.superclass_mapping(torch.tensor([0, 0]), torch.tensor([0, 1]), 1)


@pytest.mark.parametrize(
    "write, message",
    [
        (python3_pickle(2), "train has no coarse_labels; unpack cifar100"),
        # 200 samples: two superclasses for each class
        (
            lambda pixels, labels, key: pickle.dumps({b"data": pixels, key: labels, b"coarse_labels": [*range(200)]}),
            "more than one",
        ),
    ],
    ids=["none", "several"],
)
def test_superclasses_are_needed_only_for_asymmetric_noise(tmp_path, write, message):
    cifar_folder(tmp_path, "cifar100", write, per_file=200)
    source = data.load_source("cifar100", tmp_path, digests=False)
    assert len(data.draw(source, 0, noise="symmetric", rate=0.2).y) == 200
    with pytest.raises(ValueError, match=f"asymmetric noise of cifar100 .*{message}") as caught:
        data.draw(source, 0, noise="asymmetric", rate=0.2)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_as_many_superclasses_as_labels(tmp_path):
    def write(pixels, labels, key):
        return pickle.dumps({b"data": pixels, key: labels, b"coarse_labels": [0]}, 2)

    cifar_folder(tmp_path, "cifar100", write)
    with pytest.raises(ValueError, match="train is not a CIFAR batch file .*coarse_labels: 1, but 20 labels"):
        data.load_cifar(tmp_path, "cifar100", digests=False)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_files_of_another_md5_are_refused(tmp_path, monkeypatch, name):
    """Each of them, before anything in it is unpickled."""
    cifar_folder(tmp_path, name, python3_pickle(2), per_file=100)
    files = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in (tmp_path / cifar.FILES[name][0]).iterdir()}
    known = cifar.DIGESTS[name]
    assert set(files) == set(known) and all(len(digest) == 32 for digest in known.values())
    for bad in files:
        monkeypatch.setitem(cifar.DIGESTS, name, files | {bad: known[bad]})
        with pytest.raises(ValueError, match="is not the file that is distributed") as caught:
            data.load_source(name, tmp_path)
        line = str(caught.value)
        assert all(word in line for word in (f"/{bad} ", f"md5 {files[bad]}, expected {known[bad]}", "toronto", "--no-digests"))
        assert "\n" not in line
    monkeypatch.setitem(cifar.DIGESTS, name, files)
    assert data.load_source(name, tmp_path).augment == "crop-flip"


def test_a_file_is_compared_before_it_is_unpickled(tmp_path):
    cifar_folder(tmp_path, "cifar10", lambda *content: b"not a pickle")
    with pytest.raises(ValueError, match="md5"):
        data.load_cifar(tmp_path, "cifar10")
