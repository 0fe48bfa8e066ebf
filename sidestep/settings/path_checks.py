"""What paths hold, read without torch: models, tensors, runs; the checks of an answer and the values to suggest."""

import hashlib
import itertools
import json
import math
import os
import re
import shlex
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote_to_bytes

from sidestep import variants
from sidestep.errors import UserError
from sidestep.files import ASIDE, HOLDER, expand, files_below
from sidestep.settings.option import Answers, Choice, options_of
from sidestep.words import count, side_step

AUDIO_SUFFIXES = frozenset(  # songs, by their names
    {
        *(".wav", ".wave", ".w64", ".rf64", ".flac", ".mp3", ".mp2", ".ogg", ".oga", ".opus", ".spx", ".m4a", ".m4b"),
        *(".mp4", ".aac", ".aif", ".aiff", ".aifc", ".caf", ".au", ".snd", ".wma", ".asf", ".wv", ".ape", ".tta"),
        *(".mka", ".webm", ".ac3", ".eac3", ".dts", ".amr"),
    }
)
COMPLETE_FILE = "complete.json"  # of a saved state, written last
POSITION = frozenset(("epoch", "step_in_epoch", "step"))  # what it says of how far the run was
RECORDS_INDEX = ".records.json"  # what is known of the tensors in a folder, in it
LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
NEAR_SECONDS = 1.0  # for a look around for songs
NEAR_FOLDERS = 5  # in a folder of albums
WRITTEN_HERE = ("runs", "tensors", "samples", "exports", "side-step-demo")  # not a user's songs
NOT_AN_ADAPTER = (
    "Give an adapter of this model: a PEFT folder, or a .safetensors file of a LoRA, DoRA, LoKr, LoHa or OFT "
    "for ACE-Step 1.5."
)
PROMPTS_EXAMPLE = (
    'A list of prompts: [{"prompt": "warm lofi hip hop", "lyrics": "…", "language": "en", '
    '"duration": 30, "seed": 42}, …]'
)
GIVEN = {  # what to do where a setting names one of these that is not there
    "adapter": NOT_AN_ADAPTER,
    "dataset.json": f"List the songs: {side_step('build-dataset', '--input', 'SONGS')}",
    "prompts": PROMPTS_EXAMPLE,
    "run": f"Past runs: {side_step('history', 'FOLDER')}",
    "words": "Give a text file.",
}
SHORT_SECONDS = 10.0  # a shorter song teaches little: the model knows whole songs


@dataclass(frozen=True)
class FoundModel:
    """A model below a checkpoint folder. `parameters`: 0 where the weights could not be counted.

    `problem`: why it cannot be used, or empty.
    """

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
        return f"{self.name}  ({', '.join(part for part in (self.variant, self.size, self.problem) if part)})"


@dataclass(frozen=True)
class FoundRun:
    """A run's output folder. `checkpoints`: names of those that are complete, the oldest first; `marks`: on the way."""

    folder: Path
    settings: dict[str, Any]
    checkpoints: tuple[str, ...]
    finished: bool
    marks: tuple[str, ...] = ()


def find_models(checkpoint_dir: Path) -> list[FoundModel]:
    """The models that `--checkpoint-dir` offers: its own, or those of its subfolders; official ones first.

    A single file does not say which official model it descends from: all of them are offered.
    """
    if checkpoint_dir.is_file() and checkpoint_dir.suffix.lower() == ".safetensors":
        try:
            parameters = safetensors_parameters(checkpoint_dir)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"weights unreadable: {error}"
            return [FoundModel(checkpoint_dir.name, "unknown", False, 0, "single file", problem)]
        stated = _read_json(checkpoint_dir.with_suffix(".json"))
        if stated is not None:
            variant = variants.detect(stated, checkpoint_dir.stem)
            return [FoundModel(checkpoint_dir.name, variant.name, variant.is_turbo, parameters, "single file", "")]
        return [
            FoundModel(folder, name, "turbo" in name, parameters, "single file", "")
            for name, folder in variants.OFFICIAL_FOLDERS.items()
        ]
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
    """Folders near `start` and in the user's home that hold models; near ones relative to it, as `start` is given."""
    names = ("checkpoints", "ACE-Step-1.5/checkpoints", "ACE-Step/checkpoints", "Ace-Step1.5", "models/ACE-Step-1.5")
    folders = [root / name for root in (start, start / "..", expand("~")) for name in names]
    return [folder for folder in dict.fromkeys(folders) if find_models(folder)]


def require_songs(folder: Path | None) -> Path:
    """The folder of `--audio-dir`. Raises UserError where there is none."""
    if not folder or not folder.is_dir():
        raise UserError(f"--audio-dir {folder}: no such folder.", "Give the folder that holds the songs.")
    return folder


def require_tensors(folder: Path, checkpoint_dir: Path, flag: str = "--dataset-dir") -> str:
    """What to do about a folder of tensors in which something is wrong. Raises UserError where there is no folder."""
    preprocess = ("preprocess", "--audio-dir", "SONGS", "--tensor-output", folder, "--checkpoint-dir", checkpoint_dir)
    again = f"Preprocess first: {side_step(*preprocess)}"
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder.", again)
    return again


def require_given(config: Any) -> None:
    """Raises UserError for what a config names to be read, of the kinds in `GIVEN`, and is not there."""
    given = [(o, getattr(config, name)) for name, o in options_of(type(config)).items() if o.holds in GIVEN]
    for o, path in given:
        if path and not path.exists():
            where = f"{o.flag} {path}" if o.flag.startswith("-") else path
            raise UserError(f"{where}: no such file or folder.", GIVEN[o.holds])
    for path in getattr(config, "adapters", ()):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder.", NOT_AN_ADAPTER)


def count_tensors(folder: Path) -> int:
    """How many `.pt` records a folder and its subfolders hold."""
    return sum(path.suffix == ".pt" for path in files_below(folder, hidden=False))


def find_runs(folder: Path) -> Iterator[FoundRun]:
    """The runs in a folder (itself, or its subfolders), the newest first; each is read when it is asked for."""
    dated = []
    for candidate in (folder, *_folders(folder)):
        with suppress(OSError):
            dated.append(((candidate / "config.json").stat().st_mtime, candidate))
    for _, candidate in sorted(dated, reverse=True):
        if run := read_run(candidate):
            yield run


def run_settings(file: Path) -> dict[str, Any]:
    """The settings in a run's config.json to start another one with: all but where its results went.

    Raises UserError where it is none.
    """
    settings = _read_json(file)
    if settings is None or "dataset_dir" not in settings:
        raise UserError(f"--config {file}: not the config.json of a run.", "Give runs/NAME/config.json of one.")
    own = ("output_dir", "resume_from", "run_name")
    return {name: value for name, value in settings.items() if name not in own and value is not None}


def read_run(folder: Path) -> FoundRun | None:
    """The run whose output folder this is, or None."""
    settings = _read_json(folder / "config.json")
    if settings is None or "dataset_dir" not in settings:
        return None
    return FoundRun(
        folder,
        settings,
        tuple(path.name for path in complete_checkpoints(folder)),
        (folder / "final" / "adapter_config.json").is_file(),
        tuple(mark.name for mark in _folders(folder / "marks")),
    )


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first by optimizer step."""
    states = ((path, saved_facts(path)) for path in _folders(run / "checkpoints"))
    return [path for _, path in sorted((facts["position"]["step"], path) for path, facts in states if facts)]


def find_checkpoint(resume_from: Path, output_dir: Path) -> Path:
    """The checkpoint that `--resume-from` means; `latest` looks in `--output-dir`. Raises UserError."""
    complete = complete_checkpoints(output_dir)
    if str(resume_from) != "latest":
        if saved_facts(resume_from):
            return resume_from
        last = ", ".join(map(str, complete[-3:]))
        fix = f"Whole ones: {last}" if complete else "Start anew without --resume-from."
        raise UserError(f"--resume-from {resume_from}: not a whole checkpoint of this program.", fix)
    if not complete:
        raise UserError(
            f"--resume-from latest: no whole checkpoint in {output_dir / 'checkpoints'}.",
            "Start anew without --resume-from, or name a checkpoint folder.",
        )
    return complete[-1]


def require_checkpoint(resume_from: Path, output_dir: Path) -> None:
    """Raises UserError where there is nothing to go on from.

    A live run in the folder has the word before, and what a broken save moved aside is put back by training first.
    """
    states = output_dir / "checkpoints" if str(resume_from) == "latest" else resume_from.parent
    with suppress(OSError):  # such as a folder that is not there
        if (output_dir / HOLDER).exists() or any(path.name.startswith(ASIDE) for path in states.iterdir()):
            return
    find_checkpoint(resume_from, output_dir)


def saved_facts(folder: Path) -> dict[str, Any] | None:
    """What a saved state says of itself: position, sizes of its files and their digests (older ones have none).

    None unless each file is there in its full size.
    """
    try:
        facts = json.loads((folder / COMPLETE_FILE).read_text(encoding="utf-8"))
        seal = facts.pop("seal", None)  # states of older versions have none
        if seal != (seal_of(facts) if "digests" in facts else None):
            return None
        is_whole = all((folder / name).stat().st_size == size for name, size in facts["files"].items())
        is_known = facts["position"].keys() <= POSITION and isinstance(facts["position"]["step"], int)
        return facts if is_whole and is_known else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def seal_of(facts: dict[str, Any]) -> str:
    """Hex digest of what the last file of a state says, so that no bit of it can change unnoticed either."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def digest_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "blake2b").hexdigest()[:32]


def damaged_file(folder: Path, digests: dict[str, str]) -> str:
    """The first file of a state whose bytes are not those that were written, or nothing. Raises OSError."""
    return next((name for name, digest in digests.items() if digest_of(folder / name) != digest), "")


def run_of(adapter: Path) -> Path | None:
    """The output folder of the run that an adapter lies in, or None."""
    path = adapter.resolve()
    return next((folder for folder in (path, *path.parents) if read_run(folder)), None)


def has_language_model(answers: Answers) -> bool:
    """Whether a language model that composes lies beside the models."""
    folder = answers.get("checkpoint_dir")
    return bool(folder) and any(path.name.startswith("acestep-5Hz-lm-") for path in _folders(Path(folder)))


def safetensors_parameters(path: Path) -> int:
    """Numbers in a safetensors file, by its header.

    Raises ValueError when it is none (a Git LFS pointer, a cut download).
    """
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise ValueError("Git LFS pointer instead of weights")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else LARGEST_HEADER_BYTES + 1
        if length > LARGEST_HEADER_BYTES:
            raise ValueError("not a safetensors file")
        header = json.loads(file.read(length))
        end = file.seek(0, 2)
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    if tensors and end < 8 + length + max(tensor["data_offsets"][1] for tensor in tensors):
        raise ValueError("cut short")
    return sum(math.prod(tensor["shape"]) for tensor in tensors)


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
        variant = variants.detect(config, folder.name)
        parameters = sum(safetensors_parameters(path) for path in sorted(weights.glob("*.safetensors")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return FoundModel(folder.name, "unknown", False, 0, layout, f"weights unreadable: {error}")
    problem = "" if parameters else "no weights: download again"
    return FoundModel(folder.name, variant.name, variant.is_turbo, parameters, layout, problem)


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


QUOTES = ('"“”„', "'‘’‚", "«»", "‹›")  # each with those that may stand at the other end


def path_of(typed: str, windows: bool = sys.platform == "win32") -> str:
    """The path in what was typed, or dropped on a terminal, which may quote it, escape its spaces or make a URL of it.

    A name that is there as it stands is taken as it stands, whatever it begins and ends with.
    """
    text = typed.strip()
    if not text or os.path.exists(expand(text)):  # noqa: PTH110 (Path's own raises for a name that is too long)
        return text
    called = text.removeprefix("&").lstrip()  # by PowerShell, if quotes follow
    text = called if any(called[:1] in quotes for quotes in QUOTES) and called else text
    if windows:
        text = text.replace('"', "")  # no name there holds one, and cmd opens them without closing
    elif "\\" in text:
        with suppress(ValueError):  # not one word of a shell
            [text] = shlex.split(text)
    if len(text) > 1 and any(text[0] in quotes and text[-1] in quotes for quotes in QUOTES):
        text = text[1:-1].replace("''", "'") if text[0] == "'" else text[1:-1]
    if text[:5].lower() != "file:":
        return text
    host, path = "", text[5:]
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        path = slash + path
    path = os.fsdecode(unquote_to_bytes(path))
    if drive := re.match(r"/([A-Za-z])[:|]", path):
        return f"{drive[1]}:{path[3:]}"
    return f"//{host}{path}" if windows and host not in ("", "localhost") else path


Check = Callable[[str, Path], str]  # `verify` as a face calls it: what a path must hold, the path
Songs = Callable[[Path], str]  # the songs of a folder in a line ("12 songs, 47:10 of music"); UserError where none are


@dataclass(frozen=True)
class Content:
    """Where a path's content may be: in a folder, or in a file of this suffix (* for any).

    `new`: it is written to and need not exist yet.
    """

    folder: bool = True
    file: str = ""
    new: bool = False


CONTENTS = {  # what a setting's path may have to hold
    "checkpoints": Content(file=".safetensors"),
    "songs": Content(),
    "dataset.json": Content(folder=False, file="*"),
    "prompts": Content(folder=False, file="*"),
    "words": Content(folder=False, file="*"),
    "songs or dataset.json": Content(file=".json"),
    "tensors": Content(),
    "adapter": Content(file="*"),
    "run": Content(),
    "runs": Content(),
    "saved state": Content(),
    "new run": Content(new=True),
    "new folder": Content(new=True),
}


def glance(holds: str, path: Path) -> None:
    """The cheap check, for every key that is typed: is there anything of the kind? Raises UserError."""
    content = CONTENTS[holds]
    if holds == "saved state" and str(path) == "latest":
        return
    try:
        if content.new:
            blocking = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
            if blocking is not None:
                raise UserError("That is a file." if blocking == path else f"{blocking} is a file.")
            return
        if (content.folder and path.is_dir()) or (path.is_file() and content.file in ("*", path.suffix.lower())):
            return
        if path.exists():
            raise UserError(f"That is a {'folder' if path.is_dir() else 'file'}.")
        parent = next((p for p in path.parents if p.is_dir()), None)
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{error.strerror}.") from None
    known = f"; {parent} is there" if parent and parent not in (Path(), Path(path.anchor)) else ""
    raise UserError(f"There is no such folder or file{known}.")


def verify(holds: str, path: Path, songs: Songs) -> str:
    """The real check, once a path is entered: a line about its content. Raises UserError with what is there instead."""
    glance(holds, path)
    match holds:
        case "checkpoints":
            models = find_models(path)
            usable = [model for model in models if not model.problem]
            broken = ", ".join(model.title for model in models if model.problem)
            if usable:
                return count(len(usable), "model") + (f"; not usable: {broken}" if broken else "")
            inside = f"(folders: {', '.join(folder.name for folder in _folders(path)[:6]) or 'none'})"
            found = f"No usable model here: {broken}." if broken else f"No ACE-Step model here {inside}."
            raise UserError(found, f"Download {'again' if broken else 'one'}: {variants.download_command()}")
        case "tensors":
            if found := count_tensors(path):
                return count(found, "song") + " as tensors"
            try:
                music = songs(path)
            except UserError:
                fix = "Preprocess some audio first, or choose the folder it was written to."
                raise UserError("No .pt tensors here.", fix) from None
            problem = f"No .pt tensors here, but {music}: preprocess first?"
            raise UserError(problem, "Go back to the menu and choose Preprocess.")
        case "dataset.json":
            return _verify_list(path)
        case "songs":
            return songs(path)
        case "songs or dataset.json":
            if path.is_file():
                return _verify_list(path)
            listed = (path / "dataset.json").is_file()
            return songs(path) + ("; choose its dataset.json to use the captions in there" if listed else "")
        case "run":
            return _verify_run(path)
        case "saved state" if str(path) != "latest":
            return _verify_run(path.parent.parent if path.parent.name == "checkpoints" else path)
        case "adapter" if path.is_dir():
            if not any(path.glob("adapter_config.json")) and not any(path.glob("*.safetensors")):
                inside = ", ".join(found.parent.name for found in sorted(path.glob("*/adapter_config.json")))
                fix = f"There is one in: {inside}." if inside else "Choose the final/ folder of a run."
                raise UserError("No adapter here.", fix)
        case "new run":
            if read_run(path) is not None or (path / "final").is_dir():
                raise UserError("A run stands there already.", "Choose another folder, or Resume in the menu.")
            return "" if path.exists() else "a new folder"
        case "new folder":
            if found := count_tensors(path):
                return f"{count(found, 'song')} there already: what is unchanged is kept"
            return "" if path.exists() else "a new folder"
    return ""


def _verify_list(path: Path) -> str:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Not readable as JSON: {error}.") from None
    samples = data.get("samples") if isinstance(data, dict) else data
    if not isinstance(samples, list) or not samples:
        raise UserError("No songs are listed in it.", "Build it from a folder of songs: choose List songs.")
    lengths = [sample.get("duration") for sample in samples if isinstance(sample, dict)]
    short = sum(isinstance(seconds, int | float) and 0 < seconds < SHORT_SECONDS for seconds in lengths)
    return count(len(samples), "song") + " listed" + brief(short)


def brief(short: int) -> str:
    """What to add to the count of songs where some are too short to teach much; nothing where none are."""
    return f", {short} of them under {SHORT_SECONDS:.0f} s, which teaches little" if short else ""


def _verify_run(folder: Path) -> str:
    found = read_run(folder)
    if found is None:
        raise UserError("No run here: no config.json of one.", "Choose the --output-dir of a run.")
    if not found.checkpoints:
        raise UserError("This run has no checkpoint to go on from.", "Start it again: choose Train.")
    return f"saved: {', '.join(found.checkpoints[-5:])}"


# What the disk suggests for a question, under the answers so far


def a_prompt_of(dataset_json: Path) -> str:
    """The trigger word and the first caption of a list of songs: something to listen to; empty where there is none."""
    data = _read_json(dataset_json) or {}
    samples, metadata = data.get("samples"), data.get("metadata")
    captions = [s.get("caption") for s in samples if isinstance(s, dict)] if isinstance(samples, list) else []
    tag = metadata.get("custom_tag") if isinstance(metadata, dict) else ""
    return ", ".join(text for text in (tag, *captions[:1]) if isinstance(text, str) and text)


def models_offered(answers: Mapping[str, Any]) -> tuple[Choice, ...]:
    """The usable models of the answered checkpoint folder."""
    folder = answers.get("checkpoint_dir")
    return tuple(
        Choice(
            short_name(model.name),
            short_name(model.name),
            ", ".join(part for part in (model.variant, model.size, model.layout.removeprefix("original")) if part),
        )
        for model in (find_models(Path(folder)) if folder else [])
        if not model.problem
    )


def variant_of(answers: Mapping[str, Any]) -> variants.Variant | None:
    """What the chosen model's config and folder say of it, else its name; None where none is chosen."""
    if not {"checkpoint_dir", "model_variant"} <= answers.keys():
        return None
    home, name = Path(answers["checkpoint_dir"]), str(answers["model_variant"])
    official = variants.OFFICIAL_FOLDERS.get(name, name)
    folders = [folder for folder in (home / official, home / f"{official}-diffusers", home) if folder.is_dir()]
    found = ((folder, _read_json(folder / sub / "config.json")) for folder in folders for sub in ("", "transformer"))
    folder, config = next(((folder, config) for folder, config in found if config), (home, {}))
    variant = variants.detect(config, folder.name)
    return variant if config else replace(variant, is_turbo="turbo" in name)  # a single file says nothing


def is_in_doubt(answers: Mapping[str, Any]) -> bool:
    """Whether the chosen model has signs of both laws of timesteps, as merges have."""
    variant = variant_of(answers)
    return variant is not None and bool(variant.doubt)


def states_offered(answers: Mapping[str, Any]) -> tuple[Choice, ...]:
    """The saved states of the run that is to go on, the newest first."""
    if "run" not in answers:
        return ()
    run, folder = read_run(answers["run"]), answers["run"] / "checkpoints"
    older = [Choice(folder / name, name) for name in reversed(run.checkpoints)] if run else []
    return (Choice(Path("latest"), "latest", "the newest one that is complete"), *older)


def tensors_for(answers: Mapping[str, Any]) -> Path | None:
    """The folder that the tensors of the answered songs would be written to."""
    songs = answers.get("songs") or answers.get("audio_dir") or answers.get("dataset_json")
    return Path("tensors") / _name_of(songs) if songs else None


def run_for(answers: Mapping[str, Any]) -> Path | None:
    """A new folder for a run on the answered tensors: runs/NAME, or the first of runs/NAME-2, … that is not there."""
    data = answers.get("dataset_dir")
    if not data:
        return None
    folder = Path("runs") / _name_of(data)
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], numbered) if not path.exists())


def export_for(answers: Mapping[str, Any]) -> Path | None:
    """A new file or folder for the answered adapter in the answered format: exports/NAME-FORMAT."""
    if not {"adapter", "format"} <= answers.keys():
        return None
    adapter, format = Path(answers["adapter"]), answers["format"]
    name = adapter.absolute().parent.name if read_run(adapter.parent) else adapter.stem
    suffix = ".safetensors" if format in ("comfyui", "diffusers", "lycoris") else ""
    numbered = (f"{name}-{format}-{number}" for number in itertools.count(2))
    paths = (Path("exports") / f"{stem}{suffix}" for stem in itertools.chain([f"{name}-{format}"], numbered))
    return next(path for path in paths if not path.exists())


# What lies near and can be chosen instead of typed


def songs_near(start: Path) -> list[Path]:
    """Folders in `start` with songs in them or in a folder of theirs, the newest first. Waits for no slow disk."""
    found: list[Path] = []

    def look() -> None:
        for folder in _folders(start):
            inner = (
                itertools.chain([folder], _folders(folder)[:NEAR_FOLDERS]) if folder.name not in WRITTEN_HERE else ()
            )
            with suppress(OSError):
                if any(path.suffix.lower() in AUDIO_SUFFIXES for place in inner for path in place.iterdir()):
                    found.append(folder)

    looking = Thread(target=look, daemon=True)
    looking.start()
    looking.join(NEAR_SECONDS)
    return newest_first(list(found))


def tensors_near(start: Path) -> list[Path]:
    """`tensors` in `start`, and the folders in it, that hold `.pt` records, the newest first.

    In a folder of records another one is a part of the same songs, unless preprocessing wrote into it.
    """
    home = start / "tensors"
    own = [home] if any(home.glob("*.pt")) else []
    held = (folder for folder in _folders(home) if any(p.suffix == ".pt" for p in files_below(folder, hidden=False)))
    return newest_first([*own, *(folder for folder in held if not own or (folder / "events.jsonl").is_file())])


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Those that are there, by when they were changed."""
    dated = []
    for path in paths:
        with suppress(OSError):
            dated.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(dated, reverse=True)]


def _name_of(path: Path) -> str:
    folder = path.parent if path.suffix.lower() == ".json" else path
    return folder.resolve().name or "songs"
