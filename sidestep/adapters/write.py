"""The model card beside an adapter: what it is, what it was trained on, and how each program loads it.

Write an adapter the way each program reads it, at the same strength everywhere: alpha/r is in the factors and alpha = r is stated.
At which strength each program applies an adapter file as it is: acestep-facts §5, for files of any origin.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftModel
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
from torch import Tensor, nn

from sidestep import __version__
from sidestep.adapters.adapter import FACTORS, MAGNITUDE, Adapter, change_of, not_finite
from sidestep.adapters.attach import adapter_state
from sidestep.adapters.lokr import settings_of, with_full_factors
from sidestep.adapters.names import in_model_order, parse_key, spelling, to_diffusers
from sidestep.adapters.read import (
    COMFYUI_MAGNITUDES,
    DIFFUSERS_HEADER,
    HEADER,
    LOHA_WEIGHTS,
    LOKR_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    Found,
    lora_rank,
)
from sidestep.errors import JobError, UserError
from sidestep.files import replacing, write_text
from sidestep.settings.config import TrainConfig
from sidestep.settings.option import as_json_values


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of a training run. Everything may be left out."""

    name: str = ""
    base_model: str = ""  # the checkpoint's folder name, such as acestep-v15-turbo
    base_identity: str = ""  # fingerprint of its weights
    tag: str = ""  # trigger word that every prompt had
    songs: int = 0
    audio_seconds: float = 0.0
    steps: int = 0
    epochs: int = 0
    hints_ratio: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    config_fingerprint: str = ""

    def facts(self) -> dict[str, Any]:
        """The non-empty fields but for the settings: what the `sidestep` header holds."""
        return {name: value for name, value in asdict(self).items() if value and name != "settings"}


HOW_TO_LOAD = {
    "peft": ("ACE-Step's own app", "choose this folder in the LoRA tab"),
    "comfyui": ("ComfyUI", "put `{file}` into `models/loras` and use *Load LoRA (Model)*"),
    "diffusers": ("diffusers", "`pipe.load_lora_weights(folder)` with `AceStepPipeline`"),
}


def model_card(adapter: Adapter, card: Card, file: str, programs: tuple[str, ...]) -> str:
    """README.md of an adapter folder. Texts that come from outside are quoted as JSON, which YAML reads as it is."""
    ranks = sorted(set(adapter.ranks.values()))
    base = card.base_model or "ACE-Step 1.5"
    lines = [
        "---",
        f"base_model: {json.dumps(base, ensure_ascii=False)}",
        "library_name: peft",
        "pipeline_tag: text-to-audio",
        f"tags: {json.dumps(['ace-step', 'music', adapter.title.lower(), 'side-step'])}",
        "# The licence is yours to choose; it depends on the music. For instance:",
        "# license: cc-by-4.0",
        "---",
        "",
        f"# {_line(card.name) or 'An adapter for ACE-Step 1.5'}",
        "",
        f"{adapter.title} for {_line(base)}, trained with Side-Step.",
        "",
        "| | |",
        "|---|---|",
        f"| adapter | {adapter.title}, {len(adapter.modules)} modules, rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'} |",
    ]
    if card.tag:
        lines.append(f"| trigger tag | `{_line(card.tag)}` |")
    if card.songs:
        lines.append(
            f"| data | {card.songs} songs{f', {card.audio_seconds / 60:.0f} minutes' if card.audio_seconds else ''} |"
        )
    if card.steps:
        lines.append(f"| training | {card.steps} optimizer steps{f', {card.epochs} epochs' if card.epochs else ''} |")
    if card.hints_ratio:
        lines.append(f"| thinking mode | {card.hints_ratio:.0%} of the steps were trained with the app's hints |")
    lines += [
        "| licence | (fill in) |",
        "",
        "## Use",
        "",
        "The strength is folded into the weights and alpha equals the rank: strength 1 is the trained strength everywhere.",
        "",
    ]
    lines += [
        f"- {title}: {how.format(file=file)}" for program, (title, how) in HOW_TO_LOAD.items() if program in programs
    ]
    for program in sorted(set(HOW_TO_LOAD) - set(programs)):
        export = (
            "merged --base CHECKPOINT_DIR"
            if program != "comfyui" or adapter.kind == "oft"
            else "comfyui --base CHECKPOINT_DIR"
        )
        lines.append(
            f"- {HOW_TO_LOAD[program][0]} cannot read this file as it is: `uv run train.py export FOLDER --format {export} --output …`"
        )
    if card.settings:
        lines += [
            "",
            "## Settings",
            "",
            "```json",
            json.dumps(dict(card.settings), indent=1, ensure_ascii=False, default=str),
            "```",
        ]
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/").replace("`", "'")


MERGE_INSTEAD = "Merge it into the base instead: --format merged --base CHECKPOINT_DIR"
PLACEHOLDER = "layers.0.self_attn.q_proj"
WHERE = (
    "dataset_dir",
    "output_dir",
    "checkpoint_dir",
    "resume_from",
)  # folders say nothing of the adapter and may hold private names


def save_final(
    model: PeftModel,
    folder: Path,
    config: TrainConfig,
    state: dict[str, Tensor] | None = None,
    card: Card | None = None,
) -> None:
    """Write the adapter of `model` as the universal folder of acestep-facts §5.

    state: tensors by the names of `adapter_state`, where they are not the model's own (an average, a snapshot). card: what the run knows
    of itself; the settings come from `config`. Raises JobError rather than save a NaN.
    """
    settings = {name: value for name, value in as_json_values(config).items() if name not in WHERE}
    fingerprint = hashlib.blake2b(
        json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16
    ).hexdigest()
    known = card or Card(base_model=config.model_variant, hints_ratio=config.hints_ratio)
    known = dataclasses.replace(known, settings=settings, config_fingerprint=fingerprint)
    adapter = adapter_of(model, state)
    bad = not_finite(adapter)
    if bad:
        raise JobError(
            f"The adapter holds numbers that are not finite, first in {bad[0]}: it is not saved.",
            "Go on from the last checkpoint with a lower --lr.",
        )
    if needs_placeholder(adapter):
        adapter = with_placeholder(adapter, model.get_submodule(f"base_model.model.{to_diffusers(PLACEHOLDER)}"))
    save_folder(adapter, folder, known)


@torch.no_grad()
def adapter_of(model: PeftModel, state: dict[str, Tensor] | None = None) -> Adapter:
    """The adapter of a model with alpha/r folded in; tensors on the CPU. state: as in `save_final`."""
    modules: dict[str, dict[str, Tensor]] = {}
    layers = dict(model.named_modules())
    ranks: dict[str, int] = {}
    kind = ""
    for key, tensor in (state or adapter_state(model)).items():
        name, factor = parse_key(key)
        modules.setdefault(name, {})[factor] = tensor.detach().cpu()
    for name, factors in modules.items():
        kind = next(kind for kind, names in FACTORS.items() if set(factors) - {MAGNITUDE} <= set(names))
        layer = layers[f"base_model.model.{to_diffusers(name)}"]
        ranks[name] = int(layer.r["default"]) if kind != "oft" else int(layer.oft_block_size["default"])
        if kind != "oft" and layer.scaling["default"] != 1.0:
            carrier = next(c for c in ("lora_B", "lokr_w1", "lokr_w1_b", "hada_w1_b") if c in factors)
            factors[carrier] = factors[carrier] * layer.scaling["default"]
    order = in_model_order(modules)
    return Adapter(kind, {name: modules[name] for name in order}, {name: ranks[name] for name in order})


def save_folder(adapter: Adapter, folder: Path, card: Card | None = None) -> list[Path]:
    """Write the folder that every program which can read this kind of adapter reads; returns its files."""
    card = card or Card()
    programs, written = ["comfyui"] if not adapter.has_magnitudes and adapter.kind != "oft" else [], []
    if adapter.kind == "lokr":
        written.append(save_lycoris(adapter, folder / LOKR_WEIGHTS, card))
        programs.append("peft")
    if adapter.kind == "loha":
        written.append(save_lycoris(adapter, folder / LOHA_WEIGHTS, card))
    if not (adapter.kind == "lokr" and adapter.has_magnitudes):
        written += save_peft(adapter, folder, card)
        programs += ["peft"] + (["diffusers"] if adapter.kind == "lora" else [])
    file = LOKR_WEIGHTS if adapter.kind == "lokr" else PEFT_WEIGHTS
    write_text(folder / "README.md", model_card(adapter, card, file, tuple(programs)))
    return [*written, folder / "README.md"]


def save_peft(adapter: Adapter, folder: Path, card: Card | None = None) -> list[Path]:
    """A PEFT folder in original names, which diffusers and ComfyUI read too (OFT: peft only)."""
    if adapter.kind == "lokr" and adapter.has_magnitudes:
        raise UserError(
            "peft has no weight-decomposed LoKr.",
            "Export it with --format lycoris, or merge it: --format merged --base CHECKPOINT_DIR",
        )
    facts: dict[str, Any] = {}
    if needs_placeholder(adapter):
        if adapter.placeholder is None:
            raise UserError(
                "diffusers reads original names only beside a q_proj or k_proj; this adapter has neither, and the size of one follows from the base alone.",
                "Add --base CHECKPOINT_DIR, or use --format diffusers for diffusers and --format comfyui for ComfyUI.",
            )
        rank = adapter.placeholder["lora_A"].shape[0]
        adapter = dataclasses.replace(
            adapter,
            modules={PLACEHOLDER: adapter.placeholder, **adapter.modules},
            ranks={PLACEHOLDER: rank, **adapter.ranks},
        )
        facts["placeholder"] = PLACEHOLDER
    tensors = {
        f"base_model.model.{name}.{_peft_factor(factor)}": t
        for name, factors in adapter.modules.items()
        for factor, t in factors.items()
    }
    header = _header(adapter, card, facts)
    if adapter.kind == "lora":
        header[DIFFUSERS_HEADER] = _diffusers_header(adapter)
    config = _peft_config(adapter, card)
    written = _save(tensors, folder / PEFT_WEIGHTS, header)
    write_text(folder / PEFT_CONFIG, json.dumps(config, indent=2, sort_keys=True))
    return [written, folder / PEFT_CONFIG]


def save_diffusers(adapter: Adapter, file: Path, card: Card | None = None) -> Path:
    """A file in diffusers' own names."""
    if adapter.kind != "lora":
        raise UserError(f"diffusers refuses {adapter.title} files for ACE-Step; it loads LoRA and DoRA.", MERGE_INSTEAD)
    tensors = {
        f"transformer.{to_diffusers(name)}.{_peft_factor(factor)}": t
        for name, factors in adapter.modules.items()
        for factor, t in factors.items()
    }
    return _save(tensors, file, {**_header(adapter, card), DIFFUSERS_HEADER: _diffusers_header(adapter)})


def save_comfyui(adapter: Adapter, file: Path, card: Card | None = None, weights=None) -> Path:
    """A single file for ComfyUI, with alpha tensors. weights(name) -> base weight [out, in]: needed where there are magnitudes.

    ComfyUI divides DoRA's magnitudes by the norms of the base's rows, not of the changed ones; they are rewritten so that its formula
    gives the trained weight.
    """
    if adapter.kind == "oft":
        raise UserError("ComfyUI's OFT rotates outputs, peft's inputs: one cannot stand for the other.", MERGE_INSTEAD)
    facts: dict[str, Any] = {}
    if adapter.has_magnitudes:
        if weights is None:
            raise UserError(
                f"ComfyUI applies the magnitudes of a {adapter.title} by another formula; to rewrite them the base is needed.",
                "Add --base CHECKPOINT_DIR",
            )
        modules = {}
        for name, factors in adapter.modules.items():
            weight = weights(name).float()
            ratio = torch.linalg.norm(weight, dim=1) / torch.linalg.norm(weight + change_of(factors), dim=1)
            modules[name] = {**factors, MAGNITUDE: factors[MAGNITUDE].float() * ratio}
        adapter = dataclasses.replace(adapter, modules=modules)
        facts[COMFYUI_MAGNITUDES] = True
    if adapter.kind != "lora":
        return save_lycoris(adapter, file, card, facts)
    tensors = {}
    for name, factors in adapter.modules.items():
        tensors |= _flat_lora(f"diffusion_model.decoder.{name}", factors)
    return _save(tensors, file, _header(adapter, card, facts))


def save_lycoris(adapter: Adapter, file: Path, card: Card | None = None, facts: dict | None = None) -> Path:
    """A file with LyCORIS' keys; for LoKr with the `lokr_config` header from which ACE-Step's app rebuilds the network.

    The app rebuilds every module with one rank: where ranks differ, the factors are written as whole matrices, which need none.
    """
    if adapter.kind == "oft":
        raise UserError("LyCORIS' OFT rotates outputs, peft's inputs: one cannot stand for the other.", MERGE_INSTEAD)
    header = _header(adapter, card, facts)
    if adapter.kind == "lokr":
        settings = settings_of(adapter)
        full = len(set(settings.ranks.values())) > 1
        adapter = with_full_factors(adapter) if full else adapter
        header |= {"algo": "lokr", "lokr_config": json.dumps(_lokr_config(adapter, settings, full))}
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.modules.items():
        prefix = f"lycoris_{name.replace('.', '_')}"
        if adapter.kind == "lora":
            tensors |= _flat_lora(prefix, factors)
            continue
        tensors |= {f"{prefix}.{factor}": tensor for factor, tensor in factors.items() if factor != MAGNITUDE}
        rank = settings.ranks[name] if adapter.kind == "lokr" else factors["hada_w1_b"].shape[0]
        tensors[f"{prefix}.alpha"] = torch.tensor(float(rank))
        if MAGNITUDE in factors:
            tensors[f"{prefix}.dora_scale"] = factors[MAGNITUDE].unsqueeze(1)
    return _save(tensors, file, header)


def _flat_lora(prefix: str, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {
        f"{prefix}.lora_down.weight": factors["lora_A"],
        f"{prefix}.lora_up.weight": factors["lora_B"],
        f"{prefix}.alpha": torch.tensor(float(factors["lora_A"].shape[0])),
    }
    if MAGNITUDE in factors:
        tensors[f"{prefix}.dora_scale"] = factors[MAGNITUDE].unsqueeze(1)
    return tensors


def _lokr_config(adapter: Adapter, settings, full: bool) -> dict[str, Any]:
    """What ACE-Step's app hands to LyCORIS. `target_modules` are full names: modules that were not trained stay without an adapter."""
    return {
        "linear_dim": settings.rank,
        "linear_alpha": settings.rank,
        "factor": settings.factor,
        "decompose_both": settings.decompose_both and not full,
        "full_matrix": full,
        "weight_decompose": adapter.has_magnitudes,
        "use_tucker": False,
        "use_scalar": False,
        "bypass_mode": False,
        "rs_lora": False,
        "unbalanced_factorization": False,
        "target_modules": list(adapter.modules),
    }


def _peft_factor(factor: str) -> str:
    suffix = {
        MAGNITUDE: "lora_magnitude_vector",
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "oft_R": "oft_R.weight",
    }
    return suffix.get(factor, factor)


def needs_placeholder(adapter: Adapter) -> bool:
    """Whether a PEFT folder of this adapter needs one more module, which changes nothing.

    diffusers renames original names only in a file that has a q_proj or k_proj; without one it loads nothing and says so in a log line.
    """
    return adapter.kind == "lora" and not any(name.endswith((".q_proj", ".k_proj")) for name in adapter.modules)


@torch.no_grad()
def with_placeholder(adapter: Adapter, layer: nn.Linear) -> Adapter:
    """The adapter with factors that change nothing for the base's `PLACEHOLDER` layer (which may be quantised, but for a DoRA)."""
    first = next(iter(adapter.modules.values()))["lora_A"]
    rank = Counter(adapter.ranks.values()).most_common(1)[0][0]
    factors = {"lora_A": first.new_zeros(rank, layer.in_features), "lora_B": first.new_zeros(layer.out_features, rank)}
    if adapter.has_magnitudes:
        factors[MAGNITUDE] = torch.linalg.norm(dequantize_module_weight(layer).float(), dim=1).to("cpu", first.dtype)
    return dataclasses.replace(adapter, placeholder=factors)


def _peft_config(adapter: Adapter, card: Card | None) -> dict[str, Any]:
    """adapter_config.json: alpha = r, per module where ranks differ, full original names."""
    shared: dict[str, Any] = {
        "target_modules": list(adapter.modules),
        "base_model_name_or_path": (card.base_model if card else "") or None,
        "inference_mode": True,
    }
    if adapter.kind == "oft":
        sizes = set(adapter.ranks.values())
        if len(sizes) > 1:
            raise UserError("peft's OFT has one block size for all modules; this adapter has several.", MERGE_INSTEAD)
        return _plain(OFTConfig(oft_block_size=sizes.pop(), **shared))
    ranks = adapter.ranks
    if adapter.kind == "lokr":
        lokr = settings_of(adapter)
        ranks = lokr.ranks
        shared |= {"decompose_factor": lokr.factor, "decompose_both": lokr.decompose_both}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: r for name, r in ranks.items() if r != rank}
    shared |= {"r": rank, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    if adapter.kind == "lora":
        return _plain(
            LoraConfig(lora_alpha=rank, use_dora=adapter.has_magnitudes, lora_dropout=0.0, bias="none", **shared)
        )
    return _plain({"lokr": LoKrConfig, "loha": LoHaConfig}[adapter.kind](alpha=rank, **shared))


def _plain(config) -> dict[str, Any]:
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def _diffusers_header(adapter: Adapter) -> str:
    """`lora_adapter_metadata`: the LoraConfig that diffusers builds, in its own module names."""
    rank = Counter(adapter.ranks.values()).most_common(1)[0][0]
    pattern = {to_diffusers(name): r for name, r in adapter.ranks.items() if r != rank}
    config = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": [to_diffusers(name) for name in adapter.modules],
        "use_dora": adapter.has_magnitudes,
        "lora_bias": False,
    }
    return json.dumps({f"transformer.{name}": value for name, value in config.items()}, sort_keys=True)


def _header(adapter: Adapter, card: Card | None, facts: dict | None = None) -> dict[str, str]:
    noted = {
        "program": f"Side-Step {__version__}",
        "kind": adapter.title,
        **adapter.facts,
        **(card.facts() if card else {}),
        **(facts or {}),
    }
    if adapter.kind == "lokr":
        noted["ranks"] = adapter.ranks
    return {"format": "pt", HEADER: json.dumps(noted, sort_keys=True, ensure_ascii=False)}


def _save(tensors: dict[str, Tensor], file: Path, header: dict[str, str]) -> Path:
    with replacing(file) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            temporary,
            metadata=header,
        )
    return file


COMFYUI_NAMES = (
    "base_model.model.layers.",
    "diffusion_model.decoder.layers.",
    "lycoris_layers_",
    "lora_unet_decoder_layers_",
)


@dataclass(frozen=True)
class Applied:
    """What a program does with a file. `strength`: least and greatest of its modules, 1 being what the file states; None: not read."""

    program: str
    strength: tuple[float, float] | None
    note: str = ""

    def __str__(self) -> str:
        if self.strength is None:
            return "not read"
        low, high = self.strength
        return f"{low:g}" if abs(high - low) < 1e-6 * max(abs(low), abs(high), 1) else f"{low:g} to {high:g}"


def applied_by_each(found: Found, keys: list[str]) -> list[Applied]:
    """How ACE-Step's app, ComfyUI, diffusers and Side-Step apply a file. keys: its tensor names."""
    return [Applied("Side-Step", (1.0, 1.0)), _app(found), _comfyui(found, keys), _diffusers(found, keys)]


def _ratio(found: Found, scales: dict[str, float]) -> tuple[float, float]:
    ratios = [scales[name] / stated if (stated := found.scale(name)) else 1.0 for name in found.modules]
    return min(ratios), max(ratios)


def _app(found: Found) -> Applied:
    program = "ACE-Step's app"
    if found.config:
        if (found.path.parent / LOKR_WEIGHTS).is_file():
            return Applied(program, (1.0, 1.0), f"takes {LOKR_WEIGHTS} beside it")
        return Applied(program, (1.0, 1.0), f"alpha and rank from {PEFT_CONFIG}")
    if found.kind == "lokr" and ("lokr_config" in found.header or found.path.name == LOKR_WEIGHTS):
        if "lokr_config" not in found.header:
            return Applied(program, None, "there is no lokr_config in its header: the app would guess the shapes")
        if found.stated_by != "lokr_config":
            return Applied(program, (1.0, 1.0), "full matrices")
        scales = {name: found.stated.get(name, 1.0) for name in found.modules}
        return Applied(
            program, _ratio(found, scales), "linear_alpha / linear_dim of lokr_config; alpha tensors are not used"
        )
    return Applied(program, None, f"needs a folder with {PEFT_CONFIG}: export --format peft")


def _comfyui(found: Found, keys: list[str]) -> Applied:
    if found.kind == "oft":
        return Applied("ComfyUI", None, "its OFT is another one: export --format merged")
    foreign = [key for key in keys if not key.startswith(COMFYUI_NAMES)]
    if foreign:
        return Applied("ComfyUI", None, f"does not know names such as {foreign[0]}: export --format comfyui")
    if any("magnitude" in key for key in keys):
        return Applied(
            "ComfyUI",
            (1.0, 1.0),
            "without the magnitudes, so not as trained: export --format comfyui --base CHECKPOINT_DIR",
        )
    if any(key.endswith(".dora_scale") for key in keys):
        return Applied(
            "ComfyUI",
            (1.0, 1.0),
            "magnitudes over other norms, so not as trained: export --format comfyui --base CHECKPOINT_DIR",
        )
    scales = {}
    for name, factors in found.modules.items():
        rank = lora_rank(factors)
        scales[name] = found.alphas[name] / rank if name in found.alphas and rank else 1.0
    return Applied(
        "ComfyUI", _ratio(found, scales), "alpha tensors" if found.alphas else "no alpha tensors: 1 · up · down"
    )


def _diffusers(found: Found, keys: list[str]) -> Applied:
    if found.kind != "lora":
        return Applied("diffusers", None, "takes LoRA and DoRA only: export --format merged")
    if found.alphas:
        return Applied("diffusers", None, "refuses alpha tensors: export --format diffusers")
    spellings = {spelling(key) for key in keys}
    if spellings == {"base_model.model."} and not any("q_proj" in key or "k_proj" in key for key in keys):
        return Applied(
            "diffusers", None, "loads nothing from original names without a q_proj or k_proj: export --format diffusers"
        )
    if not spellings <= {"base_model.model.", "transformer."} or len(spellings) > 1:
        return Applied("diffusers", None, "does not know these names: export --format diffusers")
    if DIFFUSERS_HEADER in found.header:
        return Applied("diffusers", (1.0, 1.0), f"alpha and rank from {DIFFUSERS_HEADER} in the header")
    return Applied("diffusers", _ratio(found, dict.fromkeys(found.modules, 1.0)), f"no {DIFFUSERS_HEADER}: 1 · B · A")
