"""Where a model waits between its uses: on the device, or on the CPU.

Blocks of the frozen DiT that live on the CPU and are on the device only while they compute.

Weights are frozen, so they travel one way. A block's copy is fetched while the block before it computes; the copy is an ordinary tensor
that the backward pass of the block holds for as long as it needs it, so swapped blocks must be recomputed (`recompute_layers`).
Less memory for activations: recompute layers in the backward pass, keep what must be kept on the CPU.
`--compile`: the DiT's repeated layer compiled once for all layers and all lengths, with its recomputation inside the compiled code.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import AceStepTransformer1DModel
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint

from sidestep.acestep.device import Choice
from sidestep.errors import UserError

CPU = torch.device("cpu")


class OffloadedModule:
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
            places = [
                (m, name)
                for m in block.modules()
                for name, p in m._parameters.items()
                if p is not None and not p.requires_grad
            ]
            home = [self._to_cpu(m._parameters[name]) for m, name in places]
            self.blocks.append(_Block(places, home))
            self._put(
                index, [nn.Parameter(torch.empty(0), requires_grad=False) for _ in home]
            )  # so that the move below leaves them
            block.register_forward_pre_hook(lambda module, inputs, index=index: self._enter(index))
            # a recomputation stops as soon as the backward pass has what it needs, by an exception: leave all the same
            block.register_forward_hook(
                lambda module, inputs, output, index=index: self._leave(index), always_call=True
            )
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
        self._stream.wait_stream(
            torch.cuda.current_stream(self.device)
        )  # memory freed by the blocks before may be reused only after them
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


Layer = Callable[..., torch.Tensor]


def recompute_layers(decoder: nn.Module, count: int | None = None) -> None:
    """Recompute the first `count` blocks of diffusers' DiT in the backward pass, all of them if None.

    The first ones: the last are done with by the time the others are recomputed, so their activations do not add to the peak.
    """
    decoder.enable_gradient_checkpointing(partial(recompute_some, set(decoder.layers[:count]), recompute))


def recompute(layer: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
    """A layer that keeps only its inputs and is computed again in the backward pass."""
    return checkpoint(layer, *inputs, use_reentrant=False)


def recompute_some(
    chosen: set[nn.Module], again: Layer, layer: nn.Module, *inputs: torch.Tensor | None
) -> torch.Tensor:
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
        kept = torch.empty_like(
            tensor, device="cpu", pin_memory=pin, requires_grad=False
        )  # strides too: attention kernels rely on them
        kept.copy_(tensor.detach(), non_blocking=pin)
        return kept, tensor.device

    def back(kept: torch.Tensor | tuple[torch.Tensor, torch.device]) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else kept[0].to(kept[1], non_blocking=pin)

    return saved_tensors_hooks(to_cpu, back)


GRAPHS_PER_LAYER = (
    6  # short or long songs, first layer or later, training or validation, with or without pad tokens in a batch
)


def compile_layers(
    decoder: AceStepTransformer1DModel,
    device: torch.device,
    recomputed: Iterable[nn.Module] = (),
    backend: str = "inductor",
) -> Choice:
    """Compile each layer for lengths that vary; the code is shared by layers of the same kind. Call it after the attention is chosen, the adapter
    attached and gradient checkpointing switched on or off. Nothing is compiled before the first step.

    recomputed: the layers to compute again in the backward pass inside the compiled code, which is faster than around it. Left empty, gradient
    checkpointing stays as it was switched on, around the compiled layers.
    Compiled code is kept on disk by torch (TORCHINDUCTOR_CACHE_DIR), so a later run with the same model starts faster.
    Raises UserError where no compiler is found.
    """
    if backend == "inductor":
        _require_compiler(device)
    # Layers share one cache of graphs. Where ranks differ by layer each has its own, and torch would give up after eight.
    limit = GRAPHS_PER_LAYER * len(decoder.layers)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 2 * limit)
    for layer in decoder.layers:
        layer.compile(dynamic=True, backend=backend)
    if chosen := set(recomputed):
        again = torch.compile(recompute, dynamic=True, backend=backend)
        decoder.enable_gradient_checkpointing(partial(recompute_some, chosen, again))
    return Choice("on", "asked for: the first steps compile, one code for all lengths")


def _require_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        if not has_triton():
            raise UserError(
                "--compile: Triton is not installed, which compiles for this GPU.",
                "Install it (triton, on Windows triton-windows), or leave --compile out.",
            )
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "--compile: no C++ compiler was found.",
            "Install g++, clang or Visual Studio's Build Tools, or leave --compile out.",
        ) from None
