"""From a folder of training records to songs: each one checked, split for validation, and given its windows.

A window's prompt states the window's own length, and lyrics with time marks follow it. The conditions that this takes
are encoded once, before the decoder is loaded, and kept beside the records, in the hidden folder `.windows`.
"""

import hashlib
import json
import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.conditions import (
    COVER,
    TEXT2MUSIC,
    Text,
    TextModels,
    encode_texts,
    lyric_prompt,
    stems_caption,
    text_prompt,
    tiled_silence,
)
from sidestep.acestep.vae import frames_per_second
from sidestep.audio.io import find_audio
from sidestep.data.batches import Song, Windows
from sidestep.data.lyrics import has_time_marks, lyrics_between, without_time_marks
from sidestep.data.manifest import with_tag
from sidestep.data.records import ReadIndex, Record, RecordError, RecordInfo, index_records, load_record, record_stat
from sidestep.errors import JobError, UserError
from sidestep.events import FileFailed, Notice, Progress, Report
from sidestep.files import replacing
from sidestep.seeding import uniform
from sidestep.settings.config import TrainConfig, TrainLmConfig
from sidestep.settings.path_checks import require_tensors
from sidestep.tasks.train.processes import Processes
from sidestep.words import clock, count, paste, side_step

FOLDER = ".windows"
SCHEMA = 1  # raise it when what was encoded before must be made anew
STARTS_PER_WINDOW = 4  # of songs with time marks: windows begin at quarters of a window, which keeps the texts few
SAME_LENGTH = 0.9  # whole songs share a batch when the shortest has this share of the longest's frames
MEMORY_SHARE = 2  # records stay in memory up to one part in so many of what is free
TOLD = (
    "caption",
    "prompt_caption",
    "lyrics",
    "bpm",
    "keyscale",
    "timesignature",
    "language",
    "is_instrumental",
)
METADATA_LINES = ("bpm", "timesignature", "keyscale")
MINIMUM_SECONDS = 1.0  # the prompt states whole seconds


def load_songs(
    config: TrainConfig,
    checkpoint: Checkpoint,
    report: Report,
    flag: str = "--dataset-dir",
    index: ReadIndex | None = None,
) -> list[Song]:
    """Every usable record of `--dataset-dir` in the order of their names; tensors are read when a batch wants them.

    flag: the one that named the folder which the config has there. index: in the place of reading its index here.
    A broken one is reported and left out. Raises UserError when they were made for another model or there are none,
    JobError when none can be used.
    """
    folder = config.dataset_dir
    again = require_tensors(folder, config.checkpoint_dir, flag)
    infos, broken = index(folder) if index else index_records(folder, report)
    for name, error in broken.items():
        report(FileFailed(path=name, reason=error.problem, stage="load"))
    if not infos and not broken:
        if find_audio(folder):
            tensors = Path(f"{folder}-tensors")
            make = ("preprocess", "--audio-dir", folder, "--tensor-output", tensors)
            raise UserError(
                f"{flag} {folder}: these are songs, not the tensors that preprocessing makes of them.",
                f"Preprocess them: {side_step(*make, '--checkpoint-dir', config.checkpoint_dir)}\n"
                f"then train with {paste((flag, str(tensors)))}",
            )
        raise UserError(f"{flag} {folder}: no preprocessed .pt tensors in it.", again)
    if not infos:
        raise JobError(f"{flag} {folder}: none of its {len(broken)} tensor files can be used.", again)
    require_same_model(infos, config, checkpoint, report, flag)
    songs = songs_of(folder, infos)
    seconds = sum(song.frames * song.repeat for song in songs) / frames_per_second(checkpoint.vae_config())
    left_out = f"; {len(broken)} could not be used and are left out" if broken else ""
    report(Notice(message=f"{count(len(songs), 'song')}, {clock(seconds)} of music, from {folder}{left_out}"))
    return songs


def require_same_songs(prints: dict[str, dict[str, str]], processes: Processes, config: TrainConfig) -> None:
    """Raises UserError, on all processes, unless each of them reads the same songs. prints: digests of each."""
    everyone = processes.gather(prints)
    names = sorted({name for theirs in everyone for name in theirs})
    differing = [name for name in names if any(theirs.get(name) != prints.get(name) for theirs in everyone)]
    if differing:
        raise UserError(
            f"--dataset-dir {config.dataset_dir}: the {processes.count} processes of this run do not read the same "
            f"songs ({count(len(differing), 'song')}, such as {differing[0]}).",
            "Wait until preprocessing has ended, give every machine the same folder, and start again.",
        )


def songs_of(folder: Path, infos: dict[str, RecordInfo]) -> list[Song]:
    """The songs of these records, whose tensors are read when they are wanted."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each of them keeps its own
    read = reader(psutil.virtual_memory().available // (MEMORY_SHARE * processes))
    return [
        Song(
            name=name,
            frames=info.frames,
            read=partial(read, folder / name, info),
            repeat=int(info.metadata.get("repeat") or 1),
            has_hints="hints" in info.digests,
            metadata=info.metadata | {"content": info.made_by.get("content")},
            digests=info.digests,
        )
        for name, info in infos.items()
    ]


def reader(budget_bytes: int) -> Callable[[Path, RecordInfo], Record]:
    """A function that reads records and keeps those that come first in memory, as many as the budget takes."""
    kept: dict[Path, Record] = {}

    def read(path: Path, info: RecordInfo) -> Record:
        """Raises RecordError where the record is not the one that was indexed."""
        nonlocal budget_bytes
        if path not in kept:
            if record_stat(path) != info.stat:
                raise RecordError(
                    f"{path}: was changed while a run trains on it.",
                    "Leave --dataset-dir alone until the run has ended, and start again.",
                )
            record, size = load_record(path), info.stat[0]
            if size > budget_bytes:
                return record
            budget_bytes -= size
            kept[path] = record
        return kept[path]

    return read


def require_same_model(
    infos: dict[str, RecordInfo], config: TrainConfig, checkpoint: Checkpoint, report: Report, flag: str
) -> None:
    """Raises UserError unless the records' tensors are those that this model's own encoders would make."""
    width = checkpoint.config.get("encoder_hidden_size") or checkpoint.config["hidden_size"]
    channels, model = checkpoint.latent_channels, checkpoint.folder.name
    preprocess = side_step(
        *("preprocess", "--audio-dir", "SONGS", "--tensor-output", f"{config.dataset_dir}-{model}"),
        *("--checkpoint-dir", str(config.checkpoint_dir), "--model-variant", config.model_variant),
    )
    fix = f"Preprocess for this model: {preprocess}\nor train the model that they were made for."
    for name, info in infos.items():
        if (info.channels, info.width) != (channels, width):
            raise UserError(
                f"{flag} {config.dataset_dir}: {name} was made for another model ({info.channels} latent "
                f"channels, conditions {info.width} wide; {model} has {channels} and {width}).",
                fix,
            )
    parts = {"vae": "VAE", "text_encoder": "text encoder", "condition_encoder": "condition encoder"}
    for part, title in parts.items():
        made_by = {name: info.made_by[part] for name, info in infos.items() if part in info.made_by}
        own = checkpoint.identity(part) if made_by and checkpoint.has(part) else None
        if own and set(made_by.values()) != {own}:
            earlier = checkpoint.sampled_identity(part)
            made_by = {name: own if made == earlier else made for name, made in made_by.items()}
        foreign = [name for name, made in made_by.items() if own and made != own]
        if foreign:
            others = ", ".join({str(infos[name].metadata.get("checkpoint", "another model")): 0 for name in foreign})
            raise UserError(
                f"{flag} {config.dataset_dir}: {len(foreign)} of {len(infos)} songs, such as {foreign[0]}, "
                f"were preprocessed with {others}, whose {title} differs from that of {model}.",
                fix,
            )
        if len(set(made_by.values())) > 1:
            first, *rest = made_by
            other = next(name for name in rest if made_by[name] != made_by[first])
            raise UserError(f"{flag} {config.dataset_dir}: {first} and {other} were made with different {title}s.", fix)
    if unknown := sum("condition_encoder" not in info.made_by for info in infos.values()):
        message = f"{unknown} records do not say which model they were preprocessed with; they are taken as made for"
        report(Notice(message=f"{message} {model}."))


def fingerprints(songs: list[Song], config: TrainConfig) -> dict[str, dict[str, str]]:
    """What a run depends on of each song, by its name and in the user's words, as digests."""
    has_windows = config.chunk_duration > 0 or config.batch_size > 1 or isinstance(config, TrainLmConfig)
    found = {}
    for song in songs:
        found[song.name] = {**song.digests, "repeats": str(song.repeat)}
        if has_windows or (
            is_told(song) and len(wordings(song.metadata, config)) > 1
        ):  # their prompts are made of this
            told = [song.metadata.get(name) for name in (*TOLD, *({"captions"} & song.metadata.keys()))]
            if share := song.metadata.get("genre_ratio"):
                told += [song.metadata.get("genre"), share]
            found[song.name]["caption, lyrics or metadata"] = digest_of(json.dumps(told))
    return found


def digest_of(text: str) -> str:
    """A short digest of a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def require_hints(songs: list[Song], config: TrainConfig) -> None:
    """Raises UserError when `--hints-ratio` asks for hints that some songs do not have."""
    without = [song.name for song in songs if not song.has_hints]
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
        groups.setdefault(song.metadata.get("content") or song.name, []).append(song)
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
    held_out: list[Song],
    config: TrainConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes,
    report: Report,
    models: TextModels | None = None,
) -> tuple[list[Song], list[Song]]:
    """(songs to train on, songs to validate on), those that are not heard whole with their windows' conditions.

    With `--chunk-duration` a song whose record does not say what its prompt was is left out; without, it stays whole.
    Raises UserError for windows too short to be named in a prompt, JobError when no song is left.
    """
    if 0 < config.chunk_duration < MINIMUM_SECONDS:
        raise UserError(
            f"--chunk-duration {config.chunk_duration:g}: a window must be at least {MINIMUM_SECONDS:g} second long.",
            "Usual are 10 to 60; 0 trains on whole songs.",
        )
    pool, rate = int(checkpoint.config.get("pool_window_size", 5)), frames_per_second(checkpoint.vae_config())
    lengths = window_lengths(songs, held_out, config, rate)
    for song in (*songs, *held_out):
        if song.name not in lengths and is_told(song) and len(wordings(song.metadata, config)) > 1:
            lengths[song.name] = song.frames  # heard whole, and told in several ways
    plans, nameless = {}, set()
    for song in (*songs, *held_out):
        if song.name in lengths:
            try:
                plans[song.name] = plan_windows(
                    song, lengths[song.name], rate, pool, config, checkpoint.variant.is_stems
                )
            except KeyError as error:
                reason = f"its record does not say its {error.args[0]}, which the prompt of a window needs"
                report(FileFailed(path=song.name, reason=reason, stage="windows"))
                nameless.add(song.name)
    if len(nameless) == len(songs) + len(held_out):
        raise JobError(
            f"--chunk-duration {config.chunk_duration:g}: no record in {config.dataset_dir} says what its prompt was "
            "made of.",
            "Preprocess the songs with this program, or train on whole songs: --chunk-duration 0",
        )
    cache = ConditionCache(config, checkpoint, dtype) if plans else None
    if cache:
        own_share = list(plans.values())[processes.index :: processes.count]
        encode_missing(own_share, cache, checkpoint, device, dtype, report, models)
        processes.wait()
        if processes.count > 1:  # where the folder takes no files, each process has kept its own share only
            encode_missing(list(plans.values()), cache, checkpoint, device, dtype, report, models)
        if cache.error is not None:
            message = (
                f"{cache.folder}: cannot be written ({cache.error.strerror}); the windows' conditions are kept in "
                "memory and encoded again next time."
            )
            report(Notice(message=message, level="warning"))

    def cut(some: list[Song]) -> list[Song]:
        kept = [song for song in some if song.name not in nameless]
        return [cache.windowed(plans[song.name]) if cache and song.name in plans else song for song in kept]

    return cut(songs), cut(held_out)


def window_lengths(songs: list[Song], held_out: list[Song], config: TrainConfig, rate: float) -> dict[str, int]:
    """Frames of the windows in which songs are heard that are not heard whole. rate: frames per second."""
    chunk = round(config.chunk_duration * rate)
    lengths = {song.name: chunk for song in (*songs, *held_out) if chunk and song.frames > chunk}
    if config.batch_size > 1:
        lengths |= shared_lengths([song for song in songs if song.name not in lengths and is_told(song)])
    return lengths


def largest_batch(songs: list[Song], config: TrainConfig, rate: float) -> tuple[int, int]:
    """(latent frames, songs) of the batch of a run that takes most, since only what is of one length shares one.

    rate: frames per second.
    """
    lengths, heard = window_lengths(songs, [], config, rate), Counter[int]()
    for song in songs:
        heard[lengths.get(song.name, song.frames)] += song.repeat
    batches = ((frames, min(times, config.batch_size)) for frames, times in heard.items())
    return max(batches, key=lambda batch: batch[0] * batch[1])


def is_told(song: Song) -> bool:
    """Whether a record says what its prompt was made of."""
    return "lyrics" in song.metadata and ("caption" in song.metadata or "prompt_caption" in song.metadata)


def shared_lengths(songs: list[Song]) -> dict[str, int]:
    """Frames of the windows by which songs of nearly one length share batches; none for songs heard whole.

    From the longest down, songs of at least SAME_LENGTH of the first are heard in windows as long as the shortest.
    """
    lengths: dict[str, int] = {}
    rest = sorted(songs, key=lambda song: (-song.frames, song.name))
    while rest:
        group = [song for song in rest if song.frames >= SAME_LENGTH * rest[0].frames]
        rest = rest[len(group) :]
        shortest = group[-1].frames
        lengths |= {song.name: shortest for song in group if song.frames > shortest}
    return lengths


@dataclass(frozen=True)
class WindowPlan:
    """Windows of `frames` before their texts are encoded: number `i` begins at `starts[i]` and has `texts[which[i]]`.

    hints: as `texts`, under the instruction of the hints regime. shares: of the prompt's wordings, see `Windows`.
    """

    song: Song
    frames: int
    starts: tuple[int, ...]
    which: tuple[int, ...]
    texts: tuple[Text, ...]
    hints: tuple[Text, ...]
    shares: tuple[float, ...] = (1.0,)

    @property
    def by_key(self) -> dict[str, Text]:
        """All texts by the names under which their conditions are kept."""
        return {key_of(text): text for text in (*self.texts, *self.hints)}


def key_of(text: Text) -> str:
    """A digest of a window's prompt and lyrics."""
    return digest_of(f"{text.prompt}\0{text.lyrics}")


@dataclass(frozen=True)
class Wording:
    """One way in which a song may be described. share: how often it is drawn. untold: the metadata line that is N/A."""

    caption: str
    share: float
    untold: str = ""


def wordings(metadata: Mapping[str, Any], config: TrainConfig) -> tuple[Wording, ...]:
    """All ways in which a song may be described under the settings, with shares that add up to 1; its own comes first.

    The captions share evenly what is not the tag alone and not the genre, which `genre_ratio` percent of the rest are.
    Raises KeyError naming what the record does not say.
    """
    caption = str(metadata["prompt_caption"] if "prompt_caption" in metadata else metadata["caption"])
    tag, position = str(metadata.get("custom_tag") or ""), str(metadata.get("tag_position") or "prepend")
    texts = [str(metadata.get(name) or "") for name in ("caption", "genre")]
    first = next((text for text in texts if text and with_tag(text, tag, position) == caption), caption)
    plain = [first, *json.loads(str(metadata.get("captions") or "[]"))]
    by_genre = int(metadata.get("genre_ratio") or 0) / 100
    parts = [(1 - by_genre, len(plain))] * len(plain)
    if by_genre:
        plain, parts = [*plain, str(metadata.get("genre") or "")], [*parts, (by_genre, 1)]
    tagged = [caption, *(with_tag(text, tag, position) for text in plain[1:])]
    told: dict[str, float] = {}
    for whole, bare, (part, sharing) in zip(tagged, plain, parts, strict=True):
        each = (1 - config.caption_dropout) * part / sharing
        for text, share in ((whole, each * (1 - config.tag_dropout)), (bare, each * config.tag_dropout)):
            told[text] = told.get(text, 0.0) + share
    told[tag] = told.get(tag, 0.0) + config.caption_dropout
    lines = [name for name in METADATA_LINES if metadata.get(name)]
    dropped = config.metadata_dropout if lines else 0.0
    every = [Wording(text, share * (1 - dropped)) for text, share in told.items()]
    every += [Wording(text, share * dropped / len(lines), name) for text, share in told.items() for name in lines]
    return (every[0], *(wording for wording in every[1:] if wording.share))


def plan_windows(
    song: Song, frames: int, rate: float, pool: int, config: TrainConfig, is_stems: bool = False
) -> WindowPlan:
    """Where the windows of a song may begin and what each is told. frames: of a window; rate: frames per second.

    Windows begin on multiples of `pool` frames, where the codes of the hints begin too. A song heard whole is one
    window. Raises KeyError naming what the record does not say.
    """
    metadata, seconds = song.metadata, frames / rate
    if frames == song.frames:
        seconds = float(metadata.get("duration") or seconds)
    lyrics = "" if metadata.get("is_instrumental") else str(metadata["lyrics"])
    timed = has_time_marks(lyrics) and frames < song.frames
    step = max(frames // STARTS_PER_WINDOW // pool, 1) * pool if timed else pool
    last = (song.frames - frames) // pool * pool
    starts = (*range(0, last, step), last)
    if timed:
        sung = [lyrics_between(lyrics, start / rate, start / rate + seconds) for start in starts]
    else:
        sung = [without_time_marks(lyrics)] * len(starts)
    different = list(dict.fromkeys(sung))
    which = tuple(different.index(words) for words in sung)
    ways = wordings(metadata, config)

    def texts(instruction: str) -> tuple[Text, ...]:
        prompts = [
            text_prompt(
                stems_caption(way.caption) if is_stems else way.caption,
                bpm=None if way.untold == "bpm" else metadata.get("bpm"),
                timesignature="" if way.untold == "timesignature" else str(metadata.get("timesignature") or ""),
                keyscale="" if way.untold == "keyscale" else str(metadata.get("keyscale") or ""),
                duration=seconds,
                instruction=instruction,
            )
            for way in ways
        ]
        language = str(metadata.get("language") or "")
        return tuple(Text(prompt, lyric_prompt(words, language)) for prompt in prompts for words in different)

    hints = texts(COVER) if song.has_hints else ()
    return WindowPlan(song, frames, starts, which, texts(TEXT2MUSIC), hints, tuple(way.share for way in ways))


class ConditionCache:
    """Conditions of windows by the song they belong to: on disk, and in memory where the disk does not take them.

    error: why the disk did not, if so.
    """

    def __init__(self, config: TrainConfig, checkpoint: Checkpoint, dtype: torch.dtype):
        self.folder = config.dataset_dir / FOLDER
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
            with replacing(self._path(plan)) as temporary, temporary.open("wb") as f:
                torch.save({"fingerprint": self.fingerprint, "conditions": conditions}, f)
        except OSError as error:
            self.error = error
            self._held[plan.song.name] = conditions

    def windowed(self, plan: WindowPlan) -> Song:
        """The song with its windows and their conditions, which must have been encoded."""
        found = self.get(plan)
        assert found is not None
        texts, hints = (tuple(found[key_of(text)] for text in kind) for kind in (plan.texts, plan.hints))
        return replace(plan.song, windows=Windows(plan.frames, plan.starts, plan.which, texts, hints, plan.shares))

    def _path(self, plan: WindowPlan) -> Path:
        return self.folder / str(plan.frames) / plan.song.name

    def _read(self, plan: WindowPlan) -> dict[str, torch.Tensor] | None:
        damaged = (RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)
        try:
            content = torch.load(self._path(plan), map_location="cpu", weights_only=True)
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
    models: TextModels | None = None,
) -> None:
    """Encode the texts of the songs whose conditions are not in the cache."""
    missing = [plan for plan in plans if cache.get(plan) is None]
    if not missing:
        return
    texts = [text for plan in missing for text in plan.by_key.values()]
    what = f"Encoding what {count(len(missing), 'song')} or its windows can be told: {count(len(texts), 'text')}"
    report(Notice(message=what))
    with closing(encode_texts(checkpoint, texts, device, dtype, models)) as encoded:
        for done, plan in enumerate(missing, start=1):
            cache.put(plan, {key: next(encoded).states[0].clone() for key in plan.by_key})
            report(Progress(task="Windows", done=done, total=len(missing), current=plan.song.name))
