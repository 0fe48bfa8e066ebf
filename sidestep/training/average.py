"""The running average of the adapter (EMA), kept beside its own tensors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule

from sidestep.adapters.attach import adapter_state
from sidestep.training.run import Run
from sidestep.training.state import snapshot


@contextmanager
def averaged(run: Run) -> Iterator[None]:
    """The running average in the place of the adapter's own tensors."""
    own = [p.detach().clone() for p in run.parameters]
    _put(run, run.average.shadow_params)
    try:
        yield
    finally:
        _put(run, own)


@torch.no_grad()
def _put(run: Run, tensors: Sequence[torch.Tensor]) -> None:
    for parameter, tensor in zip(run.parameters, tensors, strict=True):
        parameter.copy_(tensor)
    for module in run.wrapped.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # or the next forward pass would use what was gathered before


def average_state(run: Run) -> dict[str, torch.Tensor]:
    """The running average by the names of `adapter_state`, on the CPU. Under FSDP all processes must call it."""
    with averaged(run):
        return snapshot(adapter_state(run.model))
