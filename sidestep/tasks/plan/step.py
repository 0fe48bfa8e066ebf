"""Memory of a training step, from the step itself run on tensors that have shapes and no bytes.

A plan asks for ten to twenty steps. Blocks of one kind are alike, so that `StepModel` runs one of each kind, cuts
the step into segments at the blocks' edges and puts it together again for any number of them, to within 1 % of all
layers.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sidestep.acestep.attention import use_attention
from sidestep.acestep.blocks import recompute
from sidestep.acestep.checkpoint import accepted
from sidestep.acestep.fused import fuse_layers
from sidestep.acestep.quantize import quantized_bytes
from sidestep.adapters.attach import attach
from sidestep.data.batches import Batch
from sidestep.optim import optimizer_bytes
from sidestep.settings.config import TrainConfig
from sidestep.tasks.plan.unfilled import CPU, META, UnfilledBytes, allocated, bytes_of, unfill
from sidestep.tasks.train.objective import ConditionMask, Objective, TrainingLaw
from sidestep.variants import detect

SILENCE_FRAMES = 15000  # that a checkpoint has; a run keeps as many as its longest window

ELSEWHERE = (  # what `offload_activations` leaves on the device: no activation until the backward pass asks for it
    lambda tensor: tensor if tensor.is_leaf else (tensor.shape, tensor.stride(), tensor.dtype),
    lambda kept: kept if isinstance(kept, Tensor) else torch.empty_strided(kept[0], kept[1], dtype=kept[2]),
)


@dataclass(frozen=True)
class Segment:
    """A part of a step. rise: bytes in use at its end less those at its start; peak: the most above its start."""

    rise: int = 0
    peak: int = 0


def joined(segments: Iterable[Segment]) -> Segment:
    """Segments one after the other, as one."""
    rise = peak = 0
    for segment in segments:
        peak = max(peak, rise + segment.peak)
        rise += segment.rise
    return Segment(rise, peak)


class Unpacked(nn.Module):
    """A frozen linear layer whose weight is unpacked to compute, in both directions, as a quantised base's is."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype

    @property
    def weight(self) -> Tensor:
        """Unpacked for DoRA, which takes the norm of it."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _Unpack.apply(x, self.out_features, self.dtype)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int, dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype = (out_features, x.shape[-1]), dtype
        return nn.functional.linear(x.to(dtype), torch.empty(ctx.shape, dtype=dtype, device=x.device))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [gradient] = gradients
        return gradient.to(ctx.dtype) @ torch.empty(ctx.shape, dtype=ctx.dtype, device=gradient.device), None, None


def unpack_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Put `Unpacked` where a quantised base has its packed weights: below the adapters, or bare.

    The packed weights themselves are not there to be counted.
    """
    for name, layer in list(model.named_modules()):
        is_frozen = not any(p.requires_grad for p in layer.parameters())
        if ".layers." in f".{name}" and isinstance(layer, nn.Linear) and is_frozen:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Unpacked(layer.out_features, layer.in_features, dtype))


@dataclass(frozen=True)
class Shape:
    """What a step is fed: batch size, latent frames of a window and condition tokens."""

    batch: int
    frames: int
    tokens: int


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment of a step when most are in use, and what they are. `activations` is the rest."""

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


# What tells one block of the DiT from another, as far as memory goes: sliding or full attention, recomputed or not.
BlockKind = tuple[str, bool]


@dataclass(frozen=True)
class BlockSegments:
    """A block in the forward pass, its part of what autocast keeps to the model's end, and it in the backward pass."""

    forward: Segment
    casts: Segment
    backward: Segment


@dataclass(frozen=True)
class OtherSegments:
    """The step outside of the blocks.

    before: the blocks; after: them to the model's end; loss: to its gradient at the last block; end: after the backward
    pass.
    """

    before: Segment
    after: Segment
    loss: Segment
    end: Segment


def whole_step(others: OtherSegments, blocks: list[BlockSegments]) -> Segment:
    """A step with these blocks as one segment, from its inputs to the clipped gradient."""
    forward, casts, backward = ([getattr(block, name) for block in blocks] for name in ("forward", "casts", "backward"))
    return joined([others.before, *forward, others.after, *casts, others.loss, *backward[::-1], others.end])


class StepModel:
    """Peaks of an optimizer step of one model on one shape.

    For any number of recomputed and swapped layers, either quantisation and any optimizer. sizes: the model's
    config.json. dtype: of the frozen base; `config.base_precision` may pack it tighter.
    """

    def __init__(self, sizes: dict, config: TrainConfig, shape: Shape, dtype: torch.dtype):
        self.sizes, self.config, self.shape, self.dtype = sizes, config, shape, dtype
        layers = int(sizes["num_hidden_layers"])
        self.attention = list(sizes.get("layer_types") or (["sliding_attention", "full_attention"] * layers)[:layers])
        self._blocks: dict[BlockKind, BlockSegments] = {}
        self._others = OtherSegments(Segment(), Segment(), Segment(), Segment())
        model = _on_meta(sizes, config, dtype, [("full_attention", False)])
        self._one_block = [p for name, p in model.named_parameters() if ".layers." in name]
        outside = [p for name, p in model.named_parameters() if ".layers." not in name]
        with META:
            self._outside = [*outside, *model.buffers(), *_constants(sizes, shape.frames, dtype)]

    def peak(self, config: TrainConfig) -> Peak:
        """Peak with the recomputation, swapping, quantisation and optimizer of `config`; all else as it was."""
        layers = len(self.attention)
        recomputed = 0
        if config.gradient_checkpointing:
            recomputed = layers if config.recompute_layers is None else min(config.recompute_layers, layers)
        activations = self.segment(recomputed).peak

        trained = [p for p in self._one_block if p.requires_grad]
        adapter = layers * bytes_of(trained)
        if config.gradient_accumulation == 1:
            activations -= adapter  # the gradients that come to be during the step were counted there
        return Peak(
            weights=self.weights(config),
            adapter=adapter,
            gradients=adapter,
            optimizer=layers * optimizer_bytes(config.optimizer_type, trained),
            average=adapter if config.ema_decay else 0,
            activations=activations,
        )

    def weights(self, config: TrainConfig) -> int:
        """Bytes of the frozen weights on the device. Runs no step."""
        frozen = [p for p in self._one_block if not p.requires_grad]
        block = sum(stored_bytes(p, config.base_precision) for p in frozen)
        away = max(config.swap_blocks - 2, 0)  # but for the block that computes and the one that is fetched ahead
        return bytes_of(self._outside) + (len(self.attention) - away) * block

    def segment(self, recomputed: int) -> Segment:
        """The step with the first `recomputed` of its layers recomputed. Runs what was not run before."""
        kinds = [(attention, index < recomputed) for index, attention in enumerate(self.attention)]
        for again in (True, False):
            missing = list(dict.fromkeys(k for k in kinds if k[1] == again and k not in self._blocks))
            if missing:
                blocks, self._others = run_step(self.sizes, self.config, self.shape, self.dtype, missing)
                self._blocks |= zip(missing, blocks, strict=True)
        return whole_step(self._others, [self._blocks[kind] for kind in kinds])


def stored_bytes(weight: Tensor, base_precision: str) -> int:
    """Bytes of a block's frozen parameter; the matrices are those that `--base-precision` packs."""
    if base_precision != "auto" and weight.ndim == 2:
        return allocated(quantized_bytes(weight.shape[0], weight.shape[1], base_precision))
    return bytes_of([weight])


def _on_meta(sizes: dict, config: TrainConfig, dtype: torch.dtype, kinds: list[BlockKind]) -> PeftModel:
    """The decoder with so many blocks and its adapter, on `meta`."""
    sizes = sizes | {"num_hidden_layers": len(kinds), "layer_types": [attention for attention, _ in kinds]}
    with META:
        decoder = AceStepTransformer1DModel(**accepted(AceStepTransformer1DModel, sizes))
        for parameter in decoder.parameters():
            parameter.data = parameter.data.to(dtype)
        fuse_layers(decoder.requires_grad_(False))
        return attach(decoder, config).train()


def _constants(sizes: dict, frames: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The silence latent and the null condition, which a run holds on the device."""
    width, channels = sizes.get("encoder_hidden_size") or sizes["hidden_size"], sizes["audio_acoustic_hidden_dim"]
    return torch.empty(1, min(frames, SILENCE_FRAMES), channels), torch.empty(1, 1, width, dtype=dtype)


def run_step(
    sizes: dict, config: TrainConfig, shape: Shape, dtype: torch.dtype, kinds: list[BlockKind]
) -> tuple[list[BlockSegments], OtherSegments]:
    """Run a step of a model with these blocks and cut it:

    (each block, the rest). The blocks are all recomputed or not.
    """
    model, mask = _on_meta(sizes, config, dtype, kinds), ConditionMask()
    decoder = model.get_base_model()
    mask.install(decoder)
    use_attention(decoder, config.attention, CPU, dtype)
    if config.base_precision != "auto":
        unpack_weights(model, dtype)
    unfill(model)
    memory = UnfilledBytes()
    memory.count([*model.parameters(), *model.buffers()])
    with memory:
        silence, null = _constants(sizes, shape.frames, dtype)
        law = TrainingLaw(detect(sizes).name, lambda u: torch.full_like(u, 0.5), 0.0, "")
        objective = Objective(replace(config, offload_activations=False), law, silence, null, mask)
        trained = [p for p in model.parameters() if p.requires_grad]
        if config.gradient_accumulation > 1:  # a later micro-step finds the gradients of those before
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        watch = StepWatch(memory, decoder, [recompute if again else nn.Module.__call__ for _, again in kinds])
        latents = torch.empty(shape.batch, shape.frames, silence.shape[-1])
        conditions = torch.empty(shape.batch, shape.tokens, null.shape[-1], dtype=dtype)
        batch = Batch(latents, conditions, None, None, ("",) * shape.batch, tuple(range(shape.batch)))
        with (
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
            saved_tensors_hooks(*ELSEWHERE) if config.offload_activations else nullcontext(),
        ):
            weighted, _, _ = objective(model, batch, 0, shape.batch)
        weighted.sum().backward()
        del weighted
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or float("inf"))
        return watch.result()


class StepWatch:
    """Cuts a step at the edges of the decoder's blocks. calls: how each block is called, in their order."""

    def __init__(self, memory: UnfilledBytes, decoder: Any, calls: list[Callable[..., Tensor]]):
        self._memory, self._calls, self._cut_at = memory, dict(zip(decoder.layers, calls, strict=True)), memory.now
        # before the blocks, each block, to the model's end, autocast's copies; the loss, each block from the last on
        self._cuts: list[Segment] = []
        # what all blocks read; it is freed with the last of them, which is no part of that block
        self._shared: tuple[Tensor | None, ...] = ()
        decoder.enable_gradient_checkpointing(self.call_block)
        decoder.norm_out.register_forward_pre_hook(self.end_blocks)
        decoder.register_forward_hook(self.end_model)
        memory.peak = memory.now

    def cut(self, *_: object) -> None:
        """End a segment here, from where the next peak is counted; as a hook at a gradient, too."""
        memory, start = self._memory, self._cut_at
        self._cuts.append(Segment(memory.now - start, memory.peak - start))
        self._cut_at = memory.peak = memory.now

    def call_block(self, layer: nn.Module, hidden: Tensor, *rest: Tensor | None) -> Tensor:
        """Call a block, with a cut before it in both directions."""
        if not self._cuts:
            # there is nothing to train before the first block; a gradient for its input makes it like all others
            hidden = _AfterTraining.apply(hidden, torch.zeros((), requires_grad=True))
            self._shared = rest
        hidden.register_hook(self.cut)
        self.cut()
        return self._calls[layer](layer, hidden, *rest)

    def end_blocks(self, _module: nn.Module, inputs: tuple[Tensor]) -> None:
        """Cut after the last block in both directions."""
        self.cut()
        inputs[0].register_hook(self.cut)

    def end_model(self, *_: object) -> None:
        """Cut at the model's end, and again without autocast's copies."""
        self.cut()
        torch.clear_autocast_cache()  # a run leaves autocast here too; what that frees grows with the number of blocks
        self.cut()

    def result(self) -> tuple[list[BlockSegments], OtherSegments]:
        """The blocks and the rest of a step that ends here."""
        self._shared = ()
        self.cut()
        count, before, end = len(self._calls), self._cuts[0], self._cuts[-1]
        forward, (after, casts, loss, *backward) = self._cuts[1 : count + 1], self._cuts[count + 1 : -1]
        casts = Segment(casts.rise // count, 0)
        blocks = [BlockSegments(there, casts, back) for there, back in zip(forward, backward[::-1], strict=True)]
        return blocks, OtherSegments(before, after, loss, end)


class _AfterTraining(torch.autograd.Function):
    """A tensor as if something before it were trained."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, trained: Tensor) -> Tensor:  # noqa: ARG004 (what asks for the gradient)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:  # noqa: ARG004 (torch's signature)
        return None, None
