"""How long the program keeps one waiting: from Enter to the first step on the demo's songs, `plan`, `--version`.

    uv run benchmarks/startup.py                     five cold and five warm starts of each
    uv run benchmarks/startup.py --beside CHECKOUT   the same with another checkout's code, in alternating turns

"Warm": run before. "Cold": nothing of Python, its packages or this program is in the page cache, as after a boot; the
bytecode is there, as after any start before. Files that other programs have open stay in memory, so on a machine that
does other Python work cold is warmer than after a boot. The first step is that of `fixed --gradient-accumulation 1`:
it has ended when its line is printed. `--version` is started by uv, the others without; `import torch` is what no
start with a model can be quicker than. Each checkout trains on a demo of its own and is asked without the flags that
it does not know.

Writes startup.json and startup.md to benchmarks/results, and the table of docs/benchmarks.md.
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
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not as a module of the repository

import psutil

from benchmarks.measure import ROOT, with_part

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
MARKS = ("<!-- start-up, rebuilt by benchmarks/startup.py -->", "<!-- end of start-up -->")
UV = os.environ.get("UV", "uv")  # the one that runs this, not a version manager's way to it
VERSION = ("`uv run train.py --version`", [UV, "run", "train.py", "--version"], b"Side-Step")
TORCH = ("`import torch`, nothing else", [sys.executable, "-c", "import torch; print(torch.__version__)"], b".")


@dataclass(frozen=True)
class Checkout:
    """The program at one time of its history, and a folder for its demo, its runs and its settings."""

    path: Path
    home: Path


@dataclass(frozen=True)
class Start:
    """A command, what it is called, and what is in the line that one waits for."""

    what: str
    words: list[str]
    until: bytes


def evict(folders: Iterable[Path]) -> None:
    """Ask the kernel to forget the contents of all files in these folders. Linux."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def timed(start: Start, checkout: Checkout) -> dict[str, float]:
    """Seconds from the start to the line that is waited for, of the clock and of the processor, and to the end."""
    environment = os.environ | {"SIDE_STEP_HOME": str(checkout.home), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    began = time.perf_counter()
    with subprocess.Popen(start.words, cwd=checkout.path, env=environment, **pipes) as process:
        assert process.stdout
        seen = {}
        watched = psutil.Process(process.pid)
        said = []
        for line in process.stdout:
            said.append(line)
            if start.until in line and not seen:
                used = [each.cpu_times() for each in (watched, *watched.children(recursive=True))]
                processor = sum(times.user + times.system for times in used)
                seen = {"seconds": time.perf_counter() - began, "processor": processor}
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not seen:
        raise RuntimeError(b"".join(said).decode(errors="replace"))
    whole = usage.ru_utime + usage.ru_stime
    return seen | {"to the end": time.perf_counter() - began, "processor to the end": whole}


def starts_of(checkout: Checkout) -> list[Start]:
    """What is started of a checkout, for which its demo is made; `--version` and torch of this one only."""
    home = checkout.home

    def program(*words: str) -> list[str]:
        return [sys.executable, "train.py", "--plain", *words]

    timed(Start("demo", program("demo", "--output-dir", str(home / "demo")), b"Next:"), checkout)
    model = ["--checkpoint-dir", str(home / "demo" / "checkpoints"), "--rank", "4"]
    data = ["--dataset-dir", str(home / "demo" / "tensors")]
    one_step = ["--epochs", "1", "--max-steps", "1", "--gradient-accumulation", "1", "--device", "cpu"]
    plan = subprocess.run(program("plan", "--help"), cwd=checkout.path, capture_output=True, text=True, check=True)
    training = program("fixed", *model, *data, "--output-dir", str(home / "run"), *one_step)
    planning = program("plan", *model, *(data if data[0] in plan.stdout else []))
    others = [Start(*VERSION), Start(*TORCH)] if checkout.path == ROOT else []
    return [Start("to the first step", training, b"step 1/"), Start("`plan`", planning, b"needed"), *others]


def measured(checkouts: dict[str, Checkout], kinds: list[str], rounds: int) -> list[dict]:
    """All starts in alternating turns: a row for each, with its times in every turn."""
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    starts = {which: starts_of(checkout) for which, checkout in checkouts.items()}
    for kind in kinds:
        for turn in range(rounds):
            for at in range(len(starts["this"])):
                for which in [which for which in checkouts if at < len(starts[which])][:: 1 if turn % 2 else -1]:
                    start, checkout = starts[which][at], checkouts[which]
                    shutil.rmtree(checkout.home / "run", ignore_errors=True)
                    if kind == "cold":
                        packages = [Path(sysconfig.get_path(part)) for part in ("stdlib", "purelib")]
                        evict([*packages, checkout.path / "sidestep"])
                    times = timed(start, checkout)
                    found.setdefault((start.what, kind, which), []).append(times)
                    said = {name: round(value, 2) for name, value in times.items()}
                    print(start.what, kind, which, said, flush=True)
    return [
        {"what": what, "start": kind, "checkout": which}
        | {name: [round(times[name], 3) for times in turns] for name in turns[0]}
        for (what, kind, which), turns in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("cold", "warm"), nargs="+", default=["warm", "cold"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        checkouts = {"this": ROOT} | ({"beside": options.beside.resolve()} if options.beside else {})
        made = {which: Checkout(path, Path(home) / which) for which, path in checkouts.items()}
        rows = measured(made, options.only, options.rounds)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "startup.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (options.output / "startup.md").write_text(report(rows), encoding="utf-8")
    if options.output == RESULTS:
        PAGE.write_text(with_part(PAGE.read_text(encoding="utf-8"), MARKS, table(rows)), encoding="utf-8")
    print(table(rows))


def cell(values: list[float]) -> str:
    """The median, with the least and the most in brackets."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def table(rows: list[dict]) -> str:
    """Seconds of each start; beside another checkout with its seconds and the median of the turns' ratios."""
    of = {(row["what"], row["start"], row["checkout"]): row["seconds"] for row in rows}
    lines = ["| seconds | start | this | before | this over before |", "|---|---|---|---|---|"]
    for (what, start, which), mine in of.items():
        if which == "this":
            theirs = of.get((what, start, "beside"))
            ratio = theirs and statistics.median(one / other for one, other in zip(mine, theirs, strict=True))
            compared = f"{cell(theirs)} | {ratio:.2f}" if theirs else "|"
            lines.append(f"| {what} | {start} | {cell(mine)} | {compared} |")
    return "\n".join(lines)


def report(rows: list[dict]) -> str:
    """All times of all starts."""
    columns = ("seconds", "processor", "to the end", "processor to the end")
    lines = [
        "# Start-up",
        "",
        f"Rebuilt by `uv run benchmarks/startup.py`; median of {len(rows[0]['seconds'])} (least–most), seconds.",
        "",
        "| | start | seconds | processor | to the end | processor |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        which = "" if row["checkout"] == "this" else f", {row['checkout']}"
        lines.append(f"| {row['what']}{which} | {row['start']} | {' | '.join(cell(row[name]) for name in columns)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
