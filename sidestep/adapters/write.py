"""Write an adapter the way each program reads it, and say what each program makes of a file.

The strength is the same in every form: alpha/r is in the factors and alpha = r is stated (acestep-facts, section 5).
A folder has a model card beside its weights. Which program reads which form: `programs.WAYS`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
from torch import Tensor

from sidestep import __version__
from sidestep.adapters.adapter import (
    MAGNITUDE,
    MERGE_INSTEAD,
    Adapter,
    change_of,
    lokr_settings,
    most_common,
    not_finite,
    with_full_factors,
)
from sidestep.adapters.attach import adapter_of, settings_of
from sidestep.adapters.layers import KINDS
from sidestep.adapters.names import comfyui_key, diffusers_key, lycoris_key, peft_key, to_diffusers
from sidestep.adapters.programs import WAYS
from sidestep.adapters.read import (
    AGAIN,
    COMFYUI_MAGNITUDES,
    DIFFUSERS_HEADER,
    DIGEST,
    HEADER,
    LOHA_WEIGHTS,
    LOKR_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    digest_of,
    lora_rank,
)
from sidestep.errors import JobError, UserError
from sidestep.files import replacing, write_text
from sidestep.settings.config import TrainConfig
from sidestep.settings.option import as_json_values
from sidestep.words import clock

PLACEHOLDER = "layers.0.self_attn.q_proj"
PRIVATE = (
    "dataset_dir",
    "output_dir",
    "checkpoint_dir",
    "resume_from",
)  # tell nothing of the adapter, but may tell names


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

    @classmethod
    def of(cls, adapter: Adapter) -> "Card":
        """What a file says of the run that its adapter comes from."""
        name, base_model, tag = (str(adapter.metadata.get(key, "")) for key in ("name", "base_model", "tag"))
        return cls(name=name, base_model=base_model, tag=tag)


def save_final(
    model: PeftModel,
    folder: Path,
    config: TrainConfig,
    state: dict[str, Tensor] | None = None,
    card: Card | None = None,
) -> None:
    """Write the adapter of `model` as the universal folder of acestep-facts, section 5.

    state: tensors by the names of `adapter_state`, where they are not the model's own (an average, a snapshot). card:
    what the run knows of itself; the settings come from `config`. Raises JobError rather than save a NaN.
    """
    settings = {name: value for name, value in as_json_values(config).items() if name not in PRIVATE}
    fingerprint = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    card = card or Card(base_model=config.model_variant, hints_ratio=config.hints_ratio)
    adapter = adapter_of(model, state)
    bad = not_finite(adapter)
    if bad:
        raise JobError(
            f"The adapter holds numbers that are not finite, first in {bad[0]}: it is not saved.",
            "Go on from the last checkpoint with a lower --lr.",
        )
    if needs_placeholder(adapter):
        layer: Any = model.get_submodule(f"base_model.model.{to_diffusers(PLACEHOLDER)}")
        shape = (layer.out_features, layer.in_features)
        adapter = with_placeholder(adapter, shape, lambda: dequantize_module_weight(layer))
    save_folder(adapter, folder, replace(card, settings=settings, config_fingerprint=fingerprint.hexdigest()))


def save_language_adapter(
    model: PeftModel, folder: Path, state: Mapping[str, Tensor] | None = None, card: Card | None = None
) -> None:
    """Write the LoRA of a language model as peft's folder for its Qwen3ForCausalLM.

    The adapter sits on the trunk inside of that: its names get the `model.` that stands before them there.
    """
    adapter, card = adapter_of(model, state), card or Card()
    tensors = {
        f"base_model.model.model.{name}.{factor}.weight": tensor.contiguous()
        for name, factors in adapter.modules.items()
        for factor, tensor in factors.items()
    }
    rank = most_common(adapter.ranks)[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": card.base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapter.modules}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "adapter_model.safetensors") as temporary:
        note = json.dumps({"base_model": card.base_model, "steps": card.steps}, sort_keys=True)
        save_file(tensors, temporary, {"format": "pt", HEADER: note})
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def save_folder(adapter: Adapter, folder: Path, card: Card | None = None) -> list[Path]:
    """Write the folder that every program which can read this kind of adapter reads; returns its files."""
    card, written = card or Card(), []
    if adapter.kind in ("lokr", "loha"):
        file = folder / (LOKR_WEIGHTS if adapter.kind == "lokr" else LOHA_WEIGHTS)
        written.append(save_lycoris(adapter, file, card))
    if adapter.kind == "lora" or not adapter.has_magnitudes:
        written += save_peft(adapter, folder, card)
    write_text(folder / "README.md", model_card(adapter, card))
    return [*written, folder / "README.md"]


def save_peft(adapter: Adapter, folder: Path, card: Card | None = None) -> list[Path]:
    """A PEFT folder in original names, which diffusers, ComfyUI and acestep.cpp read too (OFT: peft only).

    acestep.cpp knows no alpha_pattern and divides `lora_alpha` by each module's own rank; where that is not stated it
    takes the rank itself. So a LoRA of several ranks states each module's alpha and none for all. A LoKr it reads in
    LyCORIS' names only, so the factors stand there once more.
    """
    if adapter.kind != "lora" and adapter.has_magnitudes:
        raise UserError(
            f"peft has no {adapter.title}.",
            "Export it with --format lycoris, or merge it: --format merged --base CHECKPOINT_DIR",
        )
    header: dict[str, Any] = {}
    if needs_placeholder(adapter):
        if adapter.placeholder is None:
            raise UserError(
                "diffusers reads original names only beside a q_proj or k_proj; this adapter has neither, "
                "and the size of one follows from the base alone.",
                "Add --base CHECKPOINT_DIR, or use --format diffusers for diffusers and --format comfyui for ComfyUI.",
            )
        modules = {PLACEHOLDER: adapter.placeholder, **adapter.modules}
        ranks = {PLACEHOLDER: adapter.placeholder["lora_A"].shape[0], **adapter.ranks}
        adapter = replace(adapter, modules=modules, ranks=ranks)
        header["placeholder"] = PLACEHOLDER
    again, texts = {}, {}
    if adapter.kind == "lokr":
        header[AGAIN] = "lycoris_"
        again, texts = _lycoris_form(with_full_factors(adapter, ("lokr_w1",)))
    texts |= _header(adapter, card, header)
    if adapter.kind == "lora":
        texts[DIFFUSERS_HEADER] = _diffusers_header(adapter)
    settings, targets = settings_of(adapter, str)
    config = KINDS[settings.adapter_type].config(settings, targets)
    config.base_model_name_or_path = (card.base_model if card else "") or None
    config.inference_mode = True
    said = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    if adapter.kind == "lora" and said["rank_pattern"]:
        del said["lora_alpha"]
        said["alpha_pattern"] = adapter.ranks
    written = _save(_keyed(adapter, peft_key) | again, folder / PEFT_WEIGHTS, texts)
    write_text(folder / PEFT_CONFIG, json.dumps(said, indent=2, sort_keys=True))
    return [written, folder / PEFT_CONFIG]


def save_diffusers(adapter: Adapter, file: Path, card: Card | None = None) -> Path:
    """A file in diffusers' own names."""
    if adapter.kind != "lora":
        raise UserError(f"diffusers refuses {adapter.title} files for ACE-Step; it loads LoRA and DoRA.", MERGE_INSTEAD)
    texts = {**_header(adapter, card), DIFFUSERS_HEADER: _diffusers_header(adapter)}
    return _save(_keyed(adapter, diffusers_key), file, texts)


def save_comfyui(
    adapter: Adapter, file: Path, card: Card | None = None, weights: Callable[[str], Tensor] | None = None
) -> Path:
    """A single file for ComfyUI, with alpha tensors, in names that old and new versions map.

    weights(name) -> base weight [out, in]: needed where there are magnitudes. ComfyUI divides those of DoRA by the
    norms of the base's rows, not of the changed ones; they are rewritten so that its formula gives the trained weight.
    """
    if adapter.kind == "oft":
        raise UserError("ComfyUI's OFT rotates outputs, peft's inputs: one cannot stand for the other.", MERGE_INSTEAD)
    header = {}
    if adapter.has_magnitudes:
        if weights is None:
            raise UserError(
                f"ComfyUI applies the magnitudes of a {adapter.title} by another formula; "
                "to rewrite them the base is needed.",
                "Add --base CHECKPOINT_DIR",
            )
        modules = {}
        for name, factors in adapter.modules.items():
            weight = weights(name).float()
            ratio = torch.linalg.norm(weight, dim=1) / torch.linalg.norm(weight + change_of(factors), dim=1)
            modules[name] = {**factors, MAGNITUDE: factors[MAGNITUDE].float() * ratio}
        adapter = replace(adapter, modules=modules)
        header[COMFYUI_MAGNITUDES] = True
    return _save(_keyed(_with_alphas(adapter, adapter.ranks), comfyui_key), file, _header(adapter, card, header))


def save_lycoris(adapter: Adapter, file: Path, card: Card | None = None) -> Path:
    """A file with LyCORIS' keys; a LoKr has the `lokr_config` header from which ACE-Step's app rebuilds the network."""
    if adapter.kind == "oft":
        raise UserError("LyCORIS' OFT rotates outputs, peft's inputs: one cannot stand for the other.", MERGE_INSTEAD)
    tensors, texts = _lycoris_form(adapter)
    return _save(tensors, file, texts | _header(adapter, card))


def _lycoris_form(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of an adapter as LyCORIS has it.

    The app rebuilds every module of a LoKr with one rank: where ranks differ, the factors are written as full matrices,
    which need none. acestep.cpp divides the alpha of those, too, by that rank.
    """
    ranks, texts = adapter.ranks, {}
    if adapter.kind == "lokr":
        settings = lokr_settings(adapter)
        rank, others = most_common(settings.ranks)
        ranks = dict.fromkeys(adapter.modules, rank)
        adapter = with_full_factors(adapter) if others else adapter
        app = {
            "linear_dim": rank,
            "linear_alpha": rank,
            "factor": settings.factor,
            "decompose_both": settings.decompose_both and not others,
            "full_matrix": bool(others),
            "weight_decompose": adapter.has_magnitudes,
            **dict.fromkeys(("use_tucker", "use_scalar", "bypass_mode", "rs_lora", "unbalanced_factorization"), False),
            "target_modules": list(adapter.modules),  # full names: what was not trained stays without an adapter
        }
        texts = {"algo": "lokr", "lokr_config": json.dumps(app)}
    return _keyed(_with_alphas(adapter, ranks), lycoris_key), texts


def _keyed(adapter: Adapter, key: Callable[[str, str], str]) -> dict[str, Tensor]:
    return {key(name, factor): t for name, factors in adapter.modules.items() for factor, t in factors.items()}


def _with_alphas(adapter: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """The factors as LyCORIS has them: an alpha in every module, magnitudes [out, 1]."""
    modules = {}
    for name, factors in adapter.modules.items():
        modules[name] = {**factors, "alpha": torch.tensor(float(lora_rank(factors) or ranks[name]))}
        if MAGNITUDE in factors:
            modules[name][MAGNITUDE] = factors[MAGNITUDE].unsqueeze(1)
    return replace(adapter, modules=modules)


def needs_placeholder(adapter: Adapter) -> bool:
    """Whether a PEFT folder of this adapter needs one more module, which changes nothing.

    diffusers renames original names only in a file that has a q_proj or k_proj; without one it loads nothing.
    """
    return adapter.kind == "lora" and not any(name.endswith((".q_proj", ".k_proj")) for name in adapter.modules)


@torch.no_grad()
def with_placeholder(adapter: Adapter, shape: tuple[int, int], weight: Callable[[], Tensor]) -> Adapter:
    """The adapter with factors that change nothing of the base's `PLACEHOLDER`. weight(): [out, in], for a DoRA."""
    first = next(iter(adapter.modules.values()))["lora_A"]
    rank = most_common(adapter.ranks)[0]
    factors = {"lora_A": first.new_zeros(rank, shape[1]), "lora_B": first.new_zeros(shape[0], rank)}
    if adapter.has_magnitudes:
        factors[MAGNITUDE] = torch.linalg.norm(weight().float(), dim=1).to("cpu", first.dtype)
    return replace(adapter, placeholder=factors)


def _header(adapter: Adapter, card: Card | None, more: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The texts of a file's header: format, and our own entry with what is known of the adapter and its run."""
    known = {name: value for name, value in asdict(card or Card()).items() if value and name != "settings"}
    noted = {"program": f"Side-Step {__version__}", "kind": adapter.title, **adapter.metadata, **known, **(more or {})}
    if adapter.kind == "lokr":
        noted["ranks"] = adapter.ranks
    return {"format": "pt", HEADER: json.dumps(noted, sort_keys=True, ensure_ascii=False)}


def _diffusers_header(adapter: Adapter) -> str:
    """`lora_adapter_metadata`: the LoraConfig that diffusers builds, in its own module names."""
    rank, others = most_common(adapter.ranks)
    pattern = {to_diffusers(name): r for name, r in others.items()}
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


def _save(tensors: Mapping[str, Tensor], file: Path, header: dict[str, str]) -> Path:
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(file) as temporary:
        save_file(copies, temporary, metadata=header | {DIGEST: digest_of(copies, header)})
    return file


def model_card(adapter: Adapter, card: Card) -> str:
    """README.md of an adapter folder. Texts that come from outside are quoted as JSON, which YAML reads as it is."""
    ranks = sorted(set(adapter.ranks.values()))
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]} to {ranks[-1]}"
    base = card.base_model or "ACE-Step 1.5"
    music = f", {clock(card.audio_seconds)} of music" if card.audio_seconds else ""
    rows = [("adapter", f"{adapter.title}, {len(adapter.modules)} modules, {rank}")]
    if card.tag:
        rows.append(("trigger tag", f"`{_line(card.tag)}`"))
    if card.songs:
        rows.append(("data", f"{card.songs} songs{music}"))
    if card.steps:
        rows.append(("training", f"{card.steps} optimizer steps{f', {card.epochs} epochs' if card.epochs else ''}"))
    if card.hints_ratio:
        rows.append(("thinking mode", f"{card.hints_ratio:.0%} of the steps were trained with the app's hints"))
    rows.append(("licence", "(fill in)"))
    weights = LOKR_WEIGHTS if adapter.kind == "lokr" else PEFT_WEIGHTS
    how = {
        "ACE-Step's app": "choose this folder in the LoRA tab",
        "ComfyUI": f"put `{weights}` into `models/loras` and use *Load LoRA (Model)*",
        "diffusers": "`pipe.load_lora_weights(folder)` with `AceStepPipeline`",
        "acestep.cpp": "name this folder as its adapter",
    }
    ways = {program: WAYS[adapter.title][program] for program in how}
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
        *(f"| {title} | {text} |" for title, text in rows),
        "",
        "## Use",
        "",
        "The strength is folded into the weights and alpha equals the rank: "
        "in these programs strength 1 is the trained strength.",
        "",
        *(f"- {p}: {how[p]}{f'; {way.words}' if way.words else ''}" for p, way in ways.items() if way.is_final),
        *(
            f"- {p} {way.words.replace('final/', 'this folder')}: `uv run train.py export FOLDER "
            f"--format {way.form.removesuffix(' --base')} --base CHECKPOINT_DIR --output …`"
            for p, way in ways.items()
            if not way.is_final
        ),
    ]
    if card.settings:
        settings = json.dumps(dict(card.settings), indent=1, ensure_ascii=False, default=str)
        lines += ["", "## Settings", "", "```json", settings, "```"]
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    """A text from outside on one line, without what Markdown would read."""
    return " ".join(text.split()).replace("|", "/").replace("`", "'")
