"""Judging from beginning to end: what is measured of which adapter, kept on the disk, and put together.

Everything measured is kept below `measured/`, under a digest of all that it depends on: the adapter's tensors, its
strength, the base, the songs. So a second call measures nothing, and one that was stopped goes on.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from sidestep.acestep.blocks import BlockSwap
from sidestep.acestep.checkpoint import Checkpoint, open_checkpoint
from sidestep.acestep.conditions import encode_texts
from sidestep.adapters.adapter import Adapter, with_strength
from sidestep.adapters.attach import adapter_scale, load_adapter
from sidestep.adapters.average import average
from sidestep.adapters.read import digest_of, read_adapter
from sidestep.adapters.write import Card, save_folder
from sidestep.data.batches import Song, fingerprint
from sidestep.errors import JobError, UserError
from sidestep.events import Finished, Notice, Progress, Report, Saved, Table
from sidestep.files import one_writer, write_text
from sidestep.flow_matching.sampler import sample_euler, sampling_timesteps
from sidestep.settings.config import ScoreConfig, TrainConfig, check_streaming
from sidestep.settings.option import options_of, resolve
from sidestep.settings.path_checks import read_run
from sidestep.tasks.sample import Sampler, open_sampler, sampling_for
from sidestep.tasks.score.captions import CAPTIONS
from sidestep.tasks.score.metrics import Figure, drift, gain, relative_change
from sidestep.tasks.score.recommend import Row, Verdict, recommend
from sidestep.tasks.train.checkpoints import (
    COMPLETE_FILE,
    MARKS,
    STATE_FILE,
    complete_checkpoints,
    positions,
    write_folder,
)
from sidestep.tasks.train.objective import GRID_TIMESTEPS, Objective, training_law
from sidestep.tasks.train.processes import Processes
from sidestep.tasks.train.setup import load_decoder, open_accelerator
from sidestep.tasks.train.songs import load_songs, split, with_windows
from sidestep.words import count, side_step

FOLDER = "score"
AVERAGE = "average"
VERSION = 1  # of what is measured: raised whenever it changes
FEWEST_SONGS = 4  # with fewer, losses are drawn anew by windows and timesteps instead of by songs
BASE = "base"


@dataclass(frozen=True)
class Candidate:
    """An adapter that is judged. also: other names of the same tensors. digest: of its tensors."""

    name: str
    path: Path
    adapter: Adapter
    digest: str
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """Points x [N, T, D] at t [N] that the base passes as it makes a caption's music, and its velocities there."""

    conditions: Tensor
    x: Tensor
    t: Tensor
    base: Tensor


@dataclass(frozen=True)
class Measured:
    """losses: of each cell of the grid, beside its song's name. changes: of the velocity, for each caption."""

    songs: list[str]
    losses: list[float]
    changes: list[float]


@dataclass
class Judge:
    """What all adapters of a comparison are judged on. judged: the songs whose loss is measured; what: their name."""

    config: ScoreConfig
    training: TrainConfig
    report: Report
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    trained: list[Song]
    judged: list[Song]
    what: str
    folder: Path

    def key(self, *parts: Any) -> str:
        """The name under which something is kept that depends on these parts and on the base."""
        base = (VERSION, self.checkpoint.identity(), str(self.dtype), self.config.base_precision)
        return hashlib.blake2b(json.dumps([*base, *parts], sort_keys=True).encode(), digest_size=12).hexdigest()

    def open(self, adapter: Adapter | None) -> tuple[Sampler, Objective, PeftModel | None]:
        """The model, with an adapter or without, as what has velocities and as what the loss is measured with.

        Loaded anew for each adapter: the weights are in the system's cache, and no layer of another one stays.
        """
        decoder, mask = load_decoder(self.training, self.checkpoint, self.device, self.dtype, lambda _event: None)
        model = load_adapter(decoder, adapter) if adapter else None
        if self.training.swap_blocks:
            BlockSwap(decoder, self.training.swap_blocks, self.device)
        sampling = sampling_for(self.checkpoint.variant)
        sampler = open_sampler(self.checkpoint, decoder, self.device, self.dtype, sampling, offload=True)
        law = training_law(self.training, self.checkpoint.variant)
        return sampler, Objective(self.training, law, sampler.silence, sampler.null_condition, mask), model


def score(config: ScoreConfig, report: Report) -> Verdict:
    """Judge the checkpoints of a run and recommend one. Raises UserError and JobError."""
    training = training_of(config, config.run_folder)
    averaged = write_average(config.run_folder, config.average_from, report) if config.average_from is not None else ()
    candidates = candidates_of(config.run_folder)
    report(Notice(message=f"{count(len(candidates), 'checkpoint')} of {config.run_folder}"))
    with one_writer(config.run_folder / FOLDER):
        judge = prepare(config, training, config.run_folder / FOLDER, report)
        verdict = judge_all(judge, candidates, averaged)
    taken = next(candidate for candidate in candidates if candidate.name == verdict.row.name)
    path, strength = taken.path, verdict.row.strength
    if config.keep:
        path, strength = config.run_folder / "best", 1.0
        keep(taken, verdict.row.strength, path, report)
    line = f"Recommended: {verdict.row.title}. {verdict.reason.capitalize()}."
    report(Finished(message=line, next_commands=(sample_command(judge, path, strength),)))
    return verdict


def keep(taken: Candidate, strength: float, best: Path, report: Report) -> None:
    """Put an adapter at a strength into `best/`, whole or not at all; the strength is folded in.

    Raises UserError while the run is being trained and for a kind of adapter that has no other strength, JobError when
    the disk refuses.
    """
    if strength == 1 and best.name in (taken.name, *taken.also):
        report(Notice(message=f"{best} holds it already"))
        return

    def fill(new: Path) -> None:
        if strength == 1:
            for path in taken.path.iterdir():
                if path.is_file() and path.name not in (STATE_FILE, COMPLETE_FILE):
                    shutil.copyfile(path, new / path.name)
            return
        name, base_model, tag = (str(taken.adapter.metadata.get(key, "")) for key in ("name", "base_model", "tag"))
        save_folder(with_strength(taken.adapter, strength), new, Card(name=name, base_model=base_model, tag=tag))

    with one_writer(best.parent):
        try:
            write_folder(best, fill)
        except OSError as error:
            raise JobError(
                f"{best}: cannot be written ({error.strerror or error}); what was there before stays.",
                "Free some space on that disk, then repeat the command: nothing is measured twice.",
            ) from None
    report(Saved(what="best", path=str(best)))


def write_average(run: Path, epoch: int, report: Report) -> tuple[str, ...]:
    """Write `average/`, one adapter of the checkpoints from an epoch on; the names of these.

    Raises UserError where there are fewer than two, where they differ in kind or rank, and while the run is trained;
    JobError when the disk refuses.
    """
    folders = [folder for folder, position in positions(run).items() if position.epoch >= epoch]
    if len(folders) < 2:
        there = ", ".join(folder.name for folder in complete_checkpoints(run)) or "none"
        raise UserError(
            f"--average-from {epoch}: an average takes two checkpoints, and {run} has {len(folders)} from there on.",
            f"There are: {there}. Name an earlier epoch, or train with a smaller --save-every.",
        )
    names = tuple(folder.name for folder in folders)
    report(Notice(message=f"Averaging {names[0]} to {names[-1]}: {count(len(names), 'checkpoint')}"))
    made = average([read_adapter(folder) for folder in folders], names)
    how = {"lora": "the products B·A", "lokr": "the Kronecker products"}.get(made.adapter.kind, "the factors")
    rest = f"{made.distance:.2%} of their mean change is lost"
    if made.adapter.kind in ("lora", "lokr"):
        rest += f" to the rank ({made.by_factors:.2%}, had the factors been averaged)"
    report(Notice(message=f"average/ is the mean of {how}; {rest}"))
    name, base_model, tag = (str(made.adapter.metadata.get(key, "")) for key in ("name", "base_model", "tag"))
    card = Card(name=name, base_model=base_model, tag=tag)

    def fill(new: Path) -> None:
        save_folder(made.adapter, new, card)

    with one_writer(run):
        try:
            write_folder(run / AVERAGE, fill)
        except OSError as error:
            raise JobError(
                f"{run / AVERAGE}: cannot be written ({error.strerror or error}).", "Free some space on that disk."
            ) from None
    report(Saved(what="average", path=str(run / AVERAGE)))
    return names


def sample_command(judge: Judge, adapter: Path, strength: float) -> str:
    """The command that makes music with an adapter."""
    base = ("--checkpoint-dir", str(judge.training.checkpoint_dir), "--model-variant", judge.training.model_variant)
    at = ("--strength", f"{strength:g}")
    return side_step("sample", *base, "--adapter", str(adapter), *at, "--prompt", "…")


def candidates_of(run: Path) -> list[Candidate]:
    """The adapters in a run's folder, each once, in the order of their steps. Raises UserError where there is none."""
    known = read_run(run)
    marks = [run / MARKS / name for name in (known.marks if known else ())]
    folders = [*complete_checkpoints(run), *marks, *(run / name for name in ("best", "final", "ema", AVERAGE))]
    found: dict[str, Candidate] = {}
    for folder in folders:
        if folder.is_dir():
            candidate = candidate_of(f"mark {folder.name}" if folder in marks else folder.name, folder)
            first = found.setdefault(candidate.digest, candidate)
            if first is not candidate:
                found[candidate.digest] = replace(first, also=(*first.also, candidate.name))
    if not found:
        raise UserError(
            f"{run}: no checkpoint to judge in it.",
            "Name the --output-dir of a run that has saved something: " + side_step("history", str(run)),
        )
    return list(found.values())


def candidate_of(name: str, path: Path) -> Candidate:
    """An adapter with the digest of its tensors. Raises UserError for what is no adapter."""
    adapter = read_adapter(path)
    tensors = {f"{module}.{name}": t for module, factors in adapter.modules.items() for name, t in factors.items()}
    return Candidate(name, path, adapter, digest_of(dict(sorted(tensors.items())), {}))


def training_of(config: ScoreConfig, run: Path) -> TrainConfig:
    """The settings of a run's training, but for what is typed, and without what only the backward pass needs.

    Raises UserError where there is no run.
    """
    known = read_run(run)
    if known is None:
        raise UserError(f"{run}: no run there (no config.json of one).", "Name the --output-dir of a training.")
    settings = {name: value for name, value in known.settings.items() if name in options_of(TrainConfig)}
    names = ("checkpoint_dir", "model_variant", "dataset_dir")
    typed = {name: getattr(config, name) for name in names if getattr(config, name)}
    shared = ("device", "precision", "attention", "base_precision", "swap_blocks")
    typed |= {name: getattr(config, name) for name in shared}
    lean = {"gradient_checkpointing": False, "offload_activations": False, "compile": False}
    return resolve(TrainConfig, settings, typed | lean)


def prepare(config: ScoreConfig, training: TrainConfig, folder: Path, report: Report) -> Judge:
    """Songs, device and base of a comparison. Raises UserError and JobError."""
    check_streaming(config)
    accelerator, dtype = open_accelerator(training, report)
    checkpoint = open_checkpoint(training.checkpoint_dir, training.model_variant)
    songs = load_songs(training, checkpoint, report)
    trained, held_out = split(songs, training)
    processes = Processes(accelerator)
    trained, held_out = with_windows(
        trained, held_out, training, checkpoint, accelerator.device, dtype, processes, report
    )
    what = f"{count(len(held_out), 'validation song')}"
    if not held_out:
        what = f"the {count(len(trained), 'trained song')}"
        message = "No song was held out (--val-split), so gain is measured on trained songs: copying looks like gain."
        report(Notice(message=message, level="warning"))
    return Judge(
        config=config,
        training=training,
        report=report,
        checkpoint=checkpoint,
        device=accelerator.device,
        dtype=dtype,
        trained=trained,
        judged=held_out or trained,
        what=what,
        folder=folder,
    )


def judge_all(judge: Judge, candidates: Sequence[Candidate], averaged: Sequence[str] = ()) -> Verdict:
    """Measure what is not measured yet, the cheap figures first, and report tables and verdict.

    averaged: names of the checkpoints that `average/` was made of, which is compared with them.
    """
    base, measured = measure_all(judge, candidates)
    if averaged:
        own = {name: c.name for c in candidates for name in (c.name, *c.also)}
        at = judge.config.strength[0]
        loss = {name: fmean(measured[own[name], at].losses) for name in (AVERAGE, *averaged)}
        last, best = averaged[-1], min(averaged, key=lambda name: loss[name])
        message = f"Loss on {judge.what}: average {loss[AVERAGE]:.4f}, {loss[AVERAGE] / loss[last] - 1:+.2%} against "
        message += f"{last} ({loss[last]:.4f})" + (
            f"; the lowest of them is {best} ({loss[best]:.4f})" * (best != last)
        )
        judge.report(Notice(message=message))
    figures = figures_of(base, measured)
    rows = [Row(name, strength, *figures[name, strength]) for name, strength in measured]
    judge.report(table(rows, judge.what))
    verdict = recommend(rows)
    for doubt in verdict.doubts:
        judge.report(Notice(message=f"{verdict.row.title}: {doubt}.", level="warning"))
    write_text(judge.folder / "results.json", json.dumps(results(rows, verdict, judge.what), indent=1) + "\n")
    judge.report(Saved(what="figures", path=str(judge.folder / "results.json")))
    return verdict


# What is measured without making music


def measure_all(judge: Judge, candidates: Sequence[Candidate]) -> tuple[Measured, dict[tuple[str, float], Measured]]:
    """(the base, each candidate at each strength), from the disk where it was measured before."""
    strengths = tuple(dict.fromkeys(judge.config.strength))
    songs, training = fingerprint(judge.judged), judge.training
    grid_of = [songs, training.chunk_duration, training.hints_ratio == 1, training.batch_size]
    captions = [asdict(prompt) for prompt in CAPTIONS]

    def kept_at(digest: str, strength: float) -> Path:
        return judge.folder / "measured" / f"{judge.key('loss', digest, strength, grid_of, captions)}.json"

    paths = {(c.name, s): kept_at(c.digest, s) for c in candidates for s in strengths}
    paths[BASE, 0.0] = kept_at(BASE, 0.0)
    measured = {place: found for place, path in paths.items() if (found := read_measured(path))}
    missing = [place for place in paths if place not in measured]
    if missing:
        done = len(paths) - len(missing)
        if done:
            judge.report(Notice(message=f"{done} of {len(paths)} were measured before"))
        judge.report(Progress(task="Judging", done=done, total=len(paths), current="captions"))
        texts = [prompt.text for prompt in CAPTIONS]
        conditions = [c.states for c in encode_texts(judge.checkpoint, texts, judge.device, judge.dtype)]
        sampler, objective, _ = judge.open(None)
        probes = [
            probe(sampler, sampler.noise(prompt), states) for prompt, states in zip(CAPTIONS, conditions, strict=True)
        ]
        by_name = {candidate.name: candidate for candidate in candidates}
        for name in dict.fromkeys(name for name, _ in sorted(missing, key=lambda place: place[0] != BASE)):
            model = None
            if name != BASE:
                sampler, objective, model = judge.open(by_name[name].adapter)
            for place in (place for place in missing if place[0] == name):
                judge.report(Progress(task="Judging", done=done, total=len(paths), current=name))
                with adapter_scale(model, place[1]) if model else nullcontext():
                    measured[place] = measure(judge, sampler, objective, probes)
                write_text(paths[place], json.dumps(asdict(measured[place])) + "\n")
                done += 1
        judge.report(Progress(task="Judging", done=done, total=len(paths)))
    base = measured.pop((BASE, 0.0))
    return base, {place: measured[place] for place in paths if place in measured}


@torch.no_grad()
def probe(sampler: Sampler, noise: Tensor, states: Tensor) -> Probe:
    """The points that the base passes from noise [1, T, D] to the music of conditions [1, L, C], without guidance."""
    conditions, timesteps = (
        states.to(sampler.null_condition),
        sampling_timesteps(GRID_TIMESTEPS, sampler.sampling.shift),
    )
    passed: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        passed.append(x)
        return sampler.velocity(x, t, conditions)

    sample_euler(velocity, noise.to(sampler.null_condition), timesteps)
    x, t = torch.cat(passed), timesteps[:-1].to(passed[0])
    return Probe(conditions, x, t, sampler.velocity(x, t, conditions.expand(len(x), -1, -1)))


@torch.no_grad()
def changes(sampler: Sampler, probes: Sequence[Probe]) -> list[float]:
    """For each probe, by how much of its length the velocity differs from the base's."""
    found = []
    for at in probes:
        velocity = sampler.velocity(at.x, at.t, at.conditions.expand(len(at.x), -1, -1))
        found.append(relative_change(velocity, at.base))
    return found


@torch.no_grad()
def losses_of(objective: Objective, model: torch.nn.Module, songs: list[Song]) -> Iterator[tuple[str, float]]:
    """(name of the song, loss) of each cell of the grid that validation uses."""
    for cells in objective.grid(songs):
        name = songs[cells.items[0].song].name
        for loss in objective.grid_loss(model, songs, cells).tolist():
            yield name, loss


def measure(judge: Judge, sampler: Sampler, objective: Objective, probes: Sequence[Probe]) -> Measured:
    """Losses and changes of the model as it is now."""
    cells = list(losses_of(objective, sampler.decoder, judge.judged))
    return Measured([name for name, _ in cells], [loss for _, loss in cells], changes(sampler, probes))


def read_measured(path: Path) -> Measured | None:
    """What was measured before; None where it was not, or its file is damaged."""
    try:
        return Measured(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


# Figures


def by_unit(measured: Measured) -> list[float]:
    """The losses by song, or with few songs by cell."""
    songs = dict.fromkeys(measured.songs)
    if len(songs) < FEWEST_SONGS:
        return measured.losses
    cells = list(zip(measured.songs, measured.losses, strict=True))
    own = [[loss for name, loss in cells if name == song] for song in songs]
    return [sum(losses) / len(losses) for losses in own]


def figures_of(
    base: Measured, measured: dict[tuple[str, float], Measured]
) -> dict[tuple[str, float], tuple[Figure, Figure]]:
    """(gain, drift) of each candidate at each strength."""
    reference = by_unit(base)
    return {place: (gain(by_unit(m), reference), drift(m.changes)) for place, m in measured.items()}


def as_percent(figure: Figure) -> str:
    """`2.1 % (1.0 to 3.4)`."""
    low, high = (100 * end for end in figure.interval)
    return f"{100 * figure.value:.1f} % ({low:.1f} to {high:.1f})"


def table(rows: Sequence[Row], what: str) -> Table:
    """The figures as they are shown in the terminal."""
    return Table(
        title=f"Gain on {what}; drift on {len(CAPTIONS)} captions of other music; 95 % intervals",
        columns=("checkpoint", "strength", "gain", "drift"),
        rows=tuple((row.name, f"{row.strength:g}", as_percent(row.gain), as_percent(row.drift)) for row in rows),
    )


def results(rows: Sequence[Row], verdict: Verdict, what: str) -> dict[str, Any]:
    """Everything that was found, as results.json has it."""

    def plain(figure: Figure) -> dict[str, Any]:
        return {"value": figure.value, "interval": figure.interval}

    return {
        "gain_on": what,
        "recommended": {
            "name": verdict.row.name,
            "strength": verdict.row.strength,
            "reason": verdict.reason,
            "doubts": verdict.doubts,
        },
        "rows": [
            {"name": row.name, "strength": row.strength, "gain": plain(row.gain), "drift": plain(row.drift)}
            for row in rows
        ],
    }
