"""Safetensors files read tensor by tensor, whole or sharded; what is wrong with a broken one is said plainly."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sidestep.acestep.device import give_back_memory
from sidestep.acestep.quantize import is_quantized, quantize_weight
from sidestep.errors import UserError
from sidestep.events import SECONDS_OF_SILENCE, LongTask, Report, null
from sidestep.files import state_folder, write_text

CPU = torch.device("cpu")
WEIGHT_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
ALL_IN_ONE = "model.diffusion_model."  # before the model's keys in ComfyUI's files that hold everything
READ_BYTES = 4 * 1024**2
UNKEPT_BYTES = 64 * 1024**2  # files up to this size are read in a moment


class Weights:
    """The tensors of one model folder, or of one file. Opening reads headers only; `read` touches one tensor.

    In ComfyUI's all-in-one files the model stands beside a VAE and text encoders: only the model counts, its prefix
    left away.

    Raises UserError for a missing, truncated or LFS-pointer file and for a shard that is not there.
    """

    def __init__(self, path: Path, report: Report = null):
        self.path, self._report = path, report
        self.files, self._file_of = ([path], {}) if path.is_file() else weight_files(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._prefix = ""
        for file in self.files:
            with _open(file) as header:
                for key in header.keys():
                    if self._file_of.setdefault(key, file) == file:
                        self.shapes[key] = tuple(header.get_slice(key).get_shape())
        missing = sorted(set(self._file_of) - set(self.shapes))
        if missing:
            raise UserError(
                f"{path}: the index lists {missing[0]} and {len(missing) - 1} more tensors that are in no file.",
                "Download the checkpoint again.",
            )
        if any(key.startswith(ALL_IN_ONE) for key in self.shapes):
            self._prefix = ALL_IN_ONE
            self.shapes = {
                key.removeprefix(ALL_IN_ONE): shape for key, shape in self.shapes.items() if key.startswith(ALL_IN_ONE)
            }

    def read(
        self, keys: Iterable[str], dtype: torch.dtype | None, device: torch.device, apart: bool = False
    ) -> Iterable[tuple[str, Tensor]]:
        """Each of the tensors, cast and moved one by one; floating point only is cast, and nothing without a dtype.

        What is neither cast nor moved is the file itself, mapped, all of which stays in memory, as far as it was read,
        while one such tensor lives. apart: each has memory of its own.
        """
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self._file_of[self._prefix + key], []).append(key)
        for file, wanted in by_file.items():
            for together in ([key] for key in wanted) if apart else [wanted]:
                with _open(file) as opened:
                    for key in together:
                        tensor = opened.get_tensor(self._prefix + key)
                        cast = (tensor.is_floating_point() and dtype) or tensor.dtype
                        yield key, tensor.to(device, cast, copy=apart)

    def identity(self, *prefixes: str) -> str:
        """Hex digest of every byte of the tensors whose names begin so (all without), with names, types and shapes."""
        beginnings = tuple(self._prefix + prefix for prefix in prefixes or ("",))
        digests = [(key, digest) for file in self.files for key, digest in tensor_digests(file, self._report).items()]
        own = sorted((key, digest) for key, digest in digests if key.startswith(beginnings))
        return hashlib.blake2b(json.dumps(own).encode(), digest_size=16).hexdigest()

    def sampled_identity(self) -> str:
        """A digest of headers and 4 KiB of every tensor: earlier records keep it, so it is compared, not written."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            with file.open("rb") as f:
                header = f.read(int.from_bytes(f.read(8), "little"))
                digest.update(header)
                for name, entry in sorted(json.loads(header).items()):
                    if name != "__metadata__":
                        start, end = entry["data_offsets"]
                        f.seek(8 + len(header) + max(start, (start + end - 4096) // 2))
                        digest.update(f.read(min(4096, end - start)))
        return digest.hexdigest()


def tensor_digests(file: Path, report: Report = null) -> dict[str, str]:
    """A digest of each tensor of a safetensors file, kept by the file's size and times where reading takes its time."""
    stat = file.stat()
    is_large = stat.st_size > UNKEPT_BYTES
    place = str(file.resolve())
    known = [place, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    name = hashlib.blake2b(place.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    kept = state_folder() / "weights" / f"{name}.json"
    if is_large:
        try:
            content = json.loads(kept.read_text(encoding="utf-8"))
            if content["file"] == known:
                return content["digests"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing kept yet, or it is damaged: read again
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        entries = {key: entry for key, entry in json.loads(f.read(length)).items() if key != "__metadata__"}
    digests = {}
    task = f"Reading {file.name} once, to know it again"
    sizes = [end - start for start, end in (entry["data_offsets"] for entry in entries.values())]
    read = LongTask(report, task, sum(sizes), unit="bytes", quiet_seconds=quiet_seconds(sum(sizes)))
    with ThreadPoolExecutor(4, thread_name_prefix="digest") as pool:
        found = pool.map(lambda entry: _digest(file, 8 + length, entry), entries.values())
        for key, size, digest in zip(entries, sizes, found, strict=True):
            digests[key] = digest
            read(size)
    if is_large:
        with suppress(OSError):  # it only saves the next reading
            write_text(kept, json.dumps({"file": known, "digests": digests}))
    return digests


def quiet_seconds(nbytes: int) -> float:
    """How long reading so many bytes may go on without a word: not at all where that takes longer than a moment."""
    return 0.0 if nbytes > UNKEPT_BYTES else SECONDS_OF_SILENCE


def loading(
    report: Report, what: str, weights: Weights, keys: Mapping[str, str], dtype: torch.dtype, quantize: str = ""
) -> LongTask:
    """The task of loading a model, in bytes, to be called by `fill`."""
    nbytes = sum(math.prod(weights.shapes[key]) for key in keys.values()) * dtype.itemsize
    task = f"Loading the {what}" + (f" and packing it in {quantize}" if quantize else "")
    return LongTask(report, task, nbytes, unit="bytes", quiet_seconds=quiet_seconds(nbytes))


def _digest(file: Path, origin: int, entry: dict) -> str:
    digest = hashlib.blake2b(f"{entry['dtype']}{entry['shape']}".encode(), digest_size=16)
    start, end = entry["data_offsets"]
    with file.open("rb") as f:
        f.seek(origin + start)
        for position in range(start, end, READ_BYTES):
            digest.update(f.read(min(READ_BYTES, end - position)))
    return digest.hexdigest()


def weight_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The safetensors files of a model folder and, when it is sharded, which tensor is in which. Raises UserError."""
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return [folder / name], {}
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                names = {key: str(shard) for key, shard in weight_map.items()}
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{index}: not a safetensors index ({error}).", "Download the checkpoint again."
                ) from None
            for shard in sorted(set(names.values())):
                if Path(shard).name != shard:
                    raise UserError(
                        f"{index}: names a file outside its folder ({shard}).",
                        "Get the checkpoint from its original source.",
                    )
                if not (folder / shard).is_file():
                    raise UserError(
                        f"{folder}: {shard} is missing.", "Download the checkpoint again; it is incomplete."
                    )
            return [folder / shard for shard in sorted(set(names.values()))], {k: folder / s for k, s in names.items()}
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
    raise UserError(
        f"{folder}: no weights here (looked for {' and '.join(WEIGHT_NAMES)}; found {there}).",
        "Download the checkpoint again; pickled weights (.bin, .pt) are never loaded.",
    )


def _open(file: Path):
    with file.open("rb") as f:
        start = f.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{file}: a Git LFS pointer, not the weights.", f"Fetch the file itself: git -C {file.parent} lfs pull"
        )
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise UserError(
            f"{file}: damaged or cut short at {size:,} bytes ({error}).", "Download this file again."
        ) from None


def fill(
    model: nn.Module,
    weights: Weights,
    keys: dict[str, str],
    dtype: torch.dtype,
    device: torch.device,
    what: str,
    extra: Mapping[str, Callable[[], Tensor]] = MappingProxyType({}),
    done: Callable[[int], object] = lambda _: None,
) -> None:
    """Give a model built on `meta` its weights, one tensor at a time, so that memory peaks at the weights themselves.

    keys: checkpoint key of each model key. extra: tensors that come from elsewhere, by model key. done(bytes) is called
    after each tensor.
    Layers of `make_quantizable` get theirs quantised.
    Raises UserError when tensors are missing, left over or of another shape than the config says.
    """
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    missing = sorted(set(wanted) - set(keys) - set(extra))
    left_over = sorted(set(keys) - set(wanted))
    if missing or left_over:
        details = [
            f"{len(names)} {word} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for names, word in ((missing, "missing"), (left_over, "unknown"))
            if names
        ]
        raise UserError(
            f"{weights.path}: the tensors of the {what} do not fit its config.json: {' and '.join(details)}.",
            "Take config.json and weights from the same checkpoint.",
        )
    wrong = [
        (name, weights.shapes[key], wanted[name]) for name, key in keys.items() if weights.shapes[key] != wanted[name]
    ]
    if wrong:
        name, there, expected = wrong[0]
        raise UserError(
            f"{weights.path}: {keys[name]} has shape {list(there)}, its config.json asks for {list(expected)} "
            f"({len(wrong)} such tensors).",
            "Take config.json and weights from the same checkpoint.",
        )
    name_of = {key: name for name, key in keys.items()}
    quantizes = any(is_quantized(module) for module in model.modules())
    # of a model that is packed, the few tensors that are not would keep the whole file in memory
    values = weights.read(name_of, dtype, CPU if quantizes else device, apart=quantizes)
    read = ((name_of[key], tensor) for key, tensor in values)
    made = ((name, make().to(dtype)) for name, make in extra.items())
    for name, tensor in chain(read, made):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "weight" and is_quantized(module):
            quantize_weight(module, tensor, device)
            give_back_memory()  # what packing took for a moment lies between the packed weights, and would add up
        elif leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor.to(device), requires_grad=False)
        else:
            module._buffers[leaf] = tensor.to(device)
        done(tensor.nbytes)
