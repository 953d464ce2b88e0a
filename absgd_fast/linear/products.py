"""The matrix products of a linear head, in the dtype in which the device multiplies fast."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

# How many classes of a weight gradient get their sum at once, where torch cannot add a product of bfloat16 to a float32 matrix.
CLASS_BLOCK = 8192
# How many classes of a bfloat16 weight stand in float32 at once. H W^T and G W for 256 rows, CPU time on one thread of a busy
# Intel Xeon (AVX-512), over that with a weight which is float32 already: 512 x 8000 took 1.31 with 128 classes, 1.19 with 256,
# 1.18 with 1024, 1.09 with 4096; 2048 x 6000 took 1.18, 1.25, 1.09, 1.23. In a whole step (2048 rows) 512 to 4096 classes
# differed less than the noise. The whole weight in float32 would take as much memory as the sum of its gradient.
BLOCK = 1024


def products(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Given | InFloat32:
    """The products of hidden (n, d) and weight (C, d)."""
    slow = hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu" and not multiplies_bfloat16()
    return InFloat32(hidden, weight, bias) if slow else Given(hidden, weight, bias)


class Given:
    """The products in the dtype of the inputs."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None):
        self.hidden, self.weight, self.bias, self.dtype = hidden, weight, bias, hidden.dtype

    def logits(self, part: slice, out: Tensor) -> None:
        """out = H W^T + b for a chunk H."""
        if self.bias is None:
            torch.mm(self.hidden[part], self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, self.hidden[part], self.weight.t(), out=out)

    def of_hidden(self, grad: Tensor, out: Tensor) -> None:
        """out = G W."""
        torch.mm(grad, self.weight, out=out)

    def rows(self, part: slice) -> Tensor:
        """The chunk H."""
        return self.hidden[part]


class InFloat32:
    """The products of bfloat16 matrices on a CPU that has no instructions for them, which computes them in float32.

    There torch's product of bfloat16 took 3.1 times as long as that of float32 (25 against 78 GFLOP/s on one thread of an Intel
    Xeon with AVX-512: 256 x 512 x 8000), and it rounds the logits and their gradients. Here these are float32. The weight is
    converted a block of classes at a time, twice per chunk, so that no second weight takes memory.
    """

    dtype = torch.float32

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None):
        self.hidden, self.weight, self.bias = hidden, weight, None if bias is None else bias.float()
        classes, width = weight.shape
        size = max(1, min(BLOCK, math.ceil(classes / 2)))
        self._parts = [slice(begin, min(begin + size, classes)) for begin in range(0, classes, size)]
        self._room = weight.new_empty((min(size, classes), width), dtype=torch.float32)
        self._converted: slice | None = None

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(classes, their weight in float32), beginning with the block that the last walk ended with, which stands there."""
        for of in self._parts:
            block = self._room[: of.stop - of.start]
            if of != self._converted:
                block.copy_(self.weight[of])
                self._converted = of
            yield of, block
        self._parts.reverse()

    def logits(self, part: slice, out: Tensor) -> None:
        """out = H W^T + b for a chunk H."""
        rows = self.rows(part)
        for of, weight in self._blocks():
            if self.bias is None:
                torch.mm(rows, weight.t(), out=out[:, of])
            else:
                torch.addmm(self.bias[of], rows, weight.t(), out=out[:, of])

    def of_hidden(self, grad: Tensor, out: Tensor) -> None:
        """out = G W, which is rounded once."""
        total = grad.new_zeros(out.shape)
        for of, weight in self._blocks():
            total.addmm_(grad[:, of], weight)
        out.copy_(total)

    def rows(self, part: slice) -> Tensor:
        """The chunk H in float32."""
        return self.hidden[part].float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b. The total is float32 if a and b are bfloat16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif adds_in_float32(total.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        for block in range(0, len(total), CLASS_BLOCK):
            of = slice(block, block + CLASS_BLOCK)
            total[of] += a[of] @ b


@cache
def adds_in_float32(device: torch.device) -> bool:
    """Whether torch can add a product of bfloat16 matrices to a float32 matrix. CUDA can; the CPU cannot as of torch 2.13."""
    some = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    try:
        total = some.float()
        torch.addmm(total, some, some, out_dtype=torch.float32, out=total)  # the overload that is used
    except (RuntimeError, TypeError):  # NotImplementedError is the first; torch 2.11's decomposition for `meta` raises the second
        return False
    return True


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, and torch the library (oneDNN) that uses them.

    The answer comes from the processor and not from a measurement, so that the results are the same in every process.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    known = getattr(torch.cpu, "get_capabilities", None)  # public, but not in torch 2.10
    if known is not None:
        return any(known().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    older = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and ask() for ask in older)
