"""What a folder or file should hold to be an answer, in a line: "12 tensors", "no .pt here: preprocess first"."""

import json
from collections.abc import Callable
from pathlib import Path

from sidestep.errors import UserError
from sidestep.workspace import count_tensors, find_models, read_run

DOWNLOAD = "uv run hf download ACE-Step/Ace-Step1.5 --local-dir checkpoints"

Look = Callable[[Path], str]


def checkpoints(folder: Path) -> str:
    """A folder of models, or ComfyUI's single file. Raises UserError naming what is there instead."""
    _there(folder, folder.is_dir() or folder.suffix.lower() == ".safetensors" and folder.is_file())
    models = find_models(folder)
    usable = [model for model in models if not model.problem]
    if usable:
        broken = [model.title for model in models if model.problem]
        return _count(len(usable), "model") + (f"; not usable: {', '.join(broken)}" if broken else "")
    if models:
        raise UserError(f"No usable model here: {', '.join(model.title for model in models)}.", f"Download again: {DOWNLOAD}")
    inside = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())[:6])
    raise UserError(f"No ACE-Step model here (folders: {inside or 'none'}).", f"Download one: {DOWNLOAD}")


def tensors(folder: Path, songs: Look) -> str:
    """A folder of training tensors. Raises UserError; songs without tensors get the advice to preprocess."""
    _there(folder, folder.is_dir())
    count = count_tensors(folder)
    if count:
        return _count(count, "song") + " as tensors"
    try:
        found = songs(folder)
    except UserError:
        raise UserError("No .pt tensors here.", "Preprocess some audio first, or choose the folder it was written to.") from None
    raise UserError(f"No .pt tensors here, but {found}: preprocess first?", "Go back to the menu and choose Preprocess audio.")


def songs_or_list(path: Path, songs: Look) -> str:
    """A folder of audio, or a dataset.json. Raises UserError."""
    if path.suffix.lower() == ".json":
        return dataset_list(path)
    _there(path, path.is_dir())
    found = songs(path)
    return found + ("; choose its dataset.json to use the captions in there" if (path / "dataset.json").is_file() else "")


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
    return _count(len(samples), "song") + " listed"


def new_run(folder: Path) -> str:
    """A folder for a new run. Raises UserError where one stands already."""
    _writable(folder)
    if read_run(folder) is not None or (folder / "final").is_dir():
        raise UserError("A run stands there already.", "Choose another folder, or Resume a run in the menu.")
    return "" if folder.exists() else "a new folder"


def new_folder(folder: Path) -> str:
    """A folder to write to, new or not. Raises UserError."""
    _writable(folder)
    count = count_tensors(folder)
    return f"{_count(count, 'song')} there already: what is unchanged is kept" if count else "" if folder.exists() else "a new folder"


def adapter(path: Path) -> str:
    """An adapter: a folder with its config, or a file of weights. Raises UserError."""
    _there(path, path.exists())
    if path.is_dir() and not (path / "adapter_config.json").is_file() and not any(path.glob("*.safetensors")):
        inside = [place.parent.name for place in sorted(path.glob("*/adapter_config.json"))]
        raise UserError("No adapter here.", f"There is one in: {', '.join(inside)}." if inside else "Choose the final/ folder of a run.")
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
    known = f"; {parent} is there" if parent and parent not in (Path("."), Path(path.anchor)) else ""
    raise UserError(f"There is no such folder or file{known}.")


def _writable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError("That is a file.")
    blocking = next((parent for parent in folder.parents if parent.exists() and not parent.is_dir()), None)
    if blocking is not None:
        raise UserError(f"{blocking} is a file.")


def _count(count: int, thing: str) -> str:
    return f"{count:,} {thing}" + ("" if count == 1 else "s")
