"""One lock per song, so that processes share a folder: none works on a song that another one has.

A lock belongs to the operating system, on a file in the hidden work folder. It is gone when its process is gone,
however that ended, and it stays while its process is merely stopped. Nothing is written into it, no clock is read.

Several machines can share a folder whose file system carries locks from one to the other: NFSv4 and SMB do, when all
of them reach the folder that way. Many FUSE mounts and the folders of cloud drives lock for one machine only: there,
give all songs to one machine, or each machine an output folder of its own.
"""

import errno
import os
import secrets
import sys
import tempfile
from pathlib import Path
from types import TracebackType

import psutil
from filelock import FileLock, Timeout

from sidestep.errors import UserError
from sidestep.files import TEMPORARY, files_below, host_id

REMOVED = (errno.ENOENT, errno.ESTALE)  # another process, at its end, took the folder or the file away
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
TEMPORARY_SECONDS = 86400.0  # a temporary file of another machine this old belongs to nobody


class SongLocks:
    """The locks of this process; use it as a context manager. Songs are named by their keys."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._held: dict[str, FileLock] = {}
        self._process = f"process-{secrets.token_hex(4)}"  # held as long as this process may take songs

    def __enter__(self) -> "SongLocks":
        self.take(self._process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for key in list(self._held):
            self.release(key)
        # The lock files that nobody holds go; the last process of several removes them all. A file goes under its own
        # lock: who had opened it before sees, once it has the lock, that it has no name any more (`filelock` looks).
        for path in self.folder.glob("*.lock"):
            if self.take(path.stem):
                if sys.platform != "win32":  # there the lock itself removes its file, when nobody else has it open
                    path.unlink(missing_ok=True)
                self.release(path.stem)

    def take(self, key: str) -> bool:
        """Whether this process now has the song; False when another does. Raises UserError where there are no locks."""
        if key in self._held:
            return True
        lock = FileLock(self.folder / f"{key}.lock", thread_local=False)
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock.acquire(blocking=False)
            except Timeout:
                return False
            except OSError as error:
                if error.errno in NO_LOCKS:
                    raise UserError(
                        f"{self.folder}: files cannot be locked there ({error.strerror}).",
                        "Give --tensor-output a folder on a disk of this machine, or on a share that has locks.",
                    ) from error
                if error.errno not in REMOVED:
                    raise
            else:
                self._held[key] = lock
                return True

    def release(self, key: str) -> None:
        """Give a song back; one that is not held is left as it is."""
        lock = self._held.pop(key, None)
        if lock:
            lock.release()

    def is_free(self, key: str) -> bool:
        """Whether no other process has the song at this moment."""
        if key in self._held:
            return True
        free = self.take(key)
        self.release(key)
        return free

    def rest(self) -> None:
        """Say that this process takes no more songs."""
        self.release(self._process)

    def others_at_work(self) -> bool:
        """Whether another process that has this folder open may still take songs."""
        others = (path.stem for path in self.folder.glob("process-*.lock") if path.stem != self._process)
        return any(not self.is_free(other) for other in others)


def remove_temporary_files(root: Path) -> int:
    """Remove what dead processes were writing below `root` when they died. Returns how many files that were.

    Ages are told by the clock of the file system, which machines of one folder share; their own may differ by hours.
    """
    removed = 0
    with tempfile.TemporaryFile(dir=root) as probe:
        now = os.fstat(probe.fileno()).st_mtime
    for path in files_below(root):
        found = TEMPORARY.match(path.name)
        if not found:
            continue
        try:
            if found["host"] != host_id():
                dead = now - path.stat().st_mtime > TEMPORARY_SECONDS
            else:
                dead = psutil.Process(int(found["pid"])).status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, FileNotFoundError):
            dead = True
        except psutil.AccessDenied:
            dead = False
        if dead:
            path.unlink(missing_ok=True)
            removed += 1
    return removed
