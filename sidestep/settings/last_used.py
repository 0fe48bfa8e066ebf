"""What the wizard carries over to the next session: the values last used, in a settings file in the platform's config folder."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidestep.files import config_folder, write_text

VERSION = 1


@dataclass
class CarryOver:
    """Last used values by setting name. `notice`: what the user should know of how they were read."""

    values: dict[str, Any] = field(default_factory=dict)
    notice: str = ""


def settings_path() -> Path:
    """The settings file; may not exist yet."""
    return config_folder() / "settings.json"


def read() -> CarryOver:
    """The carried-over values. A broken file is set aside under another name, never deleted, and said so."""
    path = settings_path()
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return CarryOver()
    except OSError as error:
        return CarryOver(notice=f"The settings of the last session could not be read ({path}: {error.strerror}).")
    except (ValueError, RecursionError):
        return CarryOver(notice=_set_aside(path, "is damaged"))
    if (
        not isinstance(data, dict)
        or not isinstance(data.get("values"), dict)
        or not isinstance(data.get("version"), int)
    ):
        return CarryOver(notice=_set_aside(path, "is not a settings file"))
    if data["version"] > VERSION:
        return CarryOver(notice=_set_aside(path, "was written by a newer Side-Step"))
    return CarryOver({name: value for name, value in data["values"].items() if _plain(value)})


def write(values: dict[str, Any]) -> str:
    """Keep the values for the next session; what went wrong, or an empty string. A session never fails over it."""
    plain = {name: value.as_posix() if isinstance(value, Path) else value for name, value in values.items()}
    try:
        write_text(
            settings_path(), json.dumps({"version": VERSION, "values": plain}, indent=2, ensure_ascii=False) + "\n"
        )
    except OSError as error:
        return f"The settings could not be kept for the next session ({settings_path()}: {error.strerror})."
    return ""


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool) or (
        isinstance(value, list) and all(isinstance(part, str | int | float) for part in value)
    )


def _set_aside(path: Path, why: str) -> str:
    aside = path.with_name("settings.broken.json")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"settings.broken-{number}.json")
    try:
        path.replace(aside)
    except OSError as error:
        return f"The settings file {path} {why} and is ignored ({error.strerror})."
    return f"The settings file {why}; it was set aside as {aside}, and this session starts fresh."
