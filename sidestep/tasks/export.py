"""`export`: an adapter for another program, alone, combined with others, or merged into the base."""

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from sidestep import __version__
from sidestep.acestep.layout import find_layout, read_config
from sidestep.acestep.lm.model import PREFIX as LM_PREFIX
from sidestep.acestep.lm.model import choose_language_model, size_of
from sidestep.acestep.weights import CPU, Weights
from sidestep.adapters.adapter import Adapter, cast, combined, not_finite, with_strength
from sidestep.adapters.merge import BaseWeights, merge_file
from sidestep.adapters.read import (
    DIFFUSERS_WEIGHTS,
    HEADER,
    LOHA_WEIGHTS,
    LOKR_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    adapter_file,
    read_adapter,
)
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
from sidestep.files import bring_back, expand, put_in_place, remove, write_text
from sidestep.settings.config import ExportConfig
from sidestep.words import gib, side_step

# What each format calls its file in a folder that is given; the folder for every program has several.
FILE_NAMES = {"comfyui": "comfyui.safetensors", "diffusers": DIFFUSERS_WEIGHTS, "lycoris": "lycoris.safetensors"}
ADAPTER_WEIGHTS = {PEFT_WEIGHTS, LOKR_WEIGHTS, LOHA_WEIGHTS, *FILE_NAMES.values()}
DTYPES = {"keep": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Base:
    """A base model on disk: its weight files, and the folder (or single file) that they are a part of."""

    root: Path
    files: list[Path]


def export(config: ExportConfig, report: Report) -> Path:
    """Write the adapter of `config` and return where it is.

    Raises UserError for what cannot be done, JobError for a broken adapter.
    """
    sources = [(config.adapter, config.strength), *map(_path_and_strength, config.add)]
    adapters = []
    for path, strength in sources:
        adapter = read_adapter(path)
        bad = not_finite(adapter)
        if bad:
            raise JobError(
                f"{path}: holds numbers that are not finite in {len(bad)} modules, first in {bad[0]}.",
                "Use another checkpoint of that run.",
            )
        for note in adapter.remarks if config.format == "merged" else adapter.notes:
            report(Notice(message=note, level="warning"))
        adapters.append((adapter, strength))
    if config.format == "merged-lm":
        return _merge_language(config, adapters, report)
    base = None
    if config.base is None:
        if config.format == "merged":
            problem = "--format merged needs the base that the adapter is merged into."
            raise UserError(problem, "Add --base CHECKPOINT_DIR --model-variant NAME")
    elif config.base.is_file():
        base = Base(config.base, [config.base])
    else:
        layout = find_layout(config.base, config.model_variant)
        base = Base(layout.folder, Weights(layout.part("transformer")).files)
    target = _target(config, adapters[0][0].kind, [adapter_file(path) for path, _ in sources], base)
    if base and config.format == "merged":
        _merge(config, adapters, base, target, report)
        return target
    adapter = cast(combined([with_strength(*pair) for pair in adapters]), DTYPES[config.dtype])
    weights = BaseWeights(base.files) if base else None
    if weights:
        weights.check(adapter)
    if config.format == "peft" and weights and needs_placeholder(adapter) and adapter.placeholder is None:
        layer = weights(PLACEHOLDER)
        adapter = with_placeholder(adapter, (layer.shape[0], layer.shape[1]), lambda: layer)
    card = Card.of(adapter)
    with _appearing(target) as temporary:
        match config.format:
            case "comfyui":
                save_comfyui(adapter, temporary, card, weights)
            case "diffusers":
                save_diffusers(adapter, temporary, card)
            case "lycoris":
                save_lycoris(adapter, temporary, card)
            case _:
                save_folder(adapter, temporary, card)
    if config.dtype in ("fp16", "bf16"):
        report(Notice(message=f"Stored in {config.dtype}: the strength may differ by rounding from what was trained."))
    if config.format == "peft" and adapter.has_magnitudes:
        message = (
            "ComfyUI ignores DoRA's magnitudes in this form; for ComfyUI use --format comfyui --base CHECKPOINT_DIR."
        )
        report(Notice(message=message, level="warning"))
    report(Saved(what=f"{adapter.title} for {config.format}", path=str(target)))
    return target


def _path_and_strength(text: str) -> tuple[Path, float]:
    """`OTHER` or `OTHER:0.5`; a colon that belongs to the path (a drive, a name that exists) stays in it."""
    path, _, strength = text.rpartition(":")
    try:
        value = float(strength) if path and not expand(text).exists() else None
    except ValueError:
        value = None
    if value is None:
        return expand(text), 1.0
    if not abs(value) <= 1000:
        raise UserError(f"--add {text}: {strength} is no strength.", "Write it as --add FOLDER:0.5")
    return expand(path), value


def _target(config: ExportConfig, kind: str, sources: list[Path], base: Base | None) -> Path:
    """Where to write. Raises UserError rather than touch an input, or anything that is there without --overwrite."""
    where, other = f"--output {config.output}", "Choose another --output."
    name = LOKR_WEIGHTS if (config.format, kind) == ("lycoris", "lokr") else FILE_NAMES.get(config.format, "")
    merged, is_file = config.format == "merged", config.output.suffix.lower() == ".safetensors"
    single = merged and base is not None and base.root.is_file()
    if not name and is_file != single:
        form = "a file, such as merged.safetensors, because --base is one" if single else "a folder"
        raise UserError(f"{where}: --format {config.format} writes {form}.", other)
    target = config.output / name if name and not is_file else config.output
    inputs = {path.resolve() for source in sources for path in (source, source.parent)}
    root = base.root.resolve() if base else None
    if target.resolve() in inputs or (root and root in (target.resolve(), *target.resolve().parents)):
        raise UserError(f"{where}: this is one of the inputs, which are never changed.", other)
    if config.output.exists() and config.output.is_dir() == is_file:
        raise UserError(f"{where}: {'a folder, not a file' if is_file else 'a file, not a folder'}.", other)
    beside = sorted({path.name for path in target.parent.glob("*")} & ADAPTER_WEIGHTS - {name})
    if beside and target != config.output:
        raise UserError(f"{where}: {beside[0]} is there already, an adapter for other programs.", other)
    there = any(target.iterdir()) if target.is_dir() else target.exists()
    if there and (not config.overwrite or (merged and target.is_dir())):
        fix = "or remove it first." if merged else "or add --overwrite."
        raise UserError(f"{where}: there is something already.", f"Choose another --output, {fix}")
    return target


def _merge(
    config: ExportConfig, adapters: list[tuple[Adapter, float]], base: Base, target: Path, report: Report
) -> None:
    """Write the whole base with the adapters in it; `target` is there when it is complete, and not before."""
    weights = BaseWeights(base.files)
    for number, (adapter, strength) in enumerate(adapters):
        weights.check(adapter)
        placed, lost = weights.placed(adapter)
        adapters[number] = (placed, strength)
        for names, what in ((placed.outside, "is merged too"), (lost, "is lost: this base has no weight for them")):
            if names:
                which = f"what {len(names)} modules outside the decoder's attention and MLP have learned"
                report(
                    Notice(message=f"{adapter.path}: {which}, such as {next(iter(names))}, {what}.", level="warning")
                )
    is_folder = base.root.is_dir()
    others = [path for path in base.root.rglob("*") if path not in base.files and path.is_file()] if is_folder else []
    total = sum(path.stat().st_size for path in (*base.files, *others))
    needed = total * (2 if config.dtype == "fp32" else 1)
    free = shutil.disk_usage(next(parent for parent in target.absolute().parents if parent.is_dir())).free
    if free < needed:
        raise UserError(
            f"--output {target}: {gib(needed)} are needed and {gib(free)} are free.",
            "Free some space, or choose an --output on another disk.",
        )
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        message = f"Left by a merge that was killed, or still running: {leftover}. If none is running, delete it."
        report(Notice(message=message, level="warning"))
    merged = {"adapters": [{"kind": adapter.title, "strength": strength} for adapter, strength in adapters]}
    note = {HEADER: json.dumps({"program": f"Side-Step {__version__}", "merged": merged}, sort_keys=True)}
    done = 0

    def advance(what: str, size: int) -> None:
        nonlocal done
        done += size
        report(Progress(task="Merging", done=done, total=total, current=what, unit="bytes"))

    with _appearing(target) as temporary:
        for path in (*base.files, *others):
            copy = temporary / path.relative_to(base.root) if is_folder else temporary
            before = done
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path in base.files:
                merge_file(path, copy, adapters, DTYPES[config.dtype], note, advance)
            else:
                shutil.copyfile(path, copy)
                if copy.name.endswith(".safetensors.index.json"):
                    _correct_index(copy)
            with copy.open("rb+") as written:
                os.fsync(written.fileno())
            advance(path.name, path.stat().st_size - (done - before))  # of a weight file that is its header
    report(Saved(what="merged base", path=str(target)))
    if target.is_dir():
        place = target.parent
        if not (target / "vae").is_dir() and not (place / "vae").is_dir():
            place = base.root.parent
            message = f"To use it, put it beside the vae and the text encoder: move it into {place}."
            report(Notice(message=message, level="warning"))
        words = ("--checkpoint-dir", str(place), "--model-variant", target.name, "--prompt", "…")
        command = side_step("sample", *words)
        report(Finished(message=f"Merged into a checkpoint of {gib(total, digits=2)}.", next_commands=(command,)))


def _merge_language(config: ExportConfig, adapters: list[tuple[Adapter, float]], report: Report) -> Path:
    """Write the language model with the adapters in it as the folder that every program finds by its name.

    `acestep-5Hz-lm-{size}-{name}`, names of tensors with `model.`, the tokenizer's files as they are.
    """
    if config.base is None:
        raise UserError("--format merged-lm needs the language model itself.", "Add --base CHECKPOINT_DIR")
    trained_on = str(adapters[0][0].metadata.get("base_model", ""))
    wanted = trained_on if config.lm == "auto" and trained_on else config.lm
    folder = choose_language_model(find_layout(config.base, config.model_variant), wanted)
    name, beginning = config.output.name, f"{LM_PREFIX}{size_of(folder)}-"
    target = config.output.with_name(name if name.startswith(beginning) else beginning + name)
    if target.exists():
        raise UserError(f"--output {target}: there is something already.", "Choose another --output, or remove it.")
    weights = Weights(folder)
    changes: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for adapter, strength in adapters:
        if adapter.kind != "lora" or adapter.has_magnitudes:
            raise UserError(f"--format merged-lm: {adapter.title} is no adapter of `train-lm`.", "Give a LoRA of it.")
        for module, factors in adapter.modules.items():
            shape = (factors["lora_B"].shape[0], factors["lora_A"].shape[1])
            if weights.shapes.get(f"model.{module}.weight", weights.shapes.get(f"{module}.weight")) != shape:
                raise UserError(
                    f"{adapter.path}: {module} is made for a weight of shape {list(shape)}, which {folder.name} "
                    "has not.",
                    f"Name the model that it was trained on: --lm {trained_on or '0.6B'}",
                )
            changes.setdefault(module, []).append((strength * factors["lora_B"].float(), factors["lora_A"].float()))
    tensors = {}
    for key in (key for key in weights.shapes if key != "lm_head.weight"):
        (tensor,) = (tensor for _, tensor in weights.read([key], None, CPU))
        module = key.removeprefix("model.").removesuffix(".weight")
        dtype = DTYPES[config.dtype] or tensor.dtype
        for up, down in changes.get(module, ()):
            tensor = tensor.float() + up @ down
        tensors["model." + key.removeprefix("model.")] = tensor.to(dtype).contiguous()
        report(Progress(task="Merging", done=len(tensors), total=len(weights.shapes), current=key))
    settings = read_config(folder / "config.json") | {"architectures": ["Qwen3ForCausalLM"]}
    others = [path for path in folder.iterdir() if path.is_file() and path not in weights.files]
    with _appearing(target) as temporary:
        temporary.mkdir()
        for path in others:
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, temporary / path.name)
        write_text(temporary / "config.json", json.dumps(settings, indent=2) + "\n")
        save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
    report(Saved(what="merged language model", path=str(target)))
    place = config.base if config.base.is_dir() else config.base.parent
    report(Finished(message=f"Put it beside the other models, into {place}: programs find it by its name."))
    return target


def _correct_index(index: Path) -> None:
    """Give a shard index the total size that its files have now. An index that says none is left alone."""
    try:
        said = json.loads(index.read_text(encoding="utf-8"))
        shards = {index.parent / Path(str(name)).name for name in said["weight_map"].values()}
        if "total_size" in (said.get("metadata") or {}):
            headers = {shard: 8 + int.from_bytes(shard.open("rb").read(8), "little") for shard in shards}
            said["metadata"]["total_size"] = sum(shard.stat().st_size - size for shard, size in headers.items())
            index.write_text(json.dumps(said, indent=2), encoding="utf-8")
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise JobError(
            f"{index.name}: the index of the base cannot be read ({error}).", "Download the checkpoint again."
        ) from None


@contextmanager
def _appearing(target: Path) -> Generator[Path]:
    """A temporary path beside `target` that becomes it when the block ends well, and is removed when it does not.

    It may become a file or a folder. What in a folder that was there is no adapter's is in the new one too. Raises
    JobError for a disk that is full or cannot be written.
    """
    target = target.resolve()  # a link stays one
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        remove(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        bring_back(target)
        yield temporary
        if target.is_dir():
            own = ADAPTER_WEIGHTS | {PEFT_CONFIG} | {path.name for path in temporary.iterdir()}

            def replaced(folder: str, _names: list[str]) -> set[str]:
                return own if Path(folder) == target else set()

            def link(source: str, name: str) -> None:
                try:
                    Path(name).hardlink_to(source)
                except OSError:  # the disk has no links
                    shutil.copy2(source, name)

            shutil.copytree(target, temporary, symlinks=True, ignore=replaced, copy_function=link, dirs_exist_ok=True)
        put_in_place(temporary, target)
    except OSError as error:
        raise JobError(
            f"{target}: could not be written ({error.strerror or error}).",
            "Free some space or choose another --output.",
        ) from None
    finally:
        with suppress(OSError):  # it was never made
            remove(temporary)
