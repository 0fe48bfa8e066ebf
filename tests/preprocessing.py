"""What the preprocessing tests share: small libraries of songs, jobs over the tiny checkpoint, what a folder holds."""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch

from sidestep.data.records import find_records, load_record
from sidestep.events import Event
from sidestep.settings.config import PreprocessConfig
from tests.conftest import FIXTURES

# Tiny models on a busy machine: threads of one operation that wait for each other cost ten times the work.
torch.set_num_threads(1)


def tone(seconds: float, pitch: float = 220.0) -> np.ndarray:
    """Stereo samples [S, 2] at 48 kHz."""
    n = np.arange(round(seconds * 48000)) / 48000
    return np.stack([0.3 * np.sin(2 * np.pi * pitch * n), 0.2 * np.sin(3 * np.pi * pitch * n)], 1).astype(np.float32)


def make_library(folder: Path, names: list[str], seconds: float = 0.3) -> Path:
    """Songs of different pitch, and a dataset.json that lists them."""
    samples = []
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, tone(seconds, 200 + 10 * i), 48000)
        samples.append(
            {
                "audio_path": name,
                "caption": f"song {i}",
                "lyrics": f"[Verse]\nline {i}",
                "bpm": 90 + i,
                "language": "en",
            }
        )
    (folder / "dataset.json").write_text(
        json.dumps({"metadata": {"name": "test"}, "samples": samples}), encoding="utf-8"
    )
    return folder


def edit_library(folder: Path, index: int, **changes) -> None:
    """Change what dataset.json says of one song."""
    path = folder / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["samples"][index].update(changes)
    path.write_text(json.dumps(content), encoding="utf-8")


def job(library: Path, output: Path, **settings) -> PreprocessConfig:
    settings = {
        "checkpoint_dir": FIXTURES / "checkpoints",
        "model_variant": "turbo",
        "device": "cpu",
        "audio_dir": library,
        "tensor_output": output,
    } | settings
    return PreprocessConfig(**settings)


def contents(output: Path) -> dict[str, tuple]:
    """Everything in a folder of records: tensors as bytes, metadata but for the times of the audio file."""

    def plain(tensor: torch.Tensor | None) -> tuple | None:
        return (
            None
            if tensor is None
            else (tuple(tensor.shape), str(tensor.dtype), tensor.contiguous().view(torch.uint8).numpy().tobytes())
        )

    found = {}
    for path in find_records(output):
        record = load_record(path)
        metadata = {k: v for k, v in record.metadata.items() if k != "audio_stat"}
        tensors = (
            record.target_latents,
            record.encoder_hidden_states,
            record.audio_codes,
            record.cover_hints,
            record.hints_encoder_hidden_states,
        )
        found[path.relative_to(output).as_posix()] = (*map(plain, tensors), json.dumps(metadata, sort_keys=True))
    return found


class Events(list):
    """A report that keeps what it hears."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    def of(self, kind: type) -> list:
        return [event for event in self if isinstance(event, kind)]
