"""Blocks of the frozen DiT that live on the CPU and are on the device only while they compute.

Weights are frozen, so they travel one way. A block's copy is fetched while the block before it computes; the copy is an ordinary tensor
that the backward pass of the block holds for as long as it needs it, so swapped blocks must be recomputed (`recompute_layers`).
"""

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class _Block:
    """A swapped block: where its frozen parameters sit, and their home on the CPU."""

    places: list[tuple[nn.Module, str]]
    home: list[nn.Parameter]


@dataclass
class BlockSwap:
    """Streams the weights of some blocks. cuda overlaps copies with computation on a stream of its own (not run here); other devices copy in line."""

    device: torch.device
    blocks: list[_Block] = field(default_factory=list)
    fetched: dict[int, tuple[list[torch.Tensor], object]] = field(default_factory=dict)
    last: int = -1

    def install(self, decoder: nn.Module, count: int) -> None:
        """Keep the frozen weights of the first `count` blocks on the CPU and stream them from now on; all else goes to the device."""
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        for index, block in enumerate(decoder.layers[:count]):
            places = [(m, name) for m in block.modules() for name, p in m._parameters.items() if p is not None and not p.requires_grad]
            home = [self._to_cpu(m._parameters[name]) for m, name in places]
            self.blocks.append(_Block(places, home))
            self._put(index, [nn.Parameter(torch.empty(0), requires_grad=False) for _ in home])  # so that the move below leaves them
            block.register_forward_pre_hook(lambda module, inputs, index=index: self._enter(index))
            # a recomputation stops as soon as the backward pass has what it needs, by an exception: leave all the same
            block.register_forward_hook(lambda module, inputs, output, index=index: self._leave(index), always_call=True)
        decoder.to(self.device)
        for index, block in enumerate(self.blocks):
            self._put(index, block.home)

    def _to_cpu(self, parameter: nn.Parameter) -> nn.Parameter:
        tensor = parameter.detach().to("cpu")
        return nn.Parameter(tensor.pin_memory() if self._stream else tensor, requires_grad=False)

    def _put(self, index: int, tensors: list[nn.Parameter]) -> None:
        for (module, name), tensor in zip(self.blocks[index].places, tensors, strict=True):
            module._parameters[name] = tensor

    def _enter(self, index: int) -> None:
        copies = self._take(index)
        forward = index > self.last
        following = index + 1 if forward else index - 1
        self.last = index if forward or index else -1
        self._put(index, [nn.Parameter(copy, requires_grad=False) for copy in copies])
        if self._stream and 0 <= following < len(self.blocks):
            self._fetch(following)

    def _leave(self, index: int) -> None:
        self._put(index, self.blocks[index].home)

    def _fetch(self, index: int) -> None:
        if index in self.fetched:
            return
        if self._stream is None:
            self.fetched[index] = ([p.detach().to(self.device, copy=True) for p in self.blocks[index].home], None)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # memory freed by the blocks before may be reused only after them
        with torch.cuda.stream(self._stream):
            copies = [p.detach().to(self.device, non_blocking=True) for p in self.blocks[index].home]
            self.fetched[index] = (copies, self._stream.record_event())

    def _take(self, index: int) -> list[torch.Tensor]:
        self._fetch(index)
        copies, done = self.fetched.pop(index)
        self.fetched.clear()  # a copy fetched in the other direction
        if done is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            for copy in copies:
                copy.record_stream(current)
        return copies
