"""The second pass: the condition encoder alone on the device (with hints also tokenizer and detokenizer); records."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sidestep.acestep.conditions import cover_hints, encode_conditions
from sidestep.acestep.device import precision_name
from sidestep.data.records import SCHEMA, Record, RecordError, load_record, save_record
from sidestep.tasks.preprocess.job import LATENTS, TEXT, Inspection, Job, Stage, audio_stat
from sidestep.tasks.preprocess.passes import Pass, Results
from sidestep.tasks.preprocess.songs import Song


def write_records(job: Job, songs: Sequence[tuple[Song, Inspection]], results: Results) -> None:
    """The record of each song, from the work folder and, where only text changed, from its old record's latents."""
    stages, sizes = (Stage.CONDITIONS, Stage.METADATA), {song.key: found.seconds for song, found in songs}
    encoders = None

    def write(song: Song, record: Record) -> None:
        save_record(song.record, record)
        job.work.drop(song.key)
        results.done.add(song.key)

    with Pass(job, results, "Pass 2: conditions", stages, sizes, "audio s") as second_pass:
        for song, found in second_pass.each([song for song, _ in songs]):
            try:
                if found.stage == Stage.METADATA:
                    record = load_record(song.record)
                    record = replace(record, metadata=record.metadata | song.described())
                else:
                    encoders = encoders or _Encoders(job)
                    record = encoders.record(song, found)
            except (RecordError, SafetensorError) as error:
                second_pass.fail(song, "conditions", str(error).splitlines()[0])
            except OSError as error:
                results.fail_for(song, "conditions", error)
                second_pass.end(song)
            else:
                second_pass.write(song, partial(write, song, record))


class _Encoders:
    """The models of the second pass."""

    def __init__(self, job: Job):
        self.job = job
        self.encoder = job.checkpoint.load_condition_encoder(job.device, job.dtype)
        self.silence = job.timbre_silence()
        if job.with_hints:
            self.tokenizer = job.checkpoint.load_audio_tokenizer(job.device, job.dtype)
            self.detokenizer = job.checkpoint.load_audio_detokenizer(job.device, job.dtype)
            self.whole_silence = job.checkpoint.silence_latent()

    def record(self, song: Song, found: Inspection) -> Record:
        """A song's record. Raises OSError, SafetensorError or RecordError when what was made before cannot be read."""
        job = self.job
        states, encoded = job.work.load(song.key, TEXT)
        if found.latents_in_record:
            old = load_record(song.record)
            latents, audio, stat = old.target_latents, old.metadata["fingerprint"]["audio"], audio_stat(song.source)
            seconds = old.metadata["duration"]
        else:
            tensors, made = job.work.load(song.key, LATENTS)
            latents, audio, stat = tensors["latents"], made["fingerprint"]["audio"], made["audio_stat"]
            seconds = made["seconds"]
        conditions = encode_conditions(self.encoder, states["text"], states["lyrics"], self.silence)[0]
        text = job.text(song, seconds)
        metadata: dict[str, Any] = song.described() | {
            "schema": SCHEMA,
            "duration": seconds,
            "frames_per_second": job.frames_per_second,
            "prompt": text.prompt,
            "lyric_prompt": text.lyrics,
            "tokens_lost": encoded["tokens_lost"],
            "fingerprint": {"audio": audio, "text": encoded["fingerprint"]["text"]},
            "checkpoint": job.checkpoint.folder.name,
            "checkpoint_identity": job.identities["condition_encoder"],
            "model_variant": job.checkpoint.variant.name,
            "precision": {"vae": audio["precision"], "conditions": precision_name(job.dtype)},
            "normalize": job.config.normalize,
            "max_duration": job.config.max_duration,
            "audio_stat": stat,
        }
        return Record(latents, conditions, metadata, **(self.hints(latents, states) if job.with_hints else {}))

    def hints(self, latents: Tensor, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a record holds for the app's thinking mode: codes, hints, and conditions under the cover instruction."""
        codes, hints = cover_hints(self.tokenizer, self.detokenizer, latents[None], self.whole_silence)
        conditions = encode_conditions(self.encoder, states["hints_text"], states["lyrics"], self.silence)
        return {
            "audio_codes": codes[0].to(torch.int32),
            "cover_hints": hints[0],
            "hints_encoder_hidden_states": conditions[0],
        }
