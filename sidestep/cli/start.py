"""Where every process begins: the version is said without waiting for the command line, which all else needs."""

import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from sidestep import __version__


def entry() -> NoReturn:
    """Say the version where that is all that was asked; else run the command line of this process and leave it."""
    if sys.argv[1:] == ["--version"] and sys.stdout:
        with suppress(OSError):  # the command line tries again, and tells why it can't be written
            os.write(sys.stdout.fileno(), f"{version()}{os.linesep}".encode())
            sys.exit()
    from sidestep.cli import main

    main.entry()


def version() -> str:
    """Versions of Side-Step, its commit where that is known, PyTorch and Python, in a line."""
    root = Path(__file__).parents[2]
    commit = ""
    if (root / ".git").exists() and (git := shutil.which("git")):
        asked = [git, "-C", str(root), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    from importlib import metadata  # every other start would wait for it

    try:
        torch = f"PyTorch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        torch = "PyTorch is not installed"
    of_commit = f" (commit {commit})" if commit else ""
    return f"Side-Step {__version__}{of_commit}, {torch}, Python {platform.python_version()}"
