"""The flow matching loss (Lipman et al. 2022, arXiv 2210.02747): one number per sample, reduced by the caller."""

from collections.abc import Callable

import torch
from torch import Tensor


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor], latents: Tensor, noise: Tensor, t: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Per-sample loss [B] of the predicted velocity against `noise - latents`.

    velocity: (x_t [B, T, D], t [B]) → [B, T, D]. latents, noise: [B, T, D]; t: [B], 1 is pure noise;
    mask: [B, T], 1 on real frames, None if all are.
    """
    t_ = t[:, None, None]
    error = (velocity((1 - t_) * latents + t_ * noise, t).float() - (noise - latents)).square().mean(-1)
    if mask is None:
        return error.mean(-1)
    return (error * mask).sum(-1) / mask.sum(-1)


def uniform_weight(t: Tensor) -> Tensor:
    """Every timestep counts the same. [B] → [B]"""
    return torch.ones_like(t)


def min_snr_weight(gamma: float) -> Callable[[Tensor], Tensor]:
    """min-SNR for a velocity target: min(snr, γ)/(snr + 1) with snr = ((1−t)/t)², finite at both ends.

    Source: Hang et al. 2023, arXiv 2303.09556.
    """

    def weight(t: Tensor) -> Tensor:
        # numerator and denominator times t², so that neither t = 0 nor t = 1 divides by zero
        signal, noise = (1 - t).square(), t.square()
        return torch.minimum(signal, gamma * noise) / (signal + noise)

    return weight
