"""Merge adapters into base weights, file by file and tensor by tensor, so that memory holds one weight at a time.

safetensors' own writer needs all tensors at once; the format itself is a length, a JSON table and the bytes, which can
be streamed (https://github.com/huggingface/safetensors#format).
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidestep.adapters.adapter import MAGNITUDE, Adapter, Factors, changed_weight, kronecker_factor, shape_of
from sidestep.adapters.names import is_adaptable, to_original
from sidestep.adapters.read import DTYPES
from sidestep.errors import UserError

NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE_BYTES = 32 * 2**20
# Before a decoder's names: in ComfyUI's files, in the original layout, in diffusers'.
PREFIXES = ("model.diffusion_model.decoder.", "diffusion_model.decoder.", "decoder.", "")
OTHER_MODEL = "The adapter was trained on another model: choose that one with --model-variant, or another --base."


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file; start and end are byte positions in the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of a file in the order of their bytes, and its texts. Raises UserError for a damaged file."""
    try:
        with safe_open(file, framework="pt"):  # checks lengths, offsets and overlaps
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            table = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged or cut short ({error}).", "Download this file again.") from None
    texts = table.pop("__metadata__", None) or {}
    entries = []
    for key, tensor in table.items():
        start, end = (8 + length + offset for offset in tensor["data_offsets"])
        entries.append(Entry(key, tensor["dtype"], tuple(tensor["shape"]), start, end))
    return sorted(entries, key=lambda entry: (entry.start, entry.end)), texts


def weight_name(key: str) -> str | None:
    """The original module name whose weight a base file keeps under this key; None for any other tensor."""
    if not key.endswith(".weight"):
        return None
    prefix = next(prefix for prefix in PREFIXES if key.startswith(prefix))
    name = to_original(key.removeprefix(prefix).removesuffix(".weight"))
    return name if is_adaptable(name) else None


def flat_name(key: str) -> str:
    """Any tensor of a base by its module's original name with underscores, the form that all programs' files share."""
    name = key.removeprefix("model.").removeprefix("diffusion_model.").removeprefix("decoder.").removesuffix(".weight")
    return re.sub(r"^proj_(in|out)_conv\b", r"proj_\1_1", name).replace(".", "_")


def changed_outside(weight: Tensor, factors: Factors, strength: float = 1.0) -> Tensor:
    """`changed_weight` of a module that our adapters cannot sit on: a weight of any shape, [out, ...].

    Raises RuntimeError, KeyError or IndexError for factors that do not fit it.
    """
    weight, f = weight.float(), {name: tensor.float() for name, tensor in factors.items()}
    if "diff" in f:
        change = f["diff"]
    elif "lora_A" in f:
        change = f["lora_B"].flatten(1) @ f["lora_A"].flatten(1)
    elif "hada_w1_a" in f:
        change = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
    else:
        w1, w2 = kronecker_factor(f, "lokr_w1"), kronecker_factor(f, "lokr_w2")
        w2 = w2.reshape(len(w2), weight.shape[1] // w1.shape[1], *weight.shape[2:])
        change = torch.kron(w1.reshape(*w1.shape, *(1 for _ in w2.shape[2:])), w2)
    changed = weight + change.reshape(weight.shape)
    if MAGNITUDE in f:
        gain = f[MAGNITUDE] / torch.linalg.norm(changed.flatten(1), dim=1)
        changed = changed * gain.reshape(-1, *(1 for _ in weight.shape[1:]))
    return weight + strength * (changed - weight)


class BaseWeights:
    """The weights of a base, found in its files and read one by one: adaptable ones by name, others by `flat_name`."""

    def __init__(self, files: Sequence[Path]):
        self.found: dict[str, tuple[Path, Entry]] = {}
        self.others: dict[str, tuple[Path, Entry]] = {}
        for file in files:
            for entry in read_header(file)[0]:
                if name := weight_name(entry.key):
                    self.found[name] = (file, entry)
                else:
                    self.others[flat_name(entry.key)] = (file, entry)

    def _find(self, name: str) -> tuple[Path, Entry]:
        if name not in self.found:
            raise UserError(f"The base has no weight for {name}.", OTHER_MODEL)
        return self.found[name]

    def __call__(self, name: str) -> Tensor:
        """The weight [out, in] of an original module name, as it is stored. Raises UserError for a base without it."""
        file, entry = self._find(name)
        with file.open("rb") as opened:
            return _read(opened, entry)

    def check(self, adapter: Adapter) -> None:
        """Raises UserError unless each module of the adapter has its weight here, of its shape and in a plain dtype."""
        for name, factors in adapter.modules.items():
            entry, (rows, columns) = self._find(name)[1], shape_of(factors)
            if len(entry.shape) != 2 or columns != entry.shape[1] or (rows and rows != entry.shape[0]):
                shape = [rows or entry.shape[0], columns]
                raise UserError(
                    f"{name} has shape {list(entry.shape)} in the base and {shape} in the adapter.", OTHER_MODEL
                )
            if entry.dtype not in DTYPES:
                raise UserError(
                    f"{name} is stored in {entry.dtype}, into which nothing can be merged.",
                    "Use a base in bfloat16, float16 or float32.",
                )

    def placed(self, adapter: Adapter) -> tuple[Adapter, list[str]]:
        """The adapter without those changes outside attention and MLP that no weight here can take; their names."""
        taken = {}
        for name, factors in adapter.outside.items():
            file, entry = self.others.get(name.replace(".", "_"), (None, None))
            if file and entry and entry.dtype in DTYPES:
                with (
                    file.open("rb") as opened,
                    suppress(RuntimeError, KeyError, IndexError),
                ):  # factors for another shape
                    changed_outside(_read(opened, entry), factors)
                    taken[name] = factors
        return replace(adapter, outside=taken), [name for name in adapter.outside if name not in taken]


def merge_file(
    source: Path,
    target: Path,
    adapters: Sequence[tuple[Adapter, float]],
    dtype: torch.dtype | None = None,
    note: Mapping[str, str] | None = None,
    done: Callable[[str, int], object] | None = None,
) -> None:
    """Write `source` with the adapters, each at its strength, merged in.

    dtype: of all floating-point tensors; None keeps each one's. note: texts for the header. done(key, bytes read) is
    called after each tensor. The change is computed in float32 and rounded once.
    """
    entries, texts = read_header(source)
    dtypes = [NAMES[dtype] if dtype is not None and entry.dtype in DTYPES else entry.dtype for entry in entries]
    table: dict[str, object] = {"__metadata__": {**texts, **(note or {})}}
    position = 0
    for entry, name in zip(entries, dtypes, strict=True):
        size = math.prod(entry.shape) * DTYPES[name].itemsize if name in DTYPES else entry.end - entry.start
        table[entry.key] = {"dtype": name, "shape": list(entry.shape), "data_offsets": [position, position + size]}
        position += size
    header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with source.open("rb") as reading, target.open("wb") as writing:
        writing.write(len(header).to_bytes(8, "little") + header)
        for entry, name in zip(entries, dtypes, strict=True):
            for piece in _merged(reading, entry, adapters, DTYPES.get(name)):
                writing.write(piece)
            if done:
                done(entry.key, entry.end - entry.start)


def _merged(
    reading: BinaryIO, entry: Entry, adapters: Sequence[tuple[Adapter, float]], dtype: torch.dtype | None
) -> Iterator[bytes | memoryview]:
    """The bytes of one tensor as it is to be written."""
    name, flat = weight_name(entry.key), flat_name(entry.key)
    changes = [
        (change, factors, strength)
        for adapter, strength in adapters
        for change, factors in (
            (changed_weight, adapter.modules.get(name or "")),
            (changed_outside, next((f for n, f in adapter.outside.items() if n.replace(".", "_") == flat), None)),
        )
        if factors
    ]
    if changes:
        weight = _read(reading, entry).float()
        merged = weight.clone()
        for change, factors, strength in changes:
            merged += change(weight, factors, strength) - weight
        yield _bytes(merged.to(dtype))
        return
    reading.seek(entry.start)
    for start in range(entry.start, entry.end, PIECE_BYTES):
        piece = reading.read(min(PIECE_BYTES, entry.end - start))
        if dtype is None or DTYPES[entry.dtype] == dtype:
            yield piece
        else:
            yield _bytes(torch.frombuffer(bytearray(piece), dtype=DTYPES[entry.dtype]).to(dtype))


def _read(reading: BinaryIO, entry: Entry) -> Tensor:
    reading.seek(entry.start)
    data = bytearray(entry.end - entry.start)
    reading.readinto(data)  # pyrefly: ignore[missing-attribute]  # a file opened in binary has it
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
