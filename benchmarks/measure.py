"""Timing that survives a busy machine: all variants run in turns; told are medians and the ratios of each turn."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "diffusers", "peft", "transformers", "accelerate")


@dataclass(frozen=True)
class Setting:
    """Where the benchmark runs and how long it may take."""

    device: torch.device
    dtype: torch.dtype
    rounds: int
    quick: bool
    cpu_time: bool = False  # count CPU seconds of the process: steady on a busy machine, with one thread

    def now(self) -> float:
        return time.process_time() if self.cpu_time else time.perf_counter()


@dataclass(frozen=True)
class Times:
    """Seconds of one variant in every turn."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: "Times") -> float:
        """How many times longer this takes than `other`.

        It is the median over turns of their ratio, so that a slow moment meets both.
        """
        return statistics.median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))


@dataclass(frozen=True)
class Result:
    """One table of the benchmark.

    rows: one dict per row; facts: single figures that docs/benchmarks.md quotes; note: how it was measured.
    """

    name: str
    title: str
    note: str
    rows: list[dict[str, Any]]
    facts: dict[str, float] = field(default_factory=dict)


def with_part(page: str, marks: tuple[str, str], part: str) -> str:
    """The page with `part` between the lines that mark its place, in the place of what is there."""
    before, rest = page.split(marks[0])
    return "\n".join([before + marks[0], part, marks[1] + rest.split(marks[1])[1]])


def as_markdown(result: Result) -> str:
    """A result as a Markdown table with its note and its facts."""
    columns = list(dict.fromkeys(column for row in result.rows for column in row))
    lines = [f"### {result.title}", "", result.note, "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |" for row in result.rows]
    return "\n".join(
        [
            *lines,
            *([""] if result.facts else []),
            *(f"- {name}: **{value:.2f}**" for name, value in result.facts.items()),
            "",
        ]
    )


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type in ("cuda", "xpu", "mps"):
        torch.get_device_module(device).synchronize()


def timed(work: Callable[[], Any], setting: Setting) -> float:
    """Seconds of one call, the device's queue included."""
    synchronize(setting.device)
    started = setting.now()
    work()
    synchronize(setting.device)
    return setting.now() - started


def in_turns(variants: Mapping[str, Callable[[], Any]], setting: Setting, rounds: int = 0) -> dict[str, Times]:
    """Run every variant once per turn, in alternating order, after one turn that does not count."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range((rounds or setting.rounds) + 1):
        for name in names if turn % 2 else reversed(names):
            seconds = timed(variants[name], setting)
            if turn:
                found[name].append(seconds)
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}


def machine(setting: Setting) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "sidestep"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit + (" with local changes" if changed else ""),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else setting.device.type,
        "precision": str(setting.dtype).removeprefix("torch."),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": {name: version(name) for name in PACKAGES},
        "mode": "quick" if setting.quick else "full",
        "clock": "CPU time of one process" if setting.cpu_time else "wall clock",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
