"""`inspect`: what an adapter file is, who wrote it, how strongly each program applies it, where it changes the model."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from sidestep.adapters.adapter import MAGNITUDE, Factors, change_of, not_finite, rotation, shape_of, whole
from sidestep.adapters.names import ATTENTION_PROJECTIONS, ATTENTIONS, MLP_PROJECTIONS, parts
from sidestep.adapters.read import Found, find_adapter, read_tensors
from sidestep.adapters.write import applied_by_each
from sidestep.events import Notice, Report, Table
from sidestep.settings.config import InspectConfig

BLOCKS = "▁▂▃▄▅▆▇█"
COLUMNS = [(part, projection) for part in ATTENTIONS for projection in ATTENTION_PROJECTIONS] + [
    ("mlp", projection) for projection in MLP_PROJECTIONS
]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; plain values, ready for JSON."""

    path: str
    kind: str
    format: str
    program: str
    modules: int
    parameters: int
    numbers: list[str]
    ranks: list[int]
    alphas: list[float]
    strength: list[float]  # least and greatest alpha / rank that the file states
    targets: dict[str, int]  # how many modules of each projection
    programs: dict[str, dict]
    norms: dict[str, float]  # Frobenius norm of the change of each module
    not_finite: list[str]
    facts: dict


def inspect_adapter(config: InspectConfig, report: Report) -> Inspection:
    """Look at an adapter and report it as tables (not with `--json`). Raises UserError for a file that is none."""
    found = find_adapter(config.path)
    keys = sorted(read_tensors(found.path)[0])
    adapter = found.adapter()
    applied = applied_by_each(found, keys)
    scales = {name: found.scale(name) for name in found.modules}
    norms = {name: norm_of(factors) for name, factors in adapter.modules.items()}
    bad = set(not_finite(adapter))
    broken = [
        name for name in adapter.modules if name in bad or not math.isfinite(norms[name])
    ]  # or products that overflow
    result = Inspection(
        path=found.path.as_posix(),
        kind=adapter.title,
        format=found.format,
        program=written_by(found),
        modules=len(found.modules),
        parameters=sum(tensor.numel() for factors in found.modules.values() for tensor in factors.values()),
        numbers=sorted(
            {
                str(tensor.dtype).removeprefix("torch.")
                for factors in found.modules.values()
                for tensor in factors.values()
            }
        ),
        ranks=sorted(set(found.ranks.values())),
        alphas=sorted({round(scale * found.ranks[name], 6) for name, scale in scales.items()})
        if found.kind != "oft"
        else [],
        strength=[min(scales.values()), max(scales.values())],
        targets=dict(Counter(".".join(parts(name)[1:]) for name in found.modules)),
        programs={a.program: {"strength": list(a.strength) if a.strength else None, "note": a.note} for a in applied},
        norms={name: round(norm, 6) for name, norm in norms.items() if name not in broken},
        not_finite=broken,
        facts=found.facts,
    )
    if not config.json:
        _show(result, [(a.program, str(a), a.note) for a in applied], report)
    return result


def norm_of(factors: Factors) -> float:
    """Frobenius norm of the plain change (of OFT: of the rotation's distance from the identity), without forming it where that can be helped."""
    f = {name: tensor.double() for name, tensor in factors.items() if name != MAGNITUDE}
    if "lora_A" in f:
        return (f["lora_B"].T @ f["lora_B"] * (f["lora_A"] @ f["lora_A"].T)).sum().clamp_min(0).sqrt().item()
    if "oft_R" in f:
        width = shape_of(factors)[1]
        return torch.linalg.norm(rotation(factors["oft_R"], width) - torch.eye(width)).item()
    if "hada_w1_a" in f:
        return torch.linalg.norm(change_of(factors)).item()
    return math.prod(torch.linalg.norm(whole(f, part)).item() for part in ("lokr_w1", "lokr_w2"))


def written_by(found: Found) -> str:
    """The program that wrote a file, as far as it says."""
    if isinstance(found.facts.get("program"), str):
        return found.facts["program"]
    header = found.header
    if "ai-toolkit" in header.get("software", "") or "ostris" in header.get("software", ""):
        return "ai-toolkit"
    if any(name.startswith("ss_") for name in header):
        return "kohya's sd-scripts, or one like it"
    if found.format == "lycoris":
        return "LyCORIS"
    if found.format == "diffusers":
        return "diffusers"
    if found.config.get("peft_version"):
        return f"peft {found.config['peft_version']}"
    return "peft" if found.format == "peft" else "unknown"


def _span(values: list) -> str:
    if not values:
        return "-"
    return f"{values[0]:g}" if values[0] == values[-1] else f"{values[0]:g} to {values[-1]:g}"


def _show(result: Inspection, applied: list[tuple[str, str, str]], report: Report) -> None:
    targets = ", ".join(f"{name} ×{count}" for name, count in sorted(result.targets.items()))
    rows = [
        ("file", result.path),
        ("kind", f"{result.kind}, written as {result.format} by {result.program}"),
        ("size", f"{result.parameters:,} parameters in {result.modules} modules, {', '.join(result.numbers)}"),
        ("rank", _span(result.ranks)),
        ("alpha", _span(result.alphas)),
        ("strength", f"{_span(result.strength)} (alpha / rank)"),
        ("targets", targets),
        (
            "NaN check",
            f"{len(result.not_finite)} modules hold numbers that are not finite"
            if result.not_finite
            else "all numbers are finite",
        ),
    ]
    known = {"base_model": "base", "tag": "trigger tag", "songs": "songs", "config_fingerprint": "fingerprint"}
    rows += [(title, str(result.facts[name])[:100]) for name, title in known.items() if result.facts.get(name)]
    report(Table(title=Path(result.path).name, columns=("", ""), rows=tuple(rows)))
    report(
        Table(
            title="Strength in each program (1: as the file states)",
            columns=("program", "strength", "why"),
            rows=tuple(applied),
        )
    )
    if result.norms:
        report(_heat_map(result.norms))
    if result.not_finite:
        report(
            Notice(message=f"Not usable: numbers that are not finite, first in {result.not_finite[0]}.", level="error")
        )
    elif not any(result.norms.values()):
        report(Notice(message="This adapter changes nothing: all its products are zero.", level="warning"))


def _heat_map(norms: dict[str, float]) -> Table:
    """Norm of the change, layers × projections."""
    cells = {parts(name): norm for name, norm in norms.items()}
    columns = [column for column in COLUMNS if any((part, projection) == column for _, part, projection in cells)]
    greatest = max(norms.values()) or 1.0

    def cell(layer: int, column: tuple[str, str]) -> str:
        norm = cells.get((layer, *column))
        return "·" if norm is None else f"{BLOCKS[min(int(norm / greatest * 8), 7)]} {norm:.3g}"

    layers = sorted({layer for layer, _, _ in cells})
    titles = tuple(f"{part.removesuffix('_attn')} {projection.removesuffix('_proj')}" for part, projection in columns)
    return Table(
        title="Norm of the change",
        columns=("layer", *titles),
        rows=tuple((str(layer), *(cell(layer, column) for column in columns)) for layer in layers),
    )
