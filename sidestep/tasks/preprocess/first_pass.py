"""The first pass, into the work folder: latents by the VAE, then text states by the text encoder.

One model at a time is on the device. Songs are decoded ahead of the VAE, within a bound on the memory that waits,
and files are written behind it.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from os import cpu_count
from typing import Any, TypeVar

import numpy as np
import torch

from sidestep.acestep.conditions import COVER, LYRIC_TOKENS, TEXT_TOKENS, embed_lyrics, encode_text, token_ids
from sidestep.acestep.vae import TILE_FRAMES, encode_mean, samples_per_frame
from sidestep.audio.io import SAMPLE_RATE, AudioError, content_hash, decode, is_cut_short, probe
from sidestep.audio.signals import normalize
from sidestep.errors import JobError
from sidestep.tasks.preprocess.job import LATENTS, TEXT, Inspection, Job, Stage, audio_stat
from sidestep.tasks.preprocess.passes import Pass, Results
from sidestep.tasks.preprocess.songs import Song

T = TypeVar("T")
R = TypeVar("R")

MODEL_SECONDS = 600.0  # the longest song the model was made for
BYTES_PER_SECOND = SAMPLE_RATE * 2 * 4
BUDGET_BYTES = {"cpu": 256 * 1024**2}  # of decoded songs that wait
BUDGET_BYTES_GPU = 1024**3
SMALLEST_TILE_FRAMES = 60
TIMES_ENCODED = 3  # by one process, before it gives a song up whose latents are replaced again and again


@dataclass(frozen=True)
class Decoded:
    """A song ready for the VAE. audio: float32 [2, S] at 48 kHz. content, stat: digest, size and times of its file."""

    audio: np.ndarray
    content: str
    stat: list[int]
    warnings: tuple[str, ...]


def encode_songs(job: Job, songs: Sequence[tuple[Song, Inspection]], results: Results) -> None:
    """Latents of each song that no other process has, into the work folder.

    Holds one song's samples beside those that wait ahead, whatever the number and length of songs; the device holds
    one tile.
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
                lambda item: int(item[1].seconds * BYTES_PER_SECOND),
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
            latents = encoder.encode(decoded.audio)
            if latents is None:
                audio_pass.fail(song, "encode", "the VAE gives values that are no numbers (try --precision fp32)")
                continue
            metadata = {
                "fingerprint": {"audio": job.audio_part(decoded.content, made=True)},
                "audio_stat": decoded.stat,
                "seconds": decoded.audio.shape[1] / SAMPLE_RATE,
            }
            del decoded  # or its samples would stay while the next song is waited for
            audio_pass.write(song, partial(job.work.save, song.key, LATENTS, {"latents": latents}, metadata))


def decode_song(job: Job, audio_pass: Pass, song: Song) -> Decoded | None:
    """In a thread: take the song and decode it. None when it is not at this pass's stage, or another process has it."""
    if not audio_pass.take(song):
        return None
    stat = audio_stat(song.source)
    promised = probe(song.source)
    content = content_hash(song.source)
    limit = job.config.max_duration
    audio = decode(song.source, limit)
    if audio_stat(song.source) != stat:
        raise AudioError(song.source, "changed while it was read")
    seconds = audio.shape[1] / SAMPLE_RATE
    if audio.shape[1] < samples_per_frame(job.checkpoint.vae_config()):
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
    return Decoded(normalize(audio, job.config.normalize, SAMPLE_RATE), content, stat, tuple(warnings))


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
        self.job, self.tile_frames = job, TILE_FRAMES
        self.vae: Any = None

    def encode(self, audio: np.ndarray) -> torch.Tensor | None:
        """Latents [T, D] fp32 on the CPU of audio [2, S]; None when they are not finite.

        Raises JobError when there is no memory for the smallest tile.
        """
        device = self.job.device
        if self.vae is None:
            self.vae = self.job.checkpoint.load_vae(device, self.job.vae_dtype)
            # Half of the weights, which encoding never uses. In diffusers' types the VAE may be one that is not there.
            self.vae.decoder = torch.nn.Identity()  # pyrefly: ignore[bad-assignment, missing-attribute]
        while True:
            try:
                latents = encode_mean(self.vae, torch.from_numpy(audio)[None], self.tile_frames)[0].float().cpu()
                return latents if bool(torch.isfinite(latents).all()) else None
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
            text = song.text(found.seconds)
            text_ids, text_lost = token_ids(tokenizer, text.prompt, TEXT_TOKENS)
            lyric_ids, lyrics_lost = token_ids(tokenizer, text.lyrics, LYRIC_TOKENS)
            for what, lost, limit in (("text prompt", text_lost, TEXT_TOKENS), ("lyrics", lyrics_lost, LYRIC_TOKENS)):
                if lost:
                    reads = f"is longer than the {limit} tokens the model reads"
                    text_pass.warn(song, f"the {what} {reads}; the last {lost} tokens are lost.")
            states = {"text": encode_text(model, text_ids), "lyrics": embed_lyrics(model, lyric_ids)}
            if job.with_hints:
                hints_ids, _ = token_ids(tokenizer, song.text(found.seconds, COVER).prompt, TEXT_TOKENS)
                states["hints_text"] = encode_text(model, hints_ids)
            metadata = {
                "fingerprint": {"text": job.text_part(text, made=True)},
                "tokens_lost": {"text": text_lost, "lyrics": lyrics_lost},
            }
            text_pass.write(song, partial(job.work.save, song.key, TEXT, states, metadata))
