"""`export`: an adapter for another program, alone, combined with others, or merged into the base."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sidestep import __version__
from sidestep.acestep.layout import find_layout
from sidestep.acestep.weights import Weights
from sidestep.adapters.adapter import Adapter, cast, combined, not_finite, with_strength
from sidestep.adapters.merge import BaseWeights, merge_file
from sidestep.adapters.read import DIFFUSERS_WEIGHTS, HEADER, LOKR_WEIGHTS, adapter_file, read_adapter
from sidestep.adapters.write import (
    PLACEHOLDER,
    Card,
    needs_placeholder,
    save_comfyui,
    save_diffusers,
    save_folder,
    save_lycoris,
    with_placeholder,
)
from sidestep.errors import JobError, UserError
from sidestep.events import Finished, Notice, Progress, Report, Saved
from sidestep.settings.config import ExportConfig
from sidestep.words import gib

DTYPES = {"keep": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WRITERS: dict[str, Callable] = {"comfyui": save_comfyui, "diffusers": save_diffusers, "lycoris": save_lycoris}


@dataclass(frozen=True)
class Base:
    """A base model on disk: its weight files, and the folder (or single file) that they are a part of."""

    root: Path
    files: list[Path]


def export(config: ExportConfig, report: Report) -> Path:
    """Write the adapter of `config` and return where it is. Raises UserError for what cannot be done, JobError for a broken adapter."""
    parts = [(config.adapter, config.strength), *(_with_strength(text) for text in config.add)]
    adapters = [(read_adapter(path), strength) for path, strength in parts]
    for (path, _), (adapter, _) in zip(parts, adapters, strict=True):
        bad = not_finite(adapter)
        if bad:
            raise JobError(
                f"{path}: holds numbers that are not finite in {len(bad)} modules, first in {bad[0]}.",
                "Use another checkpoint of that run.",
            )
    base = _base(config)
    target = _target(config, adapters[0][0], [adapter_file(path) for path, _ in parts], base)
    if config.format == "merged":
        _merge(config, adapters, base, target, report)
        return target
    adapter = cast(combined([with_strength(adapter, strength) for adapter, strength in adapters]), DTYPES[config.dtype])
    if base:
        BaseWeights(base.files).check(adapter)
    card = Card(
        name=str(adapter.facts.get("name", "")),
        base_model=str(adapter.facts.get("base_model", "")),
        tag=str(adapter.facts.get("tag", "")),
    )
    if config.format == "peft":
        if needs_placeholder(adapter) and adapter.placeholder is None and base:
            adapter = with_placeholder(adapter, _layer(BaseWeights(base.files)(PLACEHOLDER)))
        save_folder(adapter, target, card)
    elif config.format == "comfyui":
        save_comfyui(adapter, target, card, BaseWeights(base.files) if base else None)
    else:
        WRITERS[config.format](adapter, target, card)
    _say_what_is_lost(config, adapter, report)
    report(Saved(what=f"{adapter.title} for {config.format}", path=str(target)))
    return target


def _with_strength(text: str) -> tuple[Path, float]:
    """`OTHER` or `OTHER:0.5`; a colon that belongs to the path (a drive, a name that exists) stays in it."""
    path, colon, strength = text.rpartition(":")
    if not colon or not path or Path(text).expanduser().exists():
        return Path(text).expanduser(), 1.0
    try:
        value = float(strength)
    except ValueError:
        return Path(text).expanduser(), 1.0
    if not abs(value) <= 1000:
        raise UserError(f"--add {text}: {strength} is no strength.", "Write it as --add FOLDER:0.5")
    return Path(path).expanduser(), value


def _base(config: ExportConfig) -> Base | None:
    if config.base is None:
        if config.format == "merged":
            raise UserError(
                "--format merged needs the base that the adapter is merged into.",
                "Add --base CHECKPOINT_DIR --model-variant NAME",
            )
        return None
    if config.base.is_file():
        return Base(config.base, [config.base])
    layout = find_layout(config.base, config.model_variant)
    return Base(layout.folder, Weights(layout.part("transformer")).files)


def _target(config: ExportConfig, adapter: Adapter, sources: list[Path], base: Base | None) -> Path:
    """Where to write. Raises UserError rather than touch an input, or anything that stands there without --overwrite."""
    is_file = config.output.suffix.lower() == ".safetensors"
    if config.format in WRITERS:
        name = {
            "comfyui": "comfyui.safetensors",
            "diffusers": DIFFUSERS_WEIGHTS,
            "lycoris": LOKR_WEIGHTS if adapter.kind == "lokr" else "lycoris.safetensors",
        }
        target = config.output if is_file else config.output / name[config.format]
    else:
        target = config.output
        wants_file = config.format == "merged" and base is not None and base.root.is_file()
        if is_file != wants_file:
            kind = "a file, such as merged.safetensors, because --base is one" if wants_file else "a folder"
            raise UserError(
                f"--output {config.output}: --format {config.format} writes {kind}.", "Choose another --output."
            )
    inputs = {path.resolve() for source in sources for path in (source, source.parent)} | (
        {base.root.resolve()} if base else set()
    )
    where = target.resolve()
    if where in inputs or (base and base.root.is_dir() and base.root.resolve() in where.parents):
        raise UserError(
            f"--output {config.output}: this is one of the inputs, which are never changed.", "Choose another --output."
        )
    occupied = (
        target.is_file()
        or (target.is_dir() and any(target.iterdir()))
        or (config.format in WRITERS and target.is_dir())
    )
    if occupied and (not config.overwrite or (config.format == "merged" and target.is_dir())):
        fix = (
            "Choose another --output, or remove it first."
            if config.format == "merged"
            else "Choose another --output, or add --overwrite."
        )
        raise UserError(f"--output {config.output}: there is something already.", fix)
    return target


def _say_what_is_lost(config: ExportConfig, adapter: Adapter, report: Report) -> None:
    if config.dtype in ("fp16", "bf16"):
        report(Notice(message=f"Stored in {config.dtype}: the strength may differ by rounding from what was trained."))
    if config.format == "peft" and adapter.has_magnitudes:
        report(
            Notice(
                message="ComfyUI ignores DoRA's magnitudes in this form; for ComfyUI use --format comfyui --base CHECKPOINT_DIR.",
                level="warning",
            )
        )


def _layer(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _merge(
    config: ExportConfig, adapters: list[tuple[Adapter, float]], base: Base, target: Path, report: Report
) -> None:
    """Write the whole base with the adapters in it; `target` is there when it is complete, and not before."""
    weights = BaseWeights(base.files)
    for adapter, _ in adapters:
        weights.check(adapter)
    others = (
        []
        if base.root.is_file()
        else [Path(folder) / name for folder, _, names in os.walk(base.root) for name in names]
    )
    others = [path for path in others if path not in base.files and path.is_file()]
    total = sum(path.stat().st_size for path in (*base.files, *others))
    _check_space(target, total * (2 if config.dtype == "fp32" else 1))
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        report(
            Notice(
                message=f"Left by a merge that was killed, or still running: {leftover}. If none is running, delete it.",
                level="warning",
            )
        )
    merged = {"adapters": [{"kind": adapter.title, "strength": strength} for adapter, strength in adapters]}
    note = {HEADER: json.dumps({"program": f"Side-Step {__version__}", "merged": merged}, sort_keys=True)}
    done = 0

    def advance(what: str, size: int) -> None:
        nonlocal done
        done += size
        report(Progress(task="Merging", done=done, total=total, current=what, unit="bytes"))

    with _appearing(target, folder=base.root.is_dir()) as temporary:
        for file in base.files:
            place = temporary / file.relative_to(base.root) if base.root.is_dir() else temporary
            place.parent.mkdir(parents=True, exist_ok=True)
            before = done
            merge_file(file, place, adapters, DTYPES[config.dtype], note, advance)
            advance(file.name, file.stat().st_size - (done - before))  # its header
            _flush(place)
        for path in others:
            place = temporary / path.relative_to(base.root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
            if place.name.endswith(".safetensors.index.json"):
                _correct_index(place)
            advance(path.name, path.stat().st_size)
    report(Saved(what="merged base", path=str(target)))
    if target.is_dir():
        command = f"uv run train.py sample --checkpoint-dir {target.parent} --model-variant {target.name} --prompt '…'"
        missing = [name for name in ("vae",) if not (target / name).is_dir() and not (target.parent / name).is_dir()]
        if missing:
            report(
                Notice(
                    message=f"To use it, put it beside the vae and the text encoder: move it into {base.root.parent}.",
                    level="warning",
                )
            )
        report(Finished(message=f"Merged into a checkpoint of {gib(total, digits=2)}.", next_commands=(command,)))


def _correct_index(index: Path) -> None:
    """Give a shard index the total size that its files have now. An index that says none is left alone."""
    try:
        said = json.loads(index.read_text(encoding="utf-8"))
        shards = {index.parent / Path(str(name)).name for name in said["weight_map"].values()}
        if "total_size" in (said.get("metadata") or {}):
            said["metadata"]["total_size"] = sum(
                shard.stat().st_size - 8 - int.from_bytes(shard.open("rb").read(8), "little") for shard in shards
            )
            index.write_text(json.dumps(said, indent=2), encoding="utf-8")
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise JobError(
            f"{index.name}: the index of the base cannot be read ({error}).", "Download the checkpoint again."
        ) from None


@contextmanager
def _appearing(target: Path, folder: bool) -> Iterator[Path]:
    """A temporary path beside `target` that becomes it when the block ends well, and is removed when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.partial-{os.getpid()}"
    _remove(temporary)
    try:
        if folder:
            temporary.mkdir()
        yield temporary
        if target.is_dir():
            target.rmdir()  # empty, or it would have been refused
        os.replace(temporary, target)
    except OSError as error:
        raise JobError(
            f"{target}: could not be written ({error.strerror or error}).",
            "Free some space or choose another --output.",
        ) from None
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _check_space(target: Path, needed: int) -> None:
    folder = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"--output {target}: {gib(needed)} are needed and {gib(free)} are free.",
            "Free some space, or choose an --output on another disk.",
        )


def _flush(path: Path) -> None:
    with path.open("rb+") as opened:
        os.fsync(opened.fileno())
