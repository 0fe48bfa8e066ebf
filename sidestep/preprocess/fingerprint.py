"""What a training record depends on, in two parts: the audio part decides over its latents, the text part over its conditions."""

from collections.abc import Mapping
from dataclasses import dataclass

Part = Mapping[str, str]

NAMES = {  # how a difference is told to the user
    "content": "audio file",
    "normalize": "normalisation",
    "max_duration": "--max-duration",
    "vae": "VAE",
    "schema": "record format",
    "precision": "--precision",
    "prompt": "caption or facts",
    "lyrics": "lyrics",
    "condition_encoder": "checkpoint",
    "text_encoder": "text encoder",
    "silence": "silence latent",
    "regimes": "--regimes",
}
ANY_PRECISION = "auto"


@dataclass(frozen=True)
class Fingerprint:
    """Everything that the tensors of one song depend on, as plain text by name, so that a difference can be named."""

    audio: Part
    text: Part

    def as_values(self) -> dict[str, dict[str, str]]:
        """Plain values for a record's metadata."""
        return {"audio": dict(self.audio), "text": dict(self.text)}


def differences(stored: object, now: Part) -> tuple[str, ...]:
    """What differs between a stored part and the present one, in the user's words; nothing stored differs in its format.

    A precision counts only when it was typed: `auto` takes what another machine made.
    """
    if not isinstance(stored, Mapping):
        return (NAMES["schema"],)
    wrong = [name for name, value in now.items() if stored.get(name) != value and not (name == "precision" and value == ANY_PRECISION)]
    return tuple(NAMES[name] for name in wrong)


def audio_part(*, content: str, normalize: str, max_duration: float, vae: str, schema: int, precision: str) -> Part:
    """What latents follow from. content, vae: digests of the audio file and of the VAE's weights. precision: what was asked for, or used."""
    return {"content": content, "normalize": normalize, "max_duration": f"{max_duration:g}", "vae": vae, "schema": str(schema), "precision": precision}


def text_part(
    *, prompt: str, lyrics: str, condition_encoder: str, text_encoder: str, silence: str, regimes: tuple[str, ...], schema: int, precision: str
) -> Part:
    """What conditions follow from beside the latents. prompt, lyrics: the two texts as the tokenizer gets them; the rest are digests."""
    return {
        "prompt": prompt,
        "lyrics": lyrics,
        "condition_encoder": condition_encoder,
        "text_encoder": text_encoder,
        "silence": silence,
        "regimes": " ".join(sorted({"text2music", *regimes})),
        "schema": str(schema),
        "precision": precision,
    }
