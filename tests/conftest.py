"""Shared pieces of the tests: the tiny checkpoints, the goldens of the original code and their test audio."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

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
