"""Loading a whole 2B decoder takes the memory of its weights, not twice that."""

import json
import subprocess
import sys

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AceStepTransformer1DModel
from safetensors.torch import save_file

from sidestep.acestep.checkpoint import accepted
from sidestep.acestep.layout import original_key
from sidestep.variants import official_config

LOAD = """
import resource, sys, torch
from pathlib import Path
from sidestep.acestep.checkpoint import open_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
decoder = open_checkpoint(Path(sys.argv[1]), "turbo").load_decoder(dtype=torch.bfloat16)
touched = sum(p.sum(dtype=torch.float32).item() for p in decoder.parameters())
print(peak() - before, sum(p.nbytes for p in decoder.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB only on Linux")
def test_loading_a_2b_decoder_peaks_at_its_weights(tmp_path):
    folder = tmp_path / "acestep-v15-turbo"
    folder.mkdir()
    config = official_config("turbo")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with init_empty_weights():
        decoder = AceStepTransformer1DModel(**accepted(AceStepTransformer1DModel, config))
    filler = torch.randn(1 << 20).to(torch.bfloat16)

    def random(shape: torch.Size) -> torch.Tensor:
        return filler.repeat(-(-shape.numel() // len(filler)))[: shape.numel()].reshape(shape).clone()

    save_file(
        {"decoder." + original_key(name): random(t.shape) for name, t in decoder.state_dict().items()},
        folder / "model.safetensors",
    )
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True)
    added, weights = map(int, done.stdout.split())
    assert weights == 2 * 1_575_458_880
    assert added <= 1.05 * weights
