"""Shared pieces of the tests: the tiny checkpoints, the goldens of the original code and their test audio."""

import json
import math
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models are tiny: threads would only wait for each other, here and in each process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Code that a test compiles is there for the next, and not among the caches of whoever runs the tests.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "side-step-tests"))

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sidestep.acestep.lm.model import load_language_model

# A shell that starts the tests in the background, or nohup, leaves these ignored, for all processes of the tests too.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _name in ("SIGTERM", "SIGHUP"):
    if hasattr(signal, _name):
        signal.signal(getattr(signal, _name), signal.SIG_DFL)

torch.set_num_threads(1)  # also where the environment says otherwise

FIXTURES = Path(__file__).parent / "fixtures"


def golden_audio(case: int, seconds: float) -> np.ndarray:
    """Test audio of a golden case, float32 [2, S] at 48 kHz, by the formula in the fixtures' notes."""
    n = np.arange(round(seconds * 48000), dtype=np.float64) / 48000
    left = 0.4 * np.sin(2 * np.pi * (220 + 30 * case) * n) + 0.1 * np.sin(2 * np.pi * 1760 * n * (1 + 0.1 * n))
    right = 0.4 * np.sin(2 * np.pi * (330 + 30 * case) * n) * np.exp(-n)
    return np.stack([left, right]).astype(np.float32)


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    return FIXTURES / "checkpoints"


@pytest.fixture(scope="session")
def golden_cases() -> list[dict]:
    return json.loads((FIXTURES / "golden" / "cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session", params=["acestep-v15-turbo", "acestep-v15-xl-turbo"])
def golden(request) -> tuple[str, dict]:
    """(checkpoint folder, tensors of the original code) for each fixture variant."""
    return request.param, load_file(FIXTURES / "golden" / f"{request.param}.safetensors")


def assert_golden(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the original code's numbers: 1e-5, and for the largest of them what fp32 sums lose in another order."""
    torch.testing.assert_close(actual.float().cpu(), expected, rtol=0, atol=1e-5 + 1e-6 * expected.abs().max().item())


@pytest.fixture
def golden_time_table(monkeypatch):
    """The sinusoids of the time embedding as they were on the machine that made the goldens.

    The last bit of exp() differs between processors' mathematics libraries. One such bit in one frequency, times
    t * 1000, moves the velocity by up to 1.5e-4: more than the goldens' 1e-5, and nothing that a program could be right
    or wrong about.
    """

    def table(timesteps, embedding_dim, flip_sin_to_cos=True, downscale_freq_shift=0):
        half = embedding_dim // 2
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
        frequencies = exponents.double().exp().float()  # rounded right, but for one
        frequencies[12] = torch.nextafter(frequencies[12], torch.tensor(1.0))
        angles = timesteps[:, None].float() * frequencies.to(timesteps.device)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    monkeypatch.setattr(
        "diffusers.models.embeddings.get_timestep_embedding",
        lambda t, dim, scale=1, **how: table(t * scale, dim, **how),
    )


@pytest.fixture(scope="session")
def lm_checkpoints() -> Path:
    """A tiny language model and a DiT with as many codes."""
    return FIXTURES / "lm" / "checkpoints"


@pytest.fixture(scope="session")
def lm_golden() -> dict:
    """What the original code makes of prompts and answers."""
    return json.loads((FIXTURES / "lm" / "golden" / "lm.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def lm_numbers() -> dict:
    """The original code's numbers for these."""
    return load_file(FIXTURES / "lm" / "golden" / "lm.safetensors")


@pytest.fixture(scope="session")
def tiny_lm(lm_checkpoints):
    """The tiny language model in fp32; not to be changed."""
    return load_language_model(lm_checkpoints / "acestep-5Hz-lm-0.6B", 512)


@pytest.fixture(scope="session")
def lm_home(tmp_path_factory, checkpoints, lm_checkpoints) -> Path:
    """A folder of checkpoints as people have it: DiT, language model, VAE and text encoder. Not to be changed."""
    home = tmp_path_factory.mktemp("lm-home")
    for folder in (*lm_checkpoints.iterdir(), checkpoints / "vae", checkpoints / "Qwen3-Embedding-0.6B"):
        shutil.copytree(folder, home / folder.name)
    return home
