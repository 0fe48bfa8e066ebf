"""A rank map in the terminal: its top modules, and a small heat map of layers × projections.

`estimate.html`: a rank map as one page without scripts or outside files.
"""

import html
import math
from pathlib import Path

from sidestep.adapters.rank_map import RankMap
from sidestep.events import Table
from sidestep.files import write_text

SHADES = " ░▒▓█"
SHORT = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
BLOCKS = {"self_attn": "self", "cross_attn": "cross", "mlp": "mlp"}


def place(name: str) -> tuple[int, str]:
    """(layer, column) of a module: `layers.3.self_attn.to_out.0` → (3, "self o")."""
    _, layer, block, projection = name.split(".", 3)
    return int(layer), f"{BLOCKS[block]} {SHORT[projection]}"


def grid(result: RankMap) -> tuple[list[str], dict[int, dict[str, str]]]:
    """Columns in order of the model, and for each layer the module's full name by column."""
    rows: dict[int, dict[str, str]] = {}
    for name in result.modules:
        layer, column = place(name)
        rows.setdefault(layer, {})[column] = name
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return columns, dict(sorted(rows.items()))


def top_modules(result: RankMap, count: int = 12) -> Table:
    """The modules with the most confirmed energy per parameter of one rank."""
    ordered = sorted(result.modules.items(), key=lambda item: item[1].score / item[1].cost, reverse=True)[:count]
    best = max(module.score / module.cost for _, module in ordered) or 1.0
    rows = tuple(
        (name, str(m.rank), f"{100 * m.score / m.cost / best:.0f}", f"{m.confidence:.2f}") for name, m in ordered
    )
    return Table(
        title="Modules that respond most to this music", columns=("module", "rank", "score", "confidence"), rows=rows
    )


def heat_map(result: RankMap) -> Table:
    """Ranks of all modules, shaded by rank; a dot has no adapter."""
    columns, rows = grid(result)
    most = max(module.rank for module in result.modules.values())

    def cell(name: str | None) -> str:
        if name is None:
            return ""
        rank = result.modules[name].rank
        return f"{SHADES[min(len(SHADES) - 1, rank * len(SHADES) // (most + 1))]}{rank}" if rank else "·"

    body = tuple((str(layer), *(cell(row.get(column)) for column in columns)) for layer, row in rows.items())
    return Table(title="Rank of each projection, by layer", columns=("layer", *columns), rows=body)


CELL_WIDTH, CELL_HEIGHT = 58, 20
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #666; --paper: #fff; --line: #ddd }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #999; --paper: #161616; --line: #333 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
svg { max-width: 100%; height: auto; display: block } text { font: 11px system-ui, sans-serif; fill: var(--ink) } .soft, text.soft { color: var(--soft); fill: var(--soft) }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left; border-bottom: 1px solid var(--line) } h2 { margin-top: 2rem }
"""


def write_page(path: Path, result: RankMap) -> None:
    """Write the page whole or not at all."""
    write_text(path, page(result))


def page(result: RankMap) -> str:
    """The page as HTML."""
    ranks = {name: float(m.rank) for name, m in result.modules.items()}
    scores = {name: m.score / m.cost for name, m in result.modules.items()}
    best = max(scores.values()) or 1.0
    facts = [
        ("model", result.model["variant"]),
        ("songs", str(result.data["songs"])),
        ("batches", str(result.batches)),
        ("focus", str(result.settings["focus"])),
        ("budget", f"{result.spent:,} of {result.budget:,} parameters"),
        ("agreement of two halves", f"{result.agreement:.3f}, {'converged' if result.converged else 'not converged'}"),
        ("left out", str(len(result.excluded))),
        ("seed", str(result.settings["seed"])),
        ("made", result.created),
    ]
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Rank map</title><style>{STYLE}</style></head><body>
<h1>Rank map</h1><p>{html.escape(result.summary())}.</p><table>{rows}</table>
<h2>Ranks</h2><p class="soft">Layers downwards, projections across. A dash has no adapter.</p>{_heat(result, ranks, lambda v: f"{v:.0f}" if v else "–")}
<h2>Scores</h2><p class="soft">Gradient energy that both halves of the songs confirm, per parameter of one rank; the best module is 100, shades are logarithmic.</p>
{_heat(result, {n: _log_shade(s / best) for n, s in scores.items()}, None, {n: f"{100 * s / best:.3g}" for n, s in scores.items()})}
<h2>Spectra</h2><p class="soft">Energy of each direction of a module's gradient, the strongest module of each projection. Solid: measured; dashed: confirmed by the other half.</p>
{_spectra(result)}
<h2>Budget</h2><p class="soft">Share of the confirmed energy that a budget captures; the dot is this map.</p>{_curve(result)}
</body></html>
"""


def _log_shade(share: float) -> float:
    """1 for the best, 0 for a ten-thousandth of it and less."""
    return max(0.0, 1 + math.log10(share) / 4) if share > 0 else 0.0


def _heat(result: RankMap, values: dict[str, float], form, labels: dict[str, str] | None = None) -> str:
    columns, rows = grid(result)
    most = max(values.values()) or 1.0
    left, top = 40, 20
    parts = [
        f'<text x="{left + (i + 0.5) * CELL_WIDTH}" y="14" text-anchor="middle">{html.escape(c)}</text>'
        for i, c in enumerate(columns)
    ]
    for r, (layer, row) in enumerate(rows.items()):
        y = top + r * CELL_HEIGHT
        parts.append(f'<text class="soft" x="{left - 8}" y="{y + 14}" text-anchor="end">{layer}</text>')
        for c, column in enumerate(columns):
            name = row.get(column)
            if name is None:
                continue
            share, label = values[name] / most, labels[name] if labels else form(values[name])
            parts.append(
                f'<g><title>{html.escape(name)}: {label}</title><rect x="{left + c * CELL_WIDTH}" y="{y}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" '
                f'fill="#2f6fde" fill-opacity="{0.06 + 0.84 * share:.3f}"/><text x="{left + (c + 0.5) * CELL_WIDTH - 1}" y="{y + 13}" text-anchor="middle">'
                f"{label}</text></g>"
            )
    width, height = left + len(columns) * CELL_WIDTH, top + len(rows) * CELL_HEIGHT
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="heat map of layers and projections">{"".join(parts)}</svg>'


def _spectra(result: RankMap) -> str:
    columns, rows = grid(result)
    strongest = {}
    for column in columns:
        names = [row[column] for row in rows.values() if column in row]
        strongest[column] = max(names, key=lambda n: result.modules[n].score)
    values = [v for n in strongest.values() for v in result.modules[n].spectrum if v > 0]
    if not values:
        return "<p>Nothing was measured.</p>"
    high = math.log10(max(values))
    low, width, height = high - 6, 640, 280
    longest = max(len(result.modules[n].spectrum) for n in strongest.values())

    def path(points: tuple[float, ...]) -> str:
        seen = [(i, v) for i, v in enumerate(points) if v > 10**low]
        return " ".join(
            f"{50 + i * (width - 130) / max(1, longest - 1):.1f},{10 + (high - math.log10(v)) / (high - low) * (height - 40):.1f}"
            for i, v in seen
        )

    lines = [
        f'<line x1="50" x2="{width - 80}" y1="{height - 30}" y2="{height - 30}" stroke="currentColor" stroke-opacity=".4"/>'
    ]
    for i, (column, name) in enumerate(strongest.items()):
        colour, module = f"hsl({360 * i / len(strongest):.0f} 60% 50%)", result.modules[name]
        lines.append(
            f'<polyline fill="none" stroke="{colour}" points="{path(module.spectrum)}"><title>{html.escape(name)}</title></polyline>'
        )
        lines.append(
            f'<polyline fill="none" stroke="{colour}" stroke-dasharray="3 3" points="{path(module.confirmed)}"/>'
        )
        lines.append(f'<text x="{width - 70}" y="{20 + 15 * i}" style="fill:{colour}">{html.escape(column)}</text>')
    lines += [
        f'<text class="soft" x="44" y="{14 + i * (height - 40) / 3:.0f}" text-anchor="end">1e{high - 2 * i:.0f}</text>'
        for i in range(4)
    ]
    lines.append(
        f'<text class="soft" x="{width / 2}" y="{height - 8}" text-anchor="middle">direction 1 to {longest}</text>'
    )
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="gradient spectra">{"".join(lines)}</svg>'


def _curve(result: RankMap) -> str:
    width, height = 640, 220
    most = max([p for p, _ in result.curve] + [result.spent, 1])

    def at(parameters: int, share: float) -> tuple[float, float]:
        return 50 + parameters / most * (width - 70), 10 + (1 - share) * (height - 40)

    points = " ".join("{:.1f},{:.1f}".format(*at(p, s)) for p, s in ((0, 0.0), *sorted(set(result.curve))))
    own = next((share for p, share in result.curve if p == result.spent), 0.0)
    x, y = at(result.spent, own)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="captured energy over parameters"><polyline fill="none" stroke="#2f6fde" '
        f'stroke-width="2" points="{points}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#2f6fde"/><text x="{x + 8:.0f}" y="{y + 18:.0f}">{100 * own:.1f} %</text>'
        f'<text class="soft" x="44" y="16" text-anchor="end">100 %</text><text class="soft" x="44" y="{height - 28}" text-anchor="end">0</text>'
        f'<text class="soft" x="{width - 20}" y="{height - 8}" text-anchor="end">{most:,} parameters</text></svg>'
    )
