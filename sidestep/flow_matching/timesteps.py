"""Laws of the timestep t, each the inverse of its distribution function: uniform numbers in, timesteps out.

t = 1 is pure noise. As functions of a uniform number the laws can be stratified: equal steps of u are equally likely t.
t stays in fp32 or better; bf16 keeps only three digits of t·1000.
"""

from collections.abc import Callable

import torch

TURBO_STEPS = 8
TURBO_SHIFT = 3.0

Law = Callable[[torch.Tensor], torch.Tensor]


def turbo_timesteps() -> torch.Tensor:
    """The eight timesteps that turbo's inference visits, fp64 [8], from 1 down to 0.3."""
    u = torch.linspace(1, 1 / TURBO_STEPS, TURBO_STEPS, dtype=torch.float64)
    return TURBO_SHIFT * u / (1 + (TURBO_SHIFT - 1) * u)


def discrete(u: torch.Tensor) -> torch.Tensor:
    """Turbo: one of its eight timesteps, all equally likely. u: [B] in [0, 1] → t [B]"""
    steps = turbo_timesteps()
    return steps[(u.double() * TURBO_STEPS).long().clamp(max=TURBO_STEPS - 1)].to(u.dtype)


def logit_normal(mu: float, sigma: float) -> Law:
    """Base and sft: the larger of two draws of sigmoid(N(mu, sigma)).

    The larger of two has the squared distribution function, so its inverse is taken at the square root.
    u: [B] in [0, 1] → t [B]; the ends give 0 and 1.
    """

    def law(u: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(mu + sigma * torch.special.ndtri(u.double().sqrt())).to(u.dtype)

    return law


def stratified(parts: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform numbers [parts] in random order, exactly one in each of `parts` equal intervals of [0, 1), fp64."""
    order = torch.randperm(parts, generator=generator)
    return (order + torch.rand(parts, generator=generator, dtype=torch.float64)) / parts
