"""Less memory for more time, or less time: what can be done with the DiT's blocks without changing a number.

In the order of their cost: layers are computed again in the backward pass instead of keeping what they computed
(`recompute_layers`), what is kept waits on the CPU (`offload_activations`), the frozen weights themselves wait there
and are copied when their block computes (`BlockSwap`). `compile_layers` makes the layers faster. Models beside the DiT
that are needed now and then can wait on the CPU as a whole (`OffloadedModule`).
"""

import os
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint

from sidestep.acestep.device import Choice
from sidestep.acestep.streams import CopyStream, PinnedMemory, aligned
from sidestep.errors import UserError
from sidestep.files import cache_folder
from sidestep.words import clock


def recompute_layers(decoder: AceStepTransformer1DModel, count: int | None = None) -> None:
    """Recompute the first `count` blocks of diffusers' DiT in the backward pass, all of them if None.

    The first ones: the last are done with by the time the others are recomputed, so their activations do not add to the
    peak.
    """
    decoder.enable_gradient_checkpointing(partial(_call_some, set(decoder.layers[:count]), recompute))


def recompute(layer: nn.Module, *inputs: Tensor | None) -> Tensor:
    """A layer that keeps only its inputs and is computed again in the backward pass."""
    return checkpoint(layer, *inputs, use_reentrant=False)


def _call_some(some: set[nn.Module], call: Callable[..., Tensor], layer: nn.Module, *inputs: Tensor | None) -> Tensor:
    """The layer called by `call` where it is one of `some`, as usual where not."""
    return call(layer, *inputs) if layer in some else layer(*inputs)


def offload_activations(device: torch.device) -> AbstractContextManager:
    """While entered, what the backward pass needs of computed activations waits on the CPU. Inputs and weights stay.

    Of what a function keeps of its own making only masks of dropout are large: they are told by their kind.
    Copies to pinned memory run on the device's own queue, so nothing waits for them on the host.
    """
    pin = device.type == "cuda"

    def to_cpu(tensor: Tensor) -> Tensor | tuple[Tensor, torch.device]:
        if tensor.is_leaf and tensor.dtype != torch.bool:
            return tensor
        # strides too: attention kernels rely on them
        kept = torch.empty_like(tensor, device="cpu", pin_memory=pin, requires_grad=False)
        kept.copy_(tensor.detach(), non_blocking=pin)
        return kept, tensor.device

    def back(kept: Tensor | tuple[Tensor, torch.device]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0].to(kept[1], non_blocking=pin)

    return saved_tensors_hooks(to_cpu, back)


@dataclass
class SwappedBlock:
    """The frozen parameters of a block on the CPU, and (module, name) where each of them belongs."""

    owners: list[tuple[nn.Module, str]]
    parameters: list[nn.Parameter]

    def put(self, parameters: list[nn.Parameter]) -> None:
        """Let the block compute with these."""
        for (module, name), parameter in zip(self.owners, parameters, strict=True):
            module._parameters[name] = parameter


class BlockSwap:
    """Keeps the frozen weights of the first `count` blocks on the CPU; all else of the decoder goes to the device.

    Weights are frozen, so they travel one way. A block's copy is fetched while the block before it computes; the copy
    is an ordinary tensor that the backward pass of the block holds for as long as it needs it, so swapped blocks must
    be recomputed. cuda overlaps copies with computation on a stream of its own (not run here), other devices copy in
    line.
    """

    def __init__(
        self,
        decoder: AceStepTransformer1DModel,
        count: int,
        device: torch.device,
        stream: CopyStream | None = None,
        pin: bool = True,
    ):
        self.device = device
        self.blocks: list[SwappedBlock] = []
        self.fetched: dict[int, tuple[list[Tensor], torch.Event | None]] = {}
        self._last = -1  # the block that computed last, which tells the direction
        self._stream = CopyStream(device) if stream is None and device.type == "cuda" else stream
        nbytes = (aligned(p.nbytes) for layer in decoder.layers[:count] for p in layer.parameters())
        memory = PinnedMemory(sum(nbytes), pin=pin) if self._stream else None
        for index, layer in enumerate(decoder.layers[:count]):
            frozen = {
                (module, name): parameter.detach().to("cpu")
                for module in layer.modules()
                for name, parameter in module._parameters.items()
                if parameter is not None and not parameter.requires_grad
            }
            tensors = [memory.put(tensor) if memory else tensor for tensor in frozen.values()]
            block = SwappedBlock(list(frozen), [nn.Parameter(tensor, requires_grad=False) for tensor in tensors])
            self.blocks.append(block)
            # nothing in their places, so that the move below leaves them on the CPU
            block.put([nn.Parameter(torch.empty(0), requires_grad=False) for _ in tensors])
            layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            # a recomputation stops as soon as the backward pass has what it needs, by an exception: leave all the same
            layer.register_forward_hook(lambda *_, block=block: block.put(block.parameters), always_call=True)
        decoder.to(device)  # pyrefly: ignore[bad-argument-type] (diffusers wraps `to` and loses its self)
        for block in self.blocks:
            block.put(block.parameters)

    def _enter(self, index: int) -> None:
        self._fetch(index)
        copies, done = self.fetched.pop(index)
        self.fetched.clear()  # a copy fetched in the other direction
        if self._stream and done is not None:
            self._stream.wait_for(done)
        forward = index > self._last
        self._last = index if forward or index else -1
        self.blocks[index].put([nn.Parameter(copy, requires_grad=False) for copy in copies])
        following = index + 1 if forward else index - 1
        if self._stream and 0 <= following < len(self.blocks):
            self._fetch(following)

    def _fetch(self, index: int) -> None:
        if index in self.fetched:
            return
        parameters = self.blocks[index].parameters
        if self._stream is None:
            self.fetched[index] = [p.detach().to(self.device, copy=True) for p in parameters], None
        else:
            self.fetched[index] = self._stream.copy([p.detach() for p in parameters])


# short or long songs, first layer or later, training or validation, with or without pad tokens in a batch
GRAPHS_PER_LAYER = 6

# Seconds that compiling takes, anew and from the code that torch keeps on disk, and how many times as fast steps are
# then: benchmarks/run.py --only compile, on two CPU cores. A GPU was not measured; what is assumed there is little.
COMPILING_SECONDS, FROM_DISK_SECONDS = 255.0, 55.0
FASTER = {("cpu", "kept"): 1.09, ("cpu", "recomputed"): 1.33}
FASTER_ELSEWHERE = 1.1


def compiled_code() -> Path:
    """The folder in which torch keeps compiled code from run to run; TORCHINDUCTOR_CACHE_DIR overrides it.

    torch's own choice is among temporary files, which a restart of the computer may remove. It stays where this folder
    cannot be written.
    """
    if not (folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR")):
        own = cache_folder() / "compiled"
        try:
            own.mkdir(parents=True, exist_ok=True)
            is_ours = os.access(own, os.W_OK)
        except OSError:
            is_ours = False
        folder = str(own) if is_ours else torch._inductor.runtime.cache_dir_utils.default_cache_dir()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    return Path(folder)


def compiling_pays(seconds_left: float, device: torch.device, recomputed: bool) -> Choice:
    """Whether steps that take so many seconds uncompiled gain more than compiling takes: "on" or "off", and why."""
    faster = FASTER.get((device.type, "recomputed" if recomputed else "kept"), FASTER_ELSEWHERE)
    is_kept = any((compiled_code() / "fxgraph").glob("*"))
    cost, source = (FROM_DISK_SECONDS, " from disk") if is_kept else (COMPILING_SECONDS, "")
    gain = seconds_left * (1 - 1 / faster)
    if gain <= 0:
        return Choice("off", "it makes these steps no faster on this device")
    takes = f"compiling{source} takes about {clock(cost)}"
    return Choice("on" if gain > cost else "off", f"{takes}, and the steps that are left would gain {clock(gain)}")


def compile_layers(
    decoder: AceStepTransformer1DModel,
    device: torch.device,
    recomputed: Iterable[nn.Module] = (),
    backend: str = "inductor",
) -> Choice:
    """Compile each layer for lengths that vary; the code is shared by layers of the same kind (`--compile`).

    Call it after the attention is chosen, the adapter attached and gradient checkpointing switched on or off. Nothing
    is compiled before the next step; compiled code is kept on disk (`compiled_code`), so a later run with the same
    model starts faster.

    recomputed: the layers to compute again in the backward pass inside the compiled code, which is faster than around
    it. Left empty, gradient checkpointing stays as it was switched on, around the compiled layers.
    Raises UserError where no compiler is found.
    """
    if backend == "inductor" and device.type == "cuda" and not has_triton():
        raise UserError(
            "--compile: Triton is not installed, which compiles for this GPU.",
            "Install it (triton, on Windows triton-windows), or leave --compile out.",
        )
    if backend == "inductor" and device.type != "cuda":
        try:
            torch._inductor.cpp_builder.get_cpp_compiler()
        except torch._inductor.exc.InvalidCxxCompiler:
            raise UserError(
                "--compile: no C++ compiler was found.",
                "Install g++, clang or Visual Studio's Build Tools, or leave --compile out.",
            ) from None
    compiled_code()
    # Layers share one cache of graphs. Where ranks differ by layer each has its own, and torch would give up after
    # eight.
    limit, settings = GRAPHS_PER_LAYER * len(decoder.layers), torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, limit)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 2 * limit)
    for layer in decoder.layers:
        layer.compile(dynamic=True, backend=backend)
    if some := set(recomputed):
        compiled = torch.compile(recompute, dynamic=True, backend=backend)
        decoder.enable_gradient_checkpointing(partial(_call_some, some, compiled))
    return Choice("on", "asked for: the first steps compile, one code for all lengths")


@contextmanager
def set_aside(model: nn.Module) -> Generator[None]:
    """While entered, a model's frozen tensors are on the CPU; afterwards where they were, bit for bit.

    What is trained stays, and so does what the optimizer knows of it. Quantised layers keep their packed weights once
    as a parameter and once in a state of their own, which share their memory before and after.
    """
    states = [getattr(getattr(module, "state", None), "__dict__", {}) for module in model.modules()]
    beside = [vars(parameter) for parameter in model.parameters() if vars(parameter)]
    found = [*model.parameters(), *model.buffers()]
    found += [value for values in (*states, *beside) for value in values.values() if isinstance(value, Tensor)]
    away = {id(t): t for t in found if t.device.type != "cpu" and not t.requires_grad}.values()
    was_at = [(t, t.device, (t.data_ptr(), t.shape, t.stride(), t.dtype)) for t in away]
    copies: dict[tuple, Tensor] = {}
    for tensor, _, place in was_at:
        if place not in copies:
            copies[place] = tensor.data.to("cpu")
        tensor.data = copies[place]
    copies.clear()
    try:
        yield
    finally:
        for tensor, device, place in was_at:
            if place not in copies:
                copies[place] = tensor.data.to(device)
            tensor.data = copies[place]


class OffloadedModule:
    """A model that is needed now and then.

    load(device): loads it onto the device, at its first use. With `offload` it is there only inside `in_use`.
    """

    def __init__(self, load: Callable[[torch.device], nn.Module], device: torch.device, offload: bool = False):
        self.device, self.offload = device, offload
        self._load = load
        self._model: nn.Module | None = None

    @contextmanager
    def in_use(self) -> Generator[nn.Module, None, None]:
        """The model, on the device."""
        if self._model is None:
            self._model = self._load(self.device)
        elif self.offload:
            self._model.to(self.device)
        try:
            yield self._model
        finally:
            if self.offload:
                self._model.to("cpu")
