"""The model card beside an adapter: what it is, what it was trained on, and how each program loads it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sidestep.adapters.adapter import Adapter


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
        lines.append(f"| data | {card.songs} songs{f', {card.audio_seconds / 60:.0f} minutes' if card.audio_seconds else ''} |")
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
    lines += [f"- {title}: {how.format(file=file)}" for program, (title, how) in HOW_TO_LOAD.items() if program in programs]
    for program in sorted(set(HOW_TO_LOAD) - set(programs)):
        export = "merged --base CHECKPOINT_DIR" if program != "comfyui" or adapter.kind == "oft" else "comfyui --base CHECKPOINT_DIR"
        lines.append(f"- {HOW_TO_LOAD[program][0]} cannot read this file as it is: `uv run train.py export FOLDER --format {export} --output …`")
    if card.settings:
        lines += ["", "## Settings", "", "```json", json.dumps(dict(card.settings), indent=1, ensure_ascii=False, default=str), "```"]
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/").replace("`", "'")
