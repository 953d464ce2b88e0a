"""Folders of images: finding the files, reading them in other processes, and the random changes of training images."""

import math
import multiprocessing
import random as python_random
import shutil
import time
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from absgd_fast.experiments import augment, data, folder, images, train
from absgd_fast.experiments.train import Config

COLOURS = {"cat": (200, 30, 40), "dog": (20, 160, 90), "eel": (90, 60, 220)}


def picture(colour, size=(40, 32), noise=20, seed=0):
    """An image of about one colour."""
    pixels = np.random.default_rng(seed).integers(-noise, noise + 1, (size[1], size[0], 3)) + np.array(colour)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write(path, colour=(100, 150, 200), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(colour, **options).save(path)


def image_folder(root, test="val", per_class=(6, 4, 2), endings=("jpg", "png", "JPEG")):
    """ROOT/train and ROOT/val with three classes, some images one folder deeper."""
    for part, counts in (("train", per_class), (test, (2, 2, 2))):
        for c, (name, count) in enumerate(zip(COLOURS, counts)):
            for i in range(count):
                deep = "more/" * (i % 2)
                write(root / part / name / f"{deep}{i}.{endings[i % 3]}", COLOURS[name], seed=100 * c + i)
    return root


def names(lazy):
    return lazy.names()


# ------------------------------------------------------------------------------------------------ finding the files


@pytest.mark.parametrize("test", ["val", "test"])
def test_a_folder_for_each_class(tmp_path, test):
    image_folder(tmp_path, test)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "cat" / "._0.jpg").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    x, y, x_test, y_test, classes = folder.load_folder(tmp_path, size=16)
    assert (
        classes == ("cat", "dog", "eel") and y.tolist() == [0] * 6 + [1] * 4 + [2] * 2 and y_test.tolist() == [0, 0, 1, 1, 2, 2]
    )
    assert names(x)[6:10] == [f"train/dog/{name}" for name in ("0.jpg", "2.JPEG", "more/1.png", "more/3.jpg")]
    assert all(name.startswith(f"{test}/{classes[label]}/") for name, label in zip(names(x_test), y_test.tolist()))
    assert x.shape == (12, 3, 16, 16) and x_test.shape == (6, 3, 16, 16) and y.dtype == y_test.dtype == torch.int64


def test_val_comes_before_test(tmp_path):
    image_folder(tmp_path)
    shutil.copytree(tmp_path / "val", tmp_path / "test")
    assert all(name.startswith("val/") for name in names(folder.load_folder(tmp_path)[2]))


@pytest.mark.parametrize(
    "name, train_file, test_file",
    [
        ("folder", "train.txt", "val.txt"),
        ("folder", "train.txt", "test.txt"),
        ("folder", "my_train_set.txt", "my_test_set.txt"),  # which is named
        ("imagenet-lt", "ImageNet_LT_train.txt", "ImageNet_LT_test.txt"),
        ("places-lt", "Places_LT_train.txt", "Places_LT_test.txt"),
        ("inaturalist2018", "iNaturalist18_train.txt", "iNaturalist18_val.txt"),
    ],
)
def test_index_files(tmp_path, name, train_file, test_file):
    """They say which images there are, in their order; the folders do not."""
    image_folder(tmp_path)
    (tmp_path / train_file).write_text("train/eel/0.jpg 0\ntrain/cat/a b.jpg\t2\n\ntrain/dog/0.jpg 1\ntrain/dog/2.JPEG 1\n")
    (tmp_path / test_file).write_text("val/dog/0.jpg 1\nval/eel/0.jpg 0\nval/cat/0.jpg 2\n")
    root = tmp_path / train_file if train_file.startswith("my") else tmp_path
    x, y, x_test, y_test, classes = folder.load_folder(root, name)
    assert names(x) == ["train/eel/0.jpg", "train/cat/a b.jpg", "train/dog/0.jpg", "train/dog/2.JPEG"]
    assert y.tolist() == [0, 2, 1, 1] and y_test.tolist() == [1, 0, 2] and classes == ("eel", "dog", "cat")
    assert names(x_test) == ["val/dog/0.jpg", "val/eel/0.jpg", "val/cat/0.jpg"] and x.root == str(tmp_path)


@pytest.mark.parametrize(
    "lines, expected",
    [
        ("a/1.jpg 0\nb/1.jpg 1", ("a", "b")),
        ("x/b/1.jpg 0\ny/a/1.jpg 1", ("b", "a")),
        ("a/1.jpg 0\na/2.jpg 1", ("0", "1")),  # two classes in one folder
        ("a/1.jpg 0\nb/2.jpg 0\nc/1.jpg 1", ("0", "1")),  # one class in two
        ("1.jpg 0\n2.jpg 1", ("0", "1")),
    ],
)
def test_names_of_the_classes_of_an_index_file(tmp_path, lines, expected):
    for file in ("train.txt", "val.txt"):
        (tmp_path / file).write_text(lines)
    assert folder.load_folder(tmp_path)[4] == expected


def removed(path):
    return lambda root: shutil.rmtree(root / path)


def indexed(train_lines, test_lines="a/1.jpg 0\nb/1.jpg 1\n"):
    def change(root):
        (root / "train.txt").write_text(train_lines)
        (root / "val.txt").write_text(test_lines)

    return change


RIGHT = "a/1.jpg 0\nb/1.jpg 1\n"


@pytest.mark.parametrize(
    "change, error, message",
    [
        (removed("."), FileNotFoundError, "ROOT, which is no folder: expected the folders train and val or test"),
        (removed("train"), FileNotFoundError, "ROOT: expected the folders train and val or test with a folder for each class"),
        (
            removed("val"),
            FileNotFoundError,
            "or the index files train.txt and val.txt or test.txt; give their folder with --data-",
        ),
        (removed("train/dog"), ValueError, "ROOT/val has the class 'dog' and ROOT/train does not"),
        (removed("val/eel"), ValueError, "ROOT/train has the class 'eel' and ROOT/val does not"),
        (
            lambda root: [*map(shutil.rmtree, (root / "train").iterdir())],
            ValueError,
            "ROOT/train has no folders, expected one for",
        ),
        (
            lambda root: (shutil.rmtree(root / "train/dog"), (root / "train/dog").mkdir()),
            ValueError,
            "ROOT/train/dog has no images, expected one or more files that end in .jpg, .jpeg, .png",
        ),
        (
            lambda root: (root / "train.txt").write_text(RIGHT),
            FileNotFoundError,
            "train.txt has no val.txt or test.txt beside it",
        ),
        (indexed("a/1.jpg 0\nb/1.jpg\n"), ValueError, "ROOT/train.txt:2: got 'b/1.jpg', expected a path from ROOT and a class"),
        (indexed("a/1.jpg 0\n\nb/1.jpg one\n"), ValueError, "ROOT/train.txt:3: got 'b/1.jpg one'"),
        (indexed("a/1.jpg 0\nb/1.jpg -1\n"), ValueError, "ROOT/train.txt:2: got 'b/1.jpg -1'"),
        (indexed("a/1.jpg 0\nb/1.jpg 1.0\n"), ValueError, "ROOT/train.txt:2: got 'b/1.jpg 1.0'"),
        (indexed("/a/1.jpg 0\nb/1.jpg 1\n"), ValueError, "ROOT/train.txt:1: got '/a/1.jpg 0'"),
        (indexed(RIGHT, "a/1.jpg 0\n7\n"), ValueError, "ROOT/val.txt:2: got '7'"),
        (indexed("\n"), ValueError, "ROOT/train.txt has no lines"),
        (
            indexed("a/1.jpg 0\nb/1.jpg 2\n"),
            ValueError,
            "ROOT/train.txt has no image of class 1, expected some of every class 0 … 2",
        ),
        (indexed(RIGHT, "a/1.jpg 0\n"), ValueError, "ROOT/val.txt has no image of class 1, expected some of every class 0 … 1"),
        (indexed("a/1.jpg 0\n"), ValueError, "ROOT/train.txt has no image of class 1"),
    ],
)
def test_a_wrong_folder_is_refused_in_one_line(tmp_path, change, error, message):
    root = image_folder(tmp_path / "images")
    change(root)
    with pytest.raises(error) as caught:
        data.load_source("folder", root)
    assert message in str(caught.value).replace(str(root), "ROOT") and "\n" not in str(caught.value)


def test_other_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"imagenet-lt: no file ImageNet_LT_train\.txt in .*OpenLongTailRecognition"):
        data.load_source("imagenet-lt", tmp_path)
    with pytest.raises(ValueError, match="--data-root"):
        data.load_source("folder")
    with pytest.raises(ValueError, match="use one of folder, imagenet-lt, places-lt, inaturalist2018"):
        folder.load_folder(tmp_path, "imagenet")
    (tmp_path / "list.txt").write_text(RIGHT)
    with pytest.raises(ValueError, match="expected a folder, or an index file with 'train' in its name"):
        folder.load_folder(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="image-size: got 0, expected at least 1"):
        data.load_source("folder", image_folder(tmp_path / "images"), image_size=0)


# ------------------------------------------------------------------------------------------------ sources and splits


@pytest.fixture
def source(tmp_path):
    return data.load_source("folder", image_folder(tmp_path / "images"), image_size=16)


def test_a_split_of_a_folder_reads_nothing(source, monkeypatch):
    monkeypatch.setattr(images, "read", None)
    assert (source.classes, source.n_max, source.shape, source.augment) == (3, 2, (3, 16, 16), "crop-flip")
    assert source.class_names == ("cat", "dog", "eel") and source.class_name(1) == "dog"
    for options, counts in (
        ({}, [6, 4, 2]),  # all that there are: such data sets are imbalanced by themselves
        ({"per_class": 1}, [1, 1, 1]),
        ({"per_class": 2}, [2, 2, 2]),
        ({"imbalance": "lt", "rho": 2}, [2, 1, 1]),
    ):
        split = data.draw(source, 0, **options)
        assert data.train_counts(split, 3) == counts and len(split.x) == len(split.y) == sum(counts)
        of = [source.class_names.index(name.split("/")[1]) for name in names(split.x)]
        assert of == split.y.tolist() and len(set(names(split.x))) == len(of)
        assert names(split.x_test) == names(source.test[0])
    first, again, other = (names(data.draw(source, seed).x) for seed in (0, 0, 1))
    assert first == again != other and sorted(first) == sorted(other)
    x, y, _ = split.part(torch.tensor([3, 0]))
    assert names(x) == [names(split.x)[3], names(split.x)[0]] and y.tolist() == [2, 0]


def test_clean_part_of_a_folder_is_a_tensor(source):
    split = data.draw(source, 0)
    x, y = data.clean_part(split, 2)
    assert y.tolist() == [0, 0, 1, 1, 2, 2] and torch.equal(x[2:4], split.x[6:8].tensor())


def test_the_fingerprint_is_of_paths_sizes_and_labels(source, tmp_path):
    root = tmp_path / "images"

    def fingerprint(at=root):
        return data.load_source("folder", at, image_size=16).fingerprint

    before = source.fingerprint
    assert before.startswith("folder, 12 labels, images of 3×16×16, sha256 ") and before == fingerprint()
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    assert fingerprint(moved) == before
    pixels = (moved / "train/cat/0.jpg").read_bytes()
    (moved / "train/cat/0.jpg").write_bytes(bytes(len(pixels)))
    assert fingerprint(moved) == before  # they are not read
    seen = {before}
    for change in (
        lambda: (moved / "train/cat/0.jpg").write_bytes(pixels + b"\0"),
        lambda: (moved / "val/cat/0.jpg").write_bytes(pixels[:-1]),
        lambda: (moved / "train/cat/0.jpg").rename(moved / "train/cat/9.jpg"),
        lambda: (moved / "train/cat/9.jpg").rename(moved / "train/dog/9.jpg"),
    ):
        change()
        seen.add(fingerprint(moved))
    assert len(seen) == 5
    assert data.load_source("folder", root, image_size=8).fingerprint not in seen
    (root / "train/dog/0.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"train/dog/0\.jpg: this image is not there") as caught:
        _ = source.fingerprint
    assert "\n" not in str(caught.value)


def test_background_noise_and_a_class_without_images():
    labels = torch.arange(300) % 3
    made = data.Source("made", 3, torch.zeros(300, 1, 2, 2), labels, None, n_max=80, n_test=10)
    split = data.draw(made, 0, noise="background", rate=0.5, background=2)
    assert set(split.y[split.y != split.y_true].tolist()) == {2}
    lacking = data.Source("made", 4, torch.zeros(300, 1, 2, 2), labels, None, n_max=80, n_test=10, class_names=tuple("abcd"))
    with pytest.raises(ValueError, match="class d of made has no training image"):
        data.draw(lacking, 0)


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode, ending):
    if (mode, ending) in {("CMYK", "png"), ("P", "jpg"), ("RGBA", "jpg")}:
        ending = {"png": "jpg", "jpg": "png"}[ending]  # the format does not have the mode
    image = Image.new("RGB", (50, 30), (255, 0, 0)).convert(mode, dither=Image.Dither.NONE)
    image.save(tmp_path / f"a.{ending}")
    expected = np.asarray(image.convert("RGB").resize((9, 9)))
    assert np.abs(images.read(tmp_path / f"a.{ending}", 9).astype(int) - expected).max() <= 4


def test_normalised_with_imagenets_mean_and_deviation(tmp_path):
    write(tmp_path / "a.png", (10, 128, 250), noise=0)
    x = images.Lazy(tmp_path, ["a.png"], 8).tensor()
    expected = [(10 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (250 / 255 - 0.406) / 0.225]
    assert x.dtype == torch.float32 and x.shape == (1, 3, 8, 8)
    torch.testing.assert_close(x, torch.tensor(expected).view(1, 3, 1, 1).expand(1, 3, 8, 8), rtol=0, atol=1e-6)


def smooth(width, height):
    """An image without sharp edges, so that ways of resizing differ little; each colour has its own slope."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((255 * np.stack([x, y, 1 - (x + y) / 2], 2)).round().astype(np.uint8))


@pytest.mark.parametrize("width, height", [(512, 400), (300, 640), (100, 100), (2000, 1500)])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_test_image_is_resized_and_cropped_in_the_middle(tmp_path, width, height, ending):
    """Shorter side to 112 · 256/224 = 128, and the 112 × 112 in its middle. The largest JPEG is decoded at a part of its size."""
    smooth(width, height).save(tmp_path / f"a.{ending}", **({"quality": 95} if ending == "jpg" else {}))
    short = min(width, height)
    resized = smooth(width, height).resize((round(width * 128 / short), round(height * 128 / short)), Image.Resampling.BILINEAR)
    left, upper = (resized.width - 112) // 2, (resized.height - 112) // 2
    expected = np.asarray(resized.crop((left, upper, left + 112, upper + 112))).astype(int)
    assert np.abs(images.read(tmp_path / f"a.{ending}", 112) - expected).max() <= 4


def test_indexing_reads_nothing_and_tensor_reads_all(tmp_path):
    files = [f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        write(tmp_path / file, (50 * i, 0, 0), noise=0)
    x = images.Lazy(tmp_path, files, 4)
    whole = x.tensor()
    assert whole.shape == x.shape == (5, 3, 4, 4) and len(whole[:, 0].unique()) == 5
    chosen = torch.tensor([4, 0, 4])
    for index in (chosen, slice(1, 4), slice(None, None, 2), whole[:, 0, 0, 0] > 0, slice(0, 0)):
        part = x[index]
        assert isinstance(part, images.Lazy) and torch.equal(part.tensor(), whole[index]) and part.shape == whole[index].shape
    assert torch.equal(x[chosen][torch.tensor([1])].tensor(), whole[:1])
    with pytest.raises(TypeError, match="a slice or a vector"):
        x[torch.tensor(1)]
    assert [len(part) for part in images.whole(x, size=2)] == [2, 2, 1] and torch.equal(
        torch.cat([*images.whole(x, 2, 2)]), whole
    )
    assert torch.equal(torch.cat([*images.whole(whole, size=2)]), whole)
    assert images.as_tensor(whole) is whole and torch.equal(images.as_tensor(x), whole)


BROKEN = {
    "cut.jpg": lambda content: content[: len(content) // 2],
    "empty.jpg": lambda content: b"",
    "text.png": lambda content: b"no image\nat all",
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("file", [*BROKEN, "missing.png"])
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path, file, workers):
    write(tmp_path / "good.jpg", size=(200, 200))
    if file in BROKEN:
        (tmp_path / file).write_bytes(BROKEN[file]((tmp_path / "good.jpg").read_bytes()))
    x, chosen = images.Lazy(tmp_path, ["good.jpg", file], 8), torch.tensor([0, 0, 1, 0]).split(2)
    running = images.batches(x, chosen, augment="crop-flip", seed=0, epoch=0, workers=workers)
    assert len(next(running)) == 2
    for read in (lambda: next(running), lambda: x.tensor(workers)):
        with pytest.raises(ValueError, match="cannot be read as an image") as caught:
            read()
        assert str(caught.value).startswith(str(tmp_path / file)) and "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.fixture
def some(tmp_path):
    files = [f"{i}.jpg" for i in range(10)]
    for i, file in enumerate(files):
        write(tmp_path / file, size=(60, 50), noise=90, seed=i)
    return images.Lazy(tmp_path, files, 24)


CHOSEN = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]).split(5)


@pytest.mark.parametrize("kind", ["files", "tensor"])
@pytest.mark.parametrize("change", images.AUGMENTS)
def test_batches_are_a_function_of_seed_epoch_and_place(some, kind, change):
    """Whoever reads them, and wherever one begins; the generators of torch and Python do not move."""
    if kind == "tensor" and change == "randaugment":
        with pytest.raises(ValueError, match="got randaugment, expected none or crop-flip"):
            images.batches(some.tensor(), CHOSEN, augment=change, seed=0, epoch=0)
        return
    x = some if kind == "files" else some.tensor()
    states = torch.get_rng_state(), python_random.getstate()

    def batches(chosen=CHOSEN, seed=0, epoch=0, **more):
        return [*images.batches(x, chosen, augment=change, seed=seed, epoch=epoch, **more)]

    plain = batches()
    assert [batch.shape for batch in plain] == [(5, 3, 24, 24), (5, 3, 24, 24), (2, 3, 24, 24)]
    assert all(batch.dtype == torch.float32 for batch in plain)
    for first in range(4):
        for workers in (0, 1, 2, 5):
            again = batches(first=first, workers=workers)
            assert len(again) == 3 - first and all(torch.equal(a, b) for a, b in zip(again, plain[first:]))
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == python_random.getstate()
    others = [batches(seed=1), batches(epoch=1), batches([CHOSEN[1], CHOSEN[0], CHOSEN[2]])[1::-1] + plain[2:]]
    if change == "none":
        unchanged = [some[batch].tensor() for batch in CHOSEN]
        assert all(torch.equal(a, b) for batches in (plain, *others) for a, b in zip(batches, unchanged))
    else:
        assert not any(torch.equal(a, b) for batches in others for a, b in zip(batches[:2], plain[:2]))
        same = plain[0][CHOSEN[0] == 1]  # two places of one image
        assert len(same) == 2 and not torch.equal(*same)


def test_unknown_changes_are_refused(some):
    for x in (some, torch.zeros(10, 1, 4, 4)):
        with pytest.raises(ValueError, match="use one of none, crop-flip, randaugment"):
            images.batches(x, CHOSEN, augment="flip", seed=0, epoch=0)


def test_processes_end_with_the_iterator(some):
    """Also when it is not read to its end."""
    running = images.batches(some, CHOSEN * 10, augment="none", seed=0, epoch=0, workers=2)
    next(running)
    assert len(multiprocessing.active_children()) == 2
    running.close()
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_a_training_on_a_folder(tmp_path):
    """The colours tell the classes, so a few epochs are enough; the number of processes changes nothing."""
    source = data.load_source("folder", image_folder(tmp_path, per_class=(12, 12, 6)), image_size=8)
    config = Config(dataset="folder", data_root=str(tmp_path), methods=("absgd",), model="linear", epochs=4, seeds=1, lr=0.01)
    (here,), (there,) = ([*train.runs(replace(config, batch_size=8, workers=workers), source)] for workers in (0, 2))
    assert here["parameters"] == there["parameters"] and here["train_counts"] == [12, 12, 6]
    assert here["accuracy"] > 90  # 33 is chance


# ------------------------------------------------------------------------------------------------ random changes


def test_random_parts_have_the_distribution_of_the_paper():
    """A share of the area s and a ratio r fit a square if s·r ≤ 1 and s/r ≤ 1: with probability min(1, −log s/log 4/3)."""
    random, side, n = Random(0), 4000, 4000
    boxes = [augment.random_box(side, side, random) for _ in range(n)]
    left, upper, right, lower = np.array(boxes).T
    assert left.min() >= 0 and upper.min() >= 0 and right.max() <= side and lower.max() <= side
    shares, logs = (right - left) * (lower - upper) / side**2, np.log((right - left) / (lower - upper))
    grid = np.linspace(0.08, 1, 100_001)
    fits = np.minimum(1, -np.log(grid) / math.log(4 / 3))
    mean = (grid * fits).sum() / fits.sum()
    assert 0.079 < shares.min() < 0.09 and shares.max() > 0.9
    assert abs(shares.mean() - mean) < 4 * shares.std() / math.sqrt(n)
    # log r is uniform where every share fits
    small = logs[shares < 0.75]
    assert abs(small).max() < math.log(4 / 3) + 0.01 and abs(small.mean()) < 4 * math.log(4 / 3) / math.sqrt(3 * len(small))
    assert small.std() == pytest.approx(math.log(4 / 3) / math.sqrt(3), rel=0.05)
    # the place is uniform among those that are possible
    places = left / np.maximum(side - (right - left), 1)
    assert abs(places.mean() - 0.5) < 4 * math.sqrt(1 / 12 / n) and places.std() == pytest.approx(math.sqrt(1 / 12), rel=0.05)


@pytest.mark.parametrize(
    "width, height, expected",
    [(1000, 10, (493, 0, 506, 10)), (10, 1000, (0, 493, 10, 506)), (1, 1, (0, 0, 1, 1))],
)
def test_a_part_that_cannot_be_drawn_is_in_the_middle(width, height, expected):
    for seed in range(20):
        assert augment.random_box(width, height, Random(seed)) == expected


@pytest.mark.parametrize(
    "width, height, expected",
    [
        (256, 256, (16, 16, 240, 240)),
        (512, 256, (144, 16, 368, 240)),
        (256, 300, (16, 38, 240, 262)),
        (8, 8, (0.5, 0.5, 7.5, 7.5)),
    ],
)
def test_the_part_of_a_test_image(width, height, expected):
    assert augment.central_box(width, height) == expected


def test_a_training_image_is_its_random_part_and_half_of_them_are_mirrored(tmp_path):
    smooth(300, 200).save(tmp_path / "a.png")
    mirrored = 0
    for seed in range(200):
        pixels = images.read(tmp_path / "a.png", 20, Random(seed)).astype(int)
        box = augment.random_box(300, 200, Random(seed))
        expected = np.asarray(smooth(300, 200).crop(box).resize((20, 20), Image.Resampling.BILINEAR)).astype(int)
        same, other = (np.abs(pixels - one).max() <= 3 for one in (expected, expected[:, ::-1]))
        assert same != other  # the slope from left to right tells them apart
        mirrored += other
    assert 100 - 4 * 7.1 < mirrored < 100 + 4 * 7.1


def test_shifts_of_a_batch_are_of_each_image_and_uniform():
    """A pixel lands in 9 rows and, mirrored or not, in columns 1 … 9 or 0 … 8: 200 of 16,200 images at each, 100 at the ends."""
    x = torch.zeros(16_200, 1, 10, 10)
    x[:, 0, 4, 5] = 1
    made = augment.crop_flip(x, torch.Generator().manual_seed(0))[:, 0]
    assert (made.sum((1, 2)) == 1).all()
    expected = torch.tensor([100.0] + 8 * [200] + [100]).expand(9, 10)
    assert made[:, 9].sum() == 0 and (made.sum(0)[:9] - expected).abs().max() < 5 * 14


class Chosen:
    """A source of random numbers that chooses this change, with this sign."""

    def __init__(self, name, negative):
        self.name, self.negative = name, negative

    def choice(self, names):
        assert self.name in names
        return self.name

    def random(self):
        return 0.4 if self.negative else 0.6


def affine(*matrix):
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=augment.FILL
    )


def enhanced(kind, factor):
    return lambda image: kind(image).enhance(factor)


# at magnitude 9, of an image of 40 × 30: (with the sign +, with the sign −), or one image for both
EXPECTED = {
    "identity": [lambda image: image],
    "autocontrast": [ImageOps.autocontrast],
    "equalize": [ImageOps.equalize],
    "rotate": [lambda image: image.rotate(27, fillcolor=augment.FILL), lambda image: image.rotate(-27, fillcolor=augment.FILL)],
    "solarize": [lambda image: ImageOps.solarize(image, 26)],
    "posterize": [lambda image: ImageOps.posterize(image, 4)],
    "color": [enhanced(ImageEnhance.Color, 1.81), enhanced(ImageEnhance.Color, 0.19)],
    "contrast": [enhanced(ImageEnhance.Contrast, 1.81), enhanced(ImageEnhance.Contrast, 0.19)],
    "brightness": [enhanced(ImageEnhance.Brightness, 1.81), enhanced(ImageEnhance.Brightness, 0.19)],
    "sharpness": [enhanced(ImageEnhance.Sharpness, 1.81), enhanced(ImageEnhance.Sharpness, 0.19)],
    "shear-x": [affine(1, 0.27, 0, 0, 1, 0), affine(1, -0.27, 0, 0, 1, 0)],
    "shear-y": [affine(1, 0, 0, 0.27, 1, 0), affine(1, 0, 0, -0.27, 1, 0)],
    "translate-x": [affine(1, 0, 40 * 135 / 331, 0, 1, 0), affine(1, 0, -40 * 135 / 331, 0, 1, 0)],
    "translate-y": [affine(1, 0, 0, 0, 1, 30 * 135 / 331), affine(1, 0, 0, 0, 1, -30 * 135 / 331)],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_changes_of_randaugment(name):
    image = picture((100, 120, 140), (40, 30), noise=70)
    made = [np.asarray(augment.randaugment(image, Chosen(name, negative), operations=1)) for negative in (False, True)]
    for result, expected in zip(made, EXPECTED[name] * (2 if len(EXPECTED[name]) == 1 else 1)):
        assert result.shape == (30, 40, 3) and np.array_equal(result, np.asarray(expected(image)))
    assert np.array_equal(*made) == (len(EXPECTED[name]) == 1)
    assert np.array_equal(made[0], np.asarray(image)) == (name == "identity")
    without = np.asarray(augment.randaugment(image, Chosen(name, False), operations=1, magnitude=0))
    assert np.array_equal(without, np.asarray(image)) == (name not in {"autocontrast", "equalize"})


def test_randaugment_draws_two_changes_of_fourteen(monkeypatch):
    assert set(EXPECTED) == set(augment.CHANGES) and len(EXPECTED) == 14
    drawn = []
    for name in augment.CHANGES:
        change = (lambda image, value, name=name: drawn.append((name, value > 0)) or image, 1.0, True)
        monkeypatch.setitem(augment.CHANGES, name, change)
    random = Random(0)
    for _ in range(1400):
        augment.randaugment(Image.new("RGB", (4, 4)), random)
    counts = [sum(one == name for one, _ in drawn) for name in augment.CHANGES]
    assert len(drawn) == 2800 and max(abs(count - 200) for count in counts) < 4.5 * math.sqrt(200 * 13 / 14)
    assert abs(sum(positive for _, positive in drawn) - 1400) < 4 * math.sqrt(700)


@pytest.mark.parametrize("arguments", [{"operations": -1}, {"magnitude": -1}, {"magnitude": 10.5}, {"magnitude": math.nan}])
def test_randaugment_refuses(arguments):
    with pytest.raises(ValueError, match=r"expected 0 or more, of a magnitude in \[0, 10\]"):
        augment.randaugment(Image.new("RGB", (4, 4)), Random(0), **arguments)


@pytest.mark.parametrize("share, counts", [(1.0, [6, 4, 2]), (0.5, [3, 2, 1]), (0.2, [1, 1, 1])])
def test_a_share_of_each_class(tmp_path, share, counts):
    """The classes of a folder have their own sizes, and a share of the data has the same imbalance."""
    image_folder(tmp_path)
    source = data.load_source("folder", tmp_path, image_size=16)
    config = train.Config(dataset="folder", data_root=str(tmp_path), image_size=16, model="linear", data_share=share)
    config.check_source(source)
    split = train.draw(config, source, 0)
    assert split.y.bincount().tolist() == counts
    assert set(split.x.names()) <= set(source.images.names())


@pytest.mark.parametrize("options", [{"per_class": 2}, {"imbalance": "step", "rho": 2.0}])
def test_a_share_and_numbers_of_images_are_refused(tmp_path, options):
    image_folder(tmp_path)
    source = data.load_source("folder", tmp_path, image_size=16)
    with pytest.raises(ValueError, match="^data-share: got 0.5, expected 1 here"):
        train.Config(model="linear", data_share=0.5, **options).check_source(source)
    with pytest.raises(ValueError, match="^data-share: got 0.5, expected 1 here"):
        train.Config(model="linear", data_share=0.5).check_source(data.load_source("digits"))
