"""What each rank of a module is worth: gradient energy that holds on songs it was not measured on."""

from dataclasses import dataclass

import torch

from sidestep.estimate.allocate import never_rising
from sidestep.estimate.sketch import Layout

FAINT = 1e-3  # weight of plain energy beside energy that was confirmed: it only orders what nothing else orders


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
        measured = [c + FAINT * e for c, e in zip(self.confirmed, self.energy, strict=True)]
        measured = never_rising(measured)
        if len(measured) >= length:
            return measured[:length]
        half = len(measured) // 2
        last, middle = measured[-1], measured[half]
        decay = min((last / middle) ** (1 / max(1, len(measured) - 1 - half)), 0.99) if middle > 0 else 0.0
        return measured + [last * decay ** (i + 1) for i in range(length - len(measured))]


def spectrum(layout: Layout, name: str, first: torch.Tensor, second: torch.Tensor) -> Spectrum:
    """Spectrum of a module from the mean sketches of two halves of the data (flat states, each divided by its number of samples).

    A step along the i-th singular direction of one half lowers the other half's loss by σᵢ·uᵢᵀG′vᵢ to first order. The mean of both ways round is the
    confirmed energy: unbiased, where σ² alone counts noise as signal.
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
