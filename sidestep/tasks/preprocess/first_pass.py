"""Work done ahead in threads while the device computes, within a bound on the memory that waits.

The first pass over text, in one sweep: the text encoder alone on the device.
The first pass over audio: the VAE alone on the device, decoding ahead of it, writing behind it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from typing import TypeVar

import numpy as np
import torch

from sidestep.acestep.conditions import LYRIC_TOKENS, TEXT_TOKENS, embed_lyrics, encode_text, token_ids
from sidestep.acestep.vae import TILE_FRAMES, encode_mean
from sidestep.audio.io import SAMPLE_RATE, AudioError, content_hash, decode, is_cut_short, probe
from sidestep.audio.signals import normalize
from sidestep.errors import JobError
from sidestep.events import Notice
from sidestep.tasks.preprocess.job import LATENTS, TEXT, Inspection, Job, Need, audio_stat, differences, watch
from sidestep.tasks.preprocess.results import Pace, Tally
from sidestep.tasks.preprocess.songs import Prompts, Song

T = TypeVar("T")
R = TypeVar("R")


def ahead(
    items: Sequence[T], prepare: Callable[[T], R], size_of: Callable[[T], int], *, threads: int, budget_bytes: int
) -> Iterator[tuple[T, Future[R]]]:
    """Each item with the outcome of `prepare(item)`, in order; the next ones are prepared meanwhile.

    At most `threads` items wait or are being prepared, of at most `budget_bytes` together, but always one. An outcome is a finished future,
    so an error comes out where its item is looked at.
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


def encode_texts(job: Job, songs: Sequence[Song], tally: Tally) -> list[tuple[Song, Inspection]]:
    """Text and lyric states of each song that no other process has claimed, in the work folder.

    Returns the songs that are ready for the second pass, with what they need. The text encoder is loaded when the first song needs it.
    """
    ready: list[tuple[Song, Inspection]] = []
    pace = Pace(tally.report, "Pass 1: text", {song.key: 1.0 for song in songs}, "songs")
    encoder = _Encoder(job)
    for song in songs:
        if not tally.claims.take(song.key) or not tally.claims.holds(song.key):
            pace.end(song, worked=False)
            continue
        found = job.inspect(song)
        if found.need in (Need.METADATA, Need.CONDITIONS):
            ready.append((song, found))
        elif found.need == Need.NOTHING:
            tally.stands(song)
        else:  # its file changed a moment ago
            tally.claims.release(song.key)
        if found.need == Need.CONDITIONS:
            pace.begin(song)
            try:
                encoder.save_states(song, song.prompts(found.seconds), tally)
            except OSError as error:
                tally.fail_for(song, "text", error)
                ready.pop()
        pace.end(song)
    return ready


class _Encoder:
    """Text encoder and tokenizer, loaded at their first use."""

    def __init__(self, job: Job):
        self._job, self._model, self._tokenizer = job, None, None

    def save_states(self, song: Song, prompts: Prompts, tally: Tally) -> None:
        """Encode a song's prompts, unless that was done before; says how many tokens the model will not see."""
        job = self._job
        facts = job.work.facts(song.key, TEXT)
        if facts and not differences(facts.get("fingerprint", {}).get("text"), job.text_part(prompts)):
            return
        if self._model is None:
            self._model, self._tokenizer = job.checkpoint.load_text_encoder(job.device, job.dtype)
        text_ids, text_lost = token_ids(self._tokenizer, prompts.text, TEXT_TOKENS)
        lyric_ids, lyrics_lost = token_ids(self._tokenizer, prompts.lyrics, LYRIC_TOKENS)
        for what, lost, limit in (("text prompt", text_lost, TEXT_TOKENS), ("lyrics", lyrics_lost, LYRIC_TOKENS)):
            if lost:
                tally.report(
                    Notice(
                        message=f"{song.name}: the {what} is longer than the {limit} tokens the model reads; the last {lost} tokens are lost.",
                        level="warning",
                    )
                )
        tensors = {"text": encode_text(self._model, text_ids), "lyrics": embed_lyrics(self._model, lyric_ids)}
        if job.with_hints:
            tensors["hints_text"] = encode_text(
                self._model, token_ids(self._tokenizer, prompts.hints_text, TEXT_TOKENS)[0]
            )
        watch(job.config.tensor_output)
        facts = {
            "fingerprint": {"text": dict(job.text_part(prompts, made=True))},
            "tokens_lost": {"text": text_lost, "lyrics": lyrics_lost},
        }
        job.work.save(song.key, TEXT, tensors, facts)


MODEL_SECONDS = 600.0  # the longest song the model was made for
BYTES_PER_SECOND = SAMPLE_RATE * 2 * 4
BUDGET_BYTES = {"cpu": 256 * 1024**2}  # of decoded songs that wait
BUDGET_BYTES_GPU = 1024**3
WRITES_BEHIND = 4
SMALLEST_TILE_FRAMES = 60


@dataclass(frozen=True)
class Decoded:
    """A song ready for the VAE. audio: float32 [2, S] at 48 kHz; missing_seconds: what its header promised beyond that."""

    audio: np.ndarray
    content: str
    stat: list[int]
    missing_seconds: float


def encode_songs(job: Job, songs: Sequence[tuple[Song, Inspection]], tally: Tally) -> list[Song]:
    """Latents of each song that no other process has claimed, in the work folder. Returns the songs that now have some.

    Holds one song's samples beside those that wait ahead, whatever the number and length of songs; the device holds one tile.
    """
    ready: list[Song] = []
    pace = Pace(tally.report, "Pass 1: audio", {song.key: found.seconds for song, found in songs})
    writes: deque[tuple[Song, Future[None]]] = deque()
    threads = min(8, max(2, (cpu_count() or 2) // 2)) if job.device.type != "cpu" else 2
    budget = BUDGET_BYTES.get(job.device.type, BUDGET_BYTES_GPU)
    encoder = _Encoder_latents(job)

    def settle(waiting_at_most: int) -> None:
        while writes and (len(writes) > waiting_at_most or writes[0][1].done()):
            song, future = writes.popleft()
            try:
                future.result()
            except OSError as error:
                tally.fail_for(song, "write", error)
            else:
                ready.append(song)
            pace.end(song)

    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        prepared = ahead(
            songs,
            lambda item: _prepare(job, tally, item[0]),
            lambda item: int(item[1].seconds * BYTES_PER_SECOND),
            threads=threads,
            budget_bytes=budget,
        )
        for (song, _), future in prepared:
            try:
                outcome = future.result()
            except AudioError as error:
                tally.fail(song, "decode", error.reason)
                pace.end(song, worked=False)
                continue
            except OSError as error:
                tally.fail_for(song, "decode", error)
                pace.end(song, worked=False)
                continue
            del future
            if not isinstance(outcome, Decoded):
                if outcome is not None and outcome.need == Need.NOTHING:
                    tally.stands(song)
                elif outcome is not None:
                    ready.append(song)
                pace.end(song, worked=False)
                continue
            pace.begin(song)
            seconds = outcome.audio.shape[1] / SAMPLE_RATE
            _mention(job, tally, song, seconds, outcome.missing_seconds)
            latents = encoder.encode(outcome.audio)
            if latents is None:
                tally.fail(song, "encode", "the VAE gives values that are no numbers (try --precision fp32)")
                pace.end(song)
                continue
            facts = {
                "fingerprint": {"audio": dict(job.audio_part(outcome.content, made=True))},
                "audio_stat": outcome.stat,
                "seconds": seconds,
            }
            del outcome
            watch(job.config.tensor_output)
            writes.append((song, writer.submit(job.work.save, song.key, LATENTS, {"latents": latents}, facts)))
            settle(WRITES_BEHIND)
        settle(0)
    return ready


def _prepare(job: Job, tally: Tally, song: Song) -> Decoded | Inspection | None:
    """In a thread: claim the song and decode it. None when another process has it; an Inspection when another has done it meanwhile."""
    if not tally.claims.take(song.key):
        return None
    found = job.inspect(song)
    if found.need != Need.LATENTS:
        return found
    stat = audio_stat(song.source)
    promised = probe(song.source)
    content = content_hash(song.source)
    audio = decode(song.source, job.config.max_duration)
    if audio_stat(song.source) != stat:
        raise AudioError(song.source, "changed while it was read")
    if audio.shape[1] < job.samples_per_frame:
        raise AudioError(song.source, f"shorter than one latent frame ({audio.shape[1] / SAMPLE_RATE:.3f} s)")
    seconds = audio.shape[1] / SAMPLE_RATE
    whole = not job.config.max_duration or seconds < job.config.max_duration
    missing = promised.seconds - seconds if whole and is_cut_short(promised, seconds) else 0.0
    return Decoded(normalize(audio, job.config.normalize, SAMPLE_RATE), content, stat, missing)


def _mention(job: Job, tally: Tally, song: Song, seconds: float, missing_seconds: float) -> None:
    if missing_seconds:
        tally.report(
            Notice(
                message=f"{song.name}: breaks off after {seconds:.1f} s; {missing_seconds:.1f} s that its header promises are not there.",
                level="warning",
            )
        )
    if seconds > MODEL_SECONDS:
        beyond = round((seconds - MODEL_SECONDS) * job.frames_per_second)
        tally.report(
            Notice(
                message=f"{song.name}: {seconds:.0f} s long; the model was made for {MODEL_SECONDS:.0f} s, {beyond} latent frames fewer. "
                f"Use --max-duration {MODEL_SECONDS:.0f}, or train on windows with --chunk-duration.",
                level="warning",
            )
        )


class _Encoder_latents:
    """The VAE, loaded when the first song needs it; tiles shrink when the device runs out of memory."""

    def __init__(self, job: Job):
        self._job, self._vae, self._tile_frames = job, None, TILE_FRAMES

    def encode(self, audio: np.ndarray) -> torch.Tensor | None:
        """Latents [T, D] fp32 on the CPU of audio [2, S]; None when they are not finite."""
        if self._vae is None:
            self._vae = self._job.checkpoint.load_vae(self._job.device, self._job.vae_dtype)
            self._vae.decoder = torch.nn.Identity()  # half of the weights, which encoding never uses
        while True:
            try:
                latents = encode_mean(self._vae, torch.from_numpy(audio)[None], self._tile_frames)[0].float().cpu()
                return latents if bool(torch.isfinite(latents).all()) else None
            except torch.OutOfMemoryError as error:
                if self._tile_frames <= SMALLEST_TILE_FRAMES:
                    raise JobError(
                        f"{self._job.device}: out of memory while encoding audio.",
                        "Close other programs that use it, or add --device cpu.",
                    ) from error
                self._tile_frames //= 2
            torch.get_device_module(
                self._job.device
            ).empty_cache()  # outside the handler: there the traceback still holds the tensors
