"""From a folder of training records to songs in memory: each one checked, split for validation, and given its windows.

A window's prompt states the window's own length, and lyrics with time marks follow it. The conditions that this takes
are encoded once, before the decoder is loaded, and kept beside the records, in the hidden folder `.windows`.
"""

import hashlib
import json
import pickle
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.conditions import (
    COVER,
    TEXT2MUSIC,
    Text,
    encode_texts,
    lyric_prompt,
    text_prompt,
    tiled_silence,
)
from sidestep.acestep.vae import frames_per_second
from sidestep.data.batches import Song, Windows
from sidestep.data.lyrics import has_time_marks, lyrics_between, without_time_marks
from sidestep.data.records import Record, RecordError, find_records, load_record
from sidestep.errors import JobError, UserError
from sidestep.events import FileFailed, Notice, Progress, Report
from sidestep.files import replacing
from sidestep.seeding import uniform
from sidestep.settings.config import TrainConfig
from sidestep.tasks.train.processes import Processes
from sidestep.words import count, side_step

FOLDER = ".windows"
SCHEMA = 1  # raise it when what was encoded before must be made anew
STARTS_PER_WINDOW = 4  # of songs with time marks: windows begin at quarters of a window, which keeps the texts few
MINIMUM_SECONDS = 1.0  # the prompt states whole seconds


def load_songs(config: TrainConfig, checkpoint: Checkpoint, report: Report) -> list[Song]:
    """Every usable record of `--dataset-dir`, in memory, in the order of their names.

    A broken one is reported and left out. Raises UserError when they were made for another model or there are none,
    JobError when none can be used.
    """
    folder = config.dataset_dir
    preprocess = ("preprocess", "--audio-dir", "SONGS", "--tensor-output", str(folder))
    again = f"Preprocess first: {side_step(*preprocess, '--checkpoint-dir', str(config.checkpoint_dir))}"
    if not folder.is_dir():
        raise UserError(f"--dataset-dir {folder}: no such folder.", again)
    paths = find_records(folder)
    if not paths:
        raise UserError(f"--dataset-dir {folder}: no preprocessed .pt tensors in it.", again)
    songs, failed = [], 0
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            songs.append(song_of(load_record(path), path, name))
        except RecordError as error:
            failed += 1
            report(FileFailed(path=name, reason=error.problem, stage="load"))
    if not songs:
        raise JobError(f"--dataset-dir {folder}: none of its {len(paths)} tensor files can be used.", again)
    require_same_model(songs, config, checkpoint, report)
    frames = sum(song.frames * song.repeat for song in songs)
    minutes = frames / frames_per_second(checkpoint.vae_config()) / 60
    left_out = f"; {failed} could not be used and are left out" if failed else ""
    report(Notice(message=f"{count(len(songs), 'song')}, {minutes:.1f} minutes, from {folder}{left_out}"))
    return songs


def song_of(record: Record, path: Path, name: str) -> Song:
    """A record as training takes it. Raises RecordError where a tensor holds NaN or infinity."""
    for what in ("target_latents", "encoder_hidden_states", "cover_hints", "hints_encoder_hidden_states"):
        tensor = getattr(record, what)
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise RecordError(
                f"{path}: {what} holds values that are no numbers.",
                "Delete the file and preprocess this song again, with --precision fp32.",
            )
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


def require_same_model(songs: list[Song], config: TrainConfig, checkpoint: Checkpoint, report: Report) -> None:
    """Raises UserError unless the records' tensors are those that this model's own encoders would make."""
    width = checkpoint.config.get("encoder_hidden_size") or checkpoint.config["hidden_size"]
    channels, model = checkpoint.latent_channels, checkpoint.folder.name
    preprocess = side_step(
        *("preprocess", "--audio-dir", "SONGS", "--tensor-output", f"{config.dataset_dir}-{model}"),
        *("--checkpoint-dir", str(config.checkpoint_dir), "--model-variant", config.model_variant),
    )
    fix = f"Preprocess for this model: {preprocess}\nor train the model that they were made for."
    for song in songs:
        found = song.latents.shape[1], song.conditions.shape[1]
        if found != (channels, width):
            raise UserError(
                f"--dataset-dir {config.dataset_dir}: {song.name} was made for another model ({found[0]} latent "
                f"channels, conditions {found[1]} wide; {model} has {channels} and {width}).",
                fix,
            )
    identity = checkpoint.identity("condition_encoder")
    made_by = [song.metadata.get("checkpoint_identity") for song in songs]
    foreign = [song for song, made in zip(songs, made_by, strict=True) if made not in (None, identity)]
    if foreign:
        others = ", ".join(Counter(str(song.metadata.get("checkpoint", "another model")) for song in foreign))
        raise UserError(
            f"--dataset-dir {config.dataset_dir}: {len(foreign)} of {len(songs)} songs, such as {foreign[0].name}, "
            f"were preprocessed with {others}, whose condition encoder differs from that of {model}.",
            fix,
        )
    if unknown := made_by.count(None):
        message = f"{unknown} records do not say which model they were preprocessed with; they are taken as made for"
        report(Notice(message=f"{message} {model}."))


def require_hints(songs: list[Song], config: TrainConfig) -> None:
    """Raises UserError when `--hints-ratio` asks for hints that some songs do not have."""
    without = [song.name for song in songs if song.hints is None]
    if config.hints_ratio and without:
        raise UserError(
            f"--hints-ratio {config.hints_ratio:g}: {len(without)} of {len(songs)} songs have no hints, "
            f"such as {without[0]}.",
            f"Make them: {side_step('preprocess', '--tensor-output', str(config.dataset_dir))} … "
            "--regimes text2music hints",
        )


def split(songs: list[Song], config: TrainConfig) -> tuple[list[Song], list[Song]]:
    """(songs to train on, songs to validate on). What was made from one audio file stays on one side.

    Raises UserError when one side is empty.
    """
    if not config.val_split:
        return songs, []
    groups: dict[str, list[Song]] = {}
    for song in songs:
        key = song.metadata  # the digest of the audio file, where the record has it
        for name in ("fingerprint", "audio", "content"):
            key = key.get(name) if isinstance(key, dict) else None
        groups.setdefault(str(key or song.name), []).append(song)
    order = sorted(groups.values(), key=lambda group: uniform(config.seed, "validation", group[0].name))
    number = max(1, round(config.val_split * len(order)))
    if number >= len(order):
        raise UserError(
            f"--val-split {config.val_split:g}: there is only one song in {config.dataset_dir}, "
            "and it is needed for training.",
            "Leave --val-split away.",
        )
    held_out = {song.name for group in order[:number] for song in group}
    return [song for song in songs if song.name not in held_out], [song for song in songs if song.name in held_out]


def with_windows(
    songs: list[Song],
    config: TrainConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes,
    report: Report,
) -> list[Song]:
    """The songs, those longer than `--chunk-duration` with their windows and the conditions of these.

    A song whose record does not say what its prompt was is left out. Raises UserError for windows too short to be named
    in a prompt, JobError when no song is left.
    """
    if not config.chunk_duration:
        return songs
    if config.chunk_duration < MINIMUM_SECONDS:
        raise UserError(
            f"--chunk-duration {config.chunk_duration:g}: a window must be at least {MINIMUM_SECONDS:g} second long.",
            "Usual are 10 to 60; 0 trains on whole songs.",
        )
    pool, rate = int(checkpoint.config.get("pool_window_size", 5)), frames_per_second(checkpoint.vae_config())
    frames = round(config.chunk_duration * rate)
    kept: list[Song] = []
    plans: dict[str, WindowPlan] = {}
    for song in songs:
        try:
            if song.frames > frames:
                plans[song.name] = plan_windows(song, frames, rate, pool)
            kept.append(song)
        except KeyError as error:
            reason = f"its record does not say its {error.args[0]}, which the prompt of a window needs"
            report(FileFailed(path=song.name, reason=reason, stage="windows"))
    if not kept:
        raise JobError(
            f"--chunk-duration {config.chunk_duration:g}: no record in {config.dataset_dir} says what its prompt was "
            "made of.",
            "Preprocess the songs with this program, or train on whole songs: --chunk-duration 0",
        )
    cache = ConditionCache(config, checkpoint, frames, dtype)
    own_share = list(plans.values())[processes.index :: processes.count]
    encode_missing(own_share, cache, checkpoint, device, dtype, report)
    processes.wait()
    if processes.count > 1:  # where the folder takes no files, each process has kept its own share only
        encode_missing(list(plans.values()), cache, checkpoint, device, dtype, report)
    if cache.error is not None:
        message = (
            f"{cache.folder}: cannot be written ({cache.error.strerror}); the windows' conditions are kept in memory "
            "and encoded again next time."
        )
        report(Notice(message=message, level="warning"))
    return [cache.windowed(plans[song.name], frames) if song.name in plans else song for song in kept]


@dataclass(frozen=True)
class WindowPlan:
    """The windows of a song before their texts are encoded: window `i` begins at `starts[i]` and has `texts[which[i]]`.

    hints: as `texts`, under the instruction of the hints regime.
    """

    song: Song
    starts: tuple[int, ...]
    which: tuple[int, ...]
    texts: tuple[Text, ...]
    hints: tuple[Text, ...]

    @property
    def by_key(self) -> dict[str, Text]:
        """All texts by the names under which their conditions are kept."""
        return {key_of(text): text for text in (*self.texts, *self.hints)}


def key_of(text: Text) -> str:
    """A digest of a window's prompt and lyrics."""
    return hashlib.blake2b(f"{text.prompt}\0{text.lyrics}".encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def plan_windows(song: Song, frames: int, rate: float, pool: int) -> WindowPlan:
    """Where the windows of a song may begin and what each is told. frames: of a window; rate: frames per second.

    Windows begin on multiples of `pool` frames, where the codes of the hints begin too. Raises KeyError naming what the
    record does not say.
    """
    metadata, seconds = song.metadata, frames / rate
    lyrics = "" if metadata.get("is_instrumental") else str(metadata["lyrics"])
    timed = has_time_marks(lyrics)
    step = max(frames // STARTS_PER_WINDOW // pool, 1) * pool if timed else pool
    last = (song.frames - frames) // pool * pool
    starts = (*range(0, last, step), last)
    if timed:
        sung = [lyrics_between(lyrics, start / rate, start / rate + seconds) for start in starts]
    else:
        sung = [without_time_marks(lyrics)] * len(starts)
    different = list(dict.fromkeys(sung))
    which = tuple(different.index(words) for words in sung)
    caption = str(metadata["prompt_caption"] if "prompt_caption" in metadata else metadata["caption"])

    def texts(instruction: str) -> tuple[Text, ...]:
        prompt = text_prompt(
            caption,
            bpm=metadata.get("bpm"),
            timesignature=str(metadata.get("timesignature") or ""),
            keyscale=str(metadata.get("keyscale") or ""),
            duration=seconds,
            instruction=instruction,
        )
        return tuple(Text(prompt, lyric_prompt(words, str(metadata.get("language") or ""))) for words in different)

    return WindowPlan(song, starts, which, texts(TEXT2MUSIC), texts(COVER) if song.hints is not None else ())


class ConditionCache:
    """Conditions of windows by the song they belong to: on disk, and in memory where the disk does not take them.

    error: why the disk did not, if so.
    """

    def __init__(self, config: TrainConfig, checkpoint: Checkpoint, frames: int, dtype: torch.dtype):
        self.folder = config.dataset_dir / FOLDER / str(frames)
        silence = tiled_silence(checkpoint.silence_latent(), checkpoint.timbre_frames).numpy().tobytes()
        parts = {
            "condition_encoder": checkpoint.identity("condition_encoder"),
            "text_encoder": checkpoint.identity("text_encoder"),
            "silence": hashlib.blake2b(silence, digest_size=16).hexdigest(),
        }
        self.fingerprint = json.dumps({**parts, "precision": str(dtype), "schema": SCHEMA}, sort_keys=True)
        self.error: OSError | None = None
        self._held: dict[str, dict[str, torch.Tensor]] = {}

    def get(self, plan: WindowPlan) -> dict[str, torch.Tensor] | None:
        """The conditions [L, C] of a song's texts by their keys, or None unless all are there and up to date."""
        held = self._held.get(plan.song.name) or self._read(plan)
        if held is None or not set(plan.by_key) <= set(held):
            return None
        self._held[plan.song.name] = held
        return held

    def put(self, plan: WindowPlan, conditions: dict[str, torch.Tensor]) -> None:
        """Keep a song's conditions."""
        try:
            with replacing(self.folder / plan.song.name) as temporary, temporary.open("wb") as f:
                torch.save({"fingerprint": self.fingerprint, "conditions": conditions}, f)
        except OSError as error:
            self.error = error
            self._held[plan.song.name] = conditions

    def windowed(self, plan: WindowPlan, frames: int) -> Song:
        """The song with its windows of `frames` and their conditions, which must have been encoded."""
        found = self.get(plan)
        assert found is not None
        texts, hints = (tuple(found[key_of(text)] for text in kind) for kind in (plan.texts, plan.hints))
        return replace(plan.song, windows=Windows(frames, plan.starts, plan.which, texts, hints))

    def _read(self, plan: WindowPlan) -> dict[str, torch.Tensor] | None:
        damaged = (RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)
        try:
            content = torch.load(self.folder / plan.song.name, map_location="cpu", weights_only=True)
            return dict(content["conditions"]) if content["fingerprint"] == self.fingerprint else None
        except (OSError, *damaged):
            return None  # not there, or damaged: made anew


def encode_missing(
    plans: list[WindowPlan],
    cache: ConditionCache,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
) -> None:
    """Encode the texts of the songs whose conditions are not in the cache."""
    missing = [plan for plan in plans if cache.get(plan) is None]
    if not missing:
        return
    texts = [text for plan in missing for text in plan.by_key.values()]
    what = f"Encoding what the windows of {count(len(missing), 'song')} are told: {count(len(texts), 'text')}"
    report(Notice(message=what))
    encoded = encode_texts(checkpoint, texts, device, dtype)
    for done, plan in enumerate(missing, start=1):
        cache.put(plan, {key: next(encoded).states[0].clone() for key in plan.by_key})
        report(Progress(task="Windows", done=done, total=len(missing), current=plan.song.name))
