"""Counts the bytes of live tensor storages while code runs, on real tensors and on fake ones alike."""

import weakref
from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_DEVICE_OF = torch.ops.prim.device.default
_UNSAFE_VIEW, _VIEW = torch.ops.aten._unsafe_view.default, torch.ops.aten.view.default
ALLOCATION_BYTES = 512  # what CUDA's caching allocator rounds every tensor up to


class LiveBytes(TorchDispatchMode):
    """While entered: `now` and `peak` bytes of the tensors that exist. A storage counts once, from the operation that made it until nothing holds it.

    device_type: count only storages on such a device, None counts all.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._device_type = device_type
        self._alive: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is _DEVICE_OF and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two thirds of all calls on fake tensors; the mode would ask its cache first
        if function is _UNSAFE_VIEW and isinstance(args[0], FakeTensor):
            function = _VIEW  # shares the storage all the same, and the cache of fake tensors knows it
        result = function(*args, **(kwargs or {}))
        self.count(result)
        return result

    def count(self, tensors: object) -> int:
        """Add the storages of nested tensors that are not counted yet, and return their bytes."""
        added = 0
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and (self._device_type is None or tensor.device.type == self._device_type):
                added += self._count_storage(tensor.untyped_storage())
        return added

    def _count_storage(self, storage: torch.UntypedStorage) -> int:
        key = id(storage)
        known = self._alive.get(key)
        if known is not None and known[0]() is storage:
            return 0
        size = allocated(storage.nbytes())
        self._alive[key] = (weakref.ref(storage, lambda _, key=key, size=size: self._free(key, size)), size)
        self.now += size
        self.peak = max(self.peak, self.now)
        return size

    def _free(self, key: int, size: int) -> None:
        if self._alive.pop(key, None) is not None:
            self.now -= size

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now


def allocated(nbytes: int) -> int:
    """What the device's allocator gives to a tensor of so many bytes."""
    return -(-nbytes // ALLOCATION_BYTES) * ALLOCATION_BYTES


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of distinct storages, each rounded up as the device's allocator does."""
    return LiveBytes().count(list(tensors))
