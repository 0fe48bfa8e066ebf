"""The gradient of many frozen Linears at once, as a small random sketch that is filled during the backward pass.

A Linear with input x [N, in] and output gradient δ [N, out] has the gradient G = δᵀx [out, in]. It never exists here.
Two products with fixed random matrices are accumulated instead, GΩ and GᵀΨ, which are linear in G: sums over batches,
halves and machines are sums of sketches. One pass over both gives the leading singular triplets (Tropp, Yurtsever,
Udell, Cevher: Practical sketching algorithms for low-rank matrix approximation, 2017, section 4).

From the sketches of two halves of the songs comes a module's spectrum: what each of its ranks is worth, in gradient
energy that holds on songs it was not measured on.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sidestep.tasks.estimate.allocate import never_rising

FAINT = 1e-3  # weight of plain energy beside energy that was confirmed: it only orders what nothing else orders


@dataclass(frozen=True)
class Slot:
    """Where a module's sketch lies in the flat state, and its form.

    Rows are the longer side of G, columns the shorter. Exact slots hold G itself, where it is no larger than a sketch.
    """

    name: str
    out_features: int
    in_features: int
    exact: bool
    range_at: int  # G·Ω [rows, k], or G [rows, columns]
    corange_at: int  # Gᵀ·Ψ [columns, l]
    end: int

    @property
    def rows(self) -> int:
        return max(self.out_features, self.in_features)

    @property
    def columns(self) -> int:
        return min(self.out_features, self.in_features)

    @property
    def cost(self) -> int:
        """Parameters of one rank."""
        return self.out_features + self.in_features

    @property
    def transposed(self) -> bool:
        """Rows are the inputs, not the outputs."""
        return self.in_features > self.out_features


class Layout:
    """Plan of the flat state of all modules, and the random test matrices.

    The same modules, width and seed give the same plan. width: columns k of the range sketch; the co-range sketch has
    2k + 1, which balances both errors.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]], width: int, seed: int):
        self.shapes, self.width, self.seed = shapes, width, seed
        self.corange_width = 2 * width + 1
        self.slots: dict[str, Slot] = {}
        at = 0
        for name, (out_features, in_features) in shapes.items():
            rows, columns = max(out_features, in_features), min(out_features, in_features)
            exact = columns <= width or rows * columns <= rows * width + columns * self.corange_width
            corange_at = at + rows * (columns if exact else width)
            end = corange_at if exact else corange_at + columns * self.corange_width
            self.slots[name] = Slot(name, out_features, in_features, exact, at, corange_at, end)
            at = end
        self.size = at
        generator = torch.Generator().manual_seed(seed)
        sizes = sorted({side for slot in self.slots.values() if not slot.exact for side in (slot.rows, slot.columns)})
        self.omega = {side: torch.randn(side, width, generator=generator) for side in sizes}
        self.psi = {side: torch.randn(side, self.corange_width, generator=generator) for side in sizes}

    def range_view(self, state: torch.Tensor, slot: Slot) -> torch.Tensor:
        return state[slot.range_at : slot.corange_at].view(slot.rows, -1)

    def corange_view(self, state: torch.Tensor, slot: Slot) -> torch.Tensor:
        return state[slot.corange_at : slot.end].view(slot.columns, -1)

    def decompose(self, state: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Leading singular triplets of a module's gradient: (U [out, k], values [k], V [in, k]), fp64 on the CPU.

        state: flat, fp32 or fp64.
        """
        slot = self.slots[name]
        seen = self.range_view(state, slot).double().cpu()
        if slot.exact:
            left, values, right = torch.linalg.svd(seen, full_matrices=False)
        else:
            basis = torch.linalg.qr(seen).Q
            mixed = self.psi[slot.rows].double().T @ basis  # [l, k]
            mixed_gradient = self.corange_view(state, slot).double().cpu().T  # Ψᵀ·G, [l, columns]
            # basisᵀ·G, [k, columns], plus noise from what lies outside the basis
            core = torch.linalg.lstsq(mixed, mixed_gradient).solution
            turn, values, right = torch.linalg.svd(core, full_matrices=False)
            left = basis @ turn
            # That noise lifts every σ² by ‖outside‖² / (l − k − 1), the mean of an inverse Wishart matrix, and the
            # residual tells ‖outside‖²·(l − k).
            spare = self.corange_width - self.width
            lift = (mixed_gradient - mixed @ core).square().sum() / (spare * (spare - 1))
            values = (values.square() - lift).clamp_min(0).sqrt()
        return (right.T, values, left) if slot.transposed else (left, values, right.T)


class Sketch:
    """The state on the device, filled by `watch`: one tensor for all modules, in which nothing makes the host wait.

    dtype: that of the state. bf16 halves its memory; its rounding noise is white, far below the leading singular values
    while few batches are summed.
    """

    def __init__(self, layout: Layout, device: torch.device, dtype: torch.dtype = torch.float32):
        self.layout = layout
        self.state = torch.zeros(layout.size, dtype=dtype, device=device)
        self._views = {
            slot.name: (
                slot,
                layout.range_view(self.state, slot),
                None if slot.exact else layout.corange_view(self.state, slot),
            )
            for slot in layout.slots.values()
        }
        self._tests: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}

    def add(self, name: str, x: torch.Tensor, delta: torch.Tensor) -> None:
        """Add δᵀx to a module's sketch. x: [..., in], delta: [..., out], on the device of the state."""
        slot, seen, co_seen = self._views[name]
        rows, columns = (x.to(delta.dtype), delta) if slot.transposed else (delta, x.to(delta.dtype))
        rows, columns = rows.flatten(0, -2), columns.flatten(0, -2)
        if co_seen is None:
            _accumulate(seen, rows, columns)
        else:
            _accumulate(seen, rows, columns @ self._test("omega", slot.columns, rows.dtype))
            _accumulate(co_seen, columns, rows @ self._test("psi", slot.rows, rows.dtype))

    def take(self) -> torch.Tensor:
        """The state as an fp32 CPU tensor; the sketch is empty afterwards.

        Waits for the device, so call it once in many batches.
        """
        taken = self.state.to("cpu", copy=True).float()
        self.state.zero_()
        return taken

    @property
    def nbytes(self) -> int:
        """Bytes on the device: state and test matrices."""
        return self.state.nbytes + sum(t.nbytes for t in self._tests.values())

    def _test(self, kind: str, side: int, dtype: torch.dtype) -> torch.Tensor:
        key = (kind, side, dtype)
        if key not in self._tests:
            matrices = self.layout.omega if kind == "omega" else self.layout.psi
            self._tests[key] = matrices[side].to(self.state.device, dtype)
        return self._tests[key]


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += leftᵀ·right; each product is summed in fp32 inside, whatever the factors are."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total.add_(left.T @ right)


class _Tap(torch.autograd.Function):
    """The identity on a Linear's output; its backward hands (input, output gradient) to the sketch.

    The input is saved through autograd, so recomputation drops and rebuilds it like any other activation. `anchor` is a
    parameter of nothing: it makes the output differentiable where no input is (the first layer, keys and values of the
    cross attention), so all modules of a frozen model see a gradient.
    """

    @staticmethod
    def forward(ctx, output: torch.Tensor, x: torch.Tensor, _anchor: torch.Tensor, sketch: Sketch, name: str):
        ctx.save_for_backward(x)
        ctx.sketch, ctx.name = sketch, name
        return output.view_as(output)

    @staticmethod
    def backward(ctx, *deltas: torch.Tensor):
        (delta,), (x,) = deltas, ctx.saved_tensors
        ctx.sketch.add(ctx.name, x, delta)
        return delta, None, None, None, None


@contextmanager
def watch(model: nn.Module, sketch: Sketch):
    """While open, every backward pass through `model` adds the gradients of the layout's modules to the sketch."""
    anchor = torch.zeros((), device=sketch.state.device, requires_grad=True)
    modules = dict(model.named_modules())

    def tap(name: str):
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor):
            return _Tap.apply(output, inputs[0], anchor, sketch, name) if torch.is_grad_enabled() else output

        return hook

    handles = [modules[name].register_forward_hook(tap(name)) for name in sketch.layout.slots]
    try:
        yield sketch
    finally:
        for handle in handles:
            handle.remove()


def linear_shapes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(out, in) features of the named Linears; quantised ones state theirs the same way."""
    modules: dict[str, Any] = dict(model.named_modules())
    return {name: (modules[name].out_features, modules[name].in_features) for name in names}


@dataclass(frozen=True)
class Spectrum:
    """A module's gradient as two halves of the data see it."""

    energy: list[float]  # σ² of the mean gradient, falling
    confirmed: list[float]  # energy of the same rank that the other half confirms, never rising
    agreement: float  # cosine between the halves' gradients: 1 is all signal, 0 all noise

    @property
    def score(self) -> float:
        """Confirmed energy in all measured ranks."""
        return sum(self.confirmed)

    def values(self, length: int) -> list[float]:
        """Worth of the ranks 1 … length. Past the sketch's width the decay of the last measured half goes on."""
        measured = never_rising([c + FAINT * e for c, e in zip(self.confirmed, self.energy, strict=True)])
        if len(measured) >= length:
            return measured[:length]
        half = len(measured) // 2
        last, middle = measured[-1], measured[half]
        decay = min((last / middle) ** (1 / max(1, len(measured) - 1 - half)), 0.99) if middle > 0 else 0.0
        return measured + [last * decay ** (i + 1) for i in range(length - len(measured))]


def spectrum(layout: Layout, name: str, first: torch.Tensor, second: torch.Tensor) -> Spectrum:
    """Spectrum of a module from the mean sketches of two halves of the data: flat states over their numbers of samples.

    A step along the i-th singular direction of one half lowers the other half's loss by σᵢ·uᵢᵀG′vᵢ to first order. The
    mean of both ways round is the confirmed energy: unbiased, where σ² alone counts noise as signal.
    """
    (u, s, v), (u2, s2, v2) = layout.decompose(first, name), layout.decompose(second, name)
    overlap = (u.T @ u2), (v.T @ v2)
    there = ((overlap[0] * s2) * overlap[1]).sum(1) * s  # σᵢ uᵢᵀ (U′ S′ V′ᵀ) vᵢ
    back = ((overlap[0].T * s) * overlap[1].T).sum(1) * s2
    inner = float((s[:, None] * overlap[0] * overlap[1] * s2).sum())
    norms = float(s.square().sum().sqrt() * s2.square().sum().sqrt())
    together = layout.decompose((first + second) / 2, name)[1].square()
    return Spectrum(
        energy=together.tolist(),
        confirmed=never_rising(((there + back) / 2).tolist()),
        agreement=inner / norms if norms > 0 else 0.0,
    )
