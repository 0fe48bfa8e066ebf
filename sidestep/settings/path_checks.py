"""What is on disk, read without torch: checkpoints, folders of tensors, past runs.

What a folder or file should hold to be an answer, in a line: "12 tensors", "no .pt here: preprocess first".
"""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep import variants
from sidestep.errors import UserError
from sidestep.words import count

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
        number = self.parameters
        return "" if not number else f"{number / 1e9:.1f} B" if number >= 1e8 else f"{number / 1e6:.1f} M"

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
    return FoundRun(
        folder,
        settings,
        _complete_checkpoints(folder / "checkpoints"),
        (folder / "final" / "adapter_config.json").is_file(),
    )


def _complete_checkpoints(folder: Path) -> tuple[str, ...]:
    steps: list[tuple[int, str]] = []
    for checkpoint in _folders(folder):
        position = (_read_json(checkpoint / "complete.json") or {}).get(
            "position"
        )  # the file that training writes last
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
        total += math.prod(facts["shape"])
    return total


def _model(folder: Path) -> FoundModel | None:
    if (folder / "model_index.json").is_file() and (folder / "transformer").is_dir():
        layout, weights, config = (
            "diffusers",
            folder / "transformer",
            _read_json(folder / "transformer" / "config.json"),
        )
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
    return [
        FoundModel(folder, name, "turbo" in name, parameters, "single file", "")
        for name, folder in variants.OFFICIAL_FOLDERS.items()
    ]


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


DOWNLOAD = "uv run hf download ACE-Step/Ace-Step1.5 --local-dir checkpoints"

Look = Callable[[Path], str]


def checkpoints(folder: Path) -> str:
    """A folder of models, or ComfyUI's single file. Raises UserError naming what is there instead."""
    _there(folder, folder.is_dir() or (folder.suffix.lower() == ".safetensors" and folder.is_file()))
    models = find_models(folder)
    usable = [model for model in models if not model.problem]
    if usable:
        broken = [model.title for model in models if model.problem]
        return count(len(usable), "model") + (f"; not usable: {', '.join(broken)}" if broken else "")
    if models:
        raise UserError(
            f"No usable model here: {', '.join(model.title for model in models)}.", f"Download again: {DOWNLOAD}"
        )
    inside = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())[:6])
    raise UserError(f"No ACE-Step model here (folders: {inside or 'none'}).", f"Download one: {DOWNLOAD}")


def tensors(folder: Path, songs: Look) -> str:
    """A folder of training tensors. Raises UserError; songs without tensors get the advice to preprocess."""
    _there(folder, folder.is_dir())
    if found := count_tensors(folder):
        return count(found, "song") + " as tensors"
    try:
        found = songs(folder)
    except UserError:
        raise UserError(
            "No .pt tensors here.", "Preprocess some audio first, or choose the folder it was written to."
        ) from None
    raise UserError(
        f"No .pt tensors here, but {found}: preprocess first?", "Go back to the menu and choose Preprocess audio."
    )


def songs_or_list(path: Path, songs: Look) -> str:
    """A folder of audio, or a dataset.json. Raises UserError."""
    if path.suffix.lower() == ".json":
        return dataset_list(path)
    _there(path, path.is_dir())
    found = songs(path)
    return found + (
        "; choose its dataset.json to use the captions in there" if (path / "dataset.json").is_file() else ""
    )


def dataset_list(path: Path) -> str:
    """A dataset.json. Raises UserError; its content is checked when it is used."""
    _there(path, path.is_file())
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Not readable as JSON: {error}.") from None
    samples = data.get("samples") if isinstance(data, dict) else data
    if not isinstance(samples, list) or not samples:
        raise UserError("No songs are listed in it.", "Build it from a folder of songs: choose Build dataset.")
    return count(len(samples), "song") + " listed"


def new_run(folder: Path) -> str:
    """A folder for a new run. Raises UserError where one stands already."""
    _writable(folder)
    if read_run(folder) is not None or (folder / "final").is_dir():
        raise UserError("A run stands there already.", "Choose another folder, or Resume a run in the menu.")
    return "" if folder.exists() else "a new folder"


def new_folder(folder: Path) -> str:
    """A folder to write to, new or not. Raises UserError."""
    _writable(folder)
    found = count_tensors(folder)
    return (
        f"{count(found, 'song')} there already: what is unchanged is kept"
        if found
        else ""
        if folder.exists()
        else "a new folder"
    )


def adapter(path: Path) -> str:
    """An adapter: a folder with its config, or a file of weights. Raises UserError."""
    _there(path, path.exists())
    if path.is_dir() and not (path / "adapter_config.json").is_file() and not any(path.glob("*.safetensors")):
        inside = [place.parent.name for place in sorted(path.glob("*/adapter_config.json"))]
        raise UserError(
            "No adapter here.",
            f"There is one in: {', '.join(inside)}." if inside else "Choose the final/ folder of a run.",
        )
    return ""


def run(folder: Path) -> str:
    """The output folder of a run that can go on. Raises UserError."""
    _there(folder, folder.is_dir())
    found = read_run(folder)
    if found is None:
        raise UserError("No run here: no config.json of one.", "Choose the --output-dir of a run.")
    if not found.checkpoints:
        raise UserError("This run has no checkpoint to go on from.", "Start it again: choose Train.")
    return f"saved: {', '.join(found.checkpoints[-5:])}"


def fresh(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, … that does not exist."""
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _there(path: Path, ok: bool) -> None:
    if ok:
        return
    if path.exists():
        raise UserError(f"That is a {'folder' if path.is_dir() else 'file'}.")
    parent = next((p for p in path.parents if p.is_dir()), None)
    known = f"; {parent} is there" if parent and parent not in (Path(), Path(path.anchor)) else ""
    raise UserError(f"There is no such folder or file{known}.")


def _writable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError("That is a file.")
    blocking = next((parent for parent in folder.parents if parent.exists() and not parent.is_dir()), None)
    if blocking is not None:
        raise UserError(f"{blocking} is a file.")
