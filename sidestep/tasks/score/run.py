"""Judging from beginning to end: what is measured of which adapter, kept on the disk, and put together.

Everything measured is kept below `measured/`, and music below `clips/`, under a digest of all that it depends on: the
adapter's tensors, its strength, the base, the songs. So a second call measures nothing, and one that was stopped goes
on.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from sidestep.acestep.conditions import Prompt, encode_texts
from sidestep.acestep.device import threads_for
from sidestep.adapters.adapter import with_strength
from sidestep.adapters.attach import adapter_scale
from sidestep.adapters.average import average
from sidestep.adapters.read import read_adapter
from sidestep.adapters.write import Card, save_folder
from sidestep.data.batches import Song, fingerprint
from sidestep.errors import JobError, UserError
from sidestep.events import Finished, Notice, Progress, Report, Saved, Table
from sidestep.files import one_writer, write_text
from sidestep.flow_matching.sampler import sample_euler, sampling_timesteps
from sidestep.settings.config import CompareConfig, ScoreConfig
from sidestep.settings.path_checks import complete_checkpoints
from sidestep.tasks.sample import Sampler
from sidestep.tasks.score.captions import CAPTIONS
from sidestep.tasks.score.clips import BASE, Place, listen, make_all, requests_of, songs_of
from sidestep.tasks.score.judge import (
    AVERAGE,
    Candidate,
    Judge,
    adapters_of,
    candidates_of,
    prepare,
    training_of,
    training_of_comparison,
)
from sidestep.tasks.score.listening import NAME, copies_of, page
from sidestep.tasks.score.metrics import Figure, drift, gain, relative_change
from sidestep.tasks.score.recommend import Row, Verdict, recommend
from sidestep.tasks.train.checkpoints import COMPLETE_FILE, STATE_FILE, positions, write_folder
from sidestep.tasks.train.objective import GRID_TIMESTEPS, Objective
from sidestep.tasks.train.report import tell_what_was_judged
from sidestep.words import count, side_step

FOLDER = "score"
FEWEST_SONGS = 4  # with fewer, losses are drawn anew by windows and timesteps instead of by songs
OtherMusic = Callable[[Judge], list[tuple[Prompt, Tensor]]]  # prompts and their conditions [1, L, C]


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


def score(config: ScoreConfig, report: Report) -> Verdict:
    """Judge the checkpoints of a run and recommend one. Raises UserError and JobError."""
    training = training_of(config, config.run_folder)
    if config.average_from is not None:
        write_average(config.run_folder, config.average_from, report)
    candidates = candidates_of(config.run_folder)
    report(Notice(message=f"{count(len(candidates), 'checkpoint')} of {config.run_folder}"))
    with one_writer(config.run_folder / FOLDER):
        judge = prepare(config, training, config.run_folder / FOLDER, report)
        title = training.run_name or config.run_folder.resolve().name
        with threads_for(judge.checkpoint.config["hidden_size"]):
            verdict = judge_all(judge, candidates, title)
    link_page(config.run_folder, report)
    taken = next(candidate for candidate in candidates if candidate.name == verdict.row.name)
    path, strength = taken.path, verdict.row.strength
    if config.keep:
        path, strength = config.run_folder / "best", 1.0
        keep(taken, verdict.row.strength, path, report)
    tell_verdict(judge, verdict, path, strength)
    return verdict


def link_page(run: Path, report: Report) -> None:
    """Link the listening page in the report of the run, and tell there what its average of checkpoints did."""
    try:
        tell_what_was_judged(run)
    except OSError as error:
        message = f"{run}: its report was not linked with the listening page ({error.strerror or error})."
        report(Notice(message=message, level="warning"))


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
        save_folder(with_strength(taken.adapter, strength), new, Card.of(taken.adapter))

    with one_writer(best.parent):
        try:
            write_folder(best, fill)
        except OSError as error:
            raise JobError(
                f"{best}: cannot be written ({error.strerror or error}); what was there before stays.",
                "Free some space on that disk, then repeat the command: nothing is measured twice.",
            ) from None
    report(Saved(what="best", path=str(best)))


def write_average(run: Path, epoch: int, report: Report) -> None:
    """Write `average/`, one adapter of the checkpoints from an epoch on.

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

    def fill(new: Path) -> None:
        save_folder(made.adapter, new, Card.of(made.adapter))

    with one_writer(run):
        try:
            write_folder(run / AVERAGE, fill)
        except OSError as error:
            raise JobError(
                f"{run / AVERAGE}: cannot be written ({error.strerror or error}).", "Free some space on that disk."
            ) from None
    report(Saved(what="average", path=str(run / AVERAGE)))


def average_told(judge: Judge, candidates: Sequence[Candidate], measured: dict[Place, Measured]) -> str:
    """What `average/` came to, by the loss of the checkpoints that it was made of; empty where one of them is gone."""
    own = {name: c for c in candidates for name in (c.name, *c.also)}
    names = own[AVERAGE].adapter.metadata.get("averaged") if AVERAGE in own else None
    averaged = [str(name) for name in names] if isinstance(names, list) else []
    if not averaged or not own.keys() >= set(averaged):
        return ""
    at = judge.config.strength[0]
    loss = {name: fmean(measured[own[name].name, at].losses) for name in (AVERAGE, *averaged)}
    first, last, best = averaged[0], averaged[-1], min(averaged, key=lambda name: loss[name])
    lowest = f"; the lowest of them is {best} ({loss[best]:.4f})" if best != last else ""
    return (
        f"average/ is made of {first} to {last}. Loss on {judge.what}: average {loss[AVERAGE]:.4f}, "
        f"{loss[AVERAGE] / loss[last] - 1:+.2%} against {last} ({loss[last]:.4f}){lowest}"
    )


def tell_verdict(judge: Judge, verdict: Verdict, adapter: Path, strength: float) -> None:
    """The recommendation in a line, and the command that makes music with it."""
    base = ("--checkpoint-dir", str(judge.training.checkpoint_dir), "--model-variant", judge.training.model_variant)
    at = ("--strength", f"{strength:g}")
    command = side_step("sample", *base, "--adapter", str(adapter), *at, "--prompt", "…")
    line = f"Recommended: {verdict.row.title}. {verdict.reason.capitalize()}."
    judge.report(Finished(message=line, next_commands=(command,)))


def compare(config: CompareConfig, report: Report) -> Verdict:
    """Judge adapters of different runs or programs and recommend one. Raises UserError and JobError."""
    candidates = adapters_of(config)
    training = training_of_comparison(config)
    for candidate in candidates:
        for note in candidate.adapter.notes:
            report(Notice(message=note, level="warning"))
    with one_writer(config.output):
        judge = prepare(config, training, config.output, report)
        with threads_for(judge.checkpoint.config["hidden_size"]):
            verdict = judge_all(judge, candidates, " and ".join(candidate.name for candidate in candidates))
    taken = next(candidate for candidate in candidates if candidate.name == verdict.row.name)
    tell_verdict(judge, verdict, taken.path, verdict.row.strength)
    return verdict


def other_music(judge: Judge) -> list[tuple[Prompt, Tensor]]:
    """The built-in captions with their conditions."""
    texts = [prompt.text_for(judge.checkpoint.variant.is_stems) for prompt in CAPTIONS]
    conditions = encode_texts(judge.checkpoint, texts, judge.device, judge.dtype)
    return [(prompt, c.states) for prompt, c in zip(CAPTIONS, conditions, strict=True)]


def judge_all(judge: Judge, candidates: Sequence[Candidate], title: str, others: OtherMusic = other_music) -> Verdict:
    """Measure what is not measured yet, the cheap figures first, and report tables, verdict and listening page.

    title: of that page.
    """
    base, measured = measure_all(judge, candidates, others)
    if average_says := average_told(judge, candidates, measured):
        judge.report(Notice(message=average_says))
    heard, copies, requests = {}, [], []
    figures = figures_of(base, {(BASE, 0.0): base, **measured})
    base_row, *rows = (Row(name, strength, *figures[name, strength]) for name, strength in figures)
    if judge.config.clips:
        judge.report(table([base_row, *rows], judge.what))
        songs = songs_of(judge)
        requests = requests_of(judge, songs.clip_frames)
        heard, limit = listen(songs, make_all(judge, candidates, tuple(dict.fromkeys(judge.config.strength)), requests))

        def with_music(row: Row) -> Row:
            found = heard[row.name, row.strength]
            return replace(row, style=found.style, copying=found.copying)

        base_row, rows = with_music(base_row), [with_music(row) for row in rows]
        copies = copies_of(judge, songs, rows, heard, limit)
        for name in dict.fromkeys(copy.row.title for copy in copies):
            own = [copy for copy in copies if copy.row.title == name]
            message = f"{name}: {count(len(own), 'clip')} may be copied, the nearest by prompt {own[0].where}"
            judge.report(Notice(message=message, level="warning"))
    judge.report(table([base_row, *rows], judge.what))
    verdict = recommend(rows, base_row.copying)
    for doubt in verdict.doubts:
        judge.report(Notice(message=f"{verdict.row.title}: {doubt}.", level="warning"))
    found = results(base_row, rows, verdict, judge.what) | {"average": average_says or None}
    write_text(judge.folder / "results.json", json.dumps(found, indent=1) + "\n")
    judge.report(Saved(what="figures", path=str(judge.folder / "results.json")))
    clips = {place: found.clips for place, found in heard.items()}
    text = page(title, judge.what, judge.folder, base_row, rows, verdict, requests, clips, copies)
    write_text(judge.folder / NAME, text)
    judge.report(Saved(what="listening page", path=str(judge.folder / NAME)))
    return verdict


# What is measured without making music


def measure_all(
    judge: Judge, candidates: Sequence[Candidate], others: OtherMusic = other_music
) -> tuple[Measured, dict[Place, Measured]]:
    """(the base, each candidate at each strength), from the disk where it was measured before."""
    strengths = tuple(dict.fromkeys(judge.config.strength))
    songs, training = fingerprint(judge.judged), judge.training
    grid_of = [songs, training.chunk_duration, training.hints_ratio == 1, training.batch_size]
    captions = [asdict(prompt) for prompt in CAPTIONS] + ["for stems"] * judge.checkpoint.variant.is_stems

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
        music = others(judge)
        sampler, objective, _ = judge.open(None)
        probes = [probe(sampler, sampler.noise(prompt), states) for prompt, states in music]
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


def figures_of(base: Measured, measured: dict[Place, Measured]) -> dict[Place, tuple[Figure, Figure]]:
    """(gain, drift) of each candidate at each strength."""
    reference = by_unit(base)
    return {place: (gain(by_unit(m), reference), drift(m.changes)) for place, m in measured.items()}


def as_percent(figure: Figure) -> str:
    """`2.1 % (1.0 to 3.4)`."""
    low, high = (100 * end for end in figure.interval)
    return f"{100 * figure.value:.1f} % ({low:.1f} to {high:.1f})"


def as_distance(figure: Figure | None) -> str:
    """`0.21 (0.08 to 0.34)`."""
    return "{:.2f} ({:.2f} to {:.2f})".format(figure.value, *figure.interval) if figure else "–"


def table(rows: Sequence[Row], what: str) -> Table:
    """The figures as they are shown in the terminal; those of music where it was made."""
    has_music = any(row.copying for row in rows)
    return Table(
        title=f"Gain on {what}; drift on {len(CAPTIONS)} captions of other music; 95 % intervals",
        columns=("checkpoint", "strength", "gain", "drift", *(("style", "copying") if has_music else ())),
        rows=tuple(
            (
                *(row.name, f"{row.strength:g}", as_percent(row.gain), as_percent(row.drift)),
                *((as_distance(row.style), as_percent(row.copying)) if row.copying else ()),
            )
            for row in rows
        ),
    )


def results(base: Row, rows: Sequence[Row], verdict: Verdict, what: str) -> dict[str, Any]:
    """Everything that was found, as results.json has it."""

    def plain(row: Row) -> dict[str, Any]:
        figures = {name: getattr(row, name) for name in ("gain", "drift", "style", "copying")}
        return {"name": row.name, "strength": row.strength} | {
            name: {"value": figure.value, "interval": figure.interval} for name, figure in figures.items() if figure
        }

    return {
        "gain_on": what,
        "recommended": {
            "name": verdict.row.name,
            "strength": verdict.row.strength,
            "reason": verdict.reason,
            "doubts": verdict.doubts,
        },
        "base": plain(base),
        "rows": [plain(row) for row in rows],
    }
