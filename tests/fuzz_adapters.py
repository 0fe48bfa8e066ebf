"""Feed `inspect` and the exporter hostile adapters until the time is up.

Only a UserError may come out, and only inside --output may anything appear.

    uv run python -m tests.fuzz_adapters [SECONDS]      default 600

Each failure is shrunk to its smallest form by hypothesis, printed, and ends the run with status 1.
"""

import contextlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from sidestep.errors import UserError
from sidestep.events import null
from sidestep.settings.config import ExportConfig, InspectConfig
from sidestep.tasks.export import export
from sidestep.tasks.inspect import inspect_adapter
from tests import hostile

FORMATS = ("peft", "comfyui", "diffusers", "lycoris")


def use(files: dict[str, bytes], root: Path) -> bool:
    """Try everything that reads an adapter; True when the files turned out to be one."""
    shutil.rmtree(root, ignore_errors=True)
    folder = hostile.write(root / "adapter", files)
    try:
        inspect_adapter(InspectConfig(path=folder), null)
    except UserError as error:
        if not error.problem or "\n" in error.problem:
            raise AssertionError(f"not one line: {error.problem!r}") from error
        return False
    for form in FORMATS:
        with contextlib.suppress(UserError):
            export(ExportConfig(adapter=folder, output=root / form, format=form, strength=0.5), null)
    assert {p.name for p in root.iterdir()} <= {"adapter", *FORMATS}
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
    return True


def fuzz(seconds: float) -> tuple[int, int]:
    """(folders tried, of which were adapters)."""
    tried = adapters = 0
    with tempfile.TemporaryDirectory() as work:
        end, round_ = time.monotonic() + seconds, 0
        while time.monotonic() < end:

            @seed(round_)
            @settings(
                max_examples=500,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.generate, Phase.shrink),
            )
            @given(hostile.folders())
            def one_round(files: dict[str, bytes]) -> None:
                nonlocal tried, adapters
                if time.monotonic() < end:
                    tried += 1
                    adapters += use(files, Path(work) / "root")

            one_round()
            round_ += 1
    return tried, adapters


if __name__ == "__main__":
    tried, adapters = fuzz(float(sys.argv[1]) if len(sys.argv) > 1 else 600)
    print(f"{tried} hostile folders, {adapters} of them adapters after all: nothing but clear refusals")
