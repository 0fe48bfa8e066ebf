"""The only error boundary: what a job raises becomes a message, a log and an exit status."""

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from sidestep import __version__
from sidestep.errors import ExitStatus, Interrupted, UserError
from sidestep.folders import state_folder
from sidestep.terminal.terminal import Terminal

INSTALL_TORCH = "uv --no-config pip install torch --torch-backend=auto"
RETYPE = {errno.ENOSPC: "Free some space, then run the same command again: what is complete is kept.", errno.EACCES: "Check who may write there."}


def guarded(terminal: Terminal, log_folder: Callable[[], Path | None], job: Callable[[], int]) -> int:
    """Run a job and return its exit status; whatever it raises is told in the user's words.

    `log_folder`: the run's output folder, where a traceback goes (None: the platform's folder for logs).
    """
    try:
        return int(job())
    except Interrupted as stopped:
        terminal.complain("Stopped; what was done is saved.", f"Go on with:\n  {stopped.resume}" if stopped.resume else "")
        return ExitStatus.INTERRUPTED
    except KeyboardInterrupt:
        terminal.complain("Stopped.")
        return ExitStatus.INTERRUPTED
    except UserError as error:
        if error.status == ExitStatus.FAILED and (folder := log_folder()) is not None and folder.is_dir():
            write_log(folder)
        terminal.complain(error.problem, error.fix)
        return error.status
    except BrokenPipeError:
        # The reader (head, less) has gone: point the stream elsewhere so that Python's own flush at exit stays quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.OK
    except Exception as error:  # noqa: BLE001  this is the boundary
        return _unexpected(error, terminal, log_folder())


def _unexpected(error: Exception, terminal: Terminal, folder: Path | None) -> ExitStatus:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "torch":
        terminal.complain("PyTorch is not installed.", f"Install the build for this machine, then run the command again:\n  {INSTALL_TORCH}")
        return ExitStatus.FAILED
    log = write_log(folder)
    where = f"The details are in {log}." if log else "The log could not be written."
    if isinstance(error, OSError) and error.strerror:
        terminal.complain(f"{error.strerror}: {error.filename or 'no file named'}.", f"{RETYPE.get(error.errno, '')} {where}".strip())
    else:
        first = str(error).strip().split("\n")[0][:200]
        terminal.complain(f"Something went wrong that Side-Step did not expect ({type(error).__name__}{': ' + first if first else ''}).", where)
    return ExitStatus.FAILED


def write_log(folder: Path | None) -> Path | None:
    """Append the current exception's traceback to `sidestep.log`; the file, or None where no folder takes it."""
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} Side-Step {__version__} Python {sys.version.split()[0]} {sys.platform}\n"
    text += f"{' '.join(sys.argv)}\n{traceback.format_exc()}\n"
    for place in [folder, state_folder(), Path.cwd()]:
        if place is None:
            continue
        try:
            place.mkdir(parents=True, exist_ok=True)
            with (place / "sidestep.log").open("a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(text)
        except OSError:
            continue
        return place / "sidestep.log"
    return None
