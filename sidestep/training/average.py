"""The running average of the adapter (EMA), kept beside its own tensors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sidestep.adapters.attach import adapter_state
from sidestep.training.run import Run
from sidestep.training.state import snapshot


@contextmanager
def averaged(run: Run) -> Iterator[None]:
    """The running average in the place of the adapter's own tensors."""
    own = [p.detach().clone() for p in run.parameters]
    with torch.no_grad():
        torch._foreach_copy_(run.parameters, run.average.shadow_params)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(run.parameters, own)


def average_state(run: Run) -> dict[str, torch.Tensor]:
    """The running average by the names of `adapter_state`, on the CPU. Under FSDP all processes must call it."""
    with averaged(run):
        return snapshot(adapter_state(run.model))
