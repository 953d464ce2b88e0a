"""Checkpoints of a training: a file that is whole or not there, and that is told from every other file.

    save(path, parts)     beside its place, onto the disk, then into its place
    load(path)            the parts, or a ValueError that says what the file is instead
    Keeper(path, about)   calls save every so often while train.runs is training

Parts are tensors and plain values (numbers, strings, None, lists, tuples, dicts), so loading a file runs nothing that it
names. The file is torch.save's: a zip, which has a CRC-32 of each record.
"""

import hashlib
import importlib
import io
import os
import random
import sys
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import torch

FORMAT = "checkpoint of absgd-fast train"
VERSION = 1  # raise it when the parts change their meaning: an older file is then refused by name

PLAIN = (float, int, str, bool, type(None), torch.Tensor)

EVERY_SECONDS = 30  # by default as much work is lost at most, and a checkpoint takes milliseconds


def write_whole(path, content):
    """Writes bytes to `path` so that, whenever this process or the machine stops, the old file or the new one is there.

    A killed writer leaves `.NAME.unfinished` behind, which the next one overwrites.

    Raises:
        OSError: the old file is as it was then.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the content before the name: else a crash may leave the new name of an empty file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(path, parts):
    """Writes a checkpoint; the folder is made if need be.

    Args:
        path: the file.
        parts: dict of tensors and plain values.

    Raises:
        OSError: it could not be written; what was there before still is.
        TypeError: a part is something else, which load() would refuse when it is too late.

    Example:
        >>> import tempfile, torch
        >>> from absgd_fast.experiments.checkpoint import load, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/checkpoint.pt", {"epoch": 3, "weights": torch.ones(2)})
        ...     load(f"{folder}/checkpoint.pt")
        {'epoch': 3, 'weights': tensor([1., 1.])}
    """
    _check_plain(parts, "parts")
    buffer = io.BytesIO()  # in memory first: torch would say RuntimeError where a disk is full
    torch.save({"format": FORMAT, "version": VERSION, "parts": parts}, buffer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getbuffer())


def _check_plain(value, where):
    kind = type(value)
    if kind in (dict, OrderedDict, Counter):
        for name, part in value.items():
            _check_plain(part, f"{where}[{name!r}]")
    elif kind in (list, tuple):
        for part in value:
            if type(part) not in PLAIN:
                _check_plain(part, where)
    elif kind not in PLAIN:
        raise TypeError(f"{where}: got {kind.__module__}.{kind.__qualname__}, expected tensors and plain values")


def load(path):
    """The parts that save() was given.

    Raises:
        ValueError: the file is something else, damaged, cut short, or of another version; the message has one line with
            its name, what was found and what was expected.
        OSError: it could not be read.
    """
    content = Path(path).read_bytes()
    here = f"{path} ({len(content)} bytes)"
    if problem := _damage(content):
        raise ValueError(f"{here} {problem}, expected a {FORMAT}")
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # what a file made by others may raise here is not to be foretold
    except Exception:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{here} is a torch file, but no {FORMAT}")
    if found.get("version") != VERSION:
        raise ValueError(f"{here} has version {found.get('version')} of the format, this absgd_fast reads version {VERSION}")
    return found["parts"]


def _damage(content):
    """Why these bytes are no whole file of torch.save, or None."""
    if not content:
        return "is empty"
    if not content.startswith(b"PK\x03\x04"):
        return f"is no zip file (it begins with {content[:8]!r})"
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            if record := file.testzip():
                return f"is damaged (its record {record!r} is not what was written)"
            if not any(name.endswith("/data.pkl") for name in file.namelist()):
                return "is a zip file, but none of torch's"
    except zipfile.BadZipFile as error:  # a zip has its directory at the end
        return f"is cut short or damaged ({error})"
    # a flipped bit may turn into an unknown compression, a password, a length beyond the end
    except Exception as error:
        return f"is damaged ({type(error).__name__}: {error})"
    return None


# ------------------------------------------------------------------------------------------------ what parts are made of


def digest(tensors):
    """sha256 (64 hex digits) of the names, dtypes, shapes and bits of {name: tensor}, in this order.

    Example:
        >>> import torch
        >>> from absgd_fast.experiments.checkpoint import digest
        >>> digest({"x": torch.tensor([0.0])})[:8] == digest({"x": torch.tensor([-0.0])})[:8]
        False
    """
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def random_state():
    """The global random generators (torch's of the CPU, Python's, numpy's if in use) as parts of a checkpoint.

    The training itself draws from generators of its own; these are for layers such as dropout, which take torch's.
    """
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if "numpy.random" in sys.modules:
        name, keys, *others = sys.modules["numpy.random"].get_state()
        state["numpy"] = (name, keys.tolist(), *others)
    return state


def restore_random_state(state):
    """Puts back what random_state() gave.

    Example:
        >>> import torch
        >>> from absgd_fast.experiments.checkpoint import random_state, restore_random_state
        >>> state = random_state()
        >>> first = torch.rand(1)
        >>> restore_random_state(state)
        >>> torch.equal(first, torch.rand(1))
        True
    """
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    if "numpy" in state:
        importlib.import_module("numpy.random").set_state(state["numpy"])


# ------------------------------------------------------------------------------------------------ when


class Keeper:
    """Writes the state of train.runs(keep=Keeper(...)) to a file from time to time.

    When it does so has no influence on the results.

    Args:
        path: the file.
        about: dict of parts that do not change, such as the configuration; saved beside the state.
        every: after this many optimizer steps; 0 = after the first step that ends EVERY_SECONDS or more after the last
            checkpoint (or the start).
    """

    def __init__(self, path, about, every=0):
        self.path, self.about, self.every = Path(path), about, every
        self._steps, self._written = 0, time.monotonic()
        self._between = None  # the state after the last finished run, unless a later one is in the file

    def __call__(self, take, finished):
        """As train.runs calls it: take() makes the state, after a step, or when a run is finished and handed over."""
        if finished:
            self._between = take()  # no tensors of a model in it: cheap
            return
        self._steps += 1
        if self._steps % self.every == 0 if self.every else time.monotonic() - self._written >= EVERY_SECONDS:
            self._write(take())

    def interrupted(self):
        """To be called when runs() was stopped by an exception, where the state of a step may be half a step's. Sees to it
        that every finished run is in the file, and returns whether there is one."""
        if self._between is not None:
            self._write(self._between)
        return self.path.is_file()

    def done(self):
        """To be called once the results are safe: removes the file."""
        self.path.unlink(missing_ok=True)
        self.path.with_name(f".{self.path.name}.unfinished").unlink(missing_ok=True)

    def _write(self, state):
        save(self.path, self.about | {"state": state})
        self._between, self._written = None, time.monotonic()
