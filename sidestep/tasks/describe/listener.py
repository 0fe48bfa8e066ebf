"""The language model beside the DiT as a listener: audio → latents → codes → what it hears in them."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.acestep.conditions import cover_hints
from sidestep.acestep.device import choose_device, choose_precision, precision_name
from sidestep.acestep.lm.decoding import HEARD_SECONDS, Sampling, understand
from sidestep.acestep.lm.model import choose_language_model, codebook_size, load_language_model
from sidestep.acestep.lm.prompts import unquoted
from sidestep.acestep.vae import encode_mean, samples_per_frame
from sidestep.acestep.weights import Weights
from sidestep.audio.io import SAMPLE_RATE, AudioError, stream
from sidestep.errors import UserError
from sidestep.events import Decision, Report
from sidestep.settings.config import BuildDatasetConfig

LEAST_SECONDS = 10  # a last part that is shorter says little
SAMPLING = Sampling(temperature=0.7, top_p=1.0, guidance=1)  # as the app's labeller
VERSION = 1  # raise it when the same model would answer otherwise


class LanguageModelListener:
    """Loads VAE, the DiT's tokenizer and the language model once and hears song after song."""

    def __init__(self, config: BuildDatasetConfig, report: Report):
        assert config.checkpoint_dir is not None
        checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant, report)
        folder = choose_language_model(checkpoint.layout, config.lm)
        device = choose_device(config.device)
        precision = choose_precision(config.precision, device.value)
        report(Decision(what="device", value=str(device.value), reason=device.reason))
        report(Decision(what="precision", value=precision_name(precision.value), reason=precision.reason))
        reason = "the app's own size" if config.lm == "auto" and "1.7B" in folder.name else f"--lm {config.lm}"
        report(Decision(what="language model", value=folder.name, reason=reason))
        if checkpoint.vae_config()["sampling_rate"] != SAMPLE_RATE:
            raise UserError(f"{checkpoint.layout.vae}: a VAE of another sample rate than {SAMPLE_RATE} Hz.")
        quantised = "" if config.base_precision == "auto" else config.base_precision
        codebook = codebook_size(checkpoint)
        self._lm = load_language_model(folder, codebook, device.value, precision.value, quantised, report)
        self._vae = checkpoint.load_vae(device.value, precision.value, to_encode=True)
        self._tokenizer = checkpoint.load_audio_tokenizer(device.value, precision.value)
        self._detokenizer = checkpoint.load_audio_detokenizer(device.value, precision.value)
        self._silence = checkpoint.silence_latent()
        self._hop = samples_per_frame(checkpoint.vae_config())
        self._with_lyrics = config.lyrics != "none"
        self.name = folder.name
        parts = (Weights(folder).identity(), checkpoint.identity("vae"), quantised, precision_name(precision.value))
        self.identity = f"{VERSION} {' '.join(parts)}{' lyrics' if self._with_lyrics else ''}"

    def describe(self, path: Path) -> dict[str, Any]:
        """The fields of a song, and of how many parts it was heard. Raises AudioError."""
        answers = []
        for audio in parts_of(path):
            if audio.shape[1] < 5 * self._hop:
                raise AudioError(path, "shorter than one code (0.2 s)")
            latents = encode_mean(self._vae, torch.from_numpy(audio)[None])
            codes, _ = cover_hints(self._tokenizer, self._detokenizer, latents, self._silence)
            answer, _ = understand(self._lm, codes.flatten().tolist(), SAMPLING, self._with_lyrics)
            answers.append(unquoted(answer.metadata) | ({"lyrics": answer.lyrics} if self._with_lyrics else {}))
        return put_together(answers)


def parts_of(path: Path) -> Iterator[np.ndarray]:
    """Audio [2, S] in parts of `HEARD_SECONDS`, one in memory at a time; a last one that is short is left out."""
    held, samples, number = [], 0, 0
    for piece in stream(path):
        held.append(piece)
        samples += piece.shape[1]
        while samples >= HEARD_SECONDS * SAMPLE_RATE:
            audio = np.concatenate(held, axis=1)
            yield audio[:, : HEARD_SECONDS * SAMPLE_RATE]
            held, number = [audio[:, HEARD_SECONDS * SAMPLE_RATE :].copy()], number + 1
            samples = held[0].shape[1]
    if not number or samples >= LEAST_SECONDS * SAMPLE_RATE:
        yield np.concatenate(held, axis=1)


def put_together(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer from those of a song's parts.

    Fields by majority, the earlier of equals; the caption of the part that agrees with most of them; lyrics in order.
    """
    names = ("bpm", "keyscale", "timesignature", "language")
    votes = {name: Counter(answer[name] for answer in answers if answer.get(name) is not None) for name in names}
    together = {name: counted.most_common(1)[0][0] for name, counted in votes.items() if counted}
    captioned = [answer for answer in answers if answer.get("caption")]
    if captioned:
        agreement = [sum(answer.get(name) == value for name, value in together.items()) for answer in captioned]
        together["caption"] = captioned[agreement.index(max(agreement))]["caption"]
    lyrics = [answer["lyrics"] for answer in answers if answer.get("lyrics")]
    if lyrics:
        together["lyrics"] = "\n\n".join(lyrics)
    return together | {"parts": len(answers)}
