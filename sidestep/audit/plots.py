"""Plots as inline SVG: no script, no file beside the page, sharp at every size."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 460, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 10, 36


def histogram(values: Sequence[float], unit: str, title: str, marks: Sequence[tuple[float, str]] = ()) -> str:
    """An SVG of how often values occur, in up to about twenty round steps; `marks` are (value, label) of limits that matter."""
    low, high = min(values), max(values)
    step = _round_step((high - low) / 16) if high > low else max(abs(high) / 10, 1.0)
    first = math.floor(low / step)
    counts = [0] * (max(math.floor(high / step) - first, 0) + 1)
    for value in values:
        counts[math.floor(value / step) - first] += 1
    edges = [(first + i) * step for i in range(len(counts) + 1)]
    names = [f"{edges[i]:g} to {edges[i + 1]:g} {unit}" for i in range(len(counts))]
    every = max(math.ceil(len(edges) / 7), 1)
    ticks = [(i / len(counts), f"{edge:g}") for i, edge in enumerate(edges) if i % every == 0]
    lines = [((value - edges[0]) / (edges[-1] - edges[0]), label) for value, label in marks if edges[0] <= value <= edges[-1]]
    return _bars(counts, names, ticks, unit, title, lines)


def bars(counts: dict[str, int], unit: str, title: str) -> str:
    """An SVG of one bar per name, in the order given."""
    names = list(counts)
    ticks = [((i + 0.5) / len(names), name) for i, name in enumerate(names)]
    return _bars(list(counts.values()), names, ticks, unit, title, [])


def waveform(envelope: Sequence[float]) -> str:
    """A small SVG of a song's peaks, 0 to 1, mirrored as audio programs draw them."""
    if not envelope:
        return ""
    top = " ".join(f"{i},{20 - 19 * v:.1f}" for i, v in enumerate(envelope))
    bottom = " ".join(f"{i},{20 + 19 * v:.1f}" for i, v in reversed(list(enumerate(envelope))))
    return f'<svg class="wave" viewBox="0 0 {len(envelope)} 40" preserveAspectRatio="none" aria-hidden="true"><polygon points="{top} {bottom}"/></svg>'


def _bars(counts: Sequence[int], names: Sequence[str], ticks: Sequence[tuple[float, str]], unit: str, title: str, marks: Sequence[tuple[float, str]]) -> str:
    wide, high = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    most = max(counts)
    step = max(_round_step(most / 4), 1)
    top = math.ceil(most / step) * step
    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for level in range(0, int(top) + 1, int(step)):
        y = _TOP + high * (1 - level / top)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 5}" y="{y + 3.5:.1f}">{level}</text>')
    each = wide / len(counts)
    gap = min(each * 0.12, 6)
    for i, (count, name) in enumerate(zip(counts, names, strict=True)):
        tall = high * count / top
        if count:
            place = f'x="{_LEFT + i * each + gap / 2:.1f}" y="{_TOP + high - tall:.1f}" width="{max(min(each - gap, 60), 1):.1f}" height="{tall:.1f}"'
            parts.append(f'<rect class="bar" {_centred(place, each, gap)} rx="1.5"><title>{escape(name)}: {count}</title></rect>')
    for share, label in marks:
        x = _LEFT + share * wide
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + high}"/>')
        side = "end" if share > 0.6 else "start"
        parts.append(f'<text class="mark" x="{x + (-4 if side == "end" else 4):.1f}" y="{_TOP + 9}" text-anchor="{side}">{escape(label)}</text>')
    for share, label in ticks:
        side = ' style="text-anchor: end"' if share > 0.97 else ""
        parts.append(f'<text class="x" x="{_LEFT + share * wide:.1f}" y="{HEIGHT - _BOTTOM + 15}"{side}>{escape(label)}</text>')
    parts.append(f'<text class="x unit" x="{_LEFT + wide / 2:.1f}" y="{HEIGHT - 4}">{escape(unit)}</text></svg>')
    return "".join(parts)


def _centred(place: str, each: float, gap: float) -> str:
    """Bars wider than 60 are cut to it; they stay over the middle of their place."""
    spare = each - gap - 60
    return f'{place} transform="translate({spare / 2:.1f} 0)"' if spare > 0 else place


def _round_step(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.999)
