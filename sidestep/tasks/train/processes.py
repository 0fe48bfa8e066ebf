"""What the processes of one run tell each other beside gradients. With a single process nothing is sent.

It goes through the CPU (gloo), so that no process waits for its device to say whether somebody pressed Ctrl-C.
"""

from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator

PATIENCE = timedelta(hours=2)  # for the first process to encode, validate or save while the others wait

T = TypeVar("T")


class Processes:
    """The group of a run's processes; `index` 0 is the one that writes."""

    def __init__(self, accelerator: Accelerator):
        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self._group: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if self.count > 1 else None

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether it is set on any process."""
        return [total > 0 for total in self.sum([float(flag) for flag in flags])]

    def sum(self, values: list[float]) -> list[float]:
        """The values, added up over the processes."""
        if self._group is None:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """The value of each process, in their order."""
        if self._group is None:
            return [value]
        values: list[T] = [value] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self._group is not None:
            dist.barrier(group=self._group)


def own_part(tensor: Any) -> Any:
    """What this process has of a tensor that FSDP has sharded. Others, and None, as they are."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def unshard(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP has sharded, put together; all processes must ask for it. Others as they are."""
    return cast(Any, tensor).full_tensor() if _is_sharded(tensor) else tensor


def shard_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """A full tensor sharded over the processes as `example` is, if it is and has that shape."""
    if not _is_sharded(example) or tensor.shape != example.shape:
        return tensor
    sharded = cast(Any, example)
    return torch.distributed.tensor.distribute_tensor(
        tensor.to(sharded.device), sharded.device_mesh, sharded.placements
    )


def _is_sharded(tensor: Any) -> bool:
    # by what it has: torch.distributed.tensor, which has its type, takes most of a second to load and is there if it is
    return hasattr(tensor, "full_tensor")
