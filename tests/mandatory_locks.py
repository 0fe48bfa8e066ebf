"""The rule of Windows for open files, on Linux: what this process has open or mapped cannot be deleted or renamed.

An audit hook of the interpreter sees every deletion and renaming, whoever asks for it, and /proc knows what is held.
Lock files are left out: their deletion has a branch of its own for Windows. To use the fixture, a test file imports it.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestep import files

HELD = "The process cannot access the file because it is being used by another process"
_root: list[str] = []  # below it the rule holds; an audit hook stays for good, so it has to be told


def held_files(root: str) -> set[str]:
    """Every file below `root` that this process has open or mapped; lock files are left out."""
    held = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            path = str(link.readlink())
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
        if path.startswith(root) and not Path(path).is_dir():
            held.add(path)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    if root in maps:
        held |= {line[line.index(root) :] for line in maps.splitlines() if root in line}
    return {path for path in held if not path.endswith(".lock")}


def _full(path, dir_fd: int) -> str:
    folder = Path(f"/proc/self/fd/{dir_fd}").readlink() if dir_fd not in (-1, None, -100) else Path.cwd()
    return str(folder.resolve() / os.fsdecode(path))


def _hook(event: str, arguments: tuple) -> None:
    if not _root or event not in ("os.remove", "os.rename", "os.rmdir", "os.truncate"):
        return
    if event == "os.rename":
        source, target, source_folder, target_folder = arguments
        paths = [_full(source, source_folder), _full(target, target_folder)]
    else:
        paths = [_full(arguments[0], arguments[1] if event != "os.truncate" else -1)]
    root = _root[0]
    if not any(path.startswith(root) for path in paths):
        return
    held = held_files(root)
    for path in paths:
        if any(name == path or name.startswith(path + os.sep) for name in held):
            raise PermissionError(13, HELD, path)
    if event == "os.rename" and Path(paths[1]).is_dir():
        raise PermissionError(13, "Access is denied", paths[1])


@pytest.fixture
def mandatory_locks(tmp_path, monkeypatch) -> Iterator[None]:
    """The rule holds below `tmp_path`; renaming over something is refused, and no folders are exchanged in one step."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("reads what is open and mapped from Linux' /proc; Windows has the rule itself")
    if _hook not in _installed:
        sys.addaudithook(_hook)
        _installed.append(_hook)
    rename = os.rename

    def rename_to_a_free_name(source, target, **folders):
        if os.path.lexists(target) and str(target).startswith(str(tmp_path)):
            raise FileExistsError(17, "Cannot create a file when that file already exists", str(target))
        rename(source, target, **folders)

    monkeypatch.setattr(os, "rename", rename_to_a_free_name)
    monkeypatch.setattr(files, "_exchange", lambda *_paths: False)
    _root.append(os.path.realpath(tmp_path) + os.sep)
    gc.disable()  # what a cycle holds may be held for long
    yield
    gc.enable()
    _root.clear()


_installed: list = []
