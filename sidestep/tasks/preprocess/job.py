"""What a training record depends on, in two parts: the audio part decides over its latents, the text part over its conditions.

Room on the disk: asked for before the start and watched on the way.
The hidden work folder: what the first pass leaves for the second, and which songs failed. Everything in it can be lost without harm.
What holds for a whole preprocessing job: its checkpoint, its numbers, what every song's tensors depend on, and what each song still needs.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from torch import Tensor

from sidestep.acestep.checkpoint import Checkpoint, open_checkpoint
from sidestep.acestep.conditions import tiled_silence
from sidestep.acestep.device import choose_device, choose_precision, precision_name
from sidestep.acestep.vae import frames_per_second, samples_per_frame
from sidestep.audio.io import AudioError, content_hash, probe
from sidestep.data.records import SCHEMA, RecordError, read_metadata
from sidestep.errors import JobError
from sidestep.events import Decision, Report
from sidestep.files import replacing, write_text
from sidestep.settings.config import PreprocessConfig
from sidestep.tasks.preprocess.songs import Prompts, Song
from sidestep.words import size

Part = Mapping[str, str]

NAMES = {  # how a difference is told to the user
    "content": "audio file",
    "normalize": "normalisation",
    "max_duration": "--max-duration",
    "vae": "VAE",
    "schema": "record format",
    "precision": "--precision",
    "prompt": "caption or facts",
    "lyrics": "lyrics",
    "condition_encoder": "checkpoint",
    "text_encoder": "text encoder",
    "silence": "silence latent",
    "regimes": "--regimes",
}
ANY_PRECISION = "auto"


@dataclass(frozen=True)
class Fingerprint:
    """Everything that the tensors of one song depend on, as plain text by name, so that a difference can be named."""

    audio: Part
    text: Part

    def as_values(self) -> dict[str, dict[str, str]]:
        """Plain values for a record's metadata."""
        return {"audio": dict(self.audio), "text": dict(self.text)}


def differences(stored: object, now: Part) -> tuple[str, ...]:
    """What differs between a stored part and the present one, in the user's words; nothing stored differs in its format.

    A precision counts only when it was typed: `auto` takes what another machine made.
    """
    if not isinstance(stored, Mapping):
        return (NAMES["schema"],)
    wrong = [
        name
        for name, value in now.items()
        if stored.get(name) != value and not (name == "precision" and value == ANY_PRECISION)
    ]
    return tuple(NAMES[name] for name in wrong)


def audio_part(*, content: str, normalize: str, max_duration: float, vae: str, schema: int, precision: str) -> Part:
    """What latents follow from. content, vae: digests of the audio file and of the VAE's weights. precision: what was asked for, or used."""
    return {
        "content": content,
        "normalize": normalize,
        "max_duration": f"{max_duration:g}",
        "vae": vae,
        "schema": str(schema),
        "precision": precision,
    }


def text_part(
    *,
    prompt: str,
    lyrics: str,
    condition_encoder: str,
    text_encoder: str,
    silence: str,
    regimes: tuple[str, ...],
    schema: int,
    precision: str,
) -> Part:
    """What conditions follow from beside the latents. prompt, lyrics: the two texts as the tokenizer gets them; the rest are digests."""
    return {
        "prompt": prompt,
        "lyrics": lyrics,
        "condition_encoder": condition_encoder,
        "text_encoder": text_encoder,
        "silence": silence,
        "regimes": " ".join(sorted({"text2music", *regimes})),
        "schema": str(schema),
        "precision": precision,
    }


RESERVE_BYTES = 64 * 1024**2  # never used, so that the system and the last record have room
TEXT_TOKENS_PER_CHARACTER = 0.5  # generous for European languages, fair for Japanese
FULL = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder that need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def record_bytes(
    *, seconds: float, frames_per_second: float, channels: int, characters: int, condition_width: int, with_hints: bool
) -> int:
    """About what a song's record takes while it is made: latents and states of the first pass, which the record then replaces."""
    latents = seconds * frames_per_second * channels * 4
    conditions = (200 + characters * TEXT_TOKENS_PER_CHARACTER) * condition_width * 4
    return int((latents + conditions) * (2 if with_hints else 1)) + 16 * 1024


def require(folder: Path, needed_bytes: int, songs: int) -> None:
    """Raises JobError when the disk of `folder` has not room for so much more."""
    free = free_bytes(folder)
    if needed_bytes + RESERVE_BYTES > free:
        raise JobError(
            f"--tensor-output {folder}: {songs} songs need about {size(needed_bytes)} and the disk has {size(free)} free.",
            f"Free {size(needed_bytes + RESERVE_BYTES - free)}, or give --tensor-output a folder on another disk.",
        )


def watch(folder: Path) -> None:
    """Raises JobError before the disk of `folder` is full to the brim."""
    free = free_bytes(folder)
    if free < RESERVE_BYTES:
        raise disk_full(folder, free)


def disk_full(folder: Path, free: int | None = None) -> JobError:
    """The error for a disk that filled up on the way."""
    left = f" ({size(free)} free)" if free is not None else ""
    return JobError(
        f"--tensor-output {folder}: the disk is full{left}.",
        "Free some space and give the same command again: it goes on where it stopped.",
    )


def is_full(error: OSError) -> bool:
    """Whether an operating system's error says that there is no room."""
    return error.errno in FULL


FOLDER = ".pass1"
LATENTS, TEXT, FAILED = ".latents.safetensors", ".text.safetensors", ".failed.json"


@dataclass(frozen=True)
class Failure:
    """A song that could not be used. stage: where it failed."""

    path: str
    reason: str
    stage: str


class WorkFolder:
    """Intermediate files by the key of their song. `facts` are plain values that stand in a file's header."""

    def __init__(self, tensor_output: Path):
        self.folder = tensor_output / FOLDER

    def save(self, key: str, kind: str, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write tensors and facts, whole or not at all. kind: LATENTS or TEXT."""
        with replacing(self.folder / f"{key}{kind}") as temporary:
            # Through Python, because a full disk is then an OSError with its number and not a library's text.
            temporary.write_bytes(
                as_bytes(
                    {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"facts": json.dumps(facts)}
                )
            )

    def facts(self, key: str, kind: str) -> dict[str, Any] | None:
        """The facts in a file's header, or None when there is no whole file."""
        try:
            with safe_open(self.folder / f"{key}{kind}", framework="pt") as f:
                return json.loads((f.metadata() or {})["facts"])
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
            return None

    def load(self, key: str, kind: str) -> dict[str, Tensor]:
        """The tensors of a file. Raises OSError or SafetensorError."""
        return load_file(self.folder / f"{key}{kind}")

    def drop(self, key: str) -> None:
        """Remove a song's intermediate files and its failure: its record stands."""
        for kind in (LATENTS, TEXT, FAILED):
            (self.folder / f"{key}{kind}").unlink(missing_ok=True)

    def note_failure(self, key: str, failure: Failure) -> None:
        """Tell the other processes of this job that the song failed, so that each says so but none tries again."""
        write_text(self.folder / f"{key}{FAILED}", json.dumps(asdict(failure), ensure_ascii=False))

    def failure(self, key: str, since: float = 0.0) -> Failure | None:
        """The song's failure, if it was noted after `since` (a file time)."""
        path = self.folder / f"{key}{FAILED}"
        try:
            if path.stat().st_mtime < since:
                return None
            return Failure(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError, TypeError):
            return None

    def keys(self) -> set[str]:
        """Keys of the songs that have any file here."""
        return {
            path.name.partition(".")[0]
            for path in self.folder.iterdir()
            if path.is_file() and not path.name.startswith(".")
        }

    def remove_if_empty(self) -> None:
        """Leave no empty folder behind."""
        for folder in (self.folder / "owners", self.folder):
            try:
                folder.rmdir()
            except OSError:
                return  # something is left, or another process works here


UNKNOWN_SECONDS = 240.0  # for a song that does not say how long it is


class Need(IntEnum):
    """What is left to do for a song, from nothing to everything."""

    NOTHING = 0
    METADATA = 1  # facts that reach no tensor changed: the record is written anew with the old ones
    CONDITIONS = 2  # text and second pass; the latents stand in the old record or the work folder
    LATENTS = 3


@dataclass(frozen=True)
class Inspection:
    """What a song needs and why. seconds: of audio, exact once its latents stand. latents_in_record: they stand in its old record.

    foreign: its record is another program's.
    """

    need: Need
    seconds: float
    reasons: tuple[str, ...] = ()
    problem: str = ""  # why its audio cannot be read
    latents_in_record: bool = False
    foreign: bool = False
    stored_content: str = ""  # digest of the audio that the old record was made from


@dataclass
class Job:
    """Built once per process. Opening reads no weights, only headers."""

    config: PreprocessConfig
    checkpoint: Checkpoint
    device: torch.device
    vae_dtype: torch.dtype
    dtype: torch.dtype
    work: WorkFolder
    identities: dict[str, str] = field(default_factory=dict)

    @property
    def with_hints(self) -> bool:
        return "hints" in self.config.regimes

    @property
    def frames_per_second(self) -> float:
        return frames_per_second(self.checkpoint.vae_config())

    @property
    def samples_per_frame(self) -> int:
        return samples_per_frame(self.checkpoint.vae_config())

    def audio_part(self, content: str, *, made: bool = False) -> Part:
        """The audio part of a fingerprint: as asked for, or as made now."""
        c = self.config
        precision = precision_name(self.vae_dtype) if made else c.precision
        return audio_part(
            content=content,
            normalize=c.normalize,
            max_duration=c.max_duration,
            vae=self.identities["vae"],
            schema=SCHEMA,
            precision=precision,
        )

    def text_part(self, prompts: Prompts, *, made: bool = False) -> Part:
        """The text part of a fingerprint: as asked for, or as made now."""
        return text_part(
            prompt=prompts.text,
            lyrics=prompts.lyrics,
            condition_encoder=self.identities["condition_encoder"],
            text_encoder=self.identities["text_encoder"],
            silence=self.identities["silence"],
            regimes=self.config.regimes,
            schema=SCHEMA,
            precision=precision_name(self.dtype) if made else self.config.precision,
        )

    def timbre_silence(self) -> torch.Tensor:
        """What stands for a timbre reference when there is none: silence, fp32 [1, T, D]."""
        return tiled_silence(self.checkpoint.silence_latent(), self.checkpoint.timbre_frames)

    def inspect(self, song: Song) -> Inspection:
        """What a song needs now. Reads no tensors, and the audio only where a record or intermediate must be compared with it."""
        metadata, foreign = self._stored(song)
        facts = self.work.facts(song.key, LATENTS)
        if foreign or (metadata is None and facts is None):
            return self._unmade(song, ("new",), foreign=foreign)
        fingerprint = (metadata or {}).get("fingerprint", {})
        stat = audio_stat(song.source)
        stored_content = str(fingerprint.get("audio", {}).get("content", ""))
        try:
            known = next((m for m in (metadata, facts) if m and m.get("audio_stat") == stat), None)
            content = known["fingerprint"]["audio"]["content"] if known else content_hash(song.source)
        except AudioError as error:
            return Inspection(Need.LATENTS, 0.0, problem=error.reason, stored_content=stored_content)
        wanted = self.audio_part(content)
        audio_reasons = differences(fingerprint.get("audio"), wanted)
        if not audio_reasons:
            seconds = float(metadata["duration"])
        elif facts and not differences(facts.get("fingerprint", {}).get("audio"), wanted):
            return Inspection(Need.CONDITIONS, float(facts["seconds"]), ("interrupted",), stored_content=stored_content)
        else:
            return self._unmade(song, audio_reasons, stored_content=stored_content)
        text_reasons = differences(fingerprint.get("text"), self.text_part(song.prompts(seconds)))
        if text_reasons:
            return Inspection(Need.CONDITIONS, seconds, text_reasons, latents_in_record=True)
        described = song.described()
        changed = tuple(name.replace("_", " ") for name, value in described.items() if metadata.get(name) != value)
        return Inspection(Need.METADATA if changed else Need.NOTHING, seconds, changed)

    def _stored(self, song: Song) -> tuple[dict | None, bool]:
        """(metadata of the song's record, whether it is another program's)."""
        if not song.record.exists():
            return None, False
        try:
            metadata = read_metadata(song.record)
        except RecordError:
            return None, False  # damaged: made anew
        return (metadata, False) if isinstance(metadata.get("fingerprint"), dict) else (None, True)

    def _unmade(
        self, song: Song, reasons: tuple[str, ...], *, foreign: bool = False, stored_content: str = ""
    ) -> Inspection:
        try:
            seconds = probe(song.source).seconds
        except AudioError as error:
            return Inspection(
                Need.LATENTS, 0.0, reasons, problem=error.reason, foreign=foreign, stored_content=stored_content
            )
        limit = self.config.max_duration or seconds
        return Inspection(
            Need.LATENTS,
            min(seconds or UNKNOWN_SECONDS, limit or UNKNOWN_SECONDS),
            reasons,
            foreign=foreign,
            stored_content=stored_content,
        )


def open_job(config: PreprocessConfig, report: Report) -> Job:
    """Open the checkpoint and settle device and precision, saying both. Raises UserError."""
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device.value)
    place = _own_device(device.value)
    report(Decision(what="device", value=str(place), reason=device.reason))
    report(Decision(what="precision", value=precision_name(precision.value), reason=precision.reason))
    # Latents are made once and learnt from ever after, and the VAE is small: it computes in fp32 unless the user says otherwise.
    vae_dtype = precision.value if config.precision != ANY_PRECISION else torch.float32
    if vae_dtype != precision.value:
        report(Decision(what="VAE precision", value="fp32", reason="latents are made once; --precision changes it"))
    job = Job(config, checkpoint, place, vae_dtype, precision.value, WorkFolder(config.tensor_output))
    job.identities = {part: checkpoint.identity(part) for part in ("vae", "text_encoder", "condition_encoder")}
    job.identities["silence"] = hashlib.blake2b(job.timbre_silence().numpy().tobytes(), digest_size=16).hexdigest()
    return job


def audio_stat(path: Path) -> list[int]:
    """Size and times of a file: as long as they stand still, its content need not be read again. Empty when it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def share() -> tuple[int, int]:
    """(rank, number of processes) under torchrun or accelerate launch; (0, 1) alone."""
    return int(os.environ.get("RANK", "0")), max(int(os.environ.get("WORLD_SIZE", "1")), 1)


def _own_device(device: torch.device) -> torch.device:
    """Each process of a machine takes a GPU of its own, unless one was named."""
    if device.type not in ("cuda", "xpu") or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device(device.type, int(os.environ["LOCAL_RANK"]) % getattr(torch, device.type).device_count())
