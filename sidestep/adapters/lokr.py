"""LoKr: W + alpha/r · W1 ⊗ W2, each factor a full or a low-rank matrix (Yeh et al. 2023), as peft builds it.

The product is never formed in training: (W1 ⊗ W2)·x is two small products, for 2048 × 2048 about 20 times less arithmetic than with the
full matrix, and no 16 MB of temporary weight per module. It also works on a quantised base, whose packed weights have another shape.

LoKr as its files state it: the settings from which a program rebuilds the shapes of the factors.
"""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoKrConfig, PeftModel
from peft.tuners import lokr
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

from sidestep.adapters.adapter import Adapter, kronecker_shape, shape_of, whole
from sidestep.adapters.targets import Targets
from sidestep.errors import UserError
from sidestep.settings.config import TrainConfig


def check(config: TrainConfig, sizes: dict[str, tuple[int, int]]) -> None:
    """Refuse a factor above the square root of a module's width: peft would make W1 the larger factor, LyCORIS W2, and no file could serve both."""
    for name, size in sizes.items():
        for width in size:
            if config.lokr_factor**2 > width and width % config.lokr_factor == 0 and config.lokr_factor > 0:
                raise UserError(
                    f"--lokr-factor {config.lokr_factor}: more than the square root of a width of {name} ({width}); other programs would read its factors the other way round.",
                    f"Use --lokr-factor {max(f for f in range(1, int(width**0.5) + 1) if width % f == 0)} or less, or -1 for the most square split.",
                )


def peft_config(config: TrainConfig, targets: Targets) -> LoKrConfig:
    return LoKrConfig(
        r=targets.rank,
        alpha=targets.alpha,
        decompose_both=config.lokr_decompose_both,
        decompose_factor=config.lokr_factor,
        target_modules=list(targets.names),
        rank_pattern=targets.rank_pattern,
        alpha_pattern=targets.alpha_pattern,
    )


def finish(model: PeftModel, config: TrainConfig) -> None:
    """Give peft's layers the forward pass of `KroneckerLinear`, and magnitudes where they are asked for."""
    for name, layer in model.named_modules():
        if isinstance(layer, lokr.Linear):
            base = layer.get_base_layer()
            if config.lokr_weight_decompose and not base.weight.is_floating_point():
                raise UserError(
                    f"--lokr-weight-decompose cannot be used on a quantised base: it needs the plain weights of {name.removeprefix('base_model.model.')}.",
                    "Leave --lokr-weight-decompose away, use --adapter-type dora, or train on an unquantised base.",
                )
            layer.__class__ = KroneckerLinear  # the same parameters, another way to use them
            layer.input_dropout = config.dropout
            if config.lokr_weight_decompose:
                layer.add_magnitude("default")


class KroneckerLinear(lokr.Linear):
    """peft's LoKr on a Linear, computed factor by factor; dropout on the adapter's input as in LoRA; magnitudes as in DoRA on request.

    peft's own dropouts (rank, module) draw on the CPU, which would stop the GPU's queue once per module and step.
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

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
        """ΔW [out, in] in the adapter's numbers; with magnitudes, of the base as it is now (unmerged)."""
        delta = torch.kron(*self.factors(adapter_name)) * self.scaling[adapter_name]
        if not self.decomposes(adapter_name):
            return delta
        weight = self.get_base_layer().weight.to(delta.dtype)
        return self.gain(adapter_name)[:, None] * (weight + delta) - weight

    def decomposes(self, adapter_name: str) -> bool:
        return adapter_name in getattr(self, "lokr_magnitude_vector", ())

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

    def _get_delta_activations(self, adapter_name: str, x: Tensor, *args, **kwargs) -> Tensor:
        w1, w2 = self.factors(adapter_name)
        x = F.dropout(self._cast_input_dtype(x, w1.dtype), self.input_dropout, self.training)
        x = F.linear(x.unflatten(-1, (w1.shape[1], w2.shape[1])), w2)  # [..., b, c]
        x = F.linear(x.transpose(-1, -2), w1)  # [..., c, a]
        return x.transpose(-1, -2).flatten(-2) * self.scaling[adapter_name]

    def unmerge(self) -> None:
        if any(self.decomposes(name) for name in self.merged_adapters):
            raise NotImplementedError("a weight-decomposed LoKr cannot be taken out of the weights again")
        super().unmerge()


@dataclass(frozen=True)
class LokrSettings:
    """factor, decompose_both and a rank per module with which peft and LyCORIS make factors of exactly the adapter's shapes."""

    factor: int
    decompose_both: bool
    ranks: dict[str, int]

    @property
    def rank(self) -> int:
        """The most common rank."""
        return Counter(self.ranks.values()).most_common(1)[0][0]


def settings_of(adapter: Adapter) -> LokrSettings:
    """Raises UserError for shapes that no settings of peft or LyCORIS give."""
    shapes = {name: (*shape_of(f), *kronecker_shape(f, "lokr_w1")) for name, f in adapter.modules.items()}
    sizes = {size for _, _, a, b in shapes.values() for size in (a, b)} | {
        size for o, i, a, b in shapes.values() for size in (o // a, i // b)
    }
    fits = [
        f
        for f in (-1, *sorted(sizes))
        if all((factorization(o, f)[0], factorization(i, f)[0]) == (a, b) for o, i, a, b in shapes.values())
    ]
    decompose_both = any("lokr_w1_a" in factors for factors in adapter.modules.values())
    if fits:
        ranks = {name: _rank(adapter, name, decompose_both) for name in adapter.modules}
        if None not in ranks.values():
            return LokrSettings(fits[0], decompose_both, ranks)
    raise UserError(
        "The factors of this LoKr have shapes that no one set of LoKr settings gives; programs that rebuild them from settings cannot load it.",
        "Merge it into the base instead: --format merged --base CHECKPOINT_DIR",
    )


def _rank(adapter: Adapter, name: str, decompose_both: bool) -> int | None:
    """A rank that makes this module's factors full or low-rank just as they are; the rank it was trained with where that does."""
    factors = adapter.modules[name]
    half_w1, half_w2 = (max(kronecker_shape(factors, part)) / 2 for part in ("lokr_w1", "lokr_w2"))

    def fits(rank: int) -> bool:
        full_w1, full_w2 = not (decompose_both and rank < half_w1), not rank < half_w2
        widths = {factors[f"{part}_b"].shape[0] for part in ("lokr_w1", "lokr_w2") if part not in factors}
        return full_w1 == ("lokr_w1" in factors) and full_w2 == ("lokr_w2" in factors) and widths <= {rank}

    candidates = (
        adapter.ranks[name],
        -(-max(kronecker_shape(factors, "lokr_w2")) // 2),
        -(-int(max(half_w1, half_w2) * 2) // 2),
    )
    return next((rank for rank in candidates if fits(rank)), None)


def with_full_factors(adapter: Adapter) -> Adapter:
    """The same change with W1 and W2 as whole matrices: what LyCORIS' `full_matrix` loads whatever the ranks are."""
    modules = {}
    for name, factors in adapter.modules.items():
        rest = {key: tensor for key, tensor in factors.items() if not key.startswith("lokr_")}
        modules[name] = {
            part: factors[part] if part in factors else whole(factors, part) for part in ("lokr_w1", "lokr_w2")
        } | rest
    return Adapter(adapter.kind, modules, adapter.ranks, adapter.facts)
