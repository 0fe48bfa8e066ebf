"""The page itself: facts in, one HTML text out. Style and script stand beside this file and are put inside, so that the page needs nothing else."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sidestep import __version__
from sidestep.training.report.facts import rank_rows

HERE = Path(__file__).parent
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
    data = f"{facts['songs']} song{'s' * (facts['songs'] != 1)}, {facts['minutes']:.1f} minutes"
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
    figures = [("Loss of the last epoch", number(losses[-1][1] if losses else None), f"{number(losses[0][1])} in the first" if len(losses) > 1 else "")]
    if best:
        figures.append(("Best", number(best["loss"]), f"{best['by']}, epoch {best['epoch']}"))
    if facts["validation"]:
        figures.append(("Validation", number(facts["validation"][-1][1]), f"{number(facts['validation'][0][1])} at first"))
    if points:
        figures.append(("Learning rate", f"{points[-1][2]:.2g}", f"{points[0][2]:.2g} at first" if len(points) > 1 else ""))
    figures.append(("Peak memory", "not counted" if memory is None else f"{memory / 2**30:.1f} GiB", facts["device"]))
    tiles = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><p>{escape(note)}</p></div>" for name, value, note in figures)
    return f'<dl class="figures">\n{tiles}\n</dl>'


def _previews(previews: Sequence[Mapping[str, Any]]) -> str:
    if not previews:
        return ""
    return '<section id="listen">\n<h2>Listen</h2>\n' + "\n".join(_preview(entry) for entry in previews) + "\n</section>"


def _preview(entry: Mapping[str, Any]) -> str:
    prompt, takes = entry["prompt"], entry["takes"]
    caption, lyrics = str(prompt.get("caption", "")), str(prompt.get("lyrics", ""))
    known = [("", prompt.get("bpm"), " bpm"), ("", prompt.get("keyscale"), ""), ("", prompt.get("timesignature"), " beats to the bar")]
    known += [("", _plain(prompt.get("duration")), " s"), ("seed ", prompt.get("seed"), "")]
    facts = " · ".join(f"{before}{value}{after}" for before, value, after in known if value not in (None, ""))
    players = []
    if entry["base"]:
        players.append(f"<figure><figcaption>Without the adapter</figcaption>{_audio(entry['base'])}</figure>")
    if takes:
        last = len(takes) - 1
        options = "".join(
            f'<option value="{escape(take["src"])}"{" selected" if i == last else ""}>{escape(take["label"])}</option>' for i, take in enumerate(takes)
        )
        players.append(
            f'<figure><figcaption><label>With the adapter, <select class="take" autocomplete="off">{options}</select></label></figcaption>'
            f"{_audio(takes[-1]['src'])}</figure>"
        )
    switch = '<button type="button" class="switch">Switch while playing</button>' if len(players) == 2 else ""
    words = f"<details><summary>Lyrics</summary><pre>{escape(lyrics)}</pre></details>" if lyrics.strip() not in ("", "[Instrumental]") else ""
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
    figures = "\n".join(f'<figure><figcaption>{name}</figcaption><div class="chart" id="chart-{key}"></div></figure>' for key, name in small)
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
    dropout = f"condition dropped in {100 * facts['cfg_dropout']:g} % of samples" if facts["cfg_dropout"] else "no condition dropout"
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
    head = "".join(f'<th scope="col"><span>{escape(column.replace("_proj", "").replace("_attn", ""))}</span></th>' for column in columns)
    body = "\n".join(f'<tr><th scope="row">{layer}</th>' + "".join(_rank_cell(rank, values[-1]) for rank in cells) + "</tr>" for layer, cells in rows)
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
