"""Every type of adapter as layers of peft, each in the same few pieces: peft's config, what its layers need, a check.

peft's own dropouts inside LoKr and LoHa draw on the CPU, which would stop the GPU's queue once per module and step;
ours is LoRA's kind, on the adapter's input. A layer is changed by its class alone: its parameters stay as they are.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig
from peft.tuners import loha, lokr, lora
from peft.tuners.oft.layer import OFTRotationModule
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from sidestep.errors import UserError
from sidestep.settings.config import TrainConfig


@dataclass(frozen=True)
class Targets:
    """Full names of the adapted modules, as the model spells them. `rank` and `alpha`: where a pattern is silent."""

    names: tuple[str, ...]
    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]


@dataclass(frozen=True)
class AdapterKind:
    """One type of adapter, as `--adapter-type` names it.

    config(settings, targets): what peft makes the layers from. prepare(layer, settings): called for every module of the
    model once peft has made them. check(settings, layers): raises UserError for settings that do not fit the
    Linears by name that are the targets.
    """

    config: Callable[[TrainConfig, Targets], PeftConfig]
    prepare: Callable[[nn.Module, TrainConfig], None] | None = None
    check: Callable[[TrainConfig, Mapping[str, Any]], None] | None = None


# LoRA: W + alpha/r · B·A, with B zero at the start (Hu et al. 2021, arXiv:2106.09685).
# DoRA: magnitude and direction of each row of that are learned apart (Liu et al. 2024, arXiv:2402.09353).


def lora_config(settings: TrainConfig, targets: Targets) -> LoraConfig:
    """Of a LoRA, or of a DoRA where `adapter_type` says so."""
    return LoraConfig(
        r=targets.rank,
        lora_alpha=targets.alpha,  # pyrefly: ignore[bad-argument-type]  # peft divides it, whatever number it is
        lora_dropout=settings.dropout,
        target_modules=list(targets.names),
        rank_pattern=targets.rank_pattern,
        alpha_pattern=targets.alpha_pattern,  # pyrefly: ignore[bad-argument-type]  # as above
        use_dora=settings.adapter_type == "dora",
        bias="none",
    )


def prepare_lora(layer: nn.Module, settings: TrainConfig) -> None:  # noqa: ARG001 (the same pieces for every kind)
    """Give a layer on a plain Linear the forward pass of `LowRankLinear`; those of a quantised base keep peft's."""
    if type(layer) is lora.Linear:
        layer.__class__ = LowRankLinear


class LowRankLinear(lora.Linear):
    """peft's LoRA on a Linear with the base's product in one autograd function, in the dtype of autocast."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [..., in] -> [..., out]. What is not one plain LoRA in training or use is left to peft."""
        base: Any = self.base_layer
        is_plain = type(base) is nn.Linear and self.active_adapters == ["default"] and not (args or kwargs)
        if not is_plain or self.disable_adapters or self.merged or self.lora_variant or self.lora_bias["default"]:
            return super().forward(x, *args, **kwargs)
        if torch.compiler.is_compiling():  # which puts operations together by itself
            return super().forward(x)
        factors: Any = self.lora_A["default"], self.lora_B["default"]
        a, b = factors[0].weight, factors[1].weight
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a.dtype
        if dtype != x.dtype and not torch.is_autocast_enabled(kind):
            return super().forward(x)  # without autocast peft computes the change in the adapter's dtype
        dropout: Any = self.lora_dropout["default"]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        bias = None if base.bias is None else base.bias.to(dtype)
        return _LowRank.apply(x.to(dtype), base.weight.to(dtype), bias, a, b, self.scaling["default"], p)


class _LowRank(torch.autograd.Function):
    """W·x + scale · B·A·x of a frozen W, with dropout p on the adapter's input.

    Kept for the backward pass are the input, the small A·x and the mask of the dropout, not the input after it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float
    ) -> Tensor:
        flat = x.flatten(0, -2)
        cast_a, cast_b = a.to(x.dtype), b.to(x.dtype)
        kept, mask = dropped(flat, p) if p else (flat, None)
        low = _scaled_product(kept, cast_a.T, scale)
        out = F.linear(flat, weight, bias).addmm_(low, cast_b.T)
        ctx.save_for_backward(x, weight, cast_a, cast_b, low, mask)  # x as it came: it may wait on the CPU
        ctx.scale, ctx.kept_scale, ctx.dtypes = scale, 1 / (1 - p) if p < 1 else 0.0, (a.dtype, b.dtype)
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low, mask = ctx.saved_tensors
        flat, gradient = x.flatten(0, -2), gradients[0].flatten(0, -2)
        for_low = _scaled_product(gradient, b, ctx.scale)
        for_x = for_a = for_b = None
        if ctx.needs_input_grad[4]:
            for_b = (gradient.T @ low).to(ctx.dtypes[1])
        if ctx.needs_input_grad[3]:
            kept = flat if mask is None else dropped_again(flat, mask, ctx.kept_scale)
            for_a = (for_low.T @ kept).to(ctx.dtypes[0])
        if ctx.needs_input_grad[0]:
            for_x = gradient @ weight
            if mask is None:
                for_x.addmm_(for_low, a)
            else:
                for_x.add_(dropped_again(for_low @ a, mask, ctx.kept_scale))
            for_x = for_x.view(x.shape)
        return for_x, None, None, for_a, for_b, None, None


def dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """x after a dropout of p, and which of its numbers stayed: as torch's own, in fp32 on a CPU in less time."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return torch.native_dropout(x, p, True)
    noise = torch.empty_like(x).bernoulli_(1 - p)  # one of truths takes half as long again
    mask = noise.to(torch.bool)
    return noise.div_(1 - p or 1).mul_(x), mask


def dropped_again(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """x where the mask has it stay, times `scale`."""
    if x.device.type != "cpu":
        return torch.ops.aten.native_dropout_backward(x, mask, scale)
    return (x * mask.view(torch.uint8)).mul_(scale)  # a truth takes four times as long to become a number


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale · left·right in one kernel."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


@torch.no_grad()
def prepare_dora(layer: nn.Module, settings: TrainConfig) -> None:  # noqa: ARG001 (the same pieces for every kind)
    """Take the magnitudes again in float32: peft takes them in the base's dtype; in bf16 the identity is 0.4 % off."""
    if isinstance(layer, lora.LoraLayer):
        base = dequantize_module_weight(layer.get_base_layer())
        magnitudes: Any = layer.lora_magnitude_vector
        for magnitude in magnitudes.values():
            magnitude.weight.copy_(torch.linalg.norm(base.to(magnitude.weight.dtype), dim=1))


# LoKr: W + alpha/r · W1 ⊗ W2, each factor a full or a low-rank matrix (Yeh et al. 2023, arXiv:2309.14859).


def lokr_config(settings: TrainConfig, targets: Targets) -> LoKrConfig:
    """Of a LoKr; its magnitudes are added by `prepare_lokr`."""
    return LoKrConfig(
        r=targets.rank,
        alpha=targets.alpha,  # pyrefly: ignore[bad-argument-type]  # peft divides it, whatever number it is
        decompose_both=settings.lokr_decompose_both,
        decompose_factor=settings.lokr_factor,
        target_modules=list(targets.names),
        rank_pattern=targets.rank_pattern,
        alpha_pattern=targets.alpha_pattern,  # pyrefly: ignore[bad-argument-type]  # as above
    )


def check_lokr(settings: TrainConfig, layers: Mapping[str, Any]) -> None:
    """Refuse a factor above the square root of a width: peft would make W1 the larger factor, LyCORIS W2."""
    factor = settings.lokr_factor
    for name, layer in layers.items():
        for width in (layer.out_features, layer.in_features):
            if factor > 0 and width < factor**2 and width % factor == 0:
                most = max(f for f in range(1, math.isqrt(width) + 1) if width % f == 0)
                raise UserError(
                    f"--lokr-factor {factor}: more than the square root of a width of {name} ({width}); "
                    "other programs would read its factors the other way round.",
                    f"Use --lokr-factor {most} or less, or -1 for the most square split.",
                )


def prepare_lokr(layer: nn.Module, settings: TrainConfig) -> None:
    """Give a layer the forward pass of `KroneckerLinear`, and magnitudes where they are asked for."""
    if isinstance(layer, lokr.Linear):
        base: Any = layer.get_base_layer()
        if settings.lokr_weight_decompose and not base.weight.is_floating_point():
            raise UserError(
                "--lokr-weight-decompose cannot be used on a quantised base: it needs the plain weights.",
                "Leave --lokr-weight-decompose away, use --adapter-type dora, or train on an unquantised base.",
            )
        layer.__class__ = KroneckerLinear
        assert isinstance(layer, KroneckerLinear)
        layer.input_dropout = settings.dropout
        if settings.lokr_weight_decompose:
            layer.add_magnitude("default")


class KroneckerLinear(lokr.Linear):
    """peft's LoKr on a Linear, computed factor by factor; dropout as in LoRA; magnitudes as in DoRA on request.

    The product is never formed in training: (W1 ⊗ W2)·x is two small products, for 2048 × 2048 about 20 times less
    arithmetic than with the full matrix, and no 16 MB of temporary weight per module. It also works on a quantised
    base, whose packed weights have another shape.
    """

    input_dropout = 0.0

    def add_magnitude(self, adapter_name: str) -> None:
        """Add a trainable norm per output row, [out] float32, equal to the base's: still the identity."""
        self.adapter_layer_names = (*self.adapter_layer_names, "lokr_magnitude_vector")
        self.lokr_magnitude_vector = nn.ParameterDict({adapter_name: nn.Parameter(self.row_norms(adapter_name))})

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """(W1 [a, b], W2 [c, d]) without alpha/r; the weight has a·c rows and b·d columns."""
        full_w1, full_w2 = adapter_name in self.lokr_w1, adapter_name in self.lokr_w2
        w1 = self.lokr_w1[adapter_name] if full_w1 else self.lokr_w1_a[adapter_name] @ self.lokr_w1_b[adapter_name]
        w2 = self.lokr_w2[adapter_name] if full_w2 else self.lokr_w2_a[adapter_name] @ self.lokr_w2_b[adapter_name]
        return w1, w2

    @torch.no_grad()
    def row_norms(self, adapter_name: str) -> Tensor:
        """Norm of each row of W + ΔW, [out] float32. Carries no gradient (DoRA, section 4.3)."""
        weight = self.get_base_layer().weight.float()
        return torch.linalg.norm(weight + torch.kron(*self.factors(adapter_name)) * self.scaling[adapter_name], dim=1)

    def gain(self, adapter_name: str) -> Tensor:
        """Magnitude over the norm of each row, [out]: what DoRA multiplies W + ΔW with."""
        return self.lokr_magnitude_vector[adapter_name] / self.row_norms(adapter_name)

    def decomposes(self, adapter_name: str) -> bool:
        """Whether this adapter has magnitudes."""
        return adapter_name in getattr(self, "lokr_magnitude_vector", ())

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:  # noqa: ARG002
        """ΔW [out, in] in the adapter's dtype; with magnitudes, of the base as it is now (unmerged)."""
        delta = torch.kron(*self.factors(adapter_name)) * self.scaling[adapter_name]
        if not self.decomposes(adapter_name):
            return delta
        weight = self.get_base_layer().weight.to(delta.dtype)
        return self.gain(adapter_name)[:, None] * (weight + delta) - weight

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        result = plain = base(x, *args, **kwargs)
        for adapter_name in self.active_adapters:
            if adapter_name not in self._available_adapters:
                continue
            change = self._get_delta_activations(adapter_name, x)
            if self.decomposes(adapter_name):
                gain = self.gain(adapter_name)
                unbiased = plain if base.bias is None else plain - base.bias
                change = (gain - 1) * unbiased + gain * change
            result = result + change
        return result.to(x.dtype)

    def _get_delta_activations(self, adapter_name: str, x: Tensor, *args, **kwargs) -> Tensor:  # noqa: ARG002 (peft's)
        w1, w2 = self.factors(adapter_name)
        x = F.dropout(self._cast_input_dtype(x, w1.dtype), self.input_dropout, self.training)
        x = F.linear(x.unflatten(-1, (w1.shape[1], w2.shape[1])), w2)  # [..., b, c]
        x = F.linear(x.transpose(-1, -2), w1)  # [..., c, a]
        return x.transpose(-1, -2).flatten(-2) * self.scaling[adapter_name]

    def unmerge(self) -> None:
        """As peft's. Raises NotImplementedError with magnitudes, whose base weight is lost in the merged one."""
        if any(self.decomposes(name) for name in self.merged_adapters):
            raise NotImplementedError("a weight-decomposed LoKr cannot be taken out of the weights again")
        super().unmerge()


# LoHa: W + alpha/r · (W1a·W1b) ∘ (W2a·W2b), the Hadamard product of two low-rank matrices (Yeh et al. 2023).


def loha_config(settings: TrainConfig, targets: Targets) -> LoHaConfig:  # noqa: ARG001 (the same pieces for every kind)
    """Of a LoHa; its dropout is given by `prepare_loha`."""
    return LoHaConfig(
        r=targets.rank,
        alpha=targets.alpha,  # pyrefly: ignore[bad-argument-type]  # peft divides it, whatever number it is
        target_modules=list(targets.names),
        rank_pattern=targets.rank_pattern,
        alpha_pattern=targets.alpha_pattern,  # pyrefly: ignore[bad-argument-type]  # as above
    )


def prepare_loha(layer: nn.Module, settings: TrainConfig) -> None:
    """Give a layer LoRA's kind of dropout; refuse packed weights, whose shape peft would give to the change."""
    if isinstance(layer, loha.Linear):
        if layer.get_base_layer().weight.shape != (layer.out_features, layer.in_features):
            raise UserError(
                "--adapter-type loha cannot be used on a 4-bit base, whose weights are packed.",
                "Use --adapter-type lora or lokr, or train on an unquantised base.",
            )
        layer.__class__ = HadamardLinear
        assert isinstance(layer, HadamardLinear)
        layer.input_dropout = settings.dropout


class HadamardLinear(loha.Linear):
    """peft's LoHa on a Linear, with dropout on the adapter's input."""

    input_dropout = 0.0

    def _get_delta_activations(self, adapter_name: str, x: Tensor, *args, **kwargs) -> Tensor:  # noqa: ARG002 (peft's)
        weight = self.get_delta_weight(adapter_name)
        return F.linear(F.dropout(self._cast_input_dtype(x, weight.dtype), self.input_dropout, self.training), weight)


# OFT: W·R with R orthogonal and block-diagonal, the identity at the start (Qiu et al. 2023, arXiv:2306.07280).


def oft_config(settings: TrainConfig, targets: Targets) -> OFTConfig:  # noqa: ARG001 (the same pieces for every kind)
    """Of an OFT: the rank is the size of a block. Raises UserError where the ranks differ."""
    if targets.rank_pattern:
        raise UserError(
            "--adapter-type oft has one block size for all modules; the rank map asks for different ones.",
            "Use --adapter-type lora, dora, lokr or loha, or train without the map: --ignore-rank-map",
        )
    return OFTConfig(oft_block_size=targets.rank, target_modules=list(targets.names))


def check_oft(settings: TrainConfig, layers: Mapping[str, Any]) -> None:
    """Refuse a block size that does not divide a module's input width; peft would take another one for that module."""
    for name, layer in layers.items():
        if layer.in_features % settings.rank:
            common = math.gcd(*(other.in_features for other in layers.values()))
            sizes = [size for size in range(2, common + 1) if common % size == 0]
            nearest = min(sizes, key=lambda size: abs(size - settings.rank), default=1)
            raise UserError(
                f"--rank {settings.rank}: with --adapter-type oft it is the block size and must divide the input width "
                f"of every module; {name} has {layer.in_features}.",
                f"The nearest that fits is --rank {nearest}",
            )


def prepare_oft(layer: nn.Module, settings: TrainConfig) -> None:
    """Give a rotation a dropout: peft declares one and never applies it."""
    if isinstance(layer, OFTRotationModule):
        layer.__class__ = Rotation
        assert isinstance(layer, Rotation)
        layer.block_dropout = settings.dropout


class Rotation(OFTRotationModule):
    """peft's block-diagonal rotation; in training each block is the identity with probability `block_dropout`."""

    block_dropout = 0.0

    def _cayley_batch(self, Q: Tensor, *args, **kwargs) -> Tensor:
        rotations = super()._cayley_batch(Q, *args, **kwargs)
        if not self.training or not self.block_dropout:
            return rotations
        keep = torch.rand(len(rotations), 1, 1, device=rotations.device) >= self.block_dropout
        return torch.where(
            keep, rotations, torch.eye(rotations.shape[-1], device=rotations.device, dtype=rotations.dtype)
        )


KINDS = {
    "lora": AdapterKind(lora_config, prepare_lora),
    "dora": AdapterKind(lora_config, prepare_dora),
    "lokr": AdapterKind(lokr_config, prepare_lokr, check_lokr),
    "loha": AdapterKind(loha_config, prepare_loha),
    "oft": AdapterKind(oft_config, prepare_oft, check_oft),
}
