"""`fixed`: train an adapter from a folder of training tensors."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from sidestep.config import TrainConfig, command_line
from sidestep.errors import JobError
from sidestep.events import Finished, Report, silent
from sidestep.training.loop import run_loop
from sidestep.training.run import Run
from sidestep.training.run_folder import SavedRun, open_folder, require_writable, write_settings
from sidestep.training.saving import cannot_save, save_results
from sidestep.training.setup import open_accelerator, set_up


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left."""

    steps: int
    final: Path


def train(config: TrainConfig, report: Report) -> TrainResult:
    """Train an adapter and write `final/`. Raises UserError, JobError and Interrupted; zero steps are a failure."""
    if os.environ.get("RANK", "0") == "0":
        require_writable(config.output_dir)  # before the first event, which is written there too
    accelerator, precision = open_accelerator(config, report)
    report = report if accelerator.is_main_process else silent
    accelerator.wait_for_everyone()
    saved = open_folder(config, report)
    accelerator.wait_for_everyone()
    run = set_up(config, report, accelerator, precision, saved)
    try:
        require_work(run, saved)
        if run.is_main:
            write_settings(config)
        run_loop(run)
        final = save_results(run)
        run.previews.at_end(run)
        run.page.at_end(run)
    except OSError as error:
        raise cannot_save(run, error) from error
    finally:
        run.tensorboard.close()
    report(
        Finished(
            message=f"Trained {run.position.step} optimizer steps. The adapter is in {final}",
            next_commands=(
                f"uv run train.py sample --checkpoint-dir {config.checkpoint_dir} --model-variant {config.model_variant} --adapter {final} --prompt '…'",
            ),
        )
    )
    return TrainResult(run.position.step, final)


def require_work(run: Run, saved: SavedRun | None) -> None:
    """Raises JobError when there is nothing left to do: all steps are done and `final/` stands."""
    if saved and run.position.step >= run.total_steps and (run.config.output_dir / "final").is_dir():
        longer = replace(run.config, epochs=run.config.epochs * 2, resume_from=Path("latest"))
        raise JobError(f"Nothing was trained: all {run.total_steps} optimizer steps of this run were already done.", f"Train on: {command_line(longer)}")
