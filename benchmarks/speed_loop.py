"""The real loop against the bare model, lever by lever, and whole epochs against the usual way: in turns in one run."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
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
from benchmarks.usual_way import UsualTrainer
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


def make_run(setting: Setting, folder: Path, lengths: list[float], clock: Clock, **changes) -> Run:
    """A run that is ready for its first step, on songs of these lengths."""
    if not (folder / "checkpoints").exists():
        write_checkpoint(folder / "checkpoints", setting)
    write_songs(folder / "tensors", lengths, sizes(setting)["hidden_size"])
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


def epochs(setting: Setting, which: str) -> Result:
    """Whole epochs, ours and the usual way's in turns, over the 28 clips or the joined songs."""
    lengths = clip_seconds() if which == "clips" else joined_seconds()
    rounds = max(2, setting.rounds // (2 if which == "clips" else 4)) if not setting.quick else 1
    ours: list[float] = []
    usual: list[float] = []
    clock = Clock(setting)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        run = make_run(setting, folder, lengths, clock, epochs=rounds + 1, gradient_accumulation=4)
        baseline = UsualTrainer(setting, folder / "tensors", folder / "padded")
        state = {"started": 0.0, "step": 0.0, "first": True}
        inside: list[float] = []
        edges: list[float] = []

        def on_step() -> None:
            now = clock.now()
            (edges if state["first"] else inside).append(now - state["step"])
            state["step"], state["first"] = now, False

        def on_epoch() -> None:
            ours.append(clock.now() - state["started"])
            usual.append(timed(baseline.epoch, setting))
            state["started"], state["first"] = clock.now(), True

        clock.on_step, clock.on_epoch = on_step, on_epoch
        state["started"] = state["step"] = clock.now()
        run_loop(run)
        model = parameters(run.model)
    mine, theirs = Times(tuple(ours[1:])), Times(tuple(usual[1:]))
    what = "the 28 real clips" if which == "clips" else "songs of 60–240 s joined from them"
    rows = [
        {"epoch over": what, "way": "usual", "seconds": theirs.median, "usual over ours": theirs.over(mine)},
        {"epoch over": what, "way": "ours", "seconds": mine.median, "usual over ours": 1.0},
    ]
    edge = sorted(edges[1:])[len(edges[1:]) // 2] / sorted(inside)[len(inside) // 2] if len(edges) > 1 else float("nan")
    note = (
        f"{model}, {len(lengths)} songs, {sum(lengths) / 60:.1f} minutes; both step after four songs; "
        f"{rounds} epochs of each, after one that does not count. "
        f"Usual: conditions padded to {PADDED_CONDITION}, dense masks, batches of 2 padded with zeros, "
        "worker processes, `.item()` and NaN scans in every micro-step."
    )
    facts = {f"epoch over {what}, usual over ours": theirs.over(mine)}
    if which == "clips":
        facts["first step of an epoch over a step inside it"] = edge
    return Result(f"epoch_{which}", f"A whole epoch over {what}", note, rows, facts)


def clips(setting: Setting) -> Result:
    """Epochs over the 28 clips."""
    return epochs(setting, "clips")


def joined(setting: Setting) -> Result:
    """Epochs over the joined songs."""
    return epochs(setting, "joined")
