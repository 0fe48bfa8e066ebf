"""What holds for a preprocessing job: checkpoint and precision, what records depend on, what each song still needs.

A record carries a fingerprint of all that its tensors follow from, in two parts: `audio` for its latents, `text` for
its conditions. A part that is as a new record's would be is up to date. The hidden work folder holds what the first
pass leaves for the second, and which songs failed; all of it can be lost without harm.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_bytes
from torch import Tensor

from sidestep.acestep.checkpoint import Checkpoint, open_checkpoint
from sidestep.acestep.conditions import TEXT2MUSIC, Text, tiled_silence
from sidestep.acestep.device import choose_device, choose_precision, precision_name
from sidestep.acestep.vae import frames_per_second
from sidestep.audio.io import AudioError, content_hash, probe
from sidestep.data.records import SCHEMA, RecordError, read_metadata
from sidestep.errors import JobError
from sidestep.events import Decision, Report
from sidestep.files import remove, replacing, write_text
from sidestep.settings.config import PreprocessConfig
from sidestep.tasks.preprocess.locks import SongLocks
from sidestep.tasks.preprocess.songs import Song
from sidestep.words import size

NAMES = {  # how a difference is told to the user
    "content": "audio file",
    "normalize": "normalisation",
    "max_duration": "--max-duration",
    "vae": "VAE",
    "schema": "record format",
    "precision": "--precision",
    "prompt": "caption or metadata",
    "lyrics": "lyrics",
    "condition_encoder": "checkpoint",
    "text_encoder": "text encoder",
    "silence": "silence latent",
    "regimes": "--regimes",
}
ANY_PRECISION = "auto"


def differences(stored: object, wanted: Mapping[str, str]) -> tuple[str, ...]:
    """What differs between a stored part of a fingerprint and the wanted one, in the user's words.

    Where nothing is stored, the format differs. A precision counts only when it was typed: `auto` takes what another
    machine made.
    """
    if not isinstance(stored, Mapping):
        return (NAMES["schema"],)
    return tuple(
        NAMES[name]
        for name, value in wanted.items()
        if stored.get(name) != value and not (name == "precision" and value == ANY_PRECISION)
    )


FOLDER = ".pass1"
LATENTS, TEXT, FAILED = ".latents.safetensors", ".text.safetensors", ".failed.json"


@dataclass(frozen=True)
class Failure:
    """A song that could not be used. stage: where it failed."""

    path: str
    reason: str
    stage: str


class WorkFolder:
    """Intermediate files by the key of their song: tensors, and metadata (plain values) in their header."""

    def __init__(self, tensor_output: Path):
        self.folder = tensor_output / FOLDER
        self.locks = self.folder / ".locks"

    def save(self, key: str, kind: str, tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write tensors and metadata, whole or not at all. kind: LATENTS or TEXT. Raises OSError."""
        with replacing(self.folder / f"{key}{kind}") as temporary:
            # Through Python, because a full disk is then an OSError with its number and not a library's text.
            own = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            temporary.write_bytes(as_bytes(own, {"metadata": json.dumps(metadata)}))

    def metadata(self, key: str, kind: str) -> dict[str, Any] | None:
        """The metadata in a file's header, or None when there is no whole file."""
        try:
            with safe_open(self.folder / f"{key}{kind}", framework="pt") as f:
                return json.loads((f.metadata() or {})["metadata"])
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
            return None

    def load(self, key: str, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, metadata) of a file. Raises OSError or SafetensorError."""
        with safe_open(self.folder / f"{key}{kind}", framework="pt") as f:
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # views would hold the file open
            return tensors, json.loads(f.metadata()["metadata"])

    def drop(self, key: str) -> None:
        """Remove a song's intermediate files and its failure: its record is up to date.

        A file that another program holds stays until the next job: it does no harm.
        """
        for kind in (LATENTS, TEXT, FAILED):
            with suppress(PermissionError):
                remove(self.folder / f"{key}{kind}")

    def note_failure(self, key: str, failure: Failure) -> None:
        """Tell the other processes of this job that the song failed, so that each says so and none waits for it."""
        write_text(self.folder / f"{key}{FAILED}", json.dumps(asdict(failure), ensure_ascii=False))

    def failure(self, key: str) -> Failure | None:
        """The song's failure, if one was noted."""
        try:
            return Failure(**json.loads((self.folder / f"{key}{FAILED}").read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError, TypeError):
            return None

    def forget_failures(self, keys: Collection[str]) -> None:
        """Forget which of these songs failed before: a job that starts tries each of them again."""
        for path in self.folder.glob(f"*{FAILED}"):
            if path.name.removesuffix(FAILED) in keys:
                path.unlink(missing_ok=True)

    def keys(self) -> set[str]:
        """Keys of the songs that have any file here."""
        return {path.name.partition(".")[0] for path in self.folder.glob("[!.]*")}

    def remove_if_empty(self) -> None:
        """Leave no empty folder behind."""
        for folder in (self.locks, self.folder):
            try:
                folder.rmdir()
            except OSError:
                return  # something is left, or another process works here


class Stage(IntEnum):
    """What a song needs next, from nothing to everything."""

    NOTHING = 0
    METADATA = 1  # what reaches no tensor changed: the record is written anew with the old ones
    CONDITIONS = 2  # the second pass; latents and text states are there
    TEXT = 3  # text states; the latents are in the old record or the work folder
    LATENTS = 4


UNKNOWN_SECONDS = 240.0  # for a song that does not say how long it is


@dataclass(frozen=True)
class Inspection:
    """What a song needs and why. seconds: of audio, exact once it has latents.

    latents_in_record: they are in its old record. foreign: its record is another program's.
    """

    stage: Stage
    seconds: float
    reasons: tuple[str, ...] = ()
    latents_in_record: bool = False
    foreign: bool = False


RESERVE_BYTES = 64 * 1024**2  # never used, so that the system and the last record have room
TEXT_TOKENS_PER_CHARACTER = 0.5  # generous for European languages, fair for Japanese
FULL = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)


@dataclass
class Job:
    """Built once per process. identities: digests of the checkpoint's parts by name, and of the silence latent."""

    config: PreprocessConfig
    checkpoint: Checkpoint
    device: torch.device
    vae_dtype: torch.dtype
    dtype: torch.dtype
    identities: dict[str, str]

    def __post_init__(self) -> None:
        self.work = WorkFolder(self.config.tensor_output)
        self.locks = SongLocks(self.work.locks)

    @property
    def with_hints(self) -> bool:
        return "hints" in self.config.regimes

    @property
    def frames_per_second(self) -> float:
        return frames_per_second(self.checkpoint.vae_config())

    def audio_part(self, content: str, *, made: bool = False) -> dict[str, str]:
        """What latents follow from: as asked for, or as `made` now. content: digest of the audio file."""
        return {
            "content": content,
            "normalize": self.config.normalize,
            "max_duration": f"{self.config.max_duration:g}",
            "vae": self.identities["vae"],
            "schema": str(SCHEMA),
            "precision": precision_name(self.vae_dtype) if made else self.config.precision,
        }

    def text(self, song: Song, seconds: float, instruction: str = TEXT2MUSIC) -> Text:
        """What this model reads beside `seconds` of a song."""
        return song.text(seconds, instruction, self.checkpoint.variant.is_stems)

    def text_part(self, text: Text, *, made: bool = False) -> dict[str, str]:
        """What conditions follow from beside the latents: as asked for, or as `made` now."""
        return {
            "prompt": text.prompt,
            "lyrics": text.lyrics,
            "condition_encoder": self.identities["condition_encoder"],
            "text_encoder": self.identities["text_encoder"],
            "silence": self.identities["silence"],
            "regimes": " ".join(sorted({"text2music", *self.config.regimes})),
            "schema": str(SCHEMA),
            "precision": precision_name(self.dtype) if made else self.config.precision,
        }

    def inspect(self, song: Song) -> Inspection:
        """What a song needs now.

        Reads no tensors, and the audio only where a record or intermediate must be compared with it.
        """
        record, foreign = None, False
        if song.record.exists():
            try:
                record = read_metadata(song.record)
                foreign = not isinstance(record.get("fingerprint"), dict)
            except RecordError:
                pass  # damaged: made anew
        latents = self.work.metadata(song.key, LATENTS)
        if foreign or (record is None and latents is None):
            return self._without_latents(song, ("new",), foreign)
        stored = record["fingerprint"] if record else {}
        stat = audio_stat(song.source)
        known = next((made for made in (record, latents) if made and made.get("audio_stat") == stat), None)
        try:
            content = known["fingerprint"]["audio"]["content"] if known else content_hash(song.source)
        except AudioError:
            return self._without_latents(song, ())
        wanted = self.audio_part(content)
        reasons = differences(stored.get("audio"), wanted)
        if record and not reasons:
            seconds, in_record = float(record["duration"]), True
        elif latents and not differences(latents.get("fingerprint", {}).get("audio"), wanted):
            seconds, in_record, reasons = float(latents["seconds"]), False, ("interrupted",)
        else:
            return self._without_latents(song, reasons)
        text_part = self.text_part(self.text(song, seconds))
        if record and in_record:
            reasons = differences(stored.get("text"), text_part)
            if not reasons:
                changed = [
                    name for name, value in song.described().items() if (record.get(name) or None) != (value or None)
                ]
                names = tuple(name.replace("_", " ") for name in changed)
                return Inspection(Stage.METADATA if changed else Stage.NOTHING, seconds, names)
        states = self.work.metadata(song.key, TEXT) or {}
        missing = differences(states.get("fingerprint", {}).get("text"), text_part)
        return Inspection(Stage.TEXT if missing else Stage.CONDITIONS, seconds, reasons, in_record)

    def _without_latents(self, song: Song, reasons: tuple[str, ...], foreign: bool = False) -> Inspection:
        try:
            seconds = probe(song.source).seconds or UNKNOWN_SECONDS
        except AudioError:
            seconds = 0.0  # it fails by name when it is decoded
        if self.config.max_duration:
            seconds = min(seconds, self.config.max_duration)
        return Inspection(Stage.LATENTS, seconds, reasons, foreign=foreign)

    def timbre_silence(self) -> Tensor:
        """Silence in the place of a timbre reference, fp32 [1, T, D]."""
        return tiled_silence(self.checkpoint.silence_latent(), self.checkpoint.timbre_frames)

    def require_space(self, found: Sequence[tuple[Song, Inspection]]) -> None:
        """Raises JobError when the disk cannot hold what these songs take: first-pass files, then records instead."""
        width = int(self.checkpoint.config.get("encoder_hidden_size") or self.checkpoint.config["hidden_size"])
        needed, songs = RESERVE_BYTES, 0
        latents_per_second = self.frames_per_second * self.checkpoint.latent_channels
        for song, what in found:
            if what.stage > Stage.METADATA:
                tokens = 200 + (len(song.lyrics) + len(song.caption)) * TEXT_TOKENS_PER_CHARACTER
                values = (what.seconds * latents_per_second + tokens * width) * (2 if self.with_hints else 1)
                needed += int(values * 4) + 16 * 1024
                songs += 1
        output = self.config.tensor_output
        free = free_bytes(output)
        if needed > free:
            raise JobError(
                f"--tensor-output {output}: {songs} songs need about {size(needed - RESERVE_BYTES)} "
                f"and the disk has {size(free)} free.",
                f"Free {size(needed - free)}, or give --tensor-output a folder on another disk.",
            )

    def watch_disk(self) -> None:
        """Raises JobError before the disk is full to the brim."""
        free = free_bytes(self.config.tensor_output)
        if free < RESERVE_BYTES:
            raise disk_full(self.config.tensor_output, f" ({size(free)} free)")


def open_job(config: PreprocessConfig, report: Report) -> Job:
    """Open the checkpoint, of which only headers are read; say which device and precision it is. Raises UserError."""
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant, report)
    choice = choose_device(config.device)
    precision = choose_precision(config.precision, choice.value)
    report(Decision(what="device", value=str(choice.value), reason=choice.reason))
    report(Decision(what="precision", value=precision_name(precision.value), reason=precision.reason))
    # Latents are made once and learnt from ever after, and the VAE is small: fp32 unless the user says otherwise.
    vae_dtype = precision.value if config.precision != ANY_PRECISION else torch.float32
    if vae_dtype != precision.value:
        report(Decision(what="VAE precision", value="fp32", reason="latents are made once; --precision changes it"))
    identities = {part: checkpoint.identity(part) for part in ("vae", "text_encoder", "condition_encoder")}
    job = Job(config, checkpoint, choice.value, vae_dtype, precision.value, identities)
    identities["silence"] = hashlib.blake2b(job.timbre_silence().numpy().tobytes(), digest_size=16).hexdigest()
    return job


def audio_stat(path: Path) -> list[int]:
    """Size and times of a file, empty when it is not there: while they stay, its content need not be read again."""
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder that need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def disk_full(folder: Path, left: str = "") -> JobError:
    """The error for a disk that filled up on the way."""
    return JobError(
        f"--tensor-output {folder}: the disk is full{left}.",
        "Free some space and give the same command again: it goes on where it stopped.",
    )
