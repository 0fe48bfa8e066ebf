"""The training record of a song: a `.pt` file with its latents, its conditions and everything that is known of it.

A folder of records keeps an index in a hidden file: what training must know of each before it reads its tensors, true
as long as size and times of the record stay. So a record is read whole once, and then when a batch wants it.
"""

import hashlib
import io
import json
import os
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sidestep.data.text import is_text
from sidestep.errors import JobError
from sidestep.events import LongTask, Report, null
from sidestep.files import files_below, replacing, write_text
from sidestep.settings.path_checks import RECORDS_INDEX as INDEX

SCHEMA = 1  # raise it when records of before must be made anew
TENSORS = ("target_latents", "encoder_hidden_states", "audio_codes", "cover_hints", "hints_encoder_hidden_states")
UNREADABLE = (  # all that torch's reader was seen to raise on damaged bytes
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError),
    *(ImportError, NameError, EOFError, MemoryError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile),
)
INDEX_SCHEMA = "2"
LARGEST_BYTES = 4 * 1024**3  # of a record: an hour of music with hints takes 50 MB
TEXT_LIMIT = 100_000  # characters
REPEAT_LIMIT = 10_000
BPM_LIMIT = 1000
NUMBER_LIMIT = 10**9
KEPT = (  # of the metadata, in the index
    *("caption", "prompt_caption", "lyrics", "bpm", "keyscale", "timesignature", "language", "is_instrumental"),
    *(
        "captions",
        "genre",
        "genre_ratio",
        "tag_position",
        "duration",
        "custom_tag",
        "repeat",
        "checkpoint",
        "checkpoint_identity",
    ),
)
_OLD_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # what files of torch before 1.6 begin with
_QUICKLY_SEARCHED = 16_384  # bytes of text: a second
_AGAIN = "Make it again: delete the file and repeat the preprocessing command; the songs that are done are kept."


class RecordError(JobError):
    """A training record that cannot be used."""


@dataclass(frozen=True, eq=False)
class Record:
    """One song as training sees it. T latent frames, L condition tokens.

    target_latents: [T, D], the mean of the VAE's posterior. encoder_hidden_states: [L, C], conditions without one pad
    token. With `--regimes hints` also audio_codes [ceil(T/5), Q], cover_hints [T, D] and hints_encoder_hidden_states
    [L', C], the conditions under the cover instruction. metadata: plain values, made by `sidestep.tasks.preprocess`.
    """

    target_latents: Tensor
    encoder_hidden_states: Tensor
    metadata: dict[str, Any]
    audio_codes: Tensor | None = None
    cover_hints: Tensor | None = None
    hints_encoder_hidden_states: Tensor | None = None

    @property
    def has_hints(self) -> bool:
        return self.cover_hints is not None and self.hints_encoder_hidden_states is not None


@dataclass(frozen=True)
class RecordInfo:
    """A record without its tensors. frames, channels: of its latents [T, D]; tokens, width: of its conditions [L, C].

    stat: size and times of its file. digests: of `audio`, `conditions` and, where there are any, `hints`.
    made_by: identities of the models that it was made with, and the digest of its audio file as `content`.
    """

    stat: list[int]
    frames: int
    channels: int
    tokens: int
    width: int
    digests: dict[str, str]
    made_by: dict[str, str]
    metadata: dict[str, Any]


def save_record(path: Path, record: Record) -> None:
    """Write a record whole or not at all. Raises OSError, and RecordError for a tensor that would poison a run."""
    tensors = {name: tensor for name in TENSORS if (tensor := getattr(record, name)) is not None}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise RecordError(f"{path.name}: {name} holds values that are no numbers.", "Try --precision fp32.")
    # Copies, because a view would store its whole origin.
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with replacing(path) as temporary, temporary.open("wb") as f:  # torch.save refuses a name that starts with a dot
        torch.save(own | {"metadata": record.metadata}, f)


def is_finite(tensor: Tensor) -> bool:
    """Whether every value of a tensor is a number."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def load_record(path: Path) -> Record:
    """Read a record: this program's, or one of ACE-Step's own and older tools, padded and with a stored context.

    Those are trimmed by their masks, because the model attends every position it is given. Every byte is compared with
    its checksum; nothing but tensors and plain values is ever unpickled; the file is closed. Raises RecordError.
    """
    content = _open(path, whole=True)
    try:
        latents = _trim(content["target_latents"], content.get("attention_mask"))
        conditions = _trim(content["encoder_hidden_states"], content.get("encoder_attention_mask"))
        hints = {name: content[name] for name in TENSORS[2:] if content.get(name) is not None}
        metadata = dict(content.get("metadata") or {})
    except UNREADABLE as error:
        raise _wrong(path, error) from None
    if not len(latents) or not len(conditions):
        raise RecordError(
            f"{path}: an empty training record ({len(latents)} frames, {len(conditions)} condition tokens).", _AGAIN
        )
    return Record(latents, conditions, metadata, **hints)


def read_metadata(path: Path) -> dict[str, Any]:
    """What a record says of its song, without reading its tensors. Raises RecordError."""
    content = _open(path, whole=False)
    try:
        return dict(content.get("metadata") or {})
    except UNREADABLE as error:
        raise _wrong(path, error) from None


def find_records(folder: Path) -> list[Path]:
    """Every training record below a folder, sorted by its path; hidden files and folders are left out."""
    return sorted(path for path in files_below(folder, hidden=False) if path.suffix == ".pt" and path.is_file())


Index = tuple[dict[str, RecordInfo], dict[str, RecordError]]
ReadIndex = Callable[[Path], Index]  # of a folder, as `index_records` or from where it was read before


def index_records(folder: Path, report: Report = null, keep: bool = True) -> Index:
    """What is known of each record below a folder, by its path relative to it, and why the others cannot be used.

    Only what the index does not have, or what has changed since, is read. It is kept where the folder takes files,
    and with keep=False not at all.
    """
    kept: dict[str, RecordInfo] = {}
    with suppress(OSError, ValueError):  # there is none yet, or it is damaged: made anew
        seal, body = (folder / INDEX).read_text(encoding="utf-8").split("\n", 1)
        if seal == _seal(body.rstrip("\n")):
            kept = {name: RecordInfo(**info) for name, info in json.loads(body).items()}
    found: dict[str, RecordInfo] = {}
    broken: dict[str, RecordError] = {}
    paths = find_records(folder)
    read = LongTask(report, "Reading records", len(paths))
    for path in paths:
        name = path.relative_to(folder).as_posix()
        known = kept.get(name)
        try:
            found[name] = known if known and known.stat == record_stat(path) else _inspect(path)
        except RecordError as error:
            broken[name] = error
        read(current=name)
    if keep and found != kept:
        body = json.dumps({name: vars(info) for name, info in found.items()})
        with suppress(OSError):  # a folder that takes no files costs the next start some time, and nothing else
            write_text(folder / INDEX, f"{_seal(body)}\n{body}\n")
    return found, broken


def record_stat(path: Path) -> list[int]:
    """Size and times of a record: while they stay, so do its bytes. Raises RecordError where it is gone."""
    try:
        stat = path.stat()
    except OSError as error:
        raise _wrong(path, error) from None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _seal(body: str) -> str:
    return hashlib.blake2b(f"{INDEX_SCHEMA}\0{body}".encode(), digest_size=16).hexdigest()


def _inspect(path: Path) -> RecordInfo:
    """Read a record whole and check all that training relies on. Raises RecordError."""
    stat = record_stat(path)
    record = load_record(path)
    latents, conditions = record.target_latents, record.encoder_hidden_states
    parts: dict[str, tuple[Tensor, ...]] = {"audio": (latents,), "conditions": (conditions,)}
    if record.cover_hints is not None and record.hints_encoder_hidden_states is not None:
        parts["hints"] = hints = record.cover_hints, record.hints_encoder_hidden_states
        if hints[0].shape != latents.shape or hints[1].shape[1:] != conditions.shape[1:]:
            raise RecordError(f"{path}: its hints do not fit its latents and conditions.", _AGAIN)
    for tensor in (tensor for part in parts.values() for tensor in part):
        if not is_finite(tensor):
            raise RecordError(
                f"{path}: it holds values that are no numbers.",
                "Delete the file and preprocess this song again, with --precision fp32.",
            )
    said = {name: record.metadata[name] for name in KEPT if name in record.metadata}
    if isinstance(captions := said.pop("captions", None), list) and captions:  # one text, as all else in the index
        said["captions"] = json.dumps([text for text in captions if isinstance(text, str)])
    metadata = {name: value for name, value in said.items() if isinstance(value, str | int | float | None)}
    for name, value in metadata.items():
        if isinstance(value, str) and name not in ("repeat", "genre_ratio"):
            problem = f"no text of at most {TEXT_LIMIT} characters"
            good = is_text(value) and len(value) <= TEXT_LIMIT
        else:
            ranges = {"repeat": (1, REPEAT_LIMIT), "bpm": (0, BPM_LIMIT), "genre_ratio": (0, 100)}
            low, high = ranges.get(name, (-NUMBER_LIMIT, NUMBER_LIMIT))
            problem = f"no number from {low} to {high}"
            good = value is None or (isinstance(value, int | float) and low <= value <= high)
        if not good:
            shown = f" {value}" if isinstance(value, int | float) and abs(value) < NUMBER_LIMIT else ""
            fix = "Put it right in dataset.json and preprocess this song again."
            raise RecordError(f"{path}: its {name}{shown} is {problem}.", fix)
    made_by = {"condition_encoder": metadata.get("checkpoint_identity")}
    stored = record.metadata.get("fingerprint")
    for part, name in (("audio", "vae"), ("text", "text_encoder"), ("audio", "content")):
        value = stored.get(part) if isinstance(stored, dict) else None
        made_by[name] = value.get(name) if isinstance(value, dict) else None
    return RecordInfo(
        stat,
        *latents.shape,
        *conditions.shape,
        digests={name: _digest(*tensors) for name, tensors in parts.items()},
        made_by={name: value for name, value in made_by.items() if isinstance(value, str)},
        metadata=metadata,
    )


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _open(path: Path, whole: bool) -> dict[str, Any]:
    """The content of a file. whole: in memory and compared with its checksums; else mapped, for a look at metadata."""
    try:
        size = path.stat().st_size
        if size > LARGEST_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        with path.open("rb") as file:
            data = io.BytesIO(file.read()) if whole else file
            is_archive = _verify(data, whole)
            content = torch.load(
                data if whole else path, map_location="cpu", weights_only=True, mmap=is_archive and not whole
            )
    except FileNotFoundError:
        raise RecordError(f"{path}: no such training record.", _AGAIN) from None
    except UNREADABLE as error:
        raise _wrong(path, error) from None
    tensors = content if isinstance(content, dict) else {}
    missing = [name for name in TENSORS[:2] if not isinstance(tensors.get(name), Tensor)]
    if missing:
        raise RecordError(
            f"{path}: not a training record ({' and '.join(missing)} missing).",
            "Point --dataset-dir at a folder made by preprocess.",
        )
    if any(tensor.nbytes > size for tensor in tensors.values() if isinstance(tensor, Tensor)):
        raise RecordError(f"{path}: not a training record (its tensors are larger than the file).", _AGAIN)
    return content


def _verify(file: BinaryIO, whole: bool) -> bool:
    """Whether a file is an archive, else it is in torch's old format. Raises ValueError where its bytes are not right.

    Torch reads an archive without asking for its checksums; `whole`: compare those of all entries, else of the pickle
    alone. And torch searches its own error text for a pattern, for minutes where a file names a very long function.
    """
    start = file.read(len(_OLD_START))
    file.seek(0)
    old = start == _OLD_START
    if old:
        pickles = [file] * 5  # one after the other: magic number, protocol, system, content, keys of the tensors
    else:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if not start.startswith(b"PK\3\4"):
                raise ValueError("its first bytes are damaged")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed, which no program's records are")
            for entry in entries if whole else ():  # as `testzip` does, at a tenth of its time for small entries
                file.seek(entry.header_offset)
                signature, name_bytes, extra_bytes = struct.unpack("<4s22x2H", file.read(30))
                name = file.read(name_bytes).decode("utf-8" if entry.flag_bits & 0x800 else "cp437", "replace")
                file.seek(extra_bytes, os.SEEK_CUR)
                as_listed = signature == b"PK\3\4" and name == entry.orig_filename
                if not as_listed or zlib.crc32(file.read(entry.file_size)) != entry.CRC:
                    raise ValueError(f"{entry.filename} is damaged: its checksum is wrong")
            contents = [archive.read(entry) for entry in entries if entry.filename.endswith(".pkl")]
            pickles = [content for content in contents if len(content) > _QUICKLY_SEARCHED]
    for content in pickles:
        for opcode, argument, _ in pickletools.genops(content):
            limit = 2 * TEXT_LIMIT if "UNICODE" in opcode.name else 200
            if isinstance(argument, str) and len(argument) > limit:
                raise ValueError(f"a text in it has {len(argument):,} characters")
    file.seek(0)
    return not old


def _wrong(path: Path, error: Exception) -> RecordError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return RecordError(f"{path}: not readable as a training record ({reason[:200]}).", _AGAIN)


def _trim(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [N, D] of a tensor [N, D] or [1, N, D] where its mask [N] or [1, N] is set."""
    tensor = tensor.squeeze(0) if tensor.ndim == 3 else tensor
    if tensor.ndim != 2:
        raise ValueError(f"a tensor of {tensor.ndim} dimensions where [N, D] was expected")
    if mask is None:
        return tensor
    mask = mask.reshape(-1).bool()
    if len(mask) != len(tensor):
        raise ValueError(f"a mask of {len(mask)} for {len(tensor)} positions")
    return tensor[mask]
