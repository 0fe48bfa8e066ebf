"""An adapter apart from any model and any file: its factors by original module name, their strength folded in.

Whatever a file said of alpha and rank is inside the factors: the change of a weight is their plain product. Every
writer states alpha = r, so that programs which read alpha and programs which do not apply the same strength.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lokr.layer import factorization
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor

from sidestep.adapters.names import in_model_order
from sidestep.errors import UserError

Factors = Mapping[str, Tensor]

FACTORS = {
    "lora": ("lora_A", "lora_B"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "oft": ("oft_R",),
}
TITLES = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa", "oft": "OFT"}
MAGNITUDE = "magnitude"  # [out], DoRA: the norm that each row of the changed weight is given
MERGE_INSTEAD = "Merge it into the base instead: --format merged --base CHECKPOINT_DIR"


@dataclass(frozen=True)
class Adapter:
    """kind: lora, lokr, loha or oft. modules: original module name -> factor name -> tensor, in model order.

    ranks: the rank each module was trained with; of full LoKr factors it cannot be told from the shapes. metadata: the
    `sidestep` header. placeholder: factors that change nothing, of a q_proj that was not trained (`write.save_peft`).
    remarks: what a person should know of how it was read. outside: what a file of another program changes of modules
    that our adapters cannot sit on (time embedding, norms, encoder); `merge` alone can use it. path: of the file.
    """

    kind: str
    modules: dict[str, dict[str, Tensor]]
    ranks: dict[str, int]
    metadata: dict[str, Any] = field(default_factory=dict)
    placeholder: dict[str, Tensor] | None = None
    remarks: tuple[str, ...] = ()
    outside: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    path: Path | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """The remarks and, wherever it is used but in a merge, what is lost of it."""
        if not self.outside:
            return self.remarks
        lost = (
            f"{self.path}: what {len(self.outside)} modules outside the decoder's attention and MLP have learned is "
            f"lost, such as {next(iter(self.outside))}; only export --format merged carries it."
        )
        return (lost, *self.remarks)

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is weight-decomposed: a DoRA, or another kind with DoRA's magnitudes."""
        return any(MAGNITUDE in factors for factors in self.modules.values())

    @property
    def title(self) -> str:
        """Its kind in words."""
        return title(self.kind, self.has_magnitudes)


def title(kind: str, has_magnitudes: bool) -> str:
    """A kind of adapter in words."""
    if not has_magnitudes:
        return TITLES[kind]
    return "DoRA" if kind == "lora" else f"weight-decomposed {TITLES[kind]}"


def kind_of(factors: Factors) -> str | None:
    """The kind of adapter whose factors these are, complete or not; None for a mixture."""
    return next((kind for kind, names in FACTORS.items() if set(factors) - {MAGNITUDE} <= set(names)), None)


def shape_of(factors: Factors) -> tuple[int, int]:
    """(out, in) of the weight that these factors change; OFT says nothing of the rows: (0, in)."""
    if "lora_A" in factors:
        return factors["lora_B"].shape[0], factors["lora_A"].shape[1]
    if "hada_w1_a" in factors:
        return factors["hada_w1_a"].shape[0], factors["hada_w1_b"].shape[1]
    if "oft_R" in factors:
        blocks, entries = factors["oft_R"].shape
        return 0, blocks * block_size(entries)
    (a, b), (c, d) = (kronecker_shape(factors, part) for part in ("lokr_w1", "lokr_w2"))
    return a * c, b * d


def kronecker_shape(factors: Factors, part: str) -> tuple[int, int]:
    """Shape of W1 or W2 of a LoKr, whether it is stored as one matrix or as two."""
    if part in factors:
        return factors[part].shape[0], factors[part].shape[1]
    return factors[f"{part}_a"].shape[0], factors[f"{part}_b"].shape[1]


def kronecker_factor(factors: Factors, part: str) -> Tensor:
    """W1 or W2 of a LoKr as one matrix; a product is taken in float32."""
    return factors[part] if part in factors else factors[f"{part}_a"].float() @ factors[f"{part}_b"].float()


def block_size(entries: int) -> int:
    """b, of a skew-symmetric b × b matrix with b·(b-1)/2 free entries."""
    return round((1 + (1 + 8 * entries) ** 0.5) / 2)


def change_of(factors: Factors) -> Tensor:
    """ΔW [out, in] in float32 before any magnitude. Not for OFT, whose change depends on the weight."""
    f = {name: tensor.float() for name, tensor in factors.items()}
    if "lora_A" in f:
        return f["lora_B"] @ f["lora_A"]
    if "hada_w1_a" in f:
        return (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
    return torch.kron(kronecker_factor(f, "lokr_w1"), kronecker_factor(f, "lokr_w2"))


def changed_weight(weight: Tensor, factors: Factors, strength: float = 1.0) -> Tensor:
    """W + strength · (W' − W) in float32, W' being the weight under the adapter. weight: [out, in]."""
    weight = weight.float()
    if "oft_R" in factors:
        changed = weight @ rotation(factors["oft_R"]).T
    else:
        changed = weight + change_of(factors)
        if MAGNITUDE in factors:
            changed = changed * (factors[MAGNITUDE].float() / torch.linalg.norm(changed, dim=1)).unsqueeze(1)
    return changed if strength == 1.0 else weight + strength * (changed - weight)


@torch.no_grad()
def rotation(entries: Tensor) -> Tensor:
    """peft's block-diagonal orthogonal matrix [in, in] of an OFT. entries: [blocks, b·(b-1)/2]."""
    blocks, count = entries.shape
    module = OFTRotationModule(blocks, count, block_size(count), blocks * block_size(count))
    module.weight.data = entries.float()
    return module.get_weight()


def scaled(factors: Factors, scale: float) -> dict[str, Tensor]:
    """The factors of a change `scale` times as large. Untouched at 1; the product is taken in float32."""
    if scale == 1.0:
        return dict(factors)
    carrier = next((name for name in ("lora_B", "lokr_w1", "lokr_w1_b", "hada_w1_b") if name in factors), None)
    if carrier is None:
        raise UserError(
            "The strength of an OFT cannot be changed: it is a rotation.",
            "Merge it into the base at that strength: --format merged --strength S",
        )
    return {**factors, carrier: factors[carrier].float() * scale}


def with_strength(adapter: Adapter, strength: float) -> Adapter:
    """The adapter at another strength. Raises UserError where that is no adapter of the same kind."""
    if strength == 1.0:
        return adapter
    if adapter.has_magnitudes or adapter.kind == "oft":
        raise UserError(
            f"--strength {strength:g}: a {adapter.title} cannot be stored at another strength; "
            "its magnitudes or rotations are not a factor.",
            "Merge it into the base at that strength: --format merged --strength S --base CHECKPOINT_DIR",
        )
    return replace(adapter, modules={name: scaled(factors, strength) for name, factors in adapter.modules.items()})


def combined(adapters: list[Adapter]) -> Adapter:
    """One LoRA whose change is the sum of the others', by concatenating their ranks: exact, no rank is lost."""
    if len(adapters) == 1:
        return adapters[0]
    for adapter in adapters:
        if adapter.kind != "lora" or adapter.has_magnitudes:
            raise UserError(
                f"--add: only LoRAs can be combined into one adapter; this is a {adapter.title}.",
                "Merge them into the base instead: --format merged --base CHECKPOINT_DIR",
            )
    modules: dict[str, dict[str, Tensor]] = {}
    for name in in_model_order({name for adapter in adapters for name in adapter.modules}):
        lora = [adapter.modules[name] for adapter in adapters if name in adapter.modules]
        if len({shape_of(factors) for factors in lora}) > 1:
            raise UserError(
                f"--add: {name} has another shape in each of the adapters.",
                "They were trained on models of different sizes and cannot be combined.",
            )
        dtypes = {tensor.dtype for factors in lora for tensor in factors.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        modules[name] = {
            "lora_A": torch.cat([factors["lora_A"].to(dtype) for factors in lora]),
            "lora_B": torch.cat([factors["lora_B"].to(dtype) for factors in lora], dim=1),
        }
    first = {key: value for key, value in adapters[0].metadata.items() if key in ("base_model", "tag")}
    return Adapter(
        kind="lora",
        modules=modules,
        ranks={name: factors["lora_A"].shape[0] for name, factors in modules.items()},
        metadata={"combined": [adapter.metadata.get("name", "") for adapter in adapters], **first},
        placeholder=next((adapter.placeholder for adapter in adapters if adapter.placeholder), None),
    )


def cast(adapter: Adapter, dtype: torch.dtype | None) -> Adapter:
    """The adapter in another dtype; None keeps it."""
    if dtype is None:
        return adapter
    return replace(
        adapter,
        modules={name: {k: t.to(dtype) for k, t in factors.items()} for name, factors in adapter.modules.items()},
    )


def not_finite(adapter: Adapter) -> list[str]:
    """Names of the modules that hold a NaN or an infinity."""
    return [
        name for name, factors in adapter.modules.items() if not all(torch.isfinite(t).all() for t in factors.values())
    ]


def most_common(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """(the most common rank, the ranks of the modules that have another): `r` and `rank_pattern` of a file."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    return rank, {name: r for name, r in ranks.items() if r != rank}


@dataclass(frozen=True)
class LokrSettings:
    """What peft and LyCORIS make LoKr factors of exactly the adapter's shapes from. ranks: by module."""

    factor: int
    decompose_both: bool
    ranks: dict[str, int]


def lokr_settings(adapter: Adapter) -> LokrSettings:
    """The settings from which a program rebuilds the factors. Raises UserError for shapes that no settings give."""
    shapes = {name: (shape_of(f), kronecker_shape(f, "lokr_w1")) for name, f in adapter.modules.items()}
    sizes = {n for (o, i), (a, b) in shapes.values() for n in (a, b, o // a, i // b)}
    fitting = (
        f
        for f in (-1, *sorted(sizes))
        if all((factorization(o, f)[0], factorization(i, f)[0]) == w1 for (o, i), w1 in shapes.values())
    )
    factor = next(fitting, None)
    decompose_both = any("lokr_w1_a" in factors for factors in adapter.modules.values())
    ranks: dict[str, int] = {}
    for name, factors in adapter.modules.items():
        w1, w2 = (max(kronecker_shape(factors, part)) for part in ("lokr_w1", "lokr_w2"))
        widths = {tensor.shape[0] for factor, tensor in factors.items() if factor in ("lokr_w1_b", "lokr_w2_b")}
        # A rank that makes the factors full or low-rank just as they are; that of its training if it does.
        for rank in (adapter.ranks[name], math.ceil(w2 / 2), math.ceil(max(w1, w2) / 2)):
            # A factor is low-rank where the rank is below half its larger side.
            whole = {"lokr_w1": not decompose_both or rank >= w1 / 2, "lokr_w2": rank >= w2 / 2}
            if all((part in factors) == whole[part] for part in whole) and widths <= {rank}:
                ranks[name] = rank
                break
    if factor is None or len(ranks) < len(adapter.modules):
        raise UserError(
            "The factors of this LoKr have shapes that no one set of LoKr settings gives; "
            "programs that rebuild them from settings cannot load it.",
            MERGE_INSTEAD,
        )
    return LokrSettings(factor, decompose_both, ranks)


def with_full_factors(adapter: Adapter, parts: Iterable[str] = ("lokr_w1", "lokr_w2")) -> Adapter:
    """The same LoKr with W1 and W2 as one matrix each: what LyCORIS' `full_matrix` loads whatever the ranks are."""
    modules = {}
    for name, factors in adapter.modules.items():
        rest = {key: tensor for key, tensor in factors.items() if not key.startswith(tuple(parts))}
        modules[name] = {part: kronecker_factor(factors, part) for part in parts} | rest
    return replace(adapter, modules=modules)
