"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed.

Where this platform keeps a program's settings and its logs.
"""

import hashlib
import itertools
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

TEMPORARY = re.compile(r"^\.tmp-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-\d+(-\d+)?$")
REPLACE_TRIES = 10  # Windows refuses to replace a file that a virus scanner or an indexer holds open for a moment

_counter = itertools.count()


@lru_cache(maxsize=1)
def host_id() -> str:
    """Eight hex digits for this machine, or this container: where process ids mean the same."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return hashlib.blake2b(f"{socket.gethostname()}:{namespace}".encode(), digest_size=4).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path` (made if need be) to write to; it becomes `path` when the block ends well.

    The name says which process of which machine writes, so that leftovers of dead ones can be told from work under way.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{host_id()}-{os.getpid()}-{next(_counter)}"
    try:
        yield temporary
        _flush(temporary)
        _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file in UTF-8, or leave what was there."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _flush(path: Path) -> None:
    with path.open("rb+") as f:
        os.fsync(f.fileno())


def _replace(temporary: Path, path: Path) -> None:
    for attempt in range(REPLACE_TRIES):
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            if sys.platform != "win32" or attempt == REPLACE_TRIES - 1:
                raise
            time.sleep(0.05 * (attempt + 1))


def _flush_folder(folder: Path) -> None:
    """Make the rename itself last through a power cut; only POSIX can flush a folder."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot; the file's own bytes are safe
    finally:
        os.close(descriptor)


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
