"""A run: what the training loop works with, and what the run remembers of its own course (kept in every save)."""

import errno
import math
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from peft import PeftModel
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.tensorboard import SummaryWriter

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.conditions import Conditions, Prompt
from sidestep.acestep.vae import frames_per_second
from sidestep.data.batches import Song, StepPlan, plan_epoch
from sidestep.errors import JobError
from sidestep.events import Event, Report
from sidestep.settings.config import TrainConfig
from sidestep.tasks.sample import Sampler
from sidestep.tasks.train.objective import Objective, TrainingLaw
from sidestep.tasks.train.processes import Processes

TIMESTEP_BINS = 10
SMOOTHED_EPOCHS = 5  # without validation, the best is decided by the mean loss of so many epochs


@dataclass(frozen=True)
class Position:
    """How far a run is: the next optimizer step is step `step_in_epoch` of `epoch`; `step` are done in all."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Point:
    """A logged optimizer step: mean loss since the one before, learning rate, gradient norm, bytes where counted."""

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
    """What a run has measured so far. Its fields are the keys of `history` in a saved run.

    epoch_losses: mean loss of each epoch. bin_loss, bin_count: sums of the loss and numbers of samples by timestep,
    from t = 0 to 1. judged: epochs or validations since the best. loss_sum, samples: of the epoch under way.
    """

    points: list[Point] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    epoch_losses: list[float] = field(default_factory=list)
    bin_loss: list[float] = field(default_factory=lambda: [0.0] * TIMESTEP_BINS)
    bin_count: list[int] = field(default_factory=lambda: [0] * TIMESTEP_BINS)
    best: Best | None = None
    judged: int = 0
    loss_sum: float = 0.0
    samples: int = 0

    def add_sample(self, loss: float, t: float) -> None:
        """Count a finite loss into its epoch and its timestep."""
        self.loss_sum += loss
        self.samples += 1
        index = min(int(t * TIMESTEP_BINS), TIMESTEP_BINS - 1)
        self.bin_loss[index] += loss
        self.bin_count[index] += 1

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

    def update_best(self, loss: float, step: int, epoch: int, by: str) -> bool:
        """Whether this loss is the lowest so far; remembers it if so, and counts if not."""
        if math.isfinite(loss) and (self.best is None or self.best.by != by or loss < self.best.loss):
            self.best, self.judged = Best(step, epoch, loss, by), 0
            return True
        self.judged += 1
        return False

    def as_values(self) -> dict[str, Any]:
        """Plain values for a saved run."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "History":
        """What `as_values` gave."""
        kept = dict(values)
        kept["points"] = [Point(**point) for point in kept["points"]]
        kept["evaluations"] = [Evaluation(**evaluation) for evaluation in kept["evaluations"]]
        kept["best"] = Best(**kept["best"]) if kept["best"] else None
        return cls(**kept)


@dataclass
class Previews:
    """What is made audible while a run goes on. made_at: optimizer step of the last previews; dtype: of the VAE."""

    prompts: list[Prompt]
    conditions: list[Conditions]
    dtype: torch.dtype
    sampler: Sampler | None = None
    made_at: int = -1


class NoTensorBoard:
    """Stands in for the writer on all processes but the first: every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: None


def as_os_error(error: SafetensorError) -> OSError:
    """What the system said of a file that safetensors could not write; its own error is none of the system's."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else errno.EIO, str(error))


class BackgroundWriter:
    """Runs one write at a time beside training. What it reports and raises comes out in the thread that trains."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._events: list[Event] = []

    def start(self, write: Callable[[], Iterable[Event]]) -> None:
        """Begin a write once the one before it has ended. Raises what went wrong in that one."""
        self.wait()

        def work() -> None:
            try:
                self._events = list(write())
            except SafetensorError as error:
                self._error = as_os_error(error)
            except (OSError, RuntimeError, ValueError, JobError) as error:  # raised again in the thread that trains
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Settle a write that has ended; costs nothing while one is under way. Raises what went wrong in it."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until the write under way has ended. Raises what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        events, self._events = self._events, []
        for event in events:
            self._report(event)


@dataclass
class Run:
    """A run that was set up. `songs` are trained on, `held_out` are validated on.

    What changes while it trains, and is saved: the adapter in `parameters`, `optimizer`, `average`, `position` and
    `history`. Everything else follows from the settings and the data.
    """

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
    scheduler: LambdaLR
    objective: Objective
    songs: list[Song]
    held_out: list[Song]
    fingerprints: dict[str, str]  # of all songs, by name
    ranks: dict[str, dict[str, Any]] | None  # rank and alpha patterns of the rank map in use
    total_steps: int
    tensorboard: SummaryWriter | NoTensorBoard
    writer: BackgroundWriter
    previews: Previews | None = None
    average: EMAModel | None = None
    position: Position = Position()
    history: History = field(default_factory=History)

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
