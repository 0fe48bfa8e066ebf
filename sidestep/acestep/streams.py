"""Copies from the host to a CUDA device beside its computation: pinned memory, a stream of its own, events.

All that is asked of CUDA's queues stands here, so that a stand-in can record it. Not run here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sidestep.acestep.device import GIB


class CopyStream:
    """A second queue of a device, for copies."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def copy(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], torch.Event]:
        """(copies on the device, when they are done). They begin when all that is queued by now has been computed.

        So memory that an earlier copy gave back is never written while something still reads it, and nobody needs to
        hold on to it for longer.
        """
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            return copies, self.stream.record_event()

    def wait_for(self, done: torch.Event) -> None:
        """Let what is queued from now on begin when the copies are there; the host does not wait."""
        torch.cuda.current_stream(self.device).wait_event(done)


class PinnedMemory:
    """Pinned memory for so many bytes in all, taken in chunks as tensors are put into it.

    CUDA's allocator of pinned memory rounds every request up to a power of two; tensor by tensor an XL model of 7.6 GiB
    would take 11.
    """

    def __init__(self, total_bytes: int, chunk_bytes: int = GIB, pin: bool = True):
        self._left, self._chunk_bytes, self._pin = total_bytes, chunk_bytes, pin
        self._chunk, self._used = torch.empty(0, dtype=torch.uint8), 0

    def put(self, tensor: Tensor) -> Tensor:
        """The same tensor there."""
        if self._used + tensor.nbytes > len(self._chunk):
            size = max(min(self._chunk_bytes, self._left), tensor.nbytes)
            self._chunk, self._used = torch.empty(size, dtype=torch.uint8, pin_memory=self._pin), 0
        place = self._chunk[self._used : self._used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._used += aligned(tensor.nbytes)
        self._left -= aligned(tensor.nbytes)
        return place.copy_(tensor)


def aligned(nbytes: int) -> int:
    """Bytes that a tensor takes in pinned memory: the next one begins where copies are fast and any dtype may."""
    return -(-nbytes // 64) * 64
