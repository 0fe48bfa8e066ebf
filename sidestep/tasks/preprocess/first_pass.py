"""The first pass, into the work folder: latents by the VAE, then text states by the text encoder.

One model at a time is on the device. Songs are decoded ahead of the VAE, within a bound on the memory that waits,
and files are written behind it. A song of more than HELD_SECONDS is never in memory: it is decoded once for its length
and level, and once more on its way through the VAE.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from os import cpu_count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from sidestep.acestep.conditions import COVER, LYRIC_TOKENS, TEXT_TOKENS, embed_lyrics, encode_text, token_ids
from sidestep.acestep.device import give_back_memory
from sidestep.acestep.vae import ENCODER_HALO_FRAMES, TILE_FRAMES, encode_mean, samples_per_frame, tile_frames_for
from sidestep.audio.io import SAMPLE_RATE, AudioError, content_hash, is_cut_short, probe, stream
from sidestep.audio.signals import LevelMeter
from sidestep.errors import JobError
from sidestep.tasks.preprocess.job import LATENTS, TEXT, Inspection, Job, Stage, audio_stat
from sidestep.tasks.preprocess.passes import Pass, Results
from sidestep.tasks.preprocess.songs import Song

T = TypeVar("T")
R = TypeVar("R")

MODEL_SECONDS = 600.0  # the longest song the model was made for
HELD_SECONDS = 600  # 230 MB
SEGMENT_FRAMES = 4 * TILE_FRAMES  # of a song, that are at hand at once
BYTES_PER_SECOND = SAMPLE_RATE * 2 * 4
BUDGET_BYTES = {"cpu": 256 * 1024**2}  # of decoded songs that wait
BUDGET_BYTES_GPU = 1024**3
SMALLEST_TILE_FRAMES = 60
CHANGED = "changed while it was read"
TIMES_ENCODED = 3  # by one process, before it gives a song up whose latents are replaced again and again


@dataclass(frozen=True)
class Decoded:
    """A song ready for the VAE.

    pieces: float32 [2, n] at 48 kHz, decoded anew where the song is too long to be held. content, stat: digest, size
    and times of its file.
    """

    pieces: Iterable[np.ndarray]
    gain: float
    seconds: float
    content: str
    stat: list[int]
    warnings: tuple[str, ...]


def encode_songs(job: Job, songs: Sequence[tuple[Song, Inspection]], results: Results) -> None:
    """Latents of each song that no other process has, into the work folder.

    Holds at most HELD_SECONDS of one song beside those that wait ahead, whatever the number and length of songs; the
    device holds one tile.
    """
    threads = min(8, max(2, (cpu_count() or 2) // 2)) if job.device.type != "cpu" else 2
    budget = BUDGET_BYTES.get(job.device.type, BUDGET_BYTES_GPU)
    encoder = _AudioEncoder(job)
    sizes = {song.key: found.seconds for song, found in songs}
    with (
        Pass(job, results, "Pass 1: audio", (Stage.LATENTS,), sizes, "audio s") as audio_pass,
        closing(
            ahead(
                songs,
                lambda item: decode_song(job, audio_pass, item[0]),
                lambda item: int(min(item[1].seconds, HELD_SECONDS) * BYTES_PER_SECOND),
                threads=threads,
                budget_bytes=budget,
            )
        ) as prepared,
    ):
        for (song, _), future in prepared:
            try:
                decoded = future.result()
            except AudioError as error:
                audio_pass.fail(song, "decode", error.reason)
                continue
            except OSError as error:
                results.fail_for(song, "decode", error)
                audio_pass.end(song)
                continue
            del future
            if decoded is None:
                audio_pass.end(song, worked=False)
                continue
            audio_pass.begin(song)
            for warning in decoded.warnings:
                audio_pass.warn(song, warning)
            results.encoded[song.key] += 1
            if results.encoded[song.key] > TIMES_ENCODED:
                reason = "its latents are replaced again and again: does a job with other settings work in this folder?"
                audio_pass.fail(song, "encode", reason)
                continue
            try:
                latents = encoder.encode(decoded, partial(audio_pass.begin, song))
            except AudioError as error:  # the second reading of a long song
                audio_pass.fail(song, "decode", error.reason)
                continue
            if latents is None:
                audio_pass.fail(song, "encode", "the VAE gives values that are no numbers (try --precision fp32)")
                continue
            metadata = {
                "fingerprint": {"audio": job.audio_part(decoded.content, made=True)},
                "audio_stat": decoded.stat,
                "seconds": decoded.seconds,
            }
            del decoded  # or its samples would stay while the next song is waited for
            give_back_memory()
            audio_pass.write(song, partial(job.work.save, song.key, LATENTS, {"latents": latents}, metadata))


def decode_song(job: Job, audio_pass: Pass, song: Song) -> Decoded | None:
    """In a thread: take the song and decode it. None when it is not at this pass's stage, or another process has it."""
    if not audio_pass.take(song):
        return None
    stat = audio_stat(song.source)
    promised = probe(song.source)
    content = content_hash(song.source)
    limit = job.config.max_duration
    meter, held = LevelMeter(job.config.normalize), []
    for piece in stream(song.source, limit):
        meter.add(piece)
        if meter.samples <= HELD_SECONDS * SAMPLE_RATE:
            held.append(piece)
        else:
            held.clear()
    if audio_stat(song.source) != stat:
        raise AudioError(song.source, CHANGED)
    seconds = meter.samples / SAMPLE_RATE
    if meter.samples < samples_per_frame(job.checkpoint.vae_config()):
        raise AudioError(song.source, f"shorter than one latent frame ({seconds:.3f} s)")
    warnings = []
    if is_cut_short(promised, seconds) and not (limit and seconds >= limit):
        missing = f"{promised.seconds - seconds:.1f} s that its header promises are not there"
        warnings.append(f"breaks off after {seconds:.1f} s; {missing}.")
    if seconds > MODEL_SECONDS:
        beyond = round((seconds - MODEL_SECONDS) * job.frames_per_second)
        warnings.append(
            f"{seconds:.0f} s long; the model was made for {MODEL_SECONDS:.0f} s, {beyond} latent frames fewer. "
            f"Use --max-duration {MODEL_SECONDS:.0f}, or train on windows with --chunk-duration."
        )
    pieces = held or again(song.source, limit, stat)
    return Decoded(pieces, meter.gain(), seconds, content, stat, tuple(warnings))


def again(path: Path, limit: float, stat: list[int]) -> Iterator[np.ndarray]:
    """The pieces of a file that has been heard before. Raises AudioError, also where it is another one since."""
    yield from stream(path, limit)
    if audio_stat(path) != stat:
        raise AudioError(path, CHANGED)


def segments(
    pieces: Iterable[np.ndarray], frames: int, halo_frames: int, hop: int
) -> Iterator[tuple[np.ndarray, int, int | None]]:
    """(audio [2, S], its first own latent frame, its first no more): what comes before and after is a neighbour's.

    Segments have `frames` own frames, and on each side where there is a neighbour `halo_frames` of it; the last one
    has what is left.
    """
    parts, held, before = [], 0, 0
    for piece in pieces:
        parts.append(piece)
        held += piece.shape[1]
        while held > (before + frames + halo_frames) * hop:
            audio = np.concatenate(parts, axis=1)
            yield audio[:, : (before + frames + halo_frames) * hop], before, before + frames
            rest = audio[:, (before + frames - halo_frames) * hop :].copy()
            parts, held, before = [rest], rest.shape[1], halo_frames
    yield np.concatenate(parts, axis=1), before, None


def ahead(
    items: Sequence[T], prepare: Callable[[T], R], size_of: Callable[[T], int], *, threads: int, budget_bytes: int
) -> Generator[tuple[T, Future[R]]]:
    """Each item with the outcome of `prepare(item)`, in order; the next ones are prepared meanwhile.

    At most `threads` items wait or are being prepared, of at most `budget_bytes` together, but always one. An outcome
    is a finished future, so an error comes out where its item is looked at.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    waiting: deque[tuple[T, Future[R], int]] = deque()
    rest = deque(items)

    def fill() -> None:
        held = sum(size for _, _, size in waiting)
        while rest and len(waiting) < threads and (not waiting or held + size_of(rest[0]) <= budget_bytes):
            item = rest.popleft()
            held += size_of(item)
            waiting.append((item, pool.submit(prepare, item), size_of(item)))

    try:
        fill()
        while waiting:
            item, future, _ = waiting[0]
            future.exception()  # wait for it, whatever it came to
            waiting.popleft()
            fill()
            yield item, future
            del future  # or the song's samples would stay while the next one is waited for
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _AudioEncoder:
    """The VAE, loaded when the first song needs it; tiles shrink when the device runs out of memory."""

    def __init__(self, job: Job):
        self.job, self.tile_frames = job, tile_frames_for(job.device)
        self.vae: Any = None

    def encode(self, song: Decoded, tell: Callable[[float], None]) -> torch.Tensor | None:
        """Latents [T, D] fp32 on the CPU; None when they are not finite. tell: gets the seconds that are encoded.

        Raises AudioError when a long song cannot be read again, JobError when there is no memory for the smallest tile.
        """
        hop = samples_per_frame(self.job.checkpoint.vae_config())
        latents, done = [], 0
        for audio, first, end in segments(song.pieces, SEGMENT_FRAMES, ENCODER_HALO_FRAMES, hop):
            before = done - first
            part = self._encode(
                audio * np.float32(song.gain), lambda n, before=before: tell((before + n) * hop / SAMPLE_RATE)
            )
            latents.append(part[first:end])
            done += len(latents[-1])
        whole = torch.cat(latents)
        return whole if bool(torch.isfinite(whole).all()) else None

    def _encode(self, audio: np.ndarray, on_tile: Callable[[int], None]) -> torch.Tensor:
        """The same of one segment, audio [2, S]."""
        device = self.job.device
        if self.vae is None:
            self.vae = self.job.checkpoint.load_vae(device, self.job.vae_dtype, True)
        while True:
            try:
                return encode_mean(self.vae, torch.from_numpy(audio)[None], self.tile_frames, on_tile)[0].float().cpu()
            except torch.OutOfMemoryError as error:
                if self.tile_frames <= SMALLEST_TILE_FRAMES:
                    raise JobError(
                        f"{device}: out of memory while encoding audio.",
                        "Close other programs that use it, or add --device cpu.",
                    ) from error
                self.tile_frames //= 2
            # Outside the handler, where the traceback still holds the tensors.
            torch.get_device_module(device).empty_cache()


def encode_texts(job: Job, songs: Sequence[Song], results: Results) -> None:
    """Text and lyric states of each song that has latents, into the work folder.

    Says how many tokens of a text the model will not see.
    """
    model = tokenizer = None
    sizes = dict.fromkeys((song.key for song in songs), 1.0)
    with Pass(job, results, "Pass 1: text", (Stage.TEXT,), sizes, "songs") as text_pass:
        for song, found in text_pass.each(songs):
            if model is None:
                model, tokenizer = job.checkpoint.load_text_encoder(job.device, job.dtype)
            text = job.text(song, found.seconds)
            text_ids, text_lost = token_ids(tokenizer, text.prompt, TEXT_TOKENS)
            lyric_ids, lyrics_lost = token_ids(tokenizer, text.lyrics, LYRIC_TOKENS)
            for what, lost, limit in (("text prompt", text_lost, TEXT_TOKENS), ("lyrics", lyrics_lost, LYRIC_TOKENS)):
                if lost:
                    reads = f"is longer than the {limit} tokens the model reads"
                    text_pass.warn(song, f"the {what} {reads}; the last {lost} tokens are lost.")
            states = {"text": encode_text(model, text_ids), "lyrics": embed_lyrics(model, lyric_ids)}
            if job.with_hints:
                hints_ids, _ = token_ids(tokenizer, job.text(song, found.seconds, COVER).prompt, TEXT_TOKENS)
                states["hints_text"] = encode_text(model, hints_ids)
            metadata = {
                "fingerprint": {"text": job.text_part(text, made=True)},
                "tokens_lost": {"text": text_lost, "lyrics": lyrics_lost},
            }
            text_pass.write(song, partial(job.work.save, song.key, TEXT, states, metadata))
