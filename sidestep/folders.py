"""Where this platform keeps a program's settings and its logs."""

import os
import sys
from pathlib import Path

OVERRIDE = "SIDE_STEP_HOME"  # one folder for everything: portable installs and tests


def config_folder() -> Path:
    """Folder of the settings file and of the user's presets; may not exist yet."""
    return _folder("XDG_CONFIG_HOME", Path.home() / ".config", "APPDATA")


def state_folder() -> Path:
    """Folder of the log of what went wrong outside any run; may not exist yet."""
    return _folder("XDG_STATE_HOME", Path.home() / ".local" / "state", "LOCALAPPDATA")


def _folder(xdg: str, default: Path, windows: str) -> Path:
    if os.environ.get(OVERRIDE):
        return Path(os.environ[OVERRIDE]).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get(windows) or Path.home()) / "Side-Step"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "Side-Step"
    return Path(os.environ.get(xdg) or default) / "side-step"
