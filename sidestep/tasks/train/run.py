"""A run: what the training loop works with, and what the run remembers of its own course (kept in every save)."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import diffusers.training_utils as averages
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.hooks import RemovableHandle
from torch.utils.tensorboard import SummaryWriter

from sidestep.acestep.blocks import OffloadedModule
from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.conditions import Conditions, Prompt
from sidestep.acestep.device import Choice
from sidestep.acestep.vae import frames_per_second
from sidestep.adapters.adapter import Adapter
from sidestep.data.batches import Song, StepPlan, plan_epoch
from sidestep.errors import JobError
from sidestep.events import Event, LongTask, Notice, Report
from sidestep.settings.config import TrainConfig
from sidestep.stopping import StopRequest
from sidestep.tasks.sample import Sampling
from sidestep.tasks.train.guards import SongWatch
from sidestep.tasks.train.marks import Mark, passed, smoothed
from sidestep.tasks.train.objective import TrainingLaw
from sidestep.tasks.train.prior import Prior
from sidestep.tasks.train.processes import Processes

TIMESTEP_BINS = 10


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
    drift: float | None = None  # on other music: mean squared distance from the model's own velocity


@dataclass(frozen=True)
class Evaluation:
    """Loss on the fixed grid after an epoch; `average_loss`: that of the running average, where one is kept."""

    step: int
    epoch: int
    loss: float
    average_loss: float | None = None


@dataclass(frozen=True)
class Best:
    """The lowest loss so far. by: `validation loss` or `smoothed training loss`; is_average: of the running average."""

    step: int
    epoch: int
    loss: float
    by: str
    is_average: bool = False

    @property
    def note(self) -> str:
        """What `best/` holds, for a person: `epoch 12, validation loss 0.7731`."""
        return f"epoch {self.epoch}, {self.by} {self.loss:.4f}" + (", the running average" if self.is_average else "")


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
    watch: SongWatch = field(default_factory=SongWatch)
    marks: list[Mark] = field(default_factory=list)

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

    def keep_own(self, is_main: bool) -> None:
        """After the sums of all processes were put together: the first one holds them, the others begin anew."""
        if not is_main:
            self.loss_sum, self.samples = 0.0, 0
            self.bin_loss, self.bin_count = [0.0] * TIMESTEP_BINS, [0] * TIMESTEP_BINS

    def smoothed_loss(self) -> float | None:
        """Mean of the last epochs' losses; None until there are enough finite ones."""
        return smoothed(self.epoch_losses)

    def add_mark(self, drop: float, step: int, epoch: int) -> Mark | None:
        """The mark of the epoch that was closed last, which is remembered; None where it passed no step (`passed`).

        drop: 0 makes none.
        """
        if not drop:
            return None
        before, (steps, below) = passed(self.epoch_losses[:-1], drop)[0], passed(self.epoch_losses, drop)
        loss = self.smoothed_loss()
        if loss is None or steps <= before:
            return None
        self.marks.append(Mark(step, epoch, loss, below))
        return self.marks[-1]

    def update_best(self, loss: float, step: int, epoch: int, by: str, is_average: bool = False) -> bool:
        """Whether this loss is the lowest so far; remembers it if so, and counts if not."""
        if math.isfinite(loss) and (self.best is None or self.best.by != by or loss < self.best.loss):
            self.best, self.judged = Best(step, epoch, loss, by, is_average), 0
            return True
        self.judged += 1
        return False

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "History":
        """A history from what `asdict` made of one."""
        kept = dict(values)
        kept["points"] = [Point(**point) for point in kept["points"]]
        kept["evaluations"] = [Evaluation(**evaluation) for evaluation in kept["evaluations"]]
        kept["best"] = Best(**kept["best"]) if kept["best"] else None
        kept["watch"] = SongWatch(**kept.get("watch", {}))  # states of before have none
        kept["marks"] = [Mark(**mark) for mark in kept.get("marks", [])]
        return cls(**kept)


@dataclass
class Player:
    """A model that plays the previews, with the prompts' conditions as its own encoder makes them.

    folder: below previews/, empty for the model that is trained. hints: of each prompt that was composed, or None.
    """

    checkpoint: Checkpoint
    conditions: list[Conditions]
    sampling: Sampling
    folder: str = ""
    hints: Sequence[Tensor | None] = ()


@dataclass
class Previews:
    """What is made audible while a run goes on. made_at: optimizer step of the last previews.

    dtype: of the VAE and of another model that plays; vae: is kept from one preview to the next. composed: what the
    language model wrote for each prompt. adapter: of the DiT that plays what a language model in training writes.
    """

    prompts: list[Prompt]
    players: list[Player]
    dtype: torch.dtype
    composed: list[dict[str, Any]] = field(default_factory=list)
    adapter: Adapter | None = None
    vae: OffloadedModule | None = None
    made_at: int = -1


class TensorBoard:
    """The run's curves for TensorBoard. Every method does nothing on all processes but the first.

    Nor does it after a write has failed, which it tells: TensorBoard's own writer cannot go on after that.
    """

    def __init__(self, writer: SummaryWriter | None, report: Report) -> None:
        self._writer, self._report = writer, report

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any, **named: Any) -> None:
            if self._writer is not None:
                try:
                    getattr(self._writer, name)(*arguments, **named)
                except OSError as error:
                    self._writer = None
                    message = f"No more curves for TensorBoard in this run ({error.strerror or error})."
                    self._report(Notice(message=message, level="warning"))

        return call


class BackgroundWriter:
    """Runs one save at a time beside training. What it tells comes out in the thread that trains.

    A save that fails is told at once, and tried again at the next one unless that is of the same `what`.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._pool = ThreadPoolExecutor(1, "save")
        self._under_way: Future[list[Event]] | None = None
        self._failed: dict[str, tuple[Callable[[], list[Event]], OSError | JobError]] = {}

    def start(self, what: str, write: Callable[[], list[Event]]) -> None:
        """Begin a save once the one before it has ended."""
        self.wait()
        writes = {name: failed for name, (failed, _) in self._failed.items()} | {what: write}

        def save() -> list[Event]:
            events, self._failed = [], {}
            for what, write in writes.items():
                try:
                    events += write()
                except (OSError, JobError) as error:
                    self._failed[what] = write, error
                    message = f"{what}: not saved ({error}). It is tried again at the next save; training goes on."
                    events.append(Notice(message=message, level="error"))
            return events

        self._under_way = self._pool.submit(save)

    def poll(self) -> None:
        """Tell of a save that has ended; costs nothing while one is under way."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Until the save under way has ended."""
        if self._under_way is not None:
            events, self._under_way = self._under_way.result(), None
            for event in events:
                self._report(event)

    def finish(self) -> None:
        """Wait, and try what failed once more. Raises what went wrong if it fails again."""
        self.wait()
        if self._failed:
            name, (write, _) = self._failed.popitem()
            self.start(name, write)
            self.wait()
        for _, error in self._failed.values():
            raise error


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
    objective: Any  # Objective, or AnswerObjective where the language model is trained: the same few methods
    songs: list[Song]
    held_out: list[Song]
    fingerprints: dict[str, dict[str, str]]  # of all songs, by name and part
    ranks: dict[str, dict[str, Any]] | None  # rank and alpha patterns of the rank map in use
    total_steps: int
    tensorboard: TensorBoard
    writer: BackgroundWriter
    stop: StopRequest  # open from the first step until everything is written
    last_epoch: int = 0  # in which the run ends
    first_epoch: int = 0  # epochs that were whole when this process began
    compiles: Callable[[], Choice] | None = None  # compiles the layers; where `--compile auto` has yet to decide
    is_compiled: bool = False  # its layers are
    layer_hooks: list[RemovableHandle] = field(default_factory=list)  # that tell of a layer's calls
    layer_calls: int = 0  # that a micro-step makes and tells of; 0 where layers are not watched
    step_task: LongTask | None = None  # while an optimizer step is under way
    previews: Previews | None = None
    asked_previews: Previews | None = None  # the same where only a key asks for them
    average: "averages.EMAModel | None" = None
    position: Position = Position()
    history: History = field(default_factory=History)
    prior: Prior | None = None
    learns: bool = False  # every tensor of the adapter was seen to get a gradient
    looks_at_range: bool = True  # whether in fp16 the next step names what leaves its range

    @property
    def device(self) -> torch.device:
        return self.objective.device

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
