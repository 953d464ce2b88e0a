"""Where and in which precision a network is trained, and the processes of torchrun that train it together."""

import gc
import re
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .choices import check_choice

AMPS = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Placing:
    """The device, the precision and the memory format of a training.

    Args:
        device: "auto" (CUDA if there is a CUDA device, otherwise the CPU), "cpu", "cuda", or "cuda:1" for the second GPU. With
            "auto" and "cuda" each process of torchrun has the GPU of its local rank, any other process the first GPU.
        amp: "none" (float32), "bf16" or "fp16": the dtype in which autocast() computes. fp16 needs CUDA and scaler().
        channels_last: store images and convolutions with the channels last, which tensor cores read faster. It changes no
            result but by rounding, and nothing at all for a model without convolutions.

    It takes any arguments: check() refuses the bad ones.

    Example:
        >>> placing = Placing("cpu", amp="bf16")
        >>> placing.check()
        >>> model, images = placing.model(nn.Linear(4, 2)), placing.images(torch.zeros(3, 4))
        >>> with placing.autocast():
        ...     model(images).dtype
        torch.bfloat16
    """

    def __init__(self, device: str = "auto", amp: str = "none", channels_last: bool = False) -> None:
        self.name, self.amp, self.channels_last = device, amp, channels_last

    def __repr__(self) -> str:
        return f"Placing({self.name!r}, {self.amp!r}, {self.channels_last})"

    @property
    def device(self) -> torch.device:
        """The device, with its number if it is a GPU."""
        if self.name == "cuda" or (self.name == "auto" and torch.cuda.is_available()):
            return torch.device("cuda", _local_rank())
        return torch.device("cpu" if self.name == "auto" else self.name)

    def check(self) -> None:
        """Raises ValueError if this machine cannot train so. The message is one line: what was given and what to use.

        >>> Placing("cpu", amp="fp16").check()
        Traceback (most recent call last):
        ValueError: amp: got fp16 with the device cpu, expected none or bf16 there; fp16 needs a CUDA device
        """
        if not isinstance(self.name, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.name):
            raise ValueError(f"unknown device {self.name!r}; use one of auto, cpu, cuda, or cuda:1 for the second GPU")
        check_choice("amp", self.amp, AMPS)
        if self.name.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"device: got {self.name}, but torch {torch.__version__} finds no CUDA device here; use auto or cpu, or install "
                "a driver and a torch with CUDA"
            )
        device = self.device
        if device.type == "cuda" and device.index >= torch.cuda.device_count():
            raise ValueError(
                f"device: got {self.name}, which is {device} in this process, expected a number below "
                f"{torch.cuda.device_count()}, the number of CUDA devices; start at most one process for each"
            )
        if self.amp == "fp16" and device.type == "cpu":
            got = "the device cpu" if self.name == "cpu" else f"the device {self.name}, which is the CPU here"
            raise ValueError(f"amp: got fp16 with {got}, expected none or bf16 there; fp16 needs a CUDA device")

    def model(self, model: nn.Module) -> nn.Module:
        """Moves a model to the device, in the memory format, and returns it. It is the same object."""
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's annotations lack it
        return model.to(self.device)

    def images(self, x: Tensor) -> Tensor:
        """A batch on the device, images (B, channels, height, width) in the memory format. Copies from pinned memory overlap."""
        device = self.device
        # Into the CPU's memory a copy must not be asynchronous: it would be read before it is there.
        later = device.type == "cuda"
        if self.channels_last and x.dim() == 4:
            return x.to(device, non_blocking=later, memory_format=torch.channels_last)
        return x.to(device, non_blocking=later)

    def autocast(self) -> AbstractContextManager[None]:
        """The context in which to compute logits and losses."""
        dtype = AMPS[self.amp]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def scaler(self, **options: Any) -> torch.amp.GradScaler | None:
        """A torch.amp.GradScaler for fp16, whose small gradients would become zero. None for the others, which need none.

        Args:
            options: as for torch.amp.GradScaler, e.g. init_scale, enabled.
        """
        return torch.amp.GradScaler(self.device.type, **options) if self.amp == "fp16" else None

    def wait(self) -> None:
        """Returns when the device has done all that it was given, so that a clock may be read. On a CPU it always has."""
        device = self.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class Processes:
    """The processes that train one model together: those that torchrun started, otherwise this one alone.

    In a process of torchrun it starts torch.distributed (NCCL for CUDA, gloo for the CPU), unless that runs already. Call close()
    at the end.

    Args:
        device: that of this process, e.g. Placing.device. With several processes on CUDA it must be the GPU of the local rank.

    Attributes:
        rank: the number of this process, from 0.
        world: how many there are.
        main: whether this is the process that prints and writes files, which is rank 0.

    Raises:
        ValueError: a CUDA device that the other processes of this machine would use too.

    Example:
        >>> processes = Processes(torch.device("cpu"))
        >>> processes.rank, processes.world, processes.main
        (0, 1, True)
        >>> processes.part(torch.tensor([3, 1, 2]))
        tensor([3, 1, 2])
        >>> processes.close()
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, self.world, self._started = device, 0, 1, False
        if not dist.is_available():
            return
        if not dist.is_initialized() and dist.is_torchelastic_launched():
            if device.type == "cuda":
                if device.index not in (None, _local_rank()):
                    raise ValueError(
                        f"device: got {device} in the process of local rank {_local_rank()}; use device cuda or auto, so that "
                        "each process has a GPU of its own"
                    )
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")  # torchrun's variables say where
            self._started = True
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()

    @property
    def main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model in DistributedDataParallel, whose backward averages the gradients over the processes; alone, the model.

        The wrapper notes which parameters require a gradient. Wrap the model again when that changes. Its .module is the model.
        """
        if self.world == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def part(self, batch: Tensor) -> Tensor:
        """This process's slice of the indices of a batch.

        All parts have the same length, so that the mean of the processes' gradients is that of the batch. The last
        len(batch) % world indices are dropped. If the batch has fewer indices than there are processes, every part is empty, and
        all of them leave the batch out.

        Args:
            batch: (B,) the indices, the same on every process.

        Returns:
            (B // world,) the indices from rank * (B // world) on, a view of the batch.
        """
        share = len(batch) // self.world
        return batch[self.rank * share : (self.rank + 1) * share]

    def close(self) -> None:
        """Ends torch.distributed if this object started it. A second call does nothing. Let go of all wrapped models before.

        A wrapped model that is freed after the group may hang the process. It then frees the group too, and torch (2.13, gloo)
        waits for a thread of the group, which waits for Python's global lock, which is held meanwhile.
        """
        if self._started:
            error = sys.exc_info()[1]
            while error is not None:  # the frames that an exception has left keep their models
                traceback.clear_frames(error.__traceback__)
                error = error.__cause__ or error.__context__
            gc.collect()  # wrapped models that only cycles of references keep
            dist.destroy_process_group()
            self._started = False


def _local_rank() -> int:
    """The number of this process on its machine; 0 outside torchrun."""
    return dist.get_node_local_rank(fallback_rank=0) if dist.is_available() else 0
