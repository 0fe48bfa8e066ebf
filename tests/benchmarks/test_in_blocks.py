"""Products of bf16 in blocks are those of fp32 to bf16's rounding, and hold no more than blocks besides."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from benchmarks import in_blocks
from benchmarks.in_blocks import addmm, bmm, convolution, mm
from benchmarks.measure import ROOT
from sidestep.tasks.plan.unfilled import LiveBytes

NEAR = {"rtol": 2**-7, "atol": 2**-4}  # the result's rounding to bf16
BOTH_WAYS = """
import torch
from benchmarks import in_blocks
in_blocks.NUMBERS = 256
asked = []
whole = in_blocks.multiply
in_blocks.multiply = lambda *what: asked.append(what[0].shape) or whole(*what)
in_blocks.take_over()
torch.manual_seed(0)
x, bias = (torch.randn(size, dtype=torch.bfloat16, requires_grad=True) for size in ((2, 30, 64), (48,)))
weight = torch.randn(48, 64, dtype=torch.bfloat16)
(torch.nn.functional.linear(x, weight, bias) ** 2).sum().backward()
ours, x.grad, count = x.grad.clone(), None, len(asked)
(torch.nn.functional.linear(x.float(), weight.float(), bias.float()) ** 2).sum().backward()
torch.testing.assert_close(ours, x.grad, rtol=2**-6, atol=4)
assert count == 2 and len(asked) == count, asked
assert in_blocks.entry.__module__ == "sidestep.cli.main"
"""


def some(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


@pytest.mark.parametrize("numbers", [128, 1 << 20], ids=["many blocks", "one block"])
def test_products_are_those_of_fp32(monkeypatch, numbers):
    monkeypatch.setattr(in_blocks, "NUMBERS", numbers)
    a, b, bias = some(70, 40), some(40, 50), some(50)
    wide = a.float() @ b.float()
    torch.testing.assert_close(mm(a, b).float(), wide, **NEAR)
    torch.testing.assert_close(mm(a, b.t().contiguous().t()).float(), wide, **NEAR)
    torch.testing.assert_close(addmm(bias, a, b).float(), wide + bias.float(), **NEAR)
    scaled = addmm(some(70, 50), a, b, beta=0.5, alpha=2)
    torch.testing.assert_close(scaled.float(), 2 * wide + 0.5 * some(70, 50).float(), **NEAR)
    three = some(3, 9, 40)
    torch.testing.assert_close(bmm(three, b.expand(3, -1, -1)).float(), three.float() @ b.float(), **NEAR)
    for exact in (mm(a.float(), b.float()), bmm(a.float()[None], b.float()[None])[0]):
        assert torch.equal(exact, wide)
    assert torch.equal(addmm(bias.float(), a.float(), b.float()), torch.addmm(bias.float(), a.float(), b.float()))


@pytest.mark.parametrize("numbers", [1 << 10, 1 << 20], ids=["many blocks", "one block"])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 3, 1), (1, 9, 3), (2, 3, 1), (4, 0, 1)])
def test_convolutions_are_those_of_fp32(monkeypatch, numbers, stride, padding, dilation):
    monkeypatch.setattr(in_blocks, "NUMBERS", numbers)
    x, weight, bias = some(1, 12, 500), some(20, 12, 7), some(20)
    how = [stride], [padding], [dilation]
    for shift in (bias, None):
        wide = F.conv1d(x.float(), weight.float(), None if shift is None else shift.float(), *how)
        ours = convolution(x, weight, shift, *how, False, [0], 1)
        torch.testing.assert_close(ours.float(), wide, **NEAR)
        whole = convolution(x.float(), weight.float(), None if shift is None else shift.float(), *how, False, [0], 1)
        assert torch.equal(whole, wide)


def test_a_product_holds_no_more_than_blocks_besides(monkeypatch):
    monkeypatch.setattr(in_blocks, "NUMBERS", 1 << 12)
    a, b, c = some(700, 256), some(256, 900), some(900, 8)
    x, weight = some(1, 64, 9000), some(96, 64, 7)
    for product in (
        lambda: mm(a, b),
        lambda: mm(c, c.t()),
        lambda: convolution(x, weight, None, [2], [3], [1], False, [0], 1),
    ):
        with LiveBytes() as memory:
            memory.count([a, b, c, x, weight])
            before = memory.now
            out = product()
        assert memory.peak - before - out.untyped_storage().nbytes() < 4 * 4 * in_blocks.NUMBERS


def test_what_a_process_multiplies_comes_here_in_both_directions():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BOTH_WAYS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
