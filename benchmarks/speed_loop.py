"""The real loop against the bare model, lever by lever, and whole epochs against the usual way: in turns in one run."""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.measure import Result, Setting, Times, timed
from benchmarks.speed_model import (
    PADDED_CONDITION,
    clip_seconds,
    inputs,
    joined_seconds,
    parameters,
    sizes,
    train_config,
    write_checkpoint,
    write_songs,
)
from benchmarks.usual_way import SONGS, UsualTrainer
from sidestep.acestep.attention import use_attention
from sidestep.data.batches import Song
from sidestep.events import EpochDone, Event, StepDone
from sidestep.tasks.train.loop import run_loop
from sidestep.tasks.train.run import Run
from sidestep.tasks.train.setup import open_accelerator, set_up

CONDITION = 100


class Clock:
    """A report that calls back at steps and epochs.

    Its time stands still in there, so that other things can be measured in between.
    """

    def __init__(self, setting: Setting) -> None:
        self._now = setting.now
        self.on_step: Callable[[], None] = lambda: None
        self.on_epoch: Callable[[], None] = lambda: None
        self._elsewhere = 0.0
        self._frozen: float | None = None

    def now(self) -> float:
        return (self._now() if self._frozen is None else self._frozen) - self._elsewhere

    def __call__(self, event: Event) -> None:
        self._frozen = self._now()
        if isinstance(event, StepDone):
            self.on_step()
        if isinstance(event, EpochDone):
            self.on_epoch()
        self._elsewhere += self._now() - self._frozen
        self._frozen = None


def make_run(
    setting: Setting,
    folder: Path,
    lengths: list[float],
    clock: Clock,
    lyrics: int = 0,
    **changes,
) -> Run:
    """A run that is ready for its first step, on songs of these lengths, with so many more condition tokens."""
    if not (folder / "checkpoints").exists():
        write_checkpoint(folder / "checkpoints", setting)
    write_songs(folder / "tensors", lengths, sizes(setting)["hidden_size"], lyrics)
    config = train_config(folder, device=str(setting.device), log_every=1, save_best=False, **changes)
    return set_up(config, clock, *open_accelerator(config, clock))


def with_tokens(song: Song, tokens: int) -> Song:
    """The song with conditions of so many tokens."""
    record = song.read()
    longer = replace(record, encoder_hidden_states=record.encoder_hidden_states[:1].repeat(tokens, 1))
    return replace(song, read=lambda: longer)


def levers(setting: Setting) -> Result:
    """One optimizer step of four 60 s windows: the bare model, our loop, and the loop with one lever taken away."""
    clock = Clock(setting)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        turns = setting.rounds + 1
        run = make_run(setting, Path(name), [60.0] * 4, clock, gradient_accumulation=4, epochs=100_000)
        decoder, songs = run.model.get_base_model(), list(run.songs)
        trimmed, padded = ([with_tokens(song, n) for song in songs] for n in (CONDITION, PADDED_CONDITION))
        run.songs[:] = trimmed
        feed = inputs(setting, sizes(setting)["hidden_size"], 60.0, CONDITION)
        target = torch.randn_like(feed["hidden_states"])

        def bare() -> None:
            for _ in range(4):
                F.mse_loss(run.model(**feed)[0], target).backward()
            run.model.zero_grad(set_to_none=True)

        def pad() -> None:
            run.songs[:] = padded

        def trim() -> None:
            run.songs[:] = trimmed

        change: dict[str, tuple[Callable, Callable]] = {
            "our loop": (lambda: None, lambda: None),
            "with the dense mask": (
                partial(use_attention, run.model, "sdpa"),
                partial(use_attention, run.model, "auto"),
            ),
            f"with conditions padded to {PADDED_CONDITION}": (pad, trim),
            "with every layer recomputed": (
                decoder.enable_gradient_checkpointing,
                decoder.disable_gradient_checkpointing,
            ),
        }
        order = list(change)
        seconds: dict[str, list[float]] = {"bare": []} | {name: [] for name in order}
        state = {"step": 0, "started": clock.now()}

        def on_step() -> None:
            current = order[state["step"] % len(order)]
            seconds[current].append(clock.now() - state["started"])
            change[current][1]()
            state["step"] += 1
            if state["step"] % len(order) == 0:
                seconds["bare"].append(timed(bare, setting))
            if state["step"] == turns * len(order):
                run.total_steps = run.position.step
            change[order[state["step"] % len(order)]][0]()
            state["started"] = clock.now()

        clock.on_step = on_step
        run_loop(run)
    times = {name: Times(tuple(values[1:turns])) for name, values in seconds.items()}
    rows = [
        {
            "step": name,
            "ms": 1000 * t.median,
            "over bare": t.over(times["bare"]),
            "over our loop": t.over(times["our loop"]),
        }
        for name, t in times.items()
    ]
    note = (
        f"{parameters(run.model)}, LoRA rank 16, four windows of 60 s, {CONDITION} condition tokens; "
        "the loop includes optimizer, clipping, logging every step"
    )
    return Result(
        "levers",
        "What each lever gives: one optimizer step at 60 s windows",
        note,
        rows,
        {"our loop over bare": times["our loop"].over(times["bare"])},
    )


@dataclass
class EpochTurns:
    """Seconds of whole epochs in turns: ours first, then each baseline's. inside, edges: of our optimizer steps."""

    model: str
    ways: dict[str, Times]
    inside: list[float]
    edges: list[float]

    def rows(self, what: dict[str, str]) -> list[dict]:
        """A row for each baseline and one for ours."""
        return [
            {**what, "way": way, "seconds": times.median, "usual over ours": times.over(self.ways["ours"])}
            for way, times in reversed(self.ways.items())
        ]


def epochs_in_turns(
    setting: Setting,
    lengths: list[float],
    rounds: int,
    baselines: dict[str, dict],
    lyrics: int = 0,
    **changes,
) -> EpochTurns:
    """Epochs over songs of these lengths, after one of each that does not count.

    baselines: the arguments of `UsualTrainer` by name; lyrics: condition tokens that each song has more; changes:
    settings of the run, for all ways alike.
    """
    seconds: dict[str, list[float]] = {"ours": []} | {name: [] for name in baselines}
    clock = Clock(setting)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        changes = {"epochs": rounds + 1, "gradient_accumulation": SONGS} | changes
        run = make_run(setting, folder, lengths, clock, lyrics, **changes)
        others = {
            name: UsualTrainer(setting, folder / "tensors", folder / f"padded {number}", **arguments, **changes)
            for number, (name, arguments) in enumerate(baselines.items())
        }
        state = {"started": 0.0, "step": 0.0, "first": True}
        inside: list[float] = []
        edges: list[float] = []

        def on_step() -> None:
            now = clock.now()
            (edges if state["first"] else inside).append(now - state["step"])
            state["step"], state["first"] = now, False

        def on_epoch() -> None:
            seconds["ours"].append(clock.now() - state["started"])
            for name, other in others.items():
                seconds[name].append(timed(other.epoch, setting))
            state["started"], state["first"] = clock.now(), True

        clock.on_step, clock.on_epoch = on_step, on_epoch
        state["started"] = state["step"] = clock.now()
        run_loop(run)
        ways = {name: Times(tuple(values[1:])) for name, values in seconds.items()}
        return EpochTurns(parameters(run.model), ways, inside, edges[1:])


def epochs(setting: Setting, which: str) -> Result:
    """Whole epochs, ours and the usual way's in turns, over the 28 clips or the joined songs."""
    lengths = clip_seconds() if which == "clips" else joined_seconds()
    rounds = max(2, setting.rounds // (2 if which == "clips" else 4)) if not setting.quick else 1
    turns = epochs_in_turns(setting, lengths, rounds, {"usual": {}})
    what = "the 28 real clips" if which == "clips" else "songs of 60–240 s joined from them"
    note = (
        f"{turns.model}, {len(lengths)} songs, {sum(lengths) / 60:.1f} minutes; both step after four songs; "
        f"{rounds} epochs of each, after one that does not count. "
        f"Usual: diffusers' layers and peft's LoRA, conditions padded to {PADDED_CONDITION}, dense masks, batches of 2 "
        "padded with zeros, worker processes, `.item()` and NaN scans in every micro-step."
    )
    facts = {f"epoch over {what}, usual over ours": turns.ways["usual"].over(turns.ways["ours"])}
    if which == "clips" and turns.edges:
        edge = statistics.median(turns.edges) / statistics.median(turns.inside)
        facts["first step of an epoch over a step inside it"] = edge
    return Result(f"epoch_{which}", f"A whole epoch over {what}", note, turns.rows({"epoch over": what}), facts)


def single_songs(setting: Setting) -> Result:
    """Epochs over 14 of the clips one by one, the usual way without batches, with padded conditions and without."""
    lengths = clip_seconds()[::2]
    rounds = max(2, setting.rounds // 3) if not setting.quick else 1
    padded, as_long = "usual", "usual, conditions not padded"
    baselines = {padded: {"batch": 1}, as_long: {"batch": 1, "condition": 0}}
    rows, facts, model = [], {}, ""
    for recompute, words in ((False, "kept"), (True, "recomputed")):
        changes = {"rank": 64, "alpha": 128, "gradient_checkpointing": recompute}
        turns = epochs_in_turns(setting, lengths, rounds, baselines, lyrics=100, **changes)
        rows += turns.rows({"layers": words})
        print(*rows, sep="\n", flush=True)
        model = turns.model
        for way in baselines:
            name = f"epoch over 14 clips at batch 1, layers {words}, {way} over ours"
            facts[name] = turns.ways[way].over(turns.ways["ours"])
    note = (
        f"{model}, {sizes(setting)['num_hidden_layers']} layers, LoRA rank 64, {len(lengths)} songs, "
        f"{sum(lengths) / 60:.1f} minutes, conditions of 185 to 215 tokens; all step after four songs; "
        f"{rounds} epochs of each, after one that does not count. Usual: as above, at batch 1, so that no song is "
        f"padded; conditions padded to {PADDED_CONDITION}, or as long as ours."
    )
    return Result("epoch_single", "A whole epoch over 14 clips, one song at a time", note, rows, facts)


def clips(setting: Setting) -> Result:
    """Epochs over the 28 clips."""
    return epochs(setting, "clips")


def joined(setting: Setting) -> Result:
    """Epochs over the joined songs."""
    return epochs(setting, "joined")
