"""From a folder of training records to songs in memory, each checked: whole, finite, made for this model.

Songs cut into windows: a window's prompt states the window's own length, and lyrics with time marks follow it.

The conditions that this takes are encoded once, before the decoder is loaded: text encoder and condition encoder alone, one after the other.
They are kept beside the tensors, in the hidden folder `.windows`, and made anew when anything they depend on changes.
"""

import hashlib
import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.conditions import (
    COVER,
    LYRIC_TOKENS,
    TEXT2MUSIC,
    TEXT_TOKENS,
    encode_conditions,
    encode_text,
    lyric_prompt,
    text_prompt,
    tiled_silence,
    token_ids,
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


def load_songs(config: TrainConfig, checkpoint: Checkpoint, report: Report) -> list[Song]:
    """Every usable record of `--dataset-dir`, in memory, in the order of their names. A broken one is reported and left out.

    Raises UserError when they were made for another model or there are none, JobError when none can be used.
    """
    folder = config.dataset_dir
    again = f"Preprocess first: uv run train.py preprocess --audio-dir SONGS --tensor-output {folder} --checkpoint-dir {config.checkpoint_dir}"
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
    report(
        Notice(
            message=f"{len(songs)} songs, {frames / frames_per_second(checkpoint.vae_config()) / 60:.1f} minutes, from {folder}{left_out}"
        )
    )
    return songs


def _song(record: Record, path: Path, name: str) -> Song:
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


def _require_fit(songs: list[Song], config: TrainConfig, checkpoint: Checkpoint, report: Report) -> None:
    """Raises UserError unless the records' tensors are those that this model's own encoders would make."""
    width = checkpoint.config.get("encoder_hidden_size") or checkpoint.config["hidden_size"]
    channels = checkpoint.latent_channels
    fix = (
        f"Preprocess for this model: uv run train.py preprocess --audio-dir SONGS --tensor-output {config.dataset_dir}-{checkpoint.folder.name} "
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
        report(
            Notice(
                message=f"{unknown} records do not say which model they were preprocessed with; they are taken as made for {checkpoint.folder.name}."
            )
        )


def require_hints(songs: list[Song], config: TrainConfig) -> None:
    """Raises UserError when `--hints-ratio` asks for hints that some songs do not have."""
    without = [song.name for song in songs if song.hints is None]
    if config.hints_ratio and without:
        raise UserError(
            f"--hints-ratio {config.hints_ratio:g}: {len(without)} of {len(songs)} songs have no hints, such as {without[0]}.",
            f"Make them: uv run train.py preprocess … --tensor-output {config.dataset_dir} --regimes text2music hints",
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
            f"--val-split {config.val_split:g}: there is only one song in {config.dataset_dir}, and it is needed for training.",
            "Leave --val-split away.",
        )
    held_out = {song.name for group in order[:count] for song in group}
    return [song for song in songs if song.name not in held_out], [song for song in songs if song.name in held_out]


def _audio(song: Song) -> str:
    """What tells a song's audio from others': the digest of its file, where the record has it."""
    fingerprint = song.metadata.get("fingerprint")
    audio = fingerprint.get("audio") if isinstance(fingerprint, dict) else None
    content = audio.get("content") if isinstance(audio, dict) else None
    return str(content or song.name)


FOLDER = ".windows"
SCHEMA = 1  # raise it when what was encoded before must be made anew
STARTS_PER_WINDOW = 4  # of songs with time marks: windows begin at quarters of a window, which keeps the texts few
MINIMUM_SECONDS = 1.0  # the prompt states whole seconds


@dataclass(frozen=True)
class Text:
    """What conditions a window: the two prompts as the tokenizer gets them."""

    prompt: str
    lyrics: str

    @property
    def key(self) -> str:
        return hashlib.blake2b(
            f"{self.prompt}\0{self.lyrics}".encode("utf-8", "surrogatepass"), digest_size=12
        ).hexdigest()


@dataclass(frozen=True)
class Cut:
    """How a song is to be cut, before anything is encoded. hints: as `texts`, under the instruction of the hints regime."""

    song: Song
    starts: tuple[int, ...]
    which: tuple[int, ...]
    texts: tuple[Text, ...]
    hints: tuple[Text, ...]

    @property
    def needed(self) -> dict[str, Text]:
        return {text.key: text for text in (*self.texts, *self.hints)}


def window_frames(config: TrainConfig, checkpoint: Checkpoint) -> int:
    """Latent frames in a window of `--chunk-duration`, 0 for whole songs. Raises UserError for one too short to be named in a prompt."""
    if not config.chunk_duration:
        return 0
    if config.chunk_duration < MINIMUM_SECONDS:
        raise UserError(
            f"--chunk-duration {config.chunk_duration:g}: a window must be at least {MINIMUM_SECONDS:g} second long.",
            "Usual are 10 to 60; 0 trains on whole songs.",
        )
    return round(config.chunk_duration * frames_per_second(checkpoint.vae_config()))


def with_windows(
    songs: list[Song],
    config: TrainConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes,
    report: Report,
) -> list[Song]:
    """The songs, those longer than `--chunk-duration` with their windows. A song whose record does not say what its prompt was is left out.

    Raises UserError, JobError when none is left.
    """
    frames = window_frames(config, checkpoint)
    if not frames:
        return songs
    pool, rate = int(checkpoint.config.get("pool_window_size", 5)), frames_per_second(checkpoint.vae_config())
    kept, cuts = [], {}
    for song in songs:
        if song.frames <= frames:
            kept.append(song)
            continue
        try:
            cuts[song.name] = cut(song, frames, rate, pool)
            kept.append(song)
        except KeyError as error:
            report(
                FileFailed(
                    path=song.name,
                    reason=f"its record does not say its {error.args[0]}, which the prompt of a window needs",
                    stage="windows",
                )
            )
    if not kept:
        raise JobError(
            f"--chunk-duration {config.chunk_duration:g}: no record in {config.dataset_dir} says what its prompt was made of.",
            "Preprocess the songs with this program, or train on whole songs: --chunk-duration 0",
        )
    shelf = Shelf(config, checkpoint, frames, dtype)
    encode(list(cuts.values()), shelf, checkpoint, device, dtype, processes, report)
    return [windowed(cuts[song.name], frames, shelf) if song.name in cuts else song for song in kept]


def cut(song: Song, frames: int, rate: float, pool: int) -> Cut:
    """Where the windows of a song may begin and what each is told. frames: of a window; rate: frames per second.

    Windows begin on multiples of `pool` frames, where the codes of the hints begin too. Raises KeyError naming what the record does not say.
    """
    facts, seconds = song.metadata, frames / rate
    lyrics = "" if facts.get("is_instrumental") else str(facts["lyrics"])
    timed = has_time_marks(lyrics)
    step = max(frames // STARTS_PER_WINDOW // pool, 1) * pool if timed else pool
    starts = tuple(range(0, song.frames - frames + 1, step))
    last = (song.frames - frames) // pool * pool
    starts += (last,) if last != starts[-1] else ()
    sung = (
        [lyrics_between(lyrics, start / rate, start / rate + seconds) for start in starts]
        if timed
        else [without_time_marks(lyrics)]
    )
    different = list(dict.fromkeys(sung))
    which = tuple(different.index(words) for words in sung) if timed else (0,) * len(starts)
    caption = str(facts["prompt_caption"] if "prompt_caption" in facts else facts["caption"])
    stated = {
        "bpm": facts.get("bpm"),
        "timesignature": str(facts.get("timesignature") or ""),
        "keyscale": str(facts.get("keyscale") or ""),
    }

    def texts(instruction: str) -> tuple[Text, ...]:
        prompt = text_prompt(caption, **stated, duration=seconds, instruction=instruction)
        return tuple(Text(prompt, lyric_prompt(words, str(facts.get("language") or ""))) for words in different)

    return Cut(song, starts, which, texts(TEXT2MUSIC), texts(COVER) if song.hints is not None else ())


def windowed(plan: Cut, frames: int, shelf: "Shelf") -> Song:
    """The song with its windows and their conditions."""
    conditions = shelf.conditions(plan)
    return replace(
        plan.song,
        windows=Windows(
            frames,
            plan.starts,
            plan.which,
            tuple(conditions[text.key] for text in plan.texts),
            tuple(conditions[text.key] for text in plan.hints),
        ),
    )


class Shelf:
    """Encoded conditions by the song they belong to: on disk, and in memory where the disk does not take them."""

    def __init__(self, config: TrainConfig, checkpoint: Checkpoint, frames: int, dtype: torch.dtype):
        self.folder = config.dataset_dir / FOLDER / str(frames)
        silence = hashlib.blake2b(
            tiled_silence(checkpoint.silence_latent(), checkpoint.timbre_frames).numpy().tobytes(), digest_size=16
        ).hexdigest()
        parts = {
            "condition_encoder": checkpoint.identity("condition_encoder"),
            "text_encoder": checkpoint.identity("text_encoder"),
            "silence": silence,
        }
        self.fingerprint = json.dumps({**parts, "precision": str(dtype), "schema": SCHEMA}, sort_keys=True)
        self.refusal: OSError | None = None
        self._held: dict[str, dict[str, torch.Tensor]] = {}

    def conditions(self, plan: Cut) -> dict[str, torch.Tensor] | None:
        """The conditions [L, C] of a song's texts by their keys, or None unless all of them are there and up to date."""
        held = self._held.get(plan.song.name) or self._read(plan)
        if held is None or not set(plan.needed) <= set(held):
            return None
        self._held[plan.song.name] = held
        return held

    def put(self, plan: Cut, conditions: dict[str, torch.Tensor]) -> None:
        """Keep a song's conditions."""
        path = self._path(plan)
        try:
            with replacing(path) as temporary, temporary.open("wb") as f:
                torch.save({"fingerprint": self.fingerprint, "conditions": conditions}, f)
        except OSError as error:
            self.refusal = error
            self._held[plan.song.name] = conditions

    def _path(self, plan: Cut) -> Path:
        return self.folder / plan.song.name

    def _read(self, plan: Cut) -> dict[str, torch.Tensor] | None:
        try:
            content = torch.load(self._path(plan), map_location="cpu", weights_only=True)
            return dict(content["conditions"]) if content["fingerprint"] == self.fingerprint else None
        except (
            OSError,
            RuntimeError,
            KeyError,
            TypeError,
            ValueError,
            EOFError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
        ):
            return None  # not there, or damaged: made anew


def encode(
    cuts: list[Cut],
    shelf: Shelf,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes,
    report: Report,
) -> None:
    """Encode what the shelf does not hold, each process its share of the songs."""
    _encode(cuts[processes.index :: processes.count], shelf, checkpoint, device, dtype, report)
    processes.wait()
    if processes.count > 1:  # where the folder takes no files, each process has kept its own share only
        _encode(cuts, shelf, checkpoint, device, dtype, report)
    if shelf.refusal is not None:
        report(
            Notice(
                message=f"{shelf.folder}: cannot be written ({shelf.refusal.strerror}); the windows' conditions are kept in memory and encoded again next time.",
                level="warning",
            )
        )


def _encode(
    cuts: list[Cut], shelf: Shelf, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, report: Report
) -> None:
    missing = [plan for plan in cuts if shelf.conditions(plan) is None]
    if not missing:
        return
    report(
        Notice(
            message=f"Encoding what the windows of {len(missing)} songs are told: {sum(len(plan.needed) for plan in missing)} texts"
        )
    )
    states, lyric_ids, table = _text_states(missing, checkpoint, device, dtype)
    encoder = checkpoint.load_condition_encoder(device, dtype)
    silence = tiled_silence(checkpoint.silence_latent(), checkpoint.timbre_frames)
    for done, plan in enumerate(missing, start=1):
        conditions = {}
        for key, text in plan.needed.items():
            conditions[key] = (
                encode_conditions(encoder, states[text.prompt], table(lyric_ids[text.lyrics]), silence)[0].cpu().clone()
            )
        shelf.put(plan, conditions)
        report(Progress(task="Windows", done=done, total=len(missing), current=plan.song.name))


def _text_states(
    cuts: list[Cut], checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Callable[[torch.Tensor], Any]]:
    """(states [1, N, H] of each prompt, token ids [1, N] of each lyrics, the embedding table they go through), all on the CPU.

    A song has one prompt and many lyrics, whose states are large: they are looked up when they are needed.
    """
    model, tokenizer = checkpoint.load_text_encoder(device, dtype)
    texts = [text for plan in cuts for text in plan.needed.values()]
    states = {
        prompt: encode_text(model, token_ids(tokenizer, prompt, TEXT_TOKENS)[0]).cpu()
        for prompt in dict.fromkeys(text.prompt for text in texts)
    }
    ids = {
        lyrics: token_ids(tokenizer, lyrics, LYRIC_TOKENS)[0] for lyrics in dict.fromkeys(text.lyrics for text in texts)
    }
    return states, ids, model.get_input_embeddings().cpu()
