"""Every program and what it makes of an adapter: the one table of kinds, and the rules by which each reads a file.

`WAYS` says in which form a kind of adapter is exact in a program; docs/interop.md is made from it and tests hold it
against the programs themselves. `applied_by_each` says the same of a file of any origin (acestep-facts, section 5).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sidestep.adapters.names import parse_key, prefix_of
from sidestep.adapters.read import (
    AGAIN,
    DIFFUSERS_HEADER,
    LOHA_WEIGHTS,
    LOKR_WEIGHTS,
    PEFT_CONFIG,
    Found,
    lora_rank,
)


@dataclass(frozen=True)
class Way:
    """The form in which a program applies a kind of adapter exactly as it was trained, at strength 1.

    form: `final`, the folder that a run writes, or a `--format` of `export`. words: where that is not the whole story,
    what the program does with `final/`, or cannot do with the adapter.
    """

    form: str
    words: str = ""

    @property
    def is_final(self) -> bool:
        """Whether `final/` is right as it is."""
        return self.form == "final"


FINAL = Way("final")
STAYS = "its strength slider and unload do not take it out whole: for the base model start the app again"
REFUSED = Way("merged", "refuses this kind")
UNNAMED = Way("lycoris", "does not know the names in final/")
OUTPUTS = "its OFT rotates outputs, ours inputs"
WAYS: dict[str, dict[str, Way]] = {
    "LoRA": {
        "ACE-Step's app": FINAL,
        "ComfyUI": FINAL,
        "diffusers": FINAL,
        "peft": FINAL,
        "LyCORIS": UNNAMED,
        "acestep.cpp": FINAL,
    },
    "DoRA": {
        "ACE-Step's app": Way("final", STAYS),
        "ComfyUI": Way("comfyui --base", "ignores the magnitudes of final/"),
        "diffusers": FINAL,
        "peft": FINAL,
        "LyCORIS": UNNAMED,
        "acestep.cpp": Way("merged", "ignores the magnitudes"),
    },
    "LoKr": {
        "ACE-Step's app": FINAL,
        "ComfyUI": FINAL,
        "diffusers": REFUSED,
        "peft": FINAL,
        "LyCORIS": FINAL,
        "acestep.cpp": FINAL,
    },
    "weight-decomposed LoKr": {
        "ACE-Step's app": Way("final", STAYS),
        "ComfyUI": Way("comfyui --base", "takes the magnitudes of final/ over other norms"),
        "diffusers": REFUSED,
        "peft": Way("merged", "has no such kind"),
        "LyCORIS": FINAL,
        "acestep.cpp": Way("merged", "ignores the magnitudes, or takes them over other norms"),
    },
    "LoHa": {
        "ACE-Step's app": Way("final", STAYS),
        "ComfyUI": FINAL,
        "diffusers": REFUSED,
        "peft": FINAL,
        "LyCORIS": FINAL,
        "acestep.cpp": Way("merged", "merges nothing of this kind"),
    },
    "OFT": {
        "ACE-Step's app": Way("final", STAYS),
        "ComfyUI": Way("merged", OUTPUTS),
        "diffusers": REFUSED,
        "peft": FINAL,
        "LyCORIS": Way("merged", OUTPUTS),
        "acestep.cpp": Way("merged", "merges nothing of this kind"),
    },
}
# Not trained here, but LyCORIS makes it and it is read: as the weight-decomposed LoKr, without ACE-Step's app.
WAYS["weight-decomposed LoHa"] = WAYS["weight-decomposed LoKr"] | {"ACE-Step's app": Way("merged", "has no such kind")}

# What other programs write, and which programs read it at the strength that it states; Side-Step reads it all.
OTHERS: dict[str, tuple[str, frozenset[str]]] = {
    "ACE-Step's trainer, LoKr": (
        "LyCORIS' names; the modules outside attention and MLP hold no change",
        frozenset({"ACE-Step's app", "ComfyUI", "LyCORIS", "acestep.cpp"}),
    ),
    "ai-toolkit, LoRA": ("`transformer.decoder.…`", frozenset()),
    "SimpleTuner 1.5": (
        "`base_model.model.decoder.…`, beside modules of the encoder; the alpha it was trained with is not in the file",
        frozenset({"acestep.cpp"}),
    ),
    "ComfyUI's train node": ("`.diff` of every weight", frozenset({"ComfyUI"})),
}


@dataclass(frozen=True)
class Applied:
    """What a program does with a file.

    strength: least and greatest of its modules, 1 being what the file states; None: not read.
    """

    program: str
    strength: tuple[float, float] | None
    note: str = ""

    def __str__(self) -> str:
        if self.strength is None:
            return "not read"
        low, high = self.strength
        return f"{low:g}" if abs(high - low) < 1e-6 * max(abs(low), abs(high), 1) else f"{low:g} to {high:g}"


Strength = tuple[tuple[float, float] | None, str]
EXACT = (1.0, 1.0)


def applied_by_each(found: Found) -> list[Applied]:
    """How Side-Step and each program of the table apply a file."""
    applied = [Applied("Side-Step", EXACT)]
    for program, way in WAYS[found.title].items():
        strength, why = RULES[program](found)
        again = f": export --format {way.form}" + (" CHECKPOINT_DIR" if way.form.endswith("--base") else "")
        if strength is None and not way.is_final and way != UNNAMED:
            why = way.words + again
        elif not way.is_final and way != UNNAMED:
            why = f"{way.words}, so not as trained{again}"
        elif strength and way.words and way.is_final:
            why = f"{why}; {way.words}"
        applied.append(Applied(program, strength, why))
    return applied


def by_app(found: Found) -> Strength:
    """ACE-Step's own app: a PEFT folder, or a LoKr of which `lokr_config` says how it is built."""
    if found.config:
        beside = (found.path.parent / LOKR_WEIGHTS).is_file()
        return EXACT, f"takes {LOKR_WEIGHTS} beside it" if beside else f"alpha and rank from {PEFT_CONFIG}"
    if found.kind != "lokr" or ("lokr_config" not in found.header and found.path.name != LOKR_WEIGHTS):
        return None, f"needs a folder with {PEFT_CONFIG}: export --format peft"
    if "lokr_config" not in found.header:
        return None, "there is no lokr_config in its header: the app would guess the shapes"
    if found.stated_by != "lokr_config":
        return EXACT, "full matrices"
    scales = {name: found.stated.get(name, 1.0) for name in found.modules}
    return _range(found, scales), "linear_alpha / linear_dim of lokr_config; alpha tensors are not used"


COMFYUI_NAMES = (
    "base_model.model.layers.",
    "diffusion_model.decoder.layers.",
    "lycoris_layers_",
    "lora_unet_decoder_layers_",
)


def by_comfyui(found: Found) -> Strength:
    """ComfyUI: names it knows, and alpha tensors over the ranks of the shapes."""
    if found.kind == "oft":
        return None, OUTPUTS
    foreign = [key for key in found.keys if parse_key(key) and not key.startswith(COMFYUI_NAMES)]
    if foreign:
        return None, f"does not know names such as {foreign[0]}: export --format comfyui"
    return _by_alphas(found)


def by_diffusers(found: Found) -> Strength:
    """diffusers' `load_lora_weights`: LoRA and DoRA in its own names, or in original ones that it renames."""
    if found.kind != "lora":
        return None, "refuses this kind"
    if found.alphas:
        return None, "refuses alpha tensors: export --format diffusers"
    prefixes = {prefix_of(key) for key in found.keys}
    if prefixes == {"base_model.model."} and not any("q_proj" in key or "k_proj" in key for key in found.keys):
        return None, "loads nothing from original names without a q_proj or k_proj: export --format diffusers"
    named = all(key.startswith(f"{prefix}layers.") for prefix in prefixes for key in found.keys)
    if prefixes not in ({"base_model.model."}, {"transformer."}) or not named:
        return None, "does not know these names: export --format diffusers"
    if DIFFUSERS_HEADER in found.header:
        return EXACT, f"alpha and rank from {DIFFUSERS_HEADER} in the header"
    return _range(found, dict.fromkeys(found.modules, 1.0)), f"no {DIFFUSERS_HEADER}: 1 · B · A"


def by_peft(found: Found) -> Strength:
    """peft's `from_pretrained`: a folder with its config, in original names."""
    if not found.config:
        return None, f"needs a folder with {PEFT_CONFIG}: export --format peft"
    return EXACT, f"alpha and rank from {PEFT_CONFIG}"


def by_lycoris(found: Found) -> Strength:
    """lycoris-lora's network from a file alone: its own flat names, alpha tensors over the ranks of the shapes."""
    own = next((name for name in (LOKR_WEIGHTS, LOHA_WEIGHTS) if (found.path.parent / name).is_file()), None)
    if found.config and own:
        return EXACT, f"takes {own} beside it"
    if not all(key.startswith("lycoris_") for key in found.keys):
        return None, "does not know these names: export --format lycoris"
    return _by_alphas(found)


def by_cpp(found: Found) -> Strength:
    """acestep.cpp: LoRA by alpha tensors, one lora_alpha or none, over the rank of each module; LoKr in LyCORIS' names.

    Of a folder it opens adapter_model.safetensors before lokr_weights.safetensors.
    """
    if found.kind == "lora":
        names = ("base_model.model.", "diffusion_model.", "")
        known = [
            key.removeprefix(prefix_of(key)).removeprefix("decoder.").startswith("layers.")
            and prefix_of(key) in names
            and ".lora_" in key
            for key in found.keys
            if (parsed := parse_key(key)) and parsed[1].startswith("lora_")
        ]
        if not known or not all(known):
            return None, "does not know these names: export --format peft"
        stated, scales = found.config.get("lora_alpha"), {}
        alpha = int(stated) if isinstance(stated, int | float) and math.isfinite(stated) else 0
        for name, factors in found.modules.items():
            rank = lora_rank(factors) or 1
            scales[name] = (found.alphas.get(name) or alpha or rank) / rank
        if alpha:
            return _range(found, scales), f"one lora_alpha of {PEFT_CONFIG} for all"
        return _range(found, scales), "alpha tensors" if found.alphas else "no lora_alpha for all: 1 · B · A"
    if found.kind != "lokr":
        return None, "merges nothing of this kind"
    if found.metadata.get(AGAIN):
        return EXACT, "reads the factors that stand there again under LyCORIS' names"
    if not all(key.startswith("lycoris_") for key in found.keys):
        return None, "reads a LoKr in LyCORIS' names only: export --format peft"
    stated, scales = found.lokr.get("linear_dim"), {}
    dim = stated if isinstance(stated, int) and stated > 0 else 0
    for name, factors in found.modules.items():
        rank = factors["lokr_w2_b"].shape[0] if "lokr_w2_b" in factors else dim
        alpha = found.alphas.get(name)
        scales[name] = alpha / rank if alpha is not None and rank and "lokr_w1" in factors else 0.0
    if not any(scales.values()):
        return None, "skips modules of which W1 is split or alpha is missing: export --format peft"
    return _range(found, scales), "alpha / linear_dim of lokr_config, also of full matrices"


RULES: dict[str, Callable[[Found], Strength]] = {
    "ACE-Step's app": by_app,
    "ComfyUI": by_comfyui,
    "diffusers": by_diffusers,
    "peft": by_peft,
    "LyCORIS": by_lycoris,
    "acestep.cpp": by_cpp,
}


def _by_alphas(found: Found) -> Strength:
    """By a program that knows alpha from tensors alone."""
    scales = {
        name: found.alphas[name] / rank if name in found.alphas and (rank := lora_rank(factors)) else 1.0
        for name, factors in found.modules.items()
    }
    return _range(found, scales), "alpha tensors" if found.alphas else "no alpha tensors: 1 · up · down"


def _range(found: Found, scales: Mapping[str, float]) -> tuple[float, float]:
    """Least and greatest of what a program multiplies with over what the file states."""
    ratios = [scales[name] / stated if (stated := found.scale(name)) else 1.0 for name in found.modules]
    return min(ratios), max(ratios)
