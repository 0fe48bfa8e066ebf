"""What a run remembers of its own course: for the best adapter, early stopping and the report. Kept in every checkpoint.

A run: everything that the loop and what hangs on it work with.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from peft import PeftModel
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.tensorboard import SummaryWriter

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.vae import frames_per_second
from sidestep.data.batches import Song, StepPlan, plan_epoch
from sidestep.events import Report
from sidestep.settings.config import TrainConfig
from sidestep.tasks.train.checkpoints import BackgroundWriter, Position
from sidestep.tasks.train.objective import Objective, TrainingLaw
from sidestep.tasks.train.processes import Processes

TIMESTEP_BINS = 10
SMOOTHED_EPOCHS = 5  # without validation, the best is judged by the mean loss of so many epochs


@dataclass(frozen=True)
class Point:
    """A logged optimizer step: mean loss since the one before, learning rate, gradient norm, memory in bytes where it is counted."""

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """Loss on the fixed grid after an epoch; `average_loss`: that of the running average, where one is kept."""

    step: int
    epoch: int
    loss: float
    average_loss: float | None = None


@dataclass(frozen=True)
class Best:
    """The lowest loss so far. by: `validation loss` or `smoothed training loss`."""

    step: int
    epoch: int
    loss: float
    by: str


@dataclass
class History:
    """epoch_losses: mean loss of each epoch. bin_loss, bin_count: sums of the loss and numbers of samples by timestep, from t = 0 to 1."""

    points: list[Point] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    epoch_losses: list[float] = field(default_factory=list)
    bin_loss: list[float] = field(default_factory=lambda: [0.0] * TIMESTEP_BINS)
    bin_count: list[int] = field(default_factory=lambda: [0] * TIMESTEP_BINS)
    best: Best | None = None
    judged: int = 0  # epochs or validations judged since the best
    loss_sum: float = 0.0  # of the epoch under way
    samples: int = 0

    def add_sample(self, loss: float, t: float) -> None:
        """Count a finite loss into its epoch and its timestep."""
        self.loss_sum += loss
        self.samples += 1
        place = min(int(t * TIMESTEP_BINS), TIMESTEP_BINS - 1)
        self.bin_loss[place] += loss
        self.bin_count[place] += 1

    def epoch_loss(self) -> float:
        """Mean loss of the epoch under way so far; NaN before its first finite sample."""
        return self.loss_sum / self.samples if self.samples else math.nan

    def close_epoch(self) -> None:
        """Keep the epoch's loss and begin the next one's."""
        self.epoch_losses.append(self.epoch_loss())
        self.loss_sum, self.samples = 0.0, 0

    def smoothed_loss(self) -> float | None:
        """Mean of the last epochs' losses; None until there are enough finite ones."""
        last = self.epoch_losses[-SMOOTHED_EPOCHS:]
        return sum(last) / len(last) if len(last) == SMOOTHED_EPOCHS and all(map(math.isfinite, last)) else None

    def judge(self, loss: float, step: int, epoch: int, by: str) -> bool:
        """Whether this loss is the lowest so far; remembers it if so, and counts if not."""
        if math.isfinite(loss) and (self.best is None or self.best.by != by or loss < self.best.loss):
            self.best, self.judged = Best(step, epoch, loss, by), 0
            return True
        self.judged += 1
        return False

    def as_values(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "History":
        """What `as_values` gave."""
        kept = dict(values)
        kept["points"] = [Point(**point) for point in kept["points"]]
        kept["evaluations"] = [Evaluation(**evaluation) for evaluation in kept["evaluations"]]
        kept["best"] = Best(**kept["best"]) if kept["best"] else None
        return cls(**kept)


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
