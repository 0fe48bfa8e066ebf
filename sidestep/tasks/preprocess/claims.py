"""Who works on which song, told by small files, so that processes on any machines can share one folder.

A claim is a file created with O_EXCL that names its owner; an owner is a file that its process touches every few seconds.
A claim of a dead owner is taken over by creating the next generation of it, which only one process can do.
"""

import json
import os
import secrets
import threading
from pathlib import Path
from types import TracebackType

import psutil

from sidestep.files import TEMPORARY, host_id, write_text

BEAT_SECONDS = 15.0
DEAD_AFTER_SECONDS = 180.0  # an owner on another machine that did not beat for so long is gone
UNNAMED_SECONDS = 10.0  # a claim whose owner died before writing its name
TEMPORARY_SECONDS = 86400.0  # a temporary file of another machine this old belongs to nobody
REUSED_PID_SECONDS = 60.0


class Claims:
    """This process's claims in a hidden work folder; use it as a context manager.

    A clock is never compared with another machine's: all times are those the file system gives to files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.owner = f"{host_id()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.started = 0.0  # in the file system's time
        self._held: dict[str, int] = {}  # key of a song: generation
        self._resting = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> "Claims":
        self._touch()
        self.started = self._owner_file(self.owner).stat().st_mtime
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heart.join()
        for key in list(self._held):
            self.release(key)
        self._owner_file(self.owner).unlink(missing_ok=True)

    def take(self, key: str) -> bool:
        """Whether this process now holds the song; False when a living one does."""
        with self._lock:
            if key in self._held:
                return True
            generation = 0
            while True:
                path = self._claim_file(key, generation)
                try:
                    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                except FileExistsError:
                    if self._is_live_claim(path):
                        return False
                    generation += 1
                    continue
                with os.fdopen(descriptor, "w", encoding="utf-8") as f:
                    f.write(self.owner)
                self._held[key] = generation
                return True

    def holds(self, key: str) -> bool:
        """Whether the song is still this process's: one that slept for long may have been taken for dead."""
        generation = self._held.get(key)
        return (
            generation is not None
            and not self._claim_file(key, generation + 1).exists()
            and self._read(self._claim_file(key, generation)) == self.owner
        )

    def release(self, key: str) -> None:
        """Give the song back; its record stands, or it failed."""
        with self._lock:
            last = self._held.pop(key, None)
            if last is None:
                return
            if self._claim_file(key, last + 1).exists():
                return  # taken over meanwhile: the files are the new owner's to remove
            for generation in range(last + 1):
                self._claim_file(key, generation).unlink(missing_ok=True)

    def rest(self) -> None:
        """Say that this process takes no more songs."""
        self._resting = True
        self._introduce()

    def others_working(self) -> bool:
        """Whether another process lives that may still take songs in this folder."""
        others = [path for path in self._owners.iterdir() if path.name != self.owner]
        return any(not self._facts(path).get("resting") and self._is_alive(path.name) for path in others)

    def clean(self, root: Path) -> int:
        """Remove what dead processes left below `root`: temporary files and owners. Returns how many temporary files."""
        for path in list(self._owners.iterdir()):
            if path.name != self.owner and not self._is_alive(path.name):
                path.unlink(missing_ok=True)
        removed = 0
        for folder, _, names in os.walk(root):
            for name in names:
                if (found := TEMPORARY.match(name)) and self._is_orphan(
                    Path(folder, name), found["host"], int(found["pid"])
                ):
                    Path(folder, name).unlink(missing_ok=True)
                    removed += 1
        return removed

    @property
    def _owners(self) -> Path:
        return self.folder / "owners"

    def _owner_file(self, owner: str) -> Path:
        return self._owners / owner

    def _claim_file(self, key: str, generation: int) -> Path:
        return self.folder / f"{key}.{generation}.claim"

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._touch()
            except OSError:
                continue  # a network folder that is away for a moment; nothing is lost but the claim

    def _touch(self) -> None:
        """Set the owner file's time to now; make it when it is not there, be it that this machine slept and was taken for dead."""
        try:
            os.utime(self._owner_file(self.owner))
        except FileNotFoundError:
            self._introduce()

    def _introduce(self) -> None:
        process = psutil.Process()
        facts = {"host": host_id(), "pid": process.pid, "started": process.create_time(), "resting": self._resting}
        self._owners.mkdir(parents=True, exist_ok=True)
        write_text(self._owner_file(self.owner), json.dumps(facts))

    def _is_live_claim(self, path: Path) -> bool:
        owner = self._read(path)
        if owner is None:
            return False  # given back this very moment
        return self._is_alive(owner) if owner else self._age(path) < UNNAMED_SECONDS

    def _is_alive(self, owner: str) -> bool:
        if owner == self.owner:
            return True
        path = self._owner_file(owner)
        facts = self._facts(path)
        if facts.get("host") == host_id():
            return process_is_alive(facts["pid"], facts["started"])
        return self._age(path) < (DEAD_AFTER_SECONDS if facts else UNNAMED_SECONDS)

    @staticmethod
    def _facts(path: Path) -> dict:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}

    def _is_orphan(self, path: Path, host: str, pid: int) -> bool:
        if host == host_id():
            return not process_is_alive(pid)
        return self._age(path) > TEMPORARY_SECONDS

    def _age(self, path: Path) -> float:
        """Seconds since a file was touched, by the file system's own clock; infinite for one that is gone."""
        try:
            touched = path.stat().st_mtime
        except OSError:
            return float("inf")
        self._touch()
        return self._owner_file(self.owner).stat().st_mtime - touched

    @staticmethod
    def _read(path: Path) -> str | None:
        try:
            return path.read_text(encoding="utf-8")
        except OSError:
            return None


def process_is_alive(pid: int, started: float | None = None) -> bool:
    """Whether the process runs on this machine; with `started` (seconds since the epoch) not another that got its number."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or abs(process.create_time() - started) < REUSED_PID_SECONDS
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
