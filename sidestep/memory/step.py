"""The peak of a training step, from the step itself run on fake tensors."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, replace

import torch
from diffusers import AceStepTransformer1DModel
from torch.autograd.graph import saved_tensors_hooks

from sidestep.acestep.attention import use_attention
from sidestep.acestep.checkpoint import accepted
from sidestep.acestep.recompute import recompute_layers
from sidestep.adapters.attach import attach
from sidestep.config import OPTIMIZER_TYPES, TrainConfig
from sidestep.data.dataset import Batch
from sidestep.memory.fake_model import fake_mode, make_fake, store_small
from sidestep.memory.tracker import LiveBytes, bytes_of
from sidestep.training.objective import ConditionMask, Objective, TrainingLaw
from sidestep.variants import detect

CPU = torch.device("cpu")
SILENCE_FRAMES = 15000
FEW_BLOCKS = 4
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

    total: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    block_weights: int = 0  # the share of `weights` that stands in the blocks
    adamw: int = 0  # what the state of each optimizer takes
    adamw8bit: int = 0
    adafactor: int = 0
    prodigy: int = 0

    @property
    def activations(self) -> int:
        return self.total - self.weights - self.adapter - self.gradients - self.optimizer

    def __add__(self, other: "Peak") -> "Peak":
        return Peak(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Peak") -> "Peak":
        return self + other * -1

    def __mul__(self, times: int) -> "Peak":
        return Peak(*(times * a for a in astuple(self)))

    def with_optimizer(self, optimizer_type: str) -> "Peak":
        """With the state of an optimizer, which stands there in every step but the first."""
        state = getattr(self, optimizer_type)
        return replace(self, total=self.total + state, optimizer=state)

    def without_swapped(self, layers: int, swapped: int) -> "Peak":
        """With `swapped` of the `layers` blocks on the CPU, but for the one that computes and the one that is fetched ahead."""
        away = self.block_weights // layers * max(swapped - 2, 0)
        return replace(self, total=self.total - away, weights=self.weights - away, block_weights=self.block_weights - away)


class StepModel:
    """Peaks of an optimizer step of one model on one shape, for any number of recomputed and swapped layers and any optimizer.

    All blocks are alike, so a few of them are run and the rest is counted: each recomputed block adds the same, each other block too.
    sizes: the model's config.json. dtype: of the frozen base; `config.base_precision` may pack it tighter.
    """

    def __init__(self, sizes: dict, config: TrainConfig, shape: Shape, dtype: torch.dtype):
        self.sizes, self.config, self.shape, self.dtype = sizes, config, shape, dtype
        self.layers = int(sizes["num_hidden_layers"])
        self._measured: dict[tuple[int, int], Peak] = {}

    def peak(self, config: TrainConfig) -> Peak:
        """Peak with the recomputation, swapping and optimizer of `config`; all else is as at the beginning."""
        recomputed = 0
        if config.gradient_checkpointing:
            recomputed = self.layers if config.recompute_layers is None else min(config.recompute_layers, self.layers)
        kept = self.layers - recomputed
        enough = FEW_BLOCKS if not kept else FEW_BLOCKS // 2  # where all are recomputed, the peak of very few stands at another place
        few = (min(recomputed, enough + recomputed % 2), min(kept, enough + kept % 2))
        total = base = self._measure(*few)
        if recomputed > few[0]:
            total = total + (self._measure(few[0] + 2, few[1]) - base) * ((recomputed - few[0]) // 2)
        if kept > few[1]:
            total = total + (self._measure(few[0], few[1] + 2) - base) * ((kept - few[1]) // 2)
        return total.with_optimizer(config.optimizer_type).without_swapped(self.layers, config.swap_blocks)

    def _measure(self, recomputed: int, kept: int) -> Peak:
        if (recomputed, kept) not in self._measured:
            self._measured[recomputed, kept] = _peak_of(self.sizes, self.config, self.shape, self.dtype, recomputed, kept)
        return self._measured[recomputed, kept]


def step_peak(sizes: dict, config: TrainConfig, shape: Shape, dtype: torch.dtype) -> Peak:
    """Peak of an optimizer step with these settings."""
    return StepModel(sizes, config, shape, dtype).peak(config)


def _peak_of(sizes: dict, config: TrainConfig, shape: Shape, dtype: torch.dtype, recomputed: int, kept: int) -> Peak:
    """Peak with so many blocks of each kind; sliding and full attention alternate, so blocks come in pairs."""
    layers = recomputed + kept
    types = sizes.get("layer_types") or ["sliding_attention", "full_attention"] * layers
    sizes = sizes | {"num_hidden_layers": layers, "layer_types": types[:layers]}
    with torch.device("meta"):
        decoder = AceStepTransformer1DModel(**accepted(AceStepTransformer1DModel, sizes))
        for parameter in decoder.parameters():
            parameter.data = parameter.data.to(dtype)
        mask = ConditionMask()
        mask.install(decoder)
        use_attention(decoder, config.attention, CPU, dtype)
        if recomputed:
            recompute_layers(decoder, recomputed)
        model = attach(decoder, config).train()
        if config.base_precision != "auto":
            store_small(model, config.base_precision, dtype)
    mode = fake_mode()
    with mode:
        make_fake(model)
        return _run(model, mask, sizes, config, shape, dtype)


def _run(model: torch.nn.Module, mask: ConditionMask, sizes: dict, config: TrainConfig, shape: Shape, dtype: torch.dtype) -> Peak:
    variant = detect(sizes)
    width, channels = sizes.get("encoder_hidden_size") or sizes["hidden_size"], sizes["audio_acoustic_hidden_dim"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    silence, null = torch.empty(1, SILENCE_FRAMES, channels), torch.empty(1, 1, width, dtype=dtype)
    latents, conditions = torch.empty(shape.batch, shape.frames, channels), torch.empty(shape.batch, shape.tokens, width, dtype=dtype)
    batch = Batch(latents, conditions, None, None, ("",) * shape.batch, tuple(range(shape.batch)))
    objective = Objective(replace(config, offload_activations=False), TrainingLaw(variant.name, _half, 0.0, ""), silence, null, mask)
    memory = LiveBytes()
    memory.count([*parameters, *frozen, silence, null, latents, conditions])
    with memory:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), _activations_elsewhere() if config.offload_activations else nullcontext():
            weighted, _, _ = objective(model, batch, 0, shape.batch)
        weighted.sum().backward()
        del weighted
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or float("inf"))
    # The state is made by the first update and stands there in every later step; the update itself works in place.
    states = tuple(optimizer_bytes(kind, parameters) for kind in OPTIMIZER_TYPES)
    gradients = bytes_of(p.grad for p in parameters)
    in_blocks = bytes_of(t for t in _block_tensors(model) if not t.requires_grad)
    return Peak(memory.peak, bytes_of(frozen), bytes_of(parameters), gradients, 0, in_blocks, *states)


def _activations_elsewhere() -> AbstractContextManager:
    """What `offload_activations` leaves on the device: nothing of the computed activations until the backward pass asks for one."""

    def forget(tensor: torch.Tensor):
        return tensor if tensor.is_leaf else (tensor.shape, tensor.stride(), tensor.dtype)

    def make_again(kept):
        return kept if isinstance(kept, torch.Tensor) else torch.empty_strided(kept[0], kept[1], dtype=kept[2])

    return saved_tensors_hooks(forget, make_again)


def _half(u: torch.Tensor) -> torch.Tensor:
    return torch.full_like(u, 0.5)


def _block_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if ".layers." in name]


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
