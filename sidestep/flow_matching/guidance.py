"""Condition dropout, which teaches base and sft models what no prompt means."""

import torch


def drop_conditions(conditions: torch.Tensor, null_condition: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Conditions with the null condition at every position of the dropped samples; context latents are kept elsewhere.

    conditions: [B, L, D]; null_condition: [1, 1, D]; dropped: bool [B].
    """
    return torch.where(dropped[:, None, None], null_condition.to(conditions.dtype), conditions)
