"""Runs the command of a config: finds its function, and turns what that returns into output and an exit status.

Most commands are a task and nothing else; the functions below are those that do more. A task is imported when it runs,
so that help and the wizard start without torch.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, is_dataclass, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from sidestep.cli.parser import command_parser, global_parser, options_for
from sidestep.errors import ExitStatus, Interrupted, JobError
from sidestep.events import Event, FileFailed, Finished, LongTask, Notice, Report, Saved, Table
from sidestep.files import expand, require_writable
from sidestep.imports import LIBRARIES, load_libraries
from sidestep.settings import presets as preset_files
from sidestep.settings.config import (
    COMMANDS,
    SPELLINGS,
    BuildDatasetConfig,
    CleanConfig,
    CompareConfig,
    CompletionConfig,
    DemoConfig,
    EstimateConfig,
    ExportConfig,
    PlanConfig,
    PreprocessConfig,
    PresetsConfig,
    SampleConfig,
    ScoreConfig,
    TrainConfig,
    TrainLmConfig,
    check_streaming,
    command_of,
    memory_levers,
)
from sidestep.settings.path_checks import require_checkpoint, require_given, require_songs, require_tensors
from sidestep.terminal.terminal import Terminal
from sidestep.wizard.review import preset_table
from sidestep.words import side_step


def run(config: Any, report: Report, terminal: Terminal) -> ExitStatus:
    """Run a config's command. Text that it returns is printed, with `--json` any result.

    Files that had to be left out have an exit status of their own.
    """
    module, function = COMMANDS[command_of(type(config))].run.split(":")
    left_out: list[FileFailed] = []

    def watched(event: Event) -> None:
        if isinstance(event, FileFailed):
            left_out.append(event)
        report(event)

    try:
        result = getattr(import_module(f"sidestep.{module}"), function)(config, watched)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).strip().split("\n")[0] or type(error).__name__
        fix = ", ".join(memory_levers(config)) or (
            "a smaller model variant, or --device cpu" if hasattr(config, "device") else "to close other programs"
        )
        raise JobError(f"Out of memory: {first}", f"What helps: {fix}.") from None
    if isinstance(result, ExitStatus):
        return result
    if isinstance(config, CleanConfig) and not config.delete and result["checkpoints"]:
        if (terminal.interactive or terminal.says_yes) and terminal.confirm("Delete them now?"):
            return run(replace(config, delete=True), report, terminal)
    elif isinstance(result, str):
        terminal.out.write(result)
    elif getattr(config, "json", False):
        terminal.out.write(json.dumps(result, default=lambda v: asdict(v) if is_dataclass(v) else str(v)) + "\n")
    terminal.out.flush()
    return ExitStatus.SOME_FAILED if left_out else ExitStatus.OK


def check_folders(config: Any) -> Any:
    """The model's layout, where the config names one.

    Raises UserError for a folder that is not there to read from, or into which results cannot go. The task finds that
    out, too, but only once libraries are loaded or, when it writes, hours later.
    """
    model = None
    reads_one = isinstance(config, (*READ_THE_DECODER, PreprocessConfig)) and config.checkpoint_dir
    plays_another = isinstance(config, SampleConfig) and config.preview_variant
    if reads_one and config.model_variant and not plays_another:  # else it is a run's or an adapter's own
        find_layout = import_module("sidestep.acestep.layout").find_layout
        model = find_layout(config.checkpoint_dir, config.model_variant)
    require_given(config)
    if isinstance(config, TrainConfig | EstimateConfig):
        require_tensors(config.dataset_dir, config.checkpoint_dir)
    if isinstance(config, TrainConfig) and config.prior_data:
        require_tensors(config.prior_data, config.checkpoint_dir, "--prior-data")
    if isinstance(config, PreprocessConfig) and not config.dataset_json:
        require_songs(config.audio_dir)
    match config:
        case TrainConfig(output_dir=folder) | DemoConfig(output_dir=folder):
            require_writable(folder, "--output-dir")
        case PreprocessConfig(tensor_output=folder):
            require_writable(folder, "--tensor-output")
        case SampleConfig(output=folder) | CompareConfig(output=folder):
            require_writable(folder, "--output")
        case ExportConfig(output=path):
            require_writable(path if path.is_dir() else path.parent, "--output")
        case EstimateConfig(output=Path() as file):
            require_writable(file.parent, "--output")
        case EstimateConfig(dataset_dir=folder):
            require_writable(folder, "--dataset-dir")
    if isinstance(config, TrainConfig) and config.resume_from:
        require_checkpoint(config.resume_from, config.output_dir)
    return model


def load_what_it_needs(config: Any, report: Report, model: Any = None) -> None:
    """Load the libraries of commands on models, while the weights are read ahead. The first time in a process."""
    if type(config) not in NEED_TORCH:
        return
    if "torch" not in sys.modules:
        report(Notice(message="Loading PyTorch."))
        if model and isinstance(config, READ_THE_DECODER):
            import_module("sidestep.acestep.layout").read_ahead(model)
    load_libraries(LongTask(report, "Loading libraries", len(LIBRARIES)))


# Their code takes seconds to load, before the task can say a word.
NEED_TORCH = (
    *(TrainConfig, TrainLmConfig, PreprocessConfig, EstimateConfig, PlanConfig, SampleConfig, ScoreConfig),
    *(CompareConfig, ExportConfig, DemoConfig),
)
# They read all of the model's weights as soon as that is loaded.
READ_THE_DECODER = (TrainConfig, EstimateConfig, SampleConfig, ScoreConfig)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory or the machine's ran out."""
    torch = sys.modules.get("torch")  # where it was not even imported, it was not torch
    kinds = (MemoryError, *([torch.OutOfMemoryError] if torch else []))
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def preprocess(config: PreprocessConfig, report: Report) -> ExitStatus:
    """`preprocess`. Nothing preprocessed is a failure; some songs left out have a status of their own."""
    from sidestep.tasks.preprocess import preprocess

    summary = preprocess(config, report)
    if not summary.failed:
        return ExitStatus.OK
    return ExitStatus.SOME_FAILED if summary.done or summary.skipped else ExitStatus.FAILED


def train(config: TrainConfig, report: Report) -> None:
    """`fixed`: train, if it fits into memory, and judge what was trained if asked to."""
    from sidestep.data.records import index_records
    from sidestep.tasks.plan.plan import check_memory
    from sidestep.tasks.train.setup import train

    index = cache(partial(index_records, report=report))
    result = train(check_memory(config, report, index), report, index)
    if config.score and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        command = side_step("score", config.output_dir)
        report(
            Notice(message=f"--score: several processes trained, and one alone can judge: {command}", level="warning")
        )
    elif config.score and result.was_stopped:
        raise Interrupted(side_step("score", config.output_dir))
    elif config.score:
        from sidestep.tasks.score import score

        shared = ("device", "precision", "attention", "base_precision", "swap_blocks")
        score(ScoreConfig(run_folder=config.output_dir, **{name: getattr(config, name) for name in shared}), report)


def estimate(config: EstimateConfig, report: Report) -> Any:
    """`estimate`, if it fits into memory."""
    from sidestep.data.records import index_records
    from sidestep.tasks.estimate import estimate
    from sidestep.tasks.estimate.run import as_training
    from sidestep.tasks.plan.plan import check_estimate

    index = cache(partial(index_records, report=report))
    check_estimate(config, as_training(config), report, index)
    return estimate(config, report, index)


def sample(config: SampleConfig, report: Report) -> list[Path]:
    """`sample`, if it fits into memory."""
    from sidestep.tasks.plan.plan import check_sample
    from sidestep.tasks.sample import sample

    check_streaming(config)
    check_sample(config, report)
    return sample(config, report)


def train_lm(config: TrainLmConfig, report: Report) -> None:
    """`train-lm`: train, if it fits into memory."""
    from sidestep.data.records import index_records
    from sidestep.tasks.plan.language import check_language_memory
    from sidestep.tasks.plan.plan import check_language_previews
    from sidestep.tasks.train.setup import train

    index = cache(partial(index_records, report=report))
    check_language_memory(config, report, index)
    check_language_previews(config, report)
    train(config, report, index)


def build_dataset(config: BuildDatasetConfig, report: Report) -> None:
    """`build-dataset`, and what it was asked to find out about the songs."""
    from sidestep.tasks.build_dataset import analyze, build_dataset, check_analysis

    if config.analyze:
        check_analysis()
    if config.caption == "lm":
        from sidestep.tasks.plan.language import check_description

        check_description(config, report)
    last: list[Event] = []  # what to do next, after all that is found out

    def told(event: Event) -> None:
        last.append(event) if isinstance(event, Finished) else report(event)

    summary = build_dataset(config, told)
    if config.analyze:
        analyze(summary.path, report)
    if config.caption != "none":
        from sidestep.tasks.describe import describe

        describe(summary.path, config, report)
    if config.audit:
        from sidestep.tasks.audit import audit

        audit(summary.path, report, config.checkpoint_dir, summary.failed)
    for event in last:
        report(event)


def plan(config: PlanConfig, report: Report) -> dict[str, Any]:
    """`plan`. An answer is a success, also when it is that the run does not fit."""
    from sidestep.tasks.plan.language import plan_language
    from sidestep.tasks.plan.plan import as_json, plan

    if config.lm:
        return plan_language(config, report)

    return as_json(plan(config, report))


def presets(config: PresetsConfig, report: Report) -> None:
    """`presets list|show|import|export`."""
    match config.action:
        case "list":
            rows = tuple(
                (p.name, "built in" if p.built_in else "yours", p.description) for p in preset_files.list_presets()
            )
            report(Table(title="Presets", columns=("name", "from", "what for"), rows=rows))
            for error in preset_files.broken_presets():
                report(Notice(message=f"Not in the list: {error.problem} {error.fix}".rstrip(), level="warning"))
        case "show":
            report(preset_table(preset_files.find(config.what)))
        case "import":
            preset = preset_files.import_file(Path(config.what), replace=config.overwrite)
            report(Saved(what=f"preset {preset.name}", path=str(preset.path)))
            if ignored := preset_files.read(expand(config.what)).unknown:
                message = f"Ignored, because no command has such a setting: {', '.join(ignored)}."
                report(Notice(message=message, level="warning"))
        case "export":
            file = config.file or Path(f"{config.what}.json")
            path = preset_files.export_file(config.what, file, replace=config.overwrite)
            report(Saved(what=f"preset {config.what}", path=str(path)))


def completion(config: CompletionConfig, report: Report) -> str:  # noqa: ARG001  as every command is called
    """`completion`: the script with which a shell completes the commands, flags, choices and files of `side-step`."""
    import shtab  # every start would wait for it

    parser = argparse.ArgumentParser("side-step", parents=[global_parser(with_command=False)], add_help=False)
    commands = parser.add_subparsers()
    for name, command in SPELLINGS.items():
        one = commands.add_parser(name, parents=[command_parser(name)], add_help=False, help=COMMANDS[command].help)
        options = options_for(name)
        for action in one._actions:
            option = options.get(action.dest)
            if option and option.choices:
                action.choices = option.choices
            elif option and option.type is Path:
                action.complete = shtab.FILE  # pyrefly: ignore[missing-attribute]  shtab looks for it
    return shtab.complete(parser, config.shell)
