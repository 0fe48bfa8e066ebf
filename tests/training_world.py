"""A small world for tests of training: records beside the tiny checkpoint, settings, a report that remembers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sidestep.data.batches import Song
from sidestep.data.records import Record, save_record
from sidestep.events import Event
from sidestep.settings.config import TrainConfig
from sidestep.tasks.train.run import Run
from sidestep.tasks.train.setup import open_accelerator, set_up, train

CHECKPOINTS = Path(__file__).parent / "fixtures" / "checkpoints"
CHANNELS, WIDTH = 8, 32
LYRICS = "[Verse]\n[00:00.00] first line\n[00:01.00] second line\n[Chorus]\n[00:02.00] third line"

torch.set_num_threads(1)  # the model is tiny, and the tests' processes share their cores


def record(seed: int, frames: int, *, hints: bool = False, **metadata) -> Record:
    """A record of noise with a slope, which a model can learn something of."""
    generator = torch.Generator().manual_seed(seed)
    latents = 0.3 * torch.randn(frames, CHANNELS, generator=generator) + torch.linspace(-1, 1, CHANNELS)
    conditions = torch.randn(12 + seed % 3, WIDTH, generator=generator)
    facts = {
        "caption": f"song {seed}",
        "lyrics": "[Instrumental]",
        "bpm": 100,
        "keyscale": "A minor",
        "timesignature": "4",
        "language": "en",
        "repeat": 1,
    }
    extra = {"cover_hints": latents.roll(1, 0), "hints_encoder_hidden_states": conditions.flip(0)} if hints else {}
    return Record(latents, conditions, facts | metadata, **extra)


def base_beside_turbo(home: Path) -> Path:
    """A folder of checkpoints: the fixtures', and a base model with other weights."""
    shutil.copytree(CHECKPOINTS, home, dirs_exist_ok=True)
    base = home / "acestep-v15-base"
    shutil.copytree(home / "acestep-v15-turbo", base)
    said = json.loads((base / "config.json").read_text("utf-8")) | {"is_turbo": False, "model_version": "base"}
    (base / "config.json").write_text(json.dumps(said), "utf-8")
    generator = torch.Generator().manual_seed(1)
    weights = load_file(base / "model.safetensors")
    moved = {k: w + 0.02 * torch.randn(w.shape, generator=generator).to(w.dtype) for k, w in weights.items()}
    save_file(moved, base / "model.safetensors")
    return home


def song(name: str, latents: torch.Tensor, conditions: torch.Tensor, **more) -> Song:
    """A song in memory, as it comes from a record."""
    made = Record(latents, conditions, {})
    digests = {"audio": str(latents.sum().item()), "conditions": str(conditions.sum().item())}
    return Song(name, len(latents), lambda: made, digests=digests, **more)


def write_data(folder: Path, frames: tuple[int, ...] = (50, 41, 64, 50, 33), **options) -> Path:
    """A folder of records, one song for each number of frames."""
    for i, count in enumerate(frames):
        save_record(folder / f"song {i}.pt", record(i, count, **options))
    return folder


def settings(data: Path, output: Path, **changes) -> TrainConfig:
    """A run of a few seconds: 5 songs in steps of 2 and a short one, two epochs."""
    values = {
        "checkpoint_dir": CHECKPOINTS,
        "dataset_dir": data,
        "output_dir": output,
        "device": "cpu",
        "rank": 4,
        "alpha": 8.0,
        "lr": 3e-3,
        "epochs": 2,
        "batch_size": 1,
        "gradient_accumulation": 2,
        "log_every": 1,
        "gradient_checkpointing": False,
        "warmup_steps": 0,
    }
    return TrainConfig(**values | changes)


class Log:
    """A report that remembers its events and can be told to act on them."""

    def __init__(self, act=None) -> None:
        self.events: list[Event] = []
        self._act = act

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self._act:
            self._act(event)

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def text(self) -> str:
        return "\n".join(getattr(event, "message", "") for event in self.events)


def prepared(config: TrainConfig) -> Run:
    """A run as `train` sets it up, before its first step."""
    log = Log()
    accelerator, precision = open_accelerator(config, log)
    return set_up(config, log, accelerator, precision)


def run(config: TrainConfig, act=None) -> Log:
    """Train and return what was reported."""
    log = Log(act)
    train(config, log)
    return log


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder."""
    return load_file(next(iter(sorted(folder.glob("*.safetensors")))))


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> Iterator[str]:
    """Names of tensors that are not the same bit for bit."""
    assert set(a) == set(b)
    return (name for name in a if not torch.equal(a[name], b[name]))
