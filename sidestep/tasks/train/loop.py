"""Losses and gradient norms that wait on the device until the host reads them, all in one transfer.

Stopping a run from outside: the first Ctrl-C or SIGTERM lets the step finish and saves, the second quits at once.
The training loop, the only one. Rare events are one guarded line each; the host looks at device values only when it logs.
"""

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch

from sidestep.acestep.device import peak_memory_bytes
from sidestep.data.batches import MicroBatch, StepPlan, collate
from sidestep.errors import Interrupted, JobError
from sidestep.events import EpochDone, Notice, StepDone, StepSkipped
from sidestep.optim import can_skip_on_device
from sidestep.stopping import StopRequest
from sidestep.tasks.train.checkpoints import Position, resume_command
from sidestep.tasks.train.evaluation import has_waited_enough, judge
from sidestep.tasks.train.processes import whole
from sidestep.tasks.train.run import Point, Run
from sidestep.tasks.train.saving import save_best, save_checkpoint


@dataclass(frozen=True)
class StepReading:
    """What became of one optimizer step on this process. samples: (song, loss, t) of each."""

    step: int
    grad_norm: float
    samples: tuple[tuple[str, float, float], ...]

    @property
    def was_skipped(self) -> bool:
        return not math.isfinite(self.grad_norm)

    @property
    def finite(self) -> list[tuple[str, float, float]]:
        return [sample for sample in self.samples if math.isfinite(sample[1])]

    @property
    def suspects(self) -> tuple[str, ...]:
        """The songs whose loss is not finite; all of the step's when each loss is and only the gradient is not."""
        bad = [song for song, loss, _ in self.samples if not math.isfinite(loss)]
        return tuple(dict.fromkeys(bad or [song for song, _, _ in self.samples]))


@dataclass
class Tally:
    """Losses [B] and timesteps [B] of micro-steps, a norm [] of each optimizer step, and what the host knows of them."""

    losses: list[torch.Tensor] = field(default_factory=list)
    timesteps: list[torch.Tensor] = field(default_factory=list)
    songs: list[tuple[str, ...]] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(
        default_factory=list
    )  # (optimizer step, how many micro-steps there were until its end)

    def add(self, loss: torch.Tensor, t: torch.Tensor, songs: tuple[str, ...]) -> None:
        """Keep the plain losses of a micro-step."""
        self.losses.append(loss)
        self.timesteps.append(t)
        self.songs.append(songs)

    def close_step(self, step: int, norm: torch.Tensor) -> None:
        """An optimizer step ended with this gradient norm."""
        self.norms.append(norm)
        self.steps.append((step, len(self.losses)))

    def read(self) -> list[StepReading]:
        """Bring everything to the host and start anew."""
        if not self.steps:
            return []
        values = iter(torch.cat([*self.norms_flat(), *self.losses, *self.timesteps]).tolist())
        readings = list(self._readings(values))
        self.__init__()
        return readings

    def norms_flat(self) -> list[torch.Tensor]:
        return [norm.float().reshape(1) for norm in self.norms]

    def _readings(self, values: Iterator[float]) -> Iterator[StepReading]:
        norms = [next(values) for _ in self.norms]
        losses = [[next(values) for _ in songs] for songs in self.songs]
        timesteps = [[next(values) for _ in songs] for songs in self.songs]
        first = 0
        for (step, last), norm in zip(self.steps, norms, strict=True):
            parts = zip(self.songs[first:last], losses[first:last], timesteps[first:last], strict=True)
            samples = tuple(sample for songs, ls, ts in parts for sample in zip(songs, ls, ts, strict=True))
            yield StepReading(step, norm, samples)
            first = last


SKIPS_THAT_STOP = (
    10  # so many optimizer steps in a row without a finite gradient end a run; the host looks at least that often
)


@dataclass
class Progress:
    """What the loop remembers between two log lines. losses: of this process's samples."""

    tally: Tally = field(default_factory=Tally)
    losses: list[float] = field(default_factory=list)
    grad_norm: float = math.nan
    in_a_row: int = 0
    logged_at: float = field(default_factory=time.perf_counter)
    steps: int = 0


def run_loop(run: Run) -> None:
    """Train from `run.position` to the end. Raises Interrupted after a save when asked to stop, JobError when the run goes astray."""
    progress = Progress()
    with StopRequest(lambda text: run.report(Notice(message=text))) as stop, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Detected call of `lr_scheduler.step"
        )  # a first step that was skipped
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # its output is never changed in place
        while run.position.step < run.total_steps:
            started = time.perf_counter()
            train_epoch(run, progress, stop)
            is_best = end_epoch(run, progress, time.perf_counter() - started)
            stops_early = has_waited_enough(run)
            if is_best and run.config.save_best:
                save_best(run)
            if run.position.step_in_epoch:  # --max-steps ended the run inside an epoch
                save_checkpoint(run, f"step_{run.position.step:06d}")
            elif run.position.epoch % run.config.save_every == 0 or run.position.step == run.total_steps or stops_early:
                save_checkpoint(run, f"epoch_{run.position.epoch:04d}")
            run.previews.after_epoch(run, run.position.epoch)
            run.page.after_epoch(run, run.position.epoch)
            if stops_early:
                break
    run.writer.wait()


def train_epoch(run: Run, progress: Progress, stop: StopRequest) -> None:
    """The optimizer steps of an epoch that are left. Raises Interrupted before the next one when any process was asked to stop."""
    plan = run.plan(run.position.epoch)
    for index in range(run.position.step_in_epoch, len(plan)):
        if run.position.step == run.total_steps:
            return
        stop.requested = run.processes.any(stop.requested)
        if stop.requested:
            leave(run, progress)
        step_or_give_up(run, plan[index], progress.tally)
        run.position = Position(run.position.epoch, index + 1, run.position.step + 1)
        progress.steps += 1
        run.writer.poll()
        if is_log_step(run) or len(progress.tally.steps) >= SKIPS_THAT_STOP:
            look(run, progress)
        if is_log_step(run):
            log(run, progress)


def leave(run: Run, progress: Progress) -> None:
    """Save and stop. Raises Interrupted."""
    look(run, progress)
    add_up(run)
    run.report(Notice(message=f"Saving optimizer step {run.position.step}."))
    save_checkpoint(run, f"step_{run.position.step:06d}")
    run.writer.wait()
    run.processes.wait()  # a launcher ends all processes when one of them leaves
    raise Interrupted(resume_command(run.config))


def is_log_step(run: Run) -> bool:
    """The first step, every `--log-every`th and the last."""
    step = run.position.step
    return step == 1 or step % run.config.log_every == 0 or step == run.total_steps


def optimizer_step(run: Run, plan: StepPlan, tally: Tally) -> None:
    """One optimizer step: this process's micro-batches, then clip and update unless the gradient is not finite.

    Losses are divided by the samples of the whole step, so short steps and uneven batches weigh every sample the same.
    """
    accelerator, processes = run.accelerator, run.processes.count
    own = plan.micro_batches[run.processes.index :: processes]
    rounds = math.ceil(len(plan.micro_batches) / processes)
    for number in range(rounds):
        micro_batch = (
            own[number] if number < len(own) else plan.micro_batches[0]
        )  # a process without work still takes part in the reduction
        share = processes / plan.samples if number < len(own) else 0.0
        batch = collate(run.songs, micro_batch, pin=run.device.type == "cuda").to(run.device)
        with accelerator.no_sync(run.wrapped) if number < rounds - 1 else nullcontext():
            weighted, loss, t = run.objective(run.wrapped, batch, run.position.step, plan.samples)
            accelerator.backward(weighted.sum() * share)
        if share:
            tally.add(loss, t, batch.songs)
    norm = whole(accelerator.clip_grad_norm_(run.parameters, run.config.max_grad_norm or math.inf).detach())
    update(run, norm)
    run.scheduler.step()
    if run.average is not None:
        run.average.step(run.parameters)
    tally.close_step(run.position.step + 1, norm)


def update(run: Run, norm: torch.Tensor) -> None:
    """Apply the gradient if its norm is finite. Fused optimizers decide that on the device; for the others the host looks once."""
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    if run.accelerator.scaler is not None:
        run.optimizer.step()
    elif can_skip_on_device(inner):
        inner.grad_scale, inner.found_inf = None, (~torch.isfinite(norm)).float()
        run.optimizer.step()
    elif bool(torch.isfinite(norm)):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def look(run: Run, progress: Progress) -> None:
    """Read what waits on the device; report skipped steps and end a run that skips them all. Raises JobError."""
    for reading in progress.tally.read():
        for _, loss, t in reading.finite:
            run.history.add_sample(loss, t)
            progress.losses.append(loss)
        if math.isfinite(reading.grad_norm):
            progress.grad_norm = reading.grad_norm
        count_skips(run, progress, reading)


def count_skips(run: Run, progress: Progress, reading: StepReading) -> None:
    """Say that a step was left out and whose fault it seems. Raises JobError after ten in a row."""
    if not reading.was_skipped:
        progress.in_a_row = 0
        return
    everyone = run.processes.gather((reading.suspects, len(reading.finite) < len(reading.samples)))
    guilty = [songs for songs, is_sure in everyone if is_sure] or [songs for songs, _ in everyone]
    if run.accelerator.scaler is not None and not any(is_sure for _, is_sure in everyone):
        return  # fp16: the loss scale was too high for this gradient and is lowered now
    songs = tuple(dict.fromkeys(name for names in guilty for name in names))
    progress.in_a_row += 1
    run.report(
        StepSkipped(step=reading.step, songs=songs, reason="loss or gradient is not finite", in_a_row=progress.in_a_row)
    )
    if progress.in_a_row >= SKIPS_THAT_STOP:
        run.writer.wait()
        raise JobError(
            f"{SKIPS_THAT_STOP} optimizer steps in a row had no finite loss or gradient (the last at {', '.join(songs)}); the run was stopped at step {reading.step}.",
            f"Lower --lr (now {run.config.lr:g}), use --precision fp32 or take these songs away. What was saved before is good: {resume_command(run.config)}",
        )


def log(run: Run, progress: Progress) -> None:
    """Report the mean loss of all processes since the last log line, and how fast it goes."""
    total, count = run.processes.sum([sum(progress.losses), float(len(progress.losses))])
    now, step, lr = time.perf_counter(), run.position.step, run.scheduler.get_last_lr()[0]
    rate = progress.steps / (now - progress.logged_at)
    point = Point(
        step,
        run.position.epoch + 1,
        total / count if count else math.nan,
        lr,
        progress.grad_norm,
        peak_memory_bytes(run.device),
    )
    run.history.points.append(point)
    run.report(
        StepDone(
            step=step,
            total_steps=run.total_steps,
            epoch=point.epoch,
            loss=point.loss,
            lr=lr,
            grad_norm=point.grad_norm,
            steps_per_second=rate,
            eta_seconds=(run.total_steps - step) / rate,
            memory_bytes=point.memory_bytes,
        )
    )
    for name, value in (("loss/train", point.loss), ("lr", lr), ("grad_norm", point.grad_norm)):
        run.tensorboard.add_scalar(name, value, step)
    progress.losses, progress.steps, progress.logged_at = [], 0, now


def end_epoch(run: Run, progress: Progress, seconds: float) -> bool:
    """Report the epoch's mean loss and judge the adapter; whether it is the best so far. The position moves on to the next epoch."""
    look(run, progress)
    add_up(run)
    history, done = run.history, run.position.epoch + 1
    loss = history.epoch_loss()
    run.report(EpochDone(epoch=done, total_epochs=run.config.epochs, loss=loss, seconds=seconds))
    run.tensorboard.add_scalar("loss/epoch", loss, run.position.step)
    if run.position.step_in_epoch == len(run.plan(run.position.epoch)):
        history.close_epoch()
        run.position = Position(done, 0, run.position.step)
    is_best = judge(run, done)
    run.tensorboard.flush()
    progress.logged_at, progress.steps = time.perf_counter(), 0
    return is_best


def add_up(run: Run) -> None:
    """Put the losses of the epoch that each process has seen together."""
    total, samples = run.processes.sum([run.history.loss_sum, float(run.history.samples)])
    run.history.loss_sum, run.history.samples = total, int(samples)


def step_or_give_up(run: Run, plan: StepPlan, tally: Tally) -> None:
    """An optimizer step. Raises JobError when memory runs out in it, after saving what is trained so far."""
    try:
        optimizer_step(run, plan, tally)
        return
    except torch.OutOfMemoryError as error:
        problem = out_of_memory(run, plan, error)
    # From here on the handler's traceback no longer holds the batch's tensors.
    if run.processes.count == 1 and run.position.step:  # others would have to take part, and they do not know
        run.optimizer.zero_grad(set_to_none=True)
        save_checkpoint(run, f"step_{run.position.step:06d}")
        run.writer.wait()
    raise problem


def out_of_memory(run: Run, plan: StepPlan, error: torch.OutOfMemoryError) -> JobError:
    """What is said when the device's memory ran out: in which batch, and what would help that is not on yet."""
    config, rate = run.config, run.frames_per_second
    largest: MicroBatch = max(plan.micro_batches, key=lambda m: len(m.items) * m.items[0].frames)
    seconds = largest.items[0].frames / rate
    names = ", ".join(dict.fromkeys(run.songs[item.song].name for item in largest.items))
    help_ = [
        "--gradient-checkpointing" if not config.gradient_checkpointing else "",
        "--batch-size 1 (with more --gradient-accumulation)" if config.batch_size > 1 else "",
        f"--chunk-duration {max(10, round(seconds / 2))}" if seconds > 20 else "",
        "--optimizer-type adamw8bit"
        if config.optimizer_type in ("adamw", "prodigy") and run.device.type == "cuda"
        else "",
        f"--rank {max(1, config.rank // 2)}" if config.rank > 8 else "",
    ]
    resumable = (
        ""
        if config.gradient_checkpointing
        else f"With --gradient-checkpointing this run can go on: {resume_command(replace(config, gradient_checkpointing=True))}\n"
    )
    start_anew = f"With the others start anew from what it has learnt: --init-from {config.output_dir / 'checkpoints'}/… --output-dir {config.output_dir}-2"
    return JobError(
        f"{run.device} ran out of memory at optimizer step {run.position.step + 1}, with a batch of {len(largest.items)} × {seconds:.1f} s ({names}): {str(error).splitlines()[0]}",
        f"What helps: {', '.join(h for h in help_ if h) or 'a smaller model variant'}.\n{resumable}{start_anew}",
    )
