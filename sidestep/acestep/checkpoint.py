"""A base checkpoint, and its parts loaded one by one into diffusers' and transformers' own classes.

No Python that a checkpoint brings along is run. Key map and XL timbre token: spec, sections 1 and 2.
"""

import inspect
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.modeling_ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from sidestep.acestep.fp16 import wide
from sidestep.acestep.fused import fuse_layers, fuse_vae
from sidestep.acestep.layout import DOWNLOAD_AGAIN, Layout, diffusers_key, find_layout, read_config
from sidestep.acestep.quantize import make_quantizable
from sidestep.acestep.weights import CPU, Weights, fill, loading
from sidestep.errors import UserError
from sidestep.events import Report, null
from sidestep.variants import Variant, detect

M = TypeVar("M", bound=nn.Module)
END_OF_TEXT = "<|endoftext|>"

# What of a text encoder's config.json is read. The rest may name code and files: an attention implementation is a
# kernel that transformers would fetch by that name, an adapter_config.json beside it another model.
QWEN3_FIELDS = frozenset(
    [
        "attention_bias",
        "attention_dropout",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "use_sliding_window",
        "vocab_size",
    ]
)


OWN_KEYS = {"transformer": ("decoder.", "null_condition_emb"), "condition_encoder": ("encoder.",)}  # in one file


class Checkpoint:
    """One variant on disk. Loads only the parts asked for; `loaded_keys` names the tensors read of its file.

    `report` is told how far reading has come where that takes longer than a moment.
    """

    def __init__(self, layout: Layout, report: Report = null):
        self.layout, self.report = layout, report
        self.config = layout.config
        self.variant: Variant = detect(layout.config, layout.folder.name.removesuffix(".safetensors"))
        self.loaded_keys: set[str] = set()
        self._weights: dict[Path, Weights] = {}

    @property
    def folder(self) -> Path:
        return self.layout.folder

    @property
    def latent_channels(self) -> int:
        return int(self.config["audio_acoustic_hidden_dim"])

    @property
    def timbre_frames(self) -> int:
        return int(self.config.get("timbre_fix_frame", 750))

    def identity(self, part: str = "transformer") -> str:
        """Fingerprint of all of a part's weights: transformer, condition_encoder, vae or text_encoder."""
        own = OWN_KEYS.get(part, ()) if self.layout.kind == "original" else ()
        return self._open(part).identity(*own)

    def sampled_identity(self, part: str) -> str:
        """The fingerprint that earlier records keep of a part's weights."""
        return self._open(part).sampled_identity()

    def has(self, part: str) -> bool:
        """Whether the weights of the VAE or the text encoder are there; those of the model always are."""
        folder = {"vae": self.layout.vae, "text_encoder": self.layout.text_encoder}.get(part)
        return folder is None or any(folder.glob("*.safetensors"))

    def load_decoder(
        self, device: torch.device = CPU, dtype: torch.dtype = torch.float32, quantize: str = ""
    ) -> AceStepTransformer1DModel:
        """The frozen DiT. quantize: int8 or nf4 keeps the blocks' linear layers in so many bits, else `dtype`."""
        sizes = decoder_sizes(self.config)
        decoder = self._load(
            AceStepTransformer1DModel, "transformer", "decoder.", sizes, device, dtype, quantize=quantize
        )
        fuse_layers(decoder)
        return decoder

    def linear_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the weight of each linear layer in the DiT's blocks, by diffusers' name; nothing is loaded."""
        prefix = "decoder." if self.layout.kind == "original" else ""
        shapes = self._open("transformer").shapes
        named = {diffusers_key(k.removeprefix(prefix)): tuple(s) for k, s in shapes.items() if k.startswith(prefix)}
        return {name: shape for name, shape in named.items() if name.startswith("layers.") and len(shape) == 2}

    def load_null_condition(self, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Tensor:
        """`null_condition_emb` [1, 1, D]: what stands for a dropped condition."""
        weights = self._open("condition_encoder")
        if "null_condition_emb" not in weights.shapes:
            raise UserError(f"{weights.path}: null_condition_emb is missing.", DOWNLOAD_AGAIN)
        self.loaded_keys.add("null_condition_emb")
        return next(iter(weights.read(["null_condition_emb"], dtype, device)))[1]

    def load_condition_encoder(
        self, device: torch.device = CPU, dtype: torch.dtype = torch.float32
    ) -> AceStepConditionEncoder:
        """Lyric encoder, timbre encoder and text projection; on XL with the timbre token that diffusers leaves out."""
        sizes = encoder_sizes(self.config)
        extra: dict[str, Callable[[], Tensor]] = {"silence_latent": self.silence_latent}  # of any length
        if self.layout.kind == "original":
            extra["null_condition_emb"] = self.load_null_condition
        encoder = self._load(
            AceStepConditionEncoder, "condition_encoder", "encoder.", sizes, device, wide(dtype), extra
        )
        layer_types = sizes.get("layer_types")
        if layer_types:
            timbre = encoder.timbre_encoder
            timbre._layer_types = list(layer_types[: len(timbre.layers)])
        if self.variant.is_xl:
            prepend_timbre_token(encoder)
        return encoder

    def load_audio_tokenizer(
        self, device: torch.device = CPU, dtype: torch.dtype = torch.float32
    ) -> AceStepAudioTokenizer:
        """25 Hz latents to 5 Hz codes."""
        sizes = encoder_sizes(self.config)
        return self._load(AceStepAudioTokenizer, "audio_tokenizer", "tokenizer.", sizes, device, wide(dtype))

    def load_audio_detokenizer(
        self, device: torch.device = CPU, dtype: torch.dtype = torch.float32
    ) -> AceStepAudioTokenDetokenizer:
        """5 Hz codes to 25 Hz hints."""
        sizes, part = encoder_sizes(self.config), "audio_token_detokenizer"
        return self._load(AceStepAudioTokenDetokenizer, part, "detokenizer.", sizes, device, wide(dtype))

    def load_vae(
        self, device: torch.device = CPU, dtype: torch.dtype = torch.float32, to_encode: bool = False
    ) -> AutoencoderOobleck:
        """The audio codec, 48 kHz stereo. to_encode: without its decoder, which is half of it and is not read then."""
        without = ("decoder",) if to_encode else ()
        vae = self._load(AutoencoderOobleck, "vae", "", self.vae_config(), device, dtype, without=without)
        fuse_vae(vae)
        return vae

    def vae_config(self) -> dict:
        """config.json of the VAE: sampling rate, down-sampling ratios. Raises UserError where it is another model's."""
        file = self.layout.part("vae") / "config.json"
        config = {"encoder_hidden_size": 128, "decoder_input_channels": 64} | read_config(file)
        made = config["encoder_hidden_size"], config["decoder_input_channels"]
        channels = self.latent_channels
        if made != (2 * channels, channels):  # the encoder gives a mean and a deviation of each
            raise UserError(
                f"{file}: encoder_hidden_size {made[0]} and decoder_input_channels {made[1]}; "
                f"{self.folder.name} works on {channels} channels, which needs {2 * channels} and {channels}.",
                "Put the VAE of the model's own release into that folder.",
            )
        return config

    def load_text_encoder(
        self, device: torch.device = CPU, dtype: torch.dtype = torch.float32
    ) -> tuple[Qwen3Model, PreTrainedTokenizerFast]:
        """(Qwen3 without a head, its tokenizer)."""
        read = read_config(self.layout.part("text_encoder") / "config.json")
        config = Qwen3Config(**{name: value for name, value in read.items() if name in QWEN3_FIELDS})
        config._attn_implementation = "sdpa"
        encoder = self._load(Qwen3Model, "text_encoder", "", {"config": config}, device, wide(dtype))
        return encoder, self.load_tokenizer()

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """The text tokenizer alone; a few MB. Of its files only tokenizer.json is read, which holds all of it."""
        file = self.layout.part("tokenizer") / "tokenizer.json"
        read_config(file)  # a missing or cut file gets our message, not the library's
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(file)), pad_token=END_OF_TEXT)

    def silence_latent(self) -> Tensor:
        """The VAE's latent of silence, fp32 [1, T, D], 600 s on official checkpoints."""
        if self.layout.kind == "diffusers":
            weights = self._open("condition_encoder")
            return next(iter(weights.read(["silence_latent"], torch.float32, CPU)))[1]
        path = self.layout.silence_latent
        if not path.is_file():
            raise UserError(
                f"{path} is missing.",
                f"Copy {path.name} from any ACE-Step 1.5 checkpoint of this release into that folder.",
            )
        try:
            latent = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: not a plain tensor file ({first_line}).", DOWNLOAD_AGAIN) from None
        if not isinstance(latent, Tensor) or latent.ndim != 3 or latent.shape[1] != self.latent_channels:
            raise UserError(f"{path}: expected a tensor [1, {self.latent_channels}, frames].", DOWNLOAD_AGAIN)
        return latent.float().transpose(1, 2).contiguous()

    def _open(self, part: str) -> Weights:
        path = self.layout.part(part)
        if path not in self._weights:
            self._weights[path] = Weights(path, self.report)
        return self._weights[path]

    def _load(
        self,
        model_class: type[M],
        part: str,
        prefix: str,
        sizes: dict,
        device: torch.device,
        dtype: torch.dtype,
        extra: Mapping[str, Callable[[], Tensor]] = MappingProxyType({}),
        quantize: str = "",
        without: Sequence[str] = (),
    ) -> M:
        """A part in evaluation mode.

        prefix: of its keys in the one file that the model's parts share in the original layout; empty for the parts
        that are beside it. sizes: what its class takes, unless its own config.json says. without: children left out.
        """
        weights = self._open(part)
        if prefix and self.layout.kind == "original":
            keys = {diffusers_key(key.removeprefix(prefix)): key for key in weights.shapes if key.startswith(prefix)}
        else:
            sizes = read_config(weights.path / "config.json") if prefix else sizes
            # a text encoder may come from a whole language model
            keys = {k.removeprefix("model."): k for k in weights.shapes if k not in extra and k != "lm_head.weight"}
        keys = {name: key for name, key in keys.items() if name.partition(".")[0] not in without}
        what = part.replace("_", " ")
        done = loading(self.report, what, weights, keys, dtype, quantize)
        with init_empty_weights(include_buffers=False):
            model = model_class(**accepted(model_class, sizes))
            if quantize:
                make_quantizable(model, quantize, dtype)
        for child in without:
            setattr(model, child, nn.Identity())
        fill(model, weights, keys, dtype, device, what, extra, done)
        self.loaded_keys.update(keys.values() if prefix else ())
        return model.to(device).eval().requires_grad_(False)  # buffers outside the checkpoint move here


def decoder_sizes(config: dict) -> dict:
    """The DiT's sizes under diffusers' argument names, from a `config.json` of either layout."""
    sizes = dict(config)
    sizes["rope_theta"] = sizes.get("rope_theta") or sizes.get("rope_parameters", {}).get("rope_theta", 1e6)
    if sizes.get("use_sliding_window") is False:
        sizes["layer_types"] = ["full_attention"] * int(sizes["num_hidden_layers"])
    return sizes


def encoder_sizes(config: dict) -> dict:
    """The encoders' sizes: in XL they keep the 2B model's."""
    sizes = decoder_sizes(config)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        sizes[name] = sizes.get(f"encoder_{name}") or sizes[name]
    return sizes


def open_checkpoint(
    checkpoint_dir: Path, model_variant: str, report: Report = null, flag: str = "--model-variant"
) -> Checkpoint:
    """The checkpoint of a variant (or folder name) below `checkpoint_dir`. Reads only its config. Raises UserError."""
    return Checkpoint(find_layout(checkpoint_dir, model_variant, flag), report)


def prepend_timbre_token(encoder: AceStepConditionEncoder) -> None:
    """Let the timbre encoder read its special token at position 0, as the original XL model does."""
    timbre = encoder.timbre_encoder

    def with_token(_module: nn.Module, _inputs: tuple, frames: Tensor) -> Tensor:
        return torch.cat([timbre.special_token.expand(frames.shape[0], -1, -1).to(frames.dtype), frames], dim=1)

    timbre.embed_tokens.register_forward_hook(with_token)


def accepted(model_class: type[nn.Module], config: dict) -> dict:
    """The entries of a config that the class takes as arguments."""
    parameters = set(inspect.signature(model_class.__init__).parameters) - {"self"}
    return {name: value for name, value in config.items() if name in parameters}
