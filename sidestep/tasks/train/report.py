"""The report of a run: report.html with its curves, previews, ranks and settings, and their like for TensorBoard.

Plain values are taken from the run in memory and from the previews on disk; the template in sidestep/pages shows them.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from sidestep.adapters.names import in_model_order, to_original
from sidestep.events import Notice, Saved
from sidestep.files import write_text
from sidestep.pages import render
from sidestep.pages.charts import by_layer
from sidestep.settings.config import TrainConfig, command_line
from sidestep.settings.option import changed_from_defaults, options_of
from sidestep.tasks.train.language import is_language
from sidestep.tasks.train.previews import BASE, FOLDER
from sidestep.tasks.train.run import Point, Run
from sidestep.tasks.train.songs import Wording, is_told, wordings
from sidestep.words import clock, count, gib

MOST_POINTS = 1500  # of a curve; longer ones are averaged
LISTENING = "score/listen.html"  # the page of `score`, beside the report
FIGURES = "score/results.json"  # of `score`
PLACE = "<!-- judged -->"  # what a report has to say of them stands in the line behind it
KINDS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa", "oft": "OFT"}


def page_values(run: Run, finished: bool) -> dict[str, Any]:
    """Everything on the page."""
    config, history, position = run.config, run.history, run.position
    songs = [*run.songs, *run.held_out]
    best = history.best
    return {
        "title": config.run_name or config.output_dir.name,
        "finished": finished,
        "written": datetime.now().astimezone().isoformat(timespec="seconds"),
        "adapter": config.adapter_type,
        "model": run.checkpoint.folder.name,
        "device": str(run.device),
        "parameters": sum(p.numel() for p in run.parameters),
        "songs": len(songs),
        "held_out": len(run.held_out),
        "music": clock(sum(song.frames for song in songs) / run.frames_per_second),
        "step": position.step,
        "total_steps": run.total_steps,
        "epoch": position.epoch,
        "total_epochs": config.epochs,
        "timesteps": run.law.name,
        "law": run.law.reason + run.law.shift_reason,
        "cfg_dropout": run.law.cfg_ratio,
        "best": {"loss": best.loss, "epoch": best.epoch, "by": best.by} if best else None,
        "points": curve(history.points),
        "epoch_losses": thinned([[n, number_or_none(loss)] for n, loss in enumerate(history.epoch_losses, 1)]),
        "validation": thinned(
            [[e.step, number_or_none(e.loss), number_or_none(e.average_loss)] for e in history.evaluations]
        ),
        "bins": [
            {"samples": count, "loss": number_or_none(loss / count) if count else None}
            for loss, count in zip(history.bin_loss, history.bin_count, strict=True)
        ],
        "drift": next((p.drift for p in reversed(history.points) if p.drift is not None), None),
        "told": variety(run),
        "marks": [{"epoch": m.epoch, "loss": _loss(m.loss), "below": f"{m.below:.1%}"} for m in history.marks],
        "named": history.watch.named,
        "ranks": ranks_of(run.model),
        "previews": previews_in(config.output_dir),
        "settings": settings_of(config),
        "defaults": settings_of(config, changed=False),
        "command": command_line(config),
        "judged": judged(config.output_dir),
    }


def variety(run: Run) -> tuple[tuple[str, str], ...]:
    """(setting, what it came to in this run) of what varies captions, keeps the model or marks the way.

    Only of what is on. Shares are of all visits, as they come out: a song without a trigger word can lose none.
    """
    config, songs, rows = run.config, run.songs, []
    visits = sum(song.repeat for song in songs)
    ways = [] if is_language(config) else [(s, wordings(s.metadata, config)) for s in songs if is_told(s)]
    varied = [1 + len(json.loads(str(s.metadata["captions"]))) for s, _ in ways if s.metadata.get("captions")]
    if varied:
        numbers = f"{min(varied)} to {max(varied)}" if min(varied) < max(varied) else str(varied[0])
        of_all = f"{(sum(varied) + len(songs) - len(varied)) / len(songs):.1f} in the mean of all"
        rows.append(("captions", f"{count(len(varied), 'song')} with {numbers}, {of_all}; each visit draws one"))
    if by_genre := [s for s, _ in ways if s.metadata.get("genre_ratio")]:
        shares = sorted({f"{s.metadata['genre_ratio']} %" for s in by_genre})
        rows.append(
            ("genre", f"in place of a caption in {' and '.join(shares)} of visits to {count(len(by_genre), 'song')}")
        )

    def share(is_meant: Callable[[str, Wording], bool]) -> str:
        drawn = sum(
            s.repeat * way.share
            for s, ways_of in ways
            for way in ways_of
            if is_meant(str(s.metadata.get("custom_tag") or ""), way)
        )
        return f"{drawn / visits:.1%} of visits"

    if config.caption_dropout:
        words = share(lambda tag, way: way.caption == tag)
        rows.append((f"--caption-dropout {config.caption_dropout:g}", f"the trigger word alone in {words}"))
    if config.tag_dropout:
        words = share(lambda tag, way: bool(tag) and tag not in way.caption)
        rows.append((f"--tag-dropout {config.tag_dropout:g}", f"no trigger word in {words}"))
    if config.metadata_dropout:
        words = share(lambda _tag, way: bool(way.untold))
        rows.append((f"--metadata-dropout {config.metadata_dropout:g}", f"tempo, meter or key is N/A in {words}"))
    if run.prior:
        drifts = [p.drift for p in run.history.points if p.drift is not None]
        moved = f"; drift {drifts[-1]:.2g}" if drifts else ""
        others = f"{count(run.prior.most, 'sample')} of {count(len(run.prior.songs), 'other song')} in each full step"
        rows.append((f"--prior-weight {config.prior_weight:g}", f"{others}, {run.prior.weight:.0%} of its loss{moved}"))
    if config.mark_drop:
        rows.append((f"--mark-drop {config.mark_drop:g}", f"{count(len(run.history.marks), 'mark')} so far"))
    return tuple(rows)


def number_or_none(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def thinned(rows: list[list[Any]]) -> list[list[Any]]:
    """At most `MOST_POINTS` of the rows, evenly spaced, the last among them."""
    every = max(1, -(-len(rows) // MOST_POINTS))
    return rows[(len(rows) - 1) % every :: every]


def curve(points: Sequence[Point]) -> list[list[float | None]]:
    """[step, loss, lr, gradient norm, memory in bytes] of each logged step.

    Where there are very many, means of neighbours (of the memory the highest).
    """
    size = max(1, -(-len(points) // MOST_POINTS))
    rows = []
    for first in range(0, len(points), size):
        group = points[first : first + size]
        memory = [p.memory_bytes for p in group if p.memory_bytes is not None]
        rows.append(
            [
                group[-1].step,
                _mean([p.loss for p in group]),
                group[-1].lr,
                _mean([p.grad_norm for p in group]),
                max(memory) if memory else None,
            ]
        )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def ranks_of(model: PeftModel) -> dict[str, int]:
    """Rank of each adapted module by its original name, in model order; of OFT the block size."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            ranks = vars(layer).get("oft_block_size") or vars(layer)["r"]  # r of an OFT is the number of its blocks
            found[to_original(name)] = int(ranks["default"])
    return {name: found[name] for name in in_model_order(found)}


def previews_in(run_folder: Path) -> list[dict[str, Any]]:
    """Each prompt of a run's previews, once for each model that plays, with the URLs of what can be heard of it.

    One take is the base's, the others are the adapter's by optimizer step. model: empty for the one that is trained.
    """
    prompts: dict[tuple[str, str], dict[str, Any]] = {}
    folder = run_folder / FOLDER
    for path in sorted((*folder.glob("*/*.json"), *folder.glob("on-*/*/*.json"))):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            prompt, step, epoch = dict(said["prompt"]), int(said["step"]), int(said["epoch"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        audio, composed = path.with_suffix(".flac"), said.get("composed")
        is_there = audio.is_file()
        if not is_there and not composed:
            continue
        player = path.parent.parent.name if path.parent.parent != folder else ""
        entry = {"prompt": prompt, "model": player.removeprefix("on-"), "base": None, "takes": [], "written": []}
        entry = prompts.setdefault((path.stem, player), entry)
        url = quote(audio.relative_to(run_folder).as_posix())
        is_base = path.parent.name == BASE
        label = f"epoch {epoch}" if path.parent.name.startswith("epoch") else f"step {step}"
        if is_there and is_base:
            entry["base"] = url
        elif is_there:
            entry["takes"].append({"step": step, "label": label, "src": url})
        if composed:
            label = "without the adapter" if is_base else label
            entry["written"].append({"step": step, "label": label, "text": words_of(composed)})
    for entry in prompts.values():
        entry["takes"].sort(key=lambda take: take["step"])
        entry["written"].sort(key=lambda take: take["step"])
    return [prompts[key] for key in sorted(prompts)]


def words_of(composed: Mapping[str, Any]) -> str:
    """What the language model wrote for a preview, in a line: `bpm 84 · keyscale D minor · 60 codes`."""
    wrote = [f"{name} {value}" for name, value in dict(composed.get("wrote", {})).items()]
    return " · ".join([*wrote, count(len(composed.get("codes", ())), "code")])


def settings_of(config: TrainConfig, changed: bool = True) -> list[dict[str, str]]:
    """The settings that are not at their default, or those that are: flag, value, default and what it means."""
    different = changed_from_defaults(config)
    return [
        {
            "flag": o.flag,
            "value": as_text(getattr(config, name)),
            "default": "" if o.required else as_text(o.default),
            "help": o.help,
        }
        for name, o in options_of(type(config)).items()
        if (name in different) is changed
    ]


def as_text(value: Any) -> str:
    """A setting as a person types it."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def page(values: Mapping[str, Any]) -> str:
    """The whole page of `page_values`."""
    points, losses, best, validation = (values[name] for name in ("points", "epoch_losses", "best", "validation"))
    memory = max((point[4] for point in points if point[4] is not None), default=None)
    first_loss = f"{_loss(losses[0][1])} in the first" if len(losses) > 1 else ""
    figures = [("Loss of the last epoch", _loss(losses[-1][1] if losses else None), first_loss)]
    if best:
        figures.append(("Best", _loss(best["loss"]), f"{best['by']}, epoch {best['epoch']}"))
    if validation:
        figures.append(("Validation", _loss(validation[-1][1]), f"{_loss(validation[0][1])} at first"))
    if points:
        first_rate = f"{points[0][2]:.2g} at first" if len(points) > 1 else ""
        figures.append(("Learning rate", f"{points[-1][2]:.2g}", first_rate))
    if values["drift"] is not None:
        figures.append(("Drift on other music", f"{values['drift']:.2g}", "distance from the model without adapter"))
    figures.append(("Peak memory", gib(memory) or "not counted", values["device"]))
    ranks = values["ranks"]
    cells = {name: {"name": name, "label": r, "share": (r / max(ranks.values())) ** 0.5} for name, r in ranks.items()}
    rank_columns, rank_rows = by_layer(cells)
    own = {
        "kind": KINDS.get(values["adapter"], values["adapter"]),
        "song_count": count(values["songs"], "song"),
        "figures": figures,
        "previews": [{**entry, **prompt_texts(entry["prompt"])} for entry in values["previews"]],
        "peak_memory": memory,
        "rank_columns": rank_columns,
        "rank_rows": rank_rows,
    }
    return render("report.html.j2", **{**values, **own})


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def prompt_texts(prompt: Mapping[str, Any]) -> dict[str, str]:
    """A prompt as the page shows it: caption, details in one line, and lyrics if there are any."""
    duration, lyrics = prompt.get("duration"), str(prompt.get("lyrics", ""))
    details = {
        "{} bpm": prompt.get("bpm"),
        "{}": prompt.get("keyscale"),
        "{} beats to the bar": prompt.get("timesignature"),
        "{} s": f"{duration:g}" if isinstance(duration, float) else duration,
        "seed {}": prompt.get("seed"),
    }
    return {
        "caption": str(prompt.get("caption", "")),
        "details": " · ".join(form.format(value) for form, value in details.items() if value not in (None, "")),
        "lyrics": "" if lyrics.strip() in ("", "[Instrumental]") else lyrics,
    }


NAME = "report.html"


def write_report(run: Run, finished: bool = False) -> None:
    """Write the page of a run anew, whole or not at all, and tell where it is once the run is finished."""
    path = run.config.output_dir / NAME
    try:
        write_text(path, page(page_values(run, finished)))
    except OSError as error:  # a browser or a scanner may hold it; the next epoch tries again
        run.report(Notice(message=f"{path}: not written this time ({error.strerror or error}).", level="warning"))
        return
    if finished:
        run.report(Saved(what="report", path=str(path)))


def judged(run_folder: Path) -> str:
    """The line of the page about `score`: its listening page, and what an average of checkpoints did to the loss."""
    if not (run_folder / LISTENING).is_file():
        return PLACE
    try:
        average = json.loads((run_folder / FIGURES).read_text(encoding="utf-8"))["average"]
    except (OSError, ValueError, LookupError, TypeError):  # it is of a version before, or was changed by hand
        average = None
    told = f'<p class="quiet">{escape(average)}</p>' if isinstance(average, str) else ""
    return f'{PLACE}<p><a href="{LISTENING}">Listen to the checkpoints side by side</a></p>{told}'


def tell_what_was_judged(run_folder: Path) -> None:
    """Put `judged` into a report that was written before, if there is one. Raises OSError."""
    report = run_folder / NAME
    if report.is_file():
        text = report.read_text(encoding="utf-8")
        write_text(report, re.sub(f"{PLACE}.*", lambda _: judged(run_folder), text, count=1))


def add_ranks(run: Run) -> None:
    """The rank of each module to TensorBoard, as a histogram and as a table."""
    ranks, step = ranks_of(run.model), run.position.step
    run.tensorboard.add_histogram("ranks", np.array(list(ranks.values())), step)
    rows = [f"| {name} | {rank} |" for name, rank in ranks.items()]
    run.tensorboard.add_text("ranks", "\n".join(["| module | rank |", "|---|---|", *rows]), step)


def add_timesteps(run: Run) -> None:
    """To TensorBoard: how often each timestep was trained so far, in the history's bins, and the mean loss of each."""
    counts, step = np.array(run.history.bin_count), run.position.step
    if not counts.any():
        return
    edges = np.arange(1, len(counts) + 1) / len(counts)
    middles = edges - 0.5 / len(counts)
    run.tensorboard.add_histogram_raw(
        "timesteps",
        min=0.0,
        max=1.0,
        num=counts.sum(),
        sum=counts @ middles,
        sum_squares=counts @ middles**2,
        bucket_limits=edges.tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
    for edge, loss, samples in zip(edges, run.history.bin_loss, counts, strict=True):
        if samples:
            name = f"loss by timestep/{edge - 1 / len(counts):.1f}-{edge:.1f}"
            run.tensorboard.add_scalar(name, loss / samples, step)
