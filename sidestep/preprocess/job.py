"""What holds for a whole preprocessing job: its checkpoint, its numbers, what every song's tensors depend on, and what each song still needs."""

import hashlib
import os
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import torch

from sidestep.acestep.checkpoint import Checkpoint, open_checkpoint
from sidestep.acestep.conditions import tiled_silence
from sidestep.acestep.device import choose_device, choose_precision, precision_name
from sidestep.acestep.vae import frames_per_second, samples_per_frame
from sidestep.audio.io import AudioError, content_hash, probe
from sidestep.config import PreprocessConfig
from sidestep.data.samples import SCHEMA, RecordError, read_metadata
from sidestep.events import Chosen, Report
from sidestep.preprocess.fingerprint import ANY_PRECISION, Part, audio_part, differences, text_part
from sidestep.preprocess.songs import Prompts, Song
from sidestep.preprocess.work import LATENTS, WorkFolder

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
        return audio_part(content=content, normalize=c.normalize, max_duration=c.max_duration, vae=self.identities["vae"], schema=SCHEMA, precision=precision)

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

    def _unmade(self, song: Song, reasons: tuple[str, ...], *, foreign: bool = False, stored_content: str = "") -> Inspection:
        try:
            seconds = probe(song.source).seconds
        except AudioError as error:
            return Inspection(Need.LATENTS, 0.0, reasons, problem=error.reason, foreign=foreign, stored_content=stored_content)
        limit = self.config.max_duration or seconds
        return Inspection(Need.LATENTS, min(seconds or UNKNOWN_SECONDS, limit or UNKNOWN_SECONDS), reasons, foreign=foreign, stored_content=stored_content)


def open_job(config: PreprocessConfig, report: Report) -> Job:
    """Open the checkpoint and settle device and precision, saying both. Raises UserError."""
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device.value)
    place = _own_device(device.value)
    report(Chosen(what="device", value=str(place), reason=device.reason))
    report(Chosen(what="precision", value=precision_name(precision.value), reason=precision.reason))
    # Latents are made once and learnt from ever after, and the VAE is small: it computes in fp32 unless the user says otherwise.
    vae_dtype = precision.value if config.precision != ANY_PRECISION else torch.float32
    if vae_dtype != precision.value:
        report(Chosen(what="VAE precision", value="fp32", reason="latents are made once; --precision changes it"))
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
