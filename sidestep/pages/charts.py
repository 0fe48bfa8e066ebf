"""What the charts of a page show, from values to places in their pictures; charts.j2 draws them as SVG and tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sidestep.adapters.names import ORDER, parts, to_original

Value = TypeVar("Value")
WIDTH, HEIGHT = 460, 198  # of a bar chart, around the frame that these margins leave
LEFT, RIGHT, TOP, BOTTOM = 38, 8, 10, 44
LABEL = 14  # more room at the top, for the labels of limits
WIDEST_BAR = 60
LONGEST_TICK, LETTER = 14, 9  # letters of a label below a chart, and the width of one where the chart is smallest


def histogram(values: Sequence[float], unit: str, title: str, limits: Sequence[tuple[float, str]] = ()) -> dict:
    """How often values occur, in up to about twenty round steps; `limits` are values that matter, with their labels."""
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
    lines = [((v - edges[0]) / (edges[-1] - edges[0]), label) for v, label in limits if edges[0] <= v <= edges[-1]]
    return _bar_chart(counts, names, ticks, unit, title, lines)


def bars(counts: Mapping[str, int], unit: str, title: str) -> dict:
    """One bar per name, in the order given."""
    ticks = [((i + 0.5) / len(counts), name) for i, name in enumerate(counts)]
    return _bar_chart(list(counts.values()), list(counts), ticks, unit, title, [])


def _bar_chart(
    counts: Sequence[int],
    names: Sequence[str],
    ticks: Sequence[tuple[float, str]],
    unit: str,
    title: str,
    limits: Sequence[tuple[float, str]],
) -> dict[str, Any]:
    """ticks and limits: (place from 0 to 1 across the frame, label)."""
    top = TOP + LABEL if limits else TOP
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - top - BOTTOM
    step = max(_round_step(max(counts) / 4), 1)
    most = math.ceil(max(counts) / step) * step
    each = wide / len(counts)
    gap = min(each * 0.12, 6)
    thick = max(min(each - gap, WIDEST_BAR), 1)
    return {
        "title": title,
        "unit": unit,
        "width": WIDTH,
        "height": HEIGHT,
        "frame": {"left": LEFT, "right": WIDTH - RIGHT, "top": top, "bottom": top + high},
        "levels": [(top + high * (1 - level / most), level) for level in range(0, int(most) + 1, int(step))],
        "bars": [
            {
                "x": LEFT + (i + 0.5) * each - thick / 2,
                "y": top + high * (1 - count / most),
                "width": thick,
                "height": high * count / most,
                "text": f"{name}: {count}",
            }
            for i, (count, name) in enumerate(zip(counts, names, strict=True))
            if count
        ],
        "limits": [(LEFT + share * wide, label, share > 0.6) for share, label in limits],
        "ticks": [(LEFT + share * wide, label, share > 0.97) for share, label in ticks],
    }


def _round_step(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.999)


@dataclass(frozen=True)
class Interval:
    """A figure of something, and the ends of its interval. group: what it is of, such as a checkpoint."""

    group: str
    name: str
    value: float
    low: float
    high: float
    marked: bool = False


def intervals(found: Sequence[Interval], title: str, unit: str = "", reference: float | None = None) -> dict[str, Any]:
    """A dot with its interval for each figure, those of one group beside each other; `reference`: a line across."""
    left, wide, high = 56, WIDTH - 56 - RIGHT, HEIGHT - TOP - BOTTOM
    groups = list(dict.fromkeys(one.group for one in found))
    ends = [end for one in found for end in (one.low, one.high)] + ([] if reference is None else [reference])
    step = _round_step((max(ends) - min(ends)) / 4)
    bottom = math.floor(min(ends) / step)
    top = max(math.ceil(max(ends) / step), bottom + 1)
    each = wide / len(groups)
    most = max(sum(one.group == group for one in found) for group in groups)
    beside = min(0.8 * each / most, 18)

    def y(value: float) -> float:
        return TOP + high * (top - value / step) / (top - bottom)

    dots, place = [], dict.fromkeys(groups, 0)
    for one in found:
        middle = left + (groups.index(one.group) + 0.5) * each
        x = middle + (place[one.group] - (sum(other.group == one.group for other in found) - 1) / 2) * beside
        place[one.group] += 1
        text = f"{one.name}: {one.value:.3g}{unit} ({one.low:.3g} to {one.high:.3g})"
        dots.append({"x": x, "y": y(one.value), "low": y(one.low), "high": y(one.high), "text": text})
        dots[-1]["marked"] = one.marked
    labels = [group if len(group) <= LONGEST_TICK else group[: LONGEST_TICK - 1] + "…" for group in groups]
    room = LETTER * max(map(len, labels)) + 12
    every = max(math.ceil(room / each), 1)
    ticks = [(left + (n + 0.5) * each, label) for n, label in enumerate(labels) if n % every == 0]
    half = (room - 12) / 2
    return {
        "title": title,
        "width": WIDTH,
        "height": HEIGHT - 16,
        "frame": {"left": left, "right": WIDTH - RIGHT, "top": TOP, "bottom": TOP + high},
        "levels": [(y(n * step), f"{n * step:.6g}") for n in range(bottom, top + 1)],
        "dots": dots,
        "ticks": [(x, label) for x, label in ticks if x + half <= WIDTH],
        "reference": None if reference is None else y(reference),
    }


def waveform(envelope: Sequence[float]) -> str:
    """A song's peaks, 0 to 1, mirrored as audio programs draw them: the points of a polygon 40 high."""
    top = [f"{i},{20 - 19 * v:.1f}" for i, v in enumerate(envelope)]
    bottom = [f"{i},{20 + 19 * v:.1f}" for i, v in enumerate(envelope)]
    return " ".join(top + bottom[::-1])


def by_layer(values: Mapping[str, Value]) -> tuple[list[str], list[tuple[int, list[Value | None]]]]:
    """Modules as a table: (labels of the projections in model order, (layer, value in each column) of each layer).

    values: by the modules' original or diffusers' names. None where a layer has no such module.
    """
    places = {parts(to_original(name)): value for name, value in values.items()}
    columns = [column for column in ORDER if any(place[1:] == column for place in places)]
    labels = [f"{part.removesuffix('_attn')} {projection.removesuffix('_proj')}" for part, projection in columns]
    layers = sorted({layer for layer, _, _ in places})
    return labels, [(layer, [places.get((layer, *column)) for column in columns]) for layer in layers]


def spectra(curves: Mapping[str, tuple[str, Sequence[float], Sequence[float]]]) -> dict[str, Any] | None:
    """Energy of each direction of some modules' gradients, over six powers of ten. None where there is nothing to draw.

    curves: projection → (module, σ² measured, σ² confirmed).
    """
    values = [value for _, measured, _ in curves.values() for value in measured if value > 0]
    if not values:
        return None
    width, height, left, right, bottom = 640, 290, 56, 140, 34
    high = math.ceil(math.log10(max(values)))
    low = high - 6
    longest = max(len(measured) for _, measured, _ in curves.values())

    def points(energies: Sequence[float]) -> str:
        return " ".join(
            f"{left + i * (width - left - right) / max(1, longest - 1):.1f},"
            f"{10 + (high - math.log10(value)) / (high - low) * (height - 10 - bottom):.1f}"
            for i, value in enumerate(energies)
            if value > 10**low
        )

    return {
        "width": width,
        "height": height,
        "frame": {"left": left, "right": width - right, "bottom": height - bottom},
        "longest": longest,
        "levels": [(14 + i * (height - 10 - bottom) / 3, f"1e{high - 2 * i}") for i in range(4)],
        "curves": [
            {
                "module": module,
                "column": column,
                "hue": round(360 * i / len(curves)),
                "measured": points(measured),
                "confirmed": points(confirmed),
                "y": 22 + 23 * i,
            }
            for i, (column, (module, measured, confirmed)) in enumerate(curves.items())
        ],
    }


def budget_curve(curve: Sequence[tuple[int, float]], spent: int) -> dict[str, Any]:
    """Share of the energy that a budget captures, and the point of what was spent. curve: (parameters, share)."""
    width, height, left, right, bottom = 640, 220, 74, 20, 34
    most = max([parameters for parameters, _ in curve] + [spent, 1])

    def at(parameters: int, share: float) -> tuple[float, float]:
        return left + parameters / most * (width - left - right), 10 + (1 - share) * (height - 10 - bottom)

    own = dict(curve).get(spent, 0.0)
    return {
        "width": width,
        "height": height,
        "frame": {"left": left, "right": width - right, "bottom": height - bottom},
        "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(p, s) for p, s in ((0, 0.0), *sorted(set(curve))))),
        "spent": at(spent, own),
        "share": own,
        "most": most,
    }
