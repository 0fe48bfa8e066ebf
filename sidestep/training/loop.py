"""The training loop, the only one. Rare events are one guarded line each; the host looks at device values only when it logs."""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from sidestep.acestep.device import peak_memory_bytes
from sidestep.data.dataset import StepPlan, collate
from sidestep.errors import Interrupted, JobError
from sidestep.events import EpochDone, StepDone, StepSkipped
from sidestep.optim import can_skip_on_device
from sidestep.training.run_folder import resume_command, save_checkpoint
from sidestep.training.setup import Run
from sidestep.training.state import Position
from sidestep.training.stops import StopRequest

TIMESTEP_BINS = 10
SKIPS_THAT_STOP = 10


@dataclass
class Tally:
    """Device values that wait to be read, and what the host knows of the steps they belong to."""

    losses: list[torch.Tensor] = field(default_factory=list)  # [B] each
    songs: list[tuple[str, ...]] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)  # (optimizer step, how many of the losses above it had)
    bin_loss: torch.Tensor | None = None
    bin_count: torch.Tensor | None = None

    def add(self, loss: torch.Tensor, t: torch.Tensor, songs: tuple[str, ...]) -> None:
        """Keep the plain losses [B] of a micro-step and sort them by timestep, all on the device."""
        self.losses.append(loss)
        self.songs.append(songs)
        if self.bin_loss is None:
            self.bin_loss, self.bin_count = torch.zeros(2, TIMESTEP_BINS, device=loss.device)
        bins = (t * TIMESTEP_BINS).long().clamp_(max=TIMESTEP_BINS - 1)
        self.bin_loss.index_add_(0, bins, loss.float())
        self.bin_count.index_add_(0, bins, torch.ones_like(loss, dtype=torch.float32))


@dataclass
class Reading:
    """What a tally said when the host read it."""

    loss: float
    grad_norm: float
    skipped: list[tuple[int, tuple[str, ...]]]


@dataclass
class Progress:
    """What the loop remembers between log lines."""

    started: float
    first_step: int
    tally: Tally = field(default_factory=Tally)
    in_a_row: int = 0
    epoch_losses: list[float] = field(default_factory=list)
    done_steps: int = 0


def run_loop(run: Run) -> None:
    """Train from `run.position` to the end. Raises Interrupted after a save when asked to stop, JobError when the run goes astray."""
    config = run.config
    progress = Progress(started=time.perf_counter(), first_step=run.position.step)
    with StopRequest() as stop:
        while run.position.step < run.total_steps:
            epoch, plan, epoch_started = run.position.epoch, run.plan(run.position.epoch), time.perf_counter()
            for index in range(run.position.step_in_epoch, len(plan)):
                optimizer_step(run, plan[index], progress.tally)
                run.position = Position(epoch, index + 1, run.position.step + 1)
                if len(progress.tally.steps) >= SKIPS_THAT_STOP or run.position.step % config.log_every == 0 or run.position.step == run.total_steps:
                    log(run, progress)
                if run.position.step == run.total_steps or agreed_to_stop(run, stop):
                    break
            if run.position.step_in_epoch == len(plan):
                run.position = Position(epoch + 1, 0, run.position.step)
            if stop.requested and run.position.step < run.total_steps:
                log(run, progress)
                save_checkpoint(run, f"step_{run.position.step:06d}")
                run.writer.wait()
                raise Interrupted(resume_command(run))
            end_epoch(run, progress, epoch, time.perf_counter() - epoch_started)
            if run.position.step_in_epoch:  # --max-steps ended the run inside an epoch
                save_checkpoint(run, f"step_{run.position.step:06d}")
            elif run.position.epoch % config.save_every == 0 or run.position.step == run.total_steps:
                save_checkpoint(run, f"epoch_{run.position.epoch:04d}")
    run.writer.wait()


def optimizer_step(run: Run, plan: StepPlan, tally: Tally) -> None:
    """One optimizer step: this process's micro-batches, then clip and update unless the gradient is not finite.

    Losses are divided by the samples of the whole step, so short steps and uneven batches weigh every sample the same.
    """
    accelerator, processes = run.accelerator, run.accelerator.num_processes
    own = plan.micro_batches[accelerator.process_index :: processes]
    rounds = math.ceil(len(plan.micro_batches) / processes)
    for number in range(rounds):
        micro_batch = own[number] if number < len(own) else plan.micro_batches[0]  # a process without work still takes part in the reduction
        share = processes / plan.samples if number < len(own) else 0.0
        batch = collate(run.songs, micro_batch, pin=run.device.type == "cuda").to(run.device)
        with accelerator.no_sync(run.wrapped) if number < rounds - 1 else nullcontext():
            weighted, loss, t = run.objective(run.wrapped, batch, run.position.step, plan.samples)
            accelerator.backward(weighted.sum() * share)
        if share:
            tally.add(loss, t, batch.songs)
    norm = accelerator.clip_grad_norm_(run.parameters, run.config.max_grad_norm or math.inf)
    update(run, norm)
    run.scheduler.step()
    tally.norms.append(norm.detach())
    tally.steps.append((run.position.step + 1, len(tally.losses)))


def update(run: Run, norm: torch.Tensor) -> None:
    """Apply the gradient if its norm is finite. Fused optimizers decide that on the device; for the others the host looks once."""
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    if run.accelerator.scaler is None and can_skip_on_device(inner):
        inner.grad_scale, inner.found_inf = None, (~torch.isfinite(norm)).float()
        run.optimizer.step()
    elif run.accelerator.scaler is not None or bool(torch.isfinite(norm)):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def read(tally: Tally) -> Reading:
    """Bring a tally to the host, in one transfer."""
    losses = torch.cat(tally.losses).float()
    values = torch.cat([losses, torch.stack(tally.norms).float()]).tolist()
    per_sample, norms = values[: len(losses)], values[len(losses) :]
    skipped, first_batch, first_sample = [], 0, 0
    for (step, last_batch), norm in zip(tally.steps, norms, strict=True):
        songs = [name for batch in tally.songs[first_batch:last_batch] for name in batch]
        if not math.isfinite(norm):
            bad = [name for name, loss in zip(songs, per_sample[first_sample : first_sample + len(songs)], strict=True) if not math.isfinite(loss)]
            skipped.append((step, tuple(dict.fromkeys(bad or songs))))
        first_batch, first_sample = last_batch, first_sample + len(songs)
    finite = [x for x in per_sample if math.isfinite(x)]
    return Reading(sum(finite) / len(finite) if finite else math.nan, norms[-1], skipped)


def log(run: Run, progress: Progress) -> None:
    """Read the tally, report it, and stop a run whose steps are all skipped. Raises JobError."""
    tally, config, now = progress.tally, run.config, time.perf_counter()
    if not tally.steps:
        return
    reading = read(tally)
    skipped = dict(reading.skipped)
    for step, _ in tally.steps:
        progress.in_a_row = progress.in_a_row + 1 if step in skipped else 0
        if step in skipped:
            run.report(StepSkipped(step=step, songs=skipped[step], reason="loss or gradient is not finite", in_a_row=progress.in_a_row))
        if progress.in_a_row >= SKIPS_THAT_STOP:
            raise JobError(
                f"{SKIPS_THAT_STOP} optimizer steps in a row had no finite loss or gradient (the last at {', '.join(skipped[step])}); the run was stopped at step {step}.",
                f"Lower --lr (now {config.lr:g}) or use --precision fp32, then resume from the last good checkpoint: {resume_command(run)}",
            )
    progress.epoch_losses.append(reading.loss)
    step = run.position.step
    if step % config.log_every == 0 or step == run.total_steps:
        rate = (step - progress.first_step) / (now - progress.started)
        lr = run.scheduler.get_last_lr()[0]
        run.report(
            StepDone(
                step=step,
                total_steps=run.total_steps,
                epoch=run.position.epoch + 1,
                loss=reading.loss,
                lr=lr,
                grad_norm=reading.grad_norm,
                steps_per_second=rate,
                eta_seconds=(run.total_steps - step) / rate,
                memory_bytes=peak_memory_bytes(run.device),
            )
        )
        for name, value in (("loss/train", reading.loss), ("lr", lr), ("grad_norm", reading.grad_norm)):
            run.tensorboard.add_scalar(name, value, step)
    progress.tally = Tally(bin_loss=tally.bin_loss, bin_count=tally.bin_count)


def end_epoch(run: Run, progress: Progress, epoch: int, seconds: float) -> None:
    """Report the epoch's mean loss."""
    log(run, progress)
    finite = [x for x in progress.epoch_losses if math.isfinite(x)]
    run.report(EpochDone(epoch=epoch + 1, total_epochs=run.config.epochs, loss=sum(finite) / len(finite) if finite else math.nan, seconds=seconds))
    progress.epoch_losses.clear()
    run.tensorboard.flush()


def agreed_to_stop(run: Run, stop: StopRequest) -> bool:
    """Whether any process was asked to stop; all leave after the same step."""
    if run.accelerator.num_processes > 1:
        flag = torch.tensor(float(stop.requested), device=run.device)
        stop.requested = bool(run.accelerator.reduce(flag, "sum") > 0)
    return stop.requested
