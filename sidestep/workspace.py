"""What is on disk, read without torch: checkpoints, folders of tensors, past runs."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep import variants

LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself


@dataclass(frozen=True)
class FoundModel:
    """A model below a checkpoint folder. `parameters`: 0 where the weights could not be counted. `problem`: why it cannot be used, or empty."""

    name: str  # what --model-variant takes
    variant: str
    is_turbo: bool
    parameters: int
    layout: str  # original or diffusers
    problem: str = ""

    @property
    def size(self) -> str:
        """`2.4 B`, `5.0 B`, `0.3 M`."""
        count = self.parameters
        return "" if not count else f"{count / 1e9:.1f} B" if count >= 1e8 else f"{count / 1e6:.1f} M"

    @property
    def title(self) -> str:
        """`acestep-v15-turbo  (turbo, 2.4 B)`."""
        facts = ", ".join(fact for fact in (self.variant, self.size, self.problem) if fact)
        return f"{self.name}  ({facts})"


@dataclass(frozen=True)
class FoundRun:
    """A run's output folder. `checkpoints`: names of those that are complete, the oldest first."""

    folder: Path
    settings: dict[str, Any]
    checkpoints: tuple[str, ...]
    finished: bool


def find_models(checkpoint_dir: Path) -> list[FoundModel]:
    """The models that `--checkpoint-dir` offers: its own, or those of its subfolders; official ones first, each set by name.

    A single file does not say which official model it descends from: all of them are offered.
    """
    if checkpoint_dir.is_file() and checkpoint_dir.suffix.lower() == ".safetensors":
        return _models_of_file(checkpoint_dir)
    if not checkpoint_dir.is_dir():
        return []
    own = _model(checkpoint_dir)
    if own is not None:
        return [own]
    models = [model for folder in _folders(checkpoint_dir) if (model := _model(folder)) is not None]
    order = list(variants.OFFICIAL_FOLDERS.values())
    return sorted(models, key=lambda m: (order.index(m.name) if m.name in order else len(order), m.name.lower()))


def short_name(folder_name: str) -> str:
    """The variant's name for an official folder (`turbo`), else the folder's own."""
    return next((short for short, folder in variants.OFFICIAL_FOLDERS.items() if folder == folder_name), folder_name)


def likely_checkpoint_dirs(start: Path) -> list[Path]:
    """Folders near `start` and in the user's home that hold models; those near by relative to it, as `start` is given."""
    names = ("checkpoints", "ACE-Step-1.5/checkpoints", "ACE-Step/checkpoints", "Ace-Step1.5", "models/ACE-Step-1.5")
    places = [root / name for root in (start, start / "..", Path.home()) for name in names]
    return [place for place in dict.fromkeys(places) if find_models(place)]


def count_tensors(folder: Path) -> int:
    """How many `.pt` records stand in a folder and its subfolders."""
    return sum(1 for path in folder.rglob("*.pt") if not path.name.startswith(".")) if folder.is_dir() else 0


def find_runs(folder: Path) -> list[FoundRun]:
    """The runs in a folder (itself, or its subfolders), the newest first."""
    candidates = [folder, *_folders(folder)] if folder.is_dir() else []
    runs = [run for candidate in candidates if (run := read_run(candidate)) is not None]
    return sorted(runs, key=lambda run: (run.folder / "config.json").stat().st_mtime, reverse=True)


def read_run(folder: Path) -> FoundRun | None:
    """The run whose output folder this is, or None."""
    settings = _read_json(folder / "config.json")
    if settings is None or "dataset_dir" not in settings:
        return None
    return FoundRun(folder, settings, _complete_checkpoints(folder / "checkpoints"), (folder / "final" / "adapter_config.json").is_file())


def _complete_checkpoints(folder: Path) -> tuple[str, ...]:
    steps: list[tuple[int, str]] = []
    for checkpoint in _folders(folder):
        position = (_read_json(checkpoint / "complete.json") or {}).get("position")  # the file that training writes last
        if isinstance(position, dict) and isinstance(position.get("step"), int):
            steps.append((position["step"], checkpoint.name))
    return tuple(name for _, name in sorted(steps))


def safetensors_parameters(path: Path) -> int:
    """Numbers in a safetensors file, by its header. Raises ValueError when it is none (a Git LFS pointer, a cut download)."""
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise ValueError("Git LFS pointer instead of weights")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else LARGEST_HEADER_BYTES + 1
        if length > LARGEST_HEADER_BYTES:
            raise ValueError("not a safetensors file")
        header = json.loads(file.read(length))
        end = file.seek(0, 2)
    tensors = [facts for name, facts in header.items() if name != "__metadata__"]
    if tensors and end < 8 + length + max(facts["data_offsets"][1] for facts in tensors):
        raise ValueError("cut short")
    total = 0
    for facts in tensors:
        count = 1
        for size in facts["shape"]:
            count *= size
        total += count
    return total


def _model(folder: Path) -> FoundModel | None:
    if (folder / "model_index.json").is_file() and (folder / "transformer").is_dir():
        layout, weights, config = "diffusers", folder / "transformer", _read_json(folder / "transformer" / "config.json")
    else:
        layout, weights, config = "original", folder, _read_json(folder / "config.json")
        if config is None or not ({"is_turbo", "model_version", "timestep_mu"} & set(config)):
            return None
    if config is None:
        return FoundModel(folder.name, "unknown", False, 0, layout, "config.json cannot be read")
    try:
        variant = variants.detect(config)
        parameters = sum(safetensors_parameters(path) for path in sorted(weights.glob("*.safetensors")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return FoundModel(folder.name, "unknown", False, 0, layout, f"weights unreadable: {error}")
    problem = "" if parameters else "no weights: download again"
    return FoundModel(folder.name, variant.name, variant.is_turbo, parameters, layout, problem)


def _models_of_file(file: Path) -> list[FoundModel]:
    try:
        parameters = safetensors_parameters(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [FoundModel(file.name, "unknown", False, 0, "single file", f"weights unreadable: {error}")]
    stated = _read_json(file.with_suffix(".json"))
    if stated is not None:
        variant = variants.detect(stated)
        return [FoundModel(file.name, variant.name, variant.is_turbo, parameters, "single file", "")]
    return [FoundModel(folder, name, "turbo" in name, parameters, "single file", "") for name, folder in variants.OFFICIAL_FOLDERS.items()]


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _read_json(path: Path) -> dict | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
