"""From a folder of training records to songs in memory, each checked: whole, finite, made for this model."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.vae import frames_per_second
from sidestep.config import TrainConfig
from sidestep.data.dataset import Song
from sidestep.data.samples import Record, RecordError, find_records, load_record
from sidestep.errors import JobError, UserError
from sidestep.events import FileFailed, Notice, Report
from sidestep.seeding import uniform


def load_songs(config: TrainConfig, checkpoint: Checkpoint, report: Report) -> list[Song]:
    """Every usable record of `--dataset-dir`, in memory, in the order of their names. A broken one is reported and left out.

    Raises UserError when they were made for another model or there are none, JobError when none can be used.
    """
    folder = config.dataset_dir
    again = f"Preprocess first: uv run train.py fixed --preprocess --audio-dir SONGS --tensor-output {folder} --checkpoint-dir {config.checkpoint_dir}"
    if not folder.is_dir():
        raise UserError(f"--dataset-dir {folder}: no such folder.", again)
    paths = find_records(folder)
    if not paths:
        raise UserError(f"--dataset-dir {folder}: no preprocessed .pt tensors in it.", again)
    songs, failed = [], 0
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            songs.append(_song(load_record(path), path, name))
        except RecordError as error:
            failed += 1
            report(FileFailed(path=name, reason=error.problem, stage="load"))
    if not songs:
        raise JobError(f"--dataset-dir {folder}: none of its {len(paths)} tensor files can be used.", again)
    _require_fit(songs, config, checkpoint, report)
    frames = sum(song.frames * song.repeat for song in songs)
    left_out = f"; {failed} could not be used and are left out" if failed else ""
    report(Notice(message=f"{len(songs)} songs, {frames / frames_per_second(checkpoint.vae_config()) / 60:.1f} minutes, from {folder}{left_out}"))
    return songs


def _song(record: Record, path: Path, name: str) -> Song:
    for what in ("target_latents", "encoder_hidden_states", "cover_hints", "hints_encoder_hidden_states"):
        tensor = getattr(record, what)
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise RecordError(f"{path}: {what} holds values that are no numbers.", "Delete the file and preprocess this song again, with --precision fp32.")
    repeat = record.metadata.get("repeat", 1)
    return Song(
        name=name,
        latents=record.target_latents,
        conditions=record.encoder_hidden_states,
        repeat=repeat if isinstance(repeat, int) and repeat > 0 else 1,
        hints=record.cover_hints if record.has_hints else None,
        hints_conditions=record.hints_encoder_hidden_states if record.has_hints else None,
        metadata=record.metadata,
    )


def _require_fit(songs: list[Song], config: TrainConfig, checkpoint: Checkpoint, report: Report) -> None:
    """Raises UserError unless the records' tensors are those that this model's own encoders would make."""
    width = checkpoint.config.get("encoder_hidden_size") or checkpoint.config["hidden_size"]
    channels = checkpoint.latent_channels
    fix = (
        f"Preprocess for this model: uv run train.py fixed --preprocess --audio-dir SONGS --tensor-output {config.dataset_dir}-{checkpoint.folder.name} "
        f"--checkpoint-dir {config.checkpoint_dir} --model-variant {config.model_variant}\nor train the model that they were made for."
    )
    for song in songs:
        has = song.latents.shape[1], song.conditions.shape[1]
        if has != (channels, width):
            raise UserError(
                f"--dataset-dir {config.dataset_dir}: {song.name} was made for another model ({has[0]} latent channels, conditions {has[1]} wide; "
                f"{checkpoint.folder.name} has {channels} and {width}).",
                fix,
            )
    identity = checkpoint.identity("condition_encoder")
    made_by = [song.metadata.get("checkpoint_identity") for song in songs]
    strangers = [song for song, made in zip(songs, made_by, strict=True) if made not in (None, identity)]
    if strangers:
        others = ", ".join(Counter(str(song.metadata.get("checkpoint", "another model")) for song in strangers))
        raise UserError(
            f"--dataset-dir {config.dataset_dir}: {len(strangers)} of {len(songs)} songs, such as {strangers[0].name}, were preprocessed with {others}, "
            f"whose condition encoder differs from that of {checkpoint.folder.name}.",
            fix,
        )
    unknown = made_by.count(None)
    if unknown:
        report(Notice(message=f"{unknown} records do not say which model they were preprocessed with; they are taken as made for {checkpoint.folder.name}."))


def require_hints(songs: list[Song], config: TrainConfig) -> None:
    """Raises UserError when `--hints-ratio` asks for hints that some songs do not have."""
    without = [song.name for song in songs if song.hints is None]
    if config.hints_ratio and without:
        raise UserError(
            f"--hints-ratio {config.hints_ratio:g}: {len(without)} of {len(songs)} songs have no hints, such as {without[0]}.",
            f"Make them: uv run train.py fixed --preprocess … --tensor-output {config.dataset_dir} --regimes text2music hints",
        )


def split(songs: list[Song], config: TrainConfig) -> tuple[list[Song], list[Song]]:
    """(songs to train on, songs to validate on). What was made from one audio file stays on one side. Raises UserError when one side is empty."""
    if not config.val_split:
        return songs, []
    groups: dict[Any, list[Song]] = {}
    for song in songs:
        groups.setdefault(_audio(song), []).append(song)
    order = sorted(groups.values(), key=lambda group: uniform(config.seed, "validation", group[0].name))
    count = max(1, round(config.val_split * len(order)))
    if count >= len(order):
        raise UserError(
            f"--val-split {config.val_split:g}: there is only one song in {config.dataset_dir}, and it is needed for training.", "Leave --val-split away."
        )
    held_out = {song.name for group in order[:count] for song in group}
    return [song for song in songs if song.name not in held_out], [song for song in songs if song.name in held_out]


def _audio(song: Song) -> str:
    """What tells a song's audio from others': the digest of its file, where the record has it."""
    fingerprint = song.metadata.get("fingerprint")
    audio = fingerprint.get("audio") if isinstance(fingerprint, dict) else None
    content = audio.get("content") if isinstance(audio, dict) else None
    return str(content or song.name)
