"""What the report page shows, as plain values: taken from the run in memory and from the previews on disk.

The page itself: facts in, one HTML text out. Style and script stand beside this file and are put inside, so that the page needs nothing else.
Writes the page, and to TensorBoard what belongs beside its curves, after each epoch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from sidestep import __version__
from sidestep.adapters.names import in_model_order, parts, to_original
from sidestep.events import Notice
from sidestep.files import write_text
from sidestep.settings.config import TrainConfig, command_line
from sidestep.settings.option import changed_from_defaults, options_of
from sidestep.tasks.train.previews import BASE, FOLDER
from sidestep.tasks.train.run import Point, Run
from sidestep.words import count, gib

MOST_POINTS = 1500  # of a curve; longer ones are averaged


def facts_of(run: Run, finished: bool) -> dict[str, Any]:
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
        "minutes": sum(song.frames for song in songs) / run.frames_per_second / 60,
        "step": position.step,
        "total_steps": run.total_steps,
        "epoch": position.epoch,
        "total_epochs": config.epochs,
        "timesteps": run.law.name,
        "law": run.law.reason,
        "cfg_dropout": run.law.cfg_ratio,
        "best": {"loss": best.loss, "epoch": best.epoch, "by": best.by} if best else None,
        "points": curve(history.points),
        "epoch_losses": [[number, number_or_none(loss)] for number, loss in enumerate(history.epoch_losses, 1)],
        "validation": [
            [e.step, number_or_none(e.loss), None if e.average_loss is None else number_or_none(e.average_loss)]
            for e in history.evaluations
        ],
        "bins": [
            {"samples": count, "loss": number_or_none(loss / count) if count else None}
            for loss, count in zip(history.bin_loss, history.bin_count, strict=True)
        ],
        "ranks": ranks_of(run.model),
        "previews": previews_in(config.output_dir),
        "settings": settings_of(config),
        "command": command_line(config),
    }


def number_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def curve(points: Sequence[Point]) -> list[list[float | None]]:
    """[step, loss, lr, gradient norm, memory in bytes] of each logged step, or means of neighbours where there are very many."""
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
            ranks = getattr(layer, "r", None) or {}
            found[to_original(name)] = int(ranks.get("default") or layer.oft_block_size["default"])
    return {name: found[name] for name in in_model_order(found)}


def rank_rows(ranks: dict[str, int]) -> tuple[list[str], list[tuple[int, list[int | None]]]]:
    """(column names, (layer, rank in each column) of each layer); None where a module has no adapter."""
    columns = list(dict.fromkeys(sorted((parts(name)[1:] for name in ranks), key=_column)))
    layers = sorted({parts(name)[0] for name in ranks})
    where = {parts(name): rank for name, rank in ranks.items()}
    return [" ".join(column) for column in columns], [
        (layer, [where.get((layer, *column)) for column in columns]) for layer in layers
    ]


def _column(column: tuple[str, str]) -> int:
    part, projection = column
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return ("self_attn", "cross_attn", "mlp").index(part) * 10 + order.index(projection)


def previews_in(run_folder: Path) -> list[dict[str, Any]]:
    """Each prompt of a run's previews with what can be heard of it: the base's take and the adapter's, by optimizer step. Paths are URLs."""
    prompts: dict[str, dict[str, Any]] = {}
    for path in sorted((run_folder / FOLDER).glob("*/*.json")):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            prompt, step, epoch = dict(said["prompt"]), int(said["step"]), int(said["epoch"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        audio = path.with_suffix(".flac")
        if not audio.is_file():
            continue
        entry = prompts.setdefault(path.stem, {"prompt": prompt, "base": None, "takes": []})
        url = quote(audio.relative_to(run_folder).as_posix())
        if path.parent.name == BASE:
            entry["base"] = url
        else:
            label = f"epoch {epoch}" if path.parent.name.startswith("epoch") else f"step {step}"
            entry["takes"].append({"step": step, "label": label, "src": url})
    for entry in prompts.values():
        entry["takes"].sort(key=lambda take: take["step"])
    return list(prompts.values())


def settings_of(config: TrainConfig) -> list[dict[str, str]]:
    """The settings that are not at their default: flag, value, default and what it means."""
    options = options_of(TrainConfig)
    return [
        {
            "flag": options[name].flag,
            "value": as_text(value),
            "default": "" if options[name].required else as_text(options[name].default),
            "help": options[name].help,
        }
        for name, value in changed_from_defaults(config).items()
    ]


def as_text(value: Any) -> str:
    """A setting as a person types it."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


HERE = Path(__file__).resolve().parents[2] / "pages"
KINDS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa", "oft": "OFT"}


def page(facts: Mapping[str, Any]) -> str:
    """The whole page. Everything that comes from outside is escaped, as text and inside the script's data."""
    style, script = (HERE / name for name in ("page.css", "page.js"))
    sections = (
        _header(facts),
        _figures(facts),
        _previews(facts["previews"]),
        _curves(facts),
        _timesteps(facts),
        _ranks(facts["ranks"]),
        _settings(facts["settings"]),
        _command(facts["command"]),
        f"<footer>Side-Step {escape(__version__)} · written {escape(facts['written'])}</footer>",
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(facts['title'])} · Side-Step</title>\n<style>\n{style.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f'\n</main>\n<script type="application/json" id="facts">{as_script_data(facts)}</script>\n'
        f"<script>\n{script.read_text(encoding='utf-8')}</script>\n</body>\n</html>\n"
    )


def as_script_data(facts: Mapping[str, Any]) -> str:
    """What the script draws, as JSON that cannot end its script element whatever it holds."""
    drawn = {name: facts[name] for name in ("points", "epoch_losses", "validation", "bins", "total_steps")}
    text = json.dumps(drawn, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def number(value: float | None) -> str:
    """A loss as it is read: 0.7312."""
    return "–" if value is None else f"{value:.4f}"


def _header(facts: Mapping[str, Any]) -> str:
    share = 100 * facts["step"] / max(1, facts["total_steps"])
    state = "finished" if facts["finished"] else "running"
    what = f"{KINDS.get(facts['adapter'], facts['adapter'])} adapter of {facts['parameters']:,} parameters on {facts['model']}"
    data = f"{count(facts['songs'], 'song')}, {facts['minutes']:.1f} minutes"
    held_out = f", {facts['held_out']} of them held out" if facts["held_out"] else ""
    return (
        f'<header>\n<p class="state {state}">{state}</p>\n<h1>{escape(facts["title"])}</h1>\n<p class="lead">{escape(what)}<br>{escape(data + held_out)}</p>\n'
        f'<div class="progress" role="progressbar" aria-label="Training progress" aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100">'
        f'<i style="width:{share:.2f}%"></i></div>\n'
        f'<p class="quiet">step {facts["step"]:,} of {facts["total_steps"]:,} · epoch {facts["epoch"]} of {facts["total_epochs"]}</p>\n</header>'
    )


def _figures(facts: Mapping[str, Any]) -> str:
    points, losses, best = facts["points"], facts["epoch_losses"], facts["best"]
    memory = max((p[4] for p in points if p[4] is not None), default=None)
    figures = [
        (
            "Loss of the last epoch",
            number(losses[-1][1] if losses else None),
            f"{number(losses[0][1])} in the first" if len(losses) > 1 else "",
        )
    ]
    if best:
        figures.append(("Best", number(best["loss"]), f"{best['by']}, epoch {best['epoch']}"))
    if facts["validation"]:
        figures.append(
            ("Validation", number(facts["validation"][-1][1]), f"{number(facts['validation'][0][1])} at first")
        )
    if points:
        figures.append(
            ("Learning rate", f"{points[-1][2]:.2g}", f"{points[0][2]:.2g} at first" if len(points) > 1 else "")
        )
    figures.append(("Peak memory", gib(memory) or "not counted", facts["device"]))
    tiles = "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><p>{escape(note)}</p></div>"
        for name, value, note in figures
    )
    return f'<dl class="figures">\n{tiles}\n</dl>'


def _previews(previews: Sequence[Mapping[str, Any]]) -> str:
    if not previews:
        return ""
    return (
        '<section id="listen">\n<h2>Listen</h2>\n' + "\n".join(_preview(entry) for entry in previews) + "\n</section>"
    )


def _preview(entry: Mapping[str, Any]) -> str:
    prompt, takes = entry["prompt"], entry["takes"]
    caption, lyrics = str(prompt.get("caption", "")), str(prompt.get("lyrics", ""))
    known = [
        ("", prompt.get("bpm"), " bpm"),
        ("", prompt.get("keyscale"), ""),
        ("", prompt.get("timesignature"), " beats to the bar"),
    ]
    known += [("", _plain(prompt.get("duration")), " s"), ("seed ", prompt.get("seed"), "")]
    facts = " · ".join(f"{before}{value}{after}" for before, value, after in known if value not in (None, ""))
    players = []
    if entry["base"]:
        players.append(f"<figure><figcaption>Without the adapter</figcaption>{_audio(entry['base'])}</figure>")
    if takes:
        last = len(takes) - 1
        options = "".join(
            f'<option value="{escape(take["src"])}"{" selected" if i == last else ""}>{escape(take["label"])}</option>'
            for i, take in enumerate(takes)
        )
        players.append(
            f'<figure><figcaption><label>With the adapter, <select class="take" autocomplete="off">{options}</select></label></figcaption>'
            f"{_audio(takes[-1]['src'])}</figure>"
        )
    switch = '<button type="button" class="switch">Switch while playing</button>' if len(players) == 2 else ""
    words = (
        f"<details><summary>Lyrics</summary><pre>{escape(lyrics)}</pre></details>"
        if lyrics.strip() not in ("", "[Instrumental]")
        else ""
    )
    return (
        f'<article class="preview">\n<h3>{escape(caption)}</h3>\n<p class="quiet">{escape(facts)}</p>\n<div class="players">{"".join(players)}</div>\n'
        f"{switch}{words}\n</article>"
    )


def _plain(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _audio(url: str) -> str:
    return f'<audio controls preload="metadata" src="{escape(url)}"></audio>'


def _curves(facts: Mapping[str, Any]) -> str:
    if not facts["points"]:
        return '<section><h2>Loss</h2>\n<p class="quiet">No step has been logged yet.</p></section>'
    memory = any(p[4] is not None for p in facts["points"])
    small = [("lr", "Learning rate"), ("grad", "Gradient norm"), *([("memory", "Peak memory, GiB")] if memory else [])]
    figures = "\n".join(
        f'<figure><figcaption>{name}</figcaption><div class="chart" id="chart-{key}"></div></figure>'
        for key, name in small
    )
    return (
        '<section>\n<h2>Loss</h2>\n<div class="tools">\n'
        '<label><input type="checkbox" id="log" autocomplete="off"> logarithmic</label>\n'
        '<label>smoothing <input type="range" id="smooth" min="0" max="0.98" step="0.02" value="0.8" autocomplete="off"></label>\n</div>\n'
        '<div class="chart tall" id="chart-loss"></div>\n'
        '<p class="quiet">The training loss jumps because every step draws other songs, noise and timesteps. '
        "Judge by its smoothed line, or by validation, whose songs, noise and timesteps are always the same.</p>\n"
        f'<div class="row">\n{figures}\n</div>\n</section>'
    )


def _timesteps(facts: Mapping[str, Any]) -> str:
    if not any(b["samples"] for b in facts["bins"]):
        return ""
    dropout = (
        f"condition dropped in {100 * facts['cfg_dropout']:g} % of samples"
        if facts["cfg_dropout"]
        else "no condition dropout"
    )
    return (
        "<section>\n<h2>Timesteps</h2>\n"
        f'<p class="quiet">{escape(facts["timesteps"])}; {escape(dropout)}: {escape(facts["law"])}. t = 1 is pure noise, small t the finest detail.</p>\n'
        '<div class="row">\n'
        '<figure><figcaption>Mean loss by timestep</figcaption><div class="chart" id="chart-binloss"></div></figure>\n'
        '<figure><figcaption>Samples by timestep</figcaption><div class="chart" id="chart-bincount"></div></figure>\n</div>\n</section>'
    )


def _ranks(ranks: Mapping[str, int]) -> str:
    if not ranks:
        return ""
    values = sorted(set(ranks.values()))
    if len(values) == 1:
        return f"<section>\n<h2>Ranks</h2>\n<p>Rank {values[0]} in each of {len(ranks)} modules.</p>\n</section>"
    columns, rows = rank_rows(dict(ranks))
    head = "".join(
        f'<th scope="col"><span>{escape(column.replace("_proj", "").replace("_attn", ""))}</span></th>'
        for column in columns
    )
    body = "\n".join(
        f'<tr><th scope="row">{layer}</th>' + "".join(_rank_cell(rank, values[-1]) for rank in cells) + "</tr>"
        for layer, cells in rows
    )
    return (
        f"<section>\n<h2>Ranks</h2>\n<p>{len(ranks)} modules, ranks {values[0]} to {values[-1]}. One row per layer; the stronger the colour the higher, empty has no adapter.</p>\n"
        f'<div class="scroll"><table class="ranks"><thead><tr><th></th>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n</section>'
    )


def _rank_cell(rank: int | None, highest: int) -> str:
    if rank is None:
        return "<td></td>"
    share = (rank / highest) ** 0.5
    return f'<td class="{"strong" if share > 0.6 else "weak"}" style="--share:{100 * share:.0f}%">{rank}</td>'


def _settings(settings: Sequence[Mapping[str, str]]) -> str:
    rows = "\n".join(
        f"<tr><th scope='row'><code>{escape(s['flag'])}</code><small>{escape(s['help'])}</small></th><td>{escape(s['value'])}</td>"
        f"<td class='quiet'>{escape(s['default'])}</td></tr>"
        for s in settings
    )
    return (
        '<section>\n<h2>Settings that are not the default</h2>\n<div class="scroll"><table class="settings">'
        f"<thead><tr><th>setting</th><th>this run</th><th>default</th></tr></thead><tbody>\n{rows}\n</tbody></table></div>\n</section>"
    )


def _command(command: str) -> str:
    return (
        f'<section>\n<h2>The same run again</h2>\n<div class="command"><pre id="command">{escape(command)}</pre>'
        '<button type="button" id="copy" hidden>Copy</button></div>\n</section>'
    )


NAME = "report.html"


def write_report(run: Run, finished: bool = False) -> None:
    """Write the page of a run anew, whole or not at all."""
    path = run.config.output_dir / NAME
    try:
        write_text(path, page(facts_of(run, finished)))
    except OSError as error:  # a browser or a scanner may hold it; the next epoch tries again
        run.report(Notice(message=f"{path}: not written this time ({error.strerror or error}).", level="warning"))


def add_ranks(run: Run) -> None:
    """The rank of each module to TensorBoard, as a histogram and as a table."""
    ranks, step = ranks_of(run.model), run.position.step
    run.tensorboard.add_histogram("ranks", np.array(list(ranks.values())), step)
    rows = [f"| {name} | {rank} |" for name, rank in ranks.items()]
    run.tensorboard.add_text("ranks", "\n".join(["| module | rank |", "|---|---|", *rows]), step)


def add_timesteps(run: Run) -> None:
    """To TensorBoard: how often each timestep was trained so far, in the history's bins, and the mean loss of each."""
    tensorboard, history, step = run.tensorboard, run.history, run.position.step
    counts = history.bin_count
    if not sum(counts):
        return
    edges = [(i + 1) / len(counts) for i in range(len(counts))]
    middles = [edge - 0.5 / len(counts) for edge in edges]
    total = sum(count * middle for count, middle in zip(counts, middles, strict=True))
    squares = sum(count * middle**2 for count, middle in zip(counts, middles, strict=True))
    tensorboard.add_histogram_raw(
        "timesteps",
        min=0.0,
        max=1.0,
        num=sum(counts),
        sum=total,
        sum_squares=squares,
        bucket_limits=edges,
        bucket_counts=counts,
        global_step=step,
    )
    for edge, loss, samples in zip(edges, history.bin_loss, counts, strict=True):
        if samples:
            tensorboard.add_scalar(f"loss by timestep/{edge - 1 / len(counts):.1f}-{edge:.1f}", loss / samples, step)
