"""A run on disk: its folder, checkpoints to go on from, `best/`, `ema/` and `final/`; complete or absent, never half.

A checkpoint holds all that is needed to go on as if training had not stopped. Only the first process writes, and
training waits for the copy to the CPU, not for the disk.
"""

import errno
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sidestep.adapters.attach import adapter_state
from sidestep.adapters.write import Card, save_final, save_language_adapter
from sidestep.errors import JobError, UserError
from sidestep.events import Decision, Event, Notice, Report, Saved
from sidestep.files import ASIDE, bring_back, not_writable, put_in_place, replacing, require_writable, write_text
from sidestep.optim import optimizer_bytes
from sidestep.settings.config import TrainConfig, TrainLmConfig, command_line, command_words, resuming_line
from sidestep.settings.option import as_json_values, options_of
from sidestep.settings.path_checks import (
    COMPLETE_FILE,
    complete_checkpoints,
    damaged_file,
    digest_of,
    find_checkpoint,
    read_run,
    saved_facts,
    seal_of,
)
from sidestep.tasks.train.evaluation import averaged
from sidestep.tasks.train.marks import Mark
from sidestep.tasks.train.processes import shard_like, unshard
from sidestep.tasks.train.report import as_text
from sidestep.tasks.train.run import History, Position, Run
from sidestep.words import PROGRAM, count, paste, size

STATE_FILE = "training_state.pt"
STATE_SCHEMA = 2  # raise it when a run can no longer go on from states of before
MARKS = "marks"  # folder of the adapters that were marked on the way
SAVED = ("final", "checkpoints/epoch_*", "checkpoints/step_*")  # what a run saves, and what it picks on its way
PICKED = ("best", "ema", f"{MARKS}/epoch_*")
NEW, OLD = ".saving-", ASIDE  # folders under way; whatever has such a name is no result
NO_ROOM = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)

# What may not change when a run goes on: the saved tensors or the order of the data would not fit.
FIXED_ON_RESUME = (
    *("adapter_type", "rank", "alpha", "target_modules", "attention_type", "self_target_modules"),
    *("cross_target_modules", "target_mlp", "lokr_factor", "lokr_decompose_both", "lokr_weight_decompose"),
    *("optimizer_type", "batch_size", "chunk_duration", "val_split", "seed"),
)
# What says where things are, or had its effect at the start.
NOT_COMPARED = (
    *(
        "checkpoint_dir",
        "model_variant",
        "dataset_dir",
        "prior_data",
        "output_dir",
        "resume_from",
        "run_name",
        "device",
    ),
    *("attention", "compile", "ignore_rank_map", "init", "init_from", "gradient_accumulation"),
)


# Folders that are complete or absent


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a new folder that then takes the place of `folder`.

    Raises what `fill` raises, with the old one untouched. Where a process was killed between two renames (`restore`
    knows them), the old one is brought back.
    """
    new = folder.with_name(NEW + folder.name)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        fill(new)
        put_in_place(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def restore(parent: Path) -> None:
    """Bring back folders that a killed process had moved aside and remove what it had not finished."""
    for old in parent.glob(f"{OLD}*"):
        bring_back(old.with_name(old.name.removeprefix(OLD)))
    for leftover in (*parent.glob(f"{NEW}*"), *parent.glob(f"{OLD}*")):
        shutil.rmtree(leftover, ignore_errors=True)


def write_checkpoint(
    folder: Path, state: dict[str, Any], position: Position, write_adapter: Callable[[Path], None]
) -> None:
    """Write a saved run and verify it before it takes its place.

    write_adapter(folder): writes the adapter's files as other programs read them. Raises OSError, JobError.
    """

    def fill(new: Path) -> None:
        write_adapter(new)
        with replacing(new / STATE_FILE) as temporary, temporary.open("wb") as f:
            torch.save(state, f)
        paths = {p.relative_to(new).as_posix(): p for p in sorted(new.rglob("*")) if p.is_file()}
        metadata = {
            "position": asdict(position),
            "files": {name: path.stat().st_size for name, path in paths.items()},
            "digests": {name: digest_of(path) for name, path in paths.items()},
        }
        write_text(new / COMPLETE_FILE, json.dumps(metadata | {"seal": seal_of(metadata)}, indent=1))
        with zipfile.ZipFile(new / STATE_FILE) as archive:  # its sums are of what was in memory
            if archive.testzip() is not None:
                raise JobError(
                    f"{folder}: what was written is not what is on the disk.",
                    "Check the disk; the older checkpoints are untouched.",
                )

    write_folder(folder, fill)


def read_metadata(folder: Path) -> tuple[Position, dict[str, str]] | None:
    """(how far the run was, digest of each file) of a saved run; None unless each file is there in its full size."""
    if (facts := saved_facts(folder)) is None:
        return None
    try:
        return Position(**facts["position"]), facts.get("digests", {})
    except TypeError:
        return None


def positions(output_dir: Path) -> dict[Path, Position]:
    """The complete checkpoints of a run and how far each was, oldest first by optimizer step."""
    found = ((folder, read_metadata(folder)) for folder in complete_checkpoints(output_dir))
    return {folder: metadata[0] for folder, metadata in found if metadata}


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], Position]:
    """(state, position) of a checkpoint. Nothing but tensors and plain values is unpickled. Raises JobError."""
    unreadable = (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError)
    try:
        position, digests = read_metadata(folder) or (Position(), {COMPLETE_FILE: ""})
        if name := damaged_file(folder, digests):
            raise ValueError(f"{name} is damaged: its bytes are not those that were written")
        return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True), position
    except (*unreadable, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JobError(
            f"{folder}: not readable ({reason[:200]}).",
            f"Move {folder} away; --resume-from latest then takes the checkpoint before it.",
        ) from None


def prune(output_dir: Path, keep: int, also_keep_step: int | None = None) -> None:
    """Delete the oldest complete checkpoints beyond `keep` (0 keeps all), but not the one at the best step."""
    for old, position in list(positions(output_dir).items())[:-keep] if keep else []:
        if position.step != also_keep_step:
            gone = old.with_name(OLD + old.name)
            put_in_place(old, gone)  # first out of sight: a half-deleted folder is no checkpoint
            shutil.rmtree(gone, ignore_errors=True)


# Before a run begins or goes on


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint that a run goes on from."""

    folder: Path
    state: dict[str, Any]
    position: Position

    @property
    def config(self) -> dict[str, Any]:
        return self.state["config"]


def resume_command(config: TrainConfig) -> str:
    """The command that goes on from the newest checkpoint of a run, started as this one was."""
    config = replace(config, resume_from=Path("latest"))
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if processes == "1":
        return command_line(config)
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    launcher = ("accelerate", "launch") if by_accelerate else ("torchrun", "--nproc-per-node", processes)
    if PROGRAM[0] == "uv":
        return paste(("uv", "run", *launcher, "train.py", *command_words(config)))
    return paste((*launcher, "-m", "sidestep.cli", *command_words(config)))


def prepare_folder(folder: Path) -> None:
    """Make the output folder, put back what a broken save moved aside, and try it. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for parent in (folder, folder / "checkpoints", folder / MARKS):
            restore(parent)
    except OSError as error:
        raise not_writable(folder, error) from None
    require_writable(folder, "--output-dir")


def what_stands(config: TrainConfig) -> str:
    """What a run has left in the output folder that this one would write over: the first of it, or nothing.

    A run with the same settings that was stopped before its first checkpoint may begin again.
    """
    folder, own = config.output_dir, as_json_values(config)
    try:
        is_same = json.loads((folder / "config.json").read_text(encoding="utf-8")) == json.loads(json.dumps(own))
    except (OSError, ValueError, RecursionError):
        is_same = False
    left = (path for names in SAVED + (() if is_same else PICKED) for path in sorted(folder.glob(names)))
    return next((path.relative_to(folder).as_posix() for path in left), "")


def ways_on(folder: Path) -> str:
    """What helps where a run stands already: its own command to go on with, and a folder for the other one."""
    ways, run = [], read_run(folder)
    if run and run.checkpoints:
        with suppress(UserError):  # its settings are those of another version
            line = resuming_line(folder, run.settings)
            ways = [
                f"It is finished; to train it further, raise --epochs in: {line}" if run.finished else f"Go on: {line}"
            ]
    return "\n".join([*ways, f"Give this run a folder of its own: --output-dir {folder}-2"])


def open_folder(config: TrainConfig, report: Report) -> SavedRun | None:
    """The checkpoint to go on from, None for a run that begins. Called before anything is loaded; changes nothing.

    Raises UserError when the folder holds another run, when there is nothing to go on from, and for a setting that may
    not change.
    """
    folder = config.output_dir
    if folder.resolve() == config.dataset_dir.resolve():
        raise UserError(
            f"--output-dir {folder}: this is --dataset-dir, and the run's own files would be taken for songs.",
            "Choose a folder of its own.",
        )
    source = find_checkpoint(config.resume_from, folder) if config.resume_from else None
    is_own = source is not None and folder.resolve() in source.resolve().parents
    if not is_own and (there := what_stands(config)):
        raise UserError(f"--output-dir {folder}: a run already stands there ({there}).", ways_on(folder))
    if source is None:
        return None
    state, position = read_checkpoint(source)
    if state.get("schema") != STATE_SCHEMA:
        raise UserError(
            f"--resume-from {source}: saved by another version of Side-Step, which kept less of the songs to compare.",
            f"Start a new run from its adapter: --init-from {source} --output-dir {folder}-2",
        )
    later = [path for path, at in positions(folder).items() if at.step > position.step]
    if later:
        raise UserError(
            f"--resume-from {source}: {later[-1]} goes further; going on from here would mix two runs in one folder.",
            f"Give this one a folder of its own: --output-dir {folder}-2\n"
            "or go on from the newest: --resume-from latest",
        )

    saved, now, options = state["config"], as_json_values(config), options_of(type(config))
    different = [name for name in now if name in saved and saved[name] != now[name] and name not in NOT_COMPARED]
    refused = [name for name in different if name in FIXED_ON_RESUME]
    if refused:
        what = ", ".join(
            f"{options[name].flag} is {as_text(now[name])}, was {as_text(saved[name])}" for name in refused
        )
        raise UserError(
            f"--resume-from {source}: {what}.",
            "Resume with the settings of that run, or start a new run in another --output-dir.",
        )
    for name in different:
        report(Notice(message=f"Resumed with {options[name].flag} {as_text(now[name])}, before {as_text(saved[name])}"))
    return SavedRun(source, state, position)


def require_same_data(saved: SavedRun, songs: dict[str, dict[str, str]], config: TrainConfig) -> None:
    """Raises UserError unless the songs are those of the saved run. songs: name of each, and digests of its parts."""
    before = saved.state["songs"]
    gone, new = sorted(set(before) - set(songs)), sorted(set(songs) - set(before))
    parts_of = {  # a part that was not looked at then is not compared
        name: " and ".join(part for part, digest in songs[name].items() if before[name].get(part, digest) != digest)
        for name in sorted(set(before) & set(songs))
    }
    changed = [f"{name}: {parts}" for name, parts in parts_of.items() if parts]
    differences = [
        f"{len(names)} {what} ({names[0]})"
        for names, what in ((gone, "missing"), (new, "new"), (changed, "changed"))
        if names
    ]
    if differences:
        raise UserError(
            f"--resume-from {saved.folder}: the songs in {config.dataset_dir} are not those of that run: "
            f"{', '.join(differences)}.",
            "Put them back as they were, or start a new run from this adapter: "
            f"--init-from {saved.folder} --output-dir {config.output_dir}-2",
        )


def require_same_steps(saved: SavedRun, micro_batches: int) -> None:
    """Raises UserError unless an optimizer step has as many micro-batches as in the saved run, over all processes."""
    before = saved.state["micro_batches"]
    if before != micro_batches:
        raise UserError(
            f"--resume-from {saved.folder}: --gradient-accumulation times the number of processes is {micro_batches}, "
            f"was {before}.",
            f"Choose --gradient-accumulation so that the product is {before} again, "
            "or start a new run in another --output-dir.",
        )


def write_settings(config: TrainConfig) -> None:
    """Write config.json and command.txt. Raises OSError."""
    values = json.dumps(as_json_values(config), indent=2, ensure_ascii=False)
    write_text(config.output_dir / "config.json", values + "\n")
    write_text(config.output_dir / "command.txt", command_line(config) + "\n")


def check_room(run: Run) -> None:
    """Compare the room that the run's saves will take with what is free, and say both.

    Raises UserError where not even the first ones fit; where only fewer do, it is a warning.
    """
    config, folder = run.config, run.config.output_dir
    adapter = 4 * sum(parameter.numel() for parameter in run.parameters)
    epochs = -(-run.total_steps // len(run.plan(0))) - run.position.epoch
    there = len(complete_checkpoints(folder))
    state = optimizer_bytes(config.optimizer_type, run.parameters)
    new, each, results, along = room_for(config, adapter, state, epochs, there)
    free = shutil.disk_usage(folder).free
    what = count(new, "new checkpoint") if there else count(new, "checkpoint")
    also = f", at most {count(most_marks(config, epochs), 'mark')}" if along else ""
    needed = f"{what} of {size(each)}, the best and the last adapter{also}: {size(new * each + results + along)}"
    run.report(Decision(what="disk", value=needed, reason=f"{size(free)} are free in {folder}"))
    if free < 2 * each + results:  # one is written while another is there
        raise UserError(
            f"--output-dir {folder}: a checkpoint takes {size(each)}, and only {size(free)} are free.",
            "Free some space, choose an --output-dir on another disk, or a smaller adapter "
            f"(--rank {max(1, config.rank // 2)}).",
        )
    if free < (new + 1) * each + results + along:
        fits = max(1, there + (free - results - along) // each - 1)
        message = f"{needed} will not fit into {size(free)}. --keep-checkpoints {fits} keeps as many as fit."
        run.report(Notice(message=message, level="warning"))


def most_marks(config: TrainConfig, epochs: int) -> int:
    """How many marks a run makes on the way, at most."""
    return min(epochs, round(1 / max(config.mark_drop, 1e-9))) if config.mark_drop else 0


def room_for(
    config: TrainConfig, adapter: int, optimizer: int, epochs: int, there: int = 0
) -> tuple[int, int, int, int]:
    """(new checkpoints, bytes of each, of the results, of all marks at most) that a run saves.

    adapter, optimizer: bytes of their tensors. epochs: to come. there: checkpoints that are there.
    """
    files = adapter * (2 if config.adapter_type in ("lokr", "loha") else 1)  # theirs are written in two forms
    average = adapter if config.ema_decay else 0
    kept = -(-epochs // config.save_every)
    kept = min(kept, config.keep_checkpoints or kept)
    new = max(1, kept - (there if config.keep_checkpoints else 0))
    results = files * (2 + bool(average))  # best/, final/ and ema/
    return new, files + adapter + optimizer + average, results, most_marks(config, epochs) * files


# The state of a run: taken, and put back


def snapshot(value: Any) -> Any:
    """A copy on the CPU of nested tensors, which training does not change. Under FSDP all processes must take it."""
    if isinstance(value, torch.Tensor):
        return unshard(value.detach()).to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: snapshot(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(v) for v in value)
    return value


def adapter_snapshot(run: Run) -> dict[str, torch.Tensor]:
    """The adapter's tensors on the CPU. Raises JobError for one that holds NaN or infinity: it must not be saved."""
    tensors = snapshot(adapter_state(run.model))
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise JobError(
            f"The adapter holds values that are no numbers ({broken[0]}); it was not saved.",
            f"Go on from the last good checkpoint with a lower --lr: {resume_command(run.config)}",
        )
    return tensors


def state_of(run: Run) -> dict[str, Any]:
    """All that a run needs to go on, but for its position.

    There is no state of random generators: every draw follows from the seed and its position in the run.
    """
    average = {}
    if run.average:
        average = {"step": run.average.optimization_step, "tensors": snapshot(run.average.shadow_params)}
    return {
        "schema": STATE_SCHEMA,
        "adapter": adapter_snapshot(run),
        "optimizer": snapshot(run.optimizer.state_dict()),
        "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else {},
        "average": average,
        "history": asdict(run.history),
        "config": as_json_values(run.config),
        "ranks": run.ranks,
        "total_steps": run.total_steps,
        "micro_batches": run.config.gradient_accumulation * run.processes.count,
        "model": run.checkpoint.identity(),
        "songs": run.fingerprints,
    }


def restore_state(run: Run, saved: SavedRun) -> None:
    """Put optimizer, average, history and position of a saved run into one that was set up with its adapter.

    The schedule is a function of the step: it takes this run's value there, and nothing of the old one is kept.
    """
    state, optimizer = saved.state, run.optimizer
    order = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {
        i: {k: shard_like(v, order[i]) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        for i, values in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**state["optimizer"], "state": sharded})
    if run.accelerator.scaler and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    if run.average and state["average"]:
        run.average.optimization_step = state["average"]["step"]
        run.average.shadow_params = [
            shard_like(t.to(p.device), p) for t, p in zip(state["average"]["tensors"], run.parameters, strict=True)
        ]
    run.history = History.from_values(state["history"])
    run.history.keep_own(run.is_main)
    run.position = saved.position

    scheduler, step, lr_before = run.scheduler, run.position.step, optimizer.param_groups[0]["lr"]
    scheduler.last_epoch = step
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        decay = run.config.weight_decay if group["params"][0].ndim > 1 else 0.0
        group.update(lr=base * factor(step), initial_lr=base, weight_decay=decay)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    if state["total_steps"] != run.total_steps:
        message = (
            f"The run is now {run.total_steps} steps long, was {state['total_steps']}: its schedule was rebuilt, "
            f"the learning rate goes from {lr_before:.3g} to {scheduler.get_last_lr()[0]:.3g}"
        )
        run.report(Notice(message=message, level="warning"))
    run.report(Notice(message=f"Resumed {saved.folder.name}: {step} of {run.total_steps} optimizer steps are done"))


# What a run writes


def save_checkpoint(run: Run, name: str) -> None:
    """Copy the whole state and write it beside the training that goes on. Raises JobError for an adapter with NaN."""
    wait_for_writer(run)  # or the copy that it writes and the next one are in memory together
    state = state_of(run)
    if not run.is_main:
        return
    folder, position, config = run.config.output_dir / "checkpoints" / name, run.position, run.config
    if any(saved.step == position.step for saved in positions(config.output_dir).values()):
        return  # resumed and stopped before the next step: it is saved already
    best, write_adapter = run.history.best, adapter_writer(run, state["adapter"])

    def write() -> list[Event]:
        write_checkpoint(folder, state, position, write_adapter)
        prune(config.output_dir, config.keep_checkpoints, best.step if best else None)
        return [Saved(what="checkpoint", path=str(folder))]

    run.writer.start("checkpoint", write)


def save_best(run: Run) -> None:
    """Write `best/` beside the training that goes on: the adapter, or its running average where that was better."""
    best = run.history.best
    if best is not None:
        with averaged(run) if best.is_average else nullcontext():
            save_adapter(run, "best", best.note)


def save_mark(run: Run, mark: Mark) -> None:
    """Write `marks/epoch_NNNN/` beside the training that goes on: the adapter alone."""
    below = f"{mark.below:.1%} below the first one" if mark.below > 0 else "not below the first one"
    note = f"smoothed training loss {mark.loss:.4f}, {below}"
    save_adapter(run, f"{MARKS}/epoch_{mark.epoch:04d}", note)


def save_results(run: Run) -> Path:
    """Write `final/`, and `ema/` where a running average is kept, and wait for all that is being written.

    Raises OSError and JobError where something of it could not be written.
    """
    save_adapter(run, "final")
    if run.average is not None:
        with averaged(run):
            save_adapter(run, "ema")
    run.writer.finish()
    run.processes.wait()
    return run.config.output_dir / "final"


def save_adapter(run: Run, name: str, note: str = "") -> None:
    """Copy the adapter as it is now and write it into a folder of the run beside the training that goes on."""
    wait_for_writer(run)
    tensors, folder = adapter_snapshot(run), run.config.output_dir / name
    if not run.is_main:
        return
    write_adapter = adapter_writer(run, tensors)

    def write() -> list[Event]:
        write_folder(folder, write_adapter)
        return [Saved(what=name, path=str(folder), note=note)]

    run.writer.start(name, write)


def wait_for_writer(run: Run) -> None:
    """Until the save before is on the disk. All wait with the first: a GPU's collective would not wait so long."""
    run.writer.wait()
    run.processes.wait()


def adapter_writer(run: Run, tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    """What writes these tensors into a folder as other programs read them; its model card tells of the run as it is."""
    tags = {str(song.metadata.get("custom_tag") or "") for song in (*run.songs, *run.held_out)}
    card = Card(
        name=run.config.run_name or run.config.output_dir.name,
        base_model=run.checkpoint.folder.name,
        base_identity=run.checkpoint.identity(),
        tag=tags.pop() if len(tags) == 1 else "",
        songs=len(run.songs),
        audio_seconds=round(sum(song.frames for song in run.songs) / run.frames_per_second, 1),
        steps=run.position.step,
        epochs=run.position.epoch,
        hints_ratio=run.config.hints_ratio,
    )
    if isinstance(run.config, TrainLmConfig):
        return lambda folder: save_language_adapter(run.model, folder, tensors, card)
    return lambda folder: save_final(run.model, folder, run.config, tensors, card)


def cannot_save(run: Run, error: OSError) -> JobError:
    """The error for a file that cannot be written: what is safe, and how to go on."""
    complete = list(positions(run.config.output_dir).items())
    is_full = error.errno in NO_ROOM
    problem = "the disk is full" if is_full else f"cannot be written ({error.strerror or error})"
    fix = "Free some space" if is_full else "Make it writable"
    if complete:
        folder, position = complete[-1]
        safe = f"The last good state is {folder} (optimizer step {position.step})."
        fix = f"{fix}, then go on: {resume_command(run.config)}"
    else:
        safe, fix = "Nothing had been saved before.", f"{fix}, then start again."
    return JobError(f"--output-dir {run.config.output_dir}: {problem}. {safe}", fix)
