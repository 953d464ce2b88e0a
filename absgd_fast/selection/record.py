"""The scores on disk: a file of JSON lines that grows by one line after each epoch, so that a killed selection goes on.

The first line has the arguments of the selection. A killed writer may leave half a line at the end, which is dropped.
"""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = "selection.jsonl"
FORMAT, VERSION = "absgd_fast.select", 1
SYNC_SECONDS = 1.0  # a killed process loses nothing; a machine that loses its power may lose so much


class Record:
    """The record of one selection.

    Args:
        folder: where the file lies; None: nothing is kept on disk.
        arguments: what the scores depend on, as plain values with names that a message can use.

    Raises:
        ValueError: the folder has the record of other arguments, or of another program, or a damaged one.
        OSError: it cannot be read or written.
    """

    def __init__(self, folder: Path | None, arguments: dict[str, Any]) -> None:
        self.entries: list[dict[str, Any]] = []
        self._file = None
        self._synced = time.monotonic()
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        # closed by __exit__, and here if it is refused; without a buffer, which a full disk would leave for close() to fail on
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        try:
            if not _locked(self._file.fileno()):
                raise ValueError(f"out: another process is writing {self.path}; wait for it, or give another folder")
            whole = self._read(json.loads(json.dumps(arguments)))
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self.add({"format": FORMAT, "version": VERSION, "arguments": arguments})

    def _read(self, arguments: dict[str, Any]) -> int:
        """Takes the entries from the file, and returns how many of its bytes are whole lines; 0 if there is nothing yet."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines()
        if not lines:
            if content and not f'{{"format": "{FORMAT}"'.encode().startswith(content[:20]):
                raise ValueError(f"out: {self.path} is no record of select; give another folder")
            return 0
        try:
            header, *self.entries = [json.loads(line) for line in lines]
            known = header["format"] == FORMAT
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"out: {self.path} is no record of select, or a damaged one; give another folder") from error
        if not known or header["version"] != VERSION:
            raise ValueError(f"out: {self.path} has another format; give another folder")
        was = header["arguments"]
        differ = [
            f"{name}: it was made with {was.get(name)!r}, got {arguments.get(name)!r}"
            for name in dict.fromkeys([*was, *arguments])
            if was.get(name) != arguments.get(name)
        ]
        if differ:
            raise ValueError(
                f"out: {self.path} has the scores of a selection with other arguments ({'; '.join(differ)}); give the same"
                " arguments to go on with it, or another folder"
            )
        return whole

    def add(self, entry: dict[str, Any]) -> None:
        """Writes one entry. When this returns, killing the process cannot lose it.

        Raises:
            OSError: it could not be written, or only half of it, which the next reader drops.
        """
        if self._file is None:
            return
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()


def _locked(file: int) -> bool:
    """Whether this process alone has the file from now on; also where a system or a disk has no locks.

    A killed process gives it back.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # the others: this disk has no locks
    return True


def packed(right: Tensor) -> str:
    """A vector of bools as text, four of them in a letter."""
    bits = torch.nn.functional.pad(right.to(torch.uint8), (0, -len(right) % 8)).view(-1, 8)
    return bytes((bits * (2 ** torch.arange(8, device="cpu"))).sum(1).tolist()).hex()


def unpacked(text: str, n: int) -> Tensor:
    """The n bools that `packed` was given.

    >>> unpacked(packed(torch.tensor([True, False, True])), 3)
    tensor([ True, False,  True])
    """
    numbers = torch.tensor(list(bytes.fromhex(text)), dtype=torch.int64, device="cpu")
    return ((numbers.unsqueeze(1) >> torch.arange(8, device="cpu")) & 1).bool().flatten()[:n]
