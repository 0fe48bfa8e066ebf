"""The second pass: the condition encoder alone on the device (with hints also tokenizer and detokenizer); the record of each song."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sidestep.acestep.conditions import cover_hints, encode_conditions
from sidestep.acestep.device import precision_name
from sidestep.data.records import SCHEMA, Record, RecordError, load_record, save_record
from sidestep.tasks.preprocess.job import LATENTS, TEXT, Inspection, Job, Need, audio_stat, watch
from sidestep.tasks.preprocess.results import Pace, Tally
from sidestep.tasks.preprocess.songs import Song

WRITES_BEHIND = 4


def write_records(job: Job, songs: Sequence[tuple[Song, Inspection]], tally: Tally) -> None:
    """The record of each song, from the work folder and, where only text changed, from its old record's latents."""
    pace = Pace(tally.report, "Pass 2: conditions", {song.key: found.seconds for song, found in songs})
    writes: deque[tuple[Song, Future[None]]] = deque()
    models = _Models(job)

    def write(song: Song, record: Record) -> None:
        save_record(song.record, record)
        job.work.drop(song.key)

    def settle(waiting_at_most: int) -> None:
        while writes and (len(writes) > waiting_at_most or writes[0][1].done()):
            song, future = writes.popleft()
            try:
                future.result()
            except RecordError as error:
                tally.fail(song, "conditions", error.problem)
            except OSError as error:
                tally.fail_for(song, "write", error)
            else:
                tally.done.add(song.key)
                tally.claims.release(song.key)
            pace.end(song)

    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        for song, found in songs:
            if not tally.claims.holds(song.key):
                pace.end(song, worked=False)
                continue
            pace.begin(song)
            try:
                record = _described_anew(song) if found.need == Need.METADATA else models.record(song, found)
            except (RecordError, SafetensorError) as error:
                tally.fail(song, "conditions", str(error).splitlines()[0])
                pace.end(song)
                continue
            except OSError as error:
                if tally.claims.holds(song.key):  # else another process finished it and cleared up
                    tally.fail_for(song, "conditions", error)
                pace.end(song)
                continue
            watch(job.config.tensor_output)
            writes.append((song, writer.submit(write, song, record)))
            settle(WRITES_BEHIND)
        settle(0)


def _described_anew(song: Song) -> Record:
    record = load_record(song.record)
    return replace(record, metadata=record.metadata | song.described())


class _Models:
    """The encoders of the second pass, loaded at their first use."""

    def __init__(self, job: Job):
        self._job, self._encoder, self._tokenizer, self._detokenizer = job, None, None, None

    def record(self, song: Song, found: Inspection) -> Record:
        """A song's record. Raises OSError, SafetensorError or RecordError when what the first pass left cannot be read."""
        job = self._job
        if self._encoder is None:
            self._load()
        states, facts = job.work.load(song.key, TEXT), job.work.facts(song.key, TEXT)
        latents, audio_facts = self._latents(song, found)
        conditions = encode_conditions(self._encoder, states["text"], states["lyrics"], self._silence)[0]
        hints = self._hints(latents, states) if job.with_hints else {}
        seconds = audio_facts["seconds"]
        prompts = song.prompts(seconds)
        metadata: dict[str, Any] = song.described() | {
            "schema": SCHEMA,
            "duration": seconds,
            "frames_per_second": job.frames_per_second,
            "prompt": prompts.text,
            "lyric_prompt": prompts.lyrics,
            "tokens_lost": facts["tokens_lost"],
            "fingerprint": {"audio": audio_facts["audio"], "text": facts["fingerprint"]["text"]},
            "checkpoint": job.checkpoint.folder.name,
            "checkpoint_identity": job.identities["condition_encoder"],
            "model_variant": job.checkpoint.variant.name,
            "precision": {"vae": audio_facts["audio"]["precision"], "conditions": precision_name(job.dtype)},
            "normalize": job.config.normalize,
            "max_duration": job.config.max_duration,
            "audio_stat": audio_facts["audio_stat"],
        }
        return Record(latents, conditions, metadata, **hints)

    def _load(self) -> None:
        job = self._job
        self._encoder = job.checkpoint.load_condition_encoder(job.device, job.dtype)
        self._silence = job.timbre_silence()
        if job.with_hints:
            self._tokenizer = job.checkpoint.load_audio_tokenizer(job.device, job.dtype)
            self._detokenizer = job.checkpoint.load_audio_detokenizer(job.device, job.dtype)
            self._whole_silence = job.checkpoint.silence_latent()

    def _latents(self, song: Song, found: Inspection) -> tuple[Tensor, dict[str, Any]]:
        """(latents [T, D], what is known of the audio) from the song's old record or the work folder."""
        if found.latents_in_record:
            old = load_record(song.record)
            audio = old.metadata["fingerprint"]["audio"]
            return old.target_latents, {
                "audio": audio,
                "seconds": old.metadata["duration"],
                "audio_stat": audio_stat(song.source),
            }
        latents, facts = self._job.work.load(song.key, LATENTS)["latents"], self._job.work.facts(song.key, LATENTS)
        return latents, {
            "audio": facts["fingerprint"]["audio"],
            "seconds": facts["seconds"],
            "audio_stat": facts["audio_stat"],
        }

    def _hints(self, latents: Tensor, states: dict[str, Tensor]) -> dict[str, Tensor]:
        codes, hints = cover_hints(self._tokenizer, self._detokenizer, latents[None], self._whole_silence)
        conditions = encode_conditions(self._encoder, states["hints_text"], states["lyrics"], self._silence)[0]
        return {
            "audio_codes": codes[0].to(torch.int32),
            "cover_hints": hints[0],
            "hints_encoder_hidden_states": conditions,
        }
