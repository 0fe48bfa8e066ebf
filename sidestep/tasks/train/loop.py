"""The training loop, the only one, from top to bottom. Rare events are one guarded line each.

The host reads values from the device only when it logs, and at least every `SKIPS_THAT_STOP` steps.
"""

import math
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

import torch

from sidestep.acestep.blocks import compiling_pays
from sidestep.acestep.device import peak_memory_bytes
from sidestep.acestep.fp16 import name_what_overflows
from sidestep.data.batches import StepPlan
from sidestep.data.records import RecordError
from sidestep.errors import Interrupted, JobError, UserError
from sidestep.events import STEP_TASK, Decision, EpochDone, LongTask, Notice, StepDone, StepSkipped, TrainingStarted
from sidestep.optim import can_skip_on_device
from sidestep.settings.config import memory_levers
from sidestep.stopping import PREVIEW, SAVE
from sidestep.tasks.train.checkpoints import resume_command, save_best, save_checkpoint, save_mark
from sidestep.tasks.train.evaluation import has_waited_enough, update_best
from sidestep.tasks.train.guards import VISITS_ABOVE, require_gradients
from sidestep.tasks.train.objective import Objective
from sidestep.tasks.train.previews import make_previews, preview_now
from sidestep.tasks.train.processes import unshard
from sidestep.tasks.train.report import add_timesteps, write_report
from sidestep.tasks.train.run import Point, Position, Run
from sidestep.words import clock

PRIOR = "--prior-data"  # stands for the song of a sample of other music
SETTLED = 2  # the log line by which a run's speed has settled: in the first it warms up
SKIPS_THAT_STOP = 10  # so many optimizer steps in a row without a finite gradient end a run


@dataclass(frozen=True)
class StepReading:
    """What became of one optimizer step on this process. samples: (song, loss, t) of each."""

    step: int
    grad_norm: float
    samples: list[tuple[str, float, float]]


@dataclass
class Metrics:
    """What the loop measures between two log lines.

    parts: (losses [B], timesteps [B], songs) of each micro-step of the optimizer step under way; steps: (optimizer
    step, gradient norm [1], parts). They wait on the device until `read` brings them to the host in one transfer. The
    rest is what the host knows since the last log line.
    """

    parts: list[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]] = field(default_factory=list)
    steps: list[tuple[int, torch.Tensor, list]] = field(default_factory=list)

    read_losses: list[float] = field(default_factory=list)  # of this process's samples
    read_drifts: list[float] = field(default_factory=list)  # the same on other music, against the model itself
    unwatched: list[tuple[int, str, float, float]] = field(default_factory=list)  # step, song, loss, t since the epoch
    grad_norm: float = math.nan
    skipped_in_a_row: int = 0
    lr: float = math.nan  # of the last optimizer step
    logged_at: float = field(default_factory=time.perf_counter)
    steps_since_log: int = 0
    paces: deque[tuple[int, float]] = field(default_factory=deque)  # (steps, seconds) between two log lines
    logs: int = 0
    # spent on validations, saves and previews
    rare_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, loss: torch.Tensor, t: torch.Tensor, songs: tuple[str, ...]) -> None:
        """Keep the plain losses of a micro-step."""
        self.parts.append((loss, t, songs))

    def close_step(self, step: int, norm: torch.Tensor) -> None:
        """An optimizer step ended with this gradient norm."""
        self.steps.append((step, norm.float().reshape(1), self.parts))
        self.parts = []
        self.steps_since_log += 1

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Count the seconds of a block among those spent on this kind."""
        began = time.perf_counter()
        yield
        self.rare_seconds[kind] += time.perf_counter() - began

    def usual_rate(self, seconds: float, epoch_steps: int) -> float:
        """Steps a second of about the last epoch, for whose songs of all lengths no few steps stand.

        seconds: that the steps since the last log line took.
        """
        if self.logs < SETTLED:
            self.paces.clear()
        self.paces.append((self.steps_since_log, seconds))
        while sum(steps for steps, _ in self.paces) - self.paces[0][0] >= epoch_steps:
            self.paces.popleft()
        return sum(steps for steps, _ in self.paces) / sum(seconds for _, seconds in self.paces)

    def read(self) -> list[StepReading]:
        """Bring all that waits on the device to the host, in one transfer."""
        waiting = [t for _, norm, parts in self.steps for t in (norm, *(t for part in parts for t in part[:2]))]
        values = iter(torch.cat(waiting).tolist() if waiting else ())
        readings = []
        for step, _, parts in self.steps:
            norm, samples = next(values), []
            for losses, timesteps, songs in parts:
                samples += zip(songs, *([*islice(values, len(t))] for t in (losses, timesteps)), strict=True)
            readings.append(StepReading(step, norm, samples))
        self.steps = []
        return readings


def run_loop(run: Run) -> None:
    """Train from `run.position` to the end.

    Raises Interrupted after a save when asked to stop, JobError when steps fail or nothing can be learnt.
    """
    config, history, metrics, stop = run.config, run.history, Metrics(), run.stop
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # a first step was skipped
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # its output is never changed in place
        done = first = run.position
        run.report(
            TrainingStarted(
                step=done.step, total_steps=run.total_steps, epoch=done.epoch + 1, total_epochs=config.epochs
            )
        )
        while run.position.step < run.total_steps:
            epoch, started = run.position.epoch, time.perf_counter()
            plan = run.plan(epoch)
            for index in range(run.position.step_in_epoch, len(plan)):
                if run.position.step == run.total_steps:  # --max-steps ends the run inside an epoch
                    break
                wanted = [stop.take(what) for what in (SAVE, PREVIEW)] if run.position.step else [False, False]
                # never written back to `stop.requested`: who asks while the processes answer is heard a step later
                stops, *wanted = run.processes.any(stop.requested, *wanted)
                if any(wanted) and not stops:
                    save_or_preview(run, metrics, *wanted)
                    (stops,) = run.processes.any(stop.requested)
                if stops:
                    save_and_exit(run, metrics)
                began = time.perf_counter()
                try:
                    try_optimizer_step(run, plan[index], metrics)
                except RuntimeError as error:  # a terminal's Ctrl-C ends the compiler of --compile, too
                    failed = stop.requested and isinstance(error, torch._dynamo.exc.BackendCompilerFailed)
                    if not failed or run.processes.count > 1:  # other processes are inside the step
                        raise
                    save_and_exit(run, metrics)
                run.position = Position(epoch, index + 1, run.position.step + 1)
                run.writer.poll()
                is_log_step = run.position.step in (1, run.total_steps) or run.position.step % config.log_every == 0
                if is_log_step or run.compiles or len(metrics.steps) >= SKIPS_THAT_STOP:
                    read_metrics(run, metrics)
                if run.compiles and run.position.step > first.step + 1:  # the first one warms up
                    compile_if_it_pays(run, time.perf_counter() - began)
                if is_log_step:
                    log(run, metrics)

            done, seconds = epoch + 1, time.perf_counter() - started
            read_metrics(run, metrics)
            add_up_processes(run, metrics)
            loss = history.epoch_loss()
            run.report(EpochDone(epoch=done, total_epochs=config.epochs, loss=loss, seconds=seconds))
            run.tensorboard.add_scalar("loss/epoch", loss, run.position.step)
            is_whole = run.position.step_in_epoch == len(plan)
            if is_whole:
                history.close_epoch()
                run.position = Position(done, 0, run.position.step)
            else:  # before it is judged: a run that goes on judges the epoch once, when it is whole
                save_checkpoint(run, f"step_{run.position.step:06d}")
            with metrics.timed("validations"):
                is_best = update_best(run, done)
            mark = history.add_mark(config.mark_drop, run.position.step, done) if is_whole else None
            stops_early = has_waited_enough(run)
            run.tensorboard.flush()
            with metrics.timed("saves"):
                if is_best and config.save_best:
                    save_best(run)
                if mark:
                    save_mark(run, mark)
                if is_whole and (done % config.save_every == 0 or run.position.step == run.total_steps or stops_early):
                    save_checkpoint(run, f"epoch_{done:04d}")
            is_heard = config.preview_every and is_whole and done % config.preview_every == 0
            if run.previews and (is_heard or mark):
                with metrics.timed("previews"):
                    make_previews(run, run.previews)
            metrics.logged_at, metrics.steps_since_log = time.perf_counter(), 0
            if run.is_main:
                add_timesteps(run)
                write_report(run)
            if stops_early:
                break


def optimizer_step(run: Run, plan: StepPlan, metrics: Metrics) -> None:
    """One optimizer step: this process's micro-batches, then clip and update unless the gradient is not finite.

    Losses are divided by the samples of the whole step, so short steps and uneven batches weigh every sample the same.
    Other music, if there is any, comes last and has its share of the loss. In fp16 the first step, and the next one
    after a step that was left out, raise JobError for a module that leaves its range.
    """
    accelerator, processes, step = run.accelerator, run.processes.count, run.position.step
    others = run.prior.micro_batches(step, plan.samples) if run.prior else ()
    # One kind after the other: sharded, all processes must ask the model equally often, and other music asks twice.
    # A process without work still takes part in the reduction.
    work = []
    for micro_batches, is_other in ((plan.micro_batches, False), (others, True)):
        own = micro_batches[run.processes.index :: processes]
        rounds = range(-(-len(micro_batches) // processes))
        work += [(own[i] if i < len(own) else micro_batches[0], is_other, i < len(own)) for i in rounds]
    # parts of the step: calls of layers, or micro-batches; the update is one, and other music is predicted once more
    decoder: Any = run.model.get_base_model()
    again = len(decoder.layers) if run.layer_calls and others else 0
    parts = sum((run.layer_calls or 1) + again * is_other for _, is_other, _ in work)
    run.step_task = LongTask(run.report, STEP_TASK, parts + 1)
    looks = run.looks_at_range and accelerator.mixed_precision == "fp16" and not run.is_compiled
    run.looks_at_range = False
    for number, (micro_batch, is_other, is_own) in enumerate(work, start=1):
        songs = run.prior.songs if run.prior and is_other else run.songs
        batch = run.objective.collate(songs, micro_batch)
        with accelerator.no_sync(run.wrapped) if number < len(work) else nullcontext():
            if run.prior and is_other:
                assert isinstance(run.objective, Objective)
                share = run.prior.weight * processes / len(others)
                weighted, loss, t = run.objective.preservation(
                    run.wrapped, batch, step, len(others), run.model.disable_adapter
                )
            else:
                share = (1 - run.prior.weight if run.prior else 1) * processes / plan.samples
                with name_what_overflows(decoder) if looks else nullcontext():
                    weighted, loss, t = run.objective(run.wrapped, batch, step, plan.samples)
            accelerator.backward(weighted.sum() * (share if is_own else 0.0))
        if is_own:
            metrics.add(loss, t, (PRIOR,) * len(loss) if is_other else batch.songs)
        if not run.layer_calls:
            run.step_task()
    run.step_task = None
    if not run.learns and not run.objective.drops_all(run.position.step, plan.samples):
        require_gradients(run.model, run.processes, run.position.step + 1)
        run.learns = True
    norm = accelerator.clip_grad_norm_(run.parameters, run.config.max_grad_norm or math.inf)
    assert norm is not None  # as it would be under DeepSpeed
    norm = unshard(norm.detach())
    inner: Any = getattr(run.optimizer, "optimizer", run.optimizer)
    if accelerator.scaler is not None:  # fp16: the scaler leaves the step out
        run.optimizer.step()
    elif can_skip_on_device(inner):
        inner.grad_scale, inner.found_inf = None, (~torch.isfinite(norm)).float()
        run.optimizer.step()
    elif bool(torch.isfinite(norm)):  # the host has to look, once
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    metrics.lr = float(run.scheduler.get_last_lr()[0])
    run.scheduler.step()
    if run.average is not None:
        run.average.step(run.parameters)
    metrics.close_step(run.position.step + 1, norm)


def compile_if_it_pays(run: Run, seconds: float) -> None:
    """Decide once whether the steps to come are compiled, by the seconds of an optimizer step (`--compile auto`)."""
    compiles, run.compiles = run.compiles, None
    assert compiles
    config = run.config
    recomputes = config.gradient_checkpointing and config.recompute_layers != 0
    choice = compiling_pays(seconds * (run.total_steps - run.position.step), run.device, recomputes)
    if choice.value == "on":
        try:
            compiles()
        except UserError as error:
            choice = replace(choice, value="off", reason=error.problem)
        else:
            run.is_compiled, run.layer_calls = True, 0
            for hook in run.layer_hooks:  # they would be compiled, too
                hook.remove()
    run.report(Decision(what="compile", value=choice.value, reason=choice.reason))


def try_optimizer_step(run: Run, plan: StepPlan, metrics: Metrics) -> None:
    """An optimizer step. Raises JobError when memory runs out or a record is gone, after saving what is trained."""
    try:
        optimizer_step(run, plan, metrics)
        return
    except torch.OutOfMemoryError as error:
        problem = out_of_memory(run, plan, error)
    except RecordError as error:
        problem = error
    # From here on the handler's traceback no longer holds the batch's tensors.
    if run.processes.count == 1 and run.position.step:  # others would have to take part, and they do not know
        run.optimizer.zero_grad(set_to_none=True)
        save_checkpoint(run, f"step_{run.position.step:06d}")
        run.writer.wait()
    raise problem


def read_metrics(run: Run, metrics: Metrics) -> None:
    """Read what waits on the device, and report skipped steps with the songs that seem to be the cause.

    Those are the songs whose loss is not finite; all of the step's when only the gradient is not. Raises JobError
    after ten skipped steps in a row.
    """
    for reading in metrics.read():
        finite = [sample for sample in reading.samples if math.isfinite(sample[1])]
        metrics.read_drifts += [loss for song, loss, _ in finite if song == PRIOR]
        for song, loss, t in finite:
            if song == PRIOR:
                continue
            run.history.add_sample(loss, t)
            metrics.read_losses.append(loss)
            metrics.unwatched.append((reading.step, song, loss, t))
        if math.isfinite(reading.grad_norm):
            metrics.grad_norm, metrics.skipped_in_a_row = reading.grad_norm, 0
            continue
        is_sure = len(finite) < len(reading.samples)
        own = [song for song, loss, _ in reading.samples if not (is_sure and math.isfinite(loss))]
        everyone = run.processes.gather((tuple(own), is_sure))
        if run.accelerator.scaler is not None and not any(sure for _, sure in everyone):
            continue  # fp16: the loss scale was too high for this gradient and is lowered now
        suspects = [songs for songs, sure in everyone if sure] or [songs for songs, _ in everyone]
        songs = tuple(dict.fromkeys(name for names in suspects for name in names))
        metrics.skipped_in_a_row += 1
        run.looks_at_range = True
        reason, in_a_row = "loss or gradient is not finite", metrics.skipped_in_a_row
        run.report(StepSkipped(step=reading.step, songs=songs, reason=reason, in_a_row=in_a_row))
        if in_a_row >= SKIPS_THAT_STOP:
            run.writer.wait()
            raise JobError(
                f"{SKIPS_THAT_STOP} optimizer steps in a row had no finite loss or gradient (the last at "
                f"{', '.join(songs)}); the run was stopped at step {reading.step}.",
                f"Lower --lr (now {run.config.lr:g}), use --precision fp32 or take these songs away. "
                f"What was saved before is good: {resume_command(run.config)}",
            )


def log(run: Run, metrics: Metrics) -> None:
    """Report the mean loss of all processes since the last log line, and how fast it goes."""
    drifts = metrics.read_drifts
    total, count, drift, drift_count = run.processes.sum(
        [sum(metrics.read_losses), float(len(metrics.read_losses)), sum(drifts), float(len(drifts))]
    )
    now, step = time.perf_counter(), run.position.step
    rate = metrics.steps_since_log / (now - metrics.logged_at)
    usual = metrics.usual_rate(now - metrics.logged_at, -(-run.total_steps // run.config.epochs))
    left = (run.total_steps - step) / usual + rare_seconds_left(run, metrics)
    point = Point(
        step,
        epoch=run.position.epoch + 1,
        loss=total / count if count else math.nan,
        lr=float(metrics.lr),
        grad_norm=metrics.grad_norm,
        memory_bytes=peak_memory_bytes(run.device),
        drift=drift / drift_count if drift_count else None,
    )
    run.history.points.append(point)
    run.report(
        StepDone(
            **asdict(point),
            total_steps=run.total_steps,
            steps_per_second=rate,
            eta_seconds=left,
        )
    )
    for name, value in (("loss/train", point.loss), ("lr", point.lr), ("grad_norm", point.grad_norm)):
        run.tensorboard.add_scalar(name, value, step)
    if point.drift is not None:
        run.tensorboard.add_scalar("loss/prior", point.drift, step)
    metrics.logs += 1
    if metrics.logs == SETTLED and step < run.total_steps:
        speed = f"{1 / usual:.2g} s an optimizer step" if usual < 1 else f"{usual:.2g} optimizer steps a second"
        ends = (datetime.now().astimezone() + timedelta(seconds=left)).strftime("%A %H:%M")
        message = f"At {speed} the {run.total_steps - step} that are left take about {clock(left)}, until {ends}."
        run.report(Notice(message=message))
    metrics.read_drifts = []
    metrics.read_losses, metrics.steps_since_log, metrics.logged_at = [], 0, now


def rare_seconds_left(run: Run, metrics: Metrics) -> float:
    """Seconds that the validations, saves and previews to come take, if they take as long as those of this process."""
    config, ended, total = run.config, run.position.epoch, 0.0
    intervals = {"validations": config.validate_every, "saves": config.save_every, "previews": config.preview_every}
    for kind, seconds in metrics.rare_seconds.items():
        # at the end of the run there is one of each
        due = [e for e in range(1, run.last_epoch + 1) if e == run.last_epoch or e % (intervals[kind] or e + 1) == 0]
        done = sum(run.first_epoch < epoch <= ended for epoch in due)
        total += seconds / max(done, 1) * sum(epoch > ended for epoch in due)
    return total


def add_up_processes(run: Run, metrics: Metrics) -> None:
    """Put together what each process has seen: the epoch's loss everywhere, losses by timestep in the first one.

    Names songs whose loss stays far above its own history.
    """
    everyone = [sample for samples in run.processes.gather(metrics.unwatched) for sample in samples]
    metrics.unwatched = []
    for song, factor in run.history.watch.add(sample[1:] for sample in sorted(everyone, key=lambda sample: sample[0])):
        message = (
            f"{song}: its loss has stayed about {factor:.1f} times above its own history for {VISITS_ABOVE} visits. "
            "Listen to it: it may not fit the other songs, or its file or caption is wrong."
        )
        run.report(Notice(message=message, level="warning"))
    history, bins = run.history, len(run.history.bin_loss)
    own = [history.loss_sum, float(history.samples), *history.bin_loss, *map(float, history.bin_count)]
    history.loss_sum, samples, *by_timestep = run.processes.sum(own)
    history.samples = int(samples)
    shown = by_timestep if run.is_main else [0.0] * 2 * bins
    history.bin_loss, history.bin_count = shown[:bins], list(map(int, shown[bins:]))


def save_or_preview(run: Run, metrics: Metrics, save: bool, preview: bool) -> None:
    """What a person asked for between two steps. Training goes on as if nobody had."""
    began = time.perf_counter()
    if save:
        save_step(run, metrics)
        run.history.keep_own(run.is_main)
    if preview:
        preview_now(run)
    metrics.logged_at += time.perf_counter() - began  # no part of a step's time


def save_step(run: Run, metrics: Metrics) -> None:
    """Save in the midst of an epoch, with what all processes know of it."""
    read_metrics(run, metrics)
    add_up_processes(run, metrics)
    run.report(Notice(message=f"Saving optimizer step {run.position.step}."))
    save_checkpoint(run, f"step_{run.position.step:06d}")


def save_and_exit(run: Run, metrics: Metrics) -> None:
    """Save and stop. Raises Interrupted."""
    save_step(run, metrics)
    run.writer.finish()
    run.processes.wait()  # a launcher ends all processes when one of them leaves
    raise Interrupted(resume_command(run.config))


def out_of_memory(run: Run, plan: StepPlan, error: torch.OutOfMemoryError) -> JobError:
    """The error for device memory that ran out: in which batch, and what would help that is not on yet."""
    config = run.config
    largest = max(plan.micro_batches, key=lambda m: len(m.items) * m.items[0].frames)
    seconds = largest.items[0].frames / run.frames_per_second
    names = ", ".join(dict.fromkeys(run.songs[item.song].name for item in largest.items))
    what_helps = ", ".join(memory_levers(config)) or "a smaller model variant"
    resumable = ""
    if not config.gradient_checkpointing:
        command = resume_command(replace(config, gradient_checkpointing=True))
        resumable = f"With --gradient-checkpointing this run can go on: {command}\n"
    return JobError(
        f"{run.device} ran out of memory at optimizer step {run.position.step + 1}, with a batch of "
        f"{len(largest.items)} × {seconds:.1f} s ({names}): {str(error).splitlines()[0]}",
        f"What helps: {what_helps}.\n{resumable}With the others start anew from what it has learnt: "
        f"--init-from {config.output_dir / 'checkpoints'}/… --output-dir {config.output_dir}-2",
    )
