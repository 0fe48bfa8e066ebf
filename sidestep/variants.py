"""The model variants: their folders, sizes and training laws. Detected from `config.json`, not a folder's name."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from sidestep.words import paste

DIT_PREFIX = "acestep-v15-"  # of the folders of DiTs
OFFICIAL_FOLDERS = {
    "turbo": "acestep-v15-turbo",
    "base": "acestep-v15-base",
    "sft": "acestep-v15-sft",
    "xl-turbo": "acestep-v15-xl-turbo",
    "xl-base": "acestep-v15-xl-base",
    "xl-sft": "acestep-v15-xl-sft",
}

RELEASE = "ACE-Step/Ace-Step1.5"  # with turbo, the VAE, the text encoder and a language model
IN_RELEASE = (OFFICIAL_FOLDERS["turbo"], "acestep-5Hz-lm-1.7B")

# The sizes of the official checkpoints, for planning without one (field names of their config.json).
CONFIG_2B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "in_channels": 192,
    "audio_acoustic_hidden_dim": 64,
    "patch_size": 2,
    "rope_theta": 1000000,
    "sliding_window": 128,
    "text_hidden_dim": 1024,
    "timbre_hidden_dim": 64,
    "num_lyric_encoder_hidden_layers": 8,
    "num_timbre_encoder_hidden_layers": 4,
    "num_attention_pooler_hidden_layers": 2,
    "num_audio_decoder_hidden_layers": 24,
    "timbre_fix_frame": 750,
    "pool_window_size": 5,
    "fsq_dim": 2048,
    "fsq_input_levels": [8, 8, 8, 5, 5, 5],
    "fsq_input_num_quantizers": 1,
    "timestep_mu": -0.4,
    "timestep_sigma": 1.0,
    "data_proportion": 0.5,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
}
CONFIG_XL = CONFIG_2B | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_audio_decoder_hidden_layers": 32,
    "encoder_hidden_size": 2048,
    "encoder_intermediate_size": 6144,
    "encoder_num_attention_heads": 16,
    "encoder_num_key_value_heads": 8,
}


FRAMES_PER_SECOND = 25  # of latents, with the VAE of all variants
TURBO_SHIFT = 3.0  # of turbo models that do not state another
MODES = {True: "discrete", False: "logit-normal"}  # of timesteps, by whether a model is turbo
MERGED = {"merge", "merged", "mix", "mixed", "blend", "soup", "ta"}  # what people call a sum of two models


@dataclass(frozen=True)
class Variant:
    """What training needs to know of a checkpoint beyond its sizes.

    reason: what its config says, whatever law is typed. shift: by which turbo's eight timesteps are moved towards
    noise, with the reason. doubt: signs that contradict each other about which law the weights follow; empty when they
    agree. is_stems: captions have the form for stems.
    """

    name: str  # turbo, base or sft (with xl- in front), or the version a fine-tune states
    is_turbo: bool
    is_xl: bool
    timestep_mu: float
    timestep_sigma: float
    reason: str = "its config says nothing"
    shift: float = TURBO_SHIFT
    shift_reason: str = "the shift of turbo"
    doubt: str = ""
    is_stems: bool = False

    @property
    def timestep_mode(self) -> str:
        """`discrete`: turbo's eight inference steps. `logit-normal`: the law base and sft were trained with."""
        return MODES[self.is_turbo]

    def under(self, timestep_mode: str) -> "Variant":
        """The variant as `--timestep-mode` says it is; `auto` leaves it as it was detected."""
        return self if timestep_mode == "auto" else replace(self, is_turbo=timestep_mode == MODES[True], doubt="")

    def settled(self, timestep_mode: str) -> "Variant":
        """The variant, under a typed law where its own signs contradict each other."""
        return self.under(timestep_mode) if self.doubt else self

    @property
    def cfg_ratio(self) -> float:
        """Share of samples whose condition is dropped; turbo was distilled without guidance."""
        return 0.0 if self.is_turbo else 0.15


def detect(config: dict, folder: str = "") -> Variant:
    """The variant that a checkpoint's `config.json` states. A fine-tune keeps its parent's training law.

    folder: the checkpoint's, whose name says the shift where the config does not, and betrays merges: they carry the
    config of one parent.
    """
    version = str(config.get("model_version") or "")
    is_turbo = bool(config.get("is_turbo", "turbo" in version.lower()))
    is_xl = config.get("encoder_hidden_size") is not None
    name = version or ("turbo" if is_turbo else "base")
    if is_xl and not name.startswith("xl"):
        name = f"xl-{name}"
    shift, shift_reason = TURBO_SHIFT, "turbo's own; nothing names another"
    for where, text in (("the folder", folder), ("model_version", version)):  # what stands in the config counts more
        if "continuous" in text.lower():
            shift_reason = f"{where} is {text!r}, which takes any shift from 1 to 5; ACE-Step's app takes 3"
    for where, text in (("the folder", folder), ("model_version", version)):
        if found := re.search(r"shift[-_]?(\d+(?:\.\d+)?)", text.lower()):
            shift, shift_reason = float(found[1]), f"{where} is {text!r}"
    return Variant(
        name,
        is_turbo,
        is_xl,
        float(config.get("timestep_mu", -0.4)),
        float(config.get("timestep_sigma", 1.0)),
        f"config.json says is_turbo={str(is_turbo).lower()}, model_version={name!r}",
        shift,
        shift_reason,
        _doubt_about(config, version, folder),
        bool(config.get("is_lego_sft", False)),
    )


def _doubt_about(config: dict, version: str, folder: str) -> str:
    """In words, signs of both laws: those of turbo, and those of base and sft. Empty when all signs agree."""

    def laws(text: str) -> dict[bool, str]:
        words = re.split(r"[^a-z0-9]+", text.lower())
        return {word == "turbo": word for word in words if word in ("turbo", "base", "sft")}

    signs: dict[bool, list[str]] = {True: [], False: []}
    if "is_turbo" in config:
        signs[bool(config["is_turbo"])].append(f"config.json says is_turbo={str(bool(config['is_turbo'])).lower()}")
    for law in laws(version):
        signs[law].append(f"model_version is {version!r}")
    of_folder = laws(folder)
    # a fine-tune is what its config says, whatever its folder is called; a merge has one parent's config
    if len(of_folder) == 2 or MERGED & set(re.split(r"[^a-z0-9]+", folder.lower())):
        for law in of_folder:
            signs[law].append(f"the folder is called {folder!r}")
    return (
        ", but ".join(" and ".join(dict.fromkeys(of_law)) for of_law in signs.values()) if all(signs.values()) else ""
    )


def download_command(folder: str = IN_RELEASE[0], checkpoints: Path = Path("checkpoints")) -> str:
    """The line that fetches an official model into its folder. Whatever the release does not hold has its own place."""
    is_released = folder in IN_RELEASE
    repository, place = (RELEASE, checkpoints) if is_released else (f"ACE-Step/{folder}", checkpoints / folder)
    return paste(("uv", "run", "hf", "download", repository, "--local-dir", str(place)))


def official_config(variant: str) -> dict | None:
    """The `config.json` fields of an official variant, or None for a name that is not one."""
    if variant not in OFFICIAL_FOLDERS:
        return None
    version = variant.removeprefix("xl-")
    sizes = CONFIG_XL if variant.startswith("xl-") else CONFIG_2B
    return sizes | {"is_turbo": version == "turbo", "model_version": version}
