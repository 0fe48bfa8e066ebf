"""Laws of the timestep t, each the inverse of its distribution function: uniform numbers in, timesteps out.

t = 1 is pure noise. As functions of a uniform number the laws can be stratified: equal steps of u are equally likely t.
t stays in fp32 or better; bf16 keeps only three digits of t·1000.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sidestep.variants import TURBO_SHIFT

TURBO_STEPS = 8

Law = Callable[[Tensor], Tensor]


def shifted(u: Tensor, shift: float) -> Tensor:
    """Timesteps moved towards the noise: shift·u / (1 + (shift − 1)·u) (Esser et al. 2024, arXiv 2403.03206)."""
    return shift * u / (1 + (shift - 1) * u)


def turbo_timesteps(shift: float = TURBO_SHIFT) -> Tensor:
    """The eight timesteps that turbo's inference visits, fp64 [8], from 1 down; to 0.3 at its usual shift."""
    return shifted(torch.linspace(1, 1 / TURBO_STEPS, TURBO_STEPS, dtype=torch.float64), shift)


def discrete(u: Tensor, shift: float = TURBO_SHIFT) -> Tensor:
    """Turbo: one of its eight timesteps, all equally likely. u: [B] in [0, 1] → t [B]"""
    return turbo_timesteps(shift)[(u.double() * TURBO_STEPS).long().clamp(max=TURBO_STEPS - 1)].to(u.dtype)


def logit_normal(mu: float, sigma: float) -> Law:
    """Base and sft: the larger of two draws of sigmoid(N(mu, sigma)).

    The larger of two has the squared distribution function, so its inverse is taken at the square root.
    u: [B] in [0, 1] → t [B]; the ends give 0 and 1.
    """

    def law(u: Tensor) -> Tensor:
        return torch.sigmoid(mu + sigma * torch.special.ndtri(u.double().sqrt())).to(u.dtype)

    return law


def stratified(parts: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers [parts] in random order, exactly one in each of `parts` equal intervals of [0, 1), fp64."""
    order = torch.randperm(parts, generator=generator)
    return (order + torch.rand(parts, generator=generator, dtype=torch.float64)) / parts
