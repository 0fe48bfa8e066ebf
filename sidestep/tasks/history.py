"""`history`: past runs and how well they went, from what stands in their folders. Needs no torch."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.events import Finished, Notice, Report, Table
from sidestep.settings.config import HistoryConfig, resuming_line
from sidestep.settings.path_checks import FoundRun, read_run
from sidestep.words import count, hours, side_step

SMOOTHED_EPOCHS = 5  # what a run without validation is judged by: the mean loss of so many epochs
DEEPEST = 3  # folders below the given one in which runs are looked for
KEPT_EVENTS = ('"event": "EpochDone"', '"event": "Validated"', '"event": "StepDone"')


@dataclass(frozen=True)
class PastRun:
    """A run as it is listed.

    started: ISO time. seconds: in epochs that ended. best_by: `validation`, `training` (smoothed over epochs) or empty.
    """

    folder: str
    name: str
    model: str
    adapter: str
    rank: int | None
    started: str
    epochs_done: int
    epochs: int
    steps_done: int
    steps: int
    seconds: float
    best_loss: float | None
    best_epoch: int | None
    best_by: str
    last_loss: float | None
    finished: bool
    marks: int


def history(config: HistoryConfig, report: Report) -> dict[str, list[PastRun]]:
    """{"runs": the runs in a folder, the newest first}. Raises UserError when the folder is not there."""
    if not config.folder.is_dir():
        raise UserError(
            f"{config.folder}: no such folder.",
            f"Give a run's --output-dir, or a folder that holds runs: {side_step('history', 'FOLDER')}",
        )
    found = {str(run.folder): run for run in _find(config.folder, DEEPEST)}
    runs = sorted((past_run(found[folder]) for folder in sorted(found)), key=lambda run: run.started, reverse=True)
    if not runs:
        report(Notice(message=f"No runs in {config.folder}, nor in the folders below it.", level="warning"))
        return {"runs": []}
    columns = ("run", "started", "model", "adapter", "epochs", "time", "best loss", "judged by", "state")
    rows = []
    for run in runs:
        path = Path(run.folder)
        is_below = path.is_relative_to(config.folder) and path != config.folder
        ended = f"finished, {count(run.steps_done, 'step')}" if run.steps else "finished"
        stopped = f"stopped at step {run.steps_done} of {run.steps}" if run.steps else "no step logged"
        row = (
            path.relative_to(config.folder).as_posix() if is_below else run.name,
            run.started[:16].replace("T", " "),
            run.model,
            f"{run.adapter} {run.rank}" if run.rank else run.adapter,
            f"{run.epochs_done}/{run.epochs}",
            hours(run.seconds),
            "-" if run.best_loss is None else f"{run.best_loss:.4f} (epoch {run.best_epoch})",
            run.best_by or "-",
            (ended if run.finished else stopped) + (f", {count(run.marks, 'mark')}" if run.marks else ""),
        )
        rows.append(row)
    report(Table(title=f"{count(len(runs), 'run')} in {config.folder}", columns=columns, rows=tuple(rows)))
    resumable = next((run.folder for run in runs if not run.finished and found[run.folder].checkpoints), None)
    if resumable is not None:
        try:
            command = resuming_line(Path(resumable), found[resumable].settings)
            report(Finished(message=f"{resumable} is not finished and can go on.", next_commands=(command,)))
        except UserError as error:  # its settings are those of another version
            report(Notice(message=f"{resumable} is not finished and cannot go on: {error.problem}", level="warning"))
    return {"runs": runs}


def past_run(run: FoundRun) -> PastRun:
    """What a run's folder says of it."""
    settings = run.settings
    # by number: (loss, seconds); what a resumed run did again counts once, as it ended
    epochs: dict[int, tuple[float, float]] = {}
    validations: dict[int, tuple[float, int]] = {}  # by step: (loss, epoch)
    steps = (0, 0)
    for event in read_events(run.folder / "events.jsonl"):
        try:
            match event["event"]:
                case "EpochDone":
                    epochs[int(event["epoch"])] = (float(event["loss"]), float(event["seconds"]))
                case "Validated":
                    validations[int(event["step"])] = (float(event["loss"]), int(event["epoch"]))
                case "StepDone":
                    steps = (int(event["step"]), int(event["total_steps"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    judged = [(loss, epoch) for loss, epoch in validations.values() if math.isfinite(loss)]
    by = "validation" if judged else "training"
    for epoch in () if judged else epochs:  # without validation, by means of training losses
        last = [epochs[e][0] for e in range(max(1, epoch - SMOOTHED_EPOCHS + 1), epoch + 1) if e in epochs]
        if (len(last) == SMOOTHED_EPOCHS or len(epochs) < SMOOTHED_EPOCHS) and all(map(math.isfinite, last)):
            judged.append((sum(last) / len(last), epoch))
    best_loss, best_epoch = min(judged, default=(None, None))
    last_loss = epochs[max(epochs)][0] if epochs else math.nan
    return PastRun(
        folder=str(run.folder),
        name=str(settings.get("run_name") or run.folder.resolve().name),
        model=str(settings.get("model_variant", "?")),
        adapter=str(settings.get("adapter_type", "?")),
        rank=settings["rank"] if isinstance(settings.get("rank"), int) else None,
        started=datetime.fromtimestamp(_started(run.folder)).astimezone().isoformat(timespec="seconds"),
        epochs_done=max(epochs, default=0),
        epochs=settings["epochs"] if isinstance(settings.get("epochs"), int) else 0,
        steps_done=steps[0],
        steps=steps[1],
        seconds=sum(seconds for _, seconds in epochs.values()),
        best_loss=best_loss,
        best_epoch=best_epoch,
        best_by=by if judged else "",
        last_loss=last_loss if math.isfinite(last_loss) else None,
        finished=run.finished,
        marks=len(run.marks),
    )


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a run that tell how it went, in order; a line that was cut short by a crash is left out."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("{") and any(kept in line[:60] for kept in KEPT_EVENTS):
                    try:
                        yield json.loads(line)
                    except (ValueError, RecursionError):
                        continue
    except OSError:
        return


def _find(folder: Path, deeper: int) -> Iterator[FoundRun]:
    run = read_run(folder)
    if run is not None:
        yield run
    elif deeper:
        try:
            below = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
        except OSError:
            return
        for path in below:
            if not path.name.startswith("."):
                yield from _find(path, deeper - 1)


def _started(folder: Path) -> float:
    """When the run wrote its first event; for one without events, its settings."""
    try:
        with (folder / "events.jsonl").open(encoding="utf-8", errors="replace") as lines:
            return float(json.loads(next(lines))["time"])
    except (OSError, StopIteration, ValueError, KeyError, TypeError, RecursionError):
        return (folder / "config.json").stat().st_mtime
