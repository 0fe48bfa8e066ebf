"""From noise to latents: Euler steps along the velocity (rectified flow, Liu et al. 2022, arXiv 2209.03003)."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from sidestep.flow_matching.timesteps import shifted


def sampling_timesteps(steps: int, shift: float) -> Tensor:
    """The timesteps that `steps` Euler steps go through, fp32 [steps + 1], from 1 (noise) down to 0 (latents)."""
    return shifted(torch.linspace(1, 0, steps + 1), shift)


@torch.no_grad()
def sample_euler(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    timesteps: Tensor,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Latents [B, T, D] that the field dx/dt = velocity(x [B, T, D], t [B]) has at t = 0 if it has `noise` at t = 1.

    The state is kept in the dtype of the velocity, each step is added in fp32. timesteps: fp32, falling, on the CPU.
    on_step is called after each step.
    """
    x = noise
    for t, following in pairwise(timesteps):
        v = velocity(x, t.to(x).expand(len(x)))
        x = (x.float() + (following - t) * v).to(v.dtype)
        on_step()
    return x
