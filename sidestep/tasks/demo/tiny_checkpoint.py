"""A checkpoint in the original layout: the real architecture at a hundred-thousandth of its size.

Its weights are random: it makes noise, not music.
"""

import inspect
import json
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.modeling_ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from sidestep.acestep.layout import TEXT_ENCODER_FOLDER, original_key
from sidestep.acestep.vae import encode_mean
from sidestep.variants import CONFIG_2B, OFFICIAL_FOLDERS

END = "<|endoftext|>"
RATE = 48000
CHANNELS = 8
WIDTH = 32
SIZES = CONFIG_2B | {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "in_channels": 3 * CHANNELS,
    "audio_acoustic_hidden_dim": CHANNELS,
    "sliding_window": 16,
    "text_hidden_dim": WIDTH,
    "timbre_hidden_dim": CHANNELS,
    "num_lyric_encoder_hidden_layers": 2,
    "num_timbre_encoder_hidden_layers": 2,
    "num_attention_pooler_hidden_layers": 1,
    "fsq_dim": WIDTH,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "model_type": "acestep",
    "is_turbo": True,
    "model_version": "turbo",
}
SILENCE_SECONDS = 40.0


def write_tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint folders below `folder` and return it: what `--checkpoint-dir` points at."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderOobleck(
            encoder_hidden_size=16,
            decoder_channels=8,
            decoder_input_channels=CHANNELS,
            downsampling_ratios=[2, 4, 4, 6, 10],
            sampling_rate=RATE,
        )
        vae.eval().save_pretrained(folder / "vae")
        _write_text_encoder(folder / TEXT_ENCODER_FOLDER)
        _write_model(folder / OFFICIAL_FOLDERS["turbo"], vae)
    return folder


def _write_text_encoder(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=END, eos_token=END).save_pretrained(folder)
    sizes = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    Qwen3Model(sizes).save_pretrained(folder)


def _write_model(folder: Path, vae: AutoencoderOobleck) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SIZES, indent=2), encoding="utf-8")
    parts = {
        "decoder.": AceStepTransformer1DModel,
        "encoder.": AceStepConditionEncoder,
        "tokenizer.": AceStepAudioTokenizer,
        "detokenizer.": AceStepAudioTokenDetokenizer,
    }
    tensors = {
        prefix + original_key(name): tensor
        for prefix, part in parts.items()
        for name, tensor in _with_sizes(part).state_dict().items()
    }
    tensors["null_condition_emb"] = tensors.pop("encoder.null_condition_emb")
    del tensors["encoder.silence_latent"]  # stands in a file of its own
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    silence = encode_mean(vae, torch.zeros(1, 2, round(SILENCE_SECONDS * RATE)))
    torch.save(silence.transpose(1, 2).contiguous(), folder / "silence_latent.pt")


def _with_sizes(part: type[torch.nn.Module]) -> torch.nn.Module:
    """A part of the model made with those of SIZES that it takes."""
    return part(**{name: SIZES[name] for name in inspect.signature(part).parameters if name in SIZES})
