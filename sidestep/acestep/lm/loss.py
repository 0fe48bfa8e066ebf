"""The loss of an answer, without ever holding the logits of the whole vocabulary for a whole song.

One position has 217,204 logits, 869 kB in fp32; a song of four minutes would take gigabytes. The head's matrix is
frozen, so the gradient of each piece of states is computed beside its loss, and its logits are gone before the next
piece comes. Source: spec, lm-facts section 5.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 512  # positions whose logits are there at a time


def answer_loss(states: Tensor, head: Tensor, ids: Tensor, n_prompt: int, piece: int = PIECE) -> Tensor:
    """Mean negative log-likelihood of what follows the prompt, fp32 [].

    states: [N, C], what the trunk makes of `ids` [N]; head: [V, C], frozen. The first `n_prompt` tokens are given.
    """
    predicting = states[n_prompt - 1 : -1]
    return _SumInPieces.apply(predicting, head, ids[n_prompt:], piece) / len(predicting)


class _SumInPieces(torch.autograd.Function):
    """Sum of cross-entropies of `states` [N, C] times `head` [V, C] against `targets` [N]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, targets: Tensor, size: int) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        total = torch.zeros((), device=states.device)
        gradients = []
        for part, wanted in zip(states.split(size), targets.split(size), strict=True):
            with torch.set_grad_enabled(needs_gradient):
                own = part.detach().requires_grad_(needs_gradient)
                loss = F.cross_entropy(F.linear(own, head).float(), wanted, reduction="sum")
            if needs_gradient:
                gradients += torch.autograd.grad(loss, own)
            total += loss.detach()
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (of_states,) = ctx.saved_tensors
        return of_states * gradients[0].to(of_states.dtype), None, None, None
