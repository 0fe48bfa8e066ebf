"""The values last used, kept for the next session of the wizard in a settings file of the config folder."""

import itertools
import json
from pathlib import Path
from typing import Any

from sidestep.files import config_folder, move, write_text

VERSION = 1


def settings_path() -> Path:
    """The settings file; may not exist yet."""
    return config_folder() / "settings.json"


def read() -> tuple[dict[str, Any], str]:
    """The values last used by name, and what the user should know of how they were read.

    A broken file is set aside under another name, never deleted, and said so.
    """
    path = settings_path()
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, f"The settings of the last session could not be read ({path}: {error.strerror})."
    except (ValueError, RecursionError):
        return {}, _set_aside(path, "is damaged")
    match data:
        case {"version": int(version), "values": dict(values)} if version <= VERSION:
            lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
            return {
                n: values[n] for n, parts in lists.items() if all(isinstance(p, str | int | float) for p in parts)
            }, ""
        case {"version": int(), "values": dict()}:
            return {}, _set_aside(path, "was written by a newer Side-Step")
    return {}, _set_aside(path, "is not a settings file")


def write(values: dict[str, Any]) -> str:
    """Keep the values for the next session, which may start in another folder: paths in full.

    Returns what went wrong, or an empty string: a session never fails over it.
    """
    plain = {n: value.absolute().as_posix() if isinstance(value, Path) else value for n, value in values.items()}
    text = json.dumps({"version": VERSION, "values": plain}, indent=2, ensure_ascii=False) + "\n"
    try:
        write_text(settings_path(), text)
    except OSError as error:
        return f"The settings could not be kept for the next session ({settings_path()}: {error.strerror})."
    return ""


def _set_aside(path: Path, why: str) -> str:
    names = itertools.chain(["settings.broken.json"], (f"settings.broken-{n}.json" for n in itertools.count(2)))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    try:
        move(path, aside)
    except OSError as error:
        return f"The settings file {path} {why} and is ignored ({error.strerror})."
    return f"The settings file {why}; it was set aside as {aside}, and this session starts fresh."
