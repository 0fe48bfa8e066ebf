"""A run: everything that the loop and what hangs on it work with."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from peft import PeftModel
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.tensorboard import SummaryWriter

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.vae import frames_per_second
from sidestep.config import TrainConfig
from sidestep.data.dataset import Song, StepPlan, plan_epoch
from sidestep.events import Report
from sidestep.training.history import History
from sidestep.training.objective import Objective, TrainingLaw
from sidestep.training.processes import Processes
from sidestep.training.state import BackgroundWriter, Position


class Companion(Protocol):
    """What goes along with a run without taking part in it: previews, the report page. Called on every process."""

    def after_epoch(self, run: "Run", epoch: int) -> None:
        """`epoch` epochs are done."""

    def at_end(self, run: "Run") -> None:
        """`final/` stands."""


class NoCompanion:
    """Stands in where none is wanted."""

    def after_epoch(self, run: "Run", epoch: int) -> None: ...

    def at_end(self, run: "Run") -> None: ...


class NoTensorBoard:
    """Stands in for the writer on all processes but the first."""

    def add_scalar(self, *args, **kwargs) -> None: ...

    def add_histogram(self, *args, **kwargs) -> None: ...

    def add_audio(self, *args, **kwargs) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class Run:
    """A run that was set up. `songs` are trained on, `held_out` are validated on."""

    config: TrainConfig
    report: Report
    checkpoint: Checkpoint
    law: TrainingLaw
    accelerator: Accelerator
    processes: Processes
    model: PeftModel  # the adapter on the frozen decoder, not wrapped
    wrapped: torch.nn.Module  # the same, as accelerate runs it
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    objective: Objective
    songs: list[Song]
    held_out: list[Song]
    fingerprints: dict[str, str]  # of all songs, by name
    ranks: dict[str, dict] | None  # rank and alpha patterns of the rank map in use
    total_steps: int
    tensorboard: SummaryWriter | NoTensorBoard
    writer: BackgroundWriter
    average: EMAModel | None = None
    position: Position = Position()
    history: History = field(default_factory=History)
    previews: Companion = field(default_factory=NoCompanion)
    page: Companion = field(default_factory=NoCompanion)

    @property
    def device(self) -> torch.device:
        return self.objective.silence.device

    @property
    def is_main(self) -> bool:
        return self.processes.index == 0

    @property
    def frames_per_second(self) -> float:
        return frames_per_second(self.checkpoint.vae_config())

    def plan(self, epoch: int) -> list[StepPlan]:
        """The optimizer steps of an epoch, counted from 0."""
        return plan_of(self.config, self.songs, self.processes.count, epoch)


def plan_of(config: TrainConfig, songs: list[Song], processes: int, epoch: int) -> list[StepPlan]:
    """The optimizer steps of an epoch under these settings."""
    return plan_epoch(
        songs,
        epoch,
        seed=config.seed,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation,
        processes=processes,
        hints_ratio=config.hints_ratio,
    )
