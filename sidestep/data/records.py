"""The training record of a song: a `.pt` file with its latents, its conditions and everything that is known of it."""

import hashlib
import pickle
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidestep.data.batches import Song
from sidestep.errors import JobError
from sidestep.files import replacing

SCHEMA = 1  # raise it when records of before must be made anew
TENSORS = ("target_latents", "encoder_hidden_states", "audio_codes", "cover_hints", "hints_encoder_hidden_states")
UNREADABLE = (  # all that torch's reader was seen to raise on damaged bytes
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError),
    *(ImportError, NameError, EOFError, MemoryError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile),
)
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


def save_record(path: Path, record: Record) -> None:
    """Write a record whole or not at all. Raises OSError, and RecordError for a tensor that would poison a run."""
    content: dict[str, Any] = {}
    for name in TENSORS:
        tensor = getattr(record, name)
        if tensor is None:
            continue
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RecordError(f"{path.name}: {name} holds values that are no numbers.", "Try --precision fp32.")
        content[name] = (
            tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        )  # a view would store its whole origin
    content["metadata"] = record.metadata
    with (
        replacing(path) as temporary,
        temporary.open("wb") as f,
    ):  # given a name that starts with a dot, torch.save refuses it
        torch.save(content, f)


def load_record(path: Path) -> Record:
    """Read a record: this program's, or one of ACE-Step's own and older tools, padded and with a stored context.

    Those are trimmed by their masks, because the model attends every position it is given. Nothing but tensors and
    plain values is ever unpickled. Raises RecordError.
    """
    _verify_checksums(path)
    content = _open(path)
    try:
        latents, conditions = content["target_latents"], content["encoder_hidden_states"]
        latents = _trim(latents, content.get("attention_mask"))
        conditions = _trim(conditions, content.get("encoder_attention_mask"))
        hints = {name: _own(content[name]) for name in TENSORS[2:] if content.get(name) is not None}
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
    content = _open(path)
    try:
        return dict(content.get("metadata") or {})
    except UNREADABLE as error:
        raise _wrong(path, error) from None


def find_records(folder: Path) -> list[Path]:
    """Every training record below a folder, sorted by its path; hidden files and folders are left out."""
    return sorted(
        path
        for path in folder.rglob("*.pt")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _verify_checksums(path: Path) -> None:
    """Raises RecordError where the bytes are not those that were written: torch reads a zip file without asking."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} is damaged: its checksum is wrong")
    except UNREADABLE as error:
        raise _wrong(path, error) from None


def _open(path: Path) -> dict[str, Any]:
    try:
        # Mapped into memory, so that the parts nobody asks for (hints, an old record's context) are never read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise RecordError(f"{path}: no such training record.", _AGAIN) from None
    except UNREADABLE as error:
        raise _wrong(path, error) from None
    if not isinstance(content, dict):
        raise RecordError(
            f"{path}: not a training record (it holds a {type(content).__name__}).",
            "Point --dataset-dir at a folder made by preprocess.",
        )
    missing = [name for name in TENSORS[:2] if not isinstance(content.get(name), Tensor)]
    if missing:
        raise RecordError(
            f"{path}: not a training record ({' and '.join(missing)} missing).",
            "Point --dataset-dir at a folder made by preprocess.",
        )
    return content


def _wrong(path: Path, error: Exception) -> RecordError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return RecordError(f"{path}: not readable as a training record ({reason[:200]}).", _AGAIN)


def _own(tensor: Tensor) -> Tensor:
    """A copy that does not hang on the file."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _trim(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [N, D] of a tensor [N, D] or [1, N, D] where its mask [N] or [1, N] is set."""
    tensor = tensor.squeeze(0) if tensor.ndim == 3 else tensor
    if tensor.ndim != 2:
        raise ValueError(f"a tensor of {tensor.ndim} dimensions where [N, D] was expected")
    if mask is None:
        return _own(tensor)
    mask = mask.reshape(-1).bool()
    if len(mask) != len(tensor):
        raise ValueError(f"a mask of {len(mask)} for {len(tensor)} positions")
    return tensor[mask]


def fingerprint(songs: Iterable[Song]) -> str:
    """Hex digest of every song's name, latents, conditions and repeats; the order does not matter."""
    digests = []
    for song in songs:
        digest = hashlib.blake2b(
            f"{song.name}\0{song.repeat}\0{tuple(song.latents.shape)}\0{tuple(song.conditions.shape)}".encode(),
            digest_size=16,
        )
        for tensor in (song.latents, song.conditions):
            digest.update(tensor.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes())
        digests.append(digest.hexdigest())
    return hashlib.blake2b("".join(sorted(digests)).encode(), digest_size=16).hexdigest()
