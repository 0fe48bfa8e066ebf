"""`inspect`: what an adapter file is, who wrote it, how strongly each program applies it, what it changes."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sidestep.adapters.adapter import MAGNITUDE, Factors, change_of, kronecker_factor, not_finite, rotation
from sidestep.adapters.names import ORDER, parts
from sidestep.adapters.programs import applied_by_each
from sidestep.adapters.read import Found, find_adapter
from sidestep.events import Notice, Report, Table
from sidestep.settings.config import InspectConfig

BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; plain values, ready for JSON.

    strength: least and greatest alpha / rank that the file states. targets: how many modules of each projection. norms:
    Frobenius norm of the change of each module. not_finite: modules that are not usable. notes: what was left
    out. metadata: our own header.
    """

    path: str
    kind: str
    format: str
    program: str
    modules: int
    parameters: int
    dtypes: list[str]
    ranks: list[int]
    alphas: list[float]
    strength: list[float]
    targets: dict[str, int]
    programs: dict[str, dict]
    norms: dict[str, float]
    not_finite: list[str]
    notes: list[str]
    metadata: dict


def inspect_adapter(config: InspectConfig, report: Report) -> Inspection:
    """Read an adapter and report it as tables (not with `--json`). Raises UserError for a file that is none."""
    found = find_adapter(config.path)
    adapter = found.adapter()
    applied = applied_by_each(found)
    scales = {name: found.scale(name) for name in found.modules}
    tensors = [tensor for factors in found.modules.values() for tensor in factors.values()]
    alphas = {round(scale * found.ranks[name], 6) for name, scale in scales.items()} if found.kind != "oft" else ()
    norms = {name: norm_of(factors) for name, factors in adapter.modules.items()}
    bad = set(not_finite(adapter))  # products may overflow where no factor does
    broken = [name for name in adapter.modules if name in bad or not math.isfinite(norms[name])]
    result = Inspection(
        path=found.path.as_posix(),
        kind=adapter.title,
        format=found.format,
        program=written_by(found),
        modules=len(found.modules),
        parameters=sum(tensor.numel() for tensor in tensors),
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        ranks=sorted(set(adapter.ranks.values())),
        alphas=sorted(alphas),
        strength=[min(scales.values()), max(scales.values())],
        targets=dict(Counter(".".join(parts(name)[1:]) for name in found.modules)),
        programs={a.program: {"strength": list(a.strength) if a.strength else None, "note": a.note} for a in applied},
        norms={name: round(norm, 6) for name, norm in norms.items() if name not in broken},
        not_finite=broken,
        notes=list(adapter.notes),
        metadata=found.metadata,
    )
    if not config.json:
        _show(result, [(a.program, str(a), a.note) for a in applied], report)
    return result


def norm_of(factors: Factors) -> float:
    """Frobenius norm of the plain change, without forming it where that can be helped.

    Of an OFT: of the rotation's distance from the identity.
    """
    f = {name: tensor.double() for name, tensor in factors.items() if name != MAGNITUDE}
    if "lora_A" in f:  # |B·A|² is the sum of (BᵀB) ∘ (A·Aᵀ), two matrices of the rank's size
        return (f["lora_B"].T @ f["lora_B"] * (f["lora_A"] @ f["lora_A"].T)).sum().clamp_min(0).sqrt().item()
    if "oft_R" in f:
        rotated = rotation(factors["oft_R"])
        return torch.linalg.norm(rotated - torch.eye(len(rotated))).item()
    if "hada_w1_a" in f:
        return torch.linalg.norm(change_of(factors)).item()
    return math.prod(torch.linalg.norm(kronecker_factor(f, part)).item() for part in ("lokr_w1", "lokr_w2"))


def written_by(found: Found) -> str:
    """The program that wrote a file, as far as it says."""
    if isinstance(found.metadata.get("program"), str):
        return found.metadata["program"]
    software = found.header.get("software", "")
    if "ai-toolkit" in software or "ostris" in software:
        return "ai-toolkit"
    if any(name.startswith("ss_") for name in found.header):
        return "kohya's sd-scripts, or one like it"
    if found.config.get("peft_version") and found.format == "peft":
        return f"peft {found.config['peft_version']}"
    return {"lycoris": "LyCORIS", "diffusers": "diffusers", "peft": "peft"}.get(found.format, "unknown")


def _show(result: Inspection, applied: list[tuple[str, str, str]], report: Report) -> None:
    """Report an inspection as tables, with what is wrong at the end."""
    bad, metadata = result.not_finite, result.metadata
    finite = f"{len(bad)} modules hold numbers that are not finite" if bad else "all numbers are finite"
    known = {"base_model": "base", "tag": "trigger tag", "songs": "songs", "config_fingerprint": "fingerprint"}
    rows = [
        ("file", result.path),
        ("kind", f"{result.kind}, written as {result.format} by {result.program}"),
        ("size", f"{result.parameters:,} parameters in {result.modules} modules, {', '.join(result.dtypes)}"),
        ("rank", _span(result.ranks)),
        ("alpha", _span(result.alphas)),
        ("strength", f"{_span(result.strength)} (alpha / rank)"),
        ("targets", ", ".join(f"{name} ×{count}" for name, count in sorted(result.targets.items()))),
        ("NaN check", finite),
        *((title, str(metadata[name])[:100]) for name, title in known.items() if metadata.get(name)),
    ]
    report(Table(title=Path(result.path).name, columns=("", ""), rows=tuple(rows)))
    title = "Strength in each program (1: as the file states)"
    report(Table(title=title, columns=("program", "strength", "why"), rows=tuple(applied)))
    if result.norms:
        cells = {parts(name): norm for name, norm in result.norms.items()}
        ordered = [column for column in ORDER if any(key[1:] == column for key in cells)]
        greatest = max(cells.values()) or 1.0
        lines = []
        for layer in sorted({key[0] for key in cells}):
            found = [cells.get((layer, *column)) for column in ordered]
            shown = ("·" if n is None else f"{BLOCKS[min(int(n / greatest * 8), 7)]} {n:.3g}" for n in found)
            lines.append((str(layer), *shown))
        titles = (f"{part.removesuffix('_attn')} {projection.removesuffix('_proj')}" for part, projection in ordered)
        report(Table(title="Norm of the change", columns=("layer", *titles), rows=tuple(lines)))
    for note in result.notes:
        report(Notice(message=note, level="warning"))
    if bad:
        report(Notice(message=f"Not usable: numbers that are not finite, first in {bad[0]}.", level="error"))
    elif not any(result.norms.values()):
        report(Notice(message="This adapter changes nothing: all its products are zero.", level="warning"))


def _span(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{values[0]:g}" if values[0] == values[-1] else f"{values[0]:g} to {values[-1]:g}"
