"""`fixed`: train an adapter from a folder of training tensors."""

from dataclasses import dataclass
from pathlib import Path

from sidestep.config import TrainConfig
from sidestep.errors import JobError
from sidestep.events import Finished, Report
from sidestep.training.loop import run_loop
from sidestep.training.run_folder import command_of, prepare, resume, save_final_adapter
from sidestep.training.setup import set_up


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left."""

    steps: int
    final: Path


def train(config: TrainConfig, report: Report) -> TrainResult:
    """Train an adapter and write `final/`. Raises UserError, JobError and Interrupted; zero steps are a failure."""
    prepare(config)
    run = set_up(config, report)
    try:
        if config.resume_from:
            resume(run)
        first = run.position.step
        run_loop(run)
        if run.position.step == first:
            raise JobError(
                f"Nothing was trained: all {run.total_steps} optimizer steps of this run were already done.",
                f"Train on with more epochs: {command_of(config, epochs=config.epochs * 2, resume_from=Path('latest'))}",
            )
        final = save_final_adapter(run)
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
