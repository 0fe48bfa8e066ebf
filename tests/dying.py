"""A process that dies at its n-th change of the disk, wherever that is: nothing it would do afterwards is done."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
_state = {"root": "", "left": 0, "changes": 0}
_installed: list = []


class Dies(BaseException):
    """As SIGKILL, but that the test lives on."""


@contextmanager
def dying_at(change: int, root: Path) -> Iterator[dict[str, int]]:
    """Raise Dies instead of the change with that number (from 1) below `root`, and instead of all that follow.

    Yields a dict whose "changes" counts. What libraries write past Python (safetensors) is not counted.
    """
    if not _installed:
        sys.addaudithook(_hook)  # stays for good
        _installed.append(_hook)
    _state.update(root=os.path.realpath(root), left=change, changes=0)
    try:
        yield _state
    finally:
        _state["root"] = ""


def _hook(event: str, arguments: tuple) -> None:
    if not _state["root"]:
        return
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str | bytes | os.PathLike) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    elif event not in CHANGES:
        return
    elif event in ("os.remove", "os.rmdir") and arguments[1] not in (-1, None):
        path = Path(f"/proc/self/fd/{arguments[1]}").readlink() / os.fsdecode(arguments[0])
    else:
        path = arguments[0]
    if str(Path(os.fsdecode(path)).absolute()).startswith(_state["root"]):
        _state["changes"] += 1
        if _state["changes"] >= _state["left"]:
            raise Dies
