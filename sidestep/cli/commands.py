"""One function per command: it imports its task, runs it with a config, and says with which status it ended.

The imports stand inside the functions so that help and the wizard start without torch.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sidestep.errors import ExitStatus
from sidestep.events import Event, FileFailed, Notice, Report, Saved, Table
from sidestep.settings import presets as preset_files
from sidestep.settings.config import (
    BuildDatasetConfig,
    DemoConfig,
    DoctorConfig,
    EstimateConfig,
    ExportConfig,
    HistoryConfig,
    InspectConfig,
    PlanConfig,
    PreprocessConfig,
    PresetsConfig,
    SampleConfig,
    TrainConfig,
)
from sidestep.terminal.terminal import Terminal
from sidestep.wizard.review import preset_table


def preprocess(config: PreprocessConfig, report: Report, terminal: Terminal) -> ExitStatus:
    """`fixed --preprocess`. Nothing preprocessed is a failure; some songs left out have a status of their own."""
    from sidestep.tasks.preprocess import preprocess

    summary = preprocess(config, report)
    if not summary.failed:
        return ExitStatus.OK
    return ExitStatus.SOME_FAILED if summary.done or summary.skipped else ExitStatus.FAILED


def train(config: TrainConfig, report: Report, terminal: Terminal) -> ExitStatus:
    """`fixed`. Records that had to be left out have a status of their own."""
    from sidestep.tasks.plan.plan import fitted
    from sidestep.tasks.train import train

    left_out: list[Event] = []

    def noting(event: Event) -> None:
        if isinstance(event, FileFailed):
            left_out.append(event)
        report(event)

    train(fitted(config, report), noting)
    return ExitStatus.SOME_FAILED if left_out else ExitStatus.OK


def build_dataset(config: BuildDatasetConfig, report: Report, terminal: Terminal) -> ExitStatus:
    """`build-dataset`, and what it was asked to find out about the songs."""
    from sidestep.tasks.build_dataset import build_dataset

    summary = build_dataset(config, report)
    if config.analyze:
        from sidestep.tasks.build_dataset import analyze

        analyze(summary.path, report)
    if config.audit:
        from sidestep.tasks.audit import audit

        audit(summary.path, report, config.checkpoint_dir)
    return ExitStatus.SOME_FAILED if summary.failed else ExitStatus.OK


def sample(config: SampleConfig, report: Report, terminal: Terminal) -> ExitStatus:
    """`sample`."""
    from sidestep.tasks.sample import sample

    sample(config, report)
    return ExitStatus.OK


def estimate(config: EstimateConfig, report: Report, terminal: Terminal) -> ExitStatus:
    """`estimate`."""
    from sidestep.tasks.estimate import estimate

    estimate(config, report)
    return ExitStatus.OK


def export(config: ExportConfig, report: Report, terminal: Terminal) -> ExitStatus:
    """`export`."""
    from sidestep.tasks.export import export

    export(config, report)
    return ExitStatus.OK


def inspect(config: InspectConfig, report: Report, terminal: Terminal) -> ExitStatus:
    """`inspect`."""
    from sidestep.tasks.inspect import inspect_adapter

    result = inspect_adapter(config, report)
    return _as_json(config, result, terminal)


def history(config: HistoryConfig, report: Report, terminal: Terminal) -> ExitStatus:
    """`history`."""
    from sidestep.tasks.history import history

    result = history(config, report)
    return _as_json(config, result, terminal)


def plan(config: PlanConfig, report: Report, terminal: Terminal) -> ExitStatus:
    """`plan`. An answer is a success, also when it is that the run does not fit."""
    from sidestep.tasks.plan.plan import as_json, plan

    result = plan(config, report)
    return _as_json(config, as_json(result), terminal)


def demo(config: DemoConfig, report: Report, terminal: Terminal) -> ExitStatus:
    """`demo`."""
    from sidestep.tasks.demo import demo

    demo(config, report)
    return ExitStatus.OK


def doctor(config: DoctorConfig, report: Report, terminal: Terminal) -> ExitStatus:
    """`doctor`."""
    from sidestep.tasks.doctor import doctor

    return _as_json(config, doctor(config, report), terminal)


def presets(config: PresetsConfig, report: Report, terminal: Terminal) -> ExitStatus:
    """`presets list|show|import|export`."""
    match config.action:
        case "list":
            rows = tuple(
                (p.name, "built in" if p.built_in else "yours", p.description) for p in preset_files.list_presets()
            )
            report(Table(title="Presets", columns=("name", "from", "what for"), rows=rows))
        case "show":
            report(preset_table(preset_files.find(config.what)))
        case "import":
            preset = preset_files.import_file(Path(config.what), replace=config.overwrite)
            report(Saved(what=f"preset {preset.name}", path=str(preset.path)))
            if ignored := preset_files.read(Path(config.what).expanduser()).unknown:
                report(
                    Notice(
                        message=f"Ignored, because no command has such a setting: {', '.join(ignored)}.",
                        level="warning",
                    )
                )
        case "export":
            path = preset_files.export_file(
                config.what, config.file or Path(f"{config.what}.json"), replace=config.overwrite
            )
            report(Saved(what=f"preset {config.what}", path=str(path)))
    return ExitStatus.OK


def _as_json(config: Any, result: Any, terminal: Terminal) -> ExitStatus:
    """With `--json`, print a task's result (dataclasses, alone or in a list) as one JSON value."""
    if config.json:
        terminal.out.write(json.dumps(result, default=_plain, ensure_ascii=False) + "\n")
    return ExitStatus.OK


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


RUN: dict[type, Callable[[Any, Report, Terminal], ExitStatus]] = {
    PreprocessConfig: preprocess,
    TrainConfig: train,
    BuildDatasetConfig: build_dataset,
    SampleConfig: sample,
    EstimateConfig: estimate,
    PlanConfig: plan,
    ExportConfig: export,
    InspectConfig: inspect,
    HistoryConfig: history,
    DemoConfig: demo,
    PresetsConfig: presets,
    DoctorConfig: doctor,
}
