"""Presets: partial configs as JSON files. Built-in ones are read-only; a user's own are in the config folder."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.files import RESERVED, config_folder, expand, move, write_text
from sidestep.settings.config import COMMANDS
from sidestep.settings.option import Option, changed_from_defaults, options_of
from sidestep.words import did_you_mean

BUILT_IN = Path(__file__).resolve().parent / "built_in"
# the others have no settings worth keeping under a name
COMMANDS_WITH_PRESETS = ("fixed", "preprocess", "estimate", "plan")
# GiB of the smallest card that each is made for
PROFILES = {"comfortable": 24, "standard": 16, "tight": 12, "minimal": 8}
ORDER = ("recommended", *(f"{name}{xl}" for name in reversed(PROFILES) for xl in ("", "_xl")), "high_quality")
USABLE = 0.93  # what a card of so many GB reports of them
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.\-]{0,60}[A-Za-z0-9]|[A-Za-z0-9]")
LARGEST_BYTES = 1_000_000


@dataclass(frozen=True)
class Preset:
    """Settings under a name. `unknown`: keys of the file that no command has; they are ignored and named."""

    name: str
    description: str
    values: dict[str, Any]
    unknown: tuple[str, ...]
    path: Path

    @property
    def built_in(self) -> bool:
        return self.path.parent == BUILT_IN


@cache
def preset_options() -> dict[str, Option]:
    """Every setting that a preset may hold, by name. Folders and files are a machine's own and stay out."""
    classes = [COMMANDS[name].config for name in COMMANDS_WITH_PRESETS]
    options = {name: o for c in reversed(classes) for name, o in options_of(c).items()}  # the first class wins
    return {name: o for name, o in options.items() if o.type is not Path and o.flag.startswith("-")}


def user_folder() -> Path:
    """The folder of the user's presets; may not exist yet."""
    return config_folder() / "presets"


def list_presets() -> list[Preset]:
    """All presets that can be read: the usual one, those for cards by their memory, the others, the user's own by name.

    Of the others `broken_presets` says what is wrong.
    """
    return [read for read in _all_presets() if isinstance(read, Preset)]


def broken_presets() -> list[UserError]:
    """What is wrong with each of the user's own files that cannot be read."""
    return [error for error in _all_presets() if isinstance(error, UserError)]


def _all_presets() -> list[Preset | UserError]:
    presets: list[Preset | UserError] = []
    places = {name: place for place, name in enumerate(ORDER)}
    for folder in (BUILT_IN, user_folder()):
        found = folder.glob("*.json")
        for path in sorted(found, key=lambda path: (places.get(path.stem, len(places)), path.stem.lower())):
            try:
                presets.append(read(path))
            except UserError as error:
                presets.append(error)
    return presets


def find(name: str) -> Preset:
    """The preset of that name (a user's own before a built-in one), or the one in a `.json` file of that path.

    Raises UserError with the names there are.
    """
    if name.endswith(".json") and Path(name).is_file():
        return read(Path(name))
    for folder in (user_folder(), BUILT_IN):
        path = folder / f"{name}.json"
        if NAME.fullmatch(name) and path.is_file():
            return read(path)
    known = [preset.name for preset in list_presets()]
    nearest = did_you_mean(name, known)
    raise UserError(f"--preset {name}: there is no preset of that name.", nearest or f"Presets: {', '.join(known)}.")


def profile_for(gib: float, is_xl: bool) -> str:
    """The preset for a card of so many GiB: the most comfortable made for it; XL has its own for the smaller ones."""
    name = next((name for name, least in PROFILES.items() if gib >= USABLE * least), "minimal")
    return f"{name}_xl" if is_xl and name in ("tight", "minimal") else name


def read(path: Path) -> Preset:
    """A preset from its file, its values checked. Raises UserError; nothing in the file is ever executed."""
    try:
        if path.exists() and not path.is_file():  # to open a pipe may take for ever
            raise UserError(f"{path} is no file.", "Give a preset file (.json).")
        if path.stat().st_size > LARGEST_BYTES:
            raise UserError(f"{path} is too large for a preset.", "A preset is a small JSON object of settings.")
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.", "Give a preset file (.json).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.", "A preset is a JSON object of settings.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a preset.", 'A preset is a JSON object of settings, such as {"rank": 32}.')
    description = data.pop("description", "")
    values, unknown = checked(data, preset_options(), f"Preset {path}")
    return Preset(path.stem, description if isinstance(description, str) else "", values, unknown, path)


def checked(
    data: Mapping[str, Any], options: Mapping[str, Option], where: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings that a file holds, in their types, and the names in it that are none. Raises UserError."""
    try:
        values = {name: options[name].check(value) for name, value in data.items() if name in options}
    except UserError as error:
        raise UserError(f"{where}: {error.problem}", error.fix) from None
    return values, tuple(sorted(set(data) - set(options)))


def settings_of(config: Any) -> dict[str, Any]:
    """What a preset made of this config holds: what differs from the defaults, without folders and files."""
    return {name: value for name, value in changed_from_defaults(config).items() if name in preset_options()}


def save(name: str, values: dict[str, Any], description: str = "", replace: bool = False) -> Preset:
    """Write a preset of the user's own.

    Raises UserError for a bad name, a built-in one, or one that exists and is not to be replaced.
    """
    path = _own_path(name)
    if path.exists() and not replace:
        raise UserError(f"There is a preset {name} already.", "Choose another name, or delete the old one first.")
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    write_text(path, json.dumps({"description": description} | plain, indent=2, ensure_ascii=False) + "\n")
    return read(path)


def rename(old: str, new: str) -> Preset:
    """Give a preset of the user's own another name. Raises UserError."""
    preset = _own(old)
    path = _own_path(new)
    if path.exists():
        raise UserError(f"There is a preset {new} already.", "Choose another name.")
    move(preset.path, path)
    return read(path)


def delete(name: str) -> None:
    """Delete a preset of the user's own. Raises UserError."""
    _own(name).path.unlink()


def import_file(path: Path, name: str = "", replace: bool = False) -> Preset:
    """Copy a preset file into the user's presets, its values checked. Raises UserError."""
    preset = read(expand(path))
    return save(name or preset.name, preset.values, preset.description, replace)


def export_file(name: str, path: Path, replace: bool = False) -> Path:
    """Write a preset to a file of the user's choice (a folder: under its own name); the file. Raises UserError."""
    preset = find(name)
    path = expand(path)
    target = path / f"{preset.name}.json" if path.is_dir() else path
    if not target.parent.is_dir():
        raise UserError(f"There is no folder {target.parent}.", "Make it first, or choose another one.")
    if target.exists() and not replace:
        raise UserError(f"{target} exists already.", "Choose another file, or delete that one first.")
    write_text(target, preset.path.read_text(encoding="utf-8-sig"))
    return target


def _own(name: str) -> Preset:
    preset = find(name)
    if preset.path.parent != user_folder():
        raise UserError(f"{name} is a built-in preset and cannot be changed.", "Save your settings under another name.")
    return preset


def _own_path(name: str) -> Path:
    if not NAME.fullmatch(name) or RESERVED.fullmatch(name):
        raise UserError(f"{name!r} cannot be a preset's name.", "Use up to 60 letters, digits, spaces, dots, - and _.")
    if (BUILT_IN / f"{name}.json").exists():
        raise UserError(f"{name} is a built-in preset and cannot be changed.", "Choose another name.")
    return user_folder() / f"{name}.json"
