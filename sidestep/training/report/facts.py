"""What the report page shows, as plain values: taken from the run in memory and from the previews on disk."""

import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from sidestep.adapters.names import in_model_order, parts, to_original
from sidestep.config import TrainConfig, command_line
from sidestep.options import changed_from_defaults, options_of
from sidestep.training.history import Point
from sidestep.training.previews import BASE, FOLDER
from sidestep.training.run import Run

MOST_POINTS = 1500  # of a curve; longer ones are averaged


def facts_of(run: Run, finished: bool) -> dict[str, Any]:
    """Everything on the page."""
    config, history, position = run.config, run.history, run.position
    songs = [*run.songs, *run.held_out]
    best = history.best
    return {
        "title": config.run_name or config.output_dir.name,
        "finished": finished,
        "written": datetime.now().astimezone().isoformat(timespec="seconds"),
        "adapter": config.adapter_type,
        "model": run.checkpoint.folder.name,
        "device": str(run.device),
        "parameters": sum(p.numel() for p in run.parameters),
        "songs": len(songs),
        "held_out": len(run.held_out),
        "minutes": sum(song.frames for song in songs) / run.frames_per_second / 60,
        "step": position.step,
        "total_steps": run.total_steps,
        "epoch": position.epoch,
        "total_epochs": config.epochs,
        "timesteps": run.law.name,
        "law": run.law.reason,
        "cfg_dropout": run.law.cfg_ratio,
        "best": {"loss": best.loss, "epoch": best.epoch, "by": best.by} if best else None,
        "points": curve(history.points),
        "epoch_losses": [[number, number_or_none(loss)] for number, loss in enumerate(history.epoch_losses, 1)],
        "validation": [[e.step, number_or_none(e.loss), None if e.average_loss is None else number_or_none(e.average_loss)] for e in history.evaluations],
        "bins": [
            {"samples": count, "loss": number_or_none(loss / count) if count else None} for loss, count in zip(history.bin_loss, history.bin_count, strict=True)
        ],
        "ranks": ranks_of(run.model),
        "previews": previews_in(config.output_dir),
        "settings": settings_of(config),
        "command": command_line(config),
    }


def number_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def curve(points: Sequence[Point]) -> list[list[float | None]]:
    """[step, loss, lr, gradient norm, memory in bytes] of each logged step, or means of neighbours where there are very many."""
    size = max(1, -(-len(points) // MOST_POINTS))
    rows = []
    for first in range(0, len(points), size):
        group = points[first : first + size]
        memory = [p.memory_bytes for p in group if p.memory_bytes is not None]
        rows.append([group[-1].step, _mean([p.loss for p in group]), group[-1].lr, _mean([p.grad_norm for p in group]), max(memory) if memory else None])
    return rows


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def ranks_of(model: PeftModel) -> dict[str, int]:
    """Rank of each adapted module by its original name, in model order; of OFT the block size."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            ranks = getattr(layer, "r", None) or {}
            found[to_original(name)] = int(ranks.get("default") or layer.oft_block_size["default"])
    return {name: found[name] for name in in_model_order(found)}


def rank_rows(ranks: dict[str, int]) -> tuple[list[str], list[tuple[int, list[int | None]]]]:
    """(column names, (layer, rank in each column) of each layer); None where a module has no adapter."""
    columns = list(dict.fromkeys(sorted((parts(name)[1:] for name in ranks), key=_column)))
    layers = sorted({parts(name)[0] for name in ranks})
    where = {parts(name): rank for name, rank in ranks.items()}
    return [" ".join(column) for column in columns], [(layer, [where.get((layer, *column)) for column in columns]) for layer in layers]


def _column(column: tuple[str, str]) -> int:
    part, projection = column
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return ("self_attn", "cross_attn", "mlp").index(part) * 10 + order.index(projection)


def previews_in(run_folder: Path) -> list[dict[str, Any]]:
    """Each prompt of a run's previews with what can be heard of it: the base's take and the adapter's, by optimizer step. Paths are URLs."""
    prompts: dict[str, dict[str, Any]] = {}
    for path in sorted((run_folder / FOLDER).glob("*/*.json")):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            prompt, step, epoch = dict(said["prompt"]), int(said["step"]), int(said["epoch"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        audio = path.with_suffix(".flac")
        if not audio.is_file():
            continue
        entry = prompts.setdefault(path.stem, {"prompt": prompt, "base": None, "takes": []})
        url = quote(audio.relative_to(run_folder).as_posix())
        if path.parent.name == BASE:
            entry["base"] = url
        else:
            label = f"epoch {epoch}" if path.parent.name.startswith("epoch") else f"step {step}"
            entry["takes"].append({"step": step, "label": label, "src": url})
    for entry in prompts.values():
        entry["takes"].sort(key=lambda take: take["step"])
    return list(prompts.values())


def settings_of(config: TrainConfig) -> list[dict[str, str]]:
    """The settings that are not at their default: flag, value, default and what it means."""
    options = options_of(TrainConfig)
    return [
        {
            "flag": options[name].flag,
            "value": as_text(value),
            "default": "" if options[name].required else as_text(options[name].default),
            "help": options[name].help,
        }
        for name, value in changed_from_defaults(config).items()
    ]


def as_text(value: Any) -> str:
    """A setting as a person types it."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
