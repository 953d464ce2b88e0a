"""What `absgd-fast train` costs around the steps, beside the shortest loop that a user could write.

    python -m benchmarks.train_loop [--rounds 15] [--out FILE.json]

Two questions, each with one thread, and with turns that interleave (timing.py):

- An epoch: the CNN on 2000 images of Fashion-MNIST in batches of 128. The plain loop draws an order, indexes the same tensors,
  and calls the model, torch's cross-entropy, backward, and torch's fused SGD. The other epochs are those of experiments/train.py,
  with all that they note down: weights, ESS and memorised labels. None of them tests on more than one image. The times are CPU
  seconds. lambda is gentle: a network that collapses has numbers so small that the CPU is slow with them.
- A folder: the pre-activation ResNet on 224 x 224 images, with 2 processes that read, crop, flip and normalise JPEG files of
  256 x 256 (experiments/images.py). The other loop takes the images from a tensor that is there already. "Reading alone" is what
  the two processes give when nothing trains.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from absgd_fast.experiments import data, images
from absgd_fast.experiments.models import make_model
from absgd_fast.experiments.placing import Placing
from absgd_fast.experiments.train import Config, Training

from .record import environment, write
from .timing import interleave_long, quartiles, ratios

PLAIN = "plain loop"
EPOCH = Config(
    dataset="fashion-mnist",
    model="cnn",
    per_class=200,
    noise="symmetric",
    batch_size=128,
    channels_last=True,
    warmup=0.0,
    lam=-5.0,
    lr_steps=(),
    epochs=10_000,
    test_images=1,
)
MOST = {"sgd": 1.02, "absgd": 1.02}  # the largest allowed time of an epoch, in that of the plain loop
LEAST = 0.95  # the least allowed throughput of a folder, in that of a tensor


def epochs(config, source):
    """{name: a function that trains the next epoch}. Each has its own model."""
    split = data.draw(source, 0, per_class=config.per_class, noise=config.noise, rate=config.noise_rate)
    placing = Placing(config.device, channels_last=config.channels_last)
    model, loss_fn = placing.model(make_model(config.model, source.shape, source.classes, 0)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True)
    order = torch.Generator().manual_seed(0)

    def plain():
        model.train()
        for batch in torch.randperm(len(split.y), generator=order).split(config.batch_size):
            optimizer.zero_grad()
            loss_fn(model(placing.images(split.x[batch])), split.y[batch]).backward()
            optimizer.step()

    def training(name):
        running = Training(name, config, source, split, 0).epochs(lambda: None)
        return lambda: next(running)

    return {PLAIN: plain} | {name: training(name) for name in MOST}


def jpegs(folder, count, side):
    """Writes `count` JPEG files of side x side with smooth and fine structure, and returns their names."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(count):
        rough, fine = (
            Image.fromarray(random.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((side, side)) for n in (9, side // 2)
        )
        pixels = np.asarray(rough).astype(float) + 0.1 * np.asarray(fine)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(Path(folder, f"{number}.jpg"), quality=90)
    return [f"{number}.jpg" for number in range(count)]


def loops(files, folder, size, batch, workers=2):
    """{"folder", "tensor": a function that trains the same model on all images once; "reading": one that only reads them}."""
    lazy, ready = images.Lazy(folder, files, size), torch.randn(len(files), 3, size, size)
    y = torch.arange(len(files)) % 10
    model, loss_fn = make_model("preact", (3, size, size), 10, 0), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, fused=True)
    chosen = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).split(batch)

    def train(x, augment):
        read = images.batches(x, chosen, augment=augment, seed=0, epoch=0, workers=workers)
        for part, of in zip(read, chosen, strict=True):
            optimizer.zero_grad()
            loss_fn(model(part), y[of]).backward()
            optimizer.step()

    def read_alone():
        for _ in images.batches(lazy, chosen, augment="crop-flip", seed=0, epoch=0, workers=workers):
            pass

    return {"folder": lambda: train(lazy, "crop-flip"), "tensor": lambda: train(ready, "none"), "reading": read_alone}


def measure(config=EPOCH, rounds=15, files=64, size=224):
    source = data.load_source(config.dataset, config.data_root)
    runs = epochs(replace(config, methods=tuple(MOST)), source)
    for run in runs.values():
        run()
    times = interleave_long(runs, rounds, clock=time.process_time)
    with tempfile.TemporaryDirectory() as folder:
        all_three = loops(jpegs(folder, files, size * 8 // 7), folder, size, max(1, files // 8))
        all_three["folder"]()
        loaded = interleave_long(all_three, rounds)
    return {
        "epoch": {
            "seconds": quartiles(times[PLAIN]),
            "ratio": {name: ratios(times[name], times[PLAIN]) for name in MOST},
            "most": MOST,
        },
        "folder": {
            "images_per_second": {name: files / quartiles(seconds)["median"] for name, seconds in loaded.items()},
            "throughput": ratios(loaded["tensor"], loaded["folder"]),
            "least": LEAST,
        },
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    report = environment()
    report |= measure(rounds=given.rounds)
    epoch, folder = report["epoch"], report["folder"]
    for name, ratio in epoch["ratio"].items():
        print(f"an epoch of {name}: {ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f}) of the plain loop's time")
    ratio = folder["throughput"]
    print(
        f"images of a folder: {ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f}) of the throughput of a tensor; "
        + ", ".join(f"{name} {speed:.1f} images/s" for name, speed in folder["images_per_second"].items())
    )
    if given.out:
        write(report, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
