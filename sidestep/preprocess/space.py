"""Room on the disk: asked for before the start and watched on the way."""

import errno
import shutil
from pathlib import Path

from sidestep.errors import JobError

RESERVE_BYTES = 64 * 1024**2  # never used, so that the system and the last record have room
TEXT_TOKENS_PER_CHARACTER = 0.5  # generous for European languages, fair for Japanese
FULL = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder that need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def record_bytes(*, seconds: float, frames_per_second: float, channels: int, characters: int, condition_width: int, with_hints: bool) -> int:
    """About what a song's record takes while it is made: latents and states of the first pass, which the record then replaces."""
    latents = seconds * frames_per_second * channels * 4
    conditions = (200 + characters * TEXT_TOKENS_PER_CHARACTER) * condition_width * 4
    return int((latents + conditions) * (2 if with_hints else 1)) + 16 * 1024


def require(folder: Path, needed_bytes: int, songs: int) -> None:
    """Raises JobError when the disk of `folder` has not room for so much more."""
    free = free_bytes(folder)
    if needed_bytes + RESERVE_BYTES > free:
        raise JobError(
            f"--tensor-output {folder}: {songs} songs need about {readable(needed_bytes)} and the disk has {readable(free)} free.",
            f"Free {readable(needed_bytes + RESERVE_BYTES - free)}, or give --tensor-output a folder on another disk.",
        )


def watch(folder: Path) -> None:
    """Raises JobError before the disk of `folder` is full to the brim."""
    free = free_bytes(folder)
    if free < RESERVE_BYTES:
        raise disk_full(folder, free)


def disk_full(folder: Path, free: int | None = None) -> JobError:
    """The error for a disk that filled up on the way."""
    left = f" ({readable(free)} free)" if free is not None else ""
    return JobError(f"--tensor-output {folder}: the disk is full{left}.", "Free some space and give the same command again: it goes on where it stopped.")


def is_full(error: OSError) -> bool:
    """Whether an operating system's error says that there is no room."""
    return error.errno in FULL


def readable(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
