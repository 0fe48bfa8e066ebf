"""Counts the bytes of live tensor storages while code runs, on real tensors and on fake ones alike.

Models with shapes and no bytes: built on `meta`, then given fake tensors that behave like the CPU's.

Fake CPU tensors take autocast, attention and optimizer kernels through the same code as real ones, on a machine with no GPU at all.
Memory in use over a step, cut into stretches that can be put together again for any number of blocks.
The peak of a training step, from the step itself run on fake tensors.
"""

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from diffusers import AceStepTransformer1DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sidestep.acestep.attention import use_attention
from sidestep.acestep.blocks import recompute
from sidestep.acestep.checkpoint import accepted
from sidestep.acestep.quantize import quantized_bytes
from sidestep.adapters.attach import attach
from sidestep.data.batches import Batch
from sidestep.settings.config import TrainConfig
from sidestep.tasks.train.objective import ConditionMask, Objective, TrainingLaw
from sidestep.variants import detect

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
            if isinstance(tensor, torch.Tensor) and (
                self._device_type is None or tensor.device.type == self._device_type
            ):
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


def fake_mode() -> FakeTensorMode:
    """The mode in which fake tensors compute; numbers such as seeds may stay real."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def make_fake(module: nn.Module) -> nn.Module:
    """Replace a module's `meta` parameters and buffers by fake CPU tensors. Call it inside `fake_mode()`."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, FakeTensor):
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    tensors[name] = (
                        nn.Parameter(fake, requires_grad=tensor.requires_grad) if tensors is part._parameters else fake
                    )
    return module


class Unpacked(nn.Module):
    """A frozen linear layer whose weight is unpacked while it computes, as that of a quantised base is, in both directions."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Unpack.apply(x, self.out_features, self.dtype)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, out_features: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.shape, ctx.dtype = (out_features, x.shape[-1]), dtype
        return nn.functional.linear(x.to(dtype), torch.empty(ctx.shape, dtype=dtype, device=x.device))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.to(ctx.dtype) @ torch.empty(ctx.shape, dtype=ctx.dtype, device=gradient.device), None, None


def unpack_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Put `Unpacked` where a quantised base has its packed weights: below the adapters, or bare. The packed weights themselves are not there to be counted."""
    names = [
        name
        for name, m in model.named_modules()
        if ".layers." in f".{name}" and isinstance(m, nn.Linear) and not any(p.requires_grad for p in m.parameters())
    ]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, Unpacked(linear.out_features, linear.in_features, dtype))


@dataclass(frozen=True)
class Stretch:
    """A part of a step. rise: bytes in use at its end less those at its beginning; peak: the most in use during it, above its beginning."""

    rise: int = 0
    peak: int = 0

    def then(self, following: "Stretch") -> "Stretch":
        """This stretch and the one that follows it, as one."""
        return Stretch(self.rise + following.rise, max(self.peak, self.rise + following.peak))


def joined(stretches: list[Stretch]) -> Stretch:
    """Stretches one after the other, as one."""
    whole = Stretch()
    for stretch in stretches:
        whole = whole.then(stretch)
    return whole


class Cuts:
    """Cuts what `memory` counts into stretches, each from the last cut to the next."""

    def __init__(self, memory: LiveBytes):
        self._memory, self._begun_at = memory, memory.now
        memory.restart_peak()

    def cut(self) -> Stretch:
        """The stretch that ends here."""
        stretch = Stretch(self._memory.now - self._begun_at, self._memory.peak - self._begun_at)
        self._begun_at = self._memory.now
        self._memory.restart_peak()
        return stretch


CPU = torch.device("cpu")
SILENCE_FRAMES = 15000  # that a checkpoint has; a run keeps as many as its longest window
SMALL_TENSOR = 4096  # bitsandbytes keeps fp32 states for tensors of fewer values
BLOCK = 256  # values that share a scale in an 8-bit state


@dataclass(frozen=True)
class Shape:
    """What a step is fed: batch size, latent frames of a window and condition tokens."""

    batch: int
    frames: int
    tokens: int


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment of a step when most are in use, and what they are. `activations` is all that is not one of the others."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def between_steps(self) -> int:
        """What stays on the device when no step is computed."""
        return self.weights + self.adapter + self.optimizer + self.average

    @property
    def total(self) -> int:
        return self.between_steps + self.gradients + self.activations


@dataclass(frozen=True)
class BlockKind:
    """What tells one block of the DiT from another, as far as memory goes."""

    attention: str  # sliding_attention or full_attention
    recomputed: bool


@dataclass(frozen=True)
class Block:
    """A block in the forward pass, its part of what autocast keeps until the model's end, and the block in the backward pass."""

    forward: Stretch
    casts: Stretch
    backward: Stretch


@dataclass(frozen=True)
class Around:
    """The step outside of the blocks: before them, after them to the model's end, the loss to its gradient at the last block, and after the backward pass."""

    before: Stretch
    after: Stretch
    loss: Stretch
    end: Stretch


class StepModel:
    """Peaks of an optimizer step of one model on one shape, for any number of recomputed and swapped layers, either quantisation and any optimizer.

    Blocks of one kind are alike, so one of each kind is run and the step is put together from them: as exact as running all of them, in a fraction of
    the time. sizes: the model's config.json. dtype: of the frozen base; `config.base_precision` may pack it tighter.
    """

    def __init__(self, sizes: dict, config: TrainConfig, shape: Shape, dtype: torch.dtype):
        self.sizes, self.config, self.shape, self.dtype = sizes, config, shape, dtype
        layers = int(sizes["num_hidden_layers"])
        self.attention = list(sizes.get("layer_types") or (["sliding_attention", "full_attention"] * layers)[:layers])
        self._blocks: dict[BlockKind, Block] = {}
        self._around: Around | None = None
        self._one_block, self._outside = _parameters(sizes, config, shape.frames, dtype)

    def peak(self, config: TrainConfig) -> Peak:
        """Peak with the recomputation, swapping, quantisation and optimizer of `config`; all else is as at the beginning."""
        layers = len(self.attention)
        recomputed = 0
        if config.gradient_checkpointing:
            recomputed = layers if config.recompute_layers is None else min(config.recompute_layers, layers)
        kinds = [BlockKind(attention, index < recomputed) for index, attention in enumerate(self.attention)]
        activations = self._whole(kinds).peak

        frozen = [p for p in self._one_block if not p.requires_grad]
        block = sum(stored_bytes(p, config.base_precision) for p in frozen)
        away = max(config.swap_blocks - 2, 0)  # but for the block that computes and the one that is fetched ahead
        trained = [p for p in self._one_block if p.requires_grad]
        adapter = layers * bytes_of(trained)
        if config.gradient_accumulation == 1:
            activations -= adapter  # the gradients that come to be during the step were counted there
        return Peak(
            weights=bytes_of(self._outside) + (layers - away) * block,
            adapter=adapter,
            gradients=adapter,
            optimizer=layers * optimizer_bytes(config.optimizer_type, trained),
            average=adapter if config.ema_decay else 0,
            activations=activations,
        )

    def _whole(self, kinds: list[BlockKind]) -> Stretch:
        """The step with these blocks, from its inputs to the clipped gradient."""
        for recomputed in (True, False):
            unknown = {kind: None for kind in kinds if kind.recomputed == recomputed and kind not in self._blocks}
            if unknown:
                blocks, self._around = run_step(self.sizes, self.config, self.shape, self.dtype, list(unknown))
                self._blocks |= zip(unknown, blocks, strict=True)
        return put_together(self._around, [self._blocks[kind] for kind in kinds])


def put_together(around: Around, blocks: list[Block]) -> Stretch:
    """A whole step as one stretch."""
    forward, casts, backward = ([getattr(block, part) for block in blocks] for part in ("forward", "casts", "backward"))
    return joined([around.before, *forward, around.after, *casts, around.loss, *backward[::-1], around.end])


def step_peak(sizes: dict, config: TrainConfig, shape: Shape, dtype: torch.dtype) -> Peak:
    """Peak of an optimizer step with these settings."""
    return StepModel(sizes, config, shape, dtype).peak(config)


def _parameters(
    sizes: dict, config: TrainConfig, frames: int, dtype: torch.dtype
) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    """(parameters of one block, all tensors outside the blocks) on `meta`; the linear layers' weights have two dimensions."""
    model = _on_meta(sizes, config, dtype, [BlockKind("full_attention", False)])
    inside = [p for name, p in model.named_parameters() if ".layers." in name]
    outside = [p for name, p in model.named_parameters() if ".layers." not in name]
    return inside, [*outside, *model.buffers(), *_constants(sizes, frames, dtype, "meta")]


def _on_meta(sizes: dict, config: TrainConfig, dtype: torch.dtype, kinds: list[BlockKind]) -> nn.Module:
    """The decoder with so many blocks and its adapter, on `meta`."""
    sizes = sizes | {"num_hidden_layers": len(kinds), "layer_types": [kind.attention for kind in kinds]}
    with torch.device("meta"):
        decoder = AceStepTransformer1DModel(**accepted(AceStepTransformer1DModel, sizes))
        for parameter in decoder.parameters():
            parameter.data = parameter.data.to(dtype)
        return attach(decoder, config).train()


def _constants(sizes: dict, frames: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The silence latent and the null condition, which a run holds on the device."""
    width, channels = sizes.get("encoder_hidden_size") or sizes["hidden_size"], sizes["audio_acoustic_hidden_dim"]
    return torch.empty(1, min(frames, SILENCE_FRAMES), channels, device=device), torch.empty(
        1, 1, width, dtype=dtype, device=device
    )


def run_step(
    sizes: dict, config: TrainConfig, shape: Shape, dtype: torch.dtype, kinds: list[BlockKind]
) -> tuple[list[Block], Around]:
    """Run a step of a model with these blocks and cut it: (each block, the rest). The blocks are all recomputed or all not."""
    model, mask = _on_meta(sizes, config, dtype, kinds), ConditionMask()
    decoder = model.get_base_model()
    mask.install(decoder)
    use_attention(decoder, config.attention, CPU, dtype)
    if config.base_precision != "auto":
        unpack_weights(model, dtype)
    with fake_mode():
        make_fake(model)
        silence, null = _constants(sizes, shape.frames, dtype, "cpu")
        latents = torch.empty(shape.batch, shape.frames, silence.shape[-1])
        batch = Batch(
            latents,
            torch.empty(shape.batch, shape.tokens, null.shape[-1], dtype=dtype),
            None,
            None,
            ("",) * shape.batch,
            tuple(range(shape.batch)),
        )
        law = TrainingLaw(detect(sizes).name, _half, 0.0, "")
        objective = Objective(replace(config, offload_activations=False), law, silence, null, mask)
        trained = [p for p in model.parameters() if p.requires_grad]
        if config.gradient_accumulation > 1:  # a later micro-step finds the gradients of those before
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        memory = LiveBytes()
        memory.count([*model.parameters(), *model.buffers(), *(p.grad for p in trained), silence, null])
        with memory:
            watch = _Watch(memory, decoder, [recompute if kind.recomputed else _call for kind in kinds])
            memory.count([batch.latents, batch.conditions])
            with (
                torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
                _activations_elsewhere() if config.offload_activations else nullcontext(),
            ):
                weighted, _, _ = objective(model, batch, 0, shape.batch)
            weighted.sum().backward()
            del weighted
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or float("inf"))
            return watch.result()


def _call(layer: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
    return layer(*inputs)


class _Watch:
    """Cuts a step at the edges of the decoder's blocks. calls: how each block is called, in their order."""

    def __init__(self, memory: LiveBytes, decoder: nn.Module, calls: list):
        self._cuts, self._calls = Cuts(memory), dict(zip(decoder.layers, calls, strict=True))
        self._forward: list[Stretch] = []  # before the blocks, then each block, then what follows to the model's end
        self._backward: list[Stretch] = []  # the loss, then each block from the last to the first
        self._casts = Stretch()
        self._shared: tuple = ()  # what all blocks read; it is freed with the last of them, which is no part of that block
        decoder.enable_gradient_checkpointing(self._through)
        decoder.norm_out.register_forward_pre_hook(self._after_blocks)
        decoder.register_forward_hook(self._after_model)

    def _through(self, layer: nn.Module, hidden: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        if (
            not self._forward
        ):  # there is nothing to train before the first block; a gradient for its input makes it like all others
            hidden = _AfterTraining.apply(hidden, torch.zeros((), requires_grad=True))
            self._shared = rest
        hidden.register_hook(self._at_gradient)
        self._forward.append(self._cuts.cut())
        return self._calls[layer](layer, hidden, *rest)

    def _after_blocks(self, _module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self._forward.append(self._cuts.cut())
        inputs[0].register_hook(self._at_gradient)

    def _after_model(self, *_: object) -> None:
        self._forward.append(self._cuts.cut())
        torch.clear_autocast_cache()  # a run leaves autocast here too; what that frees grows with the number of blocks
        self._casts = self._cuts.cut()

    def _at_gradient(self, _gradient: torch.Tensor) -> None:
        self._backward.append(self._cuts.cut())

    def result(self) -> tuple[list[Block], Around]:
        """The blocks and the rest of a step that ends here."""
        before, *forward, after = self._forward
        loss, *backward = self._backward
        each = Stretch(self._casts.rise // len(forward), 0)
        self._shared = ()
        blocks = [Block(there, each, back) for there, back in zip(forward, backward[::-1], strict=True)]
        return blocks, Around(before, after, loss, self._cuts.cut())


class _AfterTraining(torch.autograd.Function):
    """A tensor as if something before it were trained."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[None, None]:
        return None, None


def _activations_elsewhere() -> AbstractContextManager:
    """What `offload_activations` leaves on the device: nothing of the computed activations until the backward pass asks for one."""

    def forget(tensor: torch.Tensor):
        return tensor if tensor.is_leaf else (tensor.shape, tensor.stride(), tensor.dtype)

    def make_again(kept):
        return kept if isinstance(kept, torch.Tensor) else torch.empty_strided(kept[0], kept[1], dtype=kept[2])

    return saved_tensors_hooks(forget, make_again)


def _half(u: torch.Tensor) -> torch.Tensor:
    return torch.full_like(u, 0.5)


def stored_bytes(weight: torch.Tensor, base_precision: str) -> int:
    """Bytes of a block's frozen parameter; the matrices are those that `--base-precision` packs."""
    if base_precision != "auto" and weight.ndim == 2:
        return allocated(quantized_bytes(*weight.shape, base_precision))
    return bytes_of([weight])


def optimizer_bytes(optimizer_type: str, parameters: list[torch.nn.Parameter]) -> int:
    """Bytes of the optimizer's state for these parameters, by each optimizer's own format.

    adamw: two fp32 moments. adamw8bit: two bytes a value and two fp32 scales per 256 values. adafactor: a row and a column. prodigy: four.
    """
    total = 0
    for p in parameters:
        count = p.numel()
        if optimizer_type == "adamw8bit" and count >= SMALL_TENSOR:
            total += 2 * count + 2 * 4 * -(-count // BLOCK)
        elif optimizer_type == "adafactor" and p.ndim > 1:
            total += 4 * (p.shape[0] + count // p.shape[0])
        else:
            total += 4 * count * {"adafactor": 1, "prodigy": 4}.get(optimizer_type, 2)
    return total
