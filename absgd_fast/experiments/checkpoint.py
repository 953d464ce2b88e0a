"""Checkpoints of a training. A checkpoint file is either complete or absent, and load() recognises every other file.

    save(path, parts)     writes a temporary file beside `path`, flushes it to the disk, and renames it
    load(path)            returns the parts, or raises a ValueError that says what the file is instead
    Keeper(path, about)   calls save from time to time while train.runs is training

The parts are tensors and plain values (numbers, strings, None, lists, tuples, dicts). Loading therefore never runs code that a
file names. The format is that of torch.save: a zip file, which has a CRC-32 of each record.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "checkpoint of absgd-fast train"
VERSION = 1  # raise it when the parts change their meaning; load() then refuses older files and names their version

PLAIN = (float, int, str, bool, type(None), torch.Tensor)

EVERY_SECONDS = 30  # by default, this is the most work that a crash loses; writing a checkpoint takes milliseconds


def write_whole(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Writes bytes to `path`. Whenever the process or the machine stops, either the old or the new file is there, complete.

    A killed writer leaves `.NAME.unfinished` behind. The next writer overwrites it.

    Raises:
        OSError: it could not be written. The old file is unchanged.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a crash may leave an empty file under the new name
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(path: str | os.PathLike[str], parts: dict[str, Any]) -> None:
    """Writes a checkpoint, and creates its folder if there is none.

    Args:
        path: the file.
        parts: dict of tensors and plain values.

    Raises:
        OSError: it could not be written. An older file at `path` is unchanged.
        TypeError: a part is neither a tensor nor a plain value, so load() would refuse the file.

    Example:
        >>> import tempfile, torch
        >>> from absgd_fast.experiments.checkpoint import load, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/checkpoint.pt", {"epoch": 3, "weights": torch.ones(2)})
        ...     load(f"{folder}/checkpoint.pt")
        {'epoch': 3, 'weights': tensor([1., 1.])}
    """
    _check_plain(parts, "parts")
    buffer = io.BytesIO()  # in memory first, because torch raises RuntimeError instead of OSError when a disk is full
    torch.save({"format": FORMAT, "version": VERSION, "parts": parts}, buffer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getbuffer())


def _check_plain(value: Any, where: str) -> None:
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


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parts that were given to save(), with all tensors on the CPU.

    Raises:
        ValueError: the file is damaged, cut short, of another version or no checkpoint at all. The message is one line with the
            name of the file, what was found and what was expected.
        OSError: it could not be read.
    """
    content = Path(path).read_bytes()
    here = f"{path} ({len(content)} bytes)"
    if problem := damage(content):
        raise ValueError(f"{here} {problem}, expected a {FORMAT}")
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # a file that another program made may raise anything here
    except Exception:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{here} is a torch file, but not a {FORMAT}")
    if found.get("version") != VERSION:
        raise ValueError(f"{here} has version {found.get('version')} of the format, this absgd_fast reads version {VERSION}")
    return found["parts"]


def damage(content: bytes) -> str | None:
    """The reason why these bytes are not a complete file of torch.save, or None if they are one."""
    if not content:
        return "is empty"
    if not content.startswith(b"PK\x03\x04"):
        return f"is not a zip file (it begins with {content[:8]!r})"
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            if record := file.testzip():
                return f"is damaged (its record {record!r} is not what was written)"
            if not any(name.endswith("/data.pkl") for name in file.namelist()):
                return "is a zip file, but not one of torch's"
    except zipfile.BadZipFile as error:  # the directory of a zip file is at its end, so a file that was cut short has none
        return f"is cut short or damaged ({error})"
    # a flipped bit may look like an unknown compression, a password, or a length beyond the end
    except Exception as error:
        return f"is damaged ({type(error).__name__}: {error})"
    return None


# ------------------------------------------------------------------------------------------------ digests


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 (64 hex digits) of the names, dtypes, shapes and bits of {name: tensor}. The order of the entries counts.

    Example:
        >>> import torch
        >>> from absgd_fast.experiments.checkpoint import digest
        >>> digest({"x": torch.tensor([0.0])})[:8] == digest({"x": torch.tensor([-0.0])})[:8]
        False
    """
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


# ------------------------------------------------------------------------------------------------ when to save


class Keeper:
    """Writes the state of a training to a file from time to time: train.runs(..., keep=Keeper(...)).

    The results do not depend on when it writes.

    Args:
        path: the file.
        about: dict of parts that do not change, such as the configuration. They are saved beside the state.
        every: the number of optimizer steps between two checkpoints. 0 means that a step writes one if it ends at least
            EVERY_SECONDS after the last checkpoint (or after the start).
    """

    def __init__(self, path: str | os.PathLike[str], about: dict[str, Any], every: int = 0) -> None:
        self.path, self.about, self.every = Path(path), about, every
        self._steps, self._written = 0, time.monotonic()
        # the state after the last finished run, unless the file already has a later state
        self._between: dict[str, Any] | None = None

    def __call__(self, take: Callable[[], dict[str, Any]], finished: bool) -> None:
        """train.runs calls this after each step, and with finished=True after each run. take() returns the state."""
        if finished:
            self._between = take()  # cheap, because it holds no tensors of a model
            return
        self._steps += 1
        if self._steps % self.every == 0 if self.every else time.monotonic() - self._written >= EVERY_SECONDS:
            self._write(take())

    def interrupted(self) -> bool:
        """Call this when an exception stopped runs(). Returns whether there is a checkpoint file.

        The exception may have come in the middle of a step, so no new state is taken. The file gets every finished run.
        """
        if self._between is not None:
            self._write(self._between)
        return self.path.is_file()

    def done(self) -> None:
        """Removes the file. Call this once the results are written."""
        self.path.unlink(missing_ok=True)
        self.path.with_name(f".{self.path.name}.unfinished").unlink(missing_ok=True)

    def _write(self, state: dict[str, Any]) -> None:
        save(self.path, self.about | {"state": state})
        self._between, self._written = None, time.monotonic()
