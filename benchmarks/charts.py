"""The benchmark's figures as SVG, drawn to be read on light and dark pages."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHER, GREY = "#2f7ed8", "#e07b39", "#808080"
STYLE = {
    "svg.hashsalt": "side-step",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100,
}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), GREY)


def draw(tables: dict[str, list[dict[str, Any]]], folder: Path) -> list[Path]:
    """One chart for each table that is there and has one. Returns the files."""
    drawn = []
    with plt.rc_context(STYLE):
        if "attention_kernel" in tables:
            drawn.append(_save(_attention(tables["attention_kernel"]), folder / "attention.svg"))
        if "growth" in tables:
            drawn.append(_save(_growth(tables["growth"]), folder / "growth.svg"))
        if {"epoch_clips", "epoch_joined"} <= tables.keys():
            drawn.append(_save(_epochs(tables["epoch_clips"] + tables["epoch_joined"]), folder / "epochs.svg"))
    return drawn


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)
    path.write_text(
        "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()) + "\n", encoding="utf-8"
    )
    return path


def _attention(rows: list[dict[str, Any]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(6, 3.4))
    seconds = [row["seconds"] for row in rows]
    for column, name, color in (("dense mask, ms", "dense mask", OTHER), ("local, ms", "block-local", OURS)):
        axes.plot(seconds, [1000 * row[column] / row["tokens"] for row in rows], "o-", color=color, label=name)
    axes.set(
        xlabel="seconds of music", ylabel="µs per token", title="A sliding-window layer's attention", ylim=(0, None)
    )
    axes.legend(frameon=False)
    return figure


def _growth(rows: list[dict[str, Any]]) -> plt.Figure:
    names = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(2.6 * len(names), 3), sharey=False)
    for name, axes in zip(names, panels, strict=True):
        chosen = [row for row in rows if row["axis"] == name]
        axes.plot([row["value"] for row in chosen], [row["ms"] / 1000 for row in chosen], "o-", color=OURS)
        axes.set(xlabel=name, ylim=(0, 1.1 * max(row["ms"] for row in chosen) / 1000), xlim=(0, None))
    panels[0].set_ylabel("seconds per step")
    return figure


def _epochs(rows: list[dict[str, Any]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(6, 2.4))
    labels = [f"{row['epoch over']}: {row['way']}" for row in rows]
    widths = [row["usual over ours"] for row in rows]
    bars = axes.barh(labels[::-1], widths[::-1], color=[OURS if row["way"] == "ours" else OTHER for row in rows[::-1]])
    axes.bar_label(bars, fmt="%.2f ×", padding=3)
    axes.set(xlabel="time of a whole epoch, ours = 1", xlim=(0, max(widths) * 1.2))
    return figure
