"""Where a model waits between its uses: on the device, or on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

CPU = torch.device("cpu")


class Part:
    """A model that is needed now and then. With `offload` it is on the device only inside `in_use`; otherwise it stays there until freed.

    load(device): loads the model onto a device; called at the first use, and again at the first one after `free`.
    """

    def __init__(self, load: Callable[[torch.device], torch.nn.Module], device: torch.device, offload: bool = False):
        self.device, self.offload = device, offload
        self._load, self._model = load, None

    @contextmanager
    def in_use(self) -> Iterator[torch.nn.Module]:
        """The model, on the device."""
        if self._model is None:
            self._model = self._load(self.device)
        elif self.offload:
            self._model.to(self.device)
        try:
            yield self._model
        finally:
            if self.offload:
                self._model.to(CPU)

    def free(self) -> None:
        """Let go of the model and its memory."""
        self._model = None
