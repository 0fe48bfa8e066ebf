"""Guidance: conditions are dropped in training, so that sampling can push away from what no condition would give.

Classifier-free guidance: Ho & Salimans 2022, arXiv 2207.12598.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

# ACE-Step's settings of projected guidance (β and r in the paper; η is 0).
MOMENTUM = -0.75
NORM_LIMIT = 2.5


def drop_conditions(conditions: Tensor, null_condition: Tensor, dropped: Tensor) -> Tensor:
    """Conditions with the null condition at every position of the dropped samples.

    conditions: [B, L, D]; null_condition: [1, 1, D]; dropped: bool [B].
    """
    return torch.where(dropped[:, None, None], null_condition.to(conditions.dtype), conditions)


def guided(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor], conditions: Tensor, null_condition: Tensor, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity under adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416).

    The difference that the condition makes is summed over the steps with negative momentum and limited in norm;
    its part orthogonal to the conditional velocity is added `scale - 1` times. Norm and projection run over time.

    velocity: (x [B, T, D], t [B], conditions [B, L, C]) → [B, T, D]; it is called once a step with a doubled batch.
    conditions: [B, L, C]; null_condition: [1, 1, C].
    The function that is returned remembers its steps: make one for each sampling.
    """
    both = torch.cat([conditions, null_condition.to(conditions).expand_as(conditions)])
    summed: Tensor | float = 0.0

    def guided_velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal summed
        v = velocity(torch.cat([x, x]), torch.cat([t, t]), both)
        conditional, unconditional = v.float().chunk(2)
        summed = conditional - unconditional + MOMENTUM * summed
        difference = summed * (NORM_LIMIT / summed.norm(dim=1, keepdim=True)).clamp(max=1)
        direction = normalize(conditional, dim=1)
        orthogonal = difference - (difference * direction).sum(1, keepdim=True) * direction
        return (conditional + (scale - 1) * orthogonal).to(v.dtype)

    return guided_velocity
