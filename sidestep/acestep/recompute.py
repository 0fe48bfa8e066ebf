"""Less memory for activations: recompute layers in the backward pass, keep what must be kept on the CPU."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Layer = Callable[..., torch.Tensor]


def recompute_layers(decoder: nn.Module, count: int | None = None) -> None:
    """Recompute the first `count` blocks of diffusers' DiT in the backward pass, all of them if None.

    The first ones: the last are done with by the time the others are recomputed, so their activations do not add to the peak.
    """
    decoder.enable_gradient_checkpointing(partial(recompute_some, set(decoder.layers[:count]), recompute))


def recompute(layer: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
    """A layer that keeps only its inputs and is computed again in the backward pass."""
    return checkpoint(layer, *inputs, use_reentrant=False)


def recompute_some(chosen: set[nn.Module], again: Layer, layer: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
    """`again` (such as `recompute`) for the chosen layers, an ordinary call for all others."""
    return again(layer, *inputs) if layer in chosen else layer(*inputs)


def offload_activations(device: torch.device) -> AbstractContextManager:
    """While entered, what the backward pass needs of computed activations waits on the CPU. Inputs and weights stay where they are.

    Copies to pinned memory run on the device's own queue, so nothing waits for them on the host.
    """
    pin = device.type == "cuda"

    def to_cpu(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.device]:
        if tensor.is_leaf:
            return tensor
        kept = torch.empty_like(tensor, device="cpu", pin_memory=pin, requires_grad=False)  # strides too: attention kernels rely on them
        kept.copy_(tensor.detach(), non_blocking=pin)
        return kept, tensor.device

    def back(kept: torch.Tensor | tuple[torch.Tensor, torch.device]) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else kept[0].to(kept[1], non_blocking=pin)

    return saved_tensors_hooks(to_cpu, back)
