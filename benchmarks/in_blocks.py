"""The command line on a CPU without bf16 units: what it multiplies in bf16 is computed in fp32, block by block.

    python -m benchmarks.in_blocks train …

Such a CPU takes up to three hundred times as long for a product in bf16 as for one in fp32, and a song of 240 s days.
Here all tensors of a run are those of a run in bf16; a product or a convolution of them reads and writes the same ones
and holds a few blocks of `NUMBERS` fp32 numbers besides. benchmarks/full_size.py measures memory so, not time.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sidestep.cli.main import entry

NUMBERS = 1 << 20  # of a block: 4 MiB
ATEN = torch.library.Library("aten", "IMPL")


def parts(length: int, step: int) -> Iterator[slice]:
    """Slices of so many, one after the other."""
    yield from (slice(start, min(start + step, length)) for start in range(0, length, max(step, 1)))


def multiply(a: Tensor, b: Tensor, out: Tensor, add: Tensor | None = None, alpha: float = 1, beta: float = 1) -> Tensor:
    """alpha a b + beta add, into `out`. a [M, K], b [K, N], add [M, N] or what stretches to it."""
    step = max(min(NUMBERS // a.shape[1], math.isqrt(NUMBERS)), 16)
    add = None if add is None else add.expand_as(out)
    for columns in parts(b.shape[1], step):
        right = b[:, columns].float()
        for rows in parts(a.shape[0], step):
            block = (a[rows].float() @ right).mul_(alpha)
            out[rows, columns] = block if add is None else block.add_(add[rows, columns], alpha=beta)
    return out


def mm(a: Tensor, b: Tensor) -> Tensor:
    """aten::mm."""
    out = a.new_empty(a.shape[0], b.shape[1])
    return multiply(a, b, out) if a.dtype == torch.bfloat16 else torch.mm(a, b, out=out)


def addmm(add: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """aten::addmm."""
    out = a.new_empty(a.shape[0], b.shape[1])
    if a.dtype == torch.bfloat16:
        return multiply(a, b, out, add, alpha, beta)
    return torch.addmm(add, a, b, beta=beta, alpha=alpha, out=out)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """aten::bmm."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    if a.dtype != torch.bfloat16:
        return torch.bmm(a, b, out=out)
    for one, other, target in zip(a, b, out, strict=True):
        multiply(one, other, target)
    return out


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """aten::convolution of songs [B, C, T]; in blocks where it goes forward."""
    [stride], [padding], [dilation], transposed, _, groups = how
    if x.dtype != torch.bfloat16 or transposed or groups != 1:
        return torch._convolution(x, weight, bias, *how, False, False, True, True)
    reach = dilation * (weight.shape[2] - 1) + 1  # samples that one of the output is made of
    length = (x.shape[2] + 2 * padding - reach) // stride + 1
    out = x.new_empty(x.shape[0], weight.shape[0], length)
    for channels in parts(weight.shape[0], NUMBERS // weight[0].numel()):
        kernel = weight[channels].float()
        shift = None if bias is None else bias[channels].float()
        for samples in parts(length, NUMBERS // (max(x.shape[1], kernel.shape[0]) * stride)):
            start, end = samples.start * stride - padding, (samples.stop - 1) * stride - padding + reach
            block = x[:, :, max(start, 0) : end].float()
            block = F.pad(block, (max(-start, 0), max(end - x.shape[2], 0)))
            out[:, channels, samples] = F.conv1d(block, kernel, shift, stride, 0, dilation)
    return out


def take_over() -> None:
    """Let these be the CPU's from now on, in this process."""
    for operation in (mm, addmm, bmm, convolution):
        ATEN.impl(operation.__name__, operation, "CPU")


if __name__ == "__main__":
    take_over()
    entry()
