"""An adapter apart from any model and any file: its factors by original module name, their strength folded in.

Whatever a file said of alpha and rank is inside the factors: the change of a weight is their plain product. Every writer states alpha = r,
so that programs which read alpha and programs which do not apply the same strength.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
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
MAGNITUDE = "magnitude"  # [out], DoRA: the norm that each row of the changed weight is given


@dataclass(frozen=True)
class Adapter:
    """kind: lora, lokr, loha or oft. modules: original module name -> factor name -> tensor, in model order.

    ranks: the rank each module was trained with; of full LoKr factors it cannot be told from the shapes. facts: the `sidestep` header.
    placeholder: factors that change nothing, of a q_proj that was not trained (see `export`).
    """

    kind: str
    modules: dict[str, dict[str, Tensor]]
    ranks: dict[str, int]
    facts: dict = field(default_factory=dict)
    placeholder: dict[str, Tensor] | None = None

    @property
    def has_magnitudes(self) -> bool:
        return any(MAGNITUDE in factors for factors in self.modules.values())

    @property
    def title(self) -> str:
        if self.kind == "lora":
            return "DoRA" if self.has_magnitudes else "LoRA"
        name = {"lokr": "LoKr", "loha": "LoHa", "oft": "OFT"}[self.kind]
        return f"weight-decomposed {name}" if self.has_magnitudes else name


def shape_of(factors: Factors) -> tuple[int, int | None]:
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
    """Shape of W1 or W2 of a LoKr, whether it is stored whole or as two factors."""
    if part in factors:
        return tuple(factors[part].shape)
    return factors[f"{part}_a"].shape[0], factors[f"{part}_b"].shape[1]


def block_size(entries: int) -> int:
    """b, of a skew-symmetric b × b matrix with b·(b−1)/2 free entries."""
    return round((1 + (1 + 8 * entries) ** 0.5) / 2)


def change_of(factors: Factors) -> Tensor:
    """ΔW [out, in] in float32 before any magnitude. Not for OFT, whose change depends on the weight."""
    f = {name: tensor.float() for name, tensor in factors.items()}
    if "lora_A" in f:
        return f["lora_B"] @ f["lora_A"]
    if "hada_w1_a" in f:
        return (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
    return torch.kron(whole(f, "lokr_w1"), whole(f, "lokr_w2"))


def whole(factors: Factors, part: str) -> Tensor:
    """W1 or W2 of a LoKr as one float32 matrix."""
    return factors[part].float() if part in factors else factors[f"{part}_a"].float() @ factors[f"{part}_b"].float()


def changed_weight(weight: Tensor, factors: Factors, strength: float = 1.0) -> Tensor:
    """W + strength · (W' − W) in float32, W' being the weight under the adapter. weight: [out, in]."""
    weight = weight.float()
    if "oft_R" in factors:
        changed = weight @ rotation(factors["oft_R"], weight.shape[1]).T
    else:
        changed = weight + change_of(factors)
        if MAGNITUDE in factors:
            changed = changed * (factors[MAGNITUDE].float() / torch.linalg.norm(changed, dim=1)).unsqueeze(1)
    return changed if strength == 1.0 else weight + strength * (changed - weight)


def rotation(entries: Tensor, width: int) -> Tensor:
    """peft's block-diagonal orthogonal matrix [width, width] of an OFT."""
    blocks, count = entries.shape
    module = OFTRotationModule(blocks, count, block_size(count), width)
    module.weight.data = entries.float()
    with torch.no_grad():
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
            f"--strength {strength:g}: a {adapter.title} cannot be stored at another strength; its magnitudes or rotations are not a factor.",
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
        parts = [adapter.modules[name] for adapter in adapters if name in adapter.modules]
        if len({shape_of(part) for part in parts}) > 1:
            raise UserError(
                f"--add: {name} has another shape in each of the adapters.",
                "They were trained on models of different sizes and cannot be combined.",
            )
        kept = {part["lora_A"].dtype for part in parts} | {part["lora_B"].dtype for part in parts}
        dtype = kept.pop() if len(kept) == 1 else torch.float32
        modules[name] = {
            "lora_A": torch.cat([part["lora_A"].to(dtype) for part in parts]),
            "lora_B": torch.cat([part["lora_B"].to(dtype) for part in parts], dim=1),
        }
    facts = {
        "combined": [a.facts.get("name", "") for a in adapters],
        **{k: v for k, v in adapters[0].facts.items() if k in ("base_model", "tag")},
    }
    return Adapter(
        "lora",
        modules,
        {name: f["lora_A"].shape[0] for name, f in modules.items()},
        facts,
        next((a.placeholder for a in adapters if a.placeholder), None),
    )


def cast(adapter: Adapter, dtype: torch.dtype | None) -> Adapter:
    """The adapter in other numbers; None keeps them."""
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
