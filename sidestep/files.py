"""Files and folders that are whole or absent: written beside their place, flushed to the disk, then renamed.

And the lock of a folder with one writer, and the folders in which this platform keeps a program's settings and logs.
"""

import ctypes
import hashlib
import itertools
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import platformdirs
from filelock import FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError

from sidestep.errors import UserError

TEMPORARY = re.compile(r"^\.tmp-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-\d+(-\d+)?$")
# Names that Windows keeps for devices, whatever follows a dot, and also with blanks before it.
RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
FORBIDDEN = re.compile(r'[<>:"|?*/\\\x00-\x1f\x7f]')  # on Windows, and so on any drive that may travel there
MAX_NAME_BYTES = 200  # of 255, to leave room for suffixes; counted in UTF-8, as Linux does
LONGEST_PATH = 259  # of Windows, unless long paths are switched on there
ASIDE = ".replaced-"  # in front of the name of a folder while another is put in its place
EXCHANGE = {"linux": ("renameat2", -100), "darwin": ("renameatx_np", -2)}  # not run here: darwin
HOLDER = ".lock-holder"  # beside the lock: on Windows a locked file cannot be read
REPLACE_TRIES = (
    10  # Windows refuses to replace or delete a file that a virus scanner or an indexer holds open for a moment
)

_counter = itertools.count()


@lru_cache(maxsize=1)
def host_id() -> str:
    """Eight hex digits for this machine, or this container: where process ids mean the same."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return hashlib.blake2b(f"{socket.gethostname()}:{namespace}".encode(), digest_size=4).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` (its folder is made if need be) that becomes `path` when the block ends well.

    The name says which process of which machine writes, so that leftovers of dead ones can be told from work under way.
    Raises OSError naming `path`, also where safetensors or torch met it and said something of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{host_id()}-{os.getpid()}-{next(_counter)}"
    try:
        yield temporary
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        move(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        code = _system_error(error)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error
    finally:
        remove(temporary)
    _flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file in UTF-8, or leave what was there."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def move(old: Path, new: Path) -> None:
    """Rename a file or folder, over a file that is there. Raises OSError."""
    _patiently(lambda: old.replace(new))


def _patiently(change: Callable[[], object]) -> None:
    """Make a change of the disk, on Windows again while another program holds the file for a moment."""
    for attempt in range(REPLACE_TRIES):
        try:
            change()
            return
        except PermissionError:
            if sys.platform != "win32" or attempt == REPLACE_TRIES - 1:
                raise
            time.sleep(0.05 * (attempt + 1))


def put_in_place(new: Path, path: Path) -> None:
    """Give `new`, a finished file or folder, the name `path`; what was there is deleted.

    On Linux and macOS the two are exchanged in one step where the disk can. Elsewhere a folder is moved aside first: a
    process killed in that moment leaves it under its name with ASIDE in front (`bring_back`). Raises OSError, with all
    as it was.
    """
    aside = path.with_name(ASIDE + path.name)
    if not path.exists() or (path.is_file() and new.is_file()):
        move(new, path)
    elif _exchange(new, path):
        aside = new
    else:
        remove(aside)  # left by a process that was killed when all was done
        move(path, aside)
        try:
            move(new, path)
        except OSError:
            move(aside, path)
            raise
    _flush_folder(path.parent)
    remove(aside)


def bring_back(path: Path) -> None:
    """Undo what a killed process left of `put_in_place`, if it did. Raises OSError."""
    aside = path.with_name(ASIDE + path.name)
    if aside.exists() and not path.exists():
        move(aside, path)


def remove(path: Path) -> None:
    """Delete a file if it is there, or a folder with all in it that can be deleted. Raises OSError for a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        _patiently(lambda: path.unlink(missing_ok=True))


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths of any kind change their names in one step. False where the system or the disk cannot."""
    name, here = EXCHANGE.get(sys.platform, ("", 0))
    call = getattr(ctypes.CDLL(None), name, None) if name else None
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), 2) == 0


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


def _system_error(error: BaseException | None) -> int | None:
    """The number of the system's error that stopped a write, which torch keeps as context and safetensors as text."""
    if isinstance(error, SafetensorError):
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            return None
        # Windows has numbers of its own
        return OSError(0, "", None, int(number[1])).errno if sys.platform == "win32" else int(number[1])
    if isinstance(error, RuntimeError):
        return _system_error(error.__context__)
    return error.errno if isinstance(error, OSError) else None


def files_below(folder: Path, hidden: bool = True) -> Iterator[Path]:
    """Every file and link below a folder; without `hidden`, not those whose name or folder starts with a dot.

    A folder that another process removes meanwhile is passed over, and so is one that may not be read.
    """
    for root, folders, names in os.walk(folder):
        if not hidden:
            folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names if hidden or not name.startswith("."))


def expand(path: str | Path) -> Path:
    """A path with the home folder in place of `~`; as it is where nobody has one."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path's own raises there)


def portable(name: str) -> str:
    """A name for a file or folder that every system takes; a digest keeps apart what had to be changed."""
    safe = name.encode("utf-8", "replace").decode("utf-8")  # bytes that are no text, on Linux
    safe = FORBIDDEN.sub("_", safe)
    if safe.startswith("."):
        safe = "_" + safe[1:]  # hidden files are not looked at when records are read
    if safe != safe.rstrip(" .") or RESERVED.fullmatch(safe):
        safe = f"_{safe.rstrip(' .')}"
    while len(safe.encode()) > MAX_NAME_BYTES:
        safe = safe[1:]  # from the front: the end says which format it was
    return safe if safe == name else f"{safe}~{short_digest(name)}"


def short_digest(text: str, size: int = 5) -> str:
    """Hex digest of a text, of so many bytes."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()


def config_folder() -> Path:
    """Folder of the settings file and of the user's presets; may not exist yet. SIDE_STEP_HOME overrides it."""
    return _folder(platformdirs.user_config_path)


def state_folder() -> Path:
    """Folder of the log of what went wrong outside any run; may not exist yet. SIDE_STEP_HOME overrides it."""
    return _folder(platformdirs.user_state_path)


def cache_folder() -> Path:
    """Folder of what can be made anew; may not exist yet. SIDE_STEP_HOME overrides it."""
    return _folder(platformdirs.user_cache_path)


def _folder(path_of: Callable[..., Path]) -> Path:
    if home := os.environ.get("SIDE_STEP_HOME"):  # one folder for everything: portable installs and tests
        return expand(home)
    usual = expand("~/Library/Application Support/Side-Step")
    is_cache = path_of is platformdirs.user_cache_path
    if sys.platform == "darwin" and usual.is_dir() and not is_cache:
        return usual  # XDG variables move it since 0.2.0; what stands there stays
    name = "Side-Step" if sys.platform in ("win32", "darwin") else "side-step"
    try:
        roaming = {} if is_cache else {"roaming": path_of is platformdirs.user_config_path}
        folder = path_of(name, appauthor=False, **roaming)
    except RuntimeError:  # no HOME, and a user that the system does not know
        folder = Path("~")
    if not str(folder).startswith("~"):  # as older versions of platformdirs leave it
        return folder
    return Path(tempfile.gettempdir()) / f"{name}-{os.getuid() if hasattr(os, 'getuid') else ''}"


def require_writable(folder: Path, flag: str) -> None:
    """Try, and leave nothing: hours must not go into what then cannot be written. Raises UserError naming the flag."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise not_writable(folder, error, flag) from None


def not_writable(folder: Path, error: OSError, flag: str = "--output-dir") -> UserError:
    """What to say of a folder of results that the system refuses."""
    return UserError(
        f"{flag} {folder}: cannot be written ({error.strerror or error}).",
        "Choose a folder on a disk with room where you may write.",
    )


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Keep every other process out of a folder of results while the block runs; the folder is made if need be.

    The lock belongs to the process and goes with it, however it ends. Raises UserError naming the process that holds
    it. Other files in the folder are not touched.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(folder / ".lock").acquire(timeout=0).lock
        except NotImplementedError:  # a file system without locks: a file that names its process has to do
            lock = SoftFileLock(folder / ".lock").acquire(timeout=0).lock
    except Timeout:
        try:
            who = (folder / HOLDER).read_text(encoding="utf-8", errors="replace")[:200].splitlines()[0]
        except (OSError, IndexError):
            who = "it has not said which yet"
        raise UserError(
            f"--output-dir {folder}: another process is writing there ({who}).",
            "Wait for it or stop it (Ctrl-C there saves first), or choose another folder.",
        ) from None
    except OSError as error:
        raise not_writable(folder, error) from None
    holder = folder / HOLDER
    try:
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M')}")
        yield
    finally:
        remove(holder)
        nothing_came = is_new and all(path.name == ".lock" for path in folder.iterdir())
        if nothing_came:  # while the lock is held, or another start's would go
            with suppress(OSError):  # Windows removes it with the lock
                (folder / ".lock").unlink()
        lock.release()
        if nothing_came:
            with suppress(OSError):  # another start has come in
                folder.rmdir()
