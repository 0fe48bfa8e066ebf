"""What a GPU takes beside the tensors, and how much memory this machine's has."""

from dataclasses import dataclass

import torch

GIB = 1 << 30

# Assumed, not measured here: a CUDA context with its libraries' workspaces, and what the caching allocator holds in pieces too small to use.
CONTEXT_BYTES = round(0.5 * GIB)
SLACK = 0.06


@dataclass(frozen=True)
class Device:
    """The memory to plan for. source: where the number comes from. taken: what other programs hold of it."""

    bytes: int
    source: str
    taken: int = 0

    @property
    def free(self) -> int:
        """Bytes that a run can have while the other programs go on."""
        return self.bytes - self.taken


def on_device(tensor_bytes: int) -> int:
    """Bytes a GPU needs for a peak of so many tensor bytes."""
    return round(tensor_bytes * (1 + SLACK)) + CONTEXT_BYTES


def this_device() -> Device | None:
    """The memory of the first CUDA GPU, or None on a machine without one. Asking makes this process's context. Not run here."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return Device(total, torch.cuda.get_device_name(), max(0, total - free - CONTEXT_BYTES))
