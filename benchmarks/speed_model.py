"""The model, songs and checkpoint that the speed benchmark trains: real architecture, random weights, real lengths.

Values do not matter for speed, so latents are noise; lengths are those of the 28 clips of `immich-memories-music` and
of songs joined from them.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import immich_memories_music
import soundfile
import torch
from diffusers import AceStepTransformer1DModel
from safetensors.torch import save_file

from benchmarks.measure import Setting
from sidestep.acestep.fused import fuse_layers
from sidestep.acestep.layout import original_key
from sidestep.adapters.attach import attach
from sidestep.data.records import Record, save_record
from sidestep.settings.config import TrainConfig
from sidestep.tasks.demo import write_tiny_checkpoint
from sidestep.variants import CONFIG_2B, OFFICIAL_FOLDERS

FRAMES_PER_SECOND = 25
CHANNELS = 64
PADDED_CONDITION = 769  # 256 text + 512 lyric + 1 timbre tokens: what other trainers pad to
# 51 M parameters: the 2B model's shape at a quarter of its width and half of its layers
SMALL = CONFIG_2B | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "is_turbo": True,
    "model_version": "turbo",
}


def sizes(setting: Setting, layers: int = 0) -> dict:
    """The model's config: the whole 2B model on a GPU, the small one elsewhere."""
    whole = CONFIG_2B | {"is_turbo": True, "model_version": "turbo"} if setting.device.type == "cuda" else SMALL
    return whole | ({"num_hidden_layers": layers} if layers else {})


def make_decoder(setting: Setting, layers: int = 0) -> AceStepTransformer1DModel:
    """A frozen decoder with random weights."""
    torch.manual_seed(0)
    config = sizes(setting, layers)
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim in_channels "
        "audio_acoustic_hidden_dim sliding_window is_turbo"
    )
    chosen = {name: config[name] for name in names.split()}
    decoder = AceStepTransformer1DModel(**chosen).to(setting.device, setting.dtype).requires_grad_(False)
    fuse_layers(decoder)
    return decoder


def train_config(folder: Path = Path(), **changes) -> TrainConfig:
    """Settings of the benchmark's runs: no recomputation, as on a card with the memory, unless a table says so."""
    config = TrainConfig(
        checkpoint_dir=folder / "checkpoints",
        dataset_dir=folder / "tensors",
        output_dir=folder / "run",
        rank=16,
        alpha=32,
        gradient_checkpointing=False,
        log_every=10,
        save_every=10_000,
    )
    return replace(config, **changes)


def make_model(setting: Setting, layers: int = 0, **changes) -> torch.nn.Module:
    """The decoder with an adapter, in training mode."""
    return attach(make_decoder(setting, layers), train_config(**changes)).train()


def parameters(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters"


def inputs(setting: Setting, width: int, seconds: float, condition: int = 100, batch: int = 1) -> dict:
    """What one forward pass takes."""
    frames = round(seconds * FRAMES_PER_SECOND)
    shapes = {
        "hidden_states": (frames, CHANNELS),
        "context_latents": (frames, 2 * CHANNELS),
        "encoder_hidden_states": (condition, width),
    }
    tensors = {
        name: torch.randn(batch, *shape, device=setting.device).to(setting.dtype) for name, shape in shapes.items()
    }
    t = torch.rand(batch, device=setting.device)
    return tensors | {"timestep": t, "timestep_r": t, "return_dict": False}


def clip_seconds() -> list[float]:
    """Lengths of the 28 real clips."""
    tracks = Path(immich_memories_music.__file__).parent / "tracks"
    return [soundfile.info(str(path)).duration for path in sorted(tracks.glob("*/*.opus"))]


def joined_seconds() -> list[float]:
    """Lengths of six songs made by joining the 28 clips, 60 to 240 s."""
    clips, songs = clip_seconds(), []
    for count in (2, 3, 4, 5, 6, 8):
        songs.append(min(sum(clips[:count]), 240.0))
        clips = clips[count:]
    return songs


def condition_tokens(seconds: float, number: int) -> int:
    """Condition tokens of a song: 85 to 115 for prompt, timbre and `[Instrumental]`.

    Songs of more than 45 s have lyrics besides, 1.5 tokens a second.
    """
    return 85 + random.Random(number).randrange(31) + (round(1.5 * seconds) if seconds > 45 else 0)


def write_songs(folder: Path, lengths: list[float], width: int, lyrics: int = 0) -> None:
    """Training records of songs of these lengths; lyrics: condition tokens beyond `condition_tokens`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for number, seconds in enumerate(lengths):
        latents = torch.randn(round(seconds * FRAMES_PER_SECOND), CHANNELS, generator=generator)
        conditions = torch.randn(condition_tokens(seconds, number) + lyrics, width, generator=generator)
        save_record(folder / f"song {number:02d}.pt", Record(latents, conditions, {"duration": seconds}))


def write_checkpoint(folder: Path, setting: Setting) -> Path:
    """A checkpoint in the original layout with the benchmark's decoder; the other parts are tiny and not used."""
    write_tiny_checkpoint(folder)
    config, model = sizes(setting), folder / OFFICIAL_FOLDERS["turbo"]
    tensors = {
        "decoder." + original_key(name): tensor.to("cpu").contiguous()
        for name, tensor in make_decoder(setting).state_dict().items()
    }
    tensors["null_condition_emb"] = torch.zeros(1, 1, config["hidden_size"], dtype=setting.dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    file = folder / "vae" / "config.json"
    vae = json.loads(file.read_text(encoding="utf-8"))
    vae |= {"encoder_hidden_size": 2 * CHANNELS, "decoder_input_channels": CHANNELS}
    file.write_text(json.dumps(vae), encoding="utf-8")
    torch.save(torch.zeros(1, CHANNELS, 15000), model / "silence_latent.pt")
    return folder
