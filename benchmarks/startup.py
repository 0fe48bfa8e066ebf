"""How long the program keeps one waiting: from Enter to the first step on the demo's songs, `plan`, `--version`.

    uv run benchmarks/startup.py                     five cold and five warm starts of each
    uv run benchmarks/startup.py --beside CHECKOUT   the same with another checkout's code, in alternating turns

"Warm": run before. "Cold": nothing of Python, its packages or this program is in the page cache, as after a boot; the
bytecode is there, as after any start before. Files that other programs have open stay in memory, so on a machine that
does other Python work cold is warmer than after a boot. The first step is that of `fixed --gradient-accumulation 1`:
it has ended when its line is printed. Without `uv`: what that adds is told by `uv run train.py --version`.

Writes startup.json and startup.md to benchmarks/results.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not as a module of the repository

import psutil

from benchmarks.measure import ROOT

RESULTS = ROOT / "benchmarks" / "results"
FIRST_STEP = b"step 1/"


def evict(folders: Iterable[Path]) -> None:
    """Ask the kernel to forget the contents of all files in these folders. Linux."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def start(arguments: list[str], checkout: Path, until: bytes) -> dict[str, float]:
    """Seconds from the start to the line that has `until` in it, of the clock and of the processor, and to the end."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "train.py", "--plain", *arguments],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout
        seen = {}
        watched = psutil.Process(process.pid)
        said = []
        for line in process.stdout:
            said.append(line)
            if until in line and not seen:
                used = watched.cpu_times()
                seen = {"seconds": time.perf_counter() - began, "processor": used.user + used.system}
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not seen:
        raise RuntimeError(b"".join(said).decode(errors="replace"))
    whole = usage.ru_utime + usage.ru_stime
    return seen | {"to the end": time.perf_counter() - began, "processor to the end": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("cold", "warm"), nargs="+", default=["cold", "warm"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    checkouts = {"this": ROOT} | ({"beside": options.beside.resolve()} if options.beside else {})
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        os.environ["SIDE_STEP_HOME"] = str(home / "home")
        start(["demo", "--output-dir", str(home / "demo")], ROOT, b"Next:")
        model = ["--checkpoint-dir", str(home / "demo" / "checkpoints")]
        data = ["--dataset-dir", str(home / "demo" / "tensors"), "--rank", "4"]
        run = home / "run"
        one_step = ["--epochs", "1", "--max-steps", "1", "--gradient-accumulation", "1", "--device", "cpu"]
        commands = {
            "to the first step": (["fixed", *model, *data, "--output-dir", str(run), *one_step], FIRST_STEP),
            "`plan`": (["plan", *model, *data], b"needed"),
            "`--version`": (["--version"], b"Side-Step"),
        }
        for kind in options.only:
            for turn in range(options.rounds):
                for what, (arguments, until) in commands.items():
                    for which in list(checkouts)[:: 1 if turn % 2 else -1]:
                        shutil.rmtree(run, ignore_errors=True)
                        if kind == "cold":
                            evict(
                                [
                                    Path(sysconfig.get_path("stdlib")),
                                    Path(sysconfig.get_path("purelib")),
                                    ROOT / "sidestep",
                                ]
                            )
                        times = start(arguments, checkouts[which], until)
                        found.setdefault((what, kind, which), []).append(times)
                        print(what, kind, which, {name: round(value, 2) for name, value in times.items()}, flush=True)
    rows = [
        {"what": what, "start": kind, "checkout": which}
        | {name: [round(times[name], 3) for times in turns] for name in turns[0]}
        for (what, kind, which), turns in found.items()
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "startup.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    page = report(rows, options.rounds)
    (options.output / "startup.md").write_text(page, encoding="utf-8")
    print(page)


def report(rows: list[dict], rounds: int) -> str:
    """The table: medians, with the least and the most in brackets."""

    def cell(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"

    head = [
        "# Start-up",
        "",
        f"Rebuilt by `uv run benchmarks/startup.py`; median of {rounds} (least–most), seconds.",
        "",
    ]
    table = ["| | start | seconds | processor | to the end | processor |", "|---|---|---|---|---|---|"]
    for row in rows:
        which = "" if row["checkout"] == "this" else f", {row['checkout']}"
        columns = ("seconds", "processor", "to the end", "processor to the end")
        table.append(f"| {row['what']}{which} | {row['start']} | {' | '.join(cell(row[name]) for name in columns)} |")
    return "\n".join([*head, *table]) + "\n"


if __name__ == "__main__":
    main()
